"""JAX/XLA behind the backend protocol. Twin of svf_torch/backend.py."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array

from stages.errors import UsageError
from stages.spec import environment
from stages.spec.backend import Production, Weights
from stages.spec.config import ModelConfig, RawConfig
from svf_jax.components import REPLAY_STAGES
from svf_jax.decoder import FORWARD_STAGES
from svf_jax.experts import EXPERT_STAGES
from svf_jax.fused import FUSED
from svf_jax.order import ORDERED
from svf_jax.probe import flags
from svf_jax.router import ROUTER_STAGES
from svf_jax.svd import svd
from svf_jax.wide import WIDE_STAGES


@dataclass(frozen=True)
class JaxBackend:
    """XLA-compiled stages on `device` (`cpu`, `gpu`, `gpu:1`, `tpu`); `precision` is that of products."""

    device: str = "cpu"
    # GPUs and TPUs default to TF32-like products; a port is judged at full precision first (numerics.md).
    precision: str = "highest"
    # Without jit every operation is dispatched by itself: what fusion inside a stage does shows as the difference.
    jit: bool = True
    # Float64 at all; within this backend's calls, the process keeps its own setting.
    x64: bool = False
    name: str = "jax"

    def __post_init__(self) -> None:
        self._device()

    def _device(self) -> jax.Device:
        platform, _, index = self.device.replace("cuda", "gpu").partition(":")
        try:
            return jax.devices(platform)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"jax has no device '{self.device}' here ({reason}); try --device cpu") from None

    @property
    def replay(self) -> Mapping[str, Callable[..., Array]]:
        return REPLAY_STAGES

    @property
    def forward(self) -> Mapping[str, Callable[..., Array]]:
        return {**FORWARD_STAGES, **EXPERT_STAGES}

    @property
    def router(self) -> Mapping[str, Callable[..., Array]]:
        return ROUTER_STAGES

    @property
    def wide(self) -> Mapping[str, Callable[..., Array]]:
        return WIDE_STAGES

    @property
    def ordered(self) -> Mapping[str, Callable[..., Array]]:
        return ORDERED

    @property
    def fused(self) -> Mapping[str, Callable[..., Array]]:
        return FUSED

    def widened(self) -> JaxBackend:
        return replace(self, x64=True)

    def put(self, array: np.ndarray) -> Array | np.ndarray:
        """A JAX array with the bits of `array`."""
        array = np.asarray(array, order="C")
        if self.x64 and self.jit:
            return array  # a compiled stage takes it to the device itself, ten times sooner than device_put
        with jax.enable_x64(self.x64):
            return jax.device_put(array, self._device())

    def get(self, array: Array) -> np.ndarray:
        """The bits of `array` as a C-contiguous numpy array."""
        return np.asarray(array, order="C")

    def svd(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, s, v = self.compile(svd)(self.put(source))
        return self.get(u), self.get(s), self.get(v)

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` under jit, one stage at a time: jitting stages together would let XLA fuse and change bits."""
        jitted, device = _jitted(fn) if self.jit else fn, self._device()

        def call(*arrays: Array | np.ndarray) -> Array:
            with jax.default_matmul_precision(self.precision), jax.enable_x64(self.x64), jax.default_device(device):
                return jitted(*arrays)

        return call

    def production(
        self, config: ModelConfig, weights: Weights, *, dtype: str = "model", raw_config: RawConfig | None = None
    ) -> Production:
        """The flax.nnx model of `config`, whole under jit; `raw_config` is for its twin."""
        from svf_jax.production import production  # flax takes a second to import

        return production(config, weights, dtype=dtype, device=self.device, precision=self.precision)

    def facts(self) -> dict[str, str]:
        """What may change results: versions, device, threads, precision flags."""
        device = self._device()
        return {
            "backend": self.name,
            "jax": jax.__version__,
            "device": f"{self.device}: {device.device_kind}" if device.platform != "cpu" else "cpu",
            "cpus": str(len(os.sched_getaffinity(0))),
            "matmul_precision": self.precision,
            "jit": str(self.jit),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            **flags(),
            **environment.facts(),
        }


def _jitted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` under jit. JAX keeps what it compiled by function and static arguments, so a stage and its options are told
    it apart: every partial would be a new function, and each run in a process would compile its stages anew."""
    if not isinstance(fn, functools.partial) or fn.args:
        return jax.jit(fn)
    return functools.partial(jax.jit(fn.func, static_argnames=tuple(fn.keywords)), **fn.keywords)
