"""The orders that are tried when only inputs and a result are known: those of libraries that were looked at."""

from __future__ import annotations

from collections.abc import Iterator

from stages.sums.orders import Blocks, Chain, Halves, Lanes, Order, Pairs, fused

# Panels of K in BLAS libraries (OpenBLAS 256 to 448, MKL 192 to 384, XLA's Eigen 128 to 512) and in naive tilings.
BLOCK_SIZES = (
    *(16, 24, 32, 48, 64, 72, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 288, 320, 336, 352, 368, 384),
    *(416, 448, 480, 504, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1152, 1280, 1536, 2048, 3072, 4096),
)
# Numbers in a vector register, 128 to 512 bits, and two where a compiler unrolls; and how often it unrolls.
LANES = (4, 8, 16, 2, 32)
UNROLLED = (2, 4, 8)
_KNOWN_SUMS: tuple[Order, ...] = (
    Lanes(8, Lanes(4, Blocks(16, Chain(), Chain()), Chain(), "first"), Chain(), "seed"),
    Blocks(32, Chain(), Chain(), centred=True),
)
_JOINS: tuple[Order, ...] = (Chain(), Halves(), Pairs())


def family(terms: int) -> Iterator[Order]:
    """Orders of products and squares of `terms` terms, likely ones first."""
    for plain in dict.fromkeys(_plain(terms)):
        yield from dict.fromkeys((fused(plain), plain))


def family_of_sums(terms: int) -> Iterator[Order]:
    """The same for sums, where there is no product to fuse: first what torch and XLA do (docs/findings/order.md).

    A sum may be a single number that many orders give; then the first one counts.
    """
    return iter(dict.fromkeys((*_KNOWN_SUMS, *_plain(terms))))


def _plain(terms: int) -> Iterator[Order]:
    yield from (Chain(), Chain(backward=True), Pairs(), Halves())
    yield from (Blocks(size, Chain(), Chain()) for size in _sizes(terms))
    yield from _lanes(terms)
    yield from (Blocks(size, Chain(), Chain(), centred=True) for size in (16, 32, 64) if size < terms)
    yield from (Blocks(size, Chain(), Blocks(size, Chain(), Chain())) for size in (16, 32, 64) if size < terms)
    for join in (Chain(backward=True), Pairs(), Halves()):
        yield from (Blocks(size, Chain(), join) for size in _sizes(terms))
    yield from (Blocks(size, Chain(backward=True), Chain()) for size in _sizes(terms))
    for size in (64, 128, 256, 512):
        if size < terms:
            yield from (Blocks(size, inner, Chain()) for inner in (Pairs(), Halves(), Lanes(8, Chain(), Halves())))


def _sizes(terms: int) -> Iterator[int]:
    """Sizes of blocks, those first that are known of MKL and XLA; and equal parts of K."""
    parts = {-(-terms // count) for count in range(2, 9)}
    return (size for size in dict.fromkeys((192, 512, *BLOCK_SIZES, *sorted(parts))) if 1 < size < terms)


def _lanes(terms: int) -> Iterator[Order]:
    """Those with a chain in each first: 8 lanes are 4 of 2, and called so."""
    counts = [count for count in LANES if count < terms]
    yield from (Lanes(count, Chain(), join) for count in counts for join in _JOINS)
    for count in counts:
        tails = ("spread", "seed", "first") if terms % count else ("spread",)
        for join in _JOINS:
            yield from (Lanes(count, inner, join, tail) for inner in _inside_lanes() for tail in tails)
            yield Lanes(count, Chain(), join, head=count)


def _inside_lanes() -> Iterator[Order]:
    yield Chain()
    yield from (Lanes(count, Chain(), Chain(), tail) for count in UNROLLED for tail in ("spread", "first"))
    yield Blocks(4, Chain(), Chain())
    yield Blocks(4, Chain(), Blocks(4, Chain(), Chain()))
    yield Blocks(16, Chain(), Chain())
    # torch's cascade: four accumulators, each flushed after 16 terms
    yield Lanes(4, Blocks(16, Chain(), Chain()), Chain(), "first")
    yield Lanes(4, Blocks(16, Chain(), Chain()), Chain(), "seed")
