"""Two APRT files, flat: the format stores neither shape nor dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from stages.errors import IncompleteError, InputError, shown
from stages.files.aprt import AprtFile, layer_text
from stages.judge.metrics import Difference, PairHash
from stages.judge.replay import holds_nan, row_verdict
from stages.judge.rows import in_forward, pair_row
from stages.oracle.verdict import Verdict


def compare_files(a: AprtFile, b: AprtFile, *, top: int = 5) -> dict[str, Any]:
    """How `b` differs from `a`, as one row of `svf.diff/1`; flat, as its `note` says, so indices have one axis.

    Values alone have no bound. They are `unjudged` while they share digits, and the note says how many bits; a `bug`
    where no rounding gives them: in another order, or as far from a as zero would be. `InputError` for another count
    or layer, `IncompleteError` when there is no element to compare.
    """
    pair = f"not comparable: {a.path} and {b.path}"
    if a.layer != b.layer:
        raise InputError(f"{pair} are of {layer_text(a.layer)} and {layer_text(b.layer)}")
    if a.count != b.count:
        raise InputError(f"{pair} have {a.count} and {b.count} elements; do they hold the same tokens and positions?")
    if not a.count:
        raise IncompleteError(f"{a.path} and {b.path} are both empty: there is nothing to compare")
    difference, hashes = Difference(top), PairHash()
    for (start, x), (_, y) in zip(a.blocks(), b.blocks(), strict=True):
        block = Difference(top)
        block.add(x, y, start)
        hashes.add(x, y, equal=block.byte_match)
        difference.merge(block)
    digest_a, digest_b = hashes.digests()
    layer, stage = a.place[0], shown(a.stage)
    verdict, said = _told(difference, a, b)
    names = None if a.stage == b.stage else f"the files are called {stage} and {shown(b.stage)}"
    notes = ("compared flat: APRT stores no shape or dtype", names, said)
    return {
        **pair_row(in_forward((layer, stage)), verdict),
        "sha256_a": digest_a,
        "sha256_b": digest_b,
        "flat": True,
        "note": "; ".join(note for note in notes if note),
        **difference.result(),
    }


def _told(d: Difference, a: AprtFile, b: AprtFile) -> tuple[Verdict, str | None]:
    """The verdict on two files' values, and what can be said of them."""
    verdict = row_verdict(d, None, None, given=False)
    if verdict is not Verdict.UNJUDGED:
        return verdict, holds_nan(d, verdict)
    relative = d.result()["rel_l2"]
    if np.array_equal(np.sort(a.read()), np.sort(b.read())):
        return Verdict.BUG, "the same values in another order: are two axes swapped?"
    if relative >= 1:
        return (
            Verdict.BUG,
            f"b is as far from a as zero would be (relative difference {relative:.3g})",
        )
    bits = -np.log2(relative)
    return verdict, (
        f"they share about {bits:.1f} bits (relative difference {relative:.2g}); --model and --tokens judge each from "
        "the files beside it"
    )
