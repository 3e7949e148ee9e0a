"""The selftest: plant faults in one process a backend, judge their dumps as `svf diff` does, and count clean runs."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, SvfError
from stages.files.dump import MANIFEST_FILE
from stages.files.folders import RUN_FILE
from stages.files.scratch import scratch_folder
from stages.files.selection import select_by_rule
from stages.jobs.builtin import write_vector
from stages.jobs.decompose import FLOAT64, decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.judge.diff import DiffCommand, diff_any
from stages.oracle.components import ReferenceBackend
from stages.progress import Progress
from stages.run.children import ChildResult, document_of, run_child
from stages.selftest import profiles, rows, uses
from stages.selftest.child import SelftestJob
from stages.selftest.clean import Sample, samples
from stages.selftest.document import document
from stages.selftest.engines import ENGINES
from stages.selftest.options import SelftestOptions
from stages.selftest.recorded import plan_recordings, rows_of, runs_of
from stages.selftest.specimens import SPECIMENS, Specimen
from stages.selftest.trials import DECOMPOSED, SELECTED, Trial, plan
from stages.spec.backend import SIDES
from stages.spec.families import parameter_shapes

# Runs of one process: XLA keeps every program that it compiled, a few memory maps each.
_BATCH = 60
_POLL_S = 0.02
# Of tiny models: a second thread has nothing to do, and on a busy machine it is waited for.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Judge = Callable[[Path, Path], Mapping[str, Any]]


def compare(a: Path, b: Path) -> Mapping[str, Any]:
    """The `svf.diff/1` document of two dumps: what `svf diff A B` prints."""
    # A suspect is named as one: settling it takes a process each, and says why, not where.
    return diff_any(DiffCommand(a, b, top=0, rerun=False), lambda _label, _done: None)


def selftest(options: SelftestOptions, progress: Progress, judge: Judge = compare) -> dict[str, Any]:
    """The `svf.selftest/1` document: every planted fault, and whether clean runs were left alone."""
    started = time.monotonic()
    trials = plan(options.faults, options.backends, quick=options.quick, seed=options.seed, scale=options.scale)
    with scratch_folder("selftest") as work:
        faults, right = _planted(options, trials, work, judge, progress) if trials or options.rows else ([], [])
        recorded = _recorded(options, work, progress) if options.recordings else []
        used = _used(options, work, progress) if options.uses else []
        with _pool() as pool:
            profiled, asked = _profiled(options, work, pool, progress) if options.profiles else ([], [])
            also = functools.partial(_also, options, pool, asked)
            clean = [*right, *_clean(samples(options.clean, options.seed), work, judge, progress, also)]
            under = [row for future in asked for row in future.result()]
    return document(options, faults, clean, time.monotonic() - started, recorded, used, profiled, under)


# -- planted faults -----------------------------------------------------------------------------------------------


def _planted(
    options: SelftestOptions, trials: Sequence[Trial], work: Path, judge: Judge, progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a fault, and one a right way; `changed_elements` is how many of the stage or tensor the fault changed."""
    names = list(dict.fromkeys((*(trial.specimen for trial in trials), *(rows.MADE_OF if options.rows else ()))))
    for number, name in enumerate(names):
        progress(f"writing {name}", number / len(names))
        write_specimen(SPECIMENS[name], work / name, bundle=name in SELECTED)
    jobs: dict[str, list[dict[str, Any]]] = {}
    for side in SIDES:
        right = [_run(work, name, work / side / name) for name in names]
        jobs[side] = [*right, *(_planted_run(t, i, work) for i, t in enumerate(trials) if t.backend == side)]
    found: list[dict[str, Any]] = []
    with children(jobs, progress, _ONE_THREAD) as futures, _pool() as pool:
        of_rows = _of_rows(options, work, pool, lambda folder, side: _await(folder, futures[side]))
        for number, trial in enumerate(trials):
            progress(f"judging {trial.fault.name}", number / len(trials))
            own = _out(work, trial, number)
            pair = {side: work / side / trial.specimen for side in SIDES} | {trial.backend: own}
            for side, folder in pair.items():
                _await(folder, futures[side])
            found.append({**trial.fields(), **verdict_on(trial, judge, pair["torch"], pair["jax"])})
            shutil.rmtree(own)
        planted = []
        for number, future in enumerate(of_rows):
            progress("judging rows", number / len(of_rows))
            planted += future.result()
    changed = {side: iter(futures[side].result().document["changed"][len(names) :]) for side in SIDES}
    found = [{**row, "changed_elements": next(changed[row["backend"]])} for row in found]
    right = [row for row in planted if "outcome" in row and row["class"] in ("prescribed", "equivalent")]
    alarm = {"sound": "agree"}
    return [*found, *(row for row in planted if row not in right)], [
        {**row, "outcome": alarm.get(row["outcome"], row["outcome"])} for row in right
    ]


def _pool() -> ProcessPoolExecutor:
    """Processes that judge; not forks, since threads of ours are running."""
    return ProcessPoolExecutor(len(SIDES), multiprocessing.get_context("spawn"))


def _of_rows(
    options: SelftestOptions, work: Path, pool: ProcessPoolExecutor, wait: Callable[[Path, str], None]
) -> list[Future[list[dict[str, Any]]]]:
    """The rows of each right run, judged beside the rest."""
    asked = []
    for name, side in itertools.product(rows.MADE_OF if options.rows else (), options.backends):
        wait(work / side / name, side)
        given = (work / side / name, name, side, options.rows, options.quick, options.seed)
        asked.append(pool.submit(rows.judged, *given))
    return asked


def _out(work: Path, trial: Trial, number: int) -> Path:
    return work / trial.backend / f"fault-{number}"


def _planted_run(trial: Trial, number: int, work: Path) -> dict[str, Any]:
    fault = {
        "fault": trial.fault.name,
        "at": trial.function,
        "call": trial.call,
        "size": trial.size,
        "seed": trial.seed,
    }
    return {**_run(work, trial.specimen, _out(work, trial, number)), **fault}


def _run(work: Path, name: str, out: Path) -> dict[str, Any]:
    """A run without a fault of a specimen, as a child takes it."""
    return as_run(work / name, SPECIMENS[name], out, SELECTED.get(name))


def as_run(folder: Path, specimen: Specimen, out: Path, select: tuple[str, ...] | None) -> dict[str, Any]:
    """A forward, or the replay of the tensors that are to `select`: of all for ()."""
    return {
        "source": str(folder if select is None else folder / "components"),
        "tokens": specimen.token_ids() if select is None else None,
        "select": select or (),
        "out": str(out),
        "fault": None,
    }


def verdict_on(trial: Trial, judge: Judge, a: Path, b: Path) -> dict[str, Any]:
    """What judging says of one planted fault, and whether it is right."""
    try:
        found = judge(a, b)
    except InputError as error:
        return {
            "found": False,
            "named": False,
            "side": None,
            "stage": None,
            "verdict": "refused",
            "ratio": None,
            "hint": str(error),
        }
    culprit = found["culprit"] or dict.fromkeys(("side", "layer", "tensor", "stage", "verdict", "ratio", "hint"))
    expected = {"side": trial.side, "layer": trial.layer, "tensor": trial.tensor, "stage": trial.stage}
    there = all(culprit[name] == value for name, value in expected.items())
    told = trial.fault.told_by(culprit["hint"])
    return {
        "found": found["outcome"] == "diverged",
        "named": there and (told or not trial.fault.must),
        "misnamed": found["outcome"] == "diverged" and there and not told,
        "side": culprit["side"],
        "stage": culprit["stage"],
        "named_layer": culprit["layer"],
        "verdict": culprit["verdict"],
        "ratio": culprit["ratio"],
        "hint": culprit["hint"],
    }


# -- recordings ---------------------------------------------------------------------------------------------------


def _recorded(options: SelftestOptions, work: Path, progress: Progress) -> list[dict[str, Any]]:
    made = plan_recordings(options.recordings, options.backends, quick=options.quick, seed=options.seed)
    jobs = {side: runs_of(made, work, side) for side in options.backends}
    with children(jobs, progress, _ONE_THREAD) as futures:
        return [*rows_of(made, work, progress, lambda folder, side: _await(folder, futures[side]))]


# -- profiles -----------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


def _profiled(
    options: SelftestOptions, work: Path, pool: ProcessPoolExecutor, progress: Progress
) -> tuple[Rows, list[Future[Rows]]]:
    """Faults under profiles, and the right runs of the same models, which are judged meanwhile."""
    planted = profiles.plan_profiles(
        options.faults, options.profiles, options.backends, quick=options.quick, seed=options.seed
    )
    trials, work = [one.trial for one in planted], work / "profiles"
    names = list(dict.fromkeys(trial.specimen for trial in trials))
    for name in names:
        write_specimen(SPECIMENS[name], work / name, bundle=False)
    jobs = {
        side: [
            *(_run(work, name, work / side / name) for name in names),
            *(_planted_run(trial, number, work) for number, trial in enumerate(trials) if trial.backend == side),
        ]
        for side in options.backends
    }
    asked = []
    with children(jobs, progress, _ONE_THREAD) as futures:
        for number, one in enumerate(planted):
            trial, folder = one.trial, _out(work, one.trial, number)
            progress(f"planting {trial.fault.name}", number / len(planted))
            right = work / trial.backend / trial.specimen
            for each in (right, folder):
                _await(each, futures[trial.backend])
            given = (trial.fields(), one.profiles, work / trial.specimen, folder, right, work)
            asked.append(pool.submit(profiles.planted_rows, *given))
        found = []
        for number, future in enumerate(asked):
            progress("judging under profiles", number / len(asked))
            found += future.result()
    clean = [
        _asked_clean(options, pool, SPECIMENS[name], work / name, [work / side / name for side in options.backends])
        for name in names
    ]
    return found, clean


def _also(
    options: SelftestOptions,
    pool: ProcessPoolExecutor,
    asked: list[Future[Rows]],
    sample: Sample,
    model: Path,
    folders: Sequence[Path],
) -> Future[Rows] | None:
    """A clean run, and those of engines, under every profile; None where it is not of that kind."""
    if not options.profiles or sample.replay or not profiles.is_small(sample.specimen):
        return None
    asked.append(_asked_clean(options, pool, sample.specimen, model, folders))
    return asked[-1]


def _asked_clean(
    options: SelftestOptions, pool: ProcessPoolExecutor, specimen: Specimen, model: Path, folders: Sequence[Path]
) -> Future[Rows]:
    engines = list(ENGINES)
    if options.quick:  # each by turn
        engines, folders = [engines[specimen.seed % len(engines)]], folders[:1]
    return pool.submit(profiles.clean_rows, specimen, model, options.profiles, engines, folders, model.parent)


# -- commands -----------------------------------------------------------------------------------------------------


def _used(options: SelftestOptions, work: Path, progress: Progress) -> list[dict[str, Any]]:
    scenes = []
    for name in uses.MADE_OF:
        folder = work / f"scene-{name}"
        write_specimen(SPECIMENS[name], folder, bundle=True)
        out = folder / "out"
        out.mkdir()
        model, components, vector = (folder / part for part in ("model", "components", "vector.npy"))
        scenes.append(uses.Scene(SPECIMENS[name], model, components, vector, out, Progress(False)))
    return [*uses.rows_of(options.uses, scenes, quick=options.quick, seed=options.seed, progress=progress)]


# -- clean runs ---------------------------------------------------------------------------------------------------


def _clean(
    todo: Sequence[Sample],
    work: Path,
    judge: Judge,
    progress: Progress,
    also: Callable[[Sample, Path, Sequence[Path]], Future[Rows] | None],
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(todo), _BATCH):
        batch = todo[start : start + _BATCH]
        jobs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number, sample in enumerate(batch, start):
            progress("writing clean models", number / len(todo))
            folder = work / f"clean-{number}"
            write_specimen(sample.specimen, folder, bundle=sample.replay, offsets=sample.offsets)
            for side in SIDES:
                out = work / side / f"clean-{number}"
                jobs[side].append(as_run(folder, sample.specimen, out, () if sample.replay else None))
        waiting = []
        with children(jobs, progress) as futures:
            for number, sample in enumerate(batch, start):
                progress(f"judging {sample.label}", number / len(todo))
                pair = [work / side / f"clean-{number}" for side in SIDES]
                for folder, side in zip(pair, SIDES, strict=True):
                    _await(folder, futures[side])
                model = work / f"clean-{number}"
                yield _clean_row(sample, judge(*pair))
                waiting.append((also(sample, model, pair), (*pair, model)))
        for future, folders in waiting:
            if future is not None:
                future.result()
            for folder in folders:
                shutil.rmtree(folder)


def _clean_row(sample: Sample, found: Mapping[str, Any]) -> dict[str, Any]:
    ratios = [(max(row["ratio_a"] or 0, row["ratio_b"] or 0), row["stage"]) for row in found["rows"]]
    ratio, stage = max(ratios)
    return {
        **sample.fields(),
        "outcome": found["outcome"],
        "worst_ratio": ratio,
        "worst_stage": stage,
        "verdict": None if found["outcome"] == "agree" else found["verdict"],
        "culprit": found["culprit"],
    }


# -- models, bundles, children ------------------------------------------------------------------------------------


def write_specimen(specimen: Specimen, folder: Path, *, bundle: bool, offsets: float = 0.17) -> None:
    """A checkpoint in `folder`; for a bundle also its decomposition, with offsets uniform within +- `offsets`."""
    if not bundle:
        specimen.write(folder)
        return
    folder.mkdir(parents=True)
    model = specimen.write(folder / "model")
    config = specimen.config()
    layers = (min(DECOMPOSED, config.num_hidden_layers - 1),)
    size = select_by_rule(parameter_shapes(config), layers).offset_count
    values = np.random.default_rng((specimen.seed, 2)).uniform(-offsets, offsets, size + 10 * specimen.hidden)
    write_vector(folder / "vector.npy", values)
    decompose(
        DecomposeOptions(str(model), folder / "vector.npy", None, layers, folder / "components", None, True),
        FLOAT64,
        ReferenceBackend(),
    )


@contextmanager
def children(
    jobs: Mapping[str, Iterable[dict[str, Any]]],
    progress: Progress,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Future[ChildResult]]]:
    """One process a side doing its runs in order, while the caller judges what is there already."""
    with ThreadPoolExecutor(len(SIDES), thread_name_prefix="selftest") as pool:
        futures = {}
        for side, runs in jobs.items():
            futures[side] = pool.submit(run_child, SelftestJob(side, tuple(runs)), environment, progress=progress)
        yield futures
        for side, future in futures.items():
            document_of(side, future.result())


def _await(folder: Path, child: Future[ChildResult]) -> None:
    """Wait until the dump in `folder` is committed and its run has let go of the folder."""

    def written() -> bool:
        return (folder / MANIFEST_FILE).is_file() and not (folder / RUN_FILE).exists()

    while not written():
        if child.done() and not written():
            document_of(folder.parent.name, child.result())
            raise SvfError(f"the {folder.parent.name} side ended without the dump {folder.name}")
        time.sleep(_POLL_S)
