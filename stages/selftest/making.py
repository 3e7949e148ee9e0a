"""What faults are made of: the right function of wrong operands or options, another function, a changed result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stages.selftest.fault import Call, float32

# Specimens of a family, for faults in what it alone has.
QWEN3, QWEN2 = ("qwen3", "qwen3-bf16"), ("qwen2", "qwen2-untied", "qwen2-bf16")
BFLOAT16 = ("qwen3-bf16", "qwen2-bf16")
Plant = Callable[[Call], np.ndarray]


def with_options(**changed: float) -> Plant:
    """The right function with other options."""
    return lambda call: call.of(**changed)


def of_operands(change: Callable[..., tuple[np.ndarray, ...]]) -> Plant:
    """The right function of other operands."""
    return lambda call: call.of(*change(*call.arguments))


def then(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The right result, changed."""
    return lambda call: change(float32(call.right()))


def another(function: Callable[..., np.ndarray]) -> Plant:
    """Another function of the operands, in float32; norms of heads and biases are not among them."""
    return lambda call: function(*map(float32, call.arguments))


def scaled(call: Call) -> np.ndarray:
    """The right result times 1 + size."""
    return float32(call.right()) * np.float32(1 + call.size)


def narrow_first(narrow: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The right function with its first operand in fewer bits."""
    return lambda call: call.of(narrow(call.arguments[0]), *call.arguments[1:])


def all_operands(narrow: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The right function with all operands in fewer bits."""
    return lambda call: call.of(*map(narrow, call.arguments))


def heads_of(call: Call, part: int, qkv: np.ndarray | None = None) -> np.ndarray:
    """Queries (0), keys (1) or values (2) by heads, out of their join."""
    o = call.options
    sizes = [o["heads"], o["kv_heads"], o["kv_heads"]]
    joined = float32(call.arguments[0] if qkv is None else qkv)
    return joined.reshape(len(joined), -1, o["head_dim"])[:, sum(sizes[:part]) : sum(sizes[: part + 1])]


def by_heads(call: Call) -> np.ndarray:
    """What RoPE turns, by heads: normed queries or keys, or a part of the join."""
    x, heads = call.arguments[0], call.right().shape[1]
    return float32(x) if x.ndim == 3 else heads_of(call, 0 if heads == call.options["heads"] else 1)
