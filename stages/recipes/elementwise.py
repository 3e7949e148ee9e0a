"""Embedding, activation, its product with up, residuals and copies: where they are rounded, and what faults make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from stages.oracle.bounds import TINY, U32
from stages.recipes.at import At, Unknown
from stages.recipes.recipe import NARROW, Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Value, nearest, point
from stages.spec.noise import Noise


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


# What stands in the place of silu.
ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "the activation is missing": lambda x: x,
        "sigmoid without the product with its argument": sigmoid,
        "relu instead of silu": lambda x: np.maximum(x, 0),
        "gelu (by tanh) instead of silu": _gelu_tanh,
        "gelu (by erf) instead of silu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
        "tanh instead of silu": np.tanh,
        "mish instead of silu": lambda x: x * np.tanh(np.logaddexp(0, x)),
        "hard swish instead of silu": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "silu twice": lambda x: x * sigmoid(x) * sigmoid(x * sigmoid(x)),
        "silu's argument is cut to 7 at most": lambda x: np.minimum(x, 7) * sigmoid(np.minimum(x, 7)),
    }
)


def silu(
    at: At,
    *,
    chain: str = "once",
    units: tuple[float, float] = (8.0, 0.0),
    instead: str = "",
    slope: float = 1.0,
    cuda: bool = False,
    per: float = 0.0,
) -> Value | None:
    """x sigmoid(slope x); `chain` says which of exponential, sum, inverse and product are rounded.

    `units`: what it errs by, in u of the result and of its argument; `per`: its exponential, in u times the exponent.
    `cuda`: on GPUs alone.
    """
    if cuda:
        at.on_gpu()
    x = at.input(0)
    if chain == "once":
        y = _silu_once(x, ACTIVATIONS[instead] if instead else lambda a: a * sigmoid(slope * a), units, bool(instead))
        # Of exp(-x) / (1 + exp(-x)), which 1 less the sigmoid is, the quotient errs by what the exponential does.
        return y.off(per * U32 * np.abs(x.mid * y.mid) * (1 - sigmoid(x.mid))) if per else y
    x = point(x.mid)
    z = at.stored(x * slope)
    if chain == "sigmoid":
        return at.stored(z.map(sigmoid).soft(4)) * x.mid
    if chain == "away":
        return at.stored(_away(at, z), "sigmoid") * x.mid
    e = at.stored((-z).map(lambda a: np.exp(np.minimum(a, 88.7))).soft(3), "exponential")
    t = at.stored(e + 1.0, "sum")
    if chain == "steps":
        return at.stored(t.falling(lambda a: 1 / a), "inverse") * x.mid
    ends = x.mid / t.lo, x.mid / t.hi
    return Value(np.minimum(*ends), x.mid / t.mid, np.maximum(*ends))


def _away(at: At, z: Value) -> Value:
    """The sigmoid by 1 / (1 + exp|z|), which is it below 0, and 1 less it above; the exponential alone is rounded."""
    e = at.stored(z.map(lambda a: np.exp(np.minimum(np.abs(a), 88.7))).soft(3), "exponential")
    small = (e + 1.0).falling(lambda a: 1 / a)
    large, below = point(np.ones(1)) - small.soft(1), z.mid < 0
    ends = zip((small.lo, small.mid, small.hi), (large.lo, large.mid, large.hi), strict=True)
    return Value(*(np.where(below, a, b) for a, b in ends)).soft(1)


def _silu_once(x: Value, f: Callable[[np.ndarray], np.ndarray], units: tuple[float, float], other: bool) -> Value:
    mid = f(x.mid)
    # |silu'| is 1.1 at most. (1 + tanh) and (1 + erf) cancel below 0: 8 u |x|.
    w = units[0] * U32 * np.abs(mid) + (units[1] * U32 + TINY + 8 * U32 * other) * np.abs(x.mid)
    w = w + 1.1 * (x.hi - x.lo) / 2
    return Value(mid - w, nearest(mid, "float32"), mid + w)


SILU = Kind(
    "silu",
    silu,
    (
        prescribed("in float32, rounded once", who="torch F.silu (ran); vLLM csrc/activation_kernels.cu (read)"),
        equivalent(
            "its sigmoid right to 3 u of 1, not of itself: by tanh or a polynomial",
            dtypes=("float32",),
            who="ONNX Runtime 1.32 (ran)",
            wider=True,
            rms=0.25,  # 0.10 to 0.17 of ONNX Runtime 1.32, over gates of deviation 0.1 to 3 and all of [-25, 25]
            units=(0.0, 3.1),
        ),
        equivalent("each step rounded to float32", dtypes=("float32",), who="torch F.silu (ran)", chain="quotient"),
        equivalent(
            "its exponential and its quotient right to two floats",
            who="CUDA's expf, by LLVM libc's table of GPU functions, and division, by the PTX manual (read)",
            wider=True,
            rms=0.25,  # 3 u: no GPU was at hand; functions that are seldom at their limits give half of it
            units=(12.0, 0.0),
            cuda=True,
        ),
        narrower(
            "by CUDA's __expf",
            dtypes=("float32",),
            who="nvcc with fast math, CUDA C++ guide (read)",
            units=(12.0, 0.0),
            per=2.34,
            cuda=True,
        ),
        narrower(
            "the sigmoid rounded to {dtype} before the product",
            dtypes=NARROW,
            usual="as x * torch.sigmoid(x) does on {dtype}",
            sound=("float32",),
            chain="sigmoid",
        ),
        narrower(
            "in {dtype}: exponential, sum, inverse and product each rounded",
            dtypes=NARROW,
            sound=("float32",),
            who="jax.nn.silu under jit, flax.nnx (read and ran)",
            usual="as jax.nn.silu does on {dtype}",
            chain="steps",
        ),
        narrower(
            "in {dtype}: exp(|x|), the sigmoid (1 / (1 + exp|x|), or 1 less that) and the product each rounded",
            dtypes=NARROW,
            usual="as MLX does on {dtype} on a CPU",
            chain="away",
        ),
        narrower("in {dtype}: exponential, sum and quotient each rounded", dtypes=NARROW, chain="quotient"),
    ),
    (
        *(Mod(words, {"instead": words}) for words in ACTIVATIONS),
        Mod("gelu (by sigmoid) instead of silu", {"slope": 1.702}),
    ),
    by_rows=True,
    doc="x sigmoid(x): an exponential, a sum, a quotient or an inverse, a product. Rounded once by a kernel that "
    "computes it in float32, up to four times where each step is an operation of the framework.",
)


def multiply(at: At, *, left: int | None = 0, right: int | None = 1, plus: bool = False) -> Value | None:
    """The product of the stage's two inputs."""
    a, b = (point(np.ones(1)) if n is None else at.input(n) for n in (left, right))
    y = a + b if plus else a * b
    return y if a.sure and b.sure else y.soft(1)


SWIGL = Kind(
    "swigl",
    multiply,
    (
        prescribed(
            "the recorded silu times up, rounded once", who="transformers (ran); vLLM csrc/activation_kernels.cu (read)"
        ),
    ),
    (
        Mod("the product with up is missing", {"right": None}),
        Mod("the product with silu is missing", {"left": None}),
        Mod("silu and up are added, not multiplied", {"plus": True}),
    ),
    by_rows=True,
    doc="silu(gate) * up: one product.",
)
GATED = Kind(
    "gated",
    multiply,
    (prescribed("the recorded gate times the shared expert's output, rounded once", who="transformers (ran)"),),
    (Mod("the gate is missing", {"left": None}), Mod("added, not multiplied", {"plus": True})),
    by_rows=True,
    doc="A gate of each token times the shared expert's output: one product.",
)


def with_shared(at: At, *, a: float = 1.0, b: float = 1.0) -> Value | None:
    """The chosen experts' sum and the shared expert's output."""
    x, y = at.input(0), at.input(1)
    total = x * a + y * b
    return total if x.sure and y.sure else total.soft(1)


WITH_SHARED = Kind(
    "with the shared expert",
    with_shared,
    (prescribed("the recorded operands, rounded once", who="transformers (ran)"),),
    (
        Mod("the shared expert is missing", {"b": 0.0}),
        Mod("only the shared expert is there", {"a": 0.0}),
        Mod("the shared expert is added twice", {"b": 2.0}),
    ),
    by_rows=True,
    doc="What the chosen experts give plus what the shared one gives: one sum.",
)


def residual(at: At, *, form: str = "each", a: float = 1.0, b: float = 1.0, first: str = "own") -> Value | None:
    """What the layer had, plus what its block adds."""
    if form == "inside":
        return (at.recorded(0) + at.cut(at.raw(at.stage.inputs[1], 1))).soft(1)
    if form != "each":
        return at.sum_of_stream(raw=form == "raw stream")
    x, y = at.input(0), at.input(1)
    if first == "norm":
        x = _norm_of(at)
    total = x * a + y * b
    return total if x.sure and y.sure else total.soft(1)


def _norm_of(at: At) -> Value:
    """The norm that the block's first product reads."""
    maker = at.maker(at.stage.inputs[1])
    for _ in range(6):
        if maker.stage.noise is Noise.RMS_NORM and maker.array(0).ndim == 2 and maker.stage.shape == at.stage.shape:
            return at.cut(point(maker.oracle.rounded.astype(np.float64)))
        if not maker.stage.inputs:
            break
        maker = maker.maker(maker.stage.inputs[-1])
    raise Unknown("norm")


RESIDUAL = Kind(
    "residual",
    residual,
    (
        prescribed("the recorded operands, rounded once", who="transformers (ran)"),
        equivalent("added inside the product before it", dtypes=NARROW, deep=True, form="inside"),
        equivalent(
            "a residual stream kept in float32, recorded in {dtype}",
            dtypes=NARROW,
            deep=True,
            who="mamba_ssm Block, residual_in_fp32 (read); Megatron-LM fp32_residual_connection (read)",
            form="stream",
        ),
        equivalent(
            "a float32 residual stream of unrounded products, recorded in {dtype}",
            dtypes=NARROW,
            deep=True,
            form="raw stream",
        ),
    ),
    (
        Mod("the residual is missing: only what the block added is there", {"a": 0.0}),
        Mod("only the residual is there: what the block added is missing", {"b": 0.0}),
        Mod("the residual is added twice", {"a": 2.0}),
        Mod("what the block added is added twice", {"b": 2.0}),
        Mod("what the block added is halved", {"b": 0.5}),
        Mod("what the block added is subtracted", {"b": -1.0}),
        Mod("added to the norm's output, not to its input", {"first": "norm"}),
    ),
    by_rows=True,
    doc="What came in plus what the block adds: one sum. Some engines keep that stream in float32, and round it only "
    "for what reads it.",
)


def embedding(at: At, *, shift: int = 0, times: str = "") -> Value | None:
    """Rows of the table."""
    tokens, table = at.oracle.arguments[0], at.params()[1][1]
    rows = table[(tokens + shift) % len(table)]
    return point(rows * (math.sqrt(table.shape[1]) if times == "root" else 1.0))


EMBEDDING = Kind(
    "embedding",
    embedding,
    (prescribed("rows of the table", who="transformers (ran)"),),
    (
        Mod("each token has the row of its id +1", {"shift": 1}),
        Mod("each token has the row of its id -1", {"shift": -1}),
        Mod("times sqrt(hidden)", {"times": "root"}),
    ),
    doc="A row of the table for each token: a copy.",
)


def copy(at: At) -> Value | None:
    return at.input(0) if at.stage.inputs else point(at.params()[0][1])


COPY = Kind(
    "copy",
    copy,
    (prescribed("a copy"),),
    doc="The same values again: an input as it was read, or a step that this family lacks.",
)
