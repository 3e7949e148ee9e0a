"""Files made to take time, memory or the network: each is refused in one line, within limits, by every reader of it."""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confined import MEMORY, SECONDS, Confined, Ended
from damage import bomb
from forward_models import MODELS
from gguf_files import write_gguf
from helpers import some, svf, with_json

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    with Confined() as server:
        yield server


def refused(done: Ended, *words: str, codes: tuple[int, ...] = (3,)) -> None:
    """One line, one of `codes`, little time and memory, and nobody was asked."""
    assert done.code in codes, done
    (line,) = done.err.splitlines()
    assert line.startswith("svf: ")
    assert line.isprintable()
    for word in words:
        assert word in line
    assert done.seconds < SECONDS * 0.75
    assert done.memory < MEMORY
    assert done.asked == []


# Pickles.


def zipped(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")


def laughing_key(path: Path) -> None:
    """A dict whose key is a tuple of tuples: to hash it is to walk it."""
    text = b"\x80\x02}q\x7f)q\x00"
    for level in range(60):
        text += b"(" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"tq" + bytes([level + 1])
    zipped(path, text + b"K\x01s.")


def overlapping(path: Path) -> None:
    """600 records that are one: 1 GB each, by the directory, over the same bytes of a file of 100 KB."""
    zipped(path, bytes(100_000))
    data = path.read_bytes()
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = bytearray(data[at : at + 46 + len("archive/data.pkl")])
    entry[20:28] = struct.pack("<II", 10**9, 10**9)
    names = [b"archive/data/%03d" % i for i in range(600)]
    entries = [bytes(entry[:28]) + struct.pack("<H", len(n)) + bytes(entry[30:46]) + n for n in names]
    body = data[at:end] + b"".join(entries)
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 602, 602, len(body), at, 0)
    path.write_bytes(data[:at] + body + tail)


def directory(path: Path) -> None:
    """A directory of a million records without bytes."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"x"
    body = entry * 1_000_000
    zip64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, len(body), 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(body), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(b"PK\x03\x04" + body + zip64 + locator + end)


LONG = 10**7
PICKLES: dict[str, Callable[[Path], object]] = {
    "lists in lists": lambda path: zipped(path, bomb(60, b"]")),
    "dicts in dicts": lambda path: zipped(path, bomb(60, b"}")),
    "dicts in dicts, old format": lambda path: path.write_bytes(bomb(60, b"}")),
    "a key of tuples in tuples": laughing_key,
    "a name of 50 MB": lambda path: zipped(path, b"\x80\x02c" + b"a" * 50_000_000 + b"\nb\n)R."),
    "a name of 50 MB, old format": lambda path: path.write_bytes(b"\x80\x02c" + b"a" * 50_000_000 + b"\nb\n)R."),
    "names joined again and again": lambda path: zipped(
        path, b"\x80\x04\x8d" + LONG.to_bytes(8, "little") + b"a" * LONG + b"\x94" + b"h\x00h\x00\x93" * 10**5 + b"."
    ),
    "opcodes without an end": lambda path: zipped(path, b"\x80\x02" + b"]" * 50_000_000 + b"."),
    "a packed data.pkl": lambda path: zipped(path, bytes(10**9), zipfile.ZIP_DEFLATED),
    "records over each other": overlapping,
    "a directory of a million records": directory,
}  # fmt: skip


# These take the longest to make or to list.
LONG_ONES = ("a name of 50 MB", "a name of 50 MB, old format", "opcodes without an end", "a packed data.pkl")


@pytest.mark.parametrize("kind", some(PICKLES, {*PICKLES}.difference(LONG_ONES)))
def test_a_pickle_that_unfolds(kind: str, confined: Confined, tmp_path: Path) -> None:
    """Listing it is quick (0, and 3 from verify, where nothing grows while it is listed) or refused."""
    path = tmp_path / "w.pt"
    PICKLES[kind](path)
    for words in (("inspect", path), ("inspect", path, "--json"), ("verify", path)):
        done = confined.run(*words)
        if done.code == 0 or (words[0] == "verify" and not done.err):
            assert done.seconds < SECONDS * 0.75, words
            assert done.memory < MEMORY
        else:
            refused(done, str(path))
    refused(confined.run("convert", path, tmp_path / "out"), str(path), codes=(3, 7))
    assert not (tmp_path / "out").exists()


# Tokenizers.


def with_tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: with_json(folder / "tokenizer.json", change)


def grow(content: str, times: int) -> Callable[[dict[str, Any]], object]:
    """Every character becomes `content`, again and again."""
    step = {"type": "Replace", "pattern": {"Regex": "."}, "content": content}
    return lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [step] * times})


CATASTROPHE = {"type": "Split", "pattern": {"Regex": "(?:a|aa|aaa)+b"}, "behavior": "Isolated", "invert": False}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "ab" * 50_000_000}] * 8}
TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "a pattern that tries everything": with_tokenizer(lambda t: t.update(pre_tokenizer=CATASTROPHE)),
    "a text put before, 800 MB in all": with_tokenizer(lambda t: t.update(normalizer=PREPEND)),
    "a replacement that grows": with_tokenizer(grow("aaaaaaaaaa", 9)),
    "more tokens than text": with_tokenizer(grow("aaaaaaaaaa", 4)),
    "another type": with_tokenizer(lambda t: t.update(model=[])),
    "no JSON": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe{"),
}


@pytest.mark.parametrize("kind", some(TOKENIZERS, {*TOKENIZERS} - {"a text put before, 800 MB in all"}))
def test_a_tokenizer_that_grows_or_hangs(kind: str, model: Path, confined: Confined, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    TOKENIZERS[kind](folder)
    done = confined.run("forward", folder, "--prompt", "a" * 200, "--backend", "reference", "--layers", "0")
    refused(done, str(folder), codes=(3, 7))


def test_a_good_tokenizer_gives_the_ids_of_the_library(model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from stages.files.tokens import encode

    prompt = "Grüße, \u4f60\u597d 123"
    assert encode(prompt, model).tolist() == Tokenizer.from_file(str(model / "tokenizer.json")).encode(prompt).ids


# JSON.

DOCUMENTS = {
    "nested 900 deep": b'{"schema": ' + b"[" * 900 + b"]" * 900 + b"}",
    "nested 100,000 deep": b"[" * 100_000,
    "10 million lists": b'{"schema": [' + b"[]," * 10_000_000 + b"[]]}",
    "half of a surrogate pair": b'{"schema": "\\ud800"}',
    "half of a surrogate pair, a key": b'{"\\uDC00": 1}',
    "a number of 1 MB": b'{"schema": ' + b"1" * 10**6 + b"}",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_document_that_is_no_document(kind: str, confined: Confined, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(DOCUMENTS[kind])
    for words in (("inspect", path), ("report", path, "--html", tmp_path / "x.html"), ("diff", path, path)):
        refused(confined.run(*words), str(path))
    header = len(DOCUMENTS[kind]).to_bytes(8, "little") + DOCUMENTS[kind]
    (tmp_path / "x.safetensors").write_bytes(header)
    refused(confined.run("inspect", tmp_path / "x.safetensors"), "x.safetensors")


# Names that files record.


@pytest.fixture(scope="module")
def traces(model: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A forward dump `trace` of its own model, and a replay dump `dump`."""
    at = tmp_path_factory.mktemp("recorded")
    shutil.copytree(model, at / "model")
    words = (
        "forward",
        at / "model",
        "--tokens",
        "1,2",
        "--backend",
        "reference",
        "--layers",
        "0",
        "--dtype",
        "float32",
    )
    assert svf(*words, "--out", at / "trace").code == 0
    assert svf("replay", made / "sample", "--backend", "reference", "--out", at / "dump").code == 0
    return at


RECORDED = ["attacker/huge-model", "attacker/huge-model@main", "/dev/zero", "{fifo}", "../../../etc", "", "a\x00b", "~"]
# A repository of a hub, what blocks its reader, a path that leaves the folder.
FEW = ("attacker/huge-model@main", "{fifo}", "../../../etc")


@pytest.mark.parametrize("name", some(RECORDED, FEW))
def test_a_recorded_model_is_looked_for_on_this_disk_alone(
    name: str, traces: Path, confined: Confined, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    dump = Path(shutil.copytree(traces / "trace", tmp_path / "trace"))
    source = name.format(fifo=tmp_path / "fifo")
    with_json(dump / "manifest.json", lambda m: m["model"].update(source=source))
    for words in (
        ("diff", dump, dump),
        ("audit", dump),
        ("infer", dump),
        ("verify", dump),
        ("inspect", dump),
        ("stats", dump),
    ):
        done = confined.run(*words)
        assert done.code in (0, 3, 5), done
        assert done.asked == []
        if words[0] == "audit":  # of equal bytes a diff needs no model
            assert done.code == 5
            assert "give --model" in done.out
    given = confined.run("audit", dump, "--model", traces / "model")
    assert given.asked == []
    assert "give --model" not in given.out


def test_a_model_that_the_user_names_is_asked_for(traces: Path, confined: Confined) -> None:
    """The twin of the test above: its listener hears the hub's client."""
    done = confined.run("audit", traces / "trace", "--model", "somebody/some-model")
    assert done.code == 4
    assert any("/api/models/somebody/some-model" in line for line in done.asked)


@pytest.mark.parametrize("name", some(RECORDED, FEW))
def test_recorded_components_are_looked_for_on_this_disk_alone(
    name: str, traces: Path, confined: Confined, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    dump = Path(shutil.copytree(traces / "dump", tmp_path / "dump"))
    with_json(dump / "manifest.json", lambda m: m.update(components=name.format(fifo=tmp_path / "fifo"), model=name))
    for words in (("diff", dump, dump), ("audit", dump), ("infer", dump), ("verify", dump), ("inspect", dump)):
        done = confined.run(*words)
        assert done.code in (0, 3, 5), done
        assert done.asked == []


FILE_NAMES = [
    "\x1b[31mlayer.safetensors", "a\nb", "\u202eevil", "\x9b", "a\u2028b", "../trace/model.safetensors", "/etc/passwd",
    "sub/model.safetensors", "..", ".", "", "C:\\x", "model.safetensors\x00", "-rf", ".hidden", "missing.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_manifest_names_plain_files_of_its_folder(
    name: str, traces: Path, confined: Confined, tmp_path: Path
) -> None:
    dump = Path(shutil.copytree(traces / "trace", tmp_path / "trace"))
    with_json(dump / "manifest.json", lambda m: m["tensors"]["layers.0.ffn_up"].update(file=name))
    for words in (("diff", dump, traces / "trace"), ("audit", dump), ("inspect", dump, "--json"), ("stats", dump)):
        refused(confined.run(*words), "manifest.json")
    verified = confined.run("verify", dump)
    assert verified.code == 3
    assert all(line.isprintable() for line in verified.out.splitlines())


DROPPED = ("kind", "schema", "tensors", "tokens", "model")


@pytest.mark.parametrize("field", DROPPED)
def test_a_manifest_without_a_field_is_malformed(field: str, traces: Path, confined: Confined, tmp_path: Path) -> None:
    dump = Path(shutil.copytree(traces / "trace", tmp_path / "trace"))
    with_json(dump / "manifest.json", lambda m: m.pop(field))
    for words in (
        ("diff", dump, traces / "trace"),
        ("diff", traces / "trace", dump),
        ("audit", dump),
        ("inspect", dump),
    ):
        refused(confined.run(*words), field)


# What is no regular file.


def put(kind: str, path: Path) -> Path:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        path.symlink_to("/proc/self/fd/0")
    else:
        path.mkdir()
    return path


ODD = ("fifo", "zero", "socket", "folder")
ODD_NAMES = ("x.safetensors", "x.json", "x.npy", "x.pt", "x.bin", "x.gguf")


@pytest.mark.cover(1)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("command", ["inspect {0}", "verify {0}", "audit {0}", "diff {0} {0}", "stats {0}"])
def test_what_is_no_regular_file_is_neither_waited_for_nor_read(
    kind: str, name: str, command: str, confined: Confined, tmp_path: Path
) -> None:
    words = command.format(put(kind, tmp_path / name)).split()
    refused(confined.run(*words), codes=(2, 3, 4, 5))


@pytest.mark.cover(1)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "command",
    [
        "convert {at}/x.pt {at}/out",
        "decompose {model} --layers 2 --vector {at}/x.npy --out {at}/out",
        "decompose {model} --layers 2 --vector {at}/x.safetensors --out {at}/out",
        "forward {model} --tokens-file {at}/x.json --backend reference",
        "route {model} --head {at}/x.safetensors --tokens 1,2 --backend reference",
        "report {at}/x.json --html {at}/page.html",
        "forward {at}/x.gguf --tokens 1 --backend reference",
    ],
)
def test_nor_where_it_is_one_file_of_several(
    kind: str, command: str, model: Path, confined: Confined, tmp_path: Path
) -> None:
    for name in ODD_NAMES:
        put(kind, tmp_path / name)
    refused(confined.run(*command.format(at=tmp_path, model=model).split()), codes=(3, 4))


@pytest.mark.cover(1)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trinity_svf_components.safetensors"])
def test_nor_inside_a_folder(kind: str, name: str, model: Path, made: Path, confined: Confined, tmp_path: Path) -> None:
    source = made / "sample" if name.startswith("trinity") else model
    folder = Path(shutil.copytree(source, tmp_path / "folder"))
    put(kind, folder / name)
    refused(confined.run("inspect", folder), codes=(3, 4))


def test_a_file_longer_than_it_says_is_read_to_its_limit(tmp_path: Path) -> None:
    from stages.errors import InputError
    from stages.files.jsonio import read_bytes

    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(InputError, match="larger than the 100 bytes"):
        read_bytes("/proc/self/status", 100)


# GGUF.


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf_file(
    pairs: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0), version: int = 3, data: int = 0
) -> bytes:
    """A header with so many tensors and keys, by its counts, and `data` bytes of zeros behind it."""
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + pairs + tensors
    return head + bytes(-len(head) % 32 + data)


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


MANY = 2**62
ALIGNED = b"general.alignment"
GGUFS: dict[str, bytes] = {
    "a count of tensors": gguf_file(counts=(MANY, 0)),
    "a count of keys": gguf_file(counts=(0, MANY)),
    "as many tensors as bytes could hold": gguf_file(counts=(70_000, 0), data=24 * 70_000),
    "the length of a key": gguf_file(struct.pack("<Q", MANY), counts=(0, 1), data=64),
    "the length of a text": gguf_file(key(b"a", 8, struct.pack("<Q", MANY)), counts=(0, 1), data=64),
    "the length of an array": gguf_file(key(b"a", 9, struct.pack("<IQ", 4, MANY)), counts=(0, 1), data=64),
    "the length of an array of texts": gguf_file(key(b"a", 9, struct.pack("<IQ", 8, MANY)), counts=(0, 1), data=64),
    "an array of 5 million empty texts": gguf_file(
        key(b"a", 9, struct.pack("<IQ", 8, 5_000_000)) + bytes(40_000_000), counts=(0, 1)
    ),
    "arrays in arrays": gguf_file(key(b"a", 9, struct.pack("<IQ", 9, 1) * 30_000), counts=(0, 1)),
    "a type of a value": gguf_file(key(b"a", 77, bytes(8)), counts=(0, 1)),
    "a bool of 2": gguf_file(key(b"a", 7, b"\2"), counts=(0, 1)),
    "a key twice": gguf_file(key(b"a", 0, b"\1") * 2, counts=(0, 2)),
    "a key that is no text": gguf_file(key(b"\xff\xfe", 0, b"\1"), counts=(0, 1)),
    "an alignment of 0": gguf_file(key(ALIGNED, 4, struct.pack("<I", 0)), counts=(0, 1)),
    "an alignment of 24": gguf_file(key(ALIGNED, 4, struct.pack("<I", 24)), counts=(0, 1)),
    "an alignment of 2^31": gguf_file(
        key(ALIGNED, 4, struct.pack("<I", 2**31)), entry(b"x", (8,)), counts=(1, 1), data=64
    ),
    "an alignment that is a text": gguf_file(key(ALIGNED, 8, text(b"32")), counts=(0, 1)),
    "no axes": gguf_file(tensors=entry(b"x", ()), counts=(1, 0), data=64),
    "a billion axes": gguf_file(tensors=text(b"x") + struct.pack("<I", 10**9), counts=(1, 0), data=64),
    "an axis of 0": gguf_file(tensors=entry(b"x", (8, 0)), counts=(1, 0), data=64),
    "axes of 2^32": gguf_file(tensors=entry(b"x", (2**32, 2**32)), counts=(1, 0), data=64),
    "a row of 2^40 ternaries": gguf_file(tensors=entry(b"x", (2**40,), 34), counts=(1, 0), data=64),
    "axes whose product is 2^64": gguf_file(tensors=entry(b"x", (2**20, 2**22, 2**22)), counts=(1, 0), data=64),
    "half a block": gguf_file(tensors=entry(b"x", (16,), 2), counts=(1, 0), data=64),
    "a type of a tensor": gguf_file(tensors=entry(b"x", (32,), 4), counts=(1, 0), data=64),
    "an offset beyond the file": gguf_file(tensors=entry(b"x", (8,), 0, 2**63), counts=(1, 0), data=64),
    "an offset that is not aligned": gguf_file(tensors=entry(b"x", (8,), 0, 8), counts=(1, 0), data=64),
    "tensors that overlap": gguf_file(tensors=entry(b"x", (8,)) + entry(b"y", (8,)), counts=(2, 0), data=64),
    "a hole": gguf_file(tensors=entry(b"x", (8,)) + entry(b"y", (8,), 0, 64), counts=(2, 0), data=96),
    "a tensor twice": gguf_file(tensors=entry(b"x", (8,)) + entry(b"x", (8,), 0, 32), counts=(2, 0), data=64),
    "bytes behind the last": gguf_file(tensors=entry(b"x", (8,)), counts=(1, 0), data=4096),
    "no bytes of a tensor": gguf_file(tensors=entry(b"x", (8,)), counts=(1, 0)),
    "version 1": gguf_file(version=1),
    "the other byte order": gguf_file(version=3 << 24),
    "nothing but the magic": b"GGUF",
    "nothing at all": gguf_file(),
}


@pytest.mark.parametrize("kind", some(GGUFS, [*GGUFS][::3]))
def test_a_gguf_header_is_compared_with_its_file(kind: str, confined: Confined, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFS[kind])
    reading = ("forward", path, "--tokens", "1", "--backend", "reference")
    refused(confined.run(*reading), "m.gguf", codes=(3,))
    whole = {"nothing at all"}  # a header without keys is one, only no model's
    assert confined.run("inspect", path).code == (0 if kind in whole else 3)
    assert confined.run("verify", path).code == 3


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda said: said.pop(name)


def saying(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda said: said.update({f"llama.{name.replace('__', '.')}": value for name, value in changes.items()})


# What metadata may not say, and the word by which the refusal names it.
SAID: dict[str, Callable[[dict[str, Any]], object]] = {
    **{
        f"llama.{name}": without(f"llama.{name}")
        for name in (
            "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
            "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base",
        )
    },
    "missing tensors": saying(block_count=4096),
    "block_count: expected": saying(block_count=2**31),
    "head_count: expected": saying(attention__head_count=0),
    "head_count_kv: expected": saying(attention__head_count_kv=[1, 2]),
    "layer_norm_rms_epsilon": saying(attention__layer_norm_rms_epsilon=float("nan")),
    "freq_base": saying(rope__freq_base=float("inf")),
    "vocab_size: 7 contradicts": saying(vocab_size=7),
    "tokenizer.ggml.tokens: 9 contradicts": lambda said: said.update({"tokenizer.ggml.tokens": ["a"] * 9}),
    "value_length": saying(attention__value_length=8),
    "dimension_count": saying(rope__dimension_count=8),
    "wrong shapes": saying(feed_forward_length=32),
    "expert_count": saying(expert_count=8),
    "causal": saying(attention__causal=False),
    "sliding_window": saying(attention__sliding_window=4),
    "logit_scale": saying(logit_scale=2.0),
    "scaling.type": saying(rope__scaling__type="longrope"),
    "scaling.factor": saying(rope__scaling__type="linear"),
    "original_context_length": saying(rope__scaling__type="yarn", rope__scaling__factor=4.0),
    "split.count": lambda said: said.update({"split.count": 3}),
    "general.type": lambda said: said.update({"general.type": "adapter"}),
    "general.architecture": lambda said: said.update({"general.architecture": "gpt2"}),
}  # fmt: skip


@pytest.mark.parametrize("word", SAID)
def test_metadata_is_obeyed_or_refused_by_its_key(word: str, confined: Confined, tmp_path: Path) -> None:
    small = replace(MODELS["llama"], hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64, vocab=40)
    path = write_gguf(tmp_path / "m.gguf", small, edit=SAID[word])
    refused(confined.run("forward", path, "--tokens", "1", "--backend", "reference"), "m.gguf", word)
