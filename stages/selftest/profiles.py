"""Faults and right runs as engines record them: each is judged from what one recording, a profile, keeps of it.

A fault is *claimed* in a profile when it changes a tensor that shows it by more than the floor that its row prints. A
tensor shows it that is the first recorded one on a way from the fault on. The change is of RMS, relative to the
tensor, against the right run of the same backend. The floor is `floor` of the row; where nothing but RoPE's tables was
not recorded, the RMS of the bound; where nothing was, the full record's claim is the claim. Else the fault is *below*.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.files.forward_dump import Place, forward_key
from stages.judge.recovered import LOGITS
from stages.selftest.engines import ENGINES
from stages.selftest.fault import FORWARD, Fault
from stages.selftest.recorded import arrays_of, audit_arrays
from stages.selftest.specimens import SPECIMENS, Specimen
from stages.selftest.trials import Trial, path_of, plan
from stages.spec.forward import forward_pipeline, producers
from stages.spec.profiles import PROFILES as USUAL
from stages.spec.profiles import Profile
from stages.spec.stage import Pipeline, Scope

Arrays = Mapping[str, np.ndarray]
# Of these, faults are planted and right runs are judged.
DTYPES = ("float32", "bfloat16")
# A fault of a size is planted as small as a full record shows it, and so many times larger: floors of spans are higher.
LARGER = 64.0
# Of a quick selftest, one kind in so many, others for another seed.
_QUICK = 6
# Right runs that are judged under every profile: no longer and no wider, for there are many.
_MOST_TOKENS, _MOST_HIDDEN = 64, 256


@dataclass(frozen=True)
class Asked:
    """How one recording is asked for.

    `found` is the share of claimed float32 faults that must be found in the right span. Of faults, one in `every` is
    judged under it: of long spans many stages are asked what is wrong.
    """

    profile: Profile
    found: float = 0.98
    every: int = 1

    @property
    def doc(self) -> str:
        return self.profile.doc

    def recorded(self, arrays: Arrays, specimen: Specimen) -> dict[str, np.ndarray]:
        """What of a run it keeps, by key."""
        kept = frozenset(self.profile.of(forward_pipeline(specimen.config())))
        return {key: array for key, array in arrays.items() if key.rpartition(".")[2] in kept}


_MORE: Mapping[str, Mapping[str, Any]] = {"hidden": {"found": 0.95, "every": 2}, "logits": {"found": 0.95, "every": 6}}
PROFILES: Mapping[str, Asked] = {
    "all": Asked(Profile("all", "every stage", tuple), 0.99),
    **{name: Asked(profile, **_MORE.get(name, {})) for name, profile in USUAL.items()},
}


# -- what is planted ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A fault and the profiles under which it is judged."""

    trial: Trial
    profiles: tuple[str, ...]


def plan_profiles(
    faults: Iterable[Fault], names: Sequence[str], backends: Sequence[str], *, quick: bool, seed: int
) -> list[Planted]:
    """Each kind of a forward once a dtype, one of a size twice; the place and backend by turn.

    With `quick` one kind in so many, under one profile.
    """
    found = []
    for number, fault in enumerate(f for f in faults if f.path == FORWARD):
        trials, turn = list(_by_turn(fault, backends, seed)), (number + seed) // _QUICK
        for of, trial in enumerate([] if quick else trials):
            under = [name for name in names if (number + of + seed) % PROFILES[name].every == 0]
            found.append(Planted(trial, tuple(under)))
        if quick and (number + seed) % _QUICK == 0:
            found.append(Planted(trials[turn % len(trials)], (names[turn % len(names)],)))
    return found


def _by_turn(fault: Fault, backends: Sequence[str], seed: int) -> Iterator[Trial]:
    turn = zlib.crc32(f"profiles:{seed}:{fault.name}".encode())
    for dtype in reversed(DTYPES):
        for scale in (1.0,) if fault.size is None else (1.0, LARGER):
            trials = plan([fault], backends, quick=False, seed=seed, scale=scale)
            of_dtype = [trial for trial in trials if SPECIMENS[trial.specimen].dtype == dtype]
            if of_dtype:
                yield of_dtype[turn % len(of_dtype)]


def first_recorded(path: Pipeline, layers: int, recorded: Iterable[str], changed: Place) -> set[Place]:
    """The recorded places that show a change at one: itself, or the first on each way from it on."""
    readers: dict[Place, list[Place]] = {}
    for stage in path.values():
        for layer in range(layers) if stage.scope is Scope.LAYER else (None,):
            for source in producers(path, stage, layer, layers).values():
                readers.setdefault(source, []).append((layer, stage.name))
    keys, found, waiting = set(recorded), set[Place](), [changed]
    seen: set[Place] = set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        if forward_key(place) in keys:
            found.add(place)
        else:
            waiting += readers.get(place, [])
    return found


# -- what is said of it -------------------------------------------------------------------------------------------


def planted_rows(
    fields: Mapping[str, Any], names: Sequence[str], model: Path, wrong: Path, right: Path, scratch: Path
) -> list[dict[str, Any]]:
    """One row a profile of a planted fault with these `fields` (`Trial.fields`).

    Its folder `wrong` is then removed; `right` is the run without it.
    """
    of, file = str(fields["specimen"]), scratch / f"{wrong.parent.name}-{wrong.name}.safetensors"
    specimen, was, is_now = SPECIMENS[of], arrays_of(right), arrays_of(wrong)
    changed = _changed(fields)
    rows = []
    for name in names:
        kept = PROFILES[name].recorded(is_now, specimen)
        said = audit_arrays(file, kept, model, specimen.token_ids())
        shows = set().union(*(first_recorded(path_of(of), specimen.layers, kept, place) for place in changed))
        rows.append({"profile": name, **fields, **judged(changed, said, shows, was, is_now)})
    shutil.rmtree(wrong)
    return rows


def _changed(fields: Mapping[str, Any]) -> list[Place]:
    """The stage that a fault changes, or those that read the tensor that it changes."""
    path = path_of(str(fields["specimen"]))
    names = [s.name for s in path.values() if fields["changed"] in s.params] or [str(fields["changed"])]
    return [(fields["layer"] if path[name].scope is Scope.LAYER else None, name) for name in names]


def judged(
    changed: Sequence[Place], said: Mapping[str, Any], shows: set[Place], was: Arrays, is_now: Arrays
) -> dict[str, Any]:
    """Whether a fault in one of the places `changed` is claimed, and what an audit says; it must show in `shows`."""
    keys, right = {forward_key(at) for at in shows}, {forward_key(place) for place in changed}
    of_fault = [row for row in said.get("rows", ()) if row["key"] in keys]
    held = next((row for row in said.get("rows", ()) if row.get("recovered")), None)
    spans = shows
    if held is not None and LOGITS in shows.difference(changed):  # what comes before the head shows in what logits hold
        spans = {*shows, (None, held["stage"])}
        of_fault = [{**row, "floor": held["floor"]} if row["stage"] == LOGITS[1] else row for row in of_fault]
    sizes = [(_moved(was[row["key"]], is_now[row["key"]]), _floor(row, is_now)) for row in of_fault]
    moved, floor = max(sizes, key=lambda size: size[0] / max(size[1], 1e-30), default=(0.0, np.inf))
    culprit = said["culprit"] or dict.fromkeys(("layer", "stage", "verdict", "ratio", "hint"))
    found, at = said["outcome"] == "faulty", (culprit["layer"], culprit["stage"])
    at_span, blamed = found and at in spans, culprit.get("blamed") or []
    return {
        "claimed": moved > floor,
        "hidden": shows.isdisjoint(changed),
        "moved": _finite(moved),
        "span_floor": _finite(floor),
        "floor": _median_floor(said),
        "outcome": said["outcome"],
        "found": found,
        "at_span": at_span,
        "named": at_span and (not right.isdisjoint(blamed) if blamed else at in changed),
        "misnamed": found and bool(blamed) and right.isdisjoint(blamed),
        "verdict": culprit["verdict"],
        "ratio": culprit["ratio"],
        "stage": culprit["stage"],
        "named_layer": culprit["layer"],
        "blamed": blamed,
        "hint": culprit["hint"],
    }


def _moved(was: np.ndarray, is_now: np.ndarray) -> float:
    """RMS of the change of a tensor, relative to it."""
    before, now = was.astype(np.float64), is_now.astype(np.float64)
    changed = float(np.linalg.norm(now - before))
    return np.inf if not np.isfinite(changed) else changed / max(float(np.linalg.norm(before)), 1e-300)


def _floor(row: Mapping[str, Any], arrays: Arrays) -> float:
    if row["verdict"] == "unjudged":
        return np.inf
    if row.get("floor") is not None:
        return float(row["floor"])
    if row.get("through") and row.get("bound_rms"):
        size = float(np.sqrt(np.mean(np.square(arrays[row["key"]].astype(np.float64)))))
        return float(row["bound_rms"]) / max(size, 1e-300)
    return 0.0


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _median_floor(said: Mapping[str, Any]) -> float | None:
    floors = [f for row in said.get("rows", ()) if (f := row.get("floor")) is not None and np.isfinite(f)]
    return statistics.median(floors) if floors else None


# -- right runs ---------------------------------------------------------------------------------------------------


def is_small(specimen: Specimen) -> bool:
    """Whether a right run of it is judged under every profile."""
    return specimen.tokens <= _MOST_TOKENS and specimen.hidden <= _MOST_HIDDEN and specimen.dtype in DTYPES


def clean_rows(
    specimen: Specimen,
    model: Path,
    names: Sequence[str],
    engines: Sequence[str],
    folders: Sequence[Path],
    scratch: Path,
) -> list[dict[str, Any]]:
    """One row a right run and profile: of the dumps in `folders`, and of engines written apart."""
    runs = [(folder.parent.name, arrays_of(folder)) for folder in folders]
    rows = []
    for engine, arrays in (*runs, *((name, ENGINES[name].run(specimen)) for name in engines)):
        for name in names:
            kept = PROFILES[name].recorded(arrays, specimen)
            said = audit_arrays(scratch / f"{model.name}-{engine}.safetensors", kept, model, specimen.token_ids())
            rows.append(
                {
                    "profile": name,
                    "engine": engine,
                    **{n: v for n, v in dataclasses.asdict(specimen).items() if n != "rope"},
                    "outcome": said["outcome"],
                    "floor": _median_floor(said),
                    "verdict": said["verdict"] if said["outcome"] == "faulty" else None,
                    "worst_ratio": max((row["ratio"] or 0.0 for row in said.get("rows", ())), default=0.0),
                }
            )
    return rows


# -- tallies ------------------------------------------------------------------------------------------------------


def tallies(rows: Sequence[Mapping[str, Any]], clean: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each profile and dtype: faults planted, claimed, found, named; the median floor; right runs and alarms."""
    found = []
    for name, profile in PROFILES.items():
        for dtype in DTYPES:
            of = [row for row in rows if (row["profile"], row["dtype"]) == (name, dtype)]
            right = [row for row in clean if (row["profile"], row["dtype"]) == (name, dtype)]
            if of or right:
                found.append({"profile": name, "doc": profile.doc, "dtype": dtype, **_tally(of, right)})
    return found


def _tally(rows: Sequence[Mapping[str, Any]], clean: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    claimed = [row for row in rows if row["claimed"]]
    floors = [row["floor"] for row in rows if row["floor"] is not None]
    return {
        "planted": len(rows),
        "claimed": len(claimed),
        **{name: sum(row[name] for row in claimed) for name in ("found", "at_span", "named")},
        "hidden": sum(row["hidden"] for row in claimed),
        "hidden_named": sum(row["named"] for row in claimed if row["hidden"]),
        "found_below": sum(row["found"] for row in rows if not row["claimed"]),
        "misnamed": sum(row["misnamed"] for row in rows),
        "floor": statistics.median(floors) if floors else None,
        "clean": len(clean),
        "false_alarms": sum(row["outcome"] in ("faulty", "refused") for row in clean),
    }


def reached(tally: Mapping[str, Any]) -> bool:
    """Whether a profile has no false alarm, and of claimed float32 faults so many found in the span as is its goal."""
    enough = tally["at_span"] >= PROFILES[tally["profile"]].found * tally["claimed"]
    return not tally["false_alarms"] and (enough or tally["dtype"] != "float32")
