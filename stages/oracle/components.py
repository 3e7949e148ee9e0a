"""The third backend: every stage in numpy float64, written to be read. It is also the oracle.

A function takes float32 stage values and returns the float64 value before its final rounding; roundings that
the model prescribes *inside* a stage are performed. Twin of svf_torch/components.py and svf_jax/components.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.oracle import svd
from stages.oracle.decoder import FORWARD_STAGES
from stages.oracle.experts import EXPERT_STAGES
from stages.oracle.rounding import round_once
from stages.oracle.router import ROUTER_STAGES
from stages.spec import environment
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import DECLARED, ROUNDED_INSIDE
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY
from stages.spec.router import ROUTER
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float

# The declaration names the stages; a function has its stage's name.
REPLAY_STAGES: Functions[Callable[..., np.ndarray]] = Functions()


@REPLAY_STAGES
def source_f32(source: Float[np.ndarray, "rows cols"]) -> Float[np.ndarray, "rows cols"]:
    """The weight as stored."""
    return source.astype(np.float64)


@REPLAY_STAGES
def offsets_f32(offsets: Float[np.ndarray, " rank"]) -> Float[np.ndarray, " rank"]:
    """One scale offset per singular value."""
    return offsets.astype(np.float64)


@REPLAY_STAGES
def scaled_s(offsets_f32: Float[np.ndarray, " rank"], s: Float[np.ndarray, " rank"]) -> Float[np.ndarray, " rank"]:
    """Singular values after the SVF step, S * (1 + offsets)."""
    one_plus = np.float32(1) + offsets_f32  # the model rounds 1 + z to float32 before the product
    return s.astype(np.float64) * one_plus


@REPLAY_STAGES
def normalization(scaled_s: Float[np.ndarray, " rank"], s: Float[np.ndarray, " rank"]) -> Float[np.ndarray, " one"]:
    """sum(S) / sum(scaled_s)."""
    return (np.sum(s, dtype=np.float64) / np.sum(scaled_s, dtype=np.float64)).reshape(1)


@REPLAY_STAGES
def u_scaled(scaled_s: Float[np.ndarray, " rank"], u: Float[np.ndarray, "rows rank"]) -> Float[np.ndarray, "rows rank"]:
    """U with column j times scaled_s[j]."""
    return u.astype(np.float64) * scaled_s


@REPLAY_STAGES
def matmul_pre_norm(
    u_scaled: Float[np.ndarray, "rows rank"],
    v: Float[np.ndarray, "cols rank"] | Float[np.ndarray, "rank cols"],
    *,
    layout: str,
) -> Float[np.ndarray, "rows cols"]:
    """u_scaled @ V^T; V contracted as the layout says."""
    return u_scaled.astype(np.float64) @ _v_transposed(v, layout).astype(np.float64)


@REPLAY_STAGES
def zero_source_f32(
    u: Float[np.ndarray, "rows rank"],
    s: Float[np.ndarray, " rank"],
    v: Float[np.ndarray, "cols rank"] | Float[np.ndarray, "rank cols"],
    *,
    layout: str,
) -> Float[np.ndarray, "rows cols"]:
    """(U * S) @ V^T: the replay with zero offsets."""
    return matmul_pre_norm(u * s, v, layout=layout)  # the model rounds U * S to float32


@REPLAY_STAGES
def adapted_source_f32(
    matmul_pre_norm: Float[np.ndarray, "rows cols"], normalization: Float[np.ndarray, " one"]
) -> Float[np.ndarray, "rows cols"]:
    """matmul_pre_norm * normalization."""
    return matmul_pre_norm.astype(np.float64) * normalization


@REPLAY_STAGES
def final_f32(
    adapted_source_f32: Float[np.ndarray, "rows cols"], *, transpose: bool
) -> Float[np.ndarray, "rows cols"] | Float[np.ndarray, "cols rows"]:
    """The adapted weight in the target's orientation."""
    return (adapted_source_f32.T if transpose else adapted_source_f32).astype(np.float64)


@REPLAY_STAGES
def final_bf16(final_f32: Float[np.ndarray, "rows cols"]) -> Float[np.ndarray, "rows cols"]:
    """final_f32; the boundary rounds it to bfloat16."""
    return final_f32.astype(np.float64)


def _v_transposed(v: np.ndarray, layout: str) -> np.ndarray:
    return v.T if LAYOUTS[layout].transposed else v


# What a stage's noise bound is computed from (noise.BOUNDS), from the same arguments: the two factors of a product,
# the two sums of a ratio. A stage that is not here is bounded from its arguments.
OPERANDS: Mapping[str, Callable[..., tuple[np.ndarray, ...]]] = MappingProxyType(
    {
        "normalization": lambda scaled_s, s: (s, scaled_s),
        "matmul_pre_norm": lambda u_scaled, v, *, layout: (u_scaled, _v_transposed(v, layout)),
        "zero_source_f32": lambda u, s, v, *, layout: (u * s, _v_transposed(v, layout)),
    }
)


def _rounded(fn: Callable[..., np.ndarray], dtype: np.dtype) -> Callable[..., np.ndarray]:
    return lambda *args, **options: round_once(fn(*args, **options), dtype)


def _rounded_forward(fn: Callable[..., np.ndarray], dtype: str) -> Callable[..., np.ndarray]:
    """`fn`, rounded to its declared dtype, or to the activations': the option's, or that of the last argument."""

    def call(*args: np.ndarray, **options: Any) -> np.ndarray:
        name = dtype if dtype != "model" else options.get("dtype") or args[-1].dtype.name
        return round_once(fn(*args, **options), stored_dtype(name))

    return call


def _of_wide(fn: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`fn` of float64 arrays, narrowed to what was stored: its roundings inside go by its arguments' dtype."""

    def call(*args: np.ndarray, dtype: str = "float32", **options: Any) -> np.ndarray:
        return fn(*(array.astype(stored_dtype(dtype)) for array in args), **options)

    return call


@dataclass(frozen=True)
class ReferenceBackend:
    """numpy in float64; stage boundaries round to the stage's dtype."""

    device: str = "cpu"
    name: str = "reference"

    @property
    def replay(self) -> Mapping[str, Callable[..., np.ndarray]]:
        return {name: _rounded(fn, stored_dtype(REPLAY[name].dtype)) for name, fn in REPLAY_STAGES.items()}

    @property
    def forward(self) -> Mapping[str, Callable[..., np.ndarray]]:
        native = {**FORWARD_STAGES, **EXPERT_STAGES}
        return {name: _rounded_forward(fn, DECLARED[name].dtype) for name, fn in native.items()}

    @property
    def router(self) -> Mapping[str, Callable[..., np.ndarray]]:
        return {name: _rounded(fn, stored_dtype(ROUTER[name].dtype)) for name, fn in ROUTER_STAGES.items()}

    @property
    def wide(self) -> Mapping[str, Callable[..., np.ndarray]]:
        replay = {name: _of_wide(fn) for name, fn in REPLAY_STAGES.items()}
        inside = {name: _of_wide(fn) for name, fn in FORWARD_STAGES.items() if name in ROUNDED_INSIDE}
        return {**FORWARD_STAGES, **EXPERT_STAGES, **ROUTER_STAGES, **replay, **inside}

    @property
    def ordered(self) -> Mapping[str, Callable[..., np.ndarray]]:
        return {}  # in float64 no order of float32 sums applies

    @property
    def fused(self) -> Mapping[str, Callable[..., np.ndarray]]:
        return {}

    def widened(self) -> ReferenceBackend:
        return self

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(array, order="C")

    def svd(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = svd.decompose(lambda start, stop: source[start:stop], source.shape)
        return found.u(), found.s, found.v

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def production(self, config: ModelConfig, weights: Weights, **_options: Any) -> None:
        """There is none: the reference is a specification, not what anybody runs."""

    def facts(self) -> dict[str, str]:
        return {
            "backend": self.name,
            "numpy": np.__version__,
            "device": "cpu",
            "cpus": str(len(os.sched_getaffinity(0))),
            "arithmetic": "float64, rounded at stage boundaries",
            **environment.facts(),
        }
