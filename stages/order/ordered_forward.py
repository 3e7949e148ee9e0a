"""The forward's products in a given order: projections, scores, weighted values; one product a weight or a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from stages.spec.forward import DECLARED
from stages.spec.noise import Noise


class Products(Protocol):
    """What the stages here are computed with: an `OrderedBackend`."""

    @property
    def ordered(self) -> Mapping[str, Callable[..., Any]]: ...

    def product(self, stage: str, a: Any, b: Any) -> Any:
        """`a @ b` in the order of `stage`; None where there is none."""


def forward_stages(backend: Products) -> dict[str, Callable[..., Any]]:
    """Stage name -> function that gives None where it knows no order for what it is given."""
    kinds = {name: stage.noise for name, stage in DECLARED.items()}
    makers: dict[Noise, Callable[..., Callable[..., Any]]] = {
        Noise.PRODUCT: _Linear,
        Noise.SCORES: _Scores,
        Noise.WEIGHTED: _Weighted,
    }
    return {name: makers[noise](backend, name) for name, noise in kinds.items() if noise in makers}


class _Stage:
    def __init__(self, backend: Products, name: str):
        self._backend, self._name = backend, name

    def _joined(self, how: str, parts: list[Any]) -> Any:
        return None if any(part is None for part in parts) else self._backend.ordered[how](parts)


class _Linear(_Stage):
    """x times each weight transposed, joined; a bias, added inside the product by production, has no order here."""

    def __call__(self, x: Any, *weights: Any) -> Any:
        if any(weight.ndim == 1 for weight in weights):
            return None
        return self._joined("join", [self._backend.product(self._name, x, weight.T) for weight in weights])


class _Scores(_Stage):
    """q k^T of every head, scaled after it is summed."""

    def __call__(self, q: Any, k: Any, *, scaling: float) -> Any:
        group = q.shape[1] // k.shape[1]
        parts = [self._backend.product(self._name, q[:, h], k[:, h // group].T) for h in range(q.shape[1])]
        scores = self._joined("stack", parts)
        return None if scores is None else self._backend.ordered["scale"](scores, scaling)


class _Weighted(_Stage):
    """Probabilities times values of every head, heads joined."""

    def __call__(self, probabilities: Any, qkv: Any, *, heads: int, kv_heads: int, head_dim: int) -> Any:
        first, group = (heads + kv_heads) * head_dim, heads // kv_heads
        starts = [first + (head // group) * head_dim for head in range(heads)]
        parts = [
            self._backend.product(self._name, probabilities[head], qkv[:, start : start + head_dim])
            for head, start in enumerate(starts)
        ]
        return self._joined("join", parts)
