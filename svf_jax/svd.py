"""JAX's own SVD. Twin of svf_torch/svd.py, which has the legacy decompositions of the original tool besides."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def svd(source: Array) -> tuple[Array, Array, Array]:
    """U `[rows, rank]`, S `[rank]` and V `[cols, rank]` of a float32 weight."""
    u, s, vh = jnp.linalg.svd(source, full_matrices=False)
    return u, s, vh.T  # linalg.svd returns V^H, a backend gives V
