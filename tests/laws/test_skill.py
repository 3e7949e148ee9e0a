"""The page for coding agents: who follows it, and the JSON's `next`, reaches what was planted."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer.main
from forward_models import MODELS, random_weights, tokens_of, trace, write_model
from helpers import K_PROJ, ROOT, some, svf, with_json
from plain_forward import MISTAKES, NAMED, Mistake, Plain

import cli
from stages.commands.skill import FOLDER, PAGE
from stages.files.aprt import write_aprt
from stages.files.bundle import MANIFEST_FILE
from stages.files.tensorfile import write_tensors
from stages.selftest.faults import FAULTS
from stages.selftest.planted import CompiledStages, Plant, PlantedBackend
from stages.spec.backend import Backend
from svf import stages

pytestmark = pytest.mark.slow

TEXT = PAGE.read_text()
# The commands of the page by their names, placeholders and all.
COMMANDS = {
    line.split()[1]: line.partition("#")[0].strip() for line in re.findall(r"^    (svf .*)", TEXT, re.MULTILINE)
}
TOKENS = ",".join(map(str, tokens_of(24)))
MODEL = replace(MODELS["qwen3-untied"], layers=2)
Stages = dict[str, np.ndarray]


def plain(folder: Path, mistake: Mistake | None) -> Stages:
    """Another program's forward of MODEL, written beside it, with a mistake."""
    write_model(folder / "MODEL", MODEL, "float32")
    forward = Plain(MODEL.raw("float32"), random_weights(MODEL.config("float32"), 0), "float32")
    if mistake is not None:
        mistake(forward)
    with np.errstate(all="ignore"):
        return forward.run([int(token) for token in TOKENS.split(",")])


@dataclass
class Walk:
    """Follows the page in a folder where `DUMP`, `MODEL` and other words in capitals are; says what it was told."""

    folder: Path
    command: str
    reached: Callable[[dict[str, Any]], bool]
    tried: int = 0

    def go(self, most: int) -> bool:
        """Whether the cause is told within so many commands."""
        queue = [COMMANDS[self.command]]
        while queue and self.tried < most:
            command = queue.pop(0)
            self.tried += 1
            document = svf(*self._filled(command)).json
            if self.reached(document):
                return True
            queue += document["next"]
        return False

    def _filled(self, command: str) -> list[str]:
        words = shlex.split(command)
        assert words[0] == "svf"
        assert words[-1] == "--json"
        return [{"TOKENS": TOKENS}.get(word, word) for word in words[1:]]


def tells(stage: str, words: str = "") -> Callable[[dict[str, Any]], bool]:
    """Whether a document names a stage, and the cause in these words."""

    def told(document: dict[str, Any]) -> bool:
        culprit = document.get("culprit")
        return culprit is not None and culprit["stage"] == stage and words in f"{culprit['hint']} {document['verdict']}"

    return told


def _dump(mistake: str) -> Callable[[Path, dict[str, Backend]], Walk]:
    def plant(folder: Path, _backends: dict[str, Backend]) -> Walk:
        write_tensors(folder / "DUMP", plain(folder, MISTAKES[mistake]))
        return Walk(folder, "audit", tells(*NAMED[mistake]))

    return plant


def _sparse(folder: Path, _backends: dict[str, Backend]) -> Walk:
    """An engine that showed its layers' outputs alone."""
    found = plain(folder, MISTAKES["gelu erf"])
    write_tensors(folder / "DUMP", {key: array for key, array in found.items() if "post_ffn" in key})
    said = "ffn_silu, not recorded: gelu (by erf) instead of silu"
    return Walk(folder, "audit", lambda d: said in str((d.get("culprit") or {}).get("hint")))


def _trees(folder: Path, _backends: dict[str, Backend]) -> Walk:
    """Two trees of flat values, which name neither model nor tokens."""
    for side, mistake in (("A", None), ("B", MISTAKES["no scale"])):
        for key, array in plain(folder, mistake).items():
            layer, _, stage = key.removeprefix("layers.").rpartition(".")
            place = folder / side / (f"layer-{layer}" if layer else "") / f"{stage}.bin"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_aprt(place, int(layer) if layer else None, array)
    return Walk(folder, "diff", tells(*NAMED["no scale"]))


def _planted(backend: str, fault: str, stage: str) -> Callable[[Path, dict[str, Backend]], Walk]:
    def plant(folder: Path, backends: dict[str, Backend]) -> Walk:
        write_model(folder / "MODEL", MODEL, "float32")
        wrong = PlantedBackend(CompiledStages(backends[backend]), Plant(FAULTS[fault], stage, 0, 1.0, 3))
        trace(folder / "MODEL", wrong, tokens=TOKENS, out=folder / "DUMP")
        assert wrong.changed
        return Walk(folder, "audit", tells(stage))

    return plant


def _label(folder: Path, _backends: dict[str, Backend]) -> Walk:
    """A bundle that says of one V what is not so."""

    def mislabel(manifest: dict[str, Any]) -> None:
        for entry in manifest["selected_tensors"]:
            if entry["source_name"] == K_PROJ:
                entry["component_v_layout"] = "vh"

    with_json(folder / "COMPONENTS" / MANIFEST_FILE, mislabel)
    return Walk(folder, "replay", lambda d: "the label is wrong" in str(d.get("message")))


def _adapted(folder: Path, backends: dict[str, Backend]) -> Walk:
    """A forward on weights that were rebuilt under a wrong layout: the bundle itself is right."""
    options: dict[str, Any] = {"adapted": folder / "COMPONENTS", "layout": "vh", "out": folder / "DUMP"}
    trace(folder / "MODEL", backends["jax"], tokens=TOKENS, **options)
    return Walk(folder, "audit", lambda d: d["schema"] == "svf.layouts/1" and d["outcome"] == "agree")


# Planted in other ways below, or much like another.
_ELSEWHERE = (
    *("no scale", "gelu erf", "strict mask", "strict mask, lowest", "scale twice", "silu(up) gate"),
    "silu of up, times gate",
)
# Those whose first answer does not tell.
_NEED_MORE = ("two flat trees", "weights under a wrong layout")
PLANTED: dict[str, Callable[[Path, dict[str, Backend]], Walk]] = {
    **{f"dump: {name}": _dump(name) for name in NAMED if name not in _ELSEWHERE},
    "layer outputs alone": _sparse,
    "two flat trees": _trees,
    "torch: another eps": _planted("torch", "eps 1e-3", "attn_norm"),
    "torch: residual missing": _planted("torch", "residual missing", "post_attn_residual"),
    "jax: a head transposed": _planted("jax", "one head's q and k exchanged", "attn_scores"),
    "jax: hard swish": _planted("jax", "hard swish", "ffn_silu"),
    "a wrong label": _label,
    "weights under a wrong layout": _adapted,
}


# Every other one, and the last.
@pytest.mark.parametrize("name", some(PLANTED, [*[*PLANTED][::2], [*PLANTED][-1]]))
def test_a_planted_bug_is_reached_in_three_commands(
    name: str,
    made: Path,
    model: Path,
    torch_backend: Backend,
    jax_backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if PLANTED[name] in (_label, _adapted):
        shutil.copytree(made / "components", tmp_path / "COMPONENTS")
        (tmp_path / "MODEL").symlink_to(model)
    walk = PLANTED[name](tmp_path, {"torch": torch_backend, "jax": jax_backend})
    assert walk.go(most=3)
    assert (walk.tried > 1) == (name in _NEED_MORE)


def test_twenty_are_planted() -> None:
    assert len(PLANTED) == 20


# What the page says of each outcome.


def test_exit_codes_and_outcomes_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    right = plain(tmp_path, None)
    audit = ("audit", "DUMP", "--model", "MODEL", "--tokens", TOKENS, "--json")
    write_tensors(tmp_path / "DUMP", right)
    _trees(tmp_path, {})
    write_tensors(tmp_path / "WRONG", plain(tmp_path, MISTAKES["no mask"]))
    said = {
        (0, "sound"): svf(*audit),
        (0, "agree"): svf("diff", "DUMP", "DUMP", "--model", "MODEL", "--tokens", TOKENS, "--json"),
        (1, "faulty"): svf("audit", "WRONG", *audit[2:]),
        (1, "diverged"): svf("diff", "DUMP", "WRONG", "--model", "MODEL", "--tokens", TOKENS, "--json"),
        (2, None): svf("audit", "DUMP", "--json"),
        (3, None): svf("audit", "DUMP", "--model", "MODEL", "--tokens", "1,2", "--json"),
        (4, None): svf("audit", "NOTHING", "--json"),
        (5, "incomplete"): svf("diff", "A", "B", "--json"),
    }
    for (code, outcome), done in said.items():
        assert (done.code, done.json.get("outcome")) == (code, outcome), done.out[:500]
        assert isinstance(done.json["next"], list)
        line = next(line for line in TEXT.splitlines() if line.startswith(f"| {code} |"))
        assert f"`{outcome}`" in line if outcome else "an error" in line
    unjudged = {row.get("unjudged_a") for row in said[5, "incomplete"].json["rows"]} - {None}
    assert unjudged == {"the model is not known; give --model and --tokens"}


def test_next_asks_for_json_where_json_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / "DUMP", plain(tmp_path, MISTAKES["no mask"]))
    words = ("audit", "DUMP", "--model", "MODEL", "--tokens", TOKENS)
    (closer,) = svf(*words, "--json").json["next"]
    assert closer.endswith("--stages attn_softmax --layers 0 --top 20 --json")
    assert f"Next: {closer.removesuffix(' --json')}" in svf(*words).out.splitlines()
    done = svf(*shlex.split(closer)[1:])
    assert (done.code, len(done.json["rows"]), len(done.json["rows"][0]["top"])) == (1, 1, 20)


def test_a_fix_is_checked_as_the_page_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / "DUMP", plain(tmp_path, MISTAKES["gelu tanh"]))
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(block, {})
    with pytest.raises(AssertionError, match="ffn_silu: bug"):
        exec(block.replace("gate / (1 + np.exp(-gate))", 'recorded["layers.0.ffn_silu"]'), {})


def test_the_hooks_of_the_page_record_what_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "MODEL", MODEL, "float32")
    (block,) = re.findall(r"```python\n(.*?)```", (FOLDER / "capture.md").read_text(), re.DOTALL)
    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL", dtype=torch.float32)
    exec(block, {"model": model, "tokens": torch.tensor([[int(token) for token in TOKENS.split(",")]])})
    document = svf("audit", "DUMP", "--model", "MODEL", "--tokens", TOKENS, "--json").json
    assert {row["verdict"] for row in document["rows"] if row["stage"] == "ffn_silu"} <= {"exact", "rounding"}
    assert document["culprit"] is None


# The page itself.


def test_the_page_has_the_form_of_an_agents_skill() -> None:
    _, front, body = TEXT.split("---\n", 2)
    names = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert set(names) == {"name", "description"}
    assert len(names["description"]) <= 1024
    assert len(body.splitlines()) <= 150
    others = sorted(path.name for path in FOLDER.iterdir() if path != PAGE)
    assert 1 <= len(others) <= 3
    assert sorted(set(re.findall(r"\]\((\w+\.md)\)", body))) == others


def test_every_command_of_the_page_is_understood() -> None:
    group = typer.main.get_command(cli.app)
    assert {"audit", "diff", "forward", "replay"} <= set(COMMANDS)
    for name, command in COMMANDS.items():
        group.commands[name].make_context(name, shlex.split(command)[2:])  # type: ignore[attr-defined]


def test_keys_and_stages_that_the_page_names_are_declared() -> None:
    known = set(stages())
    for page, least in (("capture.md", 26), ("reading.md", 14)):
        rows = [line for line in (FOLDER / page).read_text().splitlines() if line.startswith(("| `", "Of the model"))]
        named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else line)}
        assert len(named) >= least
        assert named <= known


def test_the_command_prints_the_page_or_its_place() -> None:
    assert svf("skill").out == TEXT
    assert svf("skill", "--path").out == f"{PAGE}\n"
    assert svf("skill", "--json").json["text"] == TEXT
    assert (ROOT / "docs" / "skill" / "SKILL.md").samefile(PAGE)
