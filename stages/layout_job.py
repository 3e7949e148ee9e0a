"""Which layout is the right one: every way of contracting a bundle's U, S and V, against the source tensor.

With zero offsets the right one gives the source back to a few rounding errors, a wrong one misses it by about its own
size. A label is never believed, and a square matrix, whose shape fits everything, is told like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.bundle import Bundle, BundleEntry, RecordedStages, component_keys
from stages.checkpoint import Checkpoint, open_checkpoint
from stages.defaults import default_source
from stages.errors import InputError
from stages.layouts import LAYOUTS
from stages.metrics import Residual
from stages.noise import residual_bound
from stages.progress import Progress
from stages.tensorfile import TensorFile

EXIT_CODES = {"agree": 0, "contradicted": 1, "incomplete": 5}
# A chunk of the source and of its reconstruction take about this much.
_CHUNK_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class StoredRows:
    """A stored matrix, read by rows when they are asked for."""

    file: TensorFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.info(self.key).shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.file.read(self.key, start, stop)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(rows.start, rows.stop)

    def whole(self) -> np.ndarray:
        return self.file.read(self.key)


Matrix = StoredRows | np.ndarray


@dataclass(frozen=True)
class Parts:
    """A tensor's stored components and source: arrays as stored, U and the source by rows."""

    u: StoredRows
    s: np.ndarray
    v: np.ndarray
    source: Callable[[int, int], np.ndarray]
    shape: tuple[int, int]  # of the source

    @property
    def bound(self) -> float:
        return residual_bound(self.s.size)

    def chunks(self) -> Iterator[tuple[int, int]]:
        rows = max(1, _CHUNK_BYTES // (8 * self.shape[1]))
        return ((at, min(at + rows, self.shape[0])) for at in range(0, self.shape[0], rows))


def diagnose(components: Path | None, model: str | None, progress: Progress) -> dict[str, Any]:
    """The `svf.layouts/1` document of a component bundle; without one, of the built-in default."""
    if components is None:
        folder, fresh = default_source()
        components = folder / "components"
        progress.say(f"no bundle given: using the built-in tiny one {'made now ' if fresh else ''}in {components}")
    with ExitStack() as stack:
        bundle = stack.enter_context(Bundle(components))
        checkpoint = None if model is None else stack.enter_context(open_checkpoint(model))
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
    bundle: Bundle, entry: BundleEntry, recorded: list[RecordedStages], checkpoint: Checkpoint | None
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
    units = _units_of(parts)
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


def _units_of(parts: Parts) -> dict[str, float | None]:
    """Layout -> residual over its bound; None where V does not fit by shape."""
    residuals = {turned: residual(parts, parts.u, parts.v.T if turned else parts.v) for turned in (True, False)}
    return {name: _units(residuals[layout.transposed], parts) for name, layout in LAYOUTS.items()}


def fitting_layouts(parts: Parts) -> list[str]:
    """The layouts under which the components give the source back."""
    return [name for name, value in _units_of(parts).items() if value is not None and value <= 1]


def residual(parts: Parts, left: Matrix, right: np.ndarray, *, turned: bool = False) -> float | None:
    """|W - left diag(S) right|_F / |W|_F by rows of W, of its transpose when `turned`; None where shapes do not fit."""
    (rows, cols), rank = parts.shape[::-1] if turned else parts.shape, parts.s.size
    if left.shape != (rows, rank) or right.shape != (rank, cols):
        return None
    found = Residual()
    with np.errstate(all="ignore"):  # components with a NaN miss the source by a NaN
        whole = _whole(left) if turned else None
        for start, stop in parts.chunks():
            source = parts.source(start, stop)
            if whole is not None:
                found.add(source, (right[:, start:stop].T * parts.s) @ whole.T)
            else:
                found.add(source, (left[start:stop] * parts.s) @ right)
    return found.relative


def _whole(matrix: Matrix) -> np.ndarray:
    return matrix.whole() if isinstance(matrix, StoredRows) else matrix


def _units(relative: float | None, parts: Parts) -> float | None:
    return None if relative is None else relative / parts.bound


def _told(declared: str, matches: list[str]) -> str | None:
    """What the data cannot tell, of a tensor whose declared layout fits."""
    others = [name for name in matches if LAYOUTS[name].transposed != LAYOUTS[declared].transposed]
    if others:
        return f"the data cannot tell {declared} from {', '.join(others)}: V is symmetric as far as this tensor shows"
    alike = [name for name in matches if name != declared]
    return f"{declared} and {', '.join(alike)} contract alike: the data cannot tell them apart" if alike else None


# What is said when nothing explains it.
NO_ARRANGEMENT = "no arrangement gives the source back"


def why_none_fits(parts: Parts, entry: BundleEntry, matches: list[str]) -> str:
    """Why the declared layout does not fit: another one does, or the parts are rearranged, or they are another's."""
    if matches:
        return f"the label is wrong: V is stored as {' or '.join(matches)}"
    if not all(np.isfinite(part).all() for part in (parts.s, parts.v, parts.u.whole())):
        return "U, S or V has NaN or infinity"
    for text, left, right, turned in _arrangements(parts, entry):
        relative = residual(parts, left, right, turned=turned)
        if relative is not None and relative <= parts.bound:
            return text
    for text, left, right, turned in (*_stored(parts), *_arrangements(parts, entry)):
        told = _other_s(parts, left, right, turned=turned)
        if told is not None:
            return f"{told} (with V as {text})" if text in LAYOUTS else f"{told}, and {text}"
    return f"{NO_ARRANGEMENT}: U, S, V are not this tensor's"


Arrangement = tuple[str, Matrix, np.ndarray, bool]


def _stored(parts: Parts) -> list[Arrangement]:
    return [("torch_v", parts.u, parts.v.T, False), ("vh", parts.u, parts.v, False)]


def _arrangements(parts: Parts, entry: BundleEntry) -> list[Arrangement]:
    """Other roles of the stored U and V, in words. W^T = U S V^T is W = V S U^T: which of the two, a shape may tell."""
    square = parts.shape[0] == parts.shape[1]
    if square:
        swapped = "the source is transposed, or U and V are swapped"
    elif parts.shape == entry.shape:
        swapped = "U and V are swapped"
    else:
        swapped = "the source is transposed"
    u, v = parts.u.whole(), parts.v
    return [
        (swapped, u, v.T, True),
        (f"{swapped}, V stored as vh", u, v, True),
        ("U is stored transposed", u.T, v.T, False),
        ("U is stored transposed, V as vh", u.T, v, False),
        ("U is stored transposed, and the source is transposed or U and V are swapped", u.T, v.T, True),
        ("U is stored transposed, V as vh, and the source is transposed or U and V are swapped", u.T, v, True),
    ]


def _other_s(parts: Parts, left: Matrix, right: np.ndarray, *, turned: bool) -> str | None:
    """Whether other singular values would give the source back: the stored ones permuted, scaled or of another sign.

    Where U and V are right, s_j is u_j^T W v_j; what the columns say of S needs no S.
    """
    (rows, cols), rank = parts.shape[::-1] if turned else parts.shape, parts.s.size
    if left.shape != (rows, rank) or right.shape != (rank, cols):
        return None
    found, whole = np.zeros(rank), _whole(left)
    for start, stop in parts.chunks():
        w = parts.source(start, stop)
        if turned:
            found += np.einsum("rj,rj->j", right[:, start:stop].T, w @ whole, dtype=np.float64)
        else:
            found += np.einsum("rj,rj->j", whole[start:stop], w @ right.T, dtype=np.float64)
    told = Parts(parts.u, found.astype(np.float32), parts.v, parts.source, parts.shape)
    relative = residual(told, left, right, turned=turned)
    if relative is None or relative > parts.bound:
        return None
    near = 1e-4 * float(np.abs(found).max(initial=0.0))
    if np.allclose(np.sort(found), np.sort(parts.s), rtol=0, atol=near):
        order = np.argsort(np.argsort(-found, kind="stable"), kind="stable")
        stored = np.argsort(-parts.s, kind="stable")[order]
        first = next((int(j) for j in range(rank) if stored[j] != j), 0)
        return f"the singular values are permuted: column {first} of U and V goes with S[{int(stored[first])}]"
    if np.allclose(np.sort(np.abs(found)), np.sort(np.abs(parts.s)), rtol=0, atol=near):
        signs = int(np.sum(found < 0))
        return f"{signs} pairs of columns have opposite signs in U and V"
    return f"S is not this tensor's, U and V are{_changed(np.sort(parts.s)[::-1], np.sort(found)[::-1], near)}"


def _changed(stored: np.ndarray, right: np.ndarray, near: float) -> str:
    """In which way all of S was changed, in words; both descending, equal within `near`."""
    top, low = float(stored[0]), float(stored[-1])
    if np.allclose(stored, np.minimum(right, top), rtol=0, atol=near):
        return (
            f": it is clipped at {top:g}, of {int((right > top + near).sum())} larger ones the largest is {right[0]:g}"
        )
    if low == 0 and np.allclose(stored, np.where(stored == 0, 0, right), rtol=0, atol=near):
        return f": its last {int((stored == 0).sum())} are 0, up to {float(right[stored == 0][0]):g}"
    if np.allclose(stored, np.maximum(right, low), rtol=0, atol=near):
        return (
            f": it is raised to {low:g}, of {int((right < low - near).sum())} smaller ones the least is {right[-1]:g}"
        )
    scale = float(stored @ right / (right @ right)) if right.any() else 0.0
    if scale and np.allclose(stored, scale * right, rtol=0, atol=near * max(1.0, abs(scale))):
        return f": it is {scale:.6g} times as large"
    return ""


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
