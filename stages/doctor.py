"""`svf doctor`: what this machine, its frameworks and its environment are, and what about them would change a result
or stop a run (`svf.doctor/1`)."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stages.children import run_svf
from stages.defaults import cache_folder
from stages.errors import SvfError, shown
from stages.memory import available_bytes

SCHEMA = "svf.doctor/1"
PACKAGES = (
    *("svf", "numpy", "torch", "jax", "jaxlib", "flax", "transformers", "safetensors", "huggingface_hub"),
    *("ml_dtypes", "tokenizers"),
)
# Read by BLAS, XLA, the frameworks, the hub's client or this tool; shown where set.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_VISIBLE_DEVICES"),
    *("XLA_FLAGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "JAX_DISABLE_JIT"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SVF_CACHE"),
)
# A framework and a tiny model take about a GiB; a default bundle and a small dump some hundred MB.
MIN_MEMORY = 2 * 1024**3
MIN_DISK = 1024**3
# Importing a framework takes some seconds, on a slow disk a minute.
PROBE_SECONDS = 120.0
# XLA flags that neither choose an arithmetic nor an instruction set.
_HARMLESS_XLA = ("--xla_dump_", "--xla_force_host_platform_device_count", "--xla_gpu_cuda_data_dir")


class Effect(StrEnum):
    """What a finding does: `stops` a run, `changes` results, or is good to `know`."""

    STOPS = "stops"
    CHANGES = "changes"
    KNOW = "know"


@dataclass(frozen=True)
class Finding:
    """What was found, what it does, and what to do about it."""

    effect: Effect
    what: str
    remedy: str


def examine(frameworks: Sequence[str]) -> dict[str, Any]:
    """The document; each framework is probed in a process of its own. `outcome` is `well` unless some finding stops
    a run or changes results."""
    versions = {name: version_of(name) for name in PACKAGES}
    probes = {name: _probe(name) for name in frameworks}
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    machine = _machine()
    findings = [
        *_packages(versions),
        *(finding for name, probe in probes.items() for finding in _framework(name, probe)),
        *_environment(environment),
        *_resources(machine),
    ]
    return {
        "schema": SCHEMA,
        "outcome": "well" if all(f.effect is Effect.KNOW for f in findings) else "findings",
        "versions": {"python": platform.python_version(), **versions},
        "machine": machine,
        "frameworks": probes,
        "environment": environment,
        "findings": [asdict(finding) for finding in findings],
    }


EXIT_CODES = {"well": 0, "findings": 1}


def version_of(name: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _probe(name: str) -> dict[str, Any]:
    """What the child said of its framework, or `error`: how it ended."""
    try:
        child = run_svf(["doctor", "--probe", name, "--json"], timeout=PROBE_SECONDS)
    except SvfError as error:
        return {"error": str(error)}
    if isinstance(child.document, dict) and ("error" in child.document or "settings" in child.document):
        return child.document
    if child.error is not None:
        return {"error": child.error}
    late = f" after {child.timeout:g} s" if child.timeout is not None else ""
    return {"error": f"the process that imports it ended with {child.returncode}{late}"}


def _packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    for name, found in versions.items():
        if found is None:
            yield Finding(Effect.STOPS, f"{name} is not installed", f"pip install {name}")


def _framework(name: str, probe: Mapping[str, Any]) -> Iterator[Finding]:
    if "error" in probe:
        yield Finding(
            Effect.STOPS,
            f"{name} does not start: {shown(probe['error'], 300)}",
            f"reinstall {name}, or run the other side alone with --backend; --debug shows where it fails",
        )
        return
    settings = probe["settings"]
    for setting, (usual, remedy) in _USUAL.items():
        if setting in settings and settings[setting] != usual:
            what = f"{name}: {setting} is {shown(settings[setting])}, usually {usual}"
            yield Finding(Effect.CHANGES, what, remedy)
    if len(probe["devices"]) > 1:
        yield Finding(
            Effect.KNOW,
            f"{name} has {', '.join(map(shown, probe['devices'][1:]))}",
            "svf uses the CPU unless --device names it; compare both sides on one kind of device first",
        )


# What a fresh process has, and what else it would change.
_USUAL: dict[str, tuple[Any, str]] = {
    "default_dtype": ("float32", "something sets torch's default dtype at start; remove it"),
    "float32_matmul_precision": ("highest", "products lose bits on some devices; remove what sets it"),
    "tf32_matmul": (False, "products keep 10 bits on GPUs; unset what allows TF32"),
    "disable_jit": (False, "unset JAX_DISABLE_JIT: JAX rounds otherwise operation by operation"),
}


def _environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    flags = [f for f in environment.get("XLA_FLAGS", "").split() if not f.startswith(_HARMLESS_XLA)]
    if flags:
        told = f"XLA_FLAGS has {shown(' '.join(flags))}"
        yield Finding(Effect.CHANGES, told, "unset it, or give both runs that are compared the same flags")
    for name, (effect, harmless, remedy) in _VARIABLE_EFFECTS.items():
        if name in environment and environment[name].strip().lower() not in harmless:
            yield Finding(effect, f"{name} is set to {shown(environment[name])}", remedy)
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        told = f"JAX_PLATFORMS is {shown(platforms)}, without cpu"
        yield Finding(Effect.STOPS, told, "add cpu: svf computes there unless told otherwise")


_SAME = "unset it, or set it alike for every run that is compared"
_OFF = ("", "0", "false", "off", "no")
# Per variable: its effect where set, the values without one, what to do.
_VARIABLE_EFFECTS: dict[str, tuple[Effect, tuple[str, ...], str]] = {
    "MKL_CBWR": (Effect.CHANGES, ("",), f"MKL takes other kernels and sums in another order; {_SAME}"),
    "MKL_ENABLE_INSTRUCTIONS": (Effect.CHANGES, ("",), f"MKL takes other kernels; {_SAME}"),
    "ATEN_CPU_CAPABILITY": (Effect.CHANGES, ("",), f"torch takes other kernels; {_SAME}"),
    "ONEDNN_DEFAULT_FPMATH_MODE": (Effect.CHANGES, ("", "strict"), "oneDNN rounds float32 operands down; unset it"),
    "DNNL_DEFAULT_FPMATH_MODE": (Effect.CHANGES, ("", "strict"), "oneDNN rounds float32 operands down; unset it"),
    "NVIDIA_TF32_OVERRIDE": (Effect.CHANGES, ("", "0"), "cuBLAS takes TF32 whatever is asked for; unset it"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (Effect.CHANGES, _OFF, "torch takes TF32 for products on GPUs; unset it"),
    "OMP_NUM_THREADS": (Effect.KNOW, ("",), "a float32 SVD (--svd torch) depends on the number of threads"),
    "MKL_NUM_THREADS": (Effect.KNOW, ("",), "a float32 SVD (--svd torch) depends on the number of threads"),
    "JAX_DEFAULT_MATMUL_PRECISION": (Effect.KNOW, ("", "highest"), "svf asks for 'highest' itself"),
    "JAX_ENABLE_X64": (Effect.KNOW, _OFF, "svf sets the width of its own computations; other programs are affected"),
    "HF_HUB_OFFLINE": (Effect.KNOW, _OFF, "hub models must be in the cache already, whole"),
}


def _machine() -> dict[str, Any]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cache = cache_folder()
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cpus_allowed": affinity,
        "memory_available": available_bytes(),
        "folder": os.getcwd(),
        "folder_free": _free(Path.cwd()),
        "cache": str(cache),
        "cache_free": _free(cache),
        "cache_writable": os.access(_existing(cache), os.W_OK),
        "calibrations": sorted(str(path.relative_to(cache)) for path in cache.glob("calibration*/*.json")),
    }


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that exists."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _resources(machine: Mapping[str, Any]) -> Iterator[Finding]:
    if machine["memory_available"] < MIN_MEMORY:
        told = f"{machine['memory_available'] / 2**30:.1f} GiB of memory is available"
        yield Finding(Effect.STOPS, told, "end other programs: two frameworks and a small model take 2 GiB")
    for name in ("folder", "cache"):
        if machine[f"{name}_free"] < MIN_DISK:
            told = f"{machine[f'{name}_free'] / 2**30:.2f} GiB of disk is free under {shown(machine[name])}"
            yield Finding(Effect.STOPS, told, "free some space, or name another place with --out or SVF_CACHE")
    if not machine["cache_writable"]:
        yield Finding(Effect.STOPS, f"the cache {shown(machine['cache'])} cannot be written", "set SVF_CACHE")
    if machine["cpus_allowed"] != machine["cpus"]:
        told = f"{machine['cpus_allowed']} of {machine['cpus']} CPUs may be used"
        yield Finding(Effect.KNOW, told, "a float32 SVD (--svd torch) depends on the number of threads")
