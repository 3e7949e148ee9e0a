"""The router head's stage in JAX. Twin of svf_torch/router.py and stages/oracle/router.py."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from stages.spec.stage import Functions

# The declaration names the stages; a function has its stage's name.
ROUTER_STAGES: Functions[Callable[..., Array]] = Functions()


@ROUTER_STAGES
def router_logits(router_hidden: Array, router_head: Array) -> Array:
    """router_hidden `[1, hidden]` @ router_head^T, `[1, agents + roles]`."""
    return router_hidden @ router_head.T
