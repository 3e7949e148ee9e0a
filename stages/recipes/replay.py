"""The component replay's short stages: where they are rounded, and what faults make of them."""

from __future__ import annotations

import numpy as np

from stages.recipes.at import At
from stages.recipes.product import LINEAR, linear
from stages.recipes.recipe import Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Value, keep, point, product, total
from stages.spec.noise import Noise

_WIDE = ("float32",)


def scaled_s(at: At, *, form: str = "each", instead: str = "") -> Value | None:
    """S (1 + z), `[rank]`."""
    z, s = at.input(0), at.params()[0][1]
    if instead:
        others = {"none": lambda: point(s), "product": lambda: z * s, "sum": lambda: z + s}
        return others[instead]() if instead in others else (z.map(np.exp).soft(4) * s).soft(1)
    if form == "contracted":
        return z * s + s
    return (z + 1.0).once("float32" if form == "each" else form) * s


SCALED_S = Kind(
    "scaled_s",
    scaled_s,
    (
        prescribed("1 + z rounded, times S"),
        equivalent("contracted: S + S z in one operation", dtypes=_WIDE, who="XLA under jit (ran)", form="contracted"),
        narrower("1 + z in bfloat16", dtypes=_WIDE, form="bfloat16"),
        narrower("1 + z in float16", dtypes=_WIDE, form="float16"),
    ),
    (
        Mod("the offsets are missing", {"instead": "none"}),
        Mod("S * offsets: the 1 + is missing", {"instead": "product"}),
        Mod("S + offsets instead of S * (1 + offsets)", {"instead": "sum"}),
        Mod("S * exp(offsets) instead of S * (1 + offsets)", {"instead": "exp"}),
    ),
    doc="S (1 + z), z the offsets: a sum and a product in float32.",
)


def ratio(at: At, *, instead: str = "") -> Value | None:
    """sum(S) / sum(scaled_s), `[1]`."""
    scaled, s = at.input(0).mid, at.params()[0][1]
    if instead == "one":
        return point(np.ones(1))
    if instead == "norms":
        s, scaled = s * s, scaled * scaled
    top, bottom = (_sum(a) for a in (s, scaled))
    y = (bottom / top if instead == "upside down" else top / bottom).soft(1)
    return y.map(np.sqrt) if instead == "norms" else y


def _sum(x: np.ndarray) -> Value:
    """A float32 sum in any order; of mixed signs its noise is of what was summed."""
    found = total(point(np.abs(x)))
    exact = np.array([x.sum()])
    return point(exact).off((found.hi - found.lo) / 2)


RATIO = Kind(
    "normalization",
    ratio,
    (prescribed("a quotient of two float32 sums"),),
    (
        Mod("the quotient is upside down", {"instead": "upside down"}),
        Mod("the quotient is of norms, not of sums", {"instead": "norms"}),
        Mod("the normalization is missing: it is 1", {"instead": "one"}),
    ),
    doc="sum(S) / sum(scaled_s): two sums in float32, in any order, and a quotient.",
)


def u_scaled(at: At, *, instead: str = "") -> Value | None:
    """U with column j times scaled_s[j], `[rows, rank]`."""
    s, u = at.input(0).mid, at.params()[0][1]
    if instead == "none":
        return point(u)
    if instead == "rows":
        return point(u * s[:, None]) if len(u) == len(s) else None
    return point(u * s)


U_SCALED = Kind(
    "u_scaled",
    u_scaled,
    (prescribed("one product, rounded"),),
    (
        Mod("the product with scaled_s is missing", {"instead": "none"}),
        Mod("rows of U are scaled, not columns", {"instead": "rows"}),
    ),
    doc="Column j of U times scaled_s[j]: one product.",
)


def adapted(at: At, *, power: int = 1) -> Value | None:
    """matmul_pre_norm times the normalization."""
    y = at.input(0) * at.input(1).map(lambda n: n**power)
    return y.soft(2) if power > 1 else y  # one factor after the other, or their product


ADAPTED = Kind(
    "adapted_source",
    adapted,
    (prescribed("one product, rounded"),),
    (
        Mod("the normalization is missing", {"power": 0}),
        Mod("divided by the normalization, not multiplied", {"power": -1}),
        Mod("normalized twice", {"power": 2}),
    ),
    doc="matmul_pre_norm times the normalization: one product.",
)


def whole(at: At, *, power: int = 1) -> Value | None:
    """A whole replay's weight, of what it is contracted from: (U scaled_s) V^T times the normalization."""
    times = point(np.array(at.options["ratio"])).off(np.array(at.options["ratio_off"]))
    y = product(at.input(0), at.params()[0][1], at.lam(Noise.PRODUCT))
    return (y * times.map(lambda n: n**power)).soft(1) if power else y


WHOLE = Kind(
    "adapted_weight",
    whole,
    (prescribed("a product in float32, times the normalization"),),
    (Mod("the normalization is missing", {"power": 0}), Mod("normalized twice", {"power": 2})),
    by_rows=True,
    doc="(U scaled_s) V^T times the normalization: a whole adapted weight, judged from the bundle's U, S, V, offsets.",
)


def final(at: At, *, turned: bool = False) -> Value | None:
    """The adapted weight, turned where the target's orientation is another."""
    return at.input(0).map(lambda x: x.T if bool(at.options["transpose"]) != turned else x)


FINAL = Kind(
    "final",
    final,
    (prescribed("a copy"),),
    (Mod("{turned}", {"turned": True}),),
    doc="The adapted weight in the target's orientation: a copy, transposed or not.",
)


def cast(at: At, *, how: str = "") -> Value | None:
    """final_f32, rounded to bfloat16 by the boundary or, here, otherwise."""
    x = at.input(0)
    return x.map(lambda a: keep(a, 7, how)) if how else x


CAST = Kind(
    "cast",
    cast,
    (prescribed("rounded to nearest even"),),
    (
        Mod("truncated, not rounded to nearest even", {"how": "truncate"}),
        Mod("ties rounded away, not to even", {"how": "away"}),
    ),
    doc="final_f32 cast to bfloat16: one rounding.",
)


# The two products with V: their operands were rounded to float32, the second's left one inside the stage.
CONTRACTED = Kind(
    "contracted",
    linear,
    tuple(form for form in LINEAR.forms if form.of("float32")),
    (Mod("V is contracted as {other_layouts}, the layout says {layout}", {"other": "transposed"}),),
    cheap=False,
    doc="u_scaled V^T, and (U S) V^T of the replay without offsets: products of float32.",
)
