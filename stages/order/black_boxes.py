"""A backend's products and sums as black boxes over numpy arrays, through the very stages that a run executes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.spec.backend import Backend

# (a [M, K], b [K, N]) -> a @ b [M, N], float32.
ProductBox = Callable[[np.ndarray, np.ndarray], np.ndarray]
# [rows, K] -> a number per row that depends on the sum of the row's terms.
RowBox = Callable[[np.ndarray], np.ndarray]

# Of the model that most runs here are about, Qwen3-0.6B: a batched product may sum as no single one does.
HEADS, KV_HEADS = 16, 8
# Scores are scaled after they are summed; a power of two is undone without a trace.
_SCALING = 0.125


def _stage(backend: Backend, stages: Mapping[str, Callable[..., Any]], name: str, **options: Any) -> Callable[..., Any]:
    compiled = backend.compile(functools.partial(stages[name], **options))
    return lambda *arrays: backend.get(compiled(*(backend.put(np.asarray(a, np.float32)) for a in arrays)))


def _turned(backend: Backend) -> ProductBox:
    call = _stage(backend, backend.replay, "matmul_pre_norm", layout="torch_v")
    return lambda a, b: call(a, b.T)


def _straight(backend: Backend) -> ProductBox:
    return _stage(backend, backend.replay, "matmul_pre_norm", layout="vh")


def _linear(backend: Backend) -> ProductBox:
    call = _stage(backend, backend.forward, "lm_head")
    return lambda a, b: call(a, b.T)


def _scores(backend: Backend) -> ProductBox:
    call = _stage(backend, backend.forward, "attn_scores", scaling=_SCALING)

    def box(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        q, k = np.repeat(a[:, None], HEADS, axis=1), np.repeat(b.T[:, None], KV_HEADS, axis=1)
        return call(q, k)[-1] / np.float32(_SCALING)

    return box


def _weighted(backend: Backend) -> ProductBox:
    def box(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        head_dim = b.shape[1]
        call = stages(head_dim)
        qkv = np.concatenate([np.zeros((b.shape[0], (HEADS + KV_HEADS) * head_dim)), np.tile(b, KV_HEADS)], axis=1)
        return call(np.repeat(a[None], HEADS, axis=0), qkv)[:, -head_dim:]

    @functools.cache
    def stages(head_dim: int) -> Callable[..., Any]:
        options = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": head_dim}
        return _stage(backend, backend.forward, "attention", **options)

    return box


# What is probed: the stage, and the box that feeds it a product of any size.
PRODUCTS: Mapping[str, Callable[[Backend], ProductBox]] = MappingProxyType(
    {
        "matmul_pre_norm (torch_v)": _turned,
        "matmul_pre_norm (vh, nx)": _straight,
        "lm_head": _linear,
        "attn_scores": _scores,
        "attention": _weighted,
    }
)


def total(backend: Backend) -> Callable[[np.ndarray], float]:
    """`[K]` terms of any sign -> their sum, as `normalization` sums them: the other sum is 1 in any order."""
    call = _stage(backend, backend.replay, "normalization")

    def box(terms: np.ndarray) -> float:
        one = np.zeros_like(terms)
        one[0] = 1
        return float(call(one, terms)[0])

    return box


def mean_of_squares(backend: Backend, size: int) -> RowBox:
    """`[rows, K]` -> `[rows, K]` RMSNorm with weight 1.

    The eps keeps a sum from 1 to 1.7 in its binade and its mean from being a perfect square, whose root would be the
    same for the next number.
    """
    call = _stage(backend, backend.forward, "final_norm", eps=0.3 / size)
    weight = np.ones(size, np.float32)
    return lambda x: call(x, weight)


def softmax(backend: Backend) -> RowBox:
    """`[rows, K]` scores -> `[rows, K]` softmax, a head of its own for each row."""
    call = _stage(backend, backend.forward, "attn_softmax")
    return lambda scores: call(scores[:, None])[:, 0]
