"""What a precision promises of a recorded stage: `exact` one result, `reference` one or the other side of a tie."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.errors import InputError, UsageError
from stages.files.dump import MANIFEST_FILE, Dump
from stages.oracle.exact import decide, tie_band
from stages.oracle.verdict import Oracle, Verdict, judged_part
from stages.recipes.side import SideVerdict
from stages.run.precision import EXACT, REFERENCE
from stages.spec.dtypes import stored_dtype

# Precision -> the rule that rows name.
RULES = {
    EXACT: "bound 0: the correctly rounded result",
    REFERENCE: "within float64's own error of a tie, else the correctly rounded result",
}


def enforce_precision(verdict: SideVerdict, precision: str | None, oracle: Oracle, observed: np.ndarray) -> None:
    """Make `verdict` a bug where `observed` breaks what a side's `precision` promises; native promises nothing.

    It promises bits of recorded inputs: of those that had to be computed nothing follows.
    """
    if precision not in RULES or observed.shape != oracle.value.shape or oracle.unsure is not None:
        return
    verdict.rule = RULES[precision]
    broken = breaches(precision, oracle, observed)
    if broken and verdict.verdict in (Verdict.EXACT, Verdict.ROUNDING, Verdict.SUSPECT):
        verdict.elementwise, verdict.ratio = Verdict.BUG, np.inf
        verdict.reason = f"{broken:,} of {observed.size:,} elements are not what {precision} precision gives"


def breaches(precision: str, oracle: Oracle, observed: np.ndarray) -> int:
    """How many elements are not what `precision` gives from the oracle's arguments; +0 and -0 are one value."""
    stage, dtype = oracle.stage, stored_dtype(oracle.stage.dtype)
    observed = judged_part(stage, observed)
    if stage.identity:
        return _differing(observed, oracle.rounded)
    if precision == EXACT:
        decided = decide(stage.function, oracle.value, oracle.arguments, oracle.options, dtype).array
        return _differing(observed, judged_part(stage, decided))
    band = tie_band(stage.function, oracle.value, oracle.arguments, oracle.options, dtype)
    low, high = (judged_part(stage, end) for end in band)
    inside = (low <= observed) & (observed <= high)
    return int(np.count_nonzero(~inside & ~(np.isnan(observed) & np.isnan(low))))


def _differing(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b))))


def require_precision(precision: str | None, *folders: Path) -> None:
    """`InputError` unless every dump was made in `precision`; None requires nothing."""
    for folder in folders if precision is not None else ():
        if not (folder / MANIFEST_FILE).is_file():
            raise UsageError(
                f"{folder}: --precision applies to dumps; bundles, files and reports do not record their precision"
            )
        dump = Dump(folder)
        found = dump.facts.get("precision", "not recorded")
        dump.close()
        if found != precision:
            raise InputError(f"{folder}: its precision is {found}, expected {precision} as --precision says")
