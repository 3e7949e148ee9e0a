"""Whether U, S and V are a decomposition of a weight, and if not, in what way: the one place that says so.

`svf verify`, `layouts`, `replay`, `audit` and `diff` ask here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.files.bundle import BundleEntry, Components
from stages.files.selection import layer_of
from stages.judge.arrangements import NO_ARRANGEMENT, Parts, StoredRows, fitting_layouts, why_none_fits
from stages.oracle.bounds import residual_bound

# The stage that shows it: the replay with zero offsets, which must give the weight back.
SHOWN_BY = "zero_source_f32"
# Elements of U handled at a time, in float64.
_BLOCK = 1 << 22
# An entry of M^T M - I beyond its bound moves one sum by as much, whatever the signs; what is right moves it by less
# than half as much. Only a matrix that moves a sum by half its bound is multiplied out.
_PROBES, _DOUBTFUL = 2, 0.5


@dataclass(frozen=True)
class Fault:
    """Why zero offsets do not give `tensor` back, or are no test of it.

    `components`: U, S and V themselves are at fault; else how they were contracted, or it is not known which.
    """

    tensor: str
    reason: str
    components: bool = True
    stage: str = SHOWN_BY

    def row(self, side: str | None, ratio: float | None) -> dict[str, Any]:
        """The fault as a document lists it, of one side or of `both`; `ratio`: of the residual to its bound."""
        fields = {"tensor": self.tensor, "stage": self.stage, "side": side, "ratio": ratio}
        return {**fields, "reason": self.reason, "components": self.components}


def not_known(tensor: str) -> Fault:
    """What can be said of a misfit when the components are unavailable."""
    return Fault(tensor, "V is contracted the wrong way, or U, S, V are not this tensor's", components=False)


def parts_of(components: Components, source: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> Parts:
    """The components of a tensor with the `[rows, cols]` source that they should be of."""
    return Parts(StoredRows(*components.stored_u), components.s, components.v, source, shape)


def fault_of(parts: Parts, entry: BundleEntry, layout: str, *, fits: bool | None) -> Fault | None:
    """The gravest fault of the components under `layout`; None when they are a decomposition as far as is known.

    `fits` is whether the zero-offset replay gave the source back, None where that is not known.
    """
    own = next(own_faults(parts), None)
    matches = fitting_layouts(parts) if fits is False else [layout]
    if layout in matches:  # they are the weight's, whatever a stage made of them
        return Fault(entry.source_name, own) if own else None
    if entry.layout in matches:
        reason = f"V was contracted as {layout}, and it is stored as {entry.layout}"
        return Fault(entry.source_name, reason, components=False)
    reason = why_none_fits(parts, entry, matches)
    reason = own if own and reason.startswith(NO_ARRANGEMENT) else reason
    if entry.identity.get("source_f32", told := _sha256(parts)) != told:
        said = f"the weight has another sha256 than the bundle's manifest says; against it, {reason}"
        return Fault(entry.source_name, said, components=False, stage="source_f32")
    return Fault(entry.source_name, reason)


def _sha256(parts: Parts) -> str:
    """sha256 of the float32 source."""
    digest = hashlib.sha256()
    for start, stop in parts.chunks():
        digest.update(np.ascontiguousarray(parts.source(start, stop)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def with_faults(faults: Sequence[Mapping[str, Any]], culprits: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A document's culprits: components at fault come first, since all else follows from them; what is not known of
    them explains a row that failed, and is the culprit where none did."""
    own = [_culprit(fault) for fault in faults if fault["components"]]
    if own or not faults or not culprits:
        return [*own, *culprits] or [_culprit(fault) for fault in faults]
    return [{**culprits[0], "hint": culprits[0]["hint"] or faults[0]["reason"]}, *culprits[1:]]


def in_words(faults: Sequence[Mapping[str, Any]], where: str) -> str | None:
    """The sentence on the first components that are at fault, of `where`; None when none are."""
    own = [fault for fault in faults if fault["components"]]
    if not own:
        return None
    more = f"; {len(own) - 1} more tensors are at fault" if len(own) > 1 else ""
    missed = f" (zero offsets miss it by {ratio:.3g} times the bound)" if (ratio := own[0]["ratio"]) else ""
    return f"U, S, V of {own[0]['tensor']}{where} are not its decomposition: {own[0]['reason']}{missed}{more}."


def _culprit(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "side": fault["side"],
        "layer": layer_of(fault["tensor"]),
        "tensor": fault["tensor"],
        "stage": fault["stage"],
        "verdict": "bug",
        "ratio": fault["ratio"],
        "hint": fault["reason"],
    }


def orthogonality_bound(rank: int) -> float:
    """Largest |U^T U - I| of a float32 decomposition: the bound of its residual, 16 u sqrt(rank).

    Each element is a sum of float32 roundings of unit vectors. Seen: 3.0 u sqrt(rank) (torch.svd in float32), below
    0.1 u sqrt(rank) (float64, rounded once), at ranks 64 to 1,024.
    """
    return residual_bound(rank)


def own_faults(parts: Parts) -> Iterator[str]:
    """What is wrong with U, V and S by themselves: columns that are no orthonormal set, singular values that rise."""
    rank = parts.s.size
    # By shape where it tells: a V of the wrong layout is one finding, not two. A square orthogonal V is both.
    v = parts.v if parts.v.shape[1] == rank else parts.v.T
    for name, matrix in (("U", parts.u), ("V", v)):
        if matrix.shape[1] == rank and _doubtful(matrix.__getitem__, matrix.shape[0], rank):
            worst, (i, j) = _deviation(matrix.__getitem__, matrix.shape[0], rank)
            if not worst <= orthogonality_bound(rank):
                yield (
                    f"{name}^T {name} is not the identity: off by {worst:.2g} at [{i}, {j}], rounding explains "
                    f"{orthogonality_bound(rank):.2g}"
                )
    yield from _rising(parts.s)


def _rising(s: np.ndarray) -> Iterator[str]:
    """Neighbours that rise by more than they are known to: each is off by the whole residual at most."""
    wide = s.astype(np.float64)
    room = 2 * residual_bound(s.size) * float(np.linalg.norm(wide))
    rising = np.flatnonzero(np.diff(wide) > room)
    if rising.size:
        at = int(rising[0])
        yield f"S is not descending at index {at + 1}: {s[at]:g}, then {s[at + 1]:g}"


Rows = Callable[[slice], np.ndarray]


def _blocks(read: Rows, rows: int, rank: int) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK // rank)
    for start in range(0, rows, step):
        yield read(slice(start, min(rows, start + step))).astype(np.float64)


def _doubtful(read: Rows, rows: int, rank: int) -> bool:
    """Whether M^T M - I may have an entry beyond its bound, from M^T (M x) - x for a few x of +1 and -1."""
    x = np.random.default_rng(0).choice([-1.0, 1.0], (rank, _PROBES))
    product = np.zeros_like(x)
    for block in _blocks(read, rows, rank):
        product += block.T @ (block @ x)
    return not float(np.abs(product - x).max(initial=0.0)) <= _DOUBTFUL * orthogonality_bound(rank)


def _deviation(read: Rows, rows: int, rank: int) -> tuple[float, tuple[int, int]]:
    """Largest |M^T M - I| of a matrix M [rows, rank] read by rows, in float64, and where."""
    product = np.zeros((rank, rank))
    for block in _blocks(read, rows, rank):
        product += block.T @ block
    error = np.abs(product - np.eye(rank))
    i, j = np.unravel_index(int(error.argmax()), error.shape)
    return float(error[i, j]), (int(i), int(j))
