"""The router head's stage in PyTorch. Twin of svf_jax/router.py and stages/oracle/router.py."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from stages.spec.stage import Functions

# The declaration names the stages; a function has its stage's name.
ROUTER_STAGES: Functions[Callable[..., Tensor]] = Functions()


@ROUTER_STAGES
def router_logits(router_hidden: Tensor, router_head: Tensor) -> Tensor:
    """router_hidden `[1, hidden]` @ router_head^T, `[1, agents + roles]`."""
    return F.linear(router_hidden, router_head)
