"""RoPE, its tables and its frequencies: where they are rounded, and what faults make of them."""

from __future__ import annotations

import numpy as np

from stages.oracle import bounds
from stages.oracle import decoder as forward
from stages.oracle.bounds import U32
from stages.recipes.at import At
from stages.recipes.recipe import FIT, Kind, Mod, equivalent, prescribed
from stages.recipes.value import Value, point
from stages.spec.noise import Noise

_HALVES = "halves"


def inputs(at: At) -> Value:
    """What is turned, `[tokens, heads, head_dim]`."""
    o = at.options
    if at.stage.function.startswith("q"):
        return at.input(0).map(lambda x: forward._queries(x, o["heads"], o["head_dim"]))
    return at.input(0).map(lambda x: forward._keys(x, o["heads"], o["kv_heads"], o["head_dim"]))


def rope(
    at: At,
    *,
    form: str = "each",
    pairs: str = _HALVES,
    sign: int = 1,
    left_out: str = "",
    of: float = 1.0,
    of_pairs: float = 1.0,
) -> Value | None:
    """x cos + x' sin; `form` says which of the three operations are rounded to the storage dtype.

    `of`: the part of each head that is turned; `of_pairs`: the part of its pairs.
    """
    x = inputs(at)
    cos, sin = (at.input(n).map(lambda t: t[:, None]) for n in (1, 2))
    turned = _turned(x, halves=pairs == _HALVES)
    if pairs == "interleaved":
        half = x.mid.shape[-1] // 2
        cos, sin = (t.map(lambda a: np.repeat(a[..., :half], 2, axis=-1)) for t in (cos, sin))
    if left_out == "swapped":
        cos, sin = sin, cos
    if left_out == "all":
        return x
    direct, across = x * cos, turned * sin * float(sign)
    if left_out == "sin":
        return direct
    whole = _added(at, direct, across, form)
    columns = np.arange(x.mid.shape[-1])
    kept = (columns < of * len(columns)) & (columns % (len(columns) // 2) < of_pairs * (len(columns) // 2))
    if kept.all():
        return whole
    return Value(*(np.where(kept, a, b) for a, b in zip(_three(whole), _three(x), strict=True)))


def _three(x: Value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return x.lo, x.mid, x.hi


def _turned(x: Value, *, halves: bool) -> Value:
    """Each pair (a, b) as (-b, a)."""

    def turn(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        if halves:
            half = own.shape[-1] // 2
            return np.concatenate((-other[..., half:], own[..., :half]), axis=-1)
        return np.stack((-other[..., 1::2], own[..., ::2]), axis=-1).reshape(own.shape)

    mid = turn(x.mid, x.mid)
    return point(mid) if x.sure else Value(turn(x.lo, x.hi), mid, turn(x.hi, x.lo))


def _added(at: At, direct: Value, across: Value, form: str) -> Value:
    if form == "cos not":
        return direct + _stored(at, across)
    if form == "sin not":
        return _stored(at, direct) + across
    if form == "once":
        return (direct.soft(1) + across.soft(1)).soft(1)
    return _stored(at, direct) + _stored(at, across)


def _stored(at: At, product: Value) -> Value:
    """A product rounded by everybody; in float32 too, where a contraction is a form of its own."""
    return product.once(at.inside)


FORMS = (
    prescribed(
        "each product rounded, then their sum",
        who="transformers apply_rotary_pos_emb (ran); MLX rope's fallback, mlx/fast.cpp (read)",
    ),
    equivalent("contracted: the product with the cosine not rounded", who="XLA under jit (ran)", form="cos not"),
    equivalent("contracted: the product with the sine not rounded", who="XLA under jit (ran)", form="sin not"),
    equivalent(
        "in float32, rounded once",
        who="torch.compile (ran); flashinfer pos_enc.cuh (read); MLX rope.metal (read)",
        form="once",
    ),
)
MODS = (
    Mod("pairs are interleaved (2i, 2i + 1), not halves (i, i + d/2)", {"pairs": "interleaved"}),
    Mod("pairs are interleaved, the frequencies by halves", {"pairs": "mixed"}),
    Mod("turned the other way: rope_sin has the other sign", {"sign": -1}),
    Mod("rope_cos and rope_sin are swapped", {"left_out": "swapped"}),
    Mod("not turned by RoPE at all", {"left_out": "all"}),
    Mod("the term with rope_sin is missing", {"left_out": "sin"}),
    *(Mod(f"only {name} of each head is turned", {"of": part}) for name, part in (("half", 0.5), ("a quarter", 0.25))),
    *(Mod(f"only the first {n} of 8 pairs are turned", {"of_pairs": n / 8}) for n in range(1, 8)),
)
ROPE = Kind(
    "rope",
    rope,
    FORMS,
    MODS,
    by_rows=True,
    doc="x cos + x' sin, x' the other half of each head, one of the two with its sign turned. Two products and a sum: "
    "each may be rounded, or contracted with the next.",
)


# -- tables -------------------------------------------------------------------------------------------------------


def table(at: At, *, swapped: bool = False, degrees: bool = False, cuda: bool = False) -> Value | None:
    """cos or sin of the angles times the attention factor, float32, cast. `cuda`: on GPUs alone."""
    if cuda:
        at.on_gpu()
    x = at.input(0).mid * (np.pi / 180 if degrees else 1.0)
    f = np.cos if (at.stage.function == "rope_cos") != swapped else np.sin
    mid = f(x)
    # A library may bound its error by units of 1 near the zeros.
    y = point(mid).off(4 * U32 * np.abs(mid) + 2.0**-26) * float(at.options["attention_scaling"])
    return y.soft(1)


TABLE = Kind(
    "table",
    table,
    (
        prescribed("of float32 angles, in float32, cast", who="transformers (ran)"),
        equivalent(
            "within two floats of the right one",
            who="CUDA's cosf and sinf, by LLVM libc's table of GPU functions (read)",
            wider=True,
            rms=0.45,  # 0.16 and 0.30 of functions drawn up to that limit (tests/recipes/test_gpu.py)
            cuda=True,
        ),
    ),
    (
        Mod("cosine and sine are swapped", {"swapped": True}),
        Mod("of angles taken for degrees", {"degrees": True}),
    ),
    doc="cos or sin of the angles in float32, times the attention factor, cast once.",
)


def angle(at: At, *, shift: int = 0, pairs: bool = False, reverse: bool = False) -> Value | None:
    """position * inv_freq."""
    f, places = at.input(0), at.params()[0][1] + shift
    places = places[::-1] if reverse else places
    f = f.map((lambda a: np.repeat(a, 2)) if pairs else (lambda a: np.concatenate((a, a))))
    return f.map(lambda a: a[None]) * places[:, None]


ANGLE = Kind(
    "angle",
    angle,
    (prescribed("position times inv_freq, in float32", who="transformers (ran)"),),
    (
        Mod("positions are shifted by +1", {"shift": 1}),
        Mod("positions are shifted by -1", {"shift": -1}),
        Mod("frequencies are repeated in pairs, not as halves", {"pairs": True}),
        Mod("positions are counted from the end", {"reverse": True}),
    ),
    doc="position * inv_freq, the frequencies twice over: one product in float32, so that its bits are certain.",
)


# -- frequencies ----------------------------------------------------------------------------------------------------


def inv_freq(at: At, *, theta: float | None = None) -> Value | None:
    """theta^(-2i/d), scaled as the rope_type says."""
    options = at.options if theta is None else {**at.options, "rope_theta": theta}
    positions = at.array(0)
    value = forward.inv_freq(positions, **options)
    operands = forward.OPERANDS["inv_freq"](positions, **options)
    return point(value).off(bounds.BOUNDS[Noise.INV_FREQ][0](at.lam(Noise.INV_FREQ), *operands, value))


# Thetas that models have.
THETAS = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)
INV_FREQ = Kind(
    "inv_freq",
    inv_freq,
    (prescribed("a power, in float32", who="transformers (ran)"),),
    (
        *(Mod(f"as if rope_theta were {theta:.9g}, not {{rope_theta:.9g}}", {"theta": theta}) for theta in THETAS),
        Mod("as if rope_theta were {fit:.9g}, not {rope_theta:.9g}", {"theta": FIT}),
    ),
    doc="theta^(-2i/head_dim), scaled as the rope_type says. However the power is made, it is inside one bound.",
)
