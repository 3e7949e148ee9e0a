"""Whether two sides' adapted weights differ because they decomposed one weight twice: basis, or bug.

Each side's U, S, V is compared with the float64 SVD of the source, found in that side's own basis:

    R = W - U S V^T        Y = U^T U - I        Z = V^T V - I        E = U^T R V + (Y S + S Z) / 2
    diag(S) + E = P diag(sigma) Q^T             (k x k, float64)
    D = G + (Y G + G Z) / 2 - P diag(sigma (1 + z)) Q^T,      G = S (1 + z)

so |D|, with R's part outside the basis, is how far this side's adapted weight is from that of the exact
decomposition. Two sides of right arithmetic differ by at most the sum of their |D|. It holds inside clusters too, where
first-order perturbation, |g_i - g_j| / |s_i - s_j| times the residual, does not (docs/findings/basis.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.oracle.bounds import U32, residual_bound

# Beyond this many times what the two decompositions explain, it is a bug. The triangle inequality allows sqrt(2); the
# rest is room for the float32 products. tests/judge/test_basis.py holds 18 cases below 1.5.
LIMIT = 4.0
# Singular vectors of the two sides with at least this overlap belong to one cluster. Chosen, not yet measured.
MIXED = 1e-3
# Clusters with a smaller share of the difference's squared norm are not worth a line.
_WORTH = 0.01


@dataclass
class _Sums:
    """What is accumulated over rows for one side; all float64."""

    residual: np.ndarray  # U^T R V, [k, k]
    gram: np.ndarray  # U^T U, [k, k]
    error: float = 0.0  # |R|_F^2
    norm: float = 0.0  # |W|_F^2

    def add(self, w: np.ndarray, u: np.ndarray, s: np.ndarray, v: np.ndarray) -> None:
        r = w - (u * s) @ v.T
        self.residual += u.T @ (r @ v)
        self.gram += u.T @ u
        self.error += float((r * r).sum())
        self.norm += float((w * w).sum())


@dataclass(frozen=True)
class Decomposed:
    """One side's U, S, V against the source: relative residual, departures from orthonormality and from sigma, and |D|.

    `away` is |D| relative to the adapted weight. Each of the others must be within `residual_bound(rank)`.
    """

    residual: float
    u: float
    v: float
    s: float
    away: float

    def faults(self, rank: int) -> list[str]:
        """What makes this no float32 decomposition of the source; empty when it is one."""
        named = {
            "U S V^T misses the weight by": self.residual,
            "the columns of U miss being orthonormal by": self.u,
            "the columns of V miss being orthonormal by": self.v,
            "S misses the singular values by": self.s,
        }
        limit = residual_bound(rank)
        return [f"{what} {value:.2g} (bound {limit:.2g})" for what, value in named.items() if not value <= limit]


def decomposed(sums: _Sums, s: np.ndarray, v: np.ndarray, offsets: np.ndarray) -> Decomposed:
    """How good one side's decomposition is, and how far its adapted weight is from the exact decomposition's."""
    k, one_plus, identity = s.size, 1 + offsets, np.eye(s.size)
    y, z = sums.gram - identity, v.T @ v - identity
    norm = float(np.sqrt(sums.norm)) or 1.0
    finite = all(np.isfinite(x).all() for x in (sums.residual, y, z))
    if not finite:
        return Decomposed(*(float("inf"),) * 5)
    e = sums.residual + (y * s + s[:, None] * z) / 2
    p, sigma, qt = np.linalg.svd(np.diag(s) + e)
    g = s * one_plus
    d = np.diag(g) + (y * g + g[:, None] * z) / 2 - (p * (sigma * one_plus)) @ qt
    outside = max(0.0, sums.error - float((sums.residual**2).sum())) * float(np.mean(one_plus**2))
    away = float(np.sqrt((d**2).sum() + outside)) / (float(np.linalg.norm(g)) or 1.0)
    root = float(np.sqrt(k))
    return Decomposed(
        float(np.sqrt(sums.error)) / norm,
        float(np.linalg.norm(y)) / root,
        float(np.linalg.norm(z)) / root,
        float(np.linalg.norm(s - sigma)) / norm,
        away,
    )


class BasisComparison:
    """Two sides' adapted weights of one tensor, replayed from different U, S, V; feed it the same rows of both.

    Arrays as the sides recorded them: `w` and `adapted` `[rows, cols]`, `u` `[rows, k]`, `v` `[cols, k]` (`torch_v`).
    """

    def __init__(self, s: tuple[np.ndarray, np.ndarray], v: tuple[np.ndarray, np.ndarray], offsets: np.ndarray):
        self.s, self.v = [x.astype(np.float64) for x in s], [x.astype(np.float64) for x in v]
        self.offsets = offsets.astype(np.float64)
        k = self.offsets.size
        self._sums = [_Sums(np.zeros((k, k)), np.zeros((k, k))) for _ in range(2)]
        self._overlap, self._projected = np.zeros((k, k)), np.zeros((k, k))
        self._difference = self._norm = 0.0

    def add(self, w: np.ndarray, u: tuple[np.ndarray, np.ndarray], adapted: tuple[np.ndarray, np.ndarray]) -> None:
        """One chunk of rows."""
        source = w.astype(np.float64)
        a, b = (x.astype(np.float64) for x in u)
        for sums, rows, s, v in zip(self._sums, (a, b), self.s, self.v, strict=True):
            sums.add(source, rows, s, v)
        first = adapted[0].astype(np.float64)
        d = first - adapted[1]
        self._overlap += a.T @ b
        self._projected += a.T @ (d @ self.v[0])
        self._difference += float((d * d).sum())
        self._norm += float((first * first).sum())

    def row(self, tensor: str) -> dict[str, Any]:
        """The tensor's entry of `basis[]`: how far apart, how much of it the bases explain, which clusters carry it."""
        rank = self.offsets.size
        sides = [decomposed(*given, self.offsets) for given in zip(self._sums, self.s, self.v, strict=True)]
        relative = float(np.sqrt(self._difference / self._norm)) if self._norm else float(self._difference > 0)
        # The products that made them are float32: u sqrt(rank) each is the scale of their own noise.
        predicted = float(np.sqrt(sides[0].away ** 2 + sides[1].away ** 2 + 2 * rank * U32**2))
        faults = [f"{name}: {fault}" for name, side in zip("ab", sides, strict=True) for fault in side.faults(rank)]
        return {
            "tensor": tensor,
            "relative": relative,
            "predicted": predicted,
            "ratio": relative / predicted,
            "limit": LIMIT,
            "explained": not faults and relative <= LIMIT * predicted,
            "faults": faults,
            "residual_a": sides[0].residual,
            "residual_b": sides[1].residual,
            "away_a": sides[0].away,
            "away_b": sides[1].away,
            **partners(self._overlap),
            "clusters": self._clusters(),
        }

    def _clusters(self) -> list[dict[str, Any]]:
        """Clusters of singular values by their share of the difference's squared norm, the largest first."""
        if not self._difference:
            return []
        found = []
        for first, last in clusters(self._overlap):
            share = float((self._projected[first : last + 1, first : last + 1] ** 2).sum()) / self._difference
            if share >= _WORTH:
                s = self.s[0]
                found.append({"first": first, "last": last, "s": [float(s[first]), float(s[last])], "share": share})
        return sorted(found, key=lambda c: -c["share"])


def clusters(overlap: np.ndarray) -> list[tuple[int, int]]:
    """Index ranges (first and last) within which two bases mix, from U_a^T U_b `[k, k]`; single vectors are none."""
    i, j = np.nonzero(np.abs(overlap) >= MIXED)
    joined = np.zeros(overlap.shape[0] + 1, int)  # +1 where a range begins, -1 where it ends
    np.add.at(joined, np.minimum(i, j), 1)
    np.add.at(joined, np.maximum(i, j), -1)
    linked = np.cumsum(joined)[:-1] > 0  # i and i + 1 lie in one range
    edges = np.flatnonzero(np.diff(np.concatenate([[False], linked, [False]]).astype(int)))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


def partners(overlap: np.ndarray) -> Mapping[str, int]:
    """Pairs (u_i, v_i) of b that are a's with the other sign, a's in another place, or a mixture of several."""
    size = np.abs(overlap)
    best = size.argmax(axis=0)
    alone = size.max(axis=0, initial=0.0) > 1 - MIXED
    here = best == np.arange(best.size)
    return {
        "flipped": int((alone & here & (np.diagonal(overlap) < 0)).sum()),
        "permuted": int((alone & ~here).sum()),
        "mixed": int((~alone).sum()),
    }


def unexplained(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first tensor whose sides differ by more than their bases explain."""
    return next((row for row in rows if not row["explained"]), None)


def of_basis(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The diagnosis as a sentence: of the tensor that is not explained, otherwise of the one that differs most."""
    if not rows:
        return None
    row = unexplained(rows) or max(rows, key=lambda one: one["relative"])
    size = f"the adapted weights differ by {row['relative']:.2g} relative"
    times = f"{row['ratio']:.2g} times what the basis explains (limit {row['limit']:g})"
    if row["explained"]:
        most = f" in {row['tensor']}" if len(rows) > 1 else ""
        return f"Basis: {size}{most}, {times}: two decompositions of one matrix, not a bug.{_carried(row)}"
    if row["faults"]:
        return f"Basis: no explanation for {row['tensor']}, where {size}: {'; '.join(row['faults'])}."
    return f"Basis: no explanation for {row['tensor']}: {size}, {times}: a bug, not the basis."


def _carried(row: Mapping[str, Any]) -> str:
    """Which cluster carries most of the difference; nothing when it is spread over the spectrum."""
    if not row["clusters"]:
        return ""
    cluster = row["clusters"][0]
    s = " to ".join(f"{value:.6g}" for value in dict.fromkeys(cluster["s"]))
    return f" {cluster['share']:.0%} of it lies in singular values {cluster['first']}-{cluster['last']} (s {s})."
