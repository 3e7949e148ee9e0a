"""The router head's stage in numpy float64. Twin of svf_torch/router.py and svf_jax/router.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float

# The declaration names the stages; a function has its stage's name.
ROUTER_STAGES: Functions[Callable[..., np.ndarray]] = Functions()


@ROUTER_STAGES
def router_logits(
    router_hidden: Float[np.ndarray, "one hidden"], router_head: Float[np.ndarray, "outputs hidden"]
) -> Float[np.ndarray, "one outputs"]:
    """router_hidden @ router_head^T."""
    return router_hidden.astype(np.float64) @ router_head.astype(np.float64).T


OPERANDS: Mapping[str, Callable[..., tuple[np.ndarray, ...]]] = MappingProxyType(
    {"router_logits": lambda hidden, head: (hidden, head.T)}
)
