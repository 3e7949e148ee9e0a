"""Probed orders kept between runs, by what they may depend on: backend, versions, processor, threads, flags."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.errors import OutputError, SvfError
from stages.files.jsonio import read_object, version_of, write_json
from stages.spec import environment

# Raise it when what is probed, or how it is told, changes.
_VERSION = 1
_PACKAGES = ("torch", "jax", "jaxlib")
# What limits the threads of numerical libraries, beside the processors that a process may use.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def identity(backend: str, device: str, threads: int, cpu: str) -> dict[str, str]:
    """What probed orders hold for; `cpu` is the processor's name. Loads no framework."""
    packages = {name: version_of(name) or "" for name in _PACKAGES}
    settings = environment.facts(but=THREAD_VARIABLES)
    return {"backend": backend, "device": device, "threads": str(threads), "cpu": cpu, **packages, **settings}


def _path(key: Mapping[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps([_VERSION, sorted(key.items())]).encode()).hexdigest()[:24]
    return cache_folder() / "orders" / f"{digest}.json"


def load(key: Mapping[str, str]) -> dict[str, Any] | None:
    """The run kept for `key`; None when there is none that can be read."""
    path = _path(key)
    if not path.is_file():
        return None
    try:
        document = read_object(path)
    except SvfError:
        return None
    return document["run"] if document.get("identity") == dict(key) and "run" in document else None


def store(key: Mapping[str, str], run: Mapping[str, Any]) -> None:
    """Keep a run. `OutputError` when the cache folder cannot be written."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error.strerror}; set SVF_CACHE") from None
    write_json(path, {"identity": dict(key), "run": dict(run)})


def threads_available() -> int:
    """Threads that a framework takes here: a processor each, fewer where the environment says so."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [os.environ.get(name, "") for name in THREAD_VARIABLES]
    return min(processors, *(int(limit) for limit in limits if limit.isdigit() and int(limit) > 0), processors)


def accumulation(facts: Mapping[str, str], cpu: str) -> dict[str, str]:
    """The orders that a backend of these facts sums in, as `svf probe` revealed them here; nothing where it has not."""
    if "precision" in facts or "order" in facts:
        return {}  # these do not sum as the backend does
    kept = load(identity(facts["backend"], facts["device"].partition(":")[0], threads_available(), cpu))
    return {} if kept is None else {"accumulation": kept["summary"]}


def cache_folder() -> Path:
    """`$SVF_CACHE`, or `svf` in the user's cache folder."""
    if os.environ.get("SVF_CACHE"):
        return Path(os.environ["SVF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svf"
