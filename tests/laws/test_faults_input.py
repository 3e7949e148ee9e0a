"""Damaged and hostile files: every command that reads them ends with a documented code and one printable line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from confined import MEMORY, SECONDS, Confined, Ended
from damage import damage, rehash
from forward_models import MODELS, write_model
from gguf_files import write_gguf
from helpers import some, svf
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Seeds per kind of file: few in `make test`, some with `make thorough`, many under `make faults`; SVF_FUZZ sets another
# number.
FEW, SOME, MANY = 3, 8, 60
REFERENCE = ("--backend", "reference")
RUN = (*REFERENCE, "--tokens", "1,2", "--layers", "0")


@dataclass(frozen=True)
class Target:
    """A good artifact, what of it is damaged, and the commands that read it.

    In their words `{x}` is the damaged copy, `{good}` the good one, `{out}` a new place, `{world}` where all kinds lie.
    `codes` are the exit codes that damage may end in beside those of a verdict on it.
    """

    source: str
    files: str
    commands: tuple[str, ...]
    codes: frozenset[int] = frozenset({3})
    admitted: bool = False  # whether a manifest may be made to agree with its damaged files


DIFFERENT, FOUND = frozenset({0, 1, 5}), frozenset({0})
BUNDLE = (
    "layouts {x}", "inspect {x}", "inspect {x} --json", "verify {x}", "diff {x} {good}", "diff {good} {x} --json",
    "audit {x}", "stats {x}", "infer {x} --rows 16", "replay {x} --backend reference --out {out}",
    "apply {x} {world}/model --backend reference --out {out}",
    "replay {x} --backend reference --layout all --report {out}",
    "forward {world}/model --adapted {x} --backend reference --tokens 1,2 --layers 0 --stages embedding",
    "route {world}/model --adapted {x} --head {world}/npy/router.npy --tokens 1,2,3 --backend reference",
)  # fmt: skip
DUMP = (
    "diff {x} {good}", "diff {good} {x} --json", "audit {x}", "audit {x} --json", "inspect {x}", "inspect {x} --json",
    "verify {x}", "stats {x}", "diff {x} {good} --precision exact",
)  # fmt: skip
CHECKPOINT = (
    "forward {x} --backend reference --tokens 1,2 --layers 0 --stages embedding", "inspect {x}", "inspect {x} --json",
    "verify {x}", "diff {x} {good}", "layouts {world}/bundle --model {x}",
    "decompose {x} --layers 2 --vector {world}/npy/router.npy --out {out}",
    "import {world}/tree {out} --model {x} --tokens 1,2", "apply {world}/bundle {x} --backend reference --out {out}",
)  # fmt: skip
OF_A_CONFIG = ("audit {world}/trace --model {x}", "infer {world}/trace32 --model {x}")
FOREIGN = (
    "audit {x} --model {world}/model --tokens 1,2", "inspect {x}/layer-0.safetensors", "stats {x}",
    "verify {x}/layer-0.safetensors", "export {x} {out}",
)  # fmt: skip
TREE = (
    "diff {x} {good}", "audit {x} --model {world}/model --tokens 1,2", "inspect {x}", "verify {x}", "stats {x}",
    "import {x} {out}", "import {x} {out} --model {world}/model --tokens 1,2",
)  # fmt: skip
APRT = ("diff {x}/ffn_up.bin {good}/ffn_up.bin", "inspect {x}/ffn_up.bin", "verify {x}/ffn_up.bin")
REPORT = (
    "diff {x}/report.json {good}/report.json", "diff {good}/report.json {x}/report.json --strict-current-python",
    "replay {world}/bundle --backend reference --reference-report {x}/report.json", "inspect {x}/report.json",
)  # fmt: skip
RESULTS = (
    "report {x}/r.json --html {out}", "report {x}/r.json --html {out} --json", "inspect {x}/r.json",
    "verify {x}/r.json",
)  # fmt: skip
VECTOR = (
    "inspect {x}/router.npy", "inspect {x}/router.npy --json", "verify {x}/router.npy",
    "decompose {world}/model --layers 2 --vector {x}/router.npy --out {out}",
    "route {world}/model --layers 2 --head {x}/router.npy --tokens 1,2,3 --backend reference",
)  # fmt: skip
PROMPT = ("forward {x} --prompt ab --backend reference --layers 0 --stages embedding",)
MANIFEST = ("decompose {world}/model --manifest {x}/manifest.json --vector {world}/npy/router.npy --out {out}",)
IDS = ("forward {world}/model --backend reference --tokens-file {x}/ids.json --layers 0",)
PICKLE = ("inspect {x}/w.pt", "inspect {x}/w.pt --json", "verify {x}/w.pt")
GGUF = (
    "forward {x}/m.gguf --backend reference --tokens 1,2 --layers 0 --stages embedding", "inspect {x}/m.gguf",
    "inspect {x}/m.gguf --json", "verify {x}/m.gguf", "diff {x}/m.gguf {good}/hf",
    "diff {good}/m.gguf {x}/m.gguf --json", "decompose {x}/m.gguf --layers 1 --vector {good}/v.npy --out {out}",
    "audit {good}/run --model {x}/m.gguf", "audit {good}/run/model.safetensors --model {x}/m.gguf --tokens 1,2",
)  # fmt: skip
SETTINGS = ("inspect {world}/npy/router.npy", "diff {world}/trace {world}/trace", "--version")

# Exit codes of damage: a size that nobody has room for is told before tensors are looked at; ids that the user asked
# for do not fit a config.
ASKED = frozenset({2, 3, 7})
SIZED = frozenset({3, 6, 7})

TARGETS = {
    "bundle": Target("bundle", "*.json", BUNDLE, SIZED),
    "bundle's tensors": Target("bundle", "*.safetensors", BUNDLE),
    "sample bundle": Target("sample", "*", BUNDLE[:-1], SIZED),
    "replay dump": Target("dump", "manifest.json", DUMP),
    "replay dump's tensors": Target("dump", "*.safetensors", DUMP, admitted=True),
    "forward dump": Target("trace", "manifest.json", (*DUMP, "export {x} {out}")),
    "forward dump's tensors": Target("trace", "*.safetensors", (*DUMP, "export {x} {out}"), admitted=True),
    "float32 dump's tensors": Target("trace32", "*.safetensors", ("infer {x} --columns 4", "audit {x}"), admitted=True),
    "another program's": Target("foreign", "layer-0.safetensors", FOREIGN),
    "APRT tree": Target("tree", "**/*.bin", TREE),
    "APRT file": Target("aprt", "*", APRT),
    "report": Target("report", "*", REPORT),
    "result": Target("results", "*", RESULTS),
    "audit's result": Target("audits", "*", RESULTS),
    "run's result": Target("runs", "*", RESULTS),
    "config": Target("model", "config.json", CHECKPOINT + OF_A_CONFIG, ASKED),
    "weights": Target("model", "model.safetensors", CHECKPOINT),
    "sharded checkpoint": Target("sharded", "*.json", CHECKPOINT, ASKED),
    "tokenizer": Target("model", "tokenizer.json", PROMPT),
    "reference manifest": Target("selection", "*", MANIFEST),
    "router vector": Target("npy", "*", VECTOR),
    "token ids": Target("tokens", "*", IDS, ASKED),
    "GGUF": Target("gguf", "m.gguf", GGUF, ASKED),
    "pickle": Target("pickle", "*", PICKLE),
    "old pickle": Target("old", "*", PICKLE),
    "settings": Target("settings", "*", SETTINGS, frozenset({2})),
}  # fmt: skip
# A child that imports torch takes seconds: fewer of these.
SLOW = {"converted pickle": Target("pickle", "*", ("convert {x}/w.pt {out}",))}
# What a command may end with when it answers at all.
ANSWERS = {
    "diff": DIFFERENT,
    "audit": DIFFERENT,
    "replay": DIFFERENT,
    "layouts": DIFFERENT,
    "route": DIFFERENT,
    "infer": frozenset({0, 5}),
}


@pytest.fixture(scope="session")
def world(made: Path, model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind of file that this project reads."""
    at = tmp_path_factory.mktemp("world")
    shutil.copytree(made / "components", at / "bundle")
    shutil.copytree(made / "sample", at / "sample")
    shutil.copytree(model, at / "model")
    for name in (
        "report",
        "results",
        "audits",
        "runs",
        "npy",
        "selection",
        "tokens",
        "pickle",
        "old",
        "settings",
        "aprt",
        "foreign",
        "gguf",
    ):
        (at / name).mkdir()
    shutil.copy(made / "router.npy", at / "npy" / "router.npy")
    shutil.copy(manifest, at / "selection" / "manifest.json")
    shutil.copy(made / "components.json", at / "report" / "report.json")
    (at / "tokens" / "ids.json").write_text("[1, 2, 3]")
    (at / "settings" / "svf.toml").write_text("top = 3\n[forward]\nlayers = '0'\n")
    for words in (
        ("replay", at / "sample", *REFERENCE, "--out", at / "dump"),
        ("forward", at / "model", *RUN, "--out", at / "trace"),
        ("forward", at / "model", *RUN, "--dtype", "float32", "--out", at / "trace32"),
        ("forward", at / "model", *RUN, "--format", "aprt", "--out", at / "tree"),
    ):
        assert svf(*words).code == 0
    for words, place in (
        (("diff", at / "trace", at / "trace", "--json"), "results"),
        (("audit", at / "dump", "--json"), "audits"),
        (("forward", at / "model", *RUN, "--json"), "runs"),
    ):
        (at / place / "r.json").write_text(svf(*words).out)
    shutil.copy(at / "tree" / "layer-0" / "ffn_up.bin", at / "aprt" / "ffn_up.bin")
    for file in (at / "trace").glob("*.safetensors"):
        shutil.copy(file, at / "foreign" / file.name)
    weights = {"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}
    torch.save(weights, at / "pickle" / "w.pt")
    torch.save(weights, at / "old" / "w.pt", _use_new_zipfile_serialization=False)
    shard(at / "model", at / "sharded")
    small = replace(MODELS["llama"], hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64, vocab=40)
    write_gguf(
        at / "gguf" / "m.gguf", small, kind="Q4_0", edit=lambda said: said.update({"tokenizer.words": ["a"] * 9})
    )
    write_model(at / "gguf" / "hf", small, "float32")
    np.save(at / "gguf" / "v.npy", np.zeros(256 + 32, np.float32))
    assert svf("forward", at / "gguf" / "m.gguf", *RUN, "--out", at / "gguf" / "run").code == 0
    return at


def shard(model: Path, out: Path) -> None:
    """The same checkpoint in two files and an index."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, out / file)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, members in parts.items() for name in members},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def confined() -> Iterator[Confined]:
    with Confined() as server:
        yield server


def attempt(target: Target, seed: int, world: Path, confined: Confined, place: Path) -> tuple[list[str], Ended]:
    """Damage a copy of the target as `seed` says, and run one of its commands on it."""
    pick = random.Random(seed)
    damaged = place / "x"
    shutil.copytree(world / target.source, damaged)
    damage(pick.choice(sorted(p for p in damaged.glob(target.files) if p.is_file())), pick)
    if target.admitted and pick.random() < 0.7:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # damaged beyond that
            rehash(damaged)
    names = {"x": damaged, "good": world / target.source, "out": place / "out.html", "world": world}
    words = pick.choice(target.commands).format(**names).split()
    return words, confined.run(*words, folder=damaged if target.source == "settings" else None)


def faults_of(target: Target, words: list[str], done: Ended) -> Iterator[str]:
    """What was wrong about how a command ended."""
    allowed = ANSWERS.get(words[0], FOUND) | target.codes
    asks = done.code == 2 and "give" in done.err and "--" in done.err  # what a file no longer says, the user must
    if done.code not in allowed and not asks:
        yield f"exit code {done.code}, expected one of {sorted(allowed)}"
    if "Traceback" in done.err + done.out or "internal error" in done.err:
        yield "a traceback or an internal error"
    lines = done.err.splitlines()
    if done.code not in (0, 1, 5) and words[0] != "verify" and len(lines) != 1:
        yield f"{len(lines)} lines on stderr"
    for line in done.err.split("\n")[:-1]:
        if not line.isprintable() or not line.startswith("svf: "):
            yield f"an odd line {line!r}"
    if any(not (c.isprintable() or c == "\n") for c in done.out):
        yield f"unprintable output {next(c for c in done.out if not (c.isprintable() or c == chr(10)))!r}"
    if done.seconds > SECONDS / 2 or done.memory > MEMORY:
        yield f"{done.seconds:.1f} s and {done.memory / 2**20:.0f} MiB"
    if done.asked:
        yield f"asked the network: {done.asked}"


@pytest.mark.parametrize("seeds", some(("few", "more"), ("few",)))
@pytest.mark.parametrize("kind", [*TARGETS, *SLOW])
def test_a_damaged_file_ends_in_one_line(
    kind: str,
    seeds: str,
    world: Path,
    confined: Confined,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    target = (TARGETS | SLOW)[kind]
    many = request.config.getoption("-m") == "faults"
    count = max(1, int(os.environ.get("SVF_FUZZ", MANY if many else SOME)) // (1 if kind in TARGETS else 8))
    few = min(FEW, count)
    chosen = range(few) if seeds == "few" else range(few, count)
    found: list[str] = []
    for seed in chosen:
        place = tmp_path / str(seed)
        place.mkdir()
        words, done = attempt(target, seed, world, confined, place)
        found += [
            f"seed {seed}: svf {' '.join(words)}: {fault}\n{done.err[-2000:]}"
            for fault in faults_of(target, words, done)
        ]
        if not found:
            shutil.rmtree(place)
    assert not found, f"{len(found)} faults:\n" + "\n".join(found[:20])
    record_property("survived", len(chosen))


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("source", "command"),
    sorted({(target.source, command) for target in (TARGETS | SLOW).values() for command in target.commands}),
)
def test_the_targets_are_good(source: str, command: str, world: Path, confined: Confined, tmp_path: Path) -> None:
    """Undamaged, each is read: a fuzzer of files that are refused anyhow would find nothing."""
    names = {"x": world / source, "good": world / source, "out": tmp_path / "out.html", "world": world}
    words = command.format(**names).split()
    done = confined.run(*words, folder=world / source if source == "settings" else None)
    assert done.code in (0, 5) or "--precision" in words, (words, done)
