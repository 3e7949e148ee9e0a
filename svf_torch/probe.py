"""What this process's PyTorch is and how it is set: run in a child of `svf doctor`. Twin of svf_jax/probe.py."""

from __future__ import annotations

from typing import Any

import torch


def probe() -> dict[str, object]:
    """Devices, threads and the settings that change results, as plain values."""
    return {
        "devices": ["cpu", *_accelerators()],
        "settings": {
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "blas": "mkl" if torch.backends.mkl.is_available() else "other",
            "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            **flags(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
    }


def flags() -> dict[str, bool]:
    """The flags that let products on a GPU lose bits: TF32, and partial sums kept in the output's 16 bits."""
    matmul = torch.backends.cuda.matmul
    return {
        "tf32_matmul": _tf32(matmul),
        "tf32_cudnn": _tf32(torch.backends.cudnn),
        "bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
    }


def set_flag(name: str, value: bool) -> None:
    """Set one of `flags`, for the whole process."""
    kind = torch.backends.cudnn if name == "tf32_cudnn" else torch.backends.cuda.matmul
    setattr(kind, "allow_tf32" if name.startswith("tf32") else f"allow_{name}", value)


def _tf32(kind: Any) -> bool:
    try:
        return bool(kind.allow_tf32)
    except RuntimeError:  # it was set by the name that torch 2.9 brought, and is told by that one alone
        return bool(kind.fp32_precision == "tf32")


def _accelerators() -> list[str]:
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
