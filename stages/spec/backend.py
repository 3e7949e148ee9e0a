"""What a backend is: how one framework computes each stage. Structural; nothing inherits from this."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from stages.errors import UsageError, shown
from stages.spec.config import ModelConfig, RawConfig

# The two sides of every comparison: a is the first, b the second; and how a command names both.
SIDES = ("torch", "jax")
BOTH = "both"


def check_device(device: str) -> None:
    """`UsageError` unless it is a device that both frameworks may have, by its name; whether it is there, they say."""
    if not re.fullmatch(r"cpu|(cuda|gpu)(:\d{1,3})?", device, re.ASCII):
        raise UsageError(f"--device {shown(device)}: expected cpu, or a GPU: cuda, gpu, gpu:1")


class Weights(Protocol):
    """Where parameters come from: a model that was opened (`files.source.ModelSource`), adapted or not."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of parameter `name`; the caller does not change the array."""


def stored_as(weights: Weights, name: str) -> str:
    """The tensor that has the values of parameter `name`: for a tied LM head the embedding, where the reader tells."""
    resolve = getattr(weights, "resolve", None)
    return name if resolve is None else str(resolve(name))


class Production(Protocol):
    """A loaded, uninstrumented model of one backend."""

    def __call__(self, tokens: Sequence[int], *, last_only: bool = False) -> np.ndarray:
        """Logits `[tokens, vocab]`, or the last token's, `[1, vocab]`, in the activations' dtype."""

    def reordered(self, tokens: Sequence[int], *, last_only: bool = False) -> np.ndarray:
        """The same logits by another legitimate order of evaluation: the difference is rounding, by construction."""

    def generate(self, tokens: Sequence[int], n: int) -> list[int]:
        """The `n` greedy tokens that follow, each from a forward of all before it."""


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
        """Stage name -> function, for the forward; identity stages have none."""

    @property
    def router(self) -> Mapping[str, Callable[..., Any]]:
        """Stage name -> function, for the router head."""

    @property
    def wide(self) -> Mapping[str, Callable[..., Any]]:
        """Stage name -> function of float64 arrays that gives the value before the final rounding, for all paths.

        Stages with a rounding to the activations' dtype inside (`forward.ROUNDED_INSIDE`) take it as `dtype`.
        """

    @property
    def ordered(self) -> Mapping[str, Callable[..., Any]]:
        """What products in a given order are put together from; empty where there is no such thing.

        `chain(a, b)` is a product of which each element is likely one FMA chain over K, `add(x, y)` a sum by itself;
        `join`, `stack` and `scale` put the parts of a stage together.
        """

    @property
    def fused(self) -> Mapping[str, Callable[..., Any]]:
        """What a framework computes in one call where a pipeline has several stages; empty where there is none such.

        `attention(q_post_rope, k_post_rope, qkv_bias, *, scaling, heads, kv_heads, head_dim)` is the framework's own.
        """

    def widened(self) -> Backend:
        """This backend, able to compute in float64: to call `wide` with."""

    def put(self, array: np.ndarray) -> Any:
        """The framework's array with the same bits, on this backend's device."""

    def get(self, array: Any) -> np.ndarray:
        """A C-contiguous numpy array with the same bits."""

    def svd(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """U `[rows, rank]`, S `[rank]`, falling, and V `[cols, rank]` (layout `torch_v`) of a float32 weight.

        Float32, by the SVD that the framework's users call; of the reference, float64 rounded once.
        """

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` compiled once per shape of its arguments, where the framework compiles."""

    def production(
        self, config: ModelConfig, weights: Weights, *, dtype: str = "model", raw_config: RawConfig | None = None
    ) -> Production | None:
        """The uninstrumented model, all weights loaded; None where there is no such thing."""

    def facts(self) -> dict[str, str]:
        """Versions, device, threads, precision flags: what may change results. Recorded in every dump."""


# Name, device, precision and options of a backend -> the backend, its framework imported now.
Loader = Callable[..., Backend]


class Delegate:
    """The backend `inside`, but for what a subclass changes."""

    def __init__(self, inside: Backend):
        self.inside, self.name = inside, inside.name
        self.replay, self.forward, self.router = inside.replay, inside.forward, inside.router
        self.wide, self.ordered, self.fused, self.svd = inside.wide, inside.ordered, inside.fused, inside.svd

    def widened(self) -> Backend:
        return self.inside.widened()

    def put(self, array: np.ndarray) -> Any:
        """The framework's array with the same bits."""
        return self.inside.put(array)

    def get(self, array: Any) -> np.ndarray:
        """A C-contiguous numpy array with the same bits."""
        return self.inside.get(array)

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` itself: what it calls is compiled stage by stage."""
        return fn

    def production(
        self, config: ModelConfig, weights: Weights, *, dtype: str = "model", raw_config: RawConfig | None = None
    ) -> Production | None:
        """There is none: production is the backend's own, unchanged."""

    def facts(self) -> dict[str, str]:
        return self.inside.facts()
