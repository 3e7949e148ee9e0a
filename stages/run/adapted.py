"""Weights adapted by the component replay, in the place of a checkpoint's own: what the forward runs on.

Before a bundle is applied it must give the model's own weights back, with zero offsets and contracted as it declares:
another model's components, or a label that lies, would make a wrong model of right looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.files.bundle import Bundle, BundleEntry
from stages.files.source import ModelSource
from stages.files.tensorfile import TensorFile, TensorInfo, TensorWriter, sha256
from stages.oracle.bounds import U32, rounding_unit
from stages.oracle.contraction import Told, look, zero_offset
from stages.oracle.residual import Residual
from stages.progress import Progress as Reporter
from stages.progress import Report
from stages.run.replay import Replayer
from stages.spec.backend import Backend
from stages.spec.layouts import LAYOUTS
from stages.spec.values import ReplayTask

ADAPTED_FILE = "adapted.safetensors"


class AdaptedWeights:
    """A checkpoint whose selected tensors are read from an adapted file; `read` and `info` as a `ModelSource`'s."""

    def __init__(self, checkpoint: ModelSource, file: TensorFile):
        self._checkpoint, self._file = checkpoint, file

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of parameter `name`, adapted where it was selected."""
        if name in self._file.tensors:
            return self._file.read(name, start, stop)
        return self._checkpoint.read(name, start, stop)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that can be read, adapted ones in place of the checkpoint's."""
        return {**self._checkpoint.tensors, **self._file.tensors}


@dataclass(frozen=True)
class Adapted:
    """A bundle applied to a checkpoint: the weights, and of each adapted tensor, in the bundle's order, its layout
    and sha256; `components` is what a manifest says of the bundle."""

    weights: AdaptedWeights
    layouts: dict[str, str]
    sha256: dict[str, str]
    components: dict[str, Any]
    notes: list[str]


def adapt(
    components: Path,
    layout: str,
    checkpoint: ModelSource,
    backend: Backend,
    folder: Path,
    stack: ExitStack,
    progress: Reporter,
    dtype: np.dtype | None = None,
) -> Adapted:
    """`write_adapted` into `folder`, opened until `stack` ends; says what a layout asked for means for the tensors.

    `InputError` when the bundle is another model's, or its label is wrong and no `layout` was named.
    """
    path = folder / ADAPTED_FILE
    bundle = stack.enter_context(Bundle(components))
    chosen = [_choose(bundle, i, layout, checkpoint) for i in range(len(bundle.entries))]
    notes = list(_notes(chosen, layout))
    for note in notes:
        progress.say(note)
    digests = write_adapted(chosen, checkpoint, backend, path, progress, dtype)
    file = TensorFile(path)
    stack.callback(file.close)
    layouts = {one.task.source_name: one.task.layout for one in chosen}
    made_of = {"source": str(components.resolve()), "sha256": {e.source_name: sums(bundle, e) for e in bundle.entries}}
    return Adapted(AdaptedWeights(checkpoint, file), layouts, digests, made_of, notes)


def sums(bundle: Bundle, entry: BundleEntry) -> dict[str, str]:
    """sha256 of a tensor's U, S, V and offsets: what an adapted weight was made from."""
    c = bundle.load(entry)
    return {**c.sha256(), "offsets": sha256(c.offsets)}


@dataclass(frozen=True)
class Chosen:
    """One tensor to adapt, and what its weights tell of the bundle's label."""

    bundle: Path
    task: ReplayTask
    told: Told
    unit: float  # unit roundoff of the model's dtype


def _notes(chosen: Sequence[Chosen], layout: str) -> Iterator[str]:
    """What is to be said of a layout that was asked for: tensors it does not fit, and labels or weights it belies."""
    if layout == "declared":
        return
    kept = [one.task.source_name for one in chosen if one.task.layout != layout]
    if kept:
        right = " or ".join(dict.fromkeys(one.told.right for one in chosen if one.task.layout != layout))
        yield f"V of {', '.join(kept)} does not fit layout {layout} by shape: contracted as {right}"
    taken = [one for one in chosen if one.task.layout == layout]
    wrong = [one for one in taken if not LAYOUTS[layout].like(one.told.right)]
    lies = [one for one in taken if one.told.fitting and LAYOUTS[layout].like(one.told.right)]
    if wrong:
        yield f"layout {layout} does not give {_named(wrong)} back, {wrong[0].told.right} does"
    if lies:
        yield f"the bundle's label {lies[0].told.declared} is wrong for {_named(lies)}: {layout} gives the weights back"


def _named(chosen: Sequence[Chosen]) -> str:
    more = f" and {len(chosen) - 1} more" if len(chosen) > 1 else ""
    return f"{chosen[0].task.source_name}{more}"


def write_adapted(
    chosen: Sequence[Chosen],
    checkpoint: ModelSource,
    backend: Backend,
    path: Path,
    progress: Report,
    dtype: np.dtype | None = None,
) -> dict[str, str]:
    """Replay the tensors of a bundle and store them at `path`, source-oriented, in `dtype` or the checkpoint's own.

    Returns tensor -> sha256. `InputError`, and no file, when zero offsets do not give a tensor back.
    """
    tasks = {one.task.source_name: one.task for one in chosen}
    specs = {name: (dtype or checkpoint.info(name).dtype, task.shape) for name, task in tasks.items()}
    replayer = Replayer(backend)
    with TensorWriter(path, specs, hashes=True) as writer:
        for one in chosen:
            task, fit = one.task, _Fit(one)
            stored, again = specs[task.source_name][0], zero_offset(task, one.told.right)
            stage = final_stage(stored)
            for chunk in replayer.run(task):
                writer.write(task.source_name, chunk.values[stage].astype(stored, copy=False), chunk.start)
                fit.add(chunk.values["source_f32"], again(chunk.start, chunk.stop))
                progress(f"adapting {task.source_name}", chunk.stop / task.shape[0])
            fit.check()
        return writer.commit()


class _Fit:
    """Whether zero offsets give a tensor back: as it is, or as a cast to the model's fewer bits left it."""

    def __init__(self, chosen: Chosen):
        self.chosen, self.residual = chosen, Residual()
        self.largest = self.beyond = 0.0  # of the source, and of |source - U S V^T| beyond half a step of its dtype

    def add(self, source: np.ndarray, again: np.ndarray) -> None:
        self.residual.add(source, again)
        off = np.abs(source - again) - self.chosen.unit * np.abs(again)
        self.largest = max(self.largest, float(np.abs(source).max(initial=0.0)))
        self.beyond = float(np.maximum(self.beyond, off.max(initial=0.0)))  # which keeps a NaN

    def check(self) -> None:
        bound, relative = self.residual.bound(self.chosen.task.s.size), self.residual.relative
        cast = self.chosen.unit > U32 and self.beyond <= bound * self.largest
        if not (relative <= bound or cast):
            raise InputError(
                f"{self.chosen.bundle}: U, S, V do not give the model's {self.chosen.task.source_name} back: relative "
                f"residual {relative:.3g}, bound {bound:.2g}; are these components of another model?"
            )


def final_stage(dtype: np.dtype) -> str:
    """The stage that a weight of `dtype` is stored from; of any dtype but bfloat16 it is one rounding of final_f32."""
    return "final_bf16" if dtype.name == "bfloat16" else "final_f32"


def _choose(bundle: Bundle, index: int, layout: str, checkpoint: ModelSource) -> Chosen:
    """The operands of one tensor under `layout`, or the right one where V's shape forbids that."""
    entry = bundle.entries[index]
    name = checkpoint.resolve(entry.source_name)
    info = checkpoint.info(name)
    if info.shape != entry.shape:
        raise InputError(
            f"{bundle.folder}: '{entry.source_name}' is {list(entry.shape)}, the model has {list(info.shape)}; "
            "are these components of another model?"
        )
    c = bundle.load(entry)

    def source(start: int, stop: int) -> np.ndarray:
        return checkpoint.read(name, start, stop).astype(np.float32)

    def task(chosen: str) -> ReplayTask:
        return ReplayTask(entry.source_name, entry.shape, c.u, c.s, c.v, c.offsets, source, chosen)

    told = look(task(entry.layout), entry.layout)
    if layout == "declared" and told.fitting:
        raise InputError(f"{bundle.folder}: {told.lie(entry.source_name)}")
    asked = task(entry.layout if layout == "declared" else layout)
    try:
        asked.check_layout()
    except InputError:
        asked = task(told.right)
    return Chosen(bundle.folder, asked, told, rounding_unit(info.dtype))
