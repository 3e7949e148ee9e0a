"""Noise constants as measured on one machine and backend: when they replace the shipped ones, and where they are kept.

docs/findings/rms.md says why a measured constant may loosen a bound, and how far.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stages.errors import InputError, OutputError, shown
from stages.files.cache import accumulation, cache_folder
from stages.files.jsonio import read_object, write_json
from stages.oracle.bounds import LAMBDA, RMS, RMS_FACTOR, Lambdas
from stages.oracle.cores import cores_of
from stages.spec.backend import Backend
from stages.spec.noise import Noise

SCHEMA = "svf.calibrate/1"
FACT, SHIPPED = "calibration", "shipped"
# Other inputs find somewhat worse elements than those measured: the shipped lambdas are 1.3 to 3 times what was seen.
SAFETY = 1.25
# Beyond twice the shipped lambda it is not another order of summation: TF32-like products are 430 times theirs.
CAP = 2.0
# As Python prints three digits of it.
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"


@dataclass(frozen=True)
class Calibration:
    """What a backend was seen to do: per kind the largest |error| / bound and the RMS of it, both at lambda 1."""

    date: str
    seen: Mapping[Noise, float]
    rms: Mapping[Noise, float]

    @property
    def lambdas(self) -> Lambdas:
        """The lambdas to judge by: shipped, or `SAFETY` times what was seen where that is more; never less."""
        return Lambdas({kind: max(shipped, SAFETY * self.seen.get(kind, 0.0)) for kind, shipped in LAMBDA.items()})

    @property
    def faults(self) -> list[str]:
        """Why this must not be used, one line a kind: it is not rounding that was measured."""
        found = [
            f"{kind.value}: errors reach {self.seen[kind]:.3g} times the noise scale; right kernels stay below "
            f"{limit_seen(kind):.3g}"
            for kind in self.seen
            if self.seen[kind] > limit_seen(kind)
        ]
        return found + [
            f"{kind.value}: the RMS of errors is {self.rms[kind]:.3g} of the noise scale; right kernels stay below "
            f"{RMS_FACTOR * RMS[kind]:.3g}"
            for kind in self.rms
            if kind in RMS and self.rms[kind] > RMS_FACTOR * RMS[kind]
        ]

    @property
    def fact(self) -> str:
        """What a dump says of it: the date, then per kind what was seen and the lambda it is judged by."""
        lambdas = self.lambdas
        kinds = (f"{kind.value} {self.seen[kind]:.3g}/{lambdas[kind]:.3g}" for kind in LAMBDA if kind in self.seen)
        return f"{self.date}: {', '.join(kinds)}"


def limit_seen(kind: Noise) -> float:
    """The largest |error| / bound at lambda 1 that a calibration may have seen of a kind; of an exact one, rounding."""
    return LAMBDA[kind] if kind is Noise.EXACT else CAP * LAMBDA[kind] / SAFETY


def lambdas_of(facts: Mapping[str, str], where: str) -> Lambdas:
    """The lambdas that a dump is judged by, as its facts record them; the shipped ones where they do not.

    The tensor cores are those of the device that its facts name.
    `InputError` naming `where` for a fact that is none, or that loosens a bound further than a calibration may.
    """
    text, cores = facts.get(FACT, SHIPPED), cores_of(facts.get("device"))
    if text == SHIPPED:
        return replace(LAMBDA, cores=cores)
    kinds = {kind.value: kind for kind in LAMBDA}
    lambdas = dict(LAMBDA)
    date, _, parts = str(text).partition(": ")
    for part in parts.split(", ") if parts else [""]:
        found = re.fullmatch(rf"([a-z ]+) {_NUMBER}/({_NUMBER})", part)
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", date) or not found or found[1] not in kinds:
            raise InputError(f"{where}: fact '{FACT}' is '{shown(text)}', expected '{SHIPPED}' or a calibration's")
        kind, value = kinds[found[1]], float(found[2])
        # Three digits are written.
        if not 0.99 * LAMBDA[kind] <= value <= 1.01 * (1 if kind is Noise.EXACT else CAP) * LAMBDA[kind]:
            raise InputError(
                f"{where}: fact '{FACT}' judges {kind.value} by lambda {value:g}; a calibration may have "
                f"{LAMBDA[kind]:g} to {CAP * LAMBDA[kind]:g}"
            )
        lambdas[kind] = max(value, LAMBDA[kind])
    return Lambdas(MappingProxyType(lambdas), cores)


def facts_of(backend: Backend) -> dict[str, str]:
    """A backend's facts, the processor, the calibration it is judged by, and its orders of summation if probed."""
    facts = {**backend.facts(), "cpu": cpu_model()}
    known = load(facts)
    return {**facts, FACT: known.fact if known else SHIPPED, **accumulation(facts, facts["cpu"])}


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def place(facts: Mapping[str, str]) -> Path:
    """A calibration's file, by what may change results: facts of backend and machine, and the shipped constants."""
    key = {"facts": {k: v for k, v in facts.items() if k != FACT}, "lambda": dict(LAMBDA), "rms": dict(RMS)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "calibration" / f"{digest}.json"


def load(facts: Mapping[str, str]) -> Calibration | None:
    """The calibration of exactly this backend and machine, if there is one."""
    path = place(facts)
    if not path.is_file():
        return None
    document = read_object(path)
    try:
        seen, rms = ({Noise(k): float(v) for k, v in document[part].items()} for part in ("seen", "rms"))
        known = Calibration(str(document["date"]), seen, rms)
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: is no calibration; delete it, and run 'svf calibrate' again") from None
    if known.faults:
        raise InputError(f"{path}: {known.faults[0]}; delete it, and run 'svf calibrate' again")
    return known


def store(facts: Mapping[str, str], found: Calibration) -> Path | None:
    """Keep a calibration; one with faults is not kept, and takes an older one with it. Returns the file, or None."""
    path = place(facts)
    if found.faults:
        path.unlink(missing_ok=True)
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error.strerror}; set SVF_CACHE") from None
    numbers = {part: {k.value: v for k, v in getattr(found, part).items()} for part in ("seen", "rms")}
    write_json(path, {"schema": SCHEMA, "date": found.date, **numbers, "facts": dict(facts)})
    return path


def document(backend: str, facts: Mapping[str, str], found: Calibration, path: Path | None) -> dict[str, Any]:
    """What `svf calibrate` says of one backend."""
    lambdas = found.lambdas
    kinds = [
        {
            "kind": kind.value,
            "seen": found.seen[kind],
            "shipped": LAMBDA[kind],
            "lambda": lambdas[kind],
            "most": limit_seen(kind),
            "rms": found.rms.get(kind),
            "rms_shipped": RMS.get(kind),
        }
        for kind in LAMBDA
        if kind in found.seen
    ]
    return {
        "backend": backend,
        "outcome": "faulty" if found.faults else "calibrated",
        "faults": found.faults,
        "kinds": kinds,
        "fact": found.fact if not found.faults else SHIPPED,
        "file": str(path) if path else None,
        "facts": dict(facts),
    }


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
