"""Every way of contracting a tensor's stored U, S and V, against its source: which gives it back, and why none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stages.files.bundle import BundleEntry
from stages.files.tensorfile import TensorFile
from stages.oracle.bounds import residual_bound
from stages.oracle.residual import Residual
from stages.spec.layouts import LAYOUTS

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


def units_of(parts: Parts) -> dict[str, float | None]:
    """Layout -> residual over its bound; None where V does not fit by shape."""
    residuals = {turned: residual(parts, parts.u, parts.v.T if turned else parts.v) for turned in (True, False)}
    return {name: _units(residuals[layout.transposed], parts) for name, layout in LAYOUTS.items()}


def fitting_layouts(parts: Parts) -> list[str]:
    """The layouts under which the components give the source back."""
    return [name for name, value in units_of(parts).items() if value is not None and value <= 1]


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
