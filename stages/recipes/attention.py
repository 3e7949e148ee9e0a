"""Scores, softmax and the weighted values: where they are rounded, and what faults make of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from stages.oracle import decoder as forward
from stages.oracle.bounds import U32
from stages.recipes.at import At, Unknown
from stages.recipes.product import IN_PIECES, summed
from stages.recipes.recipe import FIT, NARROW, Form, Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Pieces, Value, any_of, nearest, point, total
from stages.spec.causal import up_to_query
from stages.spec.noise import Noise

# A mistake in how heads share keys and values is one mistake in two stages, in words.
DEALT: Mapping[str, str] = MappingProxyType(
    {
        stage: f"{what} heads are dealt out in turn, not each to consecutive query heads"
        for stage, what in (("attn_scores", "key"), ("attention", "value"))
    }
)


def _keys_for(x: np.ndarray, heads: int, tiled: bool) -> np.ndarray:
    """Keys or values `[tokens, kv_heads, head_dim]` as `[heads, tokens, head_dim]`."""
    turned, group = x.swapaxes(0, 1), heads // x.shape[1]
    return np.tile(turned, (group, 1, 1)) if tiled else np.repeat(turned, group, axis=0)


def scores(
    at: At,
    *,
    form: str = "each",
    held: str = "",
    factor: str | float = 1.0,
    tiled: bool = False,
    swapped: bool = False,
    cap: float | None = None,
    core: bool = False,
    steps: bool = False,
    rotated: bool = False,
    pieces: Pieces | None = None,
) -> Value | None:
    """q k^T scaled, `[heads, queries, keys]`; `form` says where the scale goes and what is rounded before it.

    `held`: the dtype that q and k are rounded to once they are scaled by its root, where it is not the activations'.
    `cap`: c tanh(s / c), in `steps` that are each rounded. `rotated`: each head has those of the one before it.
    """
    scale = float(nearest(np.float64(at.options["scaling"]), "float32"))
    scale = float(nearest(np.float64(scale * _times(at, factor)), "float32"))
    q, k = at.input(0), at.input(1)
    heads = q.mid.shape[1]
    if tiled and not 1 < k.mid.shape[1] < heads:
        return None
    q, k = q.map(lambda x: x.swapaxes(0, 1)), k.map(lambda x: _keys_for(x, heads, tiled))
    q, k = (k, q) if swapped else (q, k)
    if form in ("scale narrow", "narrow in q"):
        scale = float(at.narrow(np.float64(scale)))
    if form in ("in q", "narrow in q"):
        q, scale = at.stored(q * scale), 1.0
    if form == "in q, float32":
        q, scale = (q * scale).soft(1), 1.0
    if form == "root":
        q, k = (x * np.sqrt(scale) for x in (q, k))
        q, k = (x.soft(1).once(held) if held else at.stored(x) for x in (q, k))
        scale = 1.0
    k = k.map(lambda x: x.swapaxes(1, 2))
    y = summed(at, q, k, at.lam(Noise.SCORES), core=core, pieces=pieces)
    if form in ("each", "scale narrow"):
        y = at.stored(y)
    y = (y * scale).soft(1) if scale != 1.0 else y
    y = y.map(_rotated) if rotated else y
    if cap is None:
        return y
    if steps:
        return at.stored(at.stored(at.stored(y) / cap).map(np.tanh).soft(8)) * cap
    return (y / cap).map(np.tanh).soft(8) * cap


def _rotated(heads: np.ndarray) -> np.ndarray:
    return np.roll(heads, 1, axis=0)


def _times(at: At, factor: str | float) -> float:
    """A wrong factor of the scale: a number, or `twice`, `missing`, `upside down`."""
    scale = float(at.options["scaling"])
    if isinstance(factor, float):
        return factor
    return {"missing": 1 / scale, "twice": scale, "upside down": scale**-2}[factor]


_SCORE_FORMS = (
    prescribed("the product rounded, then scaled", who="transformers eager (ran)"),
    equivalent(
        "scaled in float32, rounded once",
        dtypes=NARROW,
        who="flash attention 2 csrc/flash_attn/src/softmax.h (read); ggml ggml-cpu/ops.cpp (read)",
        form="once",
    ),
    equivalent(
        "the scale folded into q, which is rounded",
        who="an early Bumblebee, lib/bumblebee/layers.ex (read)",
        form="in q",
    ),
    equivalent("the scale folded into q in float32", dtypes=NARROW, form="in q, float32"),
    equivalent("its root folded into q and into k", who="torch.onnx, which writes sdpa so (read and ran)", form="root"),
    *(
        equivalent(
            f"the product summed by a tensor core, whose accumulators truncate{words}",
            dtypes=NARROW,
            wider=True,
            core=True,
            form=form,
        )
        for form, words in (("each", ""), ("once", "; rounded once"))
    ),
    narrower(
        "the scale itself rounded to {dtype}",
        dtypes=NARROW,
        who="JAX (ran); keras-hub Qwen3Attention (read); Bumblebee lib/bumblebee/layers.ex (read)",
        usual="as JAX rounds a Python number that multiplies {dtype}",
        form="scale narrow",
    ),
    narrower(
        "the scale rounded to {dtype} and folded into q, which is rounded",
        dtypes=NARROW,
        who="MLX sdpa's fallback, mlx/fast.cpp (read)",
        form="narrow in q",
    ),
    *(narrower(words, dtypes=("float32",), pieces=pieces) for words, pieces in IN_PIECES.items()),
    narrower(
        "its root folded into q and into k, which are rounded to bfloat16",
        dtypes=("float32",),
        who="OpenVINO with the precision hint bf16 (ran)",
        usual="as OpenVINO does by itself on a CPU with units for bfloat16",
        form="root",
        held="bfloat16",
    ),
)
_SCORE_MODS = (
    Mod("the scale 1/sqrt(head_dim) is missing", {"factor": "missing"}),
    Mod("the scale 1/sqrt(head_dim) is there twice", {"factor": "twice"}),
    Mod("the scores are multiplied by sqrt(head_dim), not divided", {"factor": "upside down"}),
    Mod(DEALT["attn_scores"], {"tiled": True}),
    Mod("queries and keys are swapped", {"swapped": True}),
    *(
        Mod(f"capped softly at {cap:g}{words}", {"cap": cap, **args})
        for cap in (20.0, 30.0, 50.0)
        for words, args in (("", {}), (", each step rounded", {"steps": True}))
    ),
    Mod("capped softly at {fit:.9g}", {"cap": FIT}),
    Mod("each head has the scores of the one before it", {"rotated": True}),
)
SCORES = Kind(
    "scores",
    scores,
    _SCORE_FORMS,
    _SCORE_MODS,
    cheap=False,
    doc="q k^T / sqrt(head_dim), before the mask: a product, and a scale that engines put before it, inside or after.",
)


# -- softmax ------------------------------------------------------------------------------------------------------


def softmax(
    at: At,
    *,
    chain: str = "float32",
    mask: int | None = 0,
    window: int | None = None,
    wider: int | None = 0,
    temperature: float = 1.0,
    stored: bool = False,
    sink: float | None = None,
    divided: bool = True,
    axis: str = "keys",
    fast: float = 0.0,
    per: float = 0.0,
    cuda: bool = False,
) -> Value | None:
    """Over the keys up to each query; `chain` says what of difference, exponential, sum and quotient is rounded.

    `mask`: how many keys more or fewer are seen. `window`: the last so many alone; of a sliding layer its own, `wider`
    by so many, or not there. `stored`: what `temperature` divided is rounded first. `fast`: the
    exponential's relative error, `per`: and in u of its argument. `cuda`: on GPUs alone.
    """
    if cuda:
        at.on_gpu()
    if wider != 0 and at.stage.window is None:
        raise Unknown("a sliding window")
    x = at.input(0)
    if temperature != 1.0:
        x = (x * (1 / temperature)).soft(1)
        x = at.stored(x) if stored else x
    if axis != "keys":
        x = x.map(lambda a: a.swapaxes(-1, -2))
    own = at.stage.window
    if window is not None and own is not None and (window >= x.mid.shape[-1] or abs(window - own) <= 1):
        raise Unknown("another window")  # its own, or what other rows say
    if window is None and own is not None and wider is not None:
        window = own + wider
    seen = _seen(x.mid, mask, window, turned=axis != "keys")
    e = exponentials(at, x, seen, chain, fast)
    if per:
        top = np.where(seen, x.mid, -np.inf).max(axis=-1, keepdims=True)
        e = e.off(np.where(seen, U32 * (4 + per * np.abs(x.mid - top)), 0.0) * e.mid)
    if not divided:
        return e
    t = total(e)
    if sink is not None:
        top = np.where(seen, x.mid, -np.inf).max(axis=-1, keepdims=True)
        t = t + np.exp(sink - top)
    if chain in ("quotient", "inverse"):
        t = at.stored(t, "sum")
    p = at.stored(e * at.stored(t.falling(lambda a: 1 / a), "inverse")) if chain == "inverse" else (e / t).soft(1)
    return p if axis == "keys" else p.map(lambda a: a.swapaxes(-1, -2))


def _seen(x: np.ndarray, mask: int | None, window: int | None, *, turned: bool = False) -> np.ndarray:
    queries, keys = x.shape[-2:]
    if turned:
        return np.tri(queries, keys, dtype=bool).T
    if mask is None:
        return np.ones((queries, keys), bool)
    seen = np.tri(queries, keys, keys - queries + mask, dtype=bool)
    if window is not None:
        seen &= ~np.tri(queries, keys, keys - queries - window, dtype=bool)
    return seen | ~seen.any(axis=-1, keepdims=True)


def exponentials(at: At, x: Value, seen: np.ndarray, chain: str = "float32", fast: float = 0.0) -> Value:
    """exp(x - the row's largest) where `seen`, else 0."""
    mid = np.where(seen, x.mid, -np.inf)
    d = x - mid.max(axis=-1, keepdims=True)
    if not x.sure:  # the largest moves with the scores: twice their doubt at most
        r = np.where(seen, (x.hi - x.lo) / 2, 0.0)
        d = Value(d.mid, d.mid, d.mid).off(r + r.max(axis=-1, keepdims=True))
    if chain == "float32":
        # u of the difference, which is an exponent, and of the product with log2(e); and the exponential's own.
        d = Value(d.lo, nearest(d.mid, "float32"), d.hi).off(U32 * (2 * np.abs(d.mid) + 4))
    else:
        d = at.stored(d, "difference")
    e = d.map(lambda a: np.where(seen, np.exp(np.minimum(a, 80.0)), 0.0))
    if fast:
        e = Value(e.lo * (1 - fast), np.where(seen, cubic_exponential(d.mid), 0.0), e.hi * (1 + fast))
    return e.soft(0) if chain == "float32" else at.stored(e, "exponential")


def cubic_exponential(x: np.ndarray) -> np.ndarray:
    """exp as torch has it on CPUs in 16 bits: 2^fraction by a cubic, right to 1e-4, its bits put together as a number.

    `fexp_u20` of ATen/cpu/vec/vec256 and vec512.
    """
    scaled = (x * np.float64(np.float32(1.44269504088896341))).astype(np.float32).astype(np.float64)
    part = scaled - np.floor(scaled)
    cubic = ((_CUBIC[3] * part + _CUBIC[2]) * part + _CUBIC[1]) * part + _CUBIC[0]
    bits = np.rint(2.0**23 * (scaled - cubic) + 127 * 2.0**23)
    return np.clip(bits, 0, 2**31 - 1).astype(np.int64).astype(np.uint32).view(np.float32).astype(np.float64)


_CUBIC = (0.00010703434948458272, 0.30354260500649682, -0.22433836478672356, -0.079204240219773236)


_SOFTMAX_FORMS = (
    prescribed("in float32, cast", who="transformers eager (ran)"),
    narrower(
        "in {dtype}: difference, exponential, sum and its inverse each rounded, then the product",
        dtypes=NARROW,
        who="jax.nn.softmax (ran)",
        usual="as jax.nn.softmax does on {dtype}",
        usual_in=("float16",),
        chain="inverse",
    ),
    narrower(
        "in {dtype}: difference and exponential rounded, sum and quotient in float32", dtypes=NARROW, chain="some"
    ),
    narrower(
        "in {dtype}: difference, exponential, sum and quotient each rounded",
        dtypes=NARROW,
        who="jax.nn.softmax (ran)",
        usual="as jax.nn.softmax does on {dtype}",
        usual_in=("bfloat16",),
        chain="quotient",
    ),
    narrower(
        "by CUDA's __expf",
        dtypes=("float32",),
        who="nvcc with fast math, CUDA C++ guide (read)",
        per=2.34,
        cuda=True,
    ),
    narrower("by a fast exponential, right to 1e-4", dtypes=("float32",), fast=1.2e-4),
)
_SOFTMAX_MODS = (
    Mod("the causal mask is missing", {"mask": None}),
    Mod("the mask hides a query's own position", {"mask": -1}),
    Mod("the mask shows one position too many", {"mask": 1}),
    *(Mod(f"the mask shows the last {n} keys alone: a window", {"window": n}) for n in (2, 4, 8, 16, 32, 64, 128)),
    Mod("the sliding window is missing: every key up to the query is seen", {"wider": None}),
    *(Mod(f"the sliding window is one key too {words}", {"wider": n}) for words, n in (("wide", 1), ("narrow", -1))),
    Mod("softmax runs over the queries, not over the keys", {"axis": "queries"}),
    Mod("not divided by its sum: numerators alone", {"divided": False}),
    Mod("a sink: one more key, of score 0, in the sum", {"sink": 0.0}),
    *(
        Mod(f"as if the scores were divided by {t} before the softmax{words}", {"temperature": value, **args})
        for t, value in (("0.5", 0.5), ("2", 2.0), ("{fit:.9g}", FIT))
        for words, args in (("", {}), (", and rounded", {"stored": True}))
    ),
)
SOFTMAX = Kind(
    "softmax",
    softmax,
    _SOFTMAX_FORMS,
    _SOFTMAX_MODS,
    doc="exp(s - max) / sum over the keys that a query may see. The base of the exponential and the order of the sum "
    "are free, and inside the bound.",
)


# -- weighted values ----------------------------------------------------------------------------------------------


def weighted(
    at: At,
    *,
    p: str = "recorded",
    fast: float = 0.0,
    keys: bool = False,
    tiled: bool = False,
    unjoined: bool = False,
    transposed: bool = False,
    reverse: bool = False,
    rotated: bool = False,
    core: bool = False,
    pieces: Pieces | None = None,
) -> Value | None:
    """p @ v, heads joined, `[tokens, heads * head_dim]`; of few `rows` these queries alone.

    `p`: the probabilities as recorded, or `numerators` made again from the scores, divided by their sum at the end;
    `cast` rounds them first. Of a `float16 cache` keys and values have been rounded to that; of `float16 products` so
    have the queries and the probabilities; `key by key` the queries, and the accumulators are, at each key; `either` of
    these two in each element.
    """
    if p == "either":
        one, other = (weighted(at, p=way) for way in ("key by key", "float16 cache"))
        if one is None or other is None:
            return None
        both = any_of([one, other])
        return Value(
            both.lo, (one.mid + other.mid) / 2, both.hi
        )  # neither's bits: where one alone gives all, it is told
    mixed, of, o = transposed or unjoined, at.but(rows=None), at.options
    queries = None if mixed else at.rows
    split = forward._keys if keys else forward._values
    v = of.input(1).map(lambda x: split(x, o["heads"], o["kv_heads"], o["head_dim"]))
    if tiled and not 1 < v.mid.shape[1] < o["heads"]:
        return None
    v = v.map(lambda x: _keys_for(x, o["heads"], tiled))
    if p in _CACHED:
        v = v.once("float16")
    t: Value | None
    if p == "key by key":
        y, t = _key_by_key(_scores_of_cache(of, o["heads"], queries, narrow=True), v, queries, at.stage.window)
    else:
        a, t = (of.input(0), None) if p == "recorded" else _numerators(of, p, fast, queries)
        if p == "float16 products" and t is not None:  # the probabilities, by the sum's inverse, are an operand too
            a, t = (a * t.falling(lambda x: 1 / x).soft(1)).soft(1).once("float16"), None
        if p == "recorded" and queries is not None:
            a = a.map(lambda x: x[:, queries])
        if transposed:
            a = a.map(lambda x: x.swapaxes(-1, -2))
        y = summed(at, a, v, at.lam(Noise.WEIGHTED), core=core, pieces=pieces)
    if p in _CACHED and t is not None:  # by its inverse, a float32 number too
        y = (y * t.falling(lambda x: 1 / x).soft(1)).soft(1)
    elif t is not None:
        y = (y / t).soft(1)
    y = y.map(lambda x: x[::-1]) if reverse else y
    y = y.map(_rotated) if rotated else y
    rows = y.mid.shape[1]
    y = y.map(lambda x: (x if unjoined else x.swapaxes(0, 1)).reshape(rows, -1))
    return at.cut(y) if mixed else y


_CACHED = ("float16 cache", "key by key", "float16 products")


def _numerators(at: At, p: str, fast: float, queries: np.ndarray | None) -> tuple[Value, Value]:
    """exp(scores - largest), and their sum; from unrounded scores."""
    if p in _CACHED:
        scores = _scores_of_cache(at, at.options["heads"], queries, narrow=p == "float16 products")
    else:
        scores = at.maker(at.stage.inputs[0]).raw("attn_scores", 1)
        scores = scores if queries is None else scores.map(lambda x: x[:, queries])
    e = exponentials(at, scores, _up_to(scores, queries, at.stage.window), fast=fast).soft(4)
    return (at.stored(e) if p == "cast numerators" else e), total(e)


def _up_to(scores: Value, queries: np.ndarray | None, window: int | None) -> np.ndarray:
    """Which keys each query sees, of all or of some `queries` of as many as there are keys."""
    if queries is None:
        return up_to_query(scores.mid, window)
    count = scores.mid.shape[-1]
    return up_to_query(np.broadcast_to(0.0, (count, count)), window)[queries]


def _scores_of_cache(at: At, heads: int, queries: np.ndarray | None, *, narrow: bool) -> Value:
    """Scaled scores of keys that were rounded to float16, and, `narrow`, of queries that were too."""
    of = at.maker(at.stage.inputs[0]).maker("attn_scores")
    q, k = of.input(0).map(lambda x: x.swapaxes(0, 1)), of.input(1).map(lambda x: _keys_for(x, heads, False))
    q = q if queries is None else q.map(lambda x: x[:, queries])
    q, k = q.once("float16") if narrow else q, k.once("float16").map(lambda x: x.swapaxes(1, 2))
    scale = float(nearest(np.float64(of.options["scaling"]), "float32"))
    return (summed(of, q, k, of.lam(Noise.SCORES)) * scale).soft(1)


def _key_by_key(scores: Value, v: Value, queries: np.ndarray | None, window: int | None) -> tuple[Value, Value]:
    """Values `[heads, keys, head_dim]` times exp(score - largest so far), and the sum of these `[heads, queries, 1]`.

    As ggml-cpu/ops.cpp has it: at each key the accumulators are scaled where a new largest score came, and the value
    is added in float32; both times they are rounded to float16.
    """
    seen, least = _up_to(scores, queries, window), np.full((*scores.mid.shape[:2], 1), -np.inf)
    doubt = ((scores.hi - scores.lo) / 2)[..., None]
    y, t, top = point(np.zeros((*scores.mid.shape[:2], v.mid.shape[-1]))), point(np.zeros_like(least)), least
    unsure = np.zeros_like(least)
    for key in range(scores.mid.shape[-1]):
        s, r = scores.mid[:, :, key, None], doubt[:, :, key]
        shown = seen[:, key, None]
        new = shown & (s > top)
        change = nearest(np.where(new, top - s, np.where(shown, s - top, -np.inf)), "float32")
        off = np.where(shown, r + unsure, 0.0) + U32 * np.abs(np.where(np.isfinite(change), change, 0.0))
        top, unsure = np.where(new, s, top), np.where(new, r, unsure)
        factor = point(change).off(off).map(np.exp).soft(2)
        one = np.ones_like(change)
        kept, added = (_where(new, factor, one), _where(new, one, factor))
        y = (y * kept).soft(1).once("float16")
        y = (y + added * v.map(partial(np.take, indices=[key], axis=1))).soft(1).once("float16")
        t = ((t * kept).soft(1) + added).soft(1)
    return y, t


def _where(which: np.ndarray, yes: Value | np.ndarray, no: Value | np.ndarray) -> Value:
    a, b = point(yes), point(no)
    return Value(*(np.where(which, getattr(a, end), getattr(b, end)) for end in ("lo", "mid", "hi")))


_LLAMA = "as llama.cpp does by default: flash attention over a float16 cache of keys and values"
_NO_FLASH = (
    "as llama.cpp does without flash attention: products of a float16 cache take their other operand to that too"
)
_WEIGHTED_FORMS: tuple[Form, ...] = (
    prescribed("of the recorded probabilities, summed in float32, rounded once", who="transformers eager (ran)"),
    equivalent(
        "float32 numerators, divided by their sum at the end",
        dtypes=NARROW,
        deep=True,
        p="numerators",
    ),
    equivalent(
        "float32 numerators of scores that were not recorded, divided by their sum at the end",
        dtypes=("float32",),
        deep=True,
        unseen=True,
        who="torch sdpa on a CPU (ran)",
        p="numerators",
    ),
    equivalent(
        "numerators rounded to {dtype}, divided by their sum at the end",
        dtypes=NARROW,
        deep=True,
        who="flash attention 2 csrc/flash_attn/src/flash_fwd_kernel.h (read)",
        p="cast numerators",
    ),
    equivalent(
        "numerators by a fast exponential, rounded to {dtype}, divided by their sum at the end",
        dtypes=NARROW,
        deep=True,
        who="torch sdpa on a CPU, fexp_u20 (read and ran)",
        p="cast numerators",
        fast=1.2e-4,
    ),
    equivalent("summed by a tensor core, whose accumulators truncate", dtypes=NARROW, wider=True, core=True),
    narrower(
        "keys and values in float16, divided by the sum of float32 numerators at the end",
        dtypes=("float32",),
        who="llama.cpp of October 2026 at 64 tokens and more, ggml-cpu/ops.cpp (read and ran)",
        usual=_LLAMA,
        deep=True,
        p="float16 cache",
    ),
    narrower(
        "queries, keys and values in float16, and at each key the accumulators",
        dtypes=("float32",),
        who="llama.cpp below 64 tokens, ggml-cpu/ops.cpp (read and ran)",
        usual=_LLAMA,
        deep=True,
        p="key by key",
    ),
    narrower(
        "keys and values in float16, at short calls the queries too, and at each key the accumulators",
        dtypes=("float32",),
        who="llama.cpp at a prompt of 64 tokens and more and the tokens after it (ran)",
        usual=_LLAMA,
        deep=True,
        p="either",
    ),
    narrower(
        "queries, keys, values and probabilities in float16",
        dtypes=("float32",),
        who="llama.cpp of October 2026, ggml-cpu/ggml-cpu.c (read and ran)",
        usual=_NO_FLASH,
        deep=True,
        p="float16 products",
    ),
    *(narrower(words, dtypes=("float32",), pieces=pieces) for words, pieces in IN_PIECES.items()),
)
_WEIGHTED_MODS = (
    Mod("values are the keys", {"keys": True}),
    Mod("attn_softmax is transposed", {"transposed": True}),
    Mod("heads are joined without bringing the tokens first", {"unjoined": True}),
    Mod(DEALT["attention"], {"tiled": True}),
    Mod("heads are joined in reverse order", {"reverse": True}),
    Mod("each head has the output of the one before it", {"rotated": True}),
)
WEIGHTED = Kind(
    "attention",
    weighted,
    _WEIGHTED_FORMS,
    _WEIGHTED_MODS,
    cheap=False,
    by_rows=True,
    doc="p v of each head, heads joined. Fused kernels store no probabilities: they sum values times exp(s - max), and "
    "divide by the sum of those numerators at the end.",
)
