"""What the decompose command may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class DecomposeOptions:
    """What `svf decompose` was asked to do; see its `--help`."""

    job: ClassVar[str] = "decompose"

    model: str
    vector: Path
    manifest: Path | None
    layers: tuple[int, ...]
    out: Path
    report: Path | None
    all_selected: bool
    svd_weights: Path | None = None
    resume: bool = False
    model_dtype: str = "float32"  # what the model is loaded in, before its weights are float32: auto is its config's
    readback: Path | None = None  # the bundle that variants are read back from; the written one
    write_stages: bool = True
    svd: str = "float64"  # or torch: the original's own
    strict_reference: bool = False  # whether a variant must reach the stored hash
