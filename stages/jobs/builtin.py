"""The built-in default: a tiny model and its component bundle, made on first use in the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from stages.errors import OutputError
from stages.files.bundle import MANIFEST_FILE
from stages.files.cache import cache_folder
from stages.files.jsonio import write_all, write_atomic
from stages.files.scratch import scratch_folder
from stages.files.selection import select_by_rule
from stages.jobs.decompose_options import DecomposeOptions
from stages.jobs.synth import config_json, synthesize
from stages.run.children import document_of, run_child
from stages.spec.families import parameter_shapes, parse_config

# Raise it when the default's bytes change: the cache of an older version is then left alone.
_VERSION = "1"
LAYER = 2
_ROUTER_ROWS = 10  # agents + 3, as in the published vector


def router_vector(preset: str, layers: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A random router vector for a preset, float64: offsets of standard deviation 0.1, then the router head."""
    config = parse_config(config_json(preset), preset)
    size = select_by_rule(parameter_shapes(config), layers).offset_count + _ROUTER_ROWS * config.hidden_size
    # Uniform with the published vector's spread; a normal would depend on numpy's ziggurat tables alone as well.
    return np.random.default_rng(seed).uniform(-0.17, 0.17, size)


def write_vector(path: Path, values: np.ndarray) -> None:
    """Write a `.npy` file atomically."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_atomic(path, lambda fd: write_all(fd, buffer.getvalue()))


def make_default(folder: Path) -> None:
    """Write `model/`, `router_vector.npy`, `components/` and `reference.json` into the new folder."""
    folder.mkdir(parents=True)
    synthesize(folder / "model", "tiny")
    write_vector(folder / "router_vector.npy", router_vector("tiny", (LAYER,)))
    options = DecomposeOptions(
        model=str(folder / "model"),
        vector=folder / "router_vector.npy",
        manifest=None,
        layers=(LAYER,),
        out=folder / "components",
        report=folder / "reference.json",
        all_selected=True,
    )
    document_of("decomposing", run_child(options))


def default_source() -> tuple[Path, bool]:
    """Folder of the built-in default, and whether it was made just now. Two processes may race: one's is kept."""
    target = cache_folder() / f"default-{_VERSION}"
    if (target / "components" / MANIFEST_FILE).is_file():
        return target, False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder("default", target.parent) as work:
            make_default(work / "default")
            _put(work / "default", target)
    except OSError as error:
        raise OutputError(f"{target.parent}: cannot be written: {error.strerror}; set SVF_CACHE") from None
    return target, True


def _put(made: Path, target: Path) -> None:
    if target.exists() and not (target / "components" / MANIFEST_FILE).is_file():
        shutil.rmtree(target)
    try:
        os.rename(made, target)
    except OSError:
        if not (target / "components" / MANIFEST_FILE).is_file():
            raise
