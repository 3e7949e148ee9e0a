"""Basis or bug: two decompositions of one matrix are explained, a fault in either side is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stages.judge.basis import LIMIT, BasisComparison, clusters

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
SHAPES = [(64, 64), (160, 48), (48, 160)]
SPECTRA = {
    "ordinary": lambda k: np.arange(1, k + 1) ** -0.7,
    "graded": lambda k: np.logspace(0, -6, k),
    "clustered": lambda k: np.repeat(np.arange(k // 8, 0, -1.0), 8) * (1 + 1e-6 * np.arange(k, 0, -1)),
    "repeated": lambda k: np.repeat(np.arange(k // 4, 0, -1.0), 4),
    "deficient": lambda k: np.where(np.arange(k) < k // 2, k - np.arange(k), 0.0),
    "identity": np.ones,
}


def matrix(shape: tuple[int, int], s: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(7)
    u, v = (np.linalg.qr(rng.standard_normal((n, s.size)))[0] for n in shape)
    return np.asarray((u * s) @ v.T, np.float32)


def float64_svd(w: np.ndarray) -> Parts:
    u, s, vh = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    return u.astype(np.float32), s.astype(np.float32), vh.T.astype(np.float32)


def float32_svd(w: np.ndarray) -> Parts:
    u, s, vh = torch.linalg.svd(torch.from_numpy(w), full_matrices=False)  # numpy's own would compute in float64
    return u.numpy(), s.numpy(), vh.numpy().T


def adapted(parts: Parts, z: np.ndarray) -> np.ndarray:
    u, s, v = parts
    return (u * (s * (1 + z))) @ v.T


def offsets(k: int) -> np.ndarray:
    return np.random.default_rng(3).uniform(-0.17, 0.17, k).astype(np.float32)


def judged(w: np.ndarray, a: Parts, b: Parts, z: np.ndarray, made: np.ndarray | None = None) -> dict[str, Any]:
    """The row of sides a and b, in two chunks; `made` is what b recorded when it is not what its parts give."""
    basis = BasisComparison((a[1], b[1]), (a[2], b[2]), z)
    one, other = adapted(a, z), adapted(b, z) if made is None else made
    for rows in (slice(0, 20), slice(20, None)):
        basis.add(w[rows], (a[0][rows], b[0][rows]), (one[rows], other[rows]))
    return basis.row("w")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_decompositions_of_one_matrix_are_explained(spectrum: str, shape: tuple[int, int]) -> None:
    w = matrix(shape, SPECTRA[spectrum](min(shape)))
    z = offsets(min(shape))
    row = judged(w, float64_svd(w), float32_svd(w), z)
    assert row["explained"], row
    assert row["relative"] > 0
    assert row["ratio"] <= 1.5, row  # the triangle inequality's sqrt(2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["ordinary", "graded"])
def test_other_offsets_on_one_side_are_not_explained(spectrum: str, shape: tuple[int, int]) -> None:
    w, z = matrix(shape, SPECTRA[spectrum](min(shape))), offsets(min(shape))
    a, b = float64_svd(w), float32_svd(w)
    row = judged(w, a, b, z, adapted(b, z * np.float32(1.001)))
    assert not row["explained"]
    assert row["ratio"] > LIMIT
    assert row["faults"] == []


def _u(parts: Parts) -> Parts:
    u = parts[0].copy()
    u[5, 2] += 0.01
    return u, parts[1], parts[2]


def _mixed(parts: Parts) -> Parts:
    x = np.eye(parts[1].size) + 0.01 * np.random.default_rng(0).standard_normal((parts[1].size,) * 2)
    return (
        (parts[0] @ x).astype(np.float32),
        parts[1],
        (np.linalg.solve(x, (parts[1] * parts[2]).T) / parts[1][:, None]).T.astype(np.float32),
    )


def _swapped(parts: Parts) -> Parts:
    order = np.arange(parts[1].size)
    order[[0, 9]] = 9, 0
    return parts[0][:, order], parts[1][order], parts[2][:, order]


@pytest.mark.parametrize(
    ("fault", "words"),
    [(_u, "misses the weight"), (_mixed, "orthonormal"), (_swapped, "S misses the singular values")],
)
def test_what_is_no_decomposition_of_the_weight_explains_nothing(fault: Any, words: str) -> None:
    w, z = matrix((160, 48), SPECTRA["ordinary"](48)), offsets(48)
    a = float64_svd(w)
    row = judged(w, a, fault(float32_svd(w)), z)
    assert not row["explained"]
    assert any(line.startswith("b: ") and words in line for line in row["faults"]), row["faults"]
    assert not any(line.startswith("a: ") for line in row["faults"])


def test_the_cluster_that_carries_the_difference_is_named() -> None:
    s = np.concatenate([np.full(4, 9.0), np.arange(8, 0, -0.25)])
    w, z = matrix((160, s.size), s), offsets(s.size)
    row = judged(w, float64_svd(w), float32_svd(w), z)
    (cluster,) = row["clusters"]
    assert (cluster["first"], cluster["last"]) == (0, 3)
    assert cluster["s"] == pytest.approx([9, 9], rel=1e-6)
    assert cluster["share"] > 0.99
    assert row["explained"]


def test_flipped_signs_and_swaps_within_a_cluster_are_recognised() -> None:
    w, z = matrix((160, 48), SPECTRA["ordinary"](48)), offsets(48)
    a = float64_svd(w)
    sign = np.where(np.arange(48) % 3, 1, -1).astype(np.float32)
    row = judged(w, a, (a[0] * sign, a[1], a[2] * sign), z)
    assert (row["flipped"], row["permuted"], row["mixed"]) == (16, 0, 0)
    assert (row["relative"], row["ratio"], row["explained"]) == (0.0, 0.0, True)


def test_clusters_are_ranges_that_mix() -> None:
    overlap = np.eye(9)
    overlap[1, 3] = overlap[6, 5] = 0.5
    overlap[7, 8] = 1e-4
    assert clusters(overlap) == [(1, 3), (5, 6)]
    assert clusters(np.eye(4)) == []
