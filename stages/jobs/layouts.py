"""Which layout is the right one: every way of contracting a bundle's U, S and V, against the source tensor.

With zero offsets the right one gives the source back to a few rounding errors, a wrong one misses it by about its own
size. A label is never believed, and a square matrix, whose shape fits everything, is told like any other.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.files.bundle import Bundle, BundleEntry, RecordedStages, component_keys
from stages.files.source import ModelSource, open_model
from stages.jobs.builtin import default_source
from stages.judge.arrangements import Parts, StoredRows, units_of, why_none_fits
from stages.progress import Progress
from stages.spec.layouts import LAYOUTS

EXIT_CODES = {"agree": 0, "contradicted": 1, "incomplete": 5}


def diagnose(components: Path | None, model: str | None, progress: Progress) -> dict[str, Any]:
    """The `svf.layouts/1` document of a component bundle; without one, of the built-in default."""
    if components is None:
        folder, fresh = default_source()
        components = folder / "components"
        progress.say(f"no bundle given: using the built-in tiny one {'made now ' if fresh else ''}in {components}")
    with ExitStack() as stack:
        bundle = stack.enter_context(Bundle(components))
        checkpoint = None if model is None else stack.enter_context(open_model(model))
        recorded = [r for r in (bundle.recorded(all_selected=True), bundle.recorded(all_selected=False)) if r]
        for one in recorded:
            stack.callback(one.close)
        rows = []
        for number, entry in enumerate(bundle.entries):
            progress(f"trying layouts of {entry.source_name}", number / len(bundle.entries))
            rows.append(_row(entry, _parts(bundle, entry, recorded, checkpoint)))
        source = model if model is not None else f"source_f32 in {components}"
        return {**_document(rows), "components": str(components), "source": source}


def _parts(
    bundle: Bundle, entry: BundleEntry, recorded: list[RecordedStages], checkpoint: ModelSource | None
) -> Parts | None:
    """The tensor's components unchecked, since what is wrong with them is the question; None without a source."""
    keys = component_keys(entry.source_name)
    u = StoredRows(bundle.components, keys["u"])
    s, v = (bundle.components.read(keys[part]) for part in ("s", "v"))
    if len(u.shape) != 2 or v.ndim != 2 or s.ndim != 1:
        raise InputError(f"{bundle.folder}: '{entry.source_name}': expected matrices U and V and a vector S")
    if checkpoint is not None:
        name = checkpoint.resolve(entry.source_name)
        weights, shape = checkpoint, checkpoint.info(name).shape
        return Parts(u, s, v, lambda a, z: weights.read(name, a, z).astype(np.float32), (shape[0], shape[1]))
    for stages in recorded:
        info = stages.infos(entry.source_name).get("source_f32")
        if info is not None and len(info.shape) == 2:
            return Parts(u, s, v, StoredRows(stages.file, info.name).read, (info.shape[0], info.shape[1]))
    return None


def _row(entry: BundleEntry, parts: Parts | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tensor": entry.source_name,
        "declared": entry.layout,
        "matches": [],
        "ambiguous": None,
        "residuals": dict.fromkeys(LAYOUTS),
        "fits": None,
        "bound": None,
        "shape": list(entry.shape),
        "note": "no source_f32 is recorded; give --model",
    }
    if parts is None:
        return row
    units = units_of(parts)
    matches = [name for name, value in units.items() if value is not None and value <= 1]
    fits = entry.layout in matches
    return row | {
        "matches": matches,
        "ambiguous": len(matches) > 1,
        "residuals": units,
        "fits": fits,
        "bound": parts.bound,
        "note": _told(entry.layout, matches) if fits else why_none_fits(parts, entry, matches),
    }


def _told(declared: str, matches: list[str]) -> str | None:
    """What the data cannot tell, of a tensor whose declared layout fits."""
    others = [name for name in matches if LAYOUTS[name].transposed != LAYOUTS[declared].transposed]
    if others:
        return f"the data cannot tell {declared} from {', '.join(others)}: V is symmetric as far as this tensor shows"
    alike = [name for name in matches if name != declared]
    return f"{declared} and {', '.join(alike)} contract alike: the data cannot tell them apart" if alike else None


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    judged = [row for row in rows if row["fits"] is not None]
    wrong = [row for row in judged if not row["fits"]]
    outcome = "contradicted" if wrong else "agree" if judged and len(judged) == len(rows) else "incomplete"
    if wrong:
        more = f" ({len(wrong)} tensors in all)" if len(wrong) > 1 else ""
        verdict = (
            f"The declared layout {wrong[0]['declared']} does not give {wrong[0]['tensor']} back: "
            f"{wrong[0]['note']}{more}."
        )
    elif outcome == "incomplete":
        verdict = f"Only {len(judged)} of {len(rows)} tensors have a source to be judged by; give --model."
    else:
        verdict = f"Every declared layout gives its tensor back, in all {len(rows)}."
    return {"schema": "svf.layouts/1", "outcome": outcome, "verdict": verdict, "tensors": rows}
