"""The verdict of one side on one stage: from the stage's own recorded inputs, by the recipe that gives what it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.oracle import bounds as noise
from stages.oracle.verdict import Judged, Oracle, Verdict, judged_part, measure, worst
from stages.recipes.catalogue import forms_of, kind_of
from stages.recipes.match import Found, explain
from stages.recipes.recipe import Class
from stages.spec.noise import Noise


@dataclass
class SideVerdict:
    """Verdict of one side on one stage, over all chunks added; `ratio` is the largest error / bound.

    `elementwise` is the worst verdict on any element, `reason` what is known of it: of `precision` and `bug`, which
    recipe gives what was recorded. `recipe`, of its class `kind`, is that of the worst chunk, which gives `bits` of
    all `elements`; `usual` says who computes so by itself, `nearest` which recipe comes next. `verdict` is also
    `suspect` when every element is within its bound and all together err too much. `rule` is what a side's own
    precision promises (promise.py).
    """

    elementwise: Verdict = Verdict.EXACT
    ratio: float = 0.0
    reason: str | None = None
    rule: str | None = None
    squares: float = 0.0
    count: int = 0
    rms_limit: float = np.inf
    recipe: str | None = None
    kind: Class | None = None
    usual: str | None = None
    nearest: str | None = None
    bits: int = 0
    elements: int = 0

    @property
    def verdict(self) -> Verdict:
        return worst(self.elementwise, Verdict.SUSPECT) if self.systematic else self.elementwise

    @property
    def hint(self) -> str | None:
        if self.reason is None and self.elementwise.passes and self.systematic:
            times = self.rms_ratio / self.rms_limit
            return f"no element is beyond its bound, but all together err {times:.2g} times as much as rounding may"
        return self.reason

    @property
    def rms_ratio(self) -> float:
        """RMS of error / bound over the stage's elements."""
        return float(np.sqrt(self.squares / max(self.count, 1)))

    @property
    def systematic(self) -> bool:
        """Whether the errors of all elements together are larger than right kernels' rounding."""
        return self.count >= noise.RMS_COUNT and self.rms_ratio > self.rms_limit

    def recipe_fields(self) -> dict[str, Any]:
        """What a report says of the recipe."""
        return {
            "recipe": self.recipe,
            "class": self.kind.value if self.kind is not None else None,
            "bits": self.bits,
            "elements": self.elements,
            "usual": self.usual,
            "runner_up": self.nearest,
        }

    def add(self, oracle: Oracle, observed: np.ndarray) -> Verdict:
        """Judge one chunk, and return its verdict; where the prescribed recipe does not give it, ask which one does."""
        observed = judged_part(oracle.stage, observed)
        judged = measure(oracle, observed)
        ask = judged.verdict in (Verdict.SUSPECT, Verdict.BUG) and oracle.stage.noise is not Noise.CHOICE
        # Through inputs that were not recorded what is within bounds that were carried is named too.
        ask |= bool(oracle.hidden) and judged.verdict is Verdict.ROUNDING
        found = explain(oracle, observed) if ask else None
        verdict = judged.verdict if found is None or found.kind is None else _VERDICTS[found.kind]
        if found is not None and found.kind is not None and found.kind.sound and found.bits == found.elements:
            verdict = Verdict.EXACT
        if self.recipe is None or worst(self.elementwise, verdict) is not self.elementwise:
            self._tell(oracle, judged, found, verdict)
        # What was carried is judged as such, whichever recipe is nearest.
        told = found is not None and found.kind is not None and found.kind.sound and oracle.typical is None
        right = Judged(verdict, found.ratio) if found is not None and told else judged
        self.ratio = max(self.ratio, right.ratio)
        self.squares, self.count = self.squares + right.squares, self.count + right.count
        self.bits += judged.bits if found is None else found.bits
        self.elements += observed.size
        # Of RoPE's tables, which err alike in all rows, no RMS was measured.
        sure = oracle.unsure is None
        limit = noise.rms_limit(oracle.stage.noise, observed.dtype, oracle.lambdas) if sure else np.inf
        self.rms_limit = limit if oracle.typical is None else noise.RMS_THROUGH
        return verdict

    def _tell(self, oracle: Oracle, judged: Judged, found: Found | None, verdict: Verdict) -> None:
        self.elementwise = worst(self.elementwise, verdict)
        if found is None or found.kind is None:
            passes = judged.verdict.passes and oracle.unsure is None
            self.recipe, self.kind = (_prescribed(oracle), Class.PRESCRIBED) if passes else (None, None)
            self.nearest, self.reason = found.nearest if found is not None else None, None
            if self.nearest and verdict is Verdict.SUSPECT:
                self.reason = f"no known recipe gives it; the nearest is: {self.nearest}"
            return
        self.recipe, self.kind, self.usual = found.words, found.kind, found.usual or None
        self.nearest = found.nearest or None
        self.reason = None if found.kind.sound else f"{found.words} ({found.usual})" if found.usual else found.words


_VERDICTS = {
    Class.PRESCRIBED: Verdict.ROUNDING,
    Class.EQUIVALENT: Verdict.ROUNDING,
    Class.NARROWER: Verdict.PRECISION,
    Class.OTHER: Verdict.BUG,
}


def _prescribed(oracle: Oracle) -> str | None:
    """The prescribed recipe in words; None of a stage that no row describes."""
    kind = kind_of(oracle.stage)
    return None if kind is None else forms_of(kind, oracle.stage.dtype, Class.PRESCRIBED)[0].words
