"""The component replay's stages in PyTorch. Twin of svf_jax/components.py and stages/oracle/components.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.spec.layouts import LAYOUTS
from stages.spec.stage import Functions

# The declaration names the stages; a function has its stage's name.
REPLAY_STAGES: Functions[Callable[..., Tensor]] = Functions()


@REPLAY_STAGES
def source_f32(source: Tensor) -> Tensor:
    """The weight as stored, `[rows, cols]`."""
    return source.to(torch.float32)


@REPLAY_STAGES
def offsets_f32(offsets: Tensor) -> Tensor:
    """One scale offset per singular value, `[rank]`."""
    return offsets.to(torch.float32)


@REPLAY_STAGES
def scaled_s(offsets_f32: Tensor, s: Tensor) -> Tensor:
    """Singular values after the SVF step, S * (1 + offsets), `[rank]`."""
    return s * (1 + offsets_f32)


@REPLAY_STAGES
def normalization(scaled_s: Tensor, s: Tensor) -> Tensor:
    """sum(S) / sum(scaled_s), shape `[1]`."""
    return (s.sum() / scaled_s.sum()).reshape(1)


@REPLAY_STAGES
def u_scaled(scaled_s: Tensor, u: Tensor) -> Tensor:
    """U with column j times scaled_s[j], `[rows, rank]`."""
    return u * scaled_s


@REPLAY_STAGES
def matmul_pre_norm(u_scaled: Tensor, v: Tensor, *, layout: str) -> Tensor:
    """u_scaled @ V^T, `[rows, cols]`; V contracted as the layout says."""
    return u_scaled @ _v_transposed(v, layout)


@REPLAY_STAGES
def zero_source_f32(u: Tensor, s: Tensor, v: Tensor, *, layout: str) -> Tensor:
    """(U * S) @ V^T, `[rows, cols]`: the replay with zero offsets."""
    return (u * s) @ _v_transposed(v, layout)


@REPLAY_STAGES
def adapted_source_f32(matmul_pre_norm: Tensor, normalization: Tensor) -> Tensor:
    """matmul_pre_norm * normalization, `[rows, cols]`."""
    return matmul_pre_norm * normalization


@REPLAY_STAGES
def final_f32(adapted_source_f32: Tensor, *, transpose: bool) -> Tensor:
    """The adapted weight in the target's orientation."""
    return adapted_source_f32.T.contiguous() if transpose else adapted_source_f32


@REPLAY_STAGES
def final_bf16(final_f32: Tensor) -> Tensor:
    """final_f32 rounded to bfloat16, to nearest, ties to even."""
    return final_f32.to(torch.bfloat16)


def _v_transposed(v: Tensor, layout: str) -> Tensor:
    return v.T if LAYOUTS[layout].transposed else v
