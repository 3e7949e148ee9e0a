"""PyTorch behind the backend protocol. Twin of svf_jax/backend.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from stages.errors import UsageError
from stages.files.memory import aligned_copy, is_aligned
from stages.spec import environment
from stages.spec.backend import Production, Weights
from stages.spec.config import ModelConfig, RawConfig
from svf_torch.components import REPLAY_STAGES
from svf_torch.decoder import FORWARD_STAGES
from svf_torch.experts import EXPERT_STAGES
from svf_torch.fused import FUSED
from svf_torch.order import ORDERED
from svf_torch.probe import flags, set_flag
from svf_torch.router import ROUTER_STAGES
from svf_torch.svd import svd
from svf_torch.wide import WIDE_STAGES


@dataclass(frozen=True)
class TorchBackend:
    """Native PyTorch kernels on `device` (`cpu`, `cuda`, `cuda:1`)."""

    device: str = "cpu"
    # On a GPU torch keeps partial sums in 16 bits by default; a port is judged at full precision first (numerics.md).
    # True: products lose what this process's flags let them, as the user's own do.
    reduced_products: bool = False
    name: str = "torch"

    def __post_init__(self) -> None:
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"torch has no device '{self.device}' here ({reason}); try --device cpu") from None

    @property
    def replay(self) -> Mapping[str, Callable[..., Tensor]]:
        return REPLAY_STAGES

    @property
    def forward(self) -> Mapping[str, Callable[..., Tensor]]:
        return {**FORWARD_STAGES, **EXPERT_STAGES}

    @property
    def router(self) -> Mapping[str, Callable[..., Tensor]]:
        return ROUTER_STAGES

    @property
    def wide(self) -> Mapping[str, Callable[..., Tensor]]:
        return WIDE_STAGES

    @property
    def ordered(self) -> Mapping[str, Callable[..., Tensor]]:
        return ORDERED

    @property
    def fused(self) -> Mapping[str, Callable[..., Tensor]]:
        return FUSED

    def widened(self) -> TorchBackend:
        return self

    def put(self, array: np.ndarray) -> Tensor:
        """A tensor with the bits of `array`; bfloat16 travels as int16, which torch and numpy share."""
        array = np.require(array, requirements=("C", "W"))
        if not is_aligned(array):  # torch's own tensors all are, and float32 products of few rows depend on it
            array = aligned_copy(array)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(array).to(self.device)

    def get(self, array: Tensor) -> np.ndarray:
        """The bits of `array` as a C-contiguous numpy array."""
        return to_numpy(array)

    def svd(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, s, v = self.compile(svd)(self.put(source))
        return self.get(u), self.get(s), self.get(v)

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` without autograd: torch runs eagerly, operation by operation."""

        def call(*arrays: Tensor) -> Any:
            with torch.inference_mode(), self._flags():
                return fn(*arrays)

        return call

    @contextmanager
    def _flags(self) -> Iterator[None]:
        """Within it, on a GPU, no product loses bits; the process's own flags are back afterwards."""
        on = (
            {}
            if self.reduced_products or not self.device.startswith("cuda")
            else {k: v for k, v in flags().items() if v}
        )
        for name in on:
            set_flag(name, False)
        try:
            yield
        finally:
            for name in on:
                set_flag(name, True)

    def production(
        self, config: ModelConfig, weights: Weights, *, dtype: str = "model", raw_config: RawConfig | None = None
    ) -> Production:
        """The transformers model of `config`, eager attention; `raw_config` is the checkpoint's own config.json."""
        from svf_torch.production import production  # transformers takes seconds to import

        return production(config, weights, dtype=dtype, device=self.device, raw_config=raw_config)

    def facts(self) -> dict[str, str]:
        """What may change results: versions, device, threads, precision flags."""
        with self._flags():
            effective = {name: str(value) for name, value in flags().items()}
        return {
            "backend": self.name,
            "torch": torch.__version__,
            "device": device_name(self.device),
            "threads": str(torch.get_num_threads()),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "blas": "mkl" if torch.backends.mkl.is_available() else "other",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            **effective,
            **environment.facts(),
        }


def to_numpy(array: Tensor) -> np.ndarray:
    """The bits of `array` as a C-contiguous numpy array."""
    array = array.detach().contiguous().cpu()
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.numpy()


def device_name(device: str) -> str:
    """A device as facts name it: with the GPU's model."""
    return f"{device}: {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device
