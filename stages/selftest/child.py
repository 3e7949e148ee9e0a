"""What one backend's process does in a selftest: runs with and without a fault, each into an ordinary dump."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stages.files.source import open_model
from stages.jobs.forward_one import ForwardCommand, forward_one
from stages.jobs.replay_one import ReplayCommand, ReplayJob
from stages.progress import Progress
from stages.selftest.faults import FAULTS
from stages.selftest.planted import CompiledStages, Plant, PlantedBackend, PlantedWeights
from stages.selftest.recordings import RECORDINGS
from stages.spec.backend import Loader, Weights

SILENT = Progress(False)


@dataclass(frozen=True)
class SelftestJob:
    """The runs of one backend's process, in order, as stages/selftest/run.py writes them."""

    job: ClassVar[str] = "selftest"

    backend: str
    runs: tuple[dict[str, Any], ...]


def run_job(job: SelftestJob, load: Loader, _progress: Progress) -> dict[str, Any]:
    """Do the runs; how many elements each run's fault changed."""
    stages = CompiledStages(load(job.backend, "cpu"))
    return {"schema": "svf.selftest-child/1", "changed": [_run(run, stages) for run in job.runs]}


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
    options = ReplayCommand(
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
        backend=backend.name,
        out=Path(run["out"]),
        production=False,
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
