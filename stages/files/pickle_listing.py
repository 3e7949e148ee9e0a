"""What a pickled torch file holds, without unpickling it: its opcodes are read, and nothing they ask for is done.

`pickletools.genops` splits a pickle into opcodes; here they move inert placeholders on a stack, so that a call of
`os.system` ends as a `Call` that is printed. Layouts: `torch.save`'s zip (`*/data.pkl`, `*/data/<key>`) and its older
sequence of pickles. Source: https://docs.python.org/3/library/pickletools.html, torch/serialization.py.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import InputError, shown

# A pickle of 100,000 tensors is some 20 MB; the tensors' bytes are other records, or follow it.
MAX_PICKLE_BYTES = 64 * 1024 * 1024
# The older format: magic number, protocol, system information, object, keys of storages.
_LEGACY_PICKLES = 5
# Fifty or so go to a tensor, and each costs over a microsecond: this is 50,000 tensors, and 4 s.
MAX_OPCODES = 2_500_000
# A record of a zip takes about 100 bytes in its directory.
MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
# Floats shrink to half; a checkpoint of zeros that somebody packed is refused.
MAX_UNPACKED = 16
# An opcode makes one entry of a dict at most, and a dict may stand in several places.
MAX_SHARED = 16
# Of a parameter's name, or of one that would be imported.
MAX_NAME = 1000
# What `zipfile` raises for a damaged zip; the last but one for a compression that it does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)
# Nested deeper than any state dict is.
_MAX_DEPTH = 8

_SIZES = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "qint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "qint8", "quint8"), 1),
    "complex128": 16,
}
# `torch.FloatStorage` and the rest say a dtype by its C name.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
}
# What plain files of tensors ask for; anything else runs code of the file's choosing.
_PLAIN = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
        *(f"torch.{name}" for name in _STORAGES),
        *(f"torch.{name}" for name in _SIZES),
    }
)


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True)
class Call:
    """What calling `function` would have given."""

    function: Any
    arguments: Any


@dataclass(frozen=True)
class Persistent:
    """A storage, by what identifies it: ('storage', class, key, device, elements)."""

    key: Any


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict, as pairs: its keys need not be hashable here."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    """`tensors`: name, dtype, shape, bytes (as claimed) and storage key; `globals`: all that would be imported;
    `runs`: those that plain tensors do not need; `records`: size of each storage in a zip, by key."""

    tensors: list[dict[str, Any]]
    globals: list[str]
    runs: list[str]
    records: dict[str, int] | None


def list_pickle(path: Path) -> Listing:
    """The listing of a `.pt`, `.pth` or `.bin` file; `InputError` when it is damaged or no pickle."""
    records: dict[str, int] | None = None
    if zipfile.is_zipfile(path):
        data, records = _from_zip(path)
        pickles = [_Machine(path).run(io.BytesIO(data))]
    else:
        pickles = list(_sequence(path))
    names = sorted({name for machine in pickles for name in machine.globals})
    found = [row for machine in pickles for row in machine.tensors]
    return Listing(found, names, [name for name in names if name not in _PLAIN], records)


@dataclass(frozen=True)
class Stored:
    """A dense tensor of a zip: element `first` of its storage and `stride` elements an axis on, as torch has them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    storage: str


def stored_tensors(path: Path) -> list[Stored]:
    """The dense tensors of a zip of torch.save, wherever they stand in dicts, lists and tuples.

    Their names are the keys and numbers on the way, joined by dots; "" for a file that is one tensor.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: expected a zip, as torch.save writes since 1.6; save it again with a later torch")
    machine = _Machine(path).run(io.BytesIO(_from_zip(path)[0]))
    try:
        return list(_stored((), machine.result, itertools.count(-MAX_OPCODES)))
    except ValueError as error:
        raise InputError(f"{path}: not a readable pickle: {shown(error)}") from None


def _stored(way: tuple[str, ...], item: Any, counter: Iterator[int]) -> Iterator[Stored]:
    if next(counter) > 0 or len(way) > _MAX_DEPTH:
        raise ValueError("containers inside containers, again and again")
    match item:
        case Pairs(items):
            for key, inner in items:
                yield from _stored(
                    (*way, str(key) if isinstance(key, str | int) else type(key).__name__), inner, counter
                )
        case list() | tuple():
            for number, inner in enumerate(item):
                yield from _stored((*way, str(number)), inner, counter)
        case Call(Global("torch._utils._rebuild_parameter"), (inner, *_)):
            yield from _stored(way, inner, counter)
        case Call(
            Global("torch._utils._rebuild_tensor_v2"),
            (Persistent((_, Global(storage), str(key), *_)), int(first), tuple(shape), tuple(stride), *_),
        ) if _is_shape(shape) and _is_shape(stride) and len(shape) == len(stride) and first >= 0:
            dtype = _STORAGES.get(storage.rpartition(".")[2], storage)
            yield Stored(_checked_name(".".join(way)), dtype, shape, stride, first, _checked_name(key))


class _Directory(io.FileIO):
    """A file of which no more than a directory is read at once: `zipfile` takes the whole one, whatever its size."""

    def read(self, size: int | None = -1) -> Any:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {size} bytes")
        return super().read(-1 if size is None else size)


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip at `path`; `InputError` when it is damaged, or unpacks to more than a file of tensors does.

    Records that lie over each other, or shrink a thousandfold, make a small file of any size.
    """
    try:
        with _Directory(path) as stream, zipfile.ZipFile(stream) as archive:
            size, infos = path.stat().st_size, archive.infolist()
            if (packed := sum(info.compress_size for info in infos)) > size:
                raise InputError(
                    f"{path}: {len(infos)} records claim {packed} bytes, but the zip has {size}; the records overlap"
                )
            if (unpacked := sum(info.file_size for info in infos)) > MAX_UNPACKED * size:
                raise InputError(
                    f"{path}: a zip of {size} bytes unpacks to {unpacked} bytes; no file of tensors does that"
                )
            yield archive
    except ZIP_ERRORS as error:
        raise InputError(f"{path}: damaged or truncated zip: {shown(error)}") from None


def _from_zip(path: Path) -> tuple[bytes, dict[str, int]]:
    with open_zip(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        name = next((name for name in infos if name == "data.pkl" or name.endswith("/data.pkl")), None)
        if name is None:
            raise InputError(f"{path}: a zip without data.pkl; not a file of torch.save")
        if infos[name].file_size > MAX_PICKLE_BYTES:
            raise InputError(f"{path}: {shown(name)} is {infos[name].file_size} bytes, too many for a list of tensors")
        # No more than announced is read: the size in the directory need not be true.
        with archive.open(name) as stream:
            data = b"".join(iter(functools.partial(stream.read, 1 << 20), b""))
    folder = name.removesuffix("data.pkl") + "data/"
    return data, {n.removeprefix(folder): i.file_size for n, i in infos.items() if n.startswith(folder)}


def _sequence(path: Path) -> Iterator[_Machine]:
    """The pickles at the start of a file that is no zip: the older format has four, `pickle.dump` writes one."""
    with path.open("rb") as stream:
        head = io.BytesIO(stream.read(MAX_PICKLE_BYTES))
    for number in range(_LEGACY_PICKLES):
        if number and (head.read(1) != b"\x80" or head.seek(-1, io.SEEK_CUR) < 0):
            break
        yield _Machine(path).run(head)


class _Machine:
    """A stack of inert values; `run` leaves the pickle's value in `result`, its rows in `tensors`."""

    def __init__(self, path: Path):
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: set[str] = set()
        self.result: Any = None
        self.tensors: list[dict[str, Any]] = []

    def run(self, stream: io.BytesIO) -> _Machine:
        number = 0
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if number == MAX_OPCODES:
                    raise ValueError(f"more than {MAX_OPCODES} opcodes")
                self._step(opcode.name, argument, opcode)
            self.result = self.stack.pop()
            self.tensors = list(_tensors(self.result, itertools.count(-MAX_SHARED * number)))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, AssertionError) as error:
            raise InputError(f"{self.path}: not a readable pickle: {shown(error)}; is it truncated?") from None
        return self

    def _step(self, name: str, argument: Any, opcode: Any) -> None:
        handler = getattr(self, f"_{name.lower()}", None)
        if handler is not None:
            handler(argument)
        elif "PUT" in name:
            self.memo[int(argument)] = self.stack[-1]
        elif "GET" in name:
            self.stack.append(self.memo[int(argument)])
        elif not opcode.stack_before and opcode.stack_after:
            self.stack.append(argument)  # a constant
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"opcode {name} is not one that torch.save writes")

    def _pop_mark(self) -> list[Any]:
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def _import(self, *parts: str) -> None:
        name = ".".join(_checked_name(part) for part in parts)
        self.globals.add(name)
        self.stack.append(Global(name))

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _global(self, argument: str) -> None:
        self._import(argument.replace(" ", ".", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is no text")
        self._import(module, name)

    def _inst(self, argument: str) -> None:
        arguments = self._pop_mark()
        self._import(argument.replace(" ", ".", 1))
        self.stack.append(Call(self.stack.pop(), tuple(arguments)))

    def _obj(self, _: Any) -> None:
        function, *arguments = self._pop_mark()
        self.stack.append(Call(function, tuple(arguments)))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        ordered = function == Global("collections.OrderedDict") and arguments == ()
        self.stack.append(Pairs() if ordered else Call(function, arguments))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self._reduce(None)

    def _build(self, _: Any) -> None:
        self.stack.pop()

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _binpersid(self, _: Any) -> None:
        self.stack.append(Persistent(self.stack.pop()))

    def _persid(self, argument: Any) -> None:
        self.stack.append(Persistent(argument))

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    _empty_set = _empty_list

    def _list(self, _: Any) -> None:
        self.stack.append(self._pop_mark())

    _frozenset = _list

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self.stack[-1].append(item)

    def _appends(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack[-1].extend(items)

    _additems = _appends

    def _empty_dict(self, _: Any) -> None:
        self.stack.append(Pairs())

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append(Pairs(list(zip(items[::2], items[1::2], strict=True))))

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._add(self.stack[-1], [(key, value)])

    def _setitems(self, _: Any) -> None:
        items = self._pop_mark()
        self._add(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))

    @staticmethod
    def _add(target: Any, pairs: list[tuple[Any, Any]]) -> None:
        if isinstance(target, Pairs):  # a call may give a dict too, whose content nobody asks for
            target.items.extend(pairs)


def _checked_name(text: str) -> str:
    """`text` as a name; `ValueError` for one longer than any, or with half of a surrogate pair, which has no bytes."""
    if len(text) > MAX_NAME:
        raise ValueError(f"a name of {len(text)} characters")
    text.encode()
    return text


def _tensors(value: Any, counter: Iterator[int], prefix: str = "", depth: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of the tensors in a dict, dicts inside it by dotted names; `counter` counts up to 0 what is looked at.

    `ValueError` past that: a few dicts, each many times in the next, have more rows than any memory holds.
    """
    if not isinstance(value, Pairs) or depth > _MAX_DEPTH:
        return
    for key, item in value.items:
        if next(counter) > 0:
            raise ValueError("dicts inside dicts, the same ones again and again")
        name = _checked_name(f"{prefix}{key if isinstance(key, str) else type(key).__name__}")
        row = _tensor(name, item)
        if row is not None:
            yield row
        else:
            yield from _tensors(item, counter, f"{name}.", depth + 1)


def _tensor(name: str, item: Any) -> dict[str, Any] | None:
    """The row of one tensor, or of a parameter around it; None for anything else."""
    match item:
        case Call(Global("torch._utils._rebuild_parameter"), (inner, *_)):
            return _tensor(name, inner)
        case Call(
            Global("torch._utils._rebuild_tensor_v2"),
            (Persistent((_, Global(storage), str(key), *_)), int(), tuple(shape), tuple(), *_),
        ) if _is_shape(shape):
            return _row(name, _STORAGES.get(storage.rpartition(".")[2], storage), shape, _checked_name(key))
        case Call(
            Global("torch._utils._rebuild_tensor_v3"),
            (Persistent((_, _, str(key), *_)), int(), tuple(shape), tuple(), _, _, Global(dtype), *_),
        ) if _is_shape(shape):
            return _row(name, dtype.removeprefix("torch."), shape, _checked_name(key))
        case Call(Global(function), _) if function.startswith("torch._utils._rebuild_"):
            kind = function.removeprefix("torch._utils._rebuild_")
            return {"name": name, "dtype": kind, "shape": None, "bytes": None, "storage": None}
    return None


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return len(shape) <= 64 and all(isinstance(n, int) and 0 <= n < 2**63 for n in shape)


def _row(name: str, dtype: str, shape: tuple[int, ...], storage: str) -> dict[str, Any]:
    size = _SIZES.get(dtype)
    claimed = None if size is None else math.prod(shape) * size
    return {"name": name, "dtype": dtype, "shape": list(shape), "bytes": claimed, "storage": storage}


def record_faults(listing: Listing) -> list[str]:
    """Tensors of a zip whose storage is missing or too small for what they claim, one line each."""
    if listing.records is None:
        return []
    faults = []
    for row in listing.tensors:
        held = listing.records.get(row["storage"] or "")
        if row["storage"] is not None and held is None:
            faults.append(f"'{shown(row['name'])}': its storage {shown(row['storage'])} is not in the file")
        elif held is not None and (row["bytes"] or 0) > held:
            faults.append(f"'{shown(row['name'])}' claims {row['bytes']} bytes, its storage holds {held}")
    return faults


def check_pickle(path: Path) -> None:
    """`InputError` when a record of the zip does not have its checksum; a file that is no zip has none."""
    if not zipfile.is_zipfile(path):
        return
    with open_zip(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path}: record '{shown(damaged)}' does not have its checksum; copy the file again")
