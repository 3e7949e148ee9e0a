"""The component replay's stages in JAX. Twin of svf_torch/components.py and stages/oracle/components.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from stages.spec.layouts import LAYOUTS
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float

# The declaration names the stages; a function has its stage's name.
REPLAY_STAGES: Functions[Callable[..., Array]] = Functions()


@REPLAY_STAGES
def source_f32(source: Float[Array, "rows cols"]) -> Float[Array, "rows cols"]:
    """The weight as stored."""
    return source.astype(jnp.float32)


@REPLAY_STAGES
def offsets_f32(offsets: Float[Array, " rank"]) -> Float[Array, " rank"]:
    """One scale offset per singular value."""
    return offsets.astype(jnp.float32)


@REPLAY_STAGES
def scaled_s(offsets_f32: Float[Array, " rank"], s: Float[Array, " rank"]) -> Float[Array, " rank"]:
    """Singular values after the SVF step, S * (1 + offsets)."""
    return s * (1 + offsets_f32)


@REPLAY_STAGES
def normalization(scaled_s: Float[Array, " rank"], s: Float[Array, " rank"]) -> Float[Array, " one"]:
    """sum(S) / sum(scaled_s)."""
    return (s.sum() / scaled_s.sum()).reshape(1)


@REPLAY_STAGES
def u_scaled(scaled_s: Float[Array, " rank"], u: Float[Array, "rows rank"]) -> Float[Array, "rows rank"]:
    """U with column j times scaled_s[j]."""
    return u * scaled_s


@REPLAY_STAGES
def matmul_pre_norm(
    u_scaled: Float[Array, "rows rank"], v: Float[Array, "cols rank"] | Float[Array, "rank cols"], *, layout: str
) -> Float[Array, "rows cols"]:
    """u_scaled @ V^T; V contracted as the layout says."""
    return u_scaled @ _v_transposed(v, layout)


@REPLAY_STAGES
def zero_source_f32(
    u: Float[Array, "rows rank"],
    s: Float[Array, " rank"],
    v: Float[Array, "cols rank"] | Float[Array, "rank cols"],
    *,
    layout: str,
) -> Float[Array, "rows cols"]:
    """(U * S) @ V^T: the replay with zero offsets."""
    return (u * s) @ _v_transposed(v, layout)


@REPLAY_STAGES
def adapted_source_f32(
    matmul_pre_norm: Float[Array, "rows cols"], normalization: Float[Array, " one"]
) -> Float[Array, "rows cols"]:
    """matmul_pre_norm * normalization."""
    return matmul_pre_norm * normalization


@REPLAY_STAGES
def final_f32(
    adapted_source_f32: Float[Array, "rows cols"], *, transpose: bool
) -> Float[Array, "rows cols"] | Float[Array, "cols rows"]:
    """The adapted weight in the target's orientation."""
    return adapted_source_f32.T if transpose else adapted_source_f32


@REPLAY_STAGES
def final_bf16(final_f32: Float[Array, "rows cols"]) -> Float[Array, "rows cols"]:
    """final_f32 rounded to bfloat16, to nearest, ties to even."""
    return final_f32.astype(jnp.bfloat16)


def _v_transposed(v: Array, layout: str) -> Array:
    return v.T if LAYOUTS[layout].transposed else v
