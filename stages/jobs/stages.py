"""`svf stages`: the stages as they are declared, and of one its recipes (`svf.stages/1`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stages.errors import UsageError, shown
from stages.jobs.synth import config_json
from stages.judge.adapted import DECLARED as ADAPTED
from stages.oracle.bounds import LAMBDA
from stages.recipes.catalogue import held, kind_of
from stages.recipes.listing import bits_lines, form_lines, mod_lines
from stages.spec.families import FAMILIES
from stages.spec.family import Family
from stages.spec.forward import ALIASES
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.router import ROUTER
from stages.spec.stage import Stage

SCHEMA = "svf.stages/1"


# Sizes that families with experts read, and others do not.
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}


def plain(family: Family) -> tuple[Stage, ...]:
    """The stages of a family's plain model, of which nothing optional is asked."""
    config = family.parse({**config_json("tiny"), **_EXPERTS, "model_type": family.name}, family.name)
    (layer,) = family.kinds(config).values()
    return (*family.before.stages, *layer.stages, *family.after.stages)


def declared() -> Iterator[tuple[str, Stage]]:
    """Every stage with where it is: a family of models, the replay, the router, or an adapted model."""
    for family in FAMILIES.values():
        yield from ((family.name, stage) for stage in plain(family))
    yield from (("replay", stage) for stage in REPLAY.values())
    yield from (("router", stage) for stage in ROUTER.values())
    yield "adapted", ADAPTED


def stages() -> dict[str, Any]:
    """The document that lists every stage."""
    rows = []
    for name, found in _by_name().items():
        there = [(place, stage) for place, stage in found if not stage.absent]
        recipes = dict.fromkeys(kind.name for _, stage in there for kind in [kind_of(stage)] if kind is not None)
        rows.append(
            {
                "stage": name,
                "in": [place for place, _ in there],
                "recipes": list(recipes),
                "doc": there[0][1].doc,
            }
        )
    return {"schema": SCHEMA, "stages": rows}


def one_stage(name: str, dtype: str | None = None) -> dict[str, Any]:
    """The document of one stage: its declarations and its recipes, of one storage dtype those that hold for it.

    `UsageError` where there is no such stage.
    """
    every = _by_name()
    stage = ALIASES.get(name, name)
    if stage not in every:
        near = difflib.get_close_matches(name, [*every, *ALIASES], n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"no stage '{shown(name)}'; {hint}'svf stages' lists them all")
    found = every[stage]
    return {
        "schema": SCHEMA,
        "stage": stage,
        "dtype": dtype,
        "declared": _declarations(found),
        "recipes": _recipes([one for _, one in found if not one.absent], dtype),
    }


def _by_name() -> dict[str, list[tuple[str, Stage]]]:
    found: dict[str, list[tuple[str, Stage]]] = {}
    for place, stage in declared():
        found.setdefault(stage.name, []).append((place, stage))
    return found


def _declarations(found: Sequence[tuple[str, Stage]]) -> list[dict[str, Any]]:
    """Each way in which a stage is declared, with the places that have it so."""
    rows: list[dict[str, Any]] = []
    for place, stage in found:
        row = _declaration(stage)
        same = next((one for one in rows if {**one, "in": None} == {**row, "in": None}), None)
        if same is None:
            rows.append(row)
        (same or row)["in"].append(place)
    return rows


def _declaration(stage: Stage) -> dict[str, Any]:
    kind, exact = kind_of(stage), stage.noise is Noise.EXACT
    return {
        "in": [],
        "absent": stage.absent,
        "inputs": list(stage.inputs),
        "params": list(stage.params),
        "options": list(stage.options),
        "shape": stage.shape,
        "dtype": stage.dtype,
        "noise": "identity" if stage.identity else stage.noise.value,
        "lambda": None if exact else LAMBDA[stage.noise],
        "recipes": None if kind is None or stage.absent else kind.name,
        "doc": stage.doc,
    }


def _recipes(found: Sequence[Stage], dtype: str | None) -> list[dict[str, Any]]:
    """The recipes of each kind that a stage is of."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in found:
        kind = kind_of(stage)
        if kind is not None and kind.name not in rows:
            of = dtype if stage.dtype == "model" else held(stage.dtype)
            rows[kind.name] = {
                "kind": kind.name,
                "doc": kind.doc,
                "forms": [asdict(line) for line in form_lines(kind, of)],
                "mods": mod_lines(kind),
                "fewer_bits": [
                    {"format": narrow.words, "dtypes": list(narrow.dtypes), "of": of_what}
                    for narrow, of_what in bits_lines(stage, of)
                ],
            }
    return list(rows.values())
