"""Damaged and hostile files: every command that reads them ends with a documented code and one printable line."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from helpers import Result, svf
from hypothesis import strategies as st

pytestmark = pytest.mark.faults

# What a JSON value is replaced by: other types, huge and negative numbers, names that are paths, escapes or markup.
HOSTILE: list[Any] = [
    None, True, [], {}, "",
    0, -1, 2**63, 2**63 - 1, 1e308, [[]], {"a": {}}, [None] * 3, "../../etc/passwd", "/dev/zero",
    "a\x00b", "\x1b[31mred", "</script><b>", "\u202eevil", "[bold]x[/]", "x" * 5000, "float128", "F8_E4M3", -0.0, "NaN",
]  # fmt: skip
# Seconds that no command over a file of some kilobytes may take, even on a machine under load.
TOO_LONG = 30.0


@dataclass(frozen=True)
class Target:
    """A good artifact, the files of it that are damaged, and the command that reads it (@ stands for its place)."""

    source: Path
    files: tuple[str, ...]
    command: tuple[str, ...]


@pytest.fixture(scope="session")
def targets(made: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """One of each kind of file that this project reads."""
    folder = tmp_path_factory.mktemp("targets")
    bundle, dump, trace, tree = (folder / name for name in ("bundle", "dump", "trace", "tree"))
    shutil.copytree(made / "sample", bundle)
    forward = ("forward", model, "--tokens", "1,2", "--backend", "reference", "--layers", "0")
    for words in (
        ("replay", bundle, "--backend", "reference", "--out", dump),
        (*forward, "--out", trace),
        (*forward, "--format", "aprt", "--out", tree),
    ):
        assert svf(*words).code == 0
    report = folder / "report"
    report.mkdir()
    shutil.copy(made / "sample.json", report / "report.json")
    names = {d: tuple(str(p.relative_to(d)) for p in sorted(d.rglob("*")) if p.is_file()) for d in folder.iterdir()}
    weights = ("config.json", "model.safetensors", "tokenizer.json")
    return {
        "bundle": Target(bundle, names[bundle], ("layouts", "@")),
        "replay dump": Target(dump, names[dump], ("audit", "@")),
        "forward dump": Target(trace, names[trace], ("diff", "@", str(trace))),
        "forward dump, audited": Target(trace, names[trace], ("audit", "@")),
        "APRT tree": Target(tree, names[tree], ("diff", "@", str(tree))),
        "report": Target(report, names[report], ("diff", "@/report.json", str(report / "report.json"))),
        "checkpoint": Target(
            model,
            weights,
            (*("forward", "@", "--prompt", "a", "--backend", "reference"), *("--layers", "0", "--stages", "embedding")),
        ),
    }


def node(value: Any, pick: random.Random) -> tuple[Any, Any]:
    """A container somewhere inside `value`, and a key of it."""
    here = value
    while True:
        keys: list[Any] = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = pick.choice(keys)
        if not isinstance(here[key], dict | list) or not here[key] or pick.random() < 0.3:
            return here, key
        here = here[key]


def damaged_json(text: bytes, pick: random.Random) -> bytes:
    """One value replaced, removed or given twice."""
    value = json.loads(text)
    if not value:
        return b"[]"
    here, key = node(value, pick)
    kind = pick.randrange(4)
    if kind == 0:
        del here[key]
    elif kind == 1 and isinstance(here, dict):
        here[pick.choice([h for h in HOSTILE if isinstance(h, str)])] = here.pop(key)
    elif kind == 2 and isinstance(here, dict):
        twice = json.dumps(here)
        return json.dumps(value).replace(twice, twice[:-1] + f", {json.dumps(key)}: 1}}", 1).encode()
    else:
        here[key] = pick.choice(HOSTILE)
    return json.dumps(value).encode()


def damaged_header(data: bytes, pick: random.Random) -> bytes:
    """A safetensors file with a damaged header, of the right length or not."""
    size = int.from_bytes(data[:8], "little")
    header = damaged_json(data[8 : 8 + size], pick)
    length = pick.choice([len(header)] * 8 + [2**63, 2**64 - 1, 0, len(header) + 1, len(data) * 2])
    return length.to_bytes(8, "little") + header + data[8 + size :]


def damaged_bytes(data: bytes, pick: random.Random) -> bytes:
    """Bytes cut, flipped, put in, or replaced by a Git LFS pointer."""
    at = pick.randrange(len(data) + 1)
    kind = pick.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([pick.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + pick.randbytes(pick.randrange(1, 64)) + data[at:]
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def damage(path: Path, pick: random.Random) -> None:
    """Damage a file in a way of its kind."""
    data = path.read_bytes()
    ways: list[Callable[[bytes, random.Random], bytes]] = [damaged_bytes]
    ways += [damaged_json] * 3 if path.suffix == ".json" else []
    ways += [damaged_header] * 3 if path.suffix == ".safetensors" else []
    path.unlink()  # the good one may be a hard link's other name
    path.write_bytes(pick.choice(ways)(data, pick))


def ends_well(done: Result) -> None:
    """A documented code that is not an internal error; on stderr nothing but printable lines of svf's own."""
    assert done.code in (0, 1, 2, 3, 4, 5, 7), done.err
    assert "Traceback" not in done.err + done.out
    for line in done.err.splitlines():
        assert line.isprintable(), repr(line)
        assert line.startswith("svf: "), line
    assert "\x1b[31mred" not in done.out


KINDS = (
    "bundle", "replay dump", "forward dump", "forward dump, audited", "APRT tree", "report", "checkpoint",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_ends_in_one_line(
    kind: str,
    targets: dict[str, Target],
    tmp_path_factory: pytest.TempPathFactory,
    record_property: Callable[[str, object], None],
) -> None:
    tried = 0

    @hypothesis.settings(max_examples=40, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.integers(0, 2**32))
    def every(seed: int) -> None:
        nonlocal tried
        tried += 1
        pick, target = random.Random(seed), targets[kind]
        place = tmp_path_factory.mktemp("damaged") / "x"
        shutil.copytree(target.source, place)
        damage(place / pick.choice(target.files), pick)
        began = time.monotonic()
        done = svf(*(word.replace("@", str(place)) for word in target.command))
        assert time.monotonic() - began < TOO_LONG
        ends_well(done)
        shutil.rmtree(place)

    every()
    record_property("survived", tried)


def test_the_targets_are_good(targets: dict[str, Target]) -> None:
    """Undamaged, each is read: a fuzzer of files that are refused anyhow would find nothing."""
    assert set(targets) == set(KINDS)
    for kind, target in targets.items():
        done = svf(*(word.replace("@", str(target.source)) for word in target.command))
        assert done.code in (0, 5), (kind, done.err)
