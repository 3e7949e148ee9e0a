"""The router head's stage in JAX. Twin of svf_torch/router.py and stages/oracle/router.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jax import Array

from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float

# The declaration names the stages; a function has its stage's name.
ROUTER_STAGES: Functions[Callable[..., Array]] = Functions()


@ROUTER_STAGES
def router_logits(
    router_hidden: Float[Array, "one hidden"], router_head: Float[Array, "outputs hidden"]
) -> Float[Array, "one outputs"]:
    """router_hidden @ router_head^T."""
    return router_hidden @ router_head.T
