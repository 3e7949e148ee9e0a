"""Products with weights: projections, the replay's two, the router's; where they are rounded, and what faults make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial as applied

import numpy as np

from stages.oracle.bounds import U32
from stages.recipes.at import At, Unknown
from stages.recipes.recipe import NARROW, Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Pieces, Value, joined, nearest, point, product
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
    left = (
        at.input(0) if at.stage.inputs else point(at.taken(nearest(at.params()[0][1] * at.params()[1][1], "float32")))
    )
    return Factor("V", left, v.T if LAYOUTS[at.options["layout"]].transposed else v)


def linear(
    at: At,
    *,
    bias: str = "inside",
    blocks: int = 0,
    partial: str = "own",
    added: str = "float32",
    unit: tuple[float, float] | None = None,
    pieces: Pieces | None = None,
    order: Sequence[str] = (),
    other: str = "",
) -> Value | None:
    """y = x W^T (+ bias) of each projection, joined.

    `blocks`: partial sums of so many slices of K rounded to `partial`, and `added` in that. `unit`: what a tensor core
    cuts off, in u K of (R, |r|). `pieces`: see `value.product`.
    """
    done = []
    for factor in factors(at, order):
        changed = _changed(at, factor, other)
        if changed is None or changed.w.shape[0] != changed.x.mid.shape[-1]:
            return None
        y = _sum(at, changed, blocks, partial, added, unit, pieces)
        if changed.bias is not None and bias != "missing":
            y = (at.stored(y) if bias == "after" else y) + changed.bias
            y = y.off(U32 * np.abs(y.mid))
        done.append(y)
    return joined(done) if len(done) > 1 else done[0]


def _sum(
    at: At,
    factor: Factor,
    blocks: int,
    partial: str,
    added: str,
    unit: tuple[float, float] | None,
    pieces: Pieces | None,
) -> Value:
    lam = at.lam(Noise.PRODUCT)
    if not blocks:
        y = product(factor.x, factor.w, lam, pieces)
        return cut_off(at, y, factor.x, factor.w, unit)
    dtype = at.inside if partial == "own" else partial
    found: Value | None = None
    for part in np.array_split(np.arange(len(factor.w)), blocks):
        x = factor.x.map(applied(np.take, indices=part, axis=-1))
        term = cut_off(at, product(x, factor.w[part], lam), x, factor.w[part], UNITS.get(at.run)).once(dtype)
        found = term if found is None else (found + term).to(dtype if added == "own" else "float32")
    assert found is not None
    return found


def cut_off(at: At, y: Value, a: Value | np.ndarray, b: Value | np.ndarray, unit: tuple[float, float] | None) -> Value:
    """`y` = a @ b with what accumulators that truncate lose: u K (R r1 + |y| r2), R the root of all terms' squares.

    docs/findings/gpu.md has where it comes from. None: of a sum in float32, unless operands are in fewer bits.
    """
    unit = unit or at.unit
    if unit is None:
        return y
    x, w = (np.square(point(m).mid.astype(np.float32)) for m in (a, b))
    root = np.sqrt((x @ w).astype(np.float64) + y.mid * y.mid)
    return y.off(U32 * x.shape[-1] * (unit[0] * root + unit[1] * np.abs(y.mid)))


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
    whole = at.but(columns=None).weight(factor.name)
    if whole.shape[0] != whole.shape[1]:
        return None
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

# Half of R / L and |r| / 2 of shared/gpu-rounding.md's table: what is taken when the device is not known.
UNITS = {"bfloat16": (1 / 8, 1 / 2), "float16": (1 / 4, 1.0)}

# Ways to make float32 products of narrow ones on tensor cores, in words and as pieces.
IN_PIECES: dict[str, Pieces] = {
    "in three products of TF32 pieces (3xTF32)": (2, 10),
    "in three products of bfloat16 pieces (BF16x3)": (2, 7),
    "in six products of bfloat16 pieces (BF16x6)": (3, 7),
}
_SPLIT = "as ranks add partial sums that travel in {dtype}, and cuBLAS those of a split K"
FORMS = (
    prescribed("summed in float32, rounded once", who="PyTorch and JAX on a CPU (ran)"),
    equivalent("the product rounded, then the bias added", dtypes=NARROW, who="keras-hub (ran)", bias="after"),
    *(
        equivalent(
            "summed by a tensor core, whose accumulators truncate",
            dtypes=(dtype,),
            who="NVIDIA from Volta in float16, from Ampere in bfloat16: arXiv 2511.10909 (read)",
            wider=True,
            unit=unit,
        )
        for dtype, unit in UNITS.items()
    ),
    *(
        narrower(f"partial sums of {n} slices of K rounded to {{dtype}}", dtypes=NARROW, usual=_SPLIT, blocks=n)
        for n in (2, 4, 8)
    ),
    *(
        narrower(
            f"partial sums of {n} slices of K rounded to {{dtype}}, and added in it",
            dtypes=NARROW,
            usual=_SPLIT,
            blocks=n,
            added="own",
        )
        for n in (2, 4, 8)
    ),
    *(
        narrower(
            f"partial sums of {n} slices of K rounded to bfloat16", dtypes=("float32",), blocks=n, partial="bfloat16"
        )
        for n in (2, 4, 8)
    ),
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
