"""`svf doctor`: what this machine, its frameworks and its environment are, and what about them would change a result
or stop a run (`svf.doctor/1`)."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from stages.errors import SvfError, shown
from stages.files.cache import cache_folder
from stages.files.jsonio import version_of
from stages.files.memory import available_bytes
from stages.run.children import run_child
from stages.spec.environment import VARIABLES, Effect, set_here

SCHEMA = "svf.doctor/1"
# What every result rests on, and the versions that the tests were run with: those of constraints.txt.
TESTED = {
    "numpy": "2.4.6",
    "torch": "2.13.0",
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "flax": "0.12.8",
    "transformers": "5.23.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "ml_dtypes": "0.6.0",
    "tokenizers": "0.23.3",
}
PACKAGES = ("svf", *TESTED)
# A framework and a tiny model take about a GiB; a default bundle and a small dump some hundred MB.
MIN_MEMORY = 2 * 1024**3
MIN_DISK = 1024**3
# Importing a framework takes some seconds, on a slow disk a minute.
PROBE_SECONDS = 120.0


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
        *(
            finding
            for name, probe in probes.items()
            if versions.get(name, "") is not None
            for finding in _framework(name, probe)
        ),
        *_environment(environment),
        *_resources(machine),
    ]
    return {
        "schema": SCHEMA,
        "outcome": "well" if all(f.effect is Effect.KNOW for f in findings) else "findings",
        "versions": {"python": platform.python_version(), **versions},
        "tested_with": TESTED,
        "machine": machine,
        "frameworks": probes,
        "environment": environment,
        "findings": [asdict(finding) for finding in findings],
    }


EXIT_CODES = {"well": 0, "findings": 1}


@dataclass(frozen=True)
class FrameworkRequest:
    """The framework to import and ask."""

    job: ClassVar[str] = "framework"

    name: str


def _probe(name: str) -> dict[str, Any]:
    """What the child said of its framework, or `error`: how it ended."""
    try:
        child = run_child(FrameworkRequest(name), timeout=PROBE_SECONDS)
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
    "disable_jit": (False, "unset JAX_DISABLE_JIT: while it is set, JAX rounds after every operation"),
}


def _environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name, value in set_here(environment).items():
        variable = VARIABLES[name]
        if variable.remedy and not (name == "JAX_PLATFORMS" and "cpu" in value.split(",")):
            yield Finding(variable.effect, f"{name} is set to {shown(value, 300)}", variable.remedy)


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
