"""The component replay's stages in PyTorch. Twin of svf_jax/components.py and stages/oracle/components.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.spec.layouts import LAYOUTS
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float

# The declaration names the stages; a function has its stage's name.
REPLAY_STAGES: Functions[Callable[..., Tensor]] = Functions()


@REPLAY_STAGES
def source_f32(source: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """The weight as stored."""
    return source.to(torch.float32)


@REPLAY_STAGES
def offsets_f32(offsets: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    """One scale offset per singular value."""
    return offsets.to(torch.float32)


@REPLAY_STAGES
def scaled_s(offsets_f32: Float[Tensor, " rank"], s: Float[Tensor, " rank"]) -> Float[Tensor, " rank"]:
    """Singular values after the SVF step, S * (1 + offsets)."""
    return s * (1 + offsets_f32)


@REPLAY_STAGES
def normalization(scaled_s: Float[Tensor, " rank"], s: Float[Tensor, " rank"]) -> Float[Tensor, " one"]:
    """sum(S) / sum(scaled_s)."""
    return (s.sum() / scaled_s.sum()).reshape(1)


@REPLAY_STAGES
def u_scaled(scaled_s: Float[Tensor, " rank"], u: Float[Tensor, "rows rank"]) -> Float[Tensor, "rows rank"]:
    """U with column j times scaled_s[j]."""
    return u * scaled_s


@REPLAY_STAGES
def matmul_pre_norm(
    u_scaled: Float[Tensor, "rows rank"], v: Float[Tensor, "cols rank"] | Float[Tensor, "rank cols"], *, layout: str
) -> Float[Tensor, "rows cols"]:
    """u_scaled @ V^T; V contracted as the layout says."""
    return u_scaled @ _v_transposed(v, layout)


@REPLAY_STAGES
def zero_source_f32(
    u: Float[Tensor, "rows rank"],
    s: Float[Tensor, " rank"],
    v: Float[Tensor, "cols rank"] | Float[Tensor, "rank cols"],
    *,
    layout: str,
) -> Float[Tensor, "rows cols"]:
    """(U * S) @ V^T: the replay with zero offsets."""
    return (u * s) @ _v_transposed(v, layout)


@REPLAY_STAGES
def adapted_source_f32(
    matmul_pre_norm: Float[Tensor, "rows cols"], normalization: Float[Tensor, " one"]
) -> Float[Tensor, "rows cols"]:
    """matmul_pre_norm * normalization."""
    return matmul_pre_norm * normalization


@REPLAY_STAGES
def final_f32(
    adapted_source_f32: Float[Tensor, "rows cols"], *, transpose: bool
) -> Float[Tensor, "rows cols"] | Float[Tensor, "cols rows"]:
    """The adapted weight in the target's orientation."""
    return adapted_source_f32.T.contiguous() if transpose else adapted_source_f32


@REPLAY_STAGES
def final_bf16(final_f32: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """final_f32 rounded to bfloat16, to nearest, ties to even."""
    return final_f32.to(torch.bfloat16)


def _v_transposed(v: Tensor, layout: str) -> Tensor:
    return v.T if LAYOUTS[layout].transposed else v
