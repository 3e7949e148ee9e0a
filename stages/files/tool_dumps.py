"""Forwards as other tools write them, each known by what it holds and read by a table of names, `formats/*.toml`.

A table says which files hold tensors, what each is called, and which stage that is; one more tool is one more table.
A name in a table has words in braces: `{n}` is the layer, `{call}` the number of the call, `{rank}` the process that
wrote it and `{stage}` the documented name of a stage; any other is one of the table's own `words`. What a name stands
for is a documented key, with `{n}`, `{n-1}`, the model's `{last}` layer, or a word of the name; or `tokens`, the ids
that were run. Nothing a folder holds is executed, and no name that it holds becomes a path: files are those of its own
listing.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError, shown
from stages.files.forward_dump import Place, forward_key, parse_key
from stages.files.jsonio import open_regular, read_object
from stages.files.npy import read_npy_header
from stages.files.tensorfile import TensorFile
from stages.files.torch_child import Lying, locate
from stages.spec.forward import ANY_MODEL

_TABLES = Path(__file__).with_name("formats")
_WORD = re.compile(r"\{(\w+)\}")
_NUMBER = r"0|[1-9][0-9]{0,5}"
_NUMBERS = ("n", "call", "rank")
# A file a tensor: 100 layers of 100 modules, their inputs and outputs, have a fifth of that.
_MAX_FILES = 100_000
TOKENS = "tokens"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Target:
    """What one recorded tensor gives: the stage `key`, or the part `part` (number, of how many) of one that is joined
    on the last axis; of the tensor's own last axis the `share` (number, of how many) alone. `flat`: its axes are those
    of the stage run together."""

    key: str
    part: tuple[int, int] = (0, 1)
    share: tuple[int, int] = (0, 1)
    flat: bool = False


@dataclass(frozen=True)
class Row:
    """Names that `pattern` matches are `targets`; `name` is what the table has, between its prefix and suffix."""

    name: str
    pattern: re.Pattern[str]
    targets: tuple[Target, ...]


Match = tuple[Row, re.Match[str]]


@dataclass(frozen=True)
class Table:
    """One tool's way of writing. `files`: the paths, from the folder on, of the files with tensors, whose group `name`
    names one of one tensor, which has the key `tensor` in it; without it the keys are names. `sign`: a JSON file that
    the tool writes beside them, and keys that it has; None: the names alone tell. `marks`: a file that has to be there,
    where another table has the same sign. `closed`: a name of no row is refused. `prefix` and `suffix` stand around
    the name of every row."""

    title: str
    record: str
    source: str
    note: str
    files: re.Pattern[str]
    tensor: str | None
    sign: tuple[re.Pattern[str], tuple[str, ...]] | None
    marks: re.Pattern[str] | None
    closed: bool
    prefix: str
    suffix: str
    rows: tuple[Row, ...]

    def row(self, name: str) -> Match | None:
        """The first row that a tensor's name matches, and how."""
        return next(((row, match) for row in self.rows if (match := row.pattern.fullmatch(name))), None)


@dataclass(frozen=True)
class Raw:
    """One tensor as the tool wrote it."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Piece:
    """What one recorded tensor gives of one stage."""

    name: str
    raw: Raw
    target: Target

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.raw.shape
        if self.target.share[1] > 1:
            shape = (*shape[:-1], shape[-1] // self.target.share[1])
        return (int(np.prod(shape, dtype=object)),) if self.target.flat else shape

    def read(self) -> np.ndarray:
        array, (number, of) = self.raw.read(), self.target.share
        if of > 1:
            size = array.shape[-1] // of
            array = array[..., number * size : (number + 1) * size]
        return array.reshape(self.shape)


@dataclass(frozen=True)
class Recorded:
    """The stages that a tool recorded: `pieces` in the order in which they are joined on the last axis. `tokens`: the
    ids that were run, where it recorded them. `facts`: what a reader of the verdict should know of the reading."""

    title: str
    pieces: Mapping[Place, tuple[Piece, ...]]
    tokens: tuple[int, ...] | None
    facts: dict[str, str] = field(default_factory=dict)

    def shape(self, place: Place) -> tuple[int, ...]:
        """A stage's shape as recorded."""
        shapes = [piece.shape for piece in self.pieces[place]]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes)) if len(shapes) > 1 else shapes[0]

    def read(self, place: Place) -> np.ndarray:
        """A stage as recorded."""
        arrays = [piece.read() for piece in self.pieces[place]]
        return np.ascontiguousarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1))


# -- tables -------------------------------------------------------------------------------------------------------


@functools.cache
def tables() -> tuple[Table, ...]:
    """Every table, by file name; those with marks before those that would take what has them too."""
    found = [_table(path) for path in sorted(_TABLES.glob("*.toml"))]
    return tuple(sorted(found, key=lambda table: table.marks is None))


def _table(path: Path) -> Table:
    raw = tomllib.loads(path.read_text("utf-8"))
    stages = "|".join(sorted({*ANY_MODEL, *ANY_MODEL.aliases}))
    words = {**dict.fromkeys(_NUMBERS, _NUMBER), "stage": stages, **raw.get("words", {})}
    prefix, suffix = raw.get("prefix", ""), raw.get("suffix", "")
    rows = tuple(
        Row(name, _pattern(f"{prefix}{name}{suffix}", words), tuple(_targets(value)))
        for name, value in raw["names"].items()
    )
    sign = raw.get("sign")
    return Table(
        title=raw["title"],
        record=raw["record"],
        source=raw["source"],
        note=raw.get("note", ""),
        files=re.compile(raw["files"], re.ASCII),
        tensor=raw.get("tensor"),
        sign=None if sign is None else (re.compile(sign["file"], re.ASCII), tuple(sign["keys"])),
        marks=re.compile(raw["marks"], re.ASCII) if "marks" in raw else None,
        closed=raw.get("closed", False),
        prefix=prefix,
        suffix=suffix,
        rows=rows,
    )


def _pattern(name: str, words: Mapping[str, str]) -> re.Pattern[str]:
    parts, seen = _WORD.split(name), set[str]()
    for at in range(1, len(parts), 2):
        word = parts[at]
        parts[at] = f"(?P={word})" if word in seen else f"(?P<{word}>{words[word]})"
        seen.add(word)
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts), re.ASCII)


def _targets(value: Any) -> Iterator[Target]:
    for one in value if isinstance(value, list) else [value]:
        given: dict[str, Any] = {"key": one} if isinstance(one, str) else one
        (part, parts), (share, shares) = given.get("part", (0, 1)), given.get("share", (0, 1))
        yield Target(given["key"], (part, parts), (share, shares), given.get("flat", False))


# -- what a folder is ---------------------------------------------------------------------------------------------


def table_of(path: Path) -> Table | None:
    """The table of the tool that wrote the folder or file at `path`; None where none did."""
    names = _listing(path)
    return next((table for table in tables() if _wrote(table, path, names)), None)


def _wrote(table: Table, path: Path, names: Sequence[str]) -> bool:
    if table.marks is not None and not any(map(table.marks.fullmatch, names)):
        return False
    if table.sign is not None:
        found = [name for name in names if table.sign[0].fullmatch(name)]
        return path.is_dir() and any(set(table.sign[1]) <= set(read_object(path / name)) for name in found)
    return any(_is_of(table, path, name) for name in names)


def _is_of(table: Table, path: Path, name: str) -> bool:
    """Whether a file is one with tensors, and one whose names show it is one of a row."""
    match = table.files.fullmatch(name)
    if match is None:
        return False
    file = path / name if path.is_dir() else path
    if (own := _named(match)) is not None:
        return table.row(own) is not None
    if file.suffix != ".safetensors":
        return True  # its keys are read by a child, which no look at a folder starts
    with TensorFile(file) as tensors:
        return any(table.row(key) is not None for key in tensors.tensors)


def _named(match: re.Match[str]) -> str | None:
    """The tensor that a file's own name names; None where its keys do."""
    return match.groupdict().get("name")


def _listing(path: Path) -> list[str]:
    """The names of the files in a folder and in those right inside it, from it on; of a file, its own."""
    if not path.is_dir():
        return [path.name] if path.is_file() else []
    try:
        names = []
        for entry in os.scandir(path):
            names += [entry.name] if entry.is_file() else []
            inside = os.scandir(entry.path) if entry.is_dir(follow_symlinks=False) else ()
            names += [f"{entry.name}/{file.name}" for file in inside if file.is_file()]
            if len(names) > _MAX_FILES:
                raise InputError(f"{path}: holds more than {_MAX_FILES} files; name the folder of one recording")
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read: {error.strerror}") from None
    return sorted(names)


# -- reading ------------------------------------------------------------------------------------------------------


def open_recorded(table: Table, path: Path, layers: int | None, stack: ExitStack) -> Recorded:
    """The stages of what `table`'s tool wrote at `path`. `layers`: the model's; None: its last layer is not known.

    `InputError` where nothing is a stage, where several processes wrote parts, or where two tensors are one stage.
    """
    matches = _files(table, path)
    passed = {given for match in matches if (given := _named(match)) is not None and table.row(given) is None}
    raws = _tensors(path, table.tensor, [match for match in matches if _named(match) not in passed], stack)
    found = {name: row for name in raws if (row := table.row(name)) is not None}
    others = [*sorted(passed), *(name for name in raws if name not in found)]
    _check(table, path, found, others)
    facts = {"recorded by": table.title}
    if others:
        facts["not read"] = f"{len(others)} tensors that are no stage: {_some(others)}"
    calls = sorted({int(match["call"]) for _, match in found.values() if "call" in match.groupdict()})
    if len(calls) > 1:
        facts["call"] = f"{calls[0]}, the first of {len(calls)}"
    first = {name: (row, match) for name, (row, match) in found.items() if _call(match) in (None, *calls[:1])}
    pieces, tokens = _pieces(table, path, raws, first, layers)
    whole = {place: parts for place, parts in pieces.items() if len(parts) == parts[0].target.part[1]}
    if lacking := [forward_key(place) for place in pieces if place not in whole]:
        facts["in part"] = f"not all that is joined was recorded: {_some(lacking)}"
    if not whole:
        raise InputError(f"{path}: is a dump of {table.title}, but {_no_stage(table, [*found, *others])}")
    for place, parts in whole.items():
        _check_joined(path, place, parts)
    return Recorded(table.title, whole, tokens, facts)


def raw_tensors(table: Table, path: Path, stack: ExitStack) -> dict[str, Raw]:
    """Every tensor of a tool's dump by the name that the tool gave it, whether it is a stage or not."""
    return _tensors(path, table.tensor, _files(table, path), stack)


def _files(table: Table, path: Path) -> list[re.Match[str]]:
    return [match for name in _listing(path) if (match := table.files.fullmatch(name))]


def _call(match: re.Match[str]) -> int | None:
    words = match.groupdict()
    return int(words["call"]) if "call" in words else None


def _pieces(
    table: Table, path: Path, raws: Mapping[str, Raw], found: Mapping[str, Match], layers: int | None
) -> tuple[dict[Place, tuple[Piece, ...]], tuple[int, ...] | None]:
    """What each stage is joined of, as far as it was recorded, and the tokens."""
    pieces: dict[Place, dict[int, tuple[int, Piece]]] = {}
    tokens = None
    for name, (row, match) in found.items():
        for target in row.targets:
            if target.key == TOKENS:
                tokens = tuple(int(token) for token in raws[name].read().reshape(-1))
            elif (place := _place(target.key, match, layers)) is not None:
                _add(pieces.setdefault(place, {}), table.rows.index(row), Piece(name, raws[name], target), place, path)
    return {place: tuple(parts[part][1] for part in sorted(parts)) for place, parts in pieces.items()}, tokens


def _no_stage(table: Table, names: Sequence[str]) -> str:
    if not names:
        return f"holds no tensors; record with {table.record}"
    return f"none of its {len(names)} tensors is a stage: {_some(names)}"


def _check(table: Table, path: Path, found: Mapping[str, Match], others: Sequence[str]) -> None:
    if not found:
        raise InputError(f"{path}: is a dump of {table.title}, but {_no_stage(table, others)}")
    names = " or ".join(row.name for row in table.rows)
    if table.closed and others:
        raise InputError(f"{path}: '{shown(others[0])}' is no stage; expected {names}")
    ranks = sorted({match["rank"] for _, match in found.values() if "rank" in match.groupdict()})
    if len(ranks) > 1:
        raise InputError(
            f"{path}: {len(ranks)} processes wrote it, each its own part of the tensors; run on one, or join the parts"
        )


def _place(key: str, match: re.Match[str], layers: int | None) -> Place | None:
    """Layer and stage of a target's key; None for a layer that is before the first, or the last one of an unknown."""
    words = match.groupdict()
    if "{last}" in key:
        if layers is None:
            return None
        key = key.replace("{last}", str(layers - 1))
    if "{n-1}" in key:
        if words["n"] == "0":
            return None
        key = key.replace("{n-1}", str(int(words["n"]) - 1))
    place = parse_key(key.format_map(words))
    assert place is not None, key
    return place


def _add(parts: dict[int, tuple[int, Piece]], row: int, piece: Piece, place: Place, path: Path) -> None:
    """Keep the piece of the first row that gives it; `InputError` where one row has two names for it."""
    number = piece.target.part[0]
    before = parts.get(number)
    if before is not None and before[0] == row:
        names = f"'{shown(before[1].name)}' and '{shown(piece.name)}'"
        raise InputError(f"{path}: {names} are both {forward_key(place)}; keep one of them")
    if before is None or row < before[0]:
        parts[number] = (row, piece)


def _check_joined(path: Path, place: Place, parts: Sequence[Piece]) -> None:
    """`InputError` for tensors that are no numbers of a stage, or that do not go together."""
    for piece in parts:
        if piece.raw.dtype.name not in _DTYPES:
            names = " or ".join(_DTYPES)
            raise InputError(f"{path}: '{shown(piece.name)}' is {piece.raw.dtype.name}, expected {names}")
        if piece.target.share[1] > 1 and (not piece.raw.shape or piece.raw.shape[-1] % piece.target.share[1]):
            raise InputError(f"{path}: '{shown(piece.name)}' is {list(piece.raw.shape)}, which cannot be shared out")
    first = parts[0]
    for piece in parts[1:]:
        if piece.shape[:-1] != first.shape[:-1] or piece.raw.dtype != first.raw.dtype or not piece.shape:
            raise InputError(
                f"{path}: {forward_key(place)} is joined of '{shown(first.name)}', {first.raw.dtype.name} "
                f"{list(first.shape)}, and '{shown(piece.name)}', {piece.raw.dtype.name} {list(piece.shape)}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(shown(name, 80) for name in names[:3]) + (", ..." if len(names) > 3 else "")


# -- tensors ------------------------------------------------------------------------------------------------------


def _tensors(path: Path, key: str | None, files: Sequence[re.Match[str]], stack: ExitStack) -> dict[str, Raw]:
    """Every tensor by its name, of files of one tensor that of `key`; `InputError` for one name twice."""
    root = path if path.is_dir() else path.parent
    pickles = [root / match.string for match in files if match.string.endswith(".pt")]
    located = dict(zip(pickles, locate(pickles), strict=True)) if pickles else {}
    raws: dict[str, Raw] = {}
    for match in files:
        for own, raw in _in_file(root / match.string, located, stack):
            given = _named(match)
            if given is not None and own not in ("", key):
                continue
            name = own if given is None else given
            if name in raws:
                raise InputError(
                    f"{path}: '{shown(name)}' is in {raws[name].file.name} and in {shown(match.string)}; name one"
                )
            raws[name] = raw
    return raws


def _in_file(file: Path, located: Mapping[Path, Mapping[str, Lying]], stack: ExitStack) -> Iterator[tuple[str, Raw]]:
    """Key and tensor of all in a file; the key of one that is a tensor is ""."""
    if file.suffix == ".npy":
        header = read_npy_header(file)
        yield "", Raw(file, header.dtype.newbyteorder("="), header.shape, functools.partial(_npy, file))
    elif file.suffix == ".pt":
        for key, lying in located[file].items():
            yield key, Raw(file, lying.dtype, lying.shape, functools.partial(read_lying, file, lying))
    else:
        tensors = TensorFile(file)
        stack.callback(tensors.close)
        for key, info in tensors.tensors.items():
            yield key, Raw(file, info.dtype, info.shape, functools.partial(tensors.read, key))


def _npy(file: Path) -> np.ndarray:
    array = np.load(file, allow_pickle=False)
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def read_lying(file: Path, lying: Lying) -> np.ndarray:
    """A tensor's elements, read where they lie; `InputError` where the file is shorter than it was."""
    with os.fdopen(open_regular(file), "rb") as stream:
        stream.seek(lying.at)
        data = stream.read(lying.count)
    if len(data) != lying.count:
        raise InputError(f"{file}: changed while it was read")
    flat, size = np.frombuffer(data, lying.dtype), lying.dtype.itemsize
    steps = tuple(step * size for step in lying.stride)
    return np.array(np.lib.stride_tricks.as_strided(flat, lying.shape, steps, writeable=False), order="C")
