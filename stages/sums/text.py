"""Orders as text that round-trips: `fma`, `blocks(192, fma, left)`, `lanes(8, left, halves)`, `tree(3; 0+1, 0+2)`.

Names: `left`, `right` are chains from the first or last term of products rounded before they are added, `fma` and
`fma_right` the same with fused products; `pairs`, `halves`; `blocks(size, inner, outer[, centred])`;
`lanes(count, inner, outer[, tail][, head n])`; `tree(terms; into+of, into*of, ...)`, `*` an FMA of the term `of`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from stages.errors import InputError, shown
from stages.sums.orders import TAILS, Blocks, Chain, Explicit, Halves, Lanes, Order, Pairs
from stages.sums.program import Program, Step

NAMED: dict[str, Order] = {
    "left": Chain(),
    "right": Chain(backward=True),
    "fma": Chain(fma=True),
    "fma_right": Chain(fma=True, backward=True),
    "pairs": Pairs(),
    "halves": Halves(),
}
_NAMES = {order: name for name, order in NAMED.items()}
# More than any matrix has columns; a text with more terms is no order but an attempt to fill the memory.
MAX_TERMS = 1 << 20
MAX_DEPTH = 8


def format_order(order: Order) -> str:
    """The text that `parse_order` turns back into `order`."""
    match order:
        case Blocks(size, inner, outer, centred):
            return f"blocks({size}, {format_order(inner)}, {format_order(outer)}{', centred' if centred else ''})"
        case Lanes(count, inner, outer, tail, head):
            options = f"{'' if tail == 'spread' else ', ' + tail}{f', head {head}' if head else ''}"
            return f"lanes({count}, {format_order(inner)}, {format_order(outer)}{options})"
        case Explicit(program):
            steps = ", ".join(f"{s.into}{'*' if s.fused else '+'}{s.of}" for s in program.steps)
            return f"tree({program.size}; {steps})"
        case _:
            return _NAMES[order]


def parse_order(text: str) -> Order:
    """The order that `text` says; `InputError` with the place for anything else."""
    parser = _Parser(text)
    order = parser.order()
    parser.expect("end")
    return order


class _Parser:
    """Recursive descent over names, numbers and punctuation."""

    def __init__(self, text: str):
        self._text = text
        self._tokens = re.findall(r"\w+|[^\w\s]", text)
        self._at = self._depth = 0

    def order(self) -> Order:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"at most {MAX_DEPTH} levels")
        name = self._next()
        order: Order
        if name in NAMED:
            order = NAMED[name]
        elif name in ("blocks", "lanes"):
            order = self._nested(name)
        elif name == "tree":
            order = self._tree()
        else:
            raise self._error(f"one of {', '.join(NAMED)}, blocks, lanes, tree")
        self._depth -= 1
        return order

    def expect(self, token: str) -> None:
        if self._next() != token:
            raise self._error(f"'{token}'")

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1] if self._at <= len(self._tokens) else "end"

    def _peek(self, token: str) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at] == token

    def _number(self, least: int) -> int:
        token = self._next()
        if not token.isascii() or not token.isdigit() or len(token) > 9 or not least <= int(token) <= MAX_TERMS:
            raise self._error(f"a number from {least} to {MAX_TERMS}")
        return int(token)

    def _nested(self, name: str) -> Order:
        self.expect("(")
        size = self._number(least=2)
        self.expect(",")
        inner = self.order()
        self.expect(",")
        outer = self.order()
        order = Blocks(size, inner, outer) if name == "blocks" else Lanes(size, inner, outer)
        while self._peek(","):
            self._next()
            order = self._with_option(order)
        self.expect(")")
        return order

    def _with_option(self, order: Blocks | Lanes) -> Blocks | Lanes:
        option = self._next()
        if isinstance(order, Blocks) and option == "centred":
            return replace(order, centred=True)
        if isinstance(order, Lanes) and option in TAILS:
            return replace(order, tail=option)
        if isinstance(order, Lanes) and option == "head":
            return replace(order, head=self._number(least=1))
        raise self._error("'centred'" if isinstance(order, Blocks) else f"{', '.join(TAILS)} or 'head' and a number")

    def _tree(self) -> Order:
        self.expect("(")
        size = self._number(least=1)
        self.expect(";")
        steps: list[Step] = []
        free = set(range(size))
        touched: set[int] = set()
        while len(steps) < size - 1:
            if steps:
                self.expect(",")
            steps.append(self._step(size, free, touched))
        self.expect(")")
        return Explicit(Program(size, tuple(steps)))

    def _step(self, size: int, free: set[int], touched: set[int]) -> Step:
        into = self._number(least=0)
        sign = self._next()
        of = self._number(least=0)
        if sign not in "+*" or into == of or not {into, of} <= free or (sign == "*" and of in touched):
            raise self._error("additions of accumulators that are still there, and FMAs of single terms")
        free.remove(of)
        touched |= {into, of}
        return Step(into, of, sign == "*")

    def _error(self, expected: str) -> InputError:
        before = " ".join(self._tokens[: self._at])
        return InputError(f"order '{shown(self._text)}': expected {expected} at the end of '{shown(before)}'")
