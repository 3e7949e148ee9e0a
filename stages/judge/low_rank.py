"""A product whose weight differs from the right one by a matrix of low rank: an adaptation merged on one side alone."""

from __future__ import annotations

import numpy as np

from stages.oracle.verdict import Oracle
from stages.recipes.recorded_product import Product, beyond, is_product

# An error so many times its bound, in Frobenius norm, has a rank that can be told: of less, rounding leaves a few
# directions of any error.
_SEEN = 8
# Tokens and columns whose singular values are taken: they cost the cube of the smaller number.
_SAMPLE = (512, 1024)


def explain_low_rank(oracle: Oracle, observed: np.ndarray) -> str | None:
    """A product whose weight differs from the right one by a matrix of low rank, in words; None otherwise."""
    if not is_product(oracle, observed):
        return None
    # Some tokens and columns show the rank of all.
    tokens = slice(None, None, -(-len(observed) // _SAMPLE[0]))
    wrong, ranks = beyond(oracle, observed), {}
    error, bound = observed.astype(np.float64) - oracle.value, np.broadcast_to(oracle.room, oracle.value.shape)
    for part in Product(oracle, observed).parts:
        columns = slice(
            part.columns.start, part.columns.stop, -((part.columns.start - part.columns.stop) // _SAMPLE[1])
        )
        if not wrong[:, part.columns].any():
            continue
        rank = _low_rank(*(x[tokens, columns] for x in (error, bound, oracle.value, wrong)))
        if rank is None:
            return None
        if rank == 1 and (np.ptp(error[:, part.columns], axis=0) <= 2 * bound[:, part.columns].max(axis=0)).all():
            return f"the same is added to every token, as if the bias of {part.name} were another"
        ranks[part.name] = rank
    if not ranks:
        return None
    names, each = " and ".join(ranks), "each " if len(ranks) > 1 else ""
    numbers = ", ".join(map(str, ranks.values()))
    return f"as if {names} {each}lacked a matrix of low rank ({numbers}), or had one too many"


def _low_rank(error: np.ndarray, bound: np.ndarray, value: np.ndarray, wrong: np.ndarray) -> int | None:
    """The rank of an error `[tokens, columns]` beyond its bound, if that is low; None if it is not, or cannot be told.

    Low is half of what the difference of any weight would have, as the right product's own rank shows: the inputs
    may have few directions. An error of a few tokens or columns has a low rank too, and is none of these.
    """
    noisy, whole = float(np.linalg.norm(bound)), float(np.linalg.norm(error))
    if whole < _SEEN * noisy:
        return None
    rank = _rank(error, noisy)
    size = float(np.linalg.norm(value))
    other = _rank(value * (whole / size), noisy) if size else 0
    spread = min(int(wrong.any(axis=1).sum()), int(wrong.any(axis=0).sum()))
    return rank if rank and 2 * rank <= min(other, spread) else None


def _rank(x: np.ndarray, noisy: float) -> int:
    """How many singular values of `x` are needed to leave no more than noise of that Frobenius norm."""
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return int(np.argmax(left <= noisy**2))
