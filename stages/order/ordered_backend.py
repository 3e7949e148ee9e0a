"""A backend that computes products and sums in a given order, to have another library's bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.errors import UsageError
from stages.order.ordered_forward import forward_stages
from stages.spec.backend import Backend, Delegate
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.sums import evaluate
from stages.sums.evaluate import Products, Sum
from stages.sums.orders import Blocks, Chain, Order, block_ranges, lower
from stages.sums.text import format_order

# (stage, how many terms) -> the order to sum them in.
Orders = Mapping[tuple[str, int], Order]

# Elements of every product that are computed again, step by step, to see that the kernels kept the order.
CHECKED = 64
BLOCKED, STEPPED, SUMMED, NATIVE = "blocks", "steps", "sum", "native"
HOW = {
    BLOCKED: f"by the backend's kernels, block by block, {CHECKED} elements of each product checked",
    STEPPED: "step by step on the host: no kernel here sums so",
    SUMMED: "step by step on the host",
    NATIVE: "natively: no order is known",
}


class OrderedBackend(Delegate):
    """A backend whose products and sums are taken in `orders`; all else is its own.

    A product in blocks of FMA chains is put together from the backend's kernels, one call a block, and a sample of
    its elements is compared with the order's exact evaluation. Where a kernel does not keep the order, or the order
    is of another kind, every element is evaluated step by step. A sum without an order is computed natively. `how`
    says which it was, per stage and count of terms.
    """

    def __init__(self, inside: Backend, orders: Orders, source: str):
        if not inside.ordered:
            raise UsageError(
                f"--order {source}: {inside.name} computes in float64, so an order of float32 sums does not apply"
            )
        super().__init__(inside)
        self.orders, self.source = orders, source
        self.how: dict[tuple[str, int], str] = {}
        self._chain, self._add = (inside.compile(inside.ordered[name]) for name in ("chain", "add"))
        ours: dict[str, Callable[..., Any]] = {
            name: _REPLAYED[stage.noise](self, name) for name, stage in REPLAY.items() if stage.noise in _REPLAYED
        }
        self.replay = {name: self._ours(fn, ours.get(name)) for name, fn in inside.replay.items()}
        ours = dict(forward_stages(self))
        self.forward = {name: self._ours(fn, ours.get(name)) for name, fn in inside.forward.items()}

    def _ours(self, native: Callable[..., Any], ordered: Callable[..., Any] | None) -> Callable[..., Any]:
        return native if ordered is None else _Ordered(self.inside, native, ordered)

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` compiled; an ordered stage is not: what it is put together from was, part by part."""
        return fn if isinstance(getattr(fn, "func", fn), _Ordered) else self.inside.compile(fn)

    def facts(self) -> dict[str, str]:
        return {**self.inside.facts(), "order": self.source}

    def product(self, stage: str, a: Any, b: Any) -> Any:
        """`a @ b` of framework arrays, in the order of `stage`; None where there is none."""
        key = (stage, int(a.shape[1]))
        order = self.orders.get(key)
        if order is None or not str(a.dtype).endswith("float32"):
            self.how[key] = NATIVE
            return None
        blocks = in_blocks(order, key[1])
        if blocks is not None and self.how.get(key) != STEPPED:
            result = self._by_blocks(a, b, *blocks)
            if self._kept(order, a, b, result):
                self.how[key] = BLOCKED
                return result
        self.how[key] = STEPPED
        return self.put(evaluate.product(order, self.get(a), self.get(b)))

    def _by_blocks(self, a: Any, b: Any, blocks: list[tuple[int, int]], joined: Order) -> Any:
        sums: dict[int, Any] = {}

        def take(block: int) -> Any:
            start, stop = blocks[block]
            return sums.pop(block) if block in sums else self._chain(a[:, start:stop], b[start:stop])

        program = lower(joined, len(blocks))
        for into, of, _ in program.steps:
            sums[into] = self._add(take(into), take(of))
        return take(program.root)

    def _kept(self, order: Order, a: Any, b: Any, result: Any) -> bool:
        left, right, got = self.get(a), self.get(b), self.get(result)
        rng = np.random.default_rng(0)
        rows, cols = (rng.integers(0, size, CHECKED) for size in got.shape)
        rows[:4], cols[:4] = (0, 0, -1, -1), (0, -1, 0, -1)
        expected = evaluate.evaluate(order, Products(left[rows], right.T[cols]))
        return bool((expected.view(np.uint32) == got[rows, cols].view(np.uint32)).all())

    def total(self, stage: str, terms: Any) -> Any | None:
        """The sum of framework array `[K]` in the order of `stage`, shape `[1]`; None where there is none."""
        key = (stage, int(terms.shape[0]))
        order = self.orders.get(key)
        self.how[key] = NATIVE if order is None else SUMMED
        # Float32 addition is the same operation everywhere: a thousand of them need no kernel.
        return None if order is None else self.put(evaluate.evaluate(order, Sum(self.get(terms)[None])))


class _Ordered:
    """A stage in its order, or natively where its order is not known."""

    def __init__(self, inside: Backend, native: Callable[..., Any], ordered: Callable[..., Any]):
        self._inside, self._native, self._stage = inside, native, ordered
        self._compiled: dict[tuple[tuple[str, Any], ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        result = self._stage(*arguments, **options)
        if result is not None:
            return result
        key = tuple(sorted(options.items()))
        if key not in self._compiled:
            self._compiled[key] = self._inside.compile(functools.partial(self._native, **options))
        return self._compiled[key](*arguments)


class _Product:
    """matmul_pre_norm, zero_source_f32: the left factor times V as the layout says."""

    def __init__(self, backend: OrderedBackend, name: str):
        self._backend, self._name = backend, name
        self._scaled = backend.inside.compile(backend.inside.replay["u_scaled"])

    def __call__(self, *arguments: Any, layout: str) -> Any:
        *left, v = arguments
        # zero_source_f32 has U and S apart, and rounds their product before it multiplies by V.
        a = left[0] if len(left) == 1 else self._scaled(left[1], left[0])
        return self._backend.product(self._name, a, v.T if LAYOUTS[layout].transposed else v)


class _Ratio:
    """normalization: sum(S) / sum(scaled_s)."""

    def __init__(self, backend: OrderedBackend, name: str):
        self._backend, self._name = backend, name

    def __call__(self, scaled_s: Any, s: Any) -> Any:
        above, below = (self._backend.total(self._name, terms) for terms in (s, scaled_s))
        return None if above is None else above / below


_REPLAYED: Mapping[Noise, Callable[[OrderedBackend, str], Callable[..., Any]]] = MappingProxyType(
    {Noise.PRODUCT: _Product, Noise.SUM_RATIO: _Ratio}
)


def in_blocks(order: Order, terms: int) -> tuple[list[tuple[int, int]], Order] | None:
    """Blocks of K that are one FMA chain each, and the order that adds them; None for an order of another kind."""
    match order:
        case Chain(fma=True, backward=False):
            return [(0, terms)], Chain()
        case Blocks(_, Chain(fma=True, backward=False), outer, _):
            return block_ranges(order, terms), outer
        case _:
            return None


def with_order(backend: Backend, orders: Orders | None, source: str) -> Backend:
    """`backend` as it is for None; otherwise one that sums in `orders`, which came from `source`."""
    return backend if orders is None else OrderedBackend(backend, orders, source)


def note_order(rows: Iterable[dict[str, Any]], backend: Backend, terms: Mapping[str, int]) -> None:
    """Say in every row of an ordered stage how its order was kept; `terms` are the singular values of each tensor."""
    if not isinstance(backend, OrderedBackend):
        return
    for row in rows:
        how = backend.how.get((row["stage"], terms.get(row["tensor"], 0)))
        if how is not None:
            row["order"] = how
            row["note"] = row.get("note") or f"computed {HOW[how]}"


def order_rows(backend: Backend) -> list[dict[str, Any]]:
    """What a report says of the orders of a run: per stage and count of terms, the order and how it was kept."""
    if not isinstance(backend, OrderedBackend):
        return []
    return [
        {
            "stage": stage,
            "terms": terms,
            "order": format_order(backend.orders[stage, terms]) if (stage, terms) in backend.orders else None,
            "how": how,
            "words": f"computed {HOW[how]}",
        }
        for (stage, terms), how in backend.how.items()
    ]
