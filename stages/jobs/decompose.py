"""`svf decompose`: a model and a router vector into a component bundle, stage bundles and the reference report.

The reference side of a parity run, as the original Python tool wrote it: decompose, write, read back, replay.
Every file but the manifest is in place before the manifest names it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stages.errors import InputError, UsageError
from stages.files import bundle as bundles
from stages.files.bundle import Components, component_keys, offsets_key, sample_stage_key, tensor_stage_key
from stages.files.folders import ensure_space, new_folder
from stages.files.jsonio import write_json
from stages.files.scratch import scratch_folder
from stages.files.selection import (
    RouterVector,
    SelectedTensor,
    Selection,
    load_manifest,
    load_router_vector,
    select_by_rule,
)
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import TensorFile, TensorWriter, sha256, write_tensors
from stages.jobs.decompose_options import DecomposeOptions
from stages.jobs.decompose_report import BASELINE_LABEL, BundleReport, Hashes, is_turned, variant
from stages.judge.document import STRICT_REFERENCE
from stages.oracle import svd
from stages.progress import Report
from stages.run.replay import Replayer, default_chunk_rows
from stages.spec.backend import Backend
from stages.spec.dtypes import stored_dtype
from stages.spec.factors import Decomposer, Factors, Method
from stages.spec.families import parameter_shapes
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask


def float64_svd(_name: str, rows: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> Factors:
    """Accurate, and the same bits on any thread count: stages/oracle/svd.py."""
    return svd.decompose(rows, shape)


FLOAT64 = Method(
    "recomputed_float64_svd",
    "python_recomputed_float64_svd_v_final_bf16",
    float64_svd,
    "recomputed_float64_svd",
    "python_recomputed_float64_svd_vh_final_bf16",
    parallel=True,
)


@dataclass(frozen=True)
class StoredFactors:
    """U, S and V from a safetensors file with keys `<parameter>.U / .S / .V`."""

    file: TensorFile
    name: str
    shape: tuple[int, int]

    @property
    def s(self) -> np.ndarray:
        return self.file.read(f"{self.name}.S")

    @property
    def v(self) -> np.ndarray:
        return self.file.read(f"{self.name}.V")

    def u_chunks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        step = default_chunk_rows(self.shape)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield start, stop, self.file.read(f"{self.name}.U", start, stop)


def stored_weights(file: TensorFile) -> Method:
    """Components from an original `svd_weights.pt`, already converted by svf_torch.weights_file."""

    def decompose(name: str, _rows: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> Factors:
        rank = min(shape)
        found = {part: file.info(f"{name}.{part}").shape for part in ("U", "S", "V")}
        expected = {"U": (shape[0], rank), "S": (rank,), "V": (shape[1], rank)}
        if found != expected:
            raise InputError(f"{file.path}: '{name}': expected {expected}, got {found}")
        return StoredFactors(file, name, shape)

    return Method(
        "svd_weights_pt",
        "python_svd_weights_torch_v_final_bf16",
        decompose,
        "svd_weights_pt",
        "python_svd_weights_vh_final_bf16",
        stored=True,
    )


def select(options: DecomposeOptions, checkpoint: ModelSource) -> Selection:
    """The manifest's selection, checked against the model, or the selection rule's."""
    shapes = parameter_shapes(checkpoint.config)
    if options.manifest is None:
        return select_by_rule(shapes, options.layers)
    selection = load_manifest(options.manifest)
    for tensor in selection.tensors:
        stored = checkpoint.info(checkpoint.resolve(tensor.source_name)).shape
        if stored != tensor.shape:
            raise InputError(
                f"{options.manifest}: '{tensor.source_name}' is {list(tensor.shape)} in the manifest and "
                f"{list(stored)} in {options.model}"
            )
    return selection


def decompose(
    options: DecomposeOptions, method: Method, backend: Backend, progress: Report = lambda _l, _d: None
) -> dict[str, Any]:
    """Write the bundle into the new folder `options.out`; returns a summary (`svf.decompose/1`).

    `backend` computes the recorded stages and variants: PyTorch, as the reference side.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open_model(options.model))
        opened.check()
        checkpoint = LoadedWeights(opened, options.model_dtype)
        selection = select(options, opened)
        if options.strict_reference and selection.sample.expected_bf16_sha256 is None:
            raise UsageError("--strict-reference-hash needs a stored hash: a --manifest that has one")
        vector = load_router_vector(options.vector, selection, opened.config.hidden_size)
        sample = next(t for t in selection.tensors if t.source_name == selection.sample.source_name)
        tensors = selection.tensors if options.all_selected else (sample,)
        other = _other_readback(options, sample, stack)
        folder = stack.enter_context(new_folder(options.out, resume=options.resume))
        ensure_space(folder, _output_bytes(tensors))
        writer = _BundleWriter(folder, checkpoint, vector, backend, method)
        writer.components(tensors, progress)
        with _Readback(folder, tensors, checkpoint) as readback:
            hashes = writer.stages(tensors, readback, options.all_selected and options.write_stages, progress)
            variants = writer.variants(sample, selection, readback, progress, other)
            if options.write_stages:
                writer.sample_stages(sample, selection, readback)
            report = BundleReport(
                options,
                method,
                folder,
                vector,
                selection,
                tensors,
                hashes,
                variants,
                writer.in_memory,
                checkpoint.dtype,
            )
            document = report.document(readback.source(sample))
            write_json(folder / bundles.MANIFEST_FILE, report.manifest())
        if options.report is not None:
            write_json(options.report, document)
        reproducible = document["reference"]["expected_hash_reproducible"]
        return {
            "schema": "svf.decompose/1",
            "out": str(folder),
            "report": str(options.report) if options.report else None,
            "component_source": method.component_source,
            "tensors": [t.source_name for t in tensors],
            "reference": document["reference"],
            "gates": {STRICT_REFERENCE: reproducible} if options.strict_reference else {},
            "variants": [{k: v[k] for k in ("label", "observed_bf16_sha256", *_ZERO)} for v in variants],
        }


class LoadWeights(Protocol):
    """svf_torch.weights_file.load_svd_weights: named `.U/.S/.V` tensors of a pickle into a safetensors file."""

    def __call__(self, path: Path, names: list[str], out: Path) -> Any: ...


def decompose_stored(
    options: DecomposeOptions, load: LoadWeights, backend: Backend, progress: Report = lambda _l, _d: None
) -> dict[str, Any]:
    """`decompose` with the components of an original `svd_weights.pt`, which `load` reads in a child process."""
    assert options.svd_weights is not None
    with open_model(options.model) as checkpoint:
        selection = select(options, checkpoint)
    chosen = [t.source_name for t in selection.tensors]
    names = chosen if options.all_selected else [selection.sample.source_name]
    with scratch_folder("weights") as work:
        converted = work / "weights.safetensors"
        load(options.svd_weights, names, converted)
        with TensorFile(converted) as file:
            return decompose(options, stored_weights(file), backend, progress)


def exit_code(document: Mapping[str, Any]) -> int:
    """1 when the gate that was asked for failed."""
    return 0 if all(document["gates"].values()) else 1


def _other_readback(options: DecomposeOptions, sample: SelectedTensor, stack: ExitStack) -> Components | None:
    """The sample's components in another bundle that variants are to be read back from; None: the written one."""
    if options.readback is None or options.readback.resolve() == options.out.resolve():
        return None
    bundle = stack.enter_context(bundles.Bundle(options.readback))
    entry = next((e for e in bundle.entries if e.source_name == sample.source_name), None)
    if entry is None or entry.shape != sample.shape:
        has = "lacks it" if entry is None else f"has {list(entry.shape)}"
        raise InputError(
            f"{options.readback}: the sample is '{sample.source_name}' {list(sample.shape)}, this bundle {has}"
        )
    return bundle.load(entry)


_ZERO = ("zero_offset_max_abs_error_vs_source",)


def _output_bytes(tensors: Sequence[SelectedTensor]) -> int:
    per_stage = sum(stored_dtype(s.dtype).itemsize for s in REPLAY.values() if s.by_rows)
    return sum(t.shape[0] * t.shape[1] * per_stage + 4 * min(t.shape) * sum(t.shape) for t in tensors)


class LoadedWeights:
    """A checkpoint's weights as a model of another dtype holds them; `auto` is the dtype that its config names."""

    def __init__(self, checkpoint: ModelSource, dtype: str):
        self._checkpoint, self.source = checkpoint, checkpoint.source
        self.dtype = checkpoint.config.dtype if dtype == "auto" else dtype

    def resolve(self, name: str) -> str:
        return self._checkpoint.resolve(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]`, rounded to the dtype."""
        with np.errstate(over="ignore"):  # what the dtype cannot hold is refused by name
            return self._checkpoint.read(name, start, stop).astype(stored_dtype(self.dtype), copy=False)


class _Source:
    """Float32 rows of a weight; NaN and infinity refused by name and place."""

    def __init__(self, checkpoint: LoadedWeights, tensor: SelectedTensor):
        self._checkpoint, self._name = checkpoint, checkpoint.resolve(tensor.source_name)
        self.shape = tensor.shape

    def __call__(self, start: int, stop: int) -> np.ndarray:
        rows = self._checkpoint.read(self._name, start, stop).astype(np.float32)
        if not np.isfinite(rows).all():
            r, c = (int(i) for i in np.argwhere(~np.isfinite(rows))[0])
            raise InputError(f"{self._checkpoint.source}: '{self._name}' has NaN or infinity at [{start + r}, {c}]")
        return rows


class _Readback:
    """The components as written: what the recorded stages are computed from."""

    def __init__(self, folder: Path, tensors: Sequence[SelectedTensor], checkpoint: LoadedWeights):
        self._components = TensorFile(folder / bundles.COMPONENTS_FILE)
        self._offsets = TensorFile(folder / bundles.OFFSETS_FILE)
        self._checkpoint = checkpoint
        self._names = {t.source_name: component_keys(t.source_name) for t in tensors}

    def task(self, tensor: SelectedTensor, layout: str = "torch_v", *, transpose: bool = False) -> ReplayTask:
        keys, file = self._names[tensor.source_name], self._components
        return ReplayTask(
            tensor.source_name,
            tensor.shape,
            lambda start, stop: file.read(keys["u"], start, stop),
            file.read(keys["s"]),
            file.read(keys["v"]),
            self._offsets.read(offsets_key(tensor.source_name)),
            _Source(self._checkpoint, tensor),
            layout,
            transpose,
        )

    def source(self, tensor: SelectedTensor) -> np.ndarray:
        """The whole float32 weight."""
        return _Source(self._checkpoint, tensor)(0, tensor.shape[0])

    def __enter__(self) -> _Readback:
        return self

    def __exit__(self, *exc: object) -> None:
        self._components.close()
        self._offsets.close()


class _BundleWriter:
    """Writes the files of one bundle, in the order in which each can be trusted."""

    def __init__(self, folder: Path, checkpoint: LoadedWeights, vector: RouterVector, backend: Backend, method: Method):
        self.folder, self.checkpoint, self.vector, self.method = folder, checkpoint, vector, method
        self.replayer = Replayer(backend)
        self.in_memory: dict[str, np.ndarray] = {}

    def components(self, tensors: Sequence[SelectedTensor], progress: Report) -> None:
        """Decompose each distinct weight once and write U, S, V under the key of every tensor that has its values."""
        specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        for t in tensors:
            specs |= bundles.component_specs(t.source_name, t.shape, "torch_v")
        groups: dict[str, list[SelectedTensor]] = {}
        for t in tensors:  # tied tensors resolve to one stored weight; stored components are each their own
            one = t.source_name if self.method.stored else self.checkpoint.resolve(t.source_name)
            groups.setdefault(one, []).append(t)
        # Leaving and entering per tensor would make OpenBLAS restart its threads each time (stages/oracle/svd.py).
        writing = TensorWriter(self.folder / bundles.COMPONENTS_FILE, specs)
        with svd.single_threaded_blas(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, writing as writer:
            small = {
                name: pool.submit(self._factors, members[0])
                for name, members in groups.items()
                if self.method.parallel and math.prod(members[0].shape) <= svd.DIRECT_ELEMENTS
            }
            for name, members in groups.items():
                progress(f"decomposing {members[0].source_name}", 0.0)
                factors = small[name].result() if name in small else self._factors(members[0])
                self._write_components(members, factors, writer, progress)
            writer.commit()
        offsets = {offsets_key(t.source_name): self.vector.offsets(t) for t in tensors}
        write_tensors(self.folder / bundles.OFFSETS_FILE, offsets)

    def _factors(self, tensor: SelectedTensor) -> Factors:
        return self.method.decompose(tensor.source_name, _Source(self.checkpoint, tensor), tensor.shape)

    def _write_components(
        self, members: Sequence[SelectedTensor], factors: Factors, writer: TensorWriter, progress: Report
    ) -> None:
        """U, S and V under the keys of all tensors that they belong to."""
        for t in members:
            keys = component_keys(t.source_name)
            bundles.check_normalization(factors.s, self.vector.offsets(t), f"offsets of '{t.source_name}'")
            writer.write(keys["s"], factors.s)
            writer.write(keys["v"], factors.v)
        for start, stop, rows in factors.u_chunks():
            for t in members:
                writer.write(component_keys(t.source_name)["u"], rows, start)
            progress(f"decomposing {members[0].source_name}", stop / members[0].shape[0])

    def stages(
        self, tensors: Sequence[SelectedTensor], readback: _Readback, all_selected: bool, progress: Report
    ) -> Hashes:
        """The all-selected stage file, source-oriented; returns hashes of sources and offsets."""
        if not all_selected:
            return self._hashes_of(tensors)
        specs = {}
        tasks = [readback.task(t) for t in tensors]
        for task in tasks:
            for stage in REPLAY.values():
                key = tensor_stage_key(task.source_name, stage.name)
                specs[key] = (stored_dtype(stage.dtype), task.stage_shape(stage))
        hashed = {tensor_stage_key(t.source_name, n) for t in tensors for n in ("source_f32", "offsets_f32")}
        with TensorWriter(self.folder / bundles.ALL_STAGES_FILE, specs, hashes=hashed) as writer:
            for task in tasks:
                for chunk in self.replayer.run(task):
                    for name, array in chunk.values.items():
                        start = chunk.start if REPLAY[name].by_rows else 0
                        writer.write(tensor_stage_key(task.source_name, name), array, start)
                    progress(f"replaying {task.source_name}", chunk.stop / task.shape[0])
            digests = writer.commit()
        names = [t.source_name for t in tensors]
        return Hashes(
            {n: digests[tensor_stage_key(n, "source_f32")] for n in names},
            {n: digests[tensor_stage_key(n, "offsets_f32")] for n in names},
        )

    def _hashes_of(self, tensors: Sequence[SelectedTensor]) -> Hashes:
        return Hashes(
            {t.source_name: sha256(_Source(self.checkpoint, t)(0, t.shape[0])) for t in tensors},
            {t.source_name: sha256(self.vector.offsets(t)) for t in tensors},
        )

    def sample_stages(self, sample: SelectedTensor, selection: Selection, readback: _Readback) -> None:
        """The sample's stage file, its final stages in the target's orientation."""
        values = self._sample_values(readback.task(sample, transpose=is_turned(sample, selection)))
        tensors = {sample_stage_key(name): array for name, array in values.items()}
        write_tensors(self.folder / bundles.SAMPLE_STAGES_FILE, tensors)

    def _sample_values(self, task: ReplayTask) -> dict[str, np.ndarray]:
        """All stages of one tensor at once, whole: the sample is a layer's weight, tens of megabytes."""
        parts: dict[str, list[np.ndarray]] = {}
        for chunk in self.replayer.run(task):
            for name, array in chunk.values.items():
                parts.setdefault(name, []).append(array)
        return {n: np.concatenate(a, axis=task.row_axis(REPLAY[n])) if len(a) > 1 else a[0] for n, a in parts.items()}

    def variants(
        self,
        sample: SelectedTensor,
        selection: Selection,
        readback: _Readback,
        progress: Report,
        other: Components | None,
    ) -> list[dict[str, Any]]:
        """The sample replayed from memory and from the files, with V contracted as `torch_v` and as `vh`.

        `other` are components of another bundle, read back in the place of the written ones.
        """
        progress(f"variants of {sample.source_name}", 0.0)
        turned = is_turned(sample, selection)
        read = readback.task(sample, transpose=turned)
        memory = _with(read, **self._held(sample, self.method.decompose))
        self.in_memory = {"u": memory.u(0, sample.shape[0]), "s": memory.s, "v": memory.v, "offsets": read.offsets}
        from_vh = _with(read, **self._held(sample, self.method.vh)) if self.method.vh else memory
        back = read if other is None else _with(read, u=other.u, s=other.s, v=other.v, offsets=other.offsets)
        tasks = [
            (self.method.label, self.method.component_source, memory),
            # V^H of the right kind: the contraction must not matter when the layout is told right.
            (self.method.vh_label, self.method.vh_source, _with(from_vh, v=from_vh.v.T, layout="vh")),
            (BASELINE_LABEL, "safetensors_readback", back),
            # torch_v components read as vh: the mistake that the original was written to find.
            ("python_safetensors_readback_vh_final_bf16", "safetensors_readback", _with(back, layout="vh")),
        ]
        expected = selection.sample.expected_bf16_sha256
        result = []
        for label, component_source, task in tasks:
            if task.v.shape == LAYOUTS[task.layout].expected_shape(sample.shape[1], task.s.size):
                result.append(variant(label, component_source, task, self._sample_values(task), expected))
        progress(f"variants of {sample.source_name}", 1.0)
        return result

    def _held(self, sample: SelectedTensor, decomposer: Decomposer) -> dict[str, Any]:
        """The sample's U, S and V in memory."""
        factors = decomposer(sample.source_name, _Source(self.checkpoint, sample), sample.shape)
        u = np.concatenate([rows for _, _, rows in factors.u_chunks()])
        return {"u": lambda start, stop: u[start:stop], "s": factors.s, "v": factors.v}


def _with(task: ReplayTask, **changes: Any) -> ReplayTask:
    return ReplayTask(**{**vars(task), **changes})
