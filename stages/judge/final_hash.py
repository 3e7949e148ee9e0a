"""The hash of final_bf16; and, where it is not the recorded one, how many elements differ, and whether by rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.files.tensorfile import sha256
from stages.oracle.bounds import U32
from stages.oracle.rounding import round_once
from stages.oracle.verdict import consult
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.values import Chunk

FINAL = "final_bf16"
_BF16 = stored_dtype(REPLAY[FINAL].dtype)


class FinalHash:
    """sha256 of final_bf16 as computed, and in the sample's target orientation.

    `gather`: the chunks are columns of a transposed result; `turn`: the target orientation is the other one.
    """

    def __init__(self, turn: bool, gather: bool):
        self._turn, self._gather = turn, gather
        self._parts: list[np.ndarray] = []
        self._hash = hashlib.sha256()

    def add(self, chunk: np.ndarray) -> None:
        if self._turn or self._gather:
            self._parts.append(chunk)
        if not self._gather:
            self._hash.update(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)

    def digest(self) -> str:
        """In the orientation of the dump."""
        return sha256(np.concatenate(self._parts, axis=1)) if self._gather else self._hash.hexdigest()

    def target_digest(self) -> str:
        """In the orientation that the reference side reports on."""
        return sha256(np.concatenate(self._parts).T) if self._turn else self.digest()


@dataclass
class Departure:
    """Elements of a native side's final_bf16 that are not those of float64 arithmetic rounded at stage boundaries.

    `beyond_calibrated` and `beyond_rigorous`: of these, how many float32 rounding of the native side, as it is known
    or in any order of summation, does not lead to.
    """

    count: int = 0
    differing: int = 0
    beyond_calibrated: int = 0
    beyond_rigorous: int = 0

    def add(self, native: np.ndarray, precise: Chunk, *, layout: str, transpose: bool) -> None:
        """Add the same rows of both sides; `precise` computed them in `reference` or `exact`."""
        ours = precise.values[FINAL]
        if transpose:
            native, ours = native.T, ours.T
        rows, columns = np.nonzero(native.view(np.uint16) != ours.view(np.uint16))
        self.count += ours.size
        self.differing += rows.size
        if not rows.size:
            return
        value, calibrated, rigorous = _before_rounding(precise, layout)
        at, got = (rows, columns), native[rows, columns].astype(np.float32)
        self.beyond_calibrated += _outside(got, value[at], calibrated[at])
        self.beyond_rigorous += _outside(got, value[at], rigorous[at])


def _outside(got: np.ndarray, value: np.ndarray, error: np.ndarray) -> int:
    """How many numbers are no bfloat16 rounding of anything within `error` of `value`."""
    low, high = (round_once(end, _BF16).astype(np.float32) for end in (value - error, value + error))
    return int(np.count_nonzero(~((low <= got) & (got <= high))))


def _before_rounding(chunk: Chunk, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The adapted weight's float64 value, and how far native float32 may lie from it: calibrated, rigorous.

    The factors of the product have the same bits in any arithmetic (scaled_s, u_scaled: exact stages). Both factors of
    the last multiplication are off by their bounds; it adds u, and as many u for what `chunk` itself rounded.
    """
    product = consult(REPLAY["matmul_pre_norm"], _arguments(chunk, "matmul_pre_norm"), {"layout": layout})
    ratio = consult(REPLAY["normalization"], _arguments(chunk, "normalization"), {})
    value = product.value * ratio.value
    bounds = [
        p * np.abs(ratio.value) + r * np.abs(product.value) + p * r + 2 * U32 * np.abs(value)
        for p, r in ((product.bound, ratio.bound), (product.rigorous(), ratio.rigorous()))
    ]
    return value, bounds[0], bounds[1]


def _arguments(chunk: Chunk, stage: str) -> tuple[np.ndarray, ...]:
    arguments = chunk.arguments(REPLAY[stage])
    assert arguments is not None  # a replay's own chunk has them all
    return arguments


# A native final_bf16 in chunks, with what it is: where it was recorded, or who computed it again.
Native = tuple[str, Callable[[], Iterator[np.ndarray]]]


def explain_unreached_hash(
    recorded: str,
    natives: Iterator[Native],
    precise: Callable[[], Iterator[Chunk]],
    new_hash: Callable[[], FinalHash],
    *,
    layout: str,
    transpose: bool,
) -> dict[str, Any]:
    """Why a run in float64 did not reach the `recorded` hash: element by element, from the first native final_bf16
    that has that hash. Without one nothing is known but that it differs, and the account says so."""
    tried = []
    for source, chunks in natives:
        departure, hashed = Departure(), new_hash()
        for native, chunk in zip(chunks(), precise(), strict=True):
            hashed.add(native)
            departure.add(native, chunk, layout=layout, transpose=transpose)
        if hashed.target_digest() == recorded:
            return _known(recorded, source, departure)
        tried.append(source)
    unlike = f"; neither {' nor '.join(tried)} has it" if tried else ""
    return {
        "recorded_sha256": recorded,
        "source": None,
        **dict.fromkeys(vars(Departure())),
        "note": f"The recorded hash {recorded[:12]} is not reached, and its elements are unavailable{unlike}: "
        "how many differ is not known.",
    }


def _known(recorded: str, source: str, departure: Departure) -> dict[str, Any]:
    if departure.beyond_rigorous:
        how = f"{departure.beyond_rigorous:,} of them by more than any order of its float32 sums gives: not rounding"
    elif departure.beyond_calibrated:
        how = f"{departure.beyond_calibrated:,} of them beyond its calibrated rounding, none beyond the rigorous bound"
    else:
        how = "each within that side's own float32 rounding"
    share = f"{departure.differing:,} of {departure.count:,} bf16 elements differ"
    return {
        "recorded_sha256": recorded,
        "source": source,
        **vars(departure),
        "note": f"The recorded hash {recorded[:12]} comes from native arithmetic ({source}): {share}, {how}.",
    }
