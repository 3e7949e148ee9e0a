"""What a backend is: how one framework computes each stage. Structural; nothing inherits from this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from stages.production import Production, Weights
    from stages.qwen import QwenConfig


class Backend(Protocol):
    """Frozen dataclasses implement this; device and precision are their constructor fields.

    A stage function takes the stage's inputs, then its params, in declared order, and its options by
    keyword; framework arrays in and out; pure.
    """

    @property
    def name(self) -> str: ...

    @property
    def replay(self) -> Mapping[str, Callable[..., Any]]:
        """Stage name -> function, for the component replay."""

    @property
    def forward(self) -> Mapping[str, Callable[..., Any]]:
        """Stage name -> function, for the Qwen forward; identity stages have none."""

    def put(self, array: np.ndarray) -> Any:
        """The framework's array with the same bits, on this backend's device."""

    def get(self, array: Any) -> np.ndarray:
        """A C-contiguous numpy array with the same bits."""

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` compiled once per shape of its arguments, where the framework compiles."""

    def production(
        self, config: QwenConfig, weights: Weights, *, dtype: str = "model", raw_config: Mapping[str, Any] | None = None
    ) -> Production | None:
        """The uninstrumented model, all weights loaded; None where there is no such thing."""

    def facts(self) -> dict[str, str]:
        """Versions, device, threads, precision flags: what may change results. Recorded in every dump."""
