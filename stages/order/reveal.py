"""The summation tree of a black box, from sums of terms that were chosen to tell.

After FPRev (T. Xie, Y. Gao et al., "FPRev: Revealing the order of floating-point summation", 2025). Where terms may
have any sign, a large number at i and its negative at j swallow all that is added in between; of the ones elsewhere,
those survive that lie outside the smallest subtree with both. Where terms are never negative (squares, exponentials),
two terms that are each too small for the large one at i count when, and only when, they meet before they meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stages.errors import SvfError
from stages.sums.program import Tree, tree_of

# (i, js) -> for each j, how many terms lie below the node where i and j meet.
Meeting = Callable[[int, Sequence[int]], np.ndarray]
# (i, j, k), equally long -> whether j and k meet before either meets i.
Apart = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class NoTreeError(SvfError):
    """The sums answered as no tree of two-operand additions does."""

    exit_code = 5


def reveal(size: int, meeting: Meeting) -> Tree:
    """The tree of a sum of `size` signed terms, in about `size` questions per level of nesting.

    `NoTreeError` when the answers contradict each other: several terms added at once, or an order that changes.
    """
    merges: list[tuple[int, int, int]] = []
    todo = [list(range(size))]
    while todo:
        terms = todo.pop()
        first, rest = terms[0], terms[1:]
        if not rest:
            continue
        sizes = np.asarray(meeting(first, rest))
        below = 1
        for count in np.unique(sizes):
            group = [j for j, met in zip(rest, sizes, strict=True) if met == count]
            below += len(group)
            if below != count:
                raise NoTreeError(
                    f"terms {first} and {group[0]} meet above {count} terms, but {below} were found there"
                )
            merges.append((below, first, group[0]))
            todo.append(group)
    return tree_of(size, merges)


def reveal_positive(size: int, apart: Apart) -> Tree:
    """The tree of a sum of `size` terms that are never negative, in about 2 size log2(size) questions."""
    merges: list[tuple[int, int, int]] = []
    todo = [list(range(size))]
    while todo:
        terms = todo.pop()
        below = 1
        for group in _by_nearness(terms[0], terms[1:], apart):
            below += len(group)
            merges.append((below, terms[0], group[0]))
            todo.append(group)
    return tree_of(size, merges)


def _by_nearness(first: int, rest: list[int], apart: Apart) -> list[list[int]]:
    """`rest` in groups that meet `first` together, the nearest group first: a quicksort by questions."""
    if len(rest) <= 1:
        return [rest] if rest else []
    pivot = rest[len(rest) // 2]
    others = np.array([k for k in rest if k != pivot], dtype=np.intp)
    ones = np.ones_like(others)
    nearer = apart(ones * pivot, ones * first, others)
    same = apart(ones * first, ones * pivot, others)
    if (nearer & same).any():
        raise NoTreeError(f"terms {first}, {pivot} and a third meet in two ways")
    group = sorted([pivot, *others[same].tolist()])
    near, far = others[nearer].tolist(), others[~nearer & ~same].tolist()
    return [*_by_nearness(first, near, apart), group, *_by_nearness(first, far, apart)]
