"""A summation tree by its name: the declared order that makes it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from stages.sums.orders import (
    TAILS,
    Blocks,
    Chain,
    Explicit,
    Halves,
    Lanes,
    Order,
    Pairs,
    block_ranges,
    lanes_of,
    lower,
)
from stages.sums.program import Tree
from stages.sums.text import format_order

_SIMPLE: tuple[Order, ...] = (Chain(), Chain(backward=True), Pairs(), Halves())
# XLA's reductions run over windows of 32, centred on the terms.
_CENTRED_SIZES = (8, 16, 32, 64, 128)


def recognise(tree: Tree) -> Order:
    """The order with the shortest text, nothing fused, that makes `tree`; an explicit one when it has no name.

    Every guess is lowered again and compared, so a name that comes back is right for this count of terms.
    """
    return _named(tree) or Explicit(tree.program())


def _named(tree: Tree) -> Order | None:
    if (simple := next((order for order in _SIMPLE if _makes(order, tree)), None)) is not None:
        return simple
    # Of blocks the smallest that fit, not unions of these; of the rest, the shortest text.
    blocks = itertools.islice((guess for guess in _blocks(tree) if _makes(guess, tree)), 1)
    others = (guess for guess in itertools.chain(_lanes(tree), _centred(tree)) if _makes(guess, tree))
    return min([*blocks, *others], key=lambda order: len(format_order(order)), default=None)


def _makes(order: Order, tree: Tree) -> bool:
    return lower(order, tree.size).tree() == tree


def _blocks(tree: Tree) -> Iterator[Order]:
    """Where the first terms are followed by more than one at once, or by the last, a block may end."""
    sizes = [1, *(size for size, _ in tree.spine())]
    for size, after in itertools.pairwise(sizes):
        if size >= 2 and (after - size > 1 or after == tree.size):
            yield from _composed(tree, [k // size for k in range(tree.size)], 0, functools.partial(Blocks, size))


def _centred(tree: Tree) -> Iterator[Order]:
    for size in _CENTRED_SIZES:
        if tree.size > 2 * size and tree.size % size:
            ranges = block_ranges(Blocks(size, Chain(), Chain(), centred=True), tree.size)
            groups = [block for block, (a, z) in enumerate(ranges) for _ in range(a, z)]
            yield from _composed(tree, groups, 1, functools.partial(Blocks, size, centred=True))


def _lanes(tree: Tree) -> Iterator[Order]:
    """Lanes are as many as the first two terms of a subtree with term 0 are apart, behind a head that comes before."""
    added = [term for _, term in tree.spine()]
    head = sum(1 for k, term in enumerate(added) if term == k + 1)  # 0, 1, 2, ... one by one, the last of lane 0
    for start in (0, head) if head > 1 else (0,):
        apart = itertools.accumulate((term - start for term in added[start:]), min)
        for count in sorted(set(apart) - {1}):
            for tail in TAILS:
                yield from _dealt(tree, Lanes(count, Chain(), Chain(), tail, start))


def _dealt(tree: Tree, lanes: Lanes) -> Iterator[Order]:
    dealt, rest = lanes_of(lanes, tree.size)
    if lanes.tail != "spread" and not rest:
        return
    groups = [0] * tree.size
    for number, lane in enumerate(dealt):
        for term in lane:
            groups[term] = number
    # The fullest lane that has neither head nor tail.
    plain = range(int(bool(lanes.head or rest)), len(dealt))
    full = max(plain, key=lambda lane: len(dealt[lane]), default=0)
    yield from _composed(tree, groups, full, lambda inner, outer: replace(lanes, inner=inner, outer=outer))


def _composed(tree: Tree, groups: Sequence[int], full: int, make: Callable[[Order, Order], Order]) -> Iterator[Order]:
    """`make` of the order inside the group `full` and the order of the groups' sums."""
    split = tree.split(groups)
    if split is not None:
        inner, outer = _named(split[0][full]), _named(split[1])
        if inner is not None and outer is not None:
            yield make(inner, outer)
