"""What one backend's process does in a selftest: runs with and without a fault, each into an ordinary dump."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stages.files.jsonio import read_object
from stages.files.source import open_model
from stages.jobs.forward_one import ForwardCommand, forward_one
from stages.jobs.replay_one import ReplayJob, ReplayOptions
from stages.progress import Progress
from stages.selftest.faults import FAULTS
from stages.selftest.planted import CompiledStages, Plant, PlantedBackend, PlantedWeights
from stages.selftest.recordings import RECORDINGS
from stages.spec.backend import Backend, Weights

SILENT = Progress(False)


def run_job(path: Path, load: Callable[[str], Backend]) -> dict[str, Any]:
    """Do the runs that the file `path` lists, in order; how many elements each run's fault changed."""
    job = read_object(path)
    stages = CompiledStages(load(str(job["backend"])))
    return {"schema": "svf.selftest-child/1", "changed": [_run(run, stages) for run in job["runs"]]}


def _run(run: Mapping[str, Any], stages: CompiledStages) -> int | None:
    plant = None
    if run["fault"] is not None:
        plant = Plant(FAULTS[run["fault"]], run["at"], run["call"], run["size"], run["seed"])
    ways = RECORDINGS[run["recording"]].ways if run.get("recording") else {}
    backend = PlantedBackend(stages, plant, ways)
    if run["tokens"] is None:
        _replay(run, backend)
        return backend.changed
    return _forward(run, backend, plant)


def _replay(run: Mapping[str, Any], backend: PlantedBackend) -> None:
    options = ReplayOptions(
        components=Path(run["source"]),
        all_selected=True,
        select=tuple(run["select"]),
        dump="full",
        out=Path(run["out"]),
        verdicts=False,
    )
    with ExitStack() as stack:
        ReplayJob(options, stack).run(backend)


def _forward(run: Mapping[str, Any], backend: PlantedBackend, plant: Plant | None) -> int | None:
    command = ForwardCommand(
        model=run["source"],
        tokens=",".join(map(str, run["tokens"])),
        tokens_file=None,
        prompt=None,
        backend=backend.name,
        layers="all",
        stages="all",
        positions="all",
        dtype="model",
        adapted=None,
        layout="declared",
        repeat=1,
        out=Path(run["out"]),
        format="safetensors",
        device="cpu",
        jit="stage",
        production=False,
        generate=0,
        top=0,
    )
    planted: list[PlantedWeights] = []

    def reading(weights: Weights) -> Weights:
        if plant is None or plant.fault.load is None:
            return weights
        planted.append(PlantedWeights(weights, plant, _layers(run["source"])))
        return planted[0]

    forward_one(command, lambda: backend, SILENT, reading)
    return planted[0].changed if planted else backend.changed


def _layers(source: str) -> int:
    with open_model(source) as checkpoint:
        return checkpoint.config.num_hidden_layers
