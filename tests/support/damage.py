"""Damage of the kinds that files have: JSON, safetensors, pickles, zips, npy, TOML and bytes, drawn from a seed."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# What a JSON value is replaced by: other types, huge and negative numbers, names that are paths, escapes or markup.
HOSTILE: list[Any] = [
    None, True, [], {}, "",
    0, -1, 2**63, 2**63 - 1, 2**31, 10**400, 1e308, [[]], {"a": {}}, [None] * 3, [0], [{}], "../../etc/passwd",
    ".", "..", "a\x00b", "\x1b[31mred", "</script><b>", "\u202eevil", "\u2028next", "\x9b31m", "two\nlines",
    "x" * 5000, "float128", "F8_E4M3", -0.0, "NaN", float("nan"), float("inf"), "attacker/huge-model", "\ud800",
    "/dev/stdin", "/dev/zero", "[bold]x[/]", "=cmd", "(a+)+$", [1] * 100, {"": ""},
]  # fmt: skip
SIZES = (0, 1, 2, 3, 31, 2**16, 2**31, 2**40, 2**62)


def deep(depth: int = 300) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def node(value: Any, pick: random.Random) -> tuple[Any, Any]:
    """A container somewhere inside `value`, and a key of it."""
    here = value
    while True:
        keys: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = pick.choice(keys)
        if not isinstance(here[key], dict | list) or not here[key] or pick.random() < 0.3:
            return here, key
        here = here[key]


def hostile(old: Any, pick: random.Random) -> Any:
    """Something in the place of `old`: often of its own type, and wrong in a small way."""
    kind = pick.randrange(6)
    if kind == 0:
        return deep(pick.choice([30, 60, 300]))
    if kind == 1 and isinstance(old, int) and not isinstance(old, bool):
        return pick.choice([old + 1, old - 1, -old, old * 2 ** pick.randrange(1, 60), float(old), str(old), [old]])
    if kind == 2 and isinstance(old, list) and old:
        return pick.choice(
            [old[:-1], old * 2, old[::-1], [old], [*old, old[0]], [0 if isinstance(x, int) else None for x in old]]
        )
    if kind == 2 and isinstance(old, str) and old:
        return pick.choice([old[:-1], old + "x", old.upper(), old * 500, old[::-1], [old]])
    return pick.choice(HOSTILE)


def damaged_json(text: bytes, pick: random.Random) -> bytes:
    """One to three values replaced, removed, renamed or given twice."""
    value = json.loads(text)
    for _ in range(pick.choice([1, 1, 1, 2, 3])):
        if not value:
            return b"[]"
        here, key = node(value, pick)
        kind = pick.randrange(5)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[pick.choice([h for h in HOSTILE if isinstance(h, str)])] = here.pop(key)
        elif kind == 2 and isinstance(here, dict):
            twice = json.dumps(here)
            return json.dumps(value).replace(twice, twice[:-1] + f", {json.dumps(key)}: 1}}", 1).encode()
        else:
            here[key] = hostile(here[key], pick)
    return json.dumps(value).encode()


def damaged_header(data: bytes, pick: random.Random) -> bytes:
    """A safetensors file with a damaged header, of the right length or not."""
    size = int.from_bytes(data[:8], "little")
    header = damaged_json(data[8 : 8 + size], pick)
    length = pick.choice([len(header)] * 8 + [2**63, 2**64 - 1, 0, len(header) + 1, len(data) * 2])
    return length.to_bytes(8, "little") + header + data[8 + size :]


def relabelled(data: bytes, pick: random.Random) -> bytes:
    """A sound safetensors file in which one tensor has another shape, dtype, content, or claims a size beside a 0."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    tensors = {
        k: (v["dtype"], v["shape"], data[8 + size :][slice(*v["data_offsets"])])
        for k, v in header.items()
        if k[0] != "_"
    }
    name = pick.choice(list(tensors))
    dtype, shape, raw = tensors[name]
    width = len(raw) // max(1, int(np.prod(shape)))
    dtype, shape, raw = pick.choice(
        [
            (dtype, [], raw[:width]),
            (dtype, [1] * 70, raw[:width]),
            (dtype, [*shape, 1], raw),
            (dtype, [1, *shape], raw),
            (dtype, [len(raw) // width], raw),
            (dtype, shape[::-1], raw),
            (dtype, [0, *shape[1:]], b""),
            (dtype, [pick.choice(SIZES) for _ in range(pick.randrange(1, 4))] + [0], b""),
            (dtype, [*shape[:-1], *(n // 2 for n in shape[-1:])], raw[: len(raw) // 2])
            if shape and not shape[-1] % 2
            else (dtype, [0], b""),
            ("U8", [len(raw)], raw),
            ("I64", [len(raw) // 8], raw[: len(raw) // 8 * 8]),
            ("BOOL", [len(raw)], raw),
            (dtype, shape, bytes(len(raw))),
            (dtype, shape, b"\xff" * len(raw)),
            (dtype, shape, b"\x7f\x7f" * (len(raw) // 2) + raw[len(raw) // 2 * 2 :]),
            (dtype, shape, pick.randbytes(len(raw))),
        ]
    )
    tensors[name] = (dtype, shape, raw)
    if pick.random() < 0.1:
        tensors[pick.choice([h for h in HOSTILE if isinstance(h, str) and h.isprintable()])] = tensors.pop(name)
    entries, body = {}, b""
    for key, (kind, sizes, raw) in tensors.items():
        entries[key] = {"dtype": kind, "shape": sizes, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + body


def damaged_bytes(data: bytes, pick: random.Random) -> bytes:
    """Bytes cut, flipped, put in, or replaced by a Git LFS pointer."""
    at = pick.randrange(len(data) + 1)
    kind = pick.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([pick.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + pick.randbytes(pick.randrange(1, 64)) + data[at:]
    if kind == 3:
        return data[:at] + struct.pack("<Q", pick.choice(SIZES)) + data[at + 8 :]
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def damaged_zip(data: bytes, pick: random.Random) -> bytes:
    """A zip with a record damaged, missing, packed, twice, named oddly, or with another pickle; bytes that are none."""
    if not data.startswith(b"PK"):
        return damaged_bytes(data, pick)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = pick.randrange(len(records))
    name, content = records[at]
    kind = pick.randrange(6)
    if kind == 0:
        del records[at]
    elif kind == 1:
        records[at] = (name, damaged_bytes(content, pick))
    elif kind == 2:
        records.append((pick.choice([h for h in HOSTILE if isinstance(h, str) and h.isprintable()]) or "x", content))
    elif kind == 3:
        records.append(records[at])
    else:
        records = [(n, pickled(pick) if n.endswith("data.pkl") else c) for n, c in records]
    out = io.BytesIO()
    method = pick.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, content in records:
            archive.writestr(name, content)
    return out.getvalue()


def pickled(pick: random.Random) -> bytes:
    """A pickle of odd opcodes or of hostile values; nothing in it does harm even where it is run."""
    kind = pick.randrange(5)
    if kind == 0:
        return b"\x80\x02" + bytes(
            pick.choice(b"(N.]}0)1tlqrsuebaRQ2cXU\x85\x86\x87\x94\x93\x8c\x81\x92") for _ in range(200)
        )
    if kind == 1:
        return b"\x80\x02c" + b"a" * pick.choice([10, 5000, 10**6]) + b"\nb\n)R."
    if kind == 2:
        return bomb(pick.choice([3, 30]), pick.choice([b"]", b"}"]))
    if kind == 3:
        return pickle.dumps({h: h for h in HOSTILE if isinstance(h, str | int)}, 2)
    return pickle.dumps([deep(100), *HOSTILE], pick.choice([0, 1, 2, 4]))


def bomb(levels: int, kind: bytes) -> bytes:
    """Ten times the one before in each: lists, or dicts, that unfold to 10 ** `levels`."""
    text = b"\x80\x02" + kind + b"q\x00"
    for level in range(levels):
        text += kind + b"(" if kind == b"]" else b"}("
        for i in range(10):
            text += (b"" if kind == b"]" else b"X\x01\x00\x00\x00" + b"%d" % i) + b"h" + bytes([level])
        text += (b"e" if kind == b"]" else b"u") + b"q" + bytes([level + 1])
    return text + b"."


def damaged_npy(data: bytes, pick: random.Random) -> bytes:
    """A .npy file whose header says something else."""
    length = int.from_bytes(data[8:10], "little")
    body = data[10 + length :]
    quarter, eighth = len(body) // 4, len(body) // 8
    header = pick.choice(
        [
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({pick.choice(SIZES)},), }}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
            f"{{'descr': '<f4', 'fortran_order': True, 'shape': (2, {eighth}), }}",
            f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({eighth},), }}",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
            f"{{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ({quarter},), }}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
            "(" * 3000 + ")" * 3000,
            "{'descr': 'x', 'fortran_order': 3, 'shape': 'y', }",
            "__import__('os').getcwd()",
        ]
    ).encode()
    version = pick.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version[0] == 1 else 4, "little") + header + body


def damaged_toml(data: bytes, pick: random.Random) -> bytes:
    """Settings of another type, of no option, deep, or no TOML."""
    value = pick.choice(
        ['"x"', "1", "-1", "true", "[1]", "{a = 1}", "1e400", "inf", '"\\u202e\\u001b[31m"', '"a/b"', "[[" * 500]
    )
    name = pick.choice(
        [
            "device",
            "json",
            "top",
            "layers",
            "model",
            "quiet",
            "top-k",
            '"\\u001b[31m"',
            "forward",
            "inspect.json",
            "debug",
            "a" * 3000,
        ]
    )
    return pick.choice([b"", data]) + f"{name} = {value}\n".encode()


def gguf_fields(data: bytes) -> list[tuple[int, int, str]]:
    """Where the numbers and texts of a sound GGUF header lie: offset, bytes, and what: `count`, `length`, `type`, ...

    The header is written by `gguf.GGUFWriter`, and walked as its specification says.
    """
    fields = [(4, 4, "version"), (8, 8, "count"), (16, 8, "count")]
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at = 24

    def add(size: int, what: str) -> int:
        nonlocal at
        fields.append((at, size, what))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text(what: str) -> None:
        add(add(8, "length"), what)

    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    for _ in range(pairs):
        text("key")
        kind = add(4, "type")
        if kind == 9:
            of, count = add(4, "type"), add(8, "length")
            for _ in range(count):
                text("text") if of == 8 else add(widths[of], "value")
        elif kind == 8:
            text("text")
        else:
            add(widths[kind], "value")
    for _ in range(tensors):
        text("name")
        for _ in range(add(4, "axes")):
            add(8, "size")
        add(4, "type")
        add(8, "offset")
    return fields


def damaged_gguf(data: bytes, pick: random.Random) -> bytes:
    """A GGUF file with one to three numbers or texts of its header replaced, or two of one kind swapped."""
    changed, fields = bytearray(data), gguf_fields(data)
    for _ in range(pick.choice([1, 1, 1, 2, 3])):
        what = pick.choice(sorted({kind for _, _, kind in fields}))
        at, size, _ = pick.choice([f for f in fields if f[2] == what])
        if what in ("key", "name", "text"):
            same = [f for f in fields if f[2] == what and f[1] == size]
            other, _, _ = pick.choice(same)
            new = [
                bytes(changed[other : other + size]),
                pick.randbytes(size),
                b"\x1b" * size,
                b"/" * size,
                b"\0" * size,
            ]
        else:
            old = int.from_bytes(changed[at : at + size], "little")
            numbers = [old + 1, old - 1, 2 * old, old * 2**32, 0, *range(45), *SIZES, 2**63, 2**64 - 1, 3, 2**31 + 1]
            new = [(pick.choice(numbers) % 2 ** (8 * size)).to_bytes(size, "little"), pick.randbytes(size)]
        changed[at : at + size] = pick.choice(new)
    return bytes(changed)


WAYS: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    ".json": [damaged_json] * 4 + [damaged_bytes],
    ".safetensors": [damaged_header] * 2 + [relabelled] * 3 + [damaged_bytes],
    ".gguf": [damaged_gguf] * 4 + [damaged_bytes],
    ".pt": [damaged_zip] * 3 + [damaged_bytes, lambda _, pick: pickled(pick)],
    ".npy": [damaged_npy] * 3 + [damaged_bytes],
    ".toml": [damaged_toml] * 3 + [damaged_bytes],
}


def damage(path: Path, pick: random.Random) -> None:
    """Damage a file in a way of its kind."""
    data = path.read_bytes()
    path.unlink()  # the good one may be a hard link's other name
    path.write_bytes(pick.choice(WAYS.get(path.suffix, [damaged_bytes]))(data, pick))


def rehash(folder: Path) -> None:
    """Make a dump's manifest say what its files now hold, where it is still a manifest: damage that nobody admits."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8 : 8 + size]).items():
            if key in manifest["tensors"]:
                digest = hashlib.sha256(data[8 + size :][slice(*entry["data_offsets"])]).hexdigest()
                names = {
                    "F32": "float32",
                    "BF16": "bfloat16",
                    "I64": "int64",
                    "U8": "uint8",
                    "BOOL": "bool",
                    "F16": "float16",
                }
                manifest["tensors"][key] |= {"dtype": names[entry["dtype"]], "shape": entry["shape"], "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
