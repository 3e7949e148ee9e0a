"""Orders of summation as values: chains, pairwise trees, blocks, interleaved lanes, and explicit trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from stages.errors import InputError
from stages.sums.program import Program, Step

# Where the terms go that are left when K is no multiple of the lanes: dealt on over the lanes; chained on to lane 0;
# or summed by themselves and then added to lane 0.
TAILS = ("spread", "first", "seed")


@dataclass(frozen=True)
class Chain:
    """One accumulator takes term after term, from the first on or, `backward`, from the last; by FMA or not."""

    fma: bool = False
    backward: bool = False


@dataclass(frozen=True)
class Pairs:
    """Neighbours are added, then neighbours of these, until one is left."""


@dataclass(frozen=True)
class Halves:
    """The upper half of the terms is added to the lower, then its upper half to its lower: a SIMD register's end."""


@dataclass(frozen=True)
class Blocks:
    """Terms in consecutive blocks of `size`, each summed by `inner`; the blocks' sums by `outer`.

    `centred`: what K lacks to whole blocks is missing at both ends, half and half, and not at the end alone.
    """

    size: int
    inner: Order
    outer: Order
    centred: bool = False


@dataclass(frozen=True)
class Lanes:
    """Term k in lane k mod `count`, each lane summed by `inner`; the lanes' sums by `outer`. `tail`: see `TAILS`.

    The first `head` terms, up to where a library's vectors are aligned, begin lane 0; dealing starts after them.
    """

    count: int
    inner: Order
    outer: Order
    tail: str = "spread"
    head: int = 0


@dataclass(frozen=True)
class Explicit:
    """Additions one by one, for what has no shorter name; only for one count of terms."""

    program: Program


Order = Chain | Pairs | Halves | Blocks | Lanes | Explicit


class _Value(NamedTuple):
    """An accumulator while an order is lowered; `term`: nothing but a term, so far."""

    slot: int
    term: bool = False


def lower(order: Order, size: int) -> Program:
    """The additions that `order` makes of `size` terms, in execution order.

    `InputError` for an explicit order of another count of terms.
    """
    steps: list[Step] = []
    root = _sum(order, [_Value(k, term=True) for k in range(size)], steps)
    assert not steps or steps[-1].into == root.slot
    return Program(size, tuple(steps))


def _sum(order: Order, values: Sequence[_Value], steps: list[Step]) -> _Value:
    match order:
        case Chain(fma, backward):
            return _chain(values[::-1] if backward else values, fma, steps)
        case Pairs():
            while len(values) > 1:
                values = [_chain(values[k : k + 2], False, steps) for k in range(0, len(values), 2)]
            return values[0]
        case Halves():
            while len(values) > 1:
                half = (len(values) + 1) // 2
                values = [_chain(values[k::half], False, steps) for k in range(half)]
            return values[0]
        case Blocks(_, inner, outer, _):
            return _sum(outer, [_sum(inner, values[a:z], steps) for a, z in block_ranges(order, len(values))], steps)
        case Lanes():
            return _lanes(order, values, steps)
        case Explicit(program):
            return _explicit(program, values, steps)


def _chain(values: Sequence[_Value], fma: bool, steps: list[Step]) -> _Value:
    into = values[0]
    for of in values[1:]:
        steps.append(Step(into.slot, of.slot, fused=fma and of.term))
        into = _Value(into.slot)
    return into


def block_ranges(order: Blocks, terms: int) -> list[tuple[int, int]]:
    """First and past-the-last term of every block."""
    lacking = -terms % order.size
    start = -(lacking // 2) if order.centred else 0
    return [(max(0, a), min(terms, a + order.size)) for a in range(start, terms, order.size)]


def lanes_of(order: Lanes, terms: int) -> tuple[list[list[int]], list[int]]:
    """The terms of every lane, and those of the tail that no lane has."""
    head = min(order.head, terms)
    whole = terms if order.tail == "spread" else terms - (terms - head) % order.count
    lanes = [list(range(head + lane, whole, order.count)) for lane in range(order.count)]
    lanes[0] = [*range(head), *lanes[0]]
    return [lane for lane in lanes if lane], list(range(whole, terms))


def _lanes(order: Lanes, values: Sequence[_Value], steps: list[Step]) -> _Value:
    lanes, rest = lanes_of(order, len(values))
    sums = [_sum(order.inner, [values[k] for k in lane], steps) for lane in lanes]
    tail = [values[k] for k in rest]
    if tail and order.tail == "seed":
        tail = [_chain(tail, False, steps)]
    if not sums:
        return _chain(tail, False, steps)
    sums[0] = _chain([sums[0], *tail], False, steps)
    return _sum(order.outer, sums, steps)


def _explicit(program: Program, values: Sequence[_Value], steps: list[Step]) -> _Value:
    if program.size != len(values):
        raise InputError(f"an explicit order of {program.size} terms was given {len(values)}")
    slots = [value.slot for value in values]
    steps.extend(Step(slots[into], slots[of], fused) for into, of, fused in program.steps)
    return _Value(slots[program.root])


def fused(order: Order) -> Order:
    """`order` with its innermost chains by FMA: those that take terms and not partial sums."""
    match order:
        case Chain():
            return replace(order, fma=True)
        case Blocks() | Lanes():
            return replace(order, inner=fused(order.inner))
        case _:
            return order


def words(order: Order, what: str = "terms") -> str:
    """The order in plain words; `what` names the terms, `K` for products."""
    match order:
        case Chain(fma, backward):
            return f"one {'FMA ' if fma else ''}chain over {what}{', last to first' if backward else ''}"
        case Pairs():
            return f"{what} pairwise, neighbours first"
        case Halves():
            return f"{what} pairwise, upper half on to lower"
        case Blocks(size, inner, outer, centred):
            where = ", the first and the last cut alike" if centred else ""
            return f"{what} in blocks of {size}{where}, {inside(inner)} in each, blocks added {joins(outer)}"
        case Lanes(count, inner, outer, tail, head):
            rest = {
                "spread": "",
                "first": ", the rest chained to lane 0",
                "seed": ", the rest summed and added to lane 0",
            }
            start = f", the first {head} before lane 0" if head else ""
            return (
                f"{what} in {count} interleaved lanes{start}{rest[tail]}, {inside(inner)} in each, "
                f"lanes added {joins(outer)}"
            )
        case Explicit(program):
            return f"an explicit tree of {program.size} {what}"


def inside(order: Order) -> str:
    """In words the order that terms of one block or lane are summed in."""
    match order:
        case Chain(fma, backward):
            return f"{'an FMA' if fma else 'a'} chain{' from last to first' if backward else ''}"
        case _:
            return f"({words(order, 'its terms')})"


def joins(order: Order) -> str:
    """In words the order that the blocks' or lanes' sums are added in."""
    match order:
        case Chain(_, backward):
            return "right to left" if backward else "left to right"
        case Pairs():
            return "pairwise"
        case Halves():
            return "upper half on to lower"
        case _:
            return f"as ({words(order, 'sums')})"
