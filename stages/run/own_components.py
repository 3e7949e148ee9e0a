"""Components that a backend decomposes itself: a bundle of its own, to be replayed in the given one's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from stages.files import bundle as bundles
from stages.files.bundle import Bundle, BundleEntry, component_keys, component_specs, finite, offsets_key
from stages.files.folders import ensure_space, prepare_folder
from stages.files.jsonio import write_json
from stages.files.scratch import scratch_folder
from stages.files.tensorfile import TensorWriter, sha256, write_tensors
from stages.progress import Report
from stages.run.watch import entering
from stages.spec.backend import Backend
from stages.spec.layouts import LAYOUTS
from stages.spec.values import ReplayTask


@contextmanager
def native_bundle(
    folder: Path | None,
    backend: Backend,
    given: Sequence[tuple[BundleEntry, ReplayTask]],
    sample_name: str | None,
    progress: Report,
) -> Iterator[Bundle]:
    """A bundle of U, S, V of each task's source by `backend`'s SVD, made one weight at a time and open for reading.

    Written into the new `folder`; without one, it is gone after the context. V is kept in the layout that its entry
    declares; the offsets are the task's. `InputError` for a source with NaN or infinity.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(scratch_folder("native"))
        _write(prepare_folder(folder), backend, given, sample_name, progress)
        yield stack.enter_context(Bundle(folder))


def _write(
    folder: Path,
    backend: Backend,
    given: Sequence[tuple[BundleEntry, ReplayTask]],
    sample_name: str | None,
    progress: Report,
) -> None:
    specs = {key: spec for e, _ in given for key, spec in component_specs(e.source_name, e.shape, e.layout).items()}
    entries = []
    with TensorWriter(folder / bundles.COMPONENTS_FILE, specs) as writer:
        ensure_space(folder, writer.nbytes)
        for i, (entry, task) in enumerate(given):
            progress(f"{backend.name} decomposes {entry.source_name}", i / len(given))
            entries.append(_decomposed(entry, task, backend, writer))
        writer.commit()
    offsets = {offsets_key(entry.source_name): task.offsets for entry, task in given}
    write_tensors(folder / bundles.OFFSETS_FILE, offsets)
    write_json(folder / bundles.MANIFEST_FILE, bundles.manifest_of(entries, sample_name))


def _decomposed(entry: BundleEntry, task: ReplayTask, backend: Backend, writer: TensorWriter) -> BundleEntry:
    """The entry of one weight's components, written."""
    source = finite(task.source(0, entry.shape[0]), f"source of '{entry.source_name}'")
    entering(f"{entry.source_name} svd")
    u, s, v = backend.svd(source)
    turned = v if LAYOUTS[entry.layout].transposed else v.T
    for part, array in {"u": u, "s": s, "v": turned}.items():
        writer.write(component_keys(entry.source_name)[part], array)
    identity = {"source_f32": sha256(source), "offsets_f32": sha256(task.offsets)}
    return replace(entry, component_source=f"native_{backend.name}_svd", identity=identity)
