"""RMSNorm: where engines round it, and what faults make of it."""

from __future__ import annotations

import functools

import numpy as np

from stages.oracle import decoder as forward
from stages.oracle.bounds import U32
from stages.recipes.at import At
from stages.recipes.recipe import FIT, NARROW, Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Value, nearest, total


def inputs(at: At) -> Value:
    """What is normalised, `[tokens, hidden]` or by heads `[tokens, heads, head_dim]`."""
    o = at.options
    if at.stage.function == "q_norm":
        return at.input(0).map(lambda x: forward._queries(x, o["heads"], o["head_dim"]))
    if at.stage.function == "k_norm":
        return at.input(0).map(lambda x: forward._keys(x, o["heads"], o["kv_heads"], o["head_dim"]))
    return at.input(0)


def norm(
    at: At,
    *,
    cast: str = "before",
    source: str = "record",
    stat: str = "float32",
    chain: bool = False,
    eps: float | None = None,
    centred: bool = False,
    weight: float | None = None,
    kept: bool = False,
    outside: bool = False,
    summed: bool = False,
    skip: bool = False,
    whole: bool = False,
    parts: int = 1,
    first: int = 1,
    fewer: int = 0,
    sizes: bool = False,
    tokens: bool = False,
    twice: str = "",
) -> Value | None:
    """x / sqrt(mean(x^2) + eps) * weight; `cast` says where the product with the weight is rounded.

    `chain`: the squares are added one after another, in float32. `weight`: 0 for ones in its place, 1 for one more than
    it, which is `kept` in its own dtype. The columns are normalised in so many `parts`, each by itself; or the root is
    of the `first` of so many parts, of a mean over `fewer` than there are, of the `sizes` in the place of squares, or
    over all `tokens` at once. `twice`: it is normalised again, `weighted` again or `plain`.
    """
    x, w = inputs(at), at.params()[-1][1]
    if source != "record":
        x = at.stream(at.stage.inputs[0], raw=source == "raw stream")
    eps = at.options["eps"] if eps is None else eps
    shape = x.mid.shape
    if weight is not None:
        w = np.ones_like(w) if weight == 0 else at.narrow(1.0 + w) if kept else 1.0 + w
    if whole:
        if x.mid.ndim < 3:
            return None
        x, w = x.map(lambda a: a.reshape(len(a), -1)), np.tile(w, shape[1])
    if max(parts, first) > 1 and shape[-1] % max(parts, first):
        return None
    if parts > 1:
        x, w = x.map(lambda a: a.reshape(*shape[:-1], parts, -1)), w.reshape(parts, -1)
    if skip:
        return (x * w).map(lambda a: a.reshape(shape))
    if centred:
        mean = x.mid.mean(axis=-1, keepdims=True)
        x = (x - mean).off(U32 * (np.abs(x.mid) + 4 * np.abs(x.mid).mean(axis=-1, keepdims=True)))
    root = functools.partial(_root, at, stat=stat, eps=eps, chain=chain, outside=outside)
    some = inputs(at.but(rows=None)).map(lambda a: a.reshape(1, -1)) if tokens else x
    some = some.map(lambda a: a[..., : a.shape[-1] // first])
    y = _normed(at, x, w, cast, root(some, count=1 if summed else some.mid.shape[-1] - fewer, sizes=sizes))
    if twice:
        w = w if twice == "weighted" else np.ones_like(w)
        y = _normed(at, y, w, cast, root(y, count=y.mid.shape[-1], sizes=False))
    return y.map(lambda a: a.reshape(shape))


def _root(at: At, x: Value, *, stat: str, eps: float, chain: bool, outside: bool, count: int, sizes: bool) -> Value:
    """1 / sqrt(sum(x^2) / count + eps), `[.., 1]`; of the `sizes` 1 / (sum(|x|) / count + eps)."""
    stat = at.inside if stat == "own" else stat
    squares = x * x
    if not squares.sure:
        squares = Value(np.maximum(squares.lo, 0), squares.mid, squares.hi)
    if sizes:
        return (total(squares.map(np.sqrt).soft(1)) * (1 / count) + eps).falling(lambda a: 1 / a).soft(4)
    added = _one_by_one(squares.soft(1)) if chain else total(_held(at, squares, stat, "squares"))
    mean = _held(at, added * (1.0 / count), stat, "mean")
    if outside:
        return (mean.map(np.sqrt) + eps).falling(lambda a: 1 / a).soft(4)
    under = _held(at, mean + eps, stat, "mean + eps")
    return _held(at, under.falling(lambda a: 1 / np.sqrt(a)).soft(3), stat, "inverse root")


def _held(at: At, value: Value, stat: str, step: str) -> Value:
    """A step kept in `stat`. In float32 what it may err by is in the units of the sum and of the root: all of them
    together make sqrt(K)/8 + 6 u, as bounds.norm_bound has it."""
    if stat == "float32":
        return value.soft(0)
    return at.stored(value, step) if stat == at.inside else value.once(stat)


def _one_by_one(squares: Value) -> Value:
    """Their float32 sum in the order in which they stand, kept; a doubt of theirs is one of the sum."""
    sums = [np.add.accumulate(a, axis=-1, dtype=np.float32)[..., -1:].astype(np.float64) for a in _ends(squares)]
    return Value(sums[0], sums[1], sums[2])


def _ends(x: Value) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return x.lo, nearest(x.mid, "float32"), x.hi


def _normed(at: At, x: Value, w: np.ndarray, cast: str, root: Value) -> Value:
    if cast == "after":
        return ((x * root).soft(1) * w).soft(1)
    if cast == "folded":
        return (x * (root * w).soft(1)).soft(1)
    if cast == "root":
        return _last(at, at.stored(x * at.stored(root)) * w)
    return _last(at, at.stored((x * root).soft(1)) * w)


def _last(at: At, value: Value) -> Value:
    """A product that is rounded once, by everybody, where its factors were rounded to fewer bits."""
    return value if at.inside in NARROW else value.soft(1)


FORMS = (
    prescribed(
        "in float32, cast, then times the weight",
        who="transformers Qwen3RMSNorm (ran); vLLM csrc/layernorm_kernels.cu (read); MLX rms_norm.metal (read); "
        "Bumblebee lib/bumblebee/layers.ex, upcast :normalization (read); "
        "Liger ops/rms_norm.py, casting mode llama (read)",
    ),
    equivalent(
        "times the weight in float32, rounded once",
        dtypes=NARROW,
        who="torch.compile (ran); keras-hub Qwen3LayerNorm (read and ran); flashinfer norm.cuh (read); "
        "TensorRT-LLM rmsnormKernels.cu (read); ggml ggml-cpu/ops.cpp, its sum in float64 (read); "
        "Liger ops/rms_norm.py, casting mode gemma (read)",
        cast="after",
    ),
    equivalent("the weight folded into the inverse root", who="flax.nnx.RMSNorm (read and ran)", cast="folded"),
    equivalent("the squares added one after another", who="MLX fast.rms_norm on a CPU (ran)", chain=True),
    equivalent(
        "the squares added one after another, the weight folded into the inverse root",
        who="MLX nn.RMSNorm on a CPU (ran)",
        chain=True,
        cast="folded",
    ),
    equivalent(
        "of a residual stream kept in float32",
        dtypes=NARROW,
        deep=True,
        who="mamba_ssm Block, residual_in_fp32 (read)",
        source="stream",
    ),
    equivalent(
        "of a residual stream kept in float32, rounded once",
        dtypes=NARROW,
        deep=True,
        who="flashinfer FusedAddRMSNorm (read)",
        source="stream",
        cast="after",
    ),
    equivalent(
        "of a float32 residual stream of unrounded products, rounded once",
        dtypes=NARROW,
        deep=True,
        source="raw stream",
        cast="after",
    ),
    narrower("the inverse root rounded to {dtype} first", dtypes=NARROW, cast="root"),
    narrower(
        "mean square and root in {dtype}",
        dtypes=NARROW,
        who="Liger ops/rms_norm.py, casting mode none (read)",
        stat="own",
    ),
    narrower(
        "mean square and root in {dtype}, times the weight before the cast", dtypes=NARROW, stat="own", cast="after"
    ),
    narrower("mean square and root in bfloat16", dtypes=("float32", "float16"), stat="bfloat16"),
    narrower("mean square and root in float16", dtypes=("float32",), stat="float16"),
)
FEWER = "a mean over one column fewer than there are"
# What one of several ranks holds of a row.
_PARTS = (("half", 2), ("quarter", 4), ("eighth", 8))
MODS = (
    *(Mod(f"as if eps were {e:g}, not {{eps:g}}", {"eps": e}) for e in (0.0, *(10.0**-n for n in range(12, 2, -1)))),
    Mod("as if eps were {fit:g}, not {eps:g}", {"eps": FIT}),
    Mod("the norm's weight is missing", {"weight": 0}),
    Mod("the norm's weight is 1 + what is stored", {"weight": 1}),
    Mod("the norm's weight is 1 + what is stored, rounded", {"weight": 1, "kept": True}),
    Mod("the norm is missing", {"skip": True, "weight": 0}),
    Mod("the norm divides nothing: its input times its weight", {"skip": True}),
    Mod("its mean is subtracted first: LayerNorm", {"centred": True}),
    Mod("a sum in the place of the mean", {"summed": True}),
    Mod("eps is added to the root, not under it", {"outside": True}),
    Mod("normalised over all heads at once", {"whole": True}),
    Mod(FEWER, {"fewer": 1}),
    *(Mod(f"each {name} of the columns is normalised by itself", {"parts": n}) for name, n in _PARTS),
    *(Mod(f"the root is of the first {name} of the columns alone", {"first": n}) for name, n in _PARTS),
    Mod("the mean of the magnitudes in the place of the root", {"sizes": True}),
    Mod("the root is over all tokens at once", {"tokens": True}),
    Mod("normalised twice", {"twice": "weighted"}),
    Mod("normalised twice, times the weight once", {"twice": "plain"}),
)
NORM = Kind(
    "norm",
    norm,
    FORMS,
    MODS,
    by_rows=True,
    doc="RMSNorm, x / sqrt(mean(x^2) + eps) * weight, of a row or of each head. The model's own code rounds to the "
    "storage dtype between the root and the weight; many kernels do not.",
)
