"""The router head's stage in numpy float64. Twin of svf_torch/router.py and svf_jax/router.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from stages.spec.stage import Functions

# The declaration names the stages; a function has its stage's name.
ROUTER_STAGES: Functions[Callable[..., np.ndarray]] = Functions()


@ROUTER_STAGES
def router_logits(router_hidden: np.ndarray, router_head: np.ndarray) -> np.ndarray:
    """router_hidden `[1, hidden]` @ router_head^T, `[1, agents + roles]`."""
    return router_hidden.astype(np.float64) @ router_head.astype(np.float64).T


OPERANDS: Mapping[str, Callable[..., tuple[np.ndarray, ...]]] = MappingProxyType(
    {"router_logits": lambda hidden, head: (hidden, head.T)}
)
