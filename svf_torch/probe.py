"""What this process's PyTorch is and how it is set: run in a child of `svf doctor`. Twin of svf_jax/probe.py."""

from __future__ import annotations

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
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        },
    }


def _accelerators() -> list[str]:
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
