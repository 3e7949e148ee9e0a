"""Recordings (recordings.py) made on each backend, right and spoiled, and what `svf audit` says of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import SvfError
from stages.files.forward_dump import ForwardSide
from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit
from stages.progress import Progress
from stages.selftest.recordings import MADE_OF, RECORDINGS, SPOILED_LAYER, Recording

Made = tuple[Recording, str, str]  # recording, specimen, backend


def plan_recordings(names: Sequence[str], backends: Sequence[str], *, quick: bool, seed: int) -> list[Made]:
    """Every recording of every specimen on each backend; with `quick` one of each, another for another seed."""
    made = [[(RECORDINGS[name], of, backend) for of in MADE_OF for backend in backends] for name in names]
    if quick:
        return [all_of[(number + seed) % len(all_of)] for number, all_of in enumerate(made)]
    return [one for all_of in made for one in all_of]


def runs_of(made: Sequence[Made], work: Path, backend: str) -> list[dict[str, Any]]:
    """What the child of `backend` is to run: one forward a recording and specimen."""
    runs = []
    for number, (recording, of, side) in enumerate(made):
        if side == backend:
            specimen = recording.specimen(of)
            folder = work / f"model-{number}"
            specimen.write(folder)
            out = str(work / side / f"recording-{number}")
            run = {"source": str(folder), "tokens": specimen.token_ids(), "select": (), "out": out, "fault": None}
            runs.append({**run, "recording": recording.name})
    return runs


def audited(number: int, made: Made, work: Path) -> dict[str, Any]:
    """What auditing a recording and its twin says, as a row of the document; the run's folders are removed."""
    recording, of, backend = made
    specimen, model = recording.specimen(of), work / f"model-{number}"
    arrays = arrays_of(work / backend / f"recording-{number}")
    written = recording.write(arrays, specimen)
    file = work / f"recording-{number}.safetensors"
    found = [audit_arrays(file, part, model, specimen.token_ids()) for part in (written, recording.spoil(written))]
    for folder in (model, work / backend / f"recording-{number}"):
        shutil.rmtree(folder)
    right, twin = found
    layer = SPOILED_LAYER if any(key == f"layers.{SPOILED_LAYER}.{recording.spoiled}" for key in written) else None
    culprit = twin["culprit"] or {}
    return {
        "recording": recording.name,
        "doc": recording.doc,
        "backend": backend,
        "family": specimen.family,
        "dtype": specimen.dtype,
        "recorded": len(written),
        "outcome": right["outcome"],
        "verdict": right["verdict"],
        "twin": {
            "stage": recording.spoiled,
            "outcome": twin["outcome"],
            "named": (culprit.get("stage"), culprit.get("layer")) == (recording.spoiled, layer),
            "verdict": twin["verdict"],
        },
    }


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    side = ForwardSide(folder)
    try:
        return {key: side.read(place) for place, key in side.places.items()}
    finally:
        side.close()


def audit_arrays(file: Path, arrays: Mapping[str, np.ndarray], model: Path, tokens: Sequence[int]) -> Mapping[str, Any]:
    write_tensors(file, {key: np.ascontiguousarray(array) for key, array in arrays.items()})
    try:
        return audit(file, model=str(model), tokens=",".join(map(str, tokens)), top=0, rerun=False)
    except SvfError as error:  # a refusal is an answer, and the wrong one
        return {"outcome": "refused", "verdict": str(error), "culprit": None}
    finally:
        file.unlink()


def rows_of(made: Sequence[Made], work: Path, progress: Progress, wait: Any) -> Iterator[dict[str, Any]]:
    """One row a recording, each as soon as its run is there: `wait(folder, backend)` returns then."""
    for number, one in enumerate(made):
        recording, _, backend = one
        progress(f"auditing {recording.name}", number / len(made))
        wait(work / backend / f"recording-{number}", backend)
        yield audited(number, one, work)
