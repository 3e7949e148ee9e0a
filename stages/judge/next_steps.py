"""Commands that would tell more than a document does: `next` in its JSON, the same lines under its text.

They are made from the document alone: from what it found, and from the command that made it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.spec.families import FAMILIES

Document = Mapping[str, Any]

# Options of the first command that the second one writes itself, and whether they take a value.
_DROPPED = {"--json": False, "--force": False, "--resume": False} | dict.fromkeys(
    ("--html", "--top", "--layers", "--stages"), True
)
# Elements shown of a stage that is looked at alone.
_CLOSE = ("--top", "20")


@dataclass(frozen=True)
class Step:
    """What to do next: the reason, said in the verdict, and the command."""

    why: str
    command: str

    def __str__(self) -> str:
        return f"{self.why}: {self.command}"


def sum_alike(command: str) -> Step:
    """The next step when bytes differ by rounding alone: `command` sums in the order of the other side."""
    why = "Bytes that differ by rounding alone were summed in another order; take the reference side's"
    return Step(why, command)


def next_steps(document: Document) -> list[str]:
    """Commands that would tell more, the most telling first; none where the document says all there is.

    A word in capitals (`MODEL`, `TOKENS`) stands for what the document does not know.
    """
    rule = _RULES.get(str(document.get("schema")))
    known = [*document.get("next", ()), *(rule(document) if rule else ())]
    return list(dict.fromkeys(known))


def closer(document: Document, row: Mapping[str, Any], *more: str) -> list[str]:
    """`svf diff` or `svf audit` of the same things on one stage, with its figures, and with `more` options.

    First, if need be, the command that keeps what is to be compared; none for an unknown command.
    """
    layer = [] if row["layer"] is None else ["--layers", str(row["layer"])]
    return _again(document, "--stages", str(row["stage"]), *layer, *_CLOSE, *more)


def _again(document: Document, *options: str) -> list[str]:
    """The comparison or the audit that made a document, with other options."""
    words = command_words(document)
    name = _command(words)
    if name in ("diff", "audit"):
        return [shlex.join([*words, *options])]
    if name in ("forward", "replay") and "a" in document:
        out = _value(words, "--out")
        first = [] if out else [shlex.join([*words, "--out", "dumps"])]
        sides = [f"{out or 'dumps'}/{document[letter]['facts'].get('backend', letter)}" for letter in "ab"]
        return [*first, shlex.join(["svf", "diff", *sides, *options])]
    return []


def command_words(document: Document) -> list[str]:
    """The words of the command that made a document, less the options that do not belong into the next one.

    None where it is no command of ours: a saved document may say anything, and a person will paste this.
    """
    command = document.get("command")
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []
    kept: list[str] = []
    skip = False
    for word in words:
        option, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif option in _DROPPED:
            skip = _DROPPED[option] and not equals
        else:
            kept.append(word)
    return kept if kept[:1] == ["svf"] else []


def _command(words: Sequence[str]) -> str | None:
    return next((word for word in words[1:] if not word.startswith("-")), None)


def _value(words: Sequence[str], option: str) -> str | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return after
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


# -- one rule per kind of document --------------------------------------------------------------------------------


def _of_diff(document: Document) -> list[str]:
    if document.get("kind") == "reports":  # it holds checks, no stages that could be looked at
        return []
    if document["culprit"] is not None or document["decomposition"]:
        return _of_culprit(document)
    words = command_words(document)
    judged = any(row["verdict"] != "unjudged" for row in document["rows"])
    if any(document["lacks"].values()) and judged:
        return _again(document, *_in_both(document))
    if document.get("flat") and _value(words, "--model") is None:
        return _again(document, "--model", "MODEL", "--tokens", "TOKENS")
    differ = any(row["byte_match"] is False for row in document["rows"])
    ours = all("backend" in document[letter]["facts"] for letter in "ab")
    if document["outcome"] == "agree" and differ and ours and _command(words) == "diff":
        return _again(document, "--explain-order") if "--explain-order" not in words else []
    return []


def _in_both(document: Document) -> list[str]:
    """Options that ask for what both sides have: stages that neither lacks in the layers that both have."""
    rows = [row for row in document["rows"] if row["tensor"] is None]
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    lacking = {key.rpartition(".") for keys in document["lacks"].values() for key in keys}
    named = {stage for place, _, stage in lacking if not place or place.removeprefix("layers.") in map(str, layers)}
    stages = [stage for stage in dict.fromkeys(row["stage"] for row in rows) if stage not in named]
    if not stages:
        return ["--layers", ",".join(map(str, layers))] if layers else []
    return ["--stages", ",".join(stages), *(["--layers", ",".join(map(str, layers))] if layers else [])]


def _of_audit(document: Document) -> list[str]:
    words = command_words(document)
    if document["culprit"] is not None:
        blocks = any("ggml's Q8_" in str(row.get("recipe")) for row in document["rows"])
        declared = _again(document, "--activations", "ggml") if blocks and "--activations" not in words else []
        return [*declared, *_of_culprit(document)]
    asked = [word for option in _TOKENS if (value := _value(words, option)) for word in (option, value)]
    model, dtype = _value(words, "--model"), document["facts"].get("dtype", "model")
    if document["outcome"] != "incomplete" or document["kind"] != "forward" or model is None or not asked:
        return []
    # What was not recorded cannot be judged; beside a right run one sees at least where the two part.
    right = ["svf", "forward", model, *asked, "--backend", "reference", "--dtype", dtype, "--out", "reference"]
    return [shlex.join(right), shlex.join(["svf", "diff", "reference", _place(document["source"])])]


_TOKENS = ("--tokens", "--tokens-file", "--prompt")


def _place(label: str) -> str:
    """The path in a side's label."""
    return label.removesuffix(" (APRT, flat)")


def _of_culprit(document: Document) -> list[str]:
    """A closer look at the culprit; where the components are to blame, at these."""
    words, culprit = command_words(document), document["culprit"]
    about = document.get("about") or {}
    named = (about.get("components"), document.get("components"), *(_value(words, o) for o in _COMPONENTS))
    found = next((str(name) for name in named if name), None)
    blamed = document.get("decomposition") or (culprit and culprit["stage"] == "adapted_weight")
    of_components = [shlex.join(["svf", what, found]) for what in ("layouts", "verify")] if blamed and found else []
    return [*of_components, *(closer(document, culprit) if culprit else [])]


_COMPONENTS = ("--components", "--adapted")


def _of_logprobs(document: Document) -> list[str]:
    """Where no cause was found: the weights of another step, and the forward itself, recorded."""
    words = command_words(document)
    sides = [document[letter] for letter in "ab" if document[letter]]
    if not any(side["verdict"] == "suspect" or (side["verdict"] == "bug" and side["found"] is None) for side in sides):
        return []
    other = [] if _value(words, "--other-model") else [shlex.join([*words, "--other-model", "OLDER"])]
    return [*(other if words else []), "svf audit RECORDED --model MODEL --tokens TOKENS"]


def _of_layouts(document: Document) -> list[str]:
    if document["outcome"] == "agree":
        return []
    bundle, rows = str(document["components"]), document["tensors"]
    right = set.intersection(*(set(row["matches"]) for row in rows)) if rows else set()
    replay = [["svf", "replay", bundle, "--backend", "both", "--layout", name] for name in sorted(right)[:1]]
    return [shlex.join(words) for words in (*replay, ["svf", "verify", bundle])]


def _of_forward(document: Document) -> list[str]:
    return [shlex.join(["svf", "audit", str(document["out"])])] if document["out"] else []


def _of_inspect(document: Document) -> list[str]:
    what = {"component bundle": ("verify", "layouts"), "dump": ("verify", "audit"), "checkpoint": ("verify",)}
    return [shlex.join(["svf", name, str(document["source"])]) for name in what.get(document["kind"], ())]


def _of_error(document: Document) -> list[str]:
    """Commands that the message quotes; `COMMAND` is the one that failed."""
    failed = shlex.join(command_words(document)[1:])
    return [step.replace("COMMAND", failed) for step in re.findall(r"'(svf [^']+)'", str(document["message"]))]


def _of_stages(document: Document) -> list[str]:
    """Of all stages the recipes of one; of one, which a model has, the audit of it in a recorded run."""
    if "stages" in document:
        return ["svf stages attn_norm"]
    of_models = any(place in FAMILIES for row in document["declared"] for place in row["in"])
    return [f"svf audit RECORDED --model MODEL --tokens TOKENS --stages {document['stage']}"] if of_models else []


_RULES: dict[str, Callable[[Document], list[str]]] = {
    "svf.diff/1": _of_diff,
    "svf.audit/1": _of_audit,
    "svf.layouts/1": _of_layouts,
    "svf.logprobs/1": _of_logprobs,
    "svf.forward/1": _of_forward,
    "svf.inspect/1": _of_inspect,
    "svf.stages/1": _of_stages,
    "svf.synth/1": lambda d: [shlex.join(["svf", "forward", str(d["out"]), "--tokens", "1,2,3", "--backend", "both"])],
    "svf.decompose/1": lambda d: [shlex.join(["svf", "replay", str(d["out"]), "--backend", "both"])],
    "svf.capture/1": lambda d: [shlex.join(["svf", "audit", d["sequences"][0]["out"]])],
    "svf.error/1": _of_error,
}
