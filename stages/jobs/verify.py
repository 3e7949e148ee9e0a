"""`svf verify`: whether a file or folder is sound: schema, hashes, and what its values must be (`svf.verify/1`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, UsageError, shown
from stages.files.aprt import AprtFile, AprtTree
from stages.files.checkpoint import open_checkpoint
from stages.files.gguf_file import GgufFile
from stages.files.gguf_model import GgufModel
from stages.files.jsonio import read_object
from stages.files.kinds import Kind, kind_of_source
from stages.files.npy import read_npy_header
from stages.files.pickle_listing import Listing, check_pickle, list_pickle, record_faults
from stages.files.source import ModelSource
from stages.files.tensorfile import TensorFile
from stages.files.tool_dumps import Raw, open_recorded, raw_tensors, table_of
from stages.jobs.verify_bundle import bundle_checks
from stages.jobs.verify_dump import dump_checks
from stages.jobs.verify_values import Check, nonfinite
from stages.progress import Progress
from stages.spec.dtypes import dtype_name

SCHEMA = "svf.verify/1"
EXIT_CODES = {"sound": 0, "malformed": InputError.exit_code}


def verify(source: str, model: str | None, progress: Progress) -> dict[str, Any]:
    """The document of whatever `source` is: the checks that were made and every finding.

    `model` is the checkpoint that a bundle's components are of. `InputError` for what is of no known kind,
    `NotFoundError` for what is not there.
    """
    kind = kind_of_source(source)
    if kind is Kind.BUNDLE:
        checks = bundle_checks(Path(source), model, progress)
    elif model is not None:
        raise UsageError(
            f"--model names the source weights of a component bundle, but {source} is of another kind: {kind}"
        )
    else:
        checks = _CHECKS[kind](source, progress)
    names, findings = collect(checks)
    return {
        "schema": SCHEMA,
        "source": source,
        "kind": kind.value,
        "outcome": "malformed" if findings else "sound",
        "checks": names,
        "findings": findings,
    }


def collect(checks: Iterator[Check]) -> tuple[list[str], list[str]]:
    """Names of all checks, and all findings; an `InputError` ends the check that it is raised in as a finding."""
    names: list[str] = []
    findings: list[str] = []
    try:
        for name, found in checks:
            names.append(name)
            try:
                findings.extend(found)
            except InputError as error:
                findings.append(str(error))
    except InputError as error:  # while opening: nothing more can be looked at
        findings.append(str(error))
    return names, list(dict.fromkeys(findings))


def _checkpoint(source: str, progress: Progress) -> Iterator[Check]:
    with open_checkpoint(source) as checkpoint:
        # Files against their index and headers were checked when they were opened.
        yield "files and headers", iter(())
        yield "names, shapes and dtypes as config.json asks", _as_configured(checkpoint)
        yield "finite values", _finite(checkpoint.files, progress)


def _gguf(source: str, progress: Progress) -> Iterator[Check]:
    yield "header, sizes and places", _opened(lambda: GgufFile(source).close())
    with GgufModel(Path(source), source) as model:
        yield "keys, names, shapes and types of a model", _as_configured(model)
        yield "finite values", _finite([model], progress)


def _as_configured(checkpoint: ModelSource) -> Iterator[str]:
    checkpoint.check()
    yield from ()


def _finite(files: Sequence[TensorFile | ModelSource], progress: Progress) -> Iterator[str]:
    infos = [(file, info) for file in files for info in file.tensors.values()]
    total, done = sum(info.nbytes for _, info in infos), 0
    for file, info in infos:
        progress(f"reading {shown(info.name)}", done / max(1, total))
        yield from nonfinite(file, info.name)
        done += info.nbytes


def _safetensors(source: str, progress: Progress) -> Iterator[Check]:
    with TensorFile(source) as file:
        yield "header", iter(())
        yield "finite values", _finite([file], progress)


def _aprt(source: str, _: Progress) -> Iterator[Check]:
    yield "header, size and folder", _opened(lambda: AprtFile(source))


def _aprt_tree(source: str, _: Progress) -> Iterator[Check]:
    yield "headers, sizes and folders", _opened(lambda: AprtTree(source))


def _npy(source: str, _: Progress) -> Iterator[Check]:
    yield "header and size", _opened(lambda: read_npy_header(Path(source)))


def _opened(open_it: Callable[[], object]) -> Iterator[str]:
    open_it()
    yield from ()


def _pickle(source: str, _: Progress) -> Iterator[Check]:
    path = Path(source)
    yield "records and their checksums", _opened(lambda: check_pickle(path))
    listing = list_pickle(path)
    yield "opcodes, read and not run", _unexpected(path, listing)
    yield "storages of tensors", iter(record_faults(listing))


def _unexpected(path: Path, listing: Listing) -> Iterator[str]:
    if listing.runs:
        names = shown(", ".join(listing.runs), 200)
        yield f"{path}: unpickling it imports {names}, which plain tensors do not need"


def _json(source: str, _: Progress) -> Iterator[Check]:
    yield "one JSON object, no key twice", _schema(source)


def _schema(source: str) -> Iterator[str]:
    if not isinstance(read_object(source).get("schema"), str):
        yield f"{source}: names no schema, so nothing can be said of its fields"


def _tool(source: str, progress: Progress) -> Iterator[Check]:
    path = Path(source)
    table = table_of(path)
    assert table is not None
    with ExitStack() as stack:
        raws = raw_tensors(table, path, stack)
        yield "files and headers", iter(())
        yield f"stages by the names of {table.title}", _opened(lambda: open_recorded(table, path, None, stack))
        yield "finite values", _finite_raws(raws, progress)


def _finite_raws(raws: Mapping[str, Raw], progress: Progress) -> Iterator[str]:
    for number, (name, raw) in enumerate(raws.items()):
        progress(f"reading {shown(name)}", number / len(raws))
        if "float" in dtype_name(raw.dtype) and not np.isfinite(raw.read().astype(np.float64)).all():
            yield f"{raw.file}: '{shown(name)}' has NaN or infinity"


_CHECKS: dict[Kind, Callable[[str, Progress], Iterator[Check]]] = {
    Kind.CHECKPOINT: _checkpoint,
    Kind.GGUF: _gguf,
    Kind.DUMP: lambda source, progress: dump_checks(Path(source), progress),
    Kind.APRT_TREE: _aprt_tree,
    Kind.APRT: _aprt,
    Kind.TOOL: _tool,
    Kind.SAFETENSORS: _safetensors,
    Kind.NPY: _npy,
    Kind.PICKLE: _pickle,
    Kind.JSON: _json,
}
