"""What an error of a stage's result says of its inputs: each stage's transposed derivative, at its float64 values.

Carried back from a recorded tensor to every hidden value, the tensor's error tells which of them, and which weight's
element, it most likely comes from, in one pass for all of them. First order: a candidate is then computed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.oracle.decoder import _repeated, attn_softmax
from stages.oracle.spread import STEPS, by_heads
from stages.spec.stage import Stage

Arrays = Sequence[np.ndarray]
# Of the inputs, the params, the options and some adjoints `[count, *result]`, the adjoints of the inputs; None of those
# that no weight stands before: RoPE's tables.
Adjoint = Callable[[Arrays, Arrays, Mapping[str, Any], np.ndarray], list[np.ndarray | None]]


def carried_back(
    stage: Stage, inputs: Arrays, params: Arrays, options: Mapping[str, Any], back: np.ndarray
) -> list[np.ndarray | None] | None:
    """The adjoints `[count, *input]` of a stage's inputs, from those of its result; None of a stage without one."""
    if stage.identity:
        return [back]
    rule = ADJOINTS.get(stage.function)
    return None if rule is None else rule(inputs, params, options, back)


def _summed(_x: Arrays, _p: Arrays, _o: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    return [g, g]


def _multiplied(x: Arrays, _p: Arrays, _o: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    """One of the factors may be a single number, or one of each row."""
    return [_as_far(back, a) for back, a in zip((g * x[1], g * x[0]), x, strict=True)]


def _as_far(back: np.ndarray, a: np.ndarray) -> np.ndarray:
    """The adjoint of what was spread over more axes, or along one."""
    if back.ndim - 1 != a.ndim:
        return back.sum(axis=(1, 2)).reshape(-1, *a.shape)
    spread = tuple(n + 1 for n, (of, to) in enumerate(zip(a.shape, back.shape[1:], strict=True)) if of != to)
    return back.sum(axis=spread, keepdims=True) if spread else back


def _product(_x: Arrays, params: Arrays, _o: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    weights = [w for w in params if w.ndim == 2]
    ends = np.cumsum([len(w) for w in weights])[:-1]
    parts = np.split(g, ends, axis=-1)
    return [
        sum(
            (part @ w.astype(g.dtype, copy=False) for part, w in zip(parts, weights, strict=True)),
            np.zeros((), g.dtype),
        )
    ]


def _silu(x: Arrays, _p: Arrays, _o: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    sigmoid = 1 / (1 + np.exp(-x[0]))
    return [g * (sigmoid * (1 + x[0] * (1 - sigmoid))).astype(g.dtype)]


def _normed(part: int | None) -> Adjoint:
    def rule(x: Arrays, params: Arrays, options: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
        a = x[0] if part is None else by_heads(x[0], part, options)
        root = np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + options["eps"])
        n, g = (a / root).astype(g.dtype), g * params[0].astype(g.dtype)
        back = (g - n * np.mean(g * n, axis=-1, keepdims=True)) / root.astype(g.dtype)
        return [back if part is None else _joined(back, part, x[0], options)]

    return rule


def _turned(part: int) -> Adjoint:
    def rule(x: Arrays, _p: Arrays, options: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
        cos, sin = (table.astype(g.dtype)[:, None] for table in x[1:])
        one, other = np.split(g * sin, 2, axis=-1)
        back = g * cos + np.concatenate((other, -one), axis=-1)
        return [_joined(back, part, x[0], options), None, None]

    return rule


def _scores(x: Arrays, _p: Arrays, options: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    q, heads, scale = x[0].swapaxes(0, 1).astype(g.dtype), x[0].shape[1], g.dtype.type(options["scaling"])
    k, kv_heads = _repeated(x[1], heads).astype(g.dtype), x[1].shape[1]
    of_q, of_k = scale * (g @ k), scale * (g.swapaxes(-1, -2) @ q)
    return [of_q.swapaxes(1, 2), _grouped(of_k, kv_heads).swapaxes(1, 2)]


def _softmax(x: Arrays, _p: Arrays, options: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    p = attn_softmax(x[0], window=options.get("window")).astype(g.dtype)
    return [p * (g - np.sum(p * g, axis=-1, keepdims=True))]


def _weighted(x: Arrays, _p: Arrays, options: Mapping[str, Any], g: np.ndarray) -> list[np.ndarray | None]:
    p, heads = x[0].astype(g.dtype), len(x[0])
    values = by_heads(x[1], 2, options)
    g = g.reshape(*g.shape[:2], heads, -1).swapaxes(1, 2)
    of_v = _grouped(p.swapaxes(-1, -2) @ g, values.shape[1]).swapaxes(1, 2)
    return [g @ _repeated(values, heads).astype(g.dtype).swapaxes(-1, -2), _joined(of_v, 2, x[1], options)]


def _grouped(g: np.ndarray, kv_heads: int) -> np.ndarray:
    """The adjoint of heads that were repeated: `[count, heads, ...]` summed to `[count, kv_heads, ...]`."""
    return g.reshape(len(g), kv_heads, -1, *g.shape[2:]).sum(axis=2)


def _joined(back: np.ndarray, part: int, x: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """The adjoint of q, k or v by heads as one of what they were taken from: their join, or themselves."""
    if x.ndim == 3:
        return back
    ends = np.cumsum([0, *(options[name] * options["head_dim"] for name in ("heads", "kv_heads", "kv_heads"))])
    whole = np.zeros((len(back), *x.shape), back.dtype)
    whole[..., ends[part] : ends[part + 1]] = back.reshape(*back.shape[:2], -1)
    return whole


_RULES: Mapping[str, Adjoint] = {
    "norm": _normed(None),
    "product": _product,
    "norm of queries": _normed(0),
    "norm of keys": _normed(1),
    "turned queries": _turned(0),
    "turned keys": _turned(1),
    "scores": _scores,
    "softmax": _softmax,
    "weighted": _weighted,
    "sum": _summed,
    "silu": _silu,
    "elementwise product": _multiplied,
}
ADJOINTS: Mapping[str, Adjoint] = MappingProxyType(
    {stage: _RULES[step] for stage, step in STEPS.items() if step in _RULES}
)
