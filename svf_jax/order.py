"""What products in a given order are put together from, in JAX. Twin of svf_torch/order.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax import Array

# Kernels for whole tiles alone: rows and columns that fill none take other ones, and other orders.
TILE = 64


def chain(a: Array, b: Array) -> Array:
    """a @ b, `[M, N]`, each element likely one FMA chain over K; who needs it to be so checks."""
    rows, cols = a.shape[0], b.shape[1]
    # XLA sums up to 512 terms in one FMA chain (svf probe; docs/findings/order.md).
    a, b = jnp.pad(a, ((0, -rows % TILE), (0, 0))), jnp.pad(b, ((0, 0), (0, -cols % TILE)))
    return jnp.matmul(a, b)[:rows, :cols]


def add(x: Array, y: Array) -> Array:
    """x + y, rounded by itself."""
    return x + y


def join(parts: Sequence[Array]) -> Array:
    """The parts side by side, on the last axis."""
    return jnp.concatenate(parts, axis=-1)


def stack(parts: Sequence[Array]) -> Array:
    """The parts on a new first axis."""
    return jnp.stack(parts)


def scale(x: Array, factor: float) -> Array:
    """x times a factor rounded to float32."""
    return x * np.float32(factor)


ORDERED: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {"chain": chain, "add": add, "join": join, "stack": stack, "scale": scale}
)
