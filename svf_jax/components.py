"""The component replay's stages in JAX. Twin of svf_torch/components.py and stages/oracle/components.py."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from stages.spec.layouts import LAYOUTS
from stages.spec.stage import Functions

# The declaration names the stages; a function has its stage's name.
REPLAY_STAGES: Functions[Callable[..., Array]] = Functions()


@REPLAY_STAGES
def source_f32(source: Array) -> Array:
    """The weight as stored, `[rows, cols]`."""
    return source.astype(jnp.float32)


@REPLAY_STAGES
def offsets_f32(offsets: Array) -> Array:
    """One scale offset per singular value, `[rank]`."""
    return offsets.astype(jnp.float32)


@REPLAY_STAGES
def scaled_s(offsets_f32: Array, s: Array) -> Array:
    """Singular values after the SVF step, S * (1 + offsets), `[rank]`."""
    return s * (1 + offsets_f32)


@REPLAY_STAGES
def normalization(scaled_s: Array, s: Array) -> Array:
    """sum(S) / sum(scaled_s), shape `[1]`."""
    return (s.sum() / scaled_s.sum()).reshape(1)


@REPLAY_STAGES
def u_scaled(scaled_s: Array, u: Array) -> Array:
    """U with column j times scaled_s[j], `[rows, rank]`."""
    return u * scaled_s


@REPLAY_STAGES
def matmul_pre_norm(u_scaled: Array, v: Array, *, layout: str) -> Array:
    """u_scaled @ V^T, `[rows, cols]`; V contracted as the layout says."""
    return u_scaled @ _v_transposed(v, layout)


@REPLAY_STAGES
def zero_source_f32(u: Array, s: Array, v: Array, *, layout: str) -> Array:
    """(U * S) @ V^T, `[rows, cols]`: the replay with zero offsets."""
    return (u * s) @ _v_transposed(v, layout)


@REPLAY_STAGES
def adapted_source_f32(matmul_pre_norm: Array, normalization: Array) -> Array:
    """matmul_pre_norm * normalization, `[rows, cols]`."""
    return matmul_pre_norm * normalization


@REPLAY_STAGES
def final_f32(adapted_source_f32: Array, *, transpose: bool) -> Array:
    """The adapted weight in the target's orientation."""
    return adapted_source_f32.T if transpose else adapted_source_f32


@REPLAY_STAGES
def final_bf16(final_f32: Array) -> Array:
    """final_f32 rounded to bfloat16, to nearest, ties to even."""
    return final_f32.astype(jnp.bfloat16)


def _v_transposed(v: Array, layout: str) -> Array:
    return v.T if LAYOUTS[layout].transposed else v
