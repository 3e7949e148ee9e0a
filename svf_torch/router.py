"""The router head's stage in PyTorch. Twin of svf_jax/router.py and stages/oracle/router.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float

# The declaration names the stages; a function has its stage's name.
ROUTER_STAGES: Functions[Callable[..., Tensor]] = Functions()


@ROUTER_STAGES
def router_logits(
    router_hidden: Float[Tensor, "one hidden"], router_head: Float[Tensor, "outputs hidden"]
) -> Float[Tensor, "one outputs"]:
    """router_hidden @ router_head^T."""
    return F.linear(router_hidden, router_head)
