"""Environment variables that change bits, declared once: dumps record them, orders and calibrations are kept apart by
them, `svf doctor` tells of them.

Each was tried by its effect where a CPU shows one (tests/jobs/test_environment.py); those of other machines are here by
their makers' word.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stages.errors import shown

FACT = "environment"
# XLA's flag, and the fact of it: at 0 it tunes nothing, otherwise another process may take other kernels on a GPU.
AUTOTUNE = "xla_gpu_autotune_level"
# XLA flags that neither choose an arithmetic nor an instruction set.
_HARMLESS_XLA = ("--xla_dump_", "--xla_force_host_platform_device_count", "--xla_gpu_cuda_data_dir")
# A flag file holds some lines.
_MAX_FLAGS = 64 * 1024


class Effect(StrEnum):
    """What a finding does: `stops` a run, `changes` results, or is good to `know`."""

    STOPS = "stops"
    CHANGES = "changes"
    KNOW = "know"


@dataclass(frozen=True)
class Variable:
    """A variable: what it does where set, the values (lower case) without an effect, what to do, whether it may change
    bits and so is a fact of a run."""

    effect: Effect
    harmless: tuple[str, ...]
    remedy: str
    bits: bool = True


_SAME = "unset it, or set it alike for every run that is compared"
_THREADS = "a float32 SVD (--svd torch) depends on the number of threads"
_OURS = "svf sets this for its own computations; other programs are affected"
_OFF = ("", "0", "false", "off", "no")
_UNSET = ("",)

VARIABLES: dict[str, Variable] = {
    "MKL_CBWR": Variable(Effect.CHANGES, _UNSET, f"MKL takes other kernels and sums in another order; {_SAME}"),
    "MKL_ENABLE_INSTRUCTIONS": Variable(Effect.CHANGES, _UNSET, f"MKL takes other kernels; {_SAME}"),
    "MKL_DEBUG_CPU_TYPE": Variable(Effect.CHANGES, _UNSET, f"an older MKL takes other kernels; {_SAME}"),
    "ATEN_CPU_CAPABILITY": Variable(Effect.CHANGES, _UNSET, f"torch takes other kernels; {_SAME}"),
    "ONEDNN_MAX_CPU_ISA": Variable(Effect.CHANGES, ("", "default"), f"oneDNN takes other kernels; {_SAME}"),
    "DNNL_MAX_CPU_ISA": Variable(Effect.CHANGES, ("", "default"), f"oneDNN takes other kernels; {_SAME}"),
    "ONEDNN_DEFAULT_FPMATH_MODE": Variable(
        Effect.CHANGES, ("", "strict"), "oneDNN rounds float32 operands down; unset it"
    ),
    "DNNL_DEFAULT_FPMATH_MODE": Variable(
        Effect.CHANGES, ("", "strict"), "oneDNN rounds float32 operands down; unset it"
    ),
    "NVIDIA_TF32_OVERRIDE": Variable(Effect.CHANGES, ("", "0"), "cuBLAS takes TF32 whatever is asked for; unset it"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Variable(
        Effect.CHANGES, _OFF, "torch takes TF32 for products on GPUs; unset it"
    ),
    "CUBLAS_WORKSPACE_CONFIG": Variable(Effect.KNOW, _UNSET, f"cuBLAS takes other kernels; {_SAME}"),
    "OMP_NUM_THREADS": Variable(Effect.KNOW, _UNSET, _THREADS),
    "OMP_THREAD_LIMIT": Variable(Effect.KNOW, _UNSET, _THREADS),
    "OMP_DYNAMIC": Variable(Effect.KNOW, _OFF, _THREADS),
    "MKL_NUM_THREADS": Variable(Effect.KNOW, _UNSET, _THREADS),
    "MKL_DOMAIN_NUM_THREADS": Variable(Effect.KNOW, _UNSET, _THREADS),
    "MKL_DYNAMIC": Variable(Effect.KNOW, _UNSET, _THREADS),
    "OPENBLAS_NUM_THREADS": Variable(Effect.KNOW, _UNSET, "numpy's products, the reference's, depend on it"),
    "XLA_FLAGS": Variable(Effect.CHANGES, _UNSET, "unset it, or give both runs that are compared the same flags"),
    "LIBTPU_INIT_ARGS": Variable(Effect.CHANGES, _UNSET, f"XLA compiles otherwise on a TPU; {_SAME}"),
    "JAX_DISABLE_JIT": Variable(Effect.CHANGES, _OFF, "JAX rounds operation by operation; unset it"),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": Variable(Effect.CHANGES, _OFF, f"XLA fuses otherwise; {_SAME}"),
    "JAX_DEFAULT_MATMUL_PRECISION": Variable(Effect.KNOW, ("", "highest"), _OURS),
    "JAX_ENABLE_X64": Variable(Effect.KNOW, _OFF, _OURS),
    "JAX_NUMPY_DTYPE_PROMOTION": Variable(Effect.KNOW, ("", "standard"), "JAX refuses, or promotes, other dtypes"),
    "JAX_PLATFORMS": Variable(Effect.STOPS, _UNSET, "add cpu: svf computes there unless told otherwise", bits=False),
    "CUDA_VISIBLE_DEVICES": Variable(Effect.KNOW, _UNSET, "GPUs are numbered among these", bits=False),
    "HF_HOME": Variable(Effect.KNOW, _UNSET, "", bits=False),
    "HF_HUB_CACHE": Variable(Effect.KNOW, _UNSET, "", bits=False),
    "HF_HUB_OFFLINE": Variable(Effect.KNOW, _OFF, "hub models must be in the cache already, whole", bits=False),
    "SVF_CACHE": Variable(Effect.KNOW, _UNSET, "", bits=False),
}


def set_here(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The declared variables that are set to something that has an effect, with what of their value has it."""
    environment = os.environ if environment is None else environment
    found = {}
    for name, variable in VARIABLES.items():
        value = environment.get(name, "").strip()
        if name == "XLA_FLAGS":
            value = " ".join(flag for flag in xla_flags(value) if not flag.startswith(_HARMLESS_XLA))
        if value.lower() not in variable.harmless:
            found[name] = value
    return found


def xla_flags(value: str) -> list[str]:
    """The flags of XLA_FLAGS; a value that does not begin with a dash names a file of them."""
    if value and not value.startswith("-"):
        try:
            with Path(value).open(errors="replace") as file:
                value = file.read(_MAX_FLAGS)
        except OSError:
            return [value]
    return value.split()


def xla_flag(name: str, environment: Mapping[str, str] | None = None) -> str:
    """What XLA_FLAGS says of the flag `name`, the last time it does; `default` where it does not."""
    environment = os.environ if environment is None else environment
    given = (flag.partition("=") for flag in xla_flags(environment.get("XLA_FLAGS", "")))
    return {flag: value for flag, _, value in given}.get(f"--{name}", "default")


def facts(but: Collection[str] = ()) -> dict[str, str]:
    """The fact `environment`: what is set here and may change bits, `NAME=value` each; empty where nothing is.

    `but` are variables left out: what they set is told otherwise.
    """
    bits = {name: value for name, value in set_here().items() if VARIABLES[name].bits and name not in but}
    return {FACT: "; ".join(f"{name}={shown(value, 300)}" for name, value in bits.items())}
