"""The replay command: a bundle through one backend, checked against the recorded stages, dumped and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.errors import InputError, UsageError, shown
from stages.files.bundle import Bundle, BundleEntry, RecordedStages
from stages.files.dump import COMPONENTS_FOLDER, ReplayDump, dump_file
from stages.files.folders import new_folder
from stages.files.replay_recorded import SideTensor
from stages.files.selection import safe_key
from stages.files.source import ModelSource, open_model
from stages.files.stage_files import StageFiles
from stages.files.summaries import FinalSummaries
from stages.judge import document as diff
from stages.judge.culprit import ORACLE, Piece, against_oracle, chosen_row, culprit_data, oracle_pieces
from stages.judge.decomposition import parts_of
from stages.judge.final_hash import FINAL, FinalHash, Native, explain_unreached_hash
from stages.judge.replay import TensorComparison
from stages.judge.rows import in_replay, pair_row
from stages.oracle.bounds import LAMBDA
from stages.oracle.contraction import look
from stages.oracle.verdict import Verdict
from stages.order.ordered_backend import note_order, order_rows
from stages.progress import Report
from stages.run.calibration import facts_of, lambdas_of
from stages.run.own_components import native_bundle
from stages.run.precision import PreciseBackend, native, precision_fields, with_precision
from stages.run.replay import Replayer, chunk_plan, default_chunk_rows
from stages.spec.backend import BOTH, Backend
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY
from stages.spec.values import Chunk, ReplayTask


@dataclass(frozen=True)
class ReplayCommand:
    """What `svf replay` was asked; fields as in its `--help`. `components` None: the built-in tiny bundle."""

    job: ClassVar[str] = "replay"

    components: Path | None = None
    backend: str = BOTH
    layout: str = "declared"
    model: str | None = None
    reference_report: Path | None = None
    source_from_stage: bool = False
    all_selected: bool = False
    select: tuple[str, ...] = ()
    chunk_rows: int | None = None
    dump: str = "none"
    out: Path | None = None
    report: Path | None = None
    device: str = "cpu"
    top: int = 5
    gates: diff.Gates = field(default_factory=diff.Gates)
    verdicts: bool = True
    precision: str = "native"
    timeout: float | None = None
    resume: bool = False
    max_memory: int | None = None
    close_up: bool = False  # whether to replay the culprit's tensor once more, for a report's figures
    native_components: bool = False
    order: str = "native"
    stage_dir: Path | None = None  # for a stage file of each tensor

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(LAYOUTS) if self.layout == "all" else (self.layout,)


@dataclass
class LayoutRun:
    """What replaying under one layout showed: comparisons, final hashes, and tensors whose V does not fit."""

    layout: str
    comparisons: list[TensorComparison] = field(default_factory=list)
    final_sha256: dict[str, str] = field(default_factory=dict)
    sample_sha256: str | None = None
    unfit: dict[str, str] = field(default_factory=dict)
    chunk_rows: dict[str, int] = field(default_factory=dict)
    # For a report: stage files by tensor, the sample's own, summaries by tensor, the sample's as it is reported on.
    stage_files: dict[str, Path] = field(default_factory=dict)
    dump_files: dict[str, Path] = field(default_factory=dict)
    sample_file: Path | None = None
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)
    sample_finals: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplayResult:
    """Everything `svf replay` reports for one backend."""

    document: dict[str, Any]
    runs: tuple[LayoutRun, ...]
    entries: tuple[BundleEntry, ...]
    sample_name: str | None = None
    all_selected: bool = False  # whether the recorded stages are of every tensor, source-oriented

    def stage_file(self, run: LayoutRun, name: str) -> Path | None:
        """The file that holds the replayed stages of a tensor: its stage file, or one of the dump; None without."""
        return run.stage_files.get(name) or run.dump_files.get(name)


class ReplayJob:
    """An opened bundle with the tensors to replay; `run` replays them on a backend."""

    def __init__(self, options: ReplayCommand, stack: ExitStack):
        assert options.components is not None
        self.options, self.folder = options, options.components
        self._stack = stack
        self.bundle = Bundle(self.folder)
        stack.callback(self.bundle.close)
        self.recorded = self._open_recorded(stack)
        self.checkpoint: ModelSource | None = None
        if options.model is not None:
            self.checkpoint = stack.enter_context(open_model(options.model))
        self.entries = self._select()
        self._given = {e.source_name: self.bundle.load(e) for e in self.entries}
        self._components = self._given  # what is replayed
        self.sample_turned = self._sample_turned(stack)
        self.right = {e.source_name: e.layout for e in self.entries}  # the layout that the weights themselves tell

    def _open_recorded(self, stack: ExitStack) -> RecordedStages | None:
        everything = self.bundle.recorded(all_selected=True)
        if everything is None and self.options.all_selected:
            raise InputError(
                f"{self.bundle.folder}: --all-selected-tensors needs the reference side's all-selected stage file; "
                "write it with 'svf decompose --all-selected-tensors'"
            )
        recorded = everything or self.bundle.recorded(all_selected=False)
        if recorded is not None:
            stack.callback(recorded.close)
        return recorded

    def _select(self) -> tuple[BundleEntry, ...]:
        entries = self.bundle.entries
        if self.recorded is not None and self.recorded.sample_name is not None:
            entries = tuple(e for e in entries if e.source_name == self.recorded.sample_name)
        wanted = self.options.select
        chosen = tuple(e for e in entries if not wanted or any(part in e.source_name for part in wanted))
        if not chosen:
            names = ", ".join(shown(e.source_name) for e in entries)
            raise UsageError(f"--select {' '.join(wanted)}: matches none of the tensors: {names}")
        return chosen

    def _sample_turned(self, stack: ExitStack) -> bool:
        """Whether the sample's recorded final stages are the source's transpose."""
        sample = self.bundle.recorded(all_selected=False)
        if sample is None or sample.sample_name is None:
            return False
        stack.callback(sample.close)
        infos = sample.infos(sample.sample_name)
        if "final_f32" not in infos or "adapted_source_f32" not in infos:
            return False
        final, source = infos["final_f32"].shape, infos["adapted_source_f32"].shape
        return final != source and final == source[::-1]

    def _source(self, entry: BundleEntry) -> Callable[[int, int], np.ndarray]:
        recorded = self.recorded
        has_stage = recorded is not None and "source_f32" in recorded.infos(entry.source_name)
        if self.options.source_from_stage and not has_stage:
            raise InputError(
                f"{self.bundle.folder}: --source-from-stage needs source_f32 of '{entry.source_name}', which is "
                "not recorded"
            )
        checkpoint = self.checkpoint
        if checkpoint is not None and not self.options.source_from_stage:
            name = checkpoint.resolve(entry.source_name)
            shape = checkpoint.info(name).shape
            if shape != entry.shape:
                raise InputError(
                    f"{self.options.model}: '{entry.source_name}' is {list(shape)}, the bundle says {list(entry.shape)}"
                )
            return lambda start, stop: checkpoint.read(name, start, stop).astype(np.float32)
        if recorded is None or not has_stage:
            raise UsageError(
                f"{self.bundle.folder}: no recorded source_f32 of '{entry.source_name}'; give the weights with --model"
            )
        stored = recorded.infos(entry.source_name)["source_f32"].shape
        if stored != entry.shape:
            raise InputError(
                f"{recorded.path}: source_f32 of '{entry.source_name}' is {list(stored)}, the bundle says "
                f"{list(entry.shape)}"
            )
        return lambda start, stop: recorded.read(entry.source_name, "source_f32", start, stop)

    def task(self, entry: BundleEntry, layout: str) -> ReplayTask:
        """The operands of one tensor, to be contracted under `layout` (`declared`: the bundle's)."""
        c = self._components[entry.source_name]
        is_sample_file = self.recorded is not None and self.recorded.sample_name is not None
        chosen = entry.layout if layout == "declared" else layout
        turned = is_sample_file and self.sample_turned
        return ReplayTask(entry.source_name, entry.shape, c.u, c.s, c.v, c.offsets, self._source(entry), chosen, turned)

    def recorded_side(self, entry: BundleEntry) -> SideTensor | None:
        """The recorded stages of one tensor, as the a side of the comparison."""
        if self.recorded is None:
            return None
        infos = self.recorded.infos(entry.source_name)
        if not infos:
            return None
        stages = {s: (self.recorded.file, self.recorded.key(entry.source_name, s)) for s in infos}
        turned = self.recorded.sample_name is not None and self.sample_turned
        return SideTensor(
            entry.source_name, stages, {}, entry.identity, entry.layout, turned, self._given[entry.source_name]
        )

    def run(self, backend: Backend, progress: Report = lambda _label, _done: None) -> ReplayResult:
        """Replay every selected tensor under every asked layout."""
        tasks = {layout: [self.task(e, layout) for e in self.entries] for layout in self.options.layouts}
        for entry, task in zip(self.entries, tasks[self.options.layouts[0]], strict=True):
            told = look(task, entry.layout)
            if told.fitting and self.options.layout == "declared":
                raise InputError(told.lie(entry.source_name))
            self.right[entry.source_name] = told.right
        replayer = Replayer(backend)
        runs = tuple(self._run_layout(replayer, layout, tasks[layout], progress) for layout in self.options.layouts)
        document = self._document(backend, runs)
        if self.options.close_up:
            document["culprit_data"] = self._culprit_data(replayer, document)
        everything = self.recorded is None or self.recorded.sample_name is None
        return ReplayResult(document, runs, self.entries, self.bundle.sample_name, everything)

    def _culprit_data(self, replayer: Replayer, document: Mapping[str, Any]) -> dict[str, Any] | None:
        """A close look at the culprit, whose tensor is replayed once more: results are not kept."""
        chosen = chosen_row(document)
        entry = next((e for e in self.entries if chosen and e.source_name == chosen[0]["tensor"]), None)
        side = self.recorded_side(entry) if entry else None
        if chosen is None or entry is None or side is None or chosen[0]["verdict"] == Verdict.SHAPE:
            return None
        stage, layout = REPLAY[chosen[0]["stage"]], self.options.layout
        if stage.name not in side.stages:
            return None
        task = self.task(entry, "declared" if layout == "all" else layout)
        rows = self.options.chunk_rows or default_chunk_rows(task.shape)
        recorded, axis = side.chunks(chunk_plan(task.shape[0], rows)), task.row_axis(stage)
        shape, wrong = task.stage_shape(stage), against_oracle(*chosen)
        if wrong is not None:
            oracle = {"layout": self.right[entry.source_name], "transpose": task.transpose}
            chunks = recorded if wrong == "a" else replayer.run(task, rows)
            pieces = oracle_pieces(chunks, stage, oracle, axis)
            return culprit_data(*chosen, pieces, shape=shape, axes=stage.shape, labels=(ORACLE, wrong))
        pieces = (
            Piece(before.values[stage.name], now.values[stage.name], now.start if stage.by_rows else 0, axis)
            for before, now in zip(recorded, replayer.run(task, rows), strict=True)
            if stage.name in now.values
        )
        return culprit_data(*chosen, pieces, shape=shape, axes=stage.shape)

    def _run_layout(self, replayer: Replayer, layout: str, tasks: Sequence[ReplayTask], progress: Report) -> LayoutRun:
        run = LayoutRun(layout)
        for task in tasks:
            try:
                task.check_layout()
            except InputError as error:
                run.unfit[task.source_name] = str(error)
        entries = [entry for entry in self.entries if entry.source_name not in run.unfit]
        fitting = [task for task in tasks if task.source_name not in run.unfit]
        with ExitStack() as stack:
            dump = self._open_dump(layout, fitting, stack)
            if self.options.native_components and fitting:
                self._decompose(replayer.backend, list(zip(entries, fitting, strict=True)), dump, progress)
                fitting = [self.task(entry, layout) for entry in entries]
            if dump is not None and dump.mode == "full":
                run.dump_files = {t.source_name: dump.folder / dump_file(t.source_name) for t in fitting}
            files = self._open_stage_files(run, replayer.backend.name, fitting, dump, stack)
            for entry, task in zip(entries, fitting, strict=True):
                self._run_tensor(replayer, run, entry, task, (dump, files), progress)
            if files is not None:
                files.commit()
            if dump is not None:
                dump.commit(self._manifest(replayer.backend, fitting))
        return run

    def _decompose(
        self,
        backend: Backend,
        given: Sequence[tuple[BundleEntry, ReplayTask]],
        dump: ReplayDump | None,
        progress: Report,
    ) -> None:
        """From here on replay what `backend` makes of the sources; a full dump keeps it."""
        folder = dump.folder / COMPONENTS_FOLDER if dump is not None and dump.mode == "full" else None
        own = native_bundle(folder, backend, given, self.bundle.sample_name, progress)
        bundle = self._stack.enter_context(own)
        self._components = {**self._given, **{e.source_name: bundle.load(e) for e in bundle.entries}}

    def _open_dump(self, layout: str, tasks: Sequence[ReplayTask], stack: ExitStack) -> ReplayDump | None:
        out = self.options.out
        if out is None or self.options.dump == "none" or not tasks:
            return None
        folder = out / layout if self.options.layout == "all" else out
        return stack.enter_context(ReplayDump(folder, tasks, self.options.dump, resume=self.options.resume))

    def _open_stage_files(
        self, run: LayoutRun, backend: str, tasks: Sequence[ReplayTask], dump: ReplayDump | None, stack: ExitStack
    ) -> StageFiles | None:
        """Stage files as asked for; of all layouts only the declared one has them, as in the original tool."""
        if self.options.layout == "all" and run.layout != self.entries[0].layout:
            return None
        samples = [task for task in tasks if task.source_name == self.bundle.sample_name]
        sample = next((replace(task, transpose=self.sample_turned) for task in samples), None)
        if self.options.stage_dir is not None:
            folder = stack.enter_context(new_folder(self.options.stage_dir, resume=self.options.resume))
        elif (self.options.report is not None) and dump is not None and dump.mode == "full" and sample is not None:
            folder, tasks = dump.folder, []
        else:
            return None
        files = stack.enter_context(StageFiles(folder, f"trinity_svf_stage_{backend}", tasks, sample))
        run.stage_files, run.sample_file = files.files, files.sample
        return files

    def _run_tensor(
        self,
        replayer: Replayer,
        run: LayoutRun,
        entry: BundleEntry,
        task: ReplayTask,
        outputs: tuple[ReplayDump | None, StageFiles | None],
        progress: Report,
    ) -> None:
        side = self.recorded_side(entry)
        rows = self.options.chunk_rows or default_chunk_rows(task.shape)
        run.chunk_rows[task.source_name] = rows
        plan = chunk_plan(task.shape[0], rows)
        # The oracle computes what gives the weights back, so that a wrong --layout shows as wrong.
        oracle = {"layout": self.right[entry.source_name], "transpose": task.transpose}
        comparison = TensorComparison(
            entry.source_name,
            safe_key(entry.source_name),
            oracle,
            top=self.options.top,
            verdicts=self.options.verdicts,
            lambdas=(LAMBDA, lambdas_of(facts_of(replayer.backend), replayer.backend.name)),
            precisions=(None, precision_fields(replayer.backend)["precision"]),
        )
        comparison.expect(set(side.stages) if side else set(), set(REPLAY), (False, True), alone=side is None)
        given, replayed = self._given[entry.source_name], self._components[entry.source_name]
        if self.options.verdicts and not given.same_as(replayed):
            comparison.diagnose_basis(given, replayed)
        recorded = side.chunks(plan) if side else iter([Chunk(a, z, {}, {}, {}) for a, z in plan])
        final = self._final_hash(entry, task)
        turn = self._is_sample(entry) and self.sample_turned and not task.transpose
        summaries = FinalSummaries(int(task.transpose), turn=turn) if (self.options.report is not None) else None
        for before, chunk in zip(recorded, replayer.run(task, rows), strict=True):
            comparison.add(before, chunk)
            for output in outputs:
                if output is not None:
                    output.add(task, chunk)
            final.add(chunk.values["final_bf16"])
            if summaries is not None:
                summaries.add(chunk)
            progress(f"{replayer.backend.name} {run.layout} {entry.source_name}", chunk.stop / task.shape[0])
        run.comparisons.append(comparison)
        run.final_sha256[entry.source_name] = final.digest()
        if self.options.verdicts:
            parts = parts_of(replayed, task.source, task.shape)
            for letter, missed in (("a", comparison.zero_offset()["fits_a"] is False), ("b", True)):
                if missed:  # the recorded stages rest on the same components
                    comparison.blame(letter, parts, replayed.entry, task.layout)
        if summaries is not None:
            run.finals[entry.source_name] = summaries.results()
        if self._is_sample(entry):
            run.sample_sha256 = final.target_digest()
            run.sample_finals = summaries.turned() if summaries is not None else {}

    def _final_hash(self, entry: BundleEntry, task: ReplayTask) -> FinalHash:
        return FinalHash(self._is_sample(entry) and self.sample_turned and not task.transpose, task.transpose)

    def _account(self, backend: Backend, main: LayoutRun) -> dict[str, Any] | None:
        """Why a run in float64 did not reach the recorded hash; None where that is no question."""
        recorded, entry = self.options.gates.current, next((e for e in self.entries if self._is_sample(e)), None)
        unreached = main.sample_sha256 is not None and main.sample_sha256 != recorded
        if not isinstance(backend, PreciseBackend) or recorded is None or entry is None or not unreached:
            return None
        if self.options.native_components:
            return None  # it was recorded of other components
        task = self.task(entry, main.layout)
        rows = main.chunk_rows[entry.source_name]
        again = with_precision(backend.plain, backend.mode)  # with counts of its own
        return explain_unreached_hash(
            recorded,
            self._natives(backend, entry, task, rows),
            lambda: Replayer(again).run(task, rows),
            lambda: self._final_hash(entry, task),
            layout=task.layout,
            transpose=task.transpose,
        )

    def _natives(self, backend: Backend, entry: BundleEntry, task: ReplayTask, rows: int) -> Iterator[Native]:
        """Where a native final_bf16 of the sample may be had: the recorded stages, and this backend's own kernels."""
        side = self.recorded_side(entry)
        if side is not None and FINAL in side.stages:
            plan = chunk_plan(task.shape[0], rows)
            yield f"recorded in {side.stages[FINAL][0].path.name}", lambda: (c.values[FINAL] for c in side.chunks(plan))
        plain = Replayer(native(backend))
        name = f"computed again by {backend.name} on this machine"
        yield name, lambda: (chunk.values[FINAL] for chunk in plain.run(task, rows))

    def _is_sample(self, entry: BundleEntry) -> bool:
        return entry.source_name == self.bundle.sample_name

    def _manifest(self, backend: Backend, tasks: Sequence[ReplayTask]) -> dict[str, Any]:
        return {
            "kind": "replay",
            "backend": backend.name,
            "facts": facts_of(backend),
            "precision": precision_fields(backend)["precision"],
            "components": self._where(),
            "native_components": self.options.native_components,
            "model": self.options.model,
            "selected": [
                {
                    "source_name": task.source_name,
                    "shape": list(task.shape),
                    "layout": task.layout,
                    "transpose": task.transpose,
                    "sha256": self._components[task.source_name].sha256(),
                }
                for task in tasks
            ],
        }

    def _where(self) -> str | None:
        """The dump's components: the given ones, its own, or, of native ones without stages, none."""
        if not self.options.native_components:
            return str(self.folder.resolve())
        return COMPONENTS_FOLDER if self.options.dump == "full" else None

    def _document(self, backend: Backend, runs: Sequence[LayoutRun]) -> dict[str, Any]:
        main = runs[0]
        if self.options.layout == "all":
            right = self.right[self.entries[0].source_name]
            main = next(run for run in runs if run.layout == right)
        gates = self.options.gates
        gates = diff.Gates(
            **{**vars(gates), "replayed_hashes": tuple(r.sample_sha256 for r in runs if r.sample_sha256 is not None)}
        )
        document = diff.document(
            main.comparisons,
            diff.side(str(self.recorded.path) if self.recorded else "nothing recorded"),
            diff.side(f"{backend.name} replay", facts_of(backend)),
            gates=gates,
            expected_tensors=len(self.entries),
            more_rows=unfit_rows(main),
            extra={
                "backend": backend.name,
                "layouts": layout_rows(runs),
                "main_layout": main.layout,
                "components": str(self.folder),
                "native_components": self.options.native_components,
                "final_sha256": main.final_sha256,
                "sample_sha256": main.sample_sha256,
                "recorded_hash": self._account(backend, main),
                **precision_fields(backend),
                "orders": order_rows(backend),
            },
        )
        note_order(document["rows"], backend, {entry.source_name: min(entry.shape) for entry in self.entries})
        lies = [entry for entry in self.entries if not LAYOUTS[entry.layout].like(self.right[entry.source_name])]
        document["mislabelled"] = {entry.source_name: self.right[entry.source_name] for entry in lies}
        if lies:
            document["verdict"] += (
                f" The bundle's label is wrong: {lies[0].source_name} says {lies[0].layout}, and "
                f"{self.right[lies[0].source_name]} gives it back{f'; {len(lies)} tensors' if len(lies) > 1 else ''}."
            )
        return document


def unfit_rows(run: LayoutRun) -> list[dict[str, Any]]:
    """A `shape` row for every tensor whose V does not fit the layout."""
    rows = []
    for name, note in run.unfit.items():
        row = pair_row(in_replay(name, safe_key(name), "matmul_pre_norm"), Verdict.SHAPE)
        rows.append({**row, "verdict_b": Verdict.SHAPE.value, "note": note})
    return rows


def layout_rows(runs: Sequence[LayoutRun]) -> list[dict[str, Any]]:
    """Per layout and tensor: whether V fits, and the zero-offset error that tells right from wrong."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        for comparison in run.comparisons:
            zero = comparison.zero_offset()
            rows.append(
                {
                    "layout": comparison.options["layout"] if run.layout == "declared" else run.layout,
                    "tensor": comparison.source_name,
                    "fits": zero["fits_b"],
                    "zero_offset_max_abs": zero["max_abs_b"],
                    "relative": zero["relative_b"],
                    "bound": zero["bound"],
                    "note": None,
                }
            )
        rows.extend(
            {
                "layout": run.layout,
                "tensor": name,
                "fits": False,
                "zero_offset_max_abs": None,
                "relative": None,
                "bound": None,
                "note": note,
            }
            for name, note in run.unfit.items()
        )
    return rows
