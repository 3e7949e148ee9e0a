"""Products with weights: projections, the replay's two, the router's; where they are rounded, and what faults make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial as applied
from functools import reduce
from operator import itemgetter

import numpy as np

from stages.oracle.bounds import U32
from stages.recipes.at import At, Unknown
from stages.recipes.recipe import NARROW, Form, Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Pieces, Value, any_of, joined, nearest, point, product
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise


@dataclass(frozen=True)
class Factor:
    """One weight of a product: `x @ w + bias`, w `[K, columns]`."""

    name: str
    x: Value
    w: np.ndarray
    bias: np.ndarray | None = None


def factors(at: At, order: Sequence[str] = ()) -> list[Factor]:
    """The products that a stage joins, of one `part` that alone. `order`: two weights swapped, by a word of each."""
    if at.stage.noise is Noise.PRODUCT and "layout" in at.options:
        return [_replayed(at)]
    if not at.stage.inputs:
        return [Factor(at.stage.params[1], at.whole(0), at.weight(at.stage.params[1]).T)]
    x, weights = at.input(0), [name for name in at.stage.params if len(at.shape(name)) == 2]
    taken = _swapped(weights, order)
    if any(at.shape(name) != at.shape(other) for name, other in taken.items()):
        raise Unknown(order[0])
    chosen = weights if at.part is None else [weights[at.part]]
    return [Factor(name, x, at.weight(taken[name]).T, _bias(at, taken[name])) for name in chosen]


def _bias(at: At, weight: str) -> np.ndarray | None:
    name = weight.removesuffix("weight") + "bias"
    if at.lost is not None and not at.lost.narrow.cast:
        at = at.but(lost=None)
    return at.weight(name) if name in at.stage.params else None


def _swapped(names: Sequence[str], order: Sequence[str]) -> dict[str, str]:
    found = {name: name for name in names}
    if order:
        pair = [name for word in order for name in names if word in name]
        if len(pair) != 2:
            raise Unknown(order[0])
        found.update(zip(pair, pair[::-1], strict=True))
    return found


def _replayed(at: At) -> Factor:
    """matmul_pre_norm from u_scaled, zero_source_f32 from U times S as float32 has it."""
    v = at.params()[-1][1]
    if at.stage.inputs:
        left = at.input(0)
    else:
        u, s = (a.astype(np.float64) for a in at.oracle.arguments[:2])
        left = point(at.taken(nearest(u * s, "float32")))
    return Factor("V", left, v.T if LAYOUTS[at.options["layout"]].transposed else v)


def linear(
    at: At,
    *,
    bias: str = "inside",
    blocks: int = 0,
    step: int = 1,
    partial: str = "own",
    added: str = "float32",
    core: bool = False,
    pieces: Pieces | None = None,
    order: Sequence[str] = (),
    other: str = "",
) -> Value | None:
    """y = x W^T (+ bias) of each projection, joined.

    `blocks`: partial sums of so many slices of K, multiples of `step` long, rounded to `partial`, and `added` in that.
    `core`: summed by a tensor core. `pieces`: see `value.product`.
    """
    done = []
    for factor in factors(at, order):
        changed = _changed(at, factor, other)
        if changed is None or changed.w.shape[0] != changed.x.mid.shape[-1]:
            return None
        if blocks:
            y = _of_slices(at, changed, _slices(len(changed.w), blocks, step), partial, added)
        else:
            y = summed(at, changed.x, point(changed.w), at.lam(Noise.PRODUCT), core=core, pieces=pieces)
            y = _with_sums(at, changed, y)
        if changed.bias is not None and bias != "missing":
            # Ranks add it to what they have stored, a split K to the sum.
            y = any_of([y, at.stored(y)]) if blocks else at.stored(y) if bias == "after" else y
            y = (y + changed.bias).off(U32 * np.abs(y.mid + changed.bias))
        done.append(y)
    return joined(done) if len(done) > 1 else done[0]


def _slices(k: int, count: int, step: int) -> list[np.ndarray]:
    """K in so many slices, even ones or of as many whole steps; `Unknown` where the steps change nothing."""
    length = -(-k // (count * step)) * step
    if step == 1:
        return np.array_split(np.arange(k), count)
    if length * count == k or length >= k:
        raise Unknown("slices")
    return np.split(np.arange(k), np.arange(length, k, length))


def _of_slices(at: At, factor: Factor, slices: list[np.ndarray], partial: str, added: str) -> Value:
    """Partial sums rounded to be stored, and added in float32 or in the format that they have."""
    dtype = at.inside if partial == "own" else partial
    key = ("slices", factor.name, dtype, tuple(map(len, slices)))
    found = at.kept(key, lambda: _partial(at, factor, slices).once(dtype))
    terms = [found.map(itemgetter(n)) for n in range(len(slices))]
    if added == "own":
        return _added(found, dtype)
    return reduce(lambda total, term: (total + term).soft(1), terms)


def _partial(at: At, factor: Factor, slices: list[np.ndarray]) -> Value:
    """Sums of slices of K, `[slices, rows, columns]`."""
    count = len(slices)
    summed_up = applied(summed, at, lam=at.lam(Noise.PRODUCT), core=at.run in at.oracle.lambdas.cores)
    if len({len(part) for part in slices}) == 1:  # all at once
        x = factor.x.map(lambda a: a.reshape(len(a), count, -1).swapaxes(0, 1))
        return summed_up(x, point(factor.w.reshape(count, -1, factor.w.shape[-1])))
    parts = ((factor.x.map(applied(np.take, indices=part, axis=-1)), factor.w[part]) for part in slices)
    terms = [summed_up(x, point(w)) for x, w in parts]
    return Value(*(np.stack([getattr(term, end) for term in terms]) for end in ("lo", "mid", "hi")))


def _added(terms: Value, dtype: str) -> Value:
    """Partial sums `[ranks, ..]` added in their own format: in the order of ranks, or, of few, as rings and trees go.

    Both ends and the middle are added at once.
    """
    x = np.stack([terms.lo, terms.mid, terms.hi], axis=1)
    ways = reduce(lambda total, term: nearest(total + term, dtype), x)[None]
    if 2 < len(x) <= _RANKS:
        ways = np.concatenate([ways, _in_orders(x, dtype)])
    return Value(ways[:, 0].min(axis=0), ways[0, 1], ways[:, 2].max(axis=0))


def _in_orders(x: np.ndarray, dtype: str) -> np.ndarray:
    """Sums of `[ranks, ...]` over the ranks: of a ring that begins anywhere and runs either way, of two trees."""
    places = np.arange(len(x))
    around = np.stack([np.roll(line, -n) for n in places for line in (places, places[::-1])])
    rings = x[around[:, 0]]
    for places in around.T[1:]:
        rings = nearest(rings + x[places], dtype)
    near = far = x
    while len(near) > 1:  # of an odd number the last one waits
        half = len(near) // 2
        near = np.concatenate([nearest(near[: 2 * half : 2] + near[1 : 2 * half : 2], dtype), near[2 * half :]])
        far = np.concatenate([nearest(far[:half] + far[half : 2 * half], dtype), far[2 * half :]])
    return np.concatenate([rings, near, far])


def summed(at: At, a: Value, b: Value, lam: float, *, core: bool = False, pieces: Pieces | None = None) -> Value:
    """`a @ b` in float32, with what a tensor core's accumulators cut off: u K of the root of all terms' squares and of
    the result (oracle/cores.py). `core`: see `At.core`.
    """
    y, found = product(a, b, lam, pieces), at.core(None if pieces is None else pieces.core, asked=core)
    if found is None:
        return y
    x, w = (np.square(m.mid.astype(np.float32)) for m in (a, b))
    root = np.sqrt((x @ w).astype(np.float64) + y.mid * y.mid)
    of_root, of_result = found.lost
    return y.off(U32 * x.shape[-1] * (of_root * root + of_result * np.abs(y.mid)))


def _with_sums(at: At, factor: Factor, y: Value) -> Value:
    """With what a kernel adds that keeps the sums of its input's blocks; `Unknown` where its weights have no use of
    them: then it computes what one without them does."""
    blocks = None if at.lost is None else at.lost.narrow.blocks
    if blocks is None or not blocks.summed:
        return y
    x, least = at.but(lost=None).input(0).mid, at.least(factor.name)
    sums = blocks.sums(x, factor.x.mid, least, factor.x.lo, factor.x.hi)
    if sums is None:
        raise Unknown("sums of blocks")
    return (y + sums.extra).off(sums.room)


def _changed(at: At, factor: Factor, other: str) -> Factor | None:
    if not other:
        return factor
    change = _OTHERS[other](at, factor)
    return None if change is None else replace(factor, **change)


def _turned_weight(at: At, factor: Factor) -> dict[str, np.ndarray] | None:
    if "layout" in at.options:
        v = at.params()[-1][1]
        return {"w": v if LAYOUTS[at.options["layout"]].transposed else v.T}
    if not at.stage.inputs:
        return None
    rows, columns = at.shape(factor.name)
    if rows != columns:
        return None
    whole = at.but(columns=None).weight(factor.name)
    return {"w": whole if at.columns is None else whole[:, at.columns]}


def _unnormed(at: At, factor: Factor) -> dict[str, Value] | None:
    """The input of the norm that made the product's input."""
    maker = at.maker(at.stage.inputs[0]) if at.stage.inputs else None
    return {"x": at.cut(maker.recorded(0))} if maker is not None and maker.stage.noise is Noise.RMS_NORM else None


def _heads(turn: Callable[[np.ndarray], np.ndarray]) -> Callable[[At, Factor], dict[str, Value] | None]:
    def changed(at: At, factor: Factor) -> dict[str, Value] | None:
        maker = at.maker(at.stage.inputs[0]) if at.stage.inputs else None
        if maker is None or maker.stage.noise is not Noise.WEIGHTED:
            return None
        by_heads = at.array(0).astype(np.float64).reshape(len(at.array(0)), maker.options["heads"], -1)
        return {"x": at.cut(point(turn(by_heads).reshape(len(by_heads), -1)))}

    return changed


_OTHERS: dict[str, Callable[[At, Factor], dict | None]] = {
    "transposed": _turned_weight,
    "unnormed": _unnormed,
    "heads first": _heads(lambda x: x.swapaxes(0, 1)),
    "columns first": _heads(lambda x: x.swapaxes(1, 2)),
    "heads reversed": _heads(lambda x: x[:, ::-1]),
}

# Ways to make float32 products of narrow ones on tensor cores, in words and as pieces.
IN_PIECES: dict[str, Pieces] = {
    "in three products of TF32 pieces (3xTF32)": Pieces(2, 10, "tf32"),
    "in three products of bfloat16 pieces (BF16x3)": Pieces(2, 7, "bfloat16"),
    "in six products of bfloat16 pieces (BF16x6)": Pieces(3, 7, "bfloat16"),
}
_SPLIT = (
    "as ranks add partial sums that travel in {dtype}, and cuBLAS those of a split K where torch's "
    "allow_bf16_reduced_precision_reduction and allow_fp16_... let it"
)
# Ranks that share a product; a split K has up to 32 slices, of whole tiles.
_RANKS = 8
_SPLITS = ((2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (4, 64), (8, 64))


def _split(dtypes: tuple[str, ...], partial: str, usual: str, splits: Sequence[tuple[int, int]]) -> Iterator[Form]:
    """Rows of partial sums that are stored in few bits."""
    kept = "{dtype}" if partial == "own" else partial
    for added, then in (("float32", ""), ("own", ", and added in it")):
        for n, step in splits:
            tiles = f", {step} and its multiples long," if step > 1 else ""
            words = f"partial sums of {n} slices of K{tiles} rounded to {kept}{then}"
            yield narrower(words, dtypes=dtypes, usual=usual, blocks=n, step=step, partial=partial, added=added)


FORMS = (
    prescribed("summed in float32, rounded once", who="PyTorch and JAX on a CPU (ran)"),
    equivalent("the product rounded, then the bias added", dtypes=NARROW, who="keras-hub (ran)", bias="after"),
    equivalent(
        "summed by a tensor core, whose accumulators truncate",
        dtypes=NARROW,
        who="NVIDIA from Volta in float16, from Ampere in bfloat16: arXiv 2511.10909 (read)",
        wider=True,
        core=True,
    ),
    *_split(NARROW, "own", _SPLIT, _SPLITS),
    *_split(("float32",), "bfloat16", "", _SPLITS[:3]),
    *(narrower(words, dtypes=("float32",), pieces=pieces) for words, pieces in IN_PIECES.items()),
)
MODS = (
    Mod("the bias is missing", {"bias": "missing"}),
    Mod("its weight is transposed", {"other": "transposed"}),
    Mod("k_proj and v_proj are swapped", {"order": ("k_proj", "v_proj")}),
    Mod("q_proj and k_proj are swapped", {"order": ("q_proj", "k_proj")}),
    Mod("q_proj and v_proj are swapped", {"order": ("q_proj", "v_proj")}),
    Mod("the norm before it is missing: it is of the norm's input", {"other": "unnormed"}),
    Mod("the heads of its input are joined without bringing the tokens first", {"other": "heads first"}),
    Mod("the heads of its input are joined column by column", {"other": "columns first"}),
    Mod("the heads of its input are in reverse order", {"other": "heads reversed"}),
)
LINEAR = Kind(
    "product",
    linear,
    FORMS,
    MODS,
    cheap=False,
    by_rows=True,
    doc="x W^T, and a bias where the model has one. Operands are taken as they are stored and summed in float32; the "
    "order of that sum is free, and inside the bound. Of projections that a stage joins each has its own recipe.",
)
