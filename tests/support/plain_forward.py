"""Somebody's plain numpy forward of dense decoders, which records every stage and can be given a mistake.

Imports nothing of this project. A `Plain` computes in float32 and stores each stage in `dtype`; a mistake replaces one
of its steps, or changes the weights it reads. `block` sums products in blocks of that many terms, backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
Step = Callable[..., Any]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Plain:
    """One forward: `config` is a parsed config.json, `weights` the checkpoint's arrays by name."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Array], dtype: str, block: int = 0):
        self.config, self.weights, self.dtype, self.block = config, dict(weights), DTYPES[dtype], block
        self.stages: dict[str, Array] = {}
        self.layer: int | None = None
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.steps: dict[str, Step] = {
            name: getattr(self, name)
            for name in ("linear", "norm", "rope", "scores", "masked", "softmax", "values", "silu", "swigl", "head")
        }

    def r(self, x: Array) -> Array:
        """Stored, and read again as float32."""
        with np.errstate(over="ignore"):
            return x.astype(np.float32).astype(self.dtype).astype(np.float32)

    def keep(self, name: str, x: Array, *, wide: bool = False) -> Array:
        key = name if self.layer is None else f"layers.{self.layer}.{name}"
        self.stages[key] = np.ascontiguousarray(x.astype(np.float32 if wide else self.dtype))
        return x

    def weight(self, name: str) -> Array:
        full = f"{name}.weight" if self.layer is None else f"model.layers.{self.layer}.{name}"
        if full == "lm_head.weight" and full not in self.weights:
            full = "model.embed_tokens.weight"
        return self.weights[full].astype(np.float32)

    def dot(self, a: Array, b: Array) -> Array:
        """a @ b in float32, in one call or block by block from the last."""
        if not self.block:
            return a @ b
        out = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for start in reversed(range(0, a.shape[-1], self.block)):
            out += a[..., start : start + self.block] @ b[..., start : start + self.block, :]
        return out

    def linear(self, x: Array, w: Array, bias: Array | None = None, name: str = "") -> Array:
        y = self.dot(x, w.T)
        return self.r(y if bias is None else y + bias)

    def norm(self, x: Array, w: Array, name: str = "") -> Array:
        mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
        return self.r(self.r(x / np.sqrt(mean + np.float32(self.eps))) * w)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
        return self.r(self.r(x * cos[:, None]) + self.r(turned * sin[:, None]))

    def scores(self, q: Array, k: Array) -> Array:
        k = np.repeat(k, self.heads // self.kv_heads, axis=1)
        return self.r(self.r(self.dot(q.swapaxes(0, 1), k.transpose(1, 2, 0))) * np.float32(self.dim**-0.5))

    def masked(self, s: Array) -> Array:
        return self.cut(s, self.window)

    def cut(self, s: Array, window: int | None) -> Array:
        """Scores of the keys up to each query, of a window its last so many alone."""
        n = s.shape[-1]
        seen = np.tri(n, dtype=bool) & ~np.tri(n, k=-(window or n), dtype=bool)
        return np.where(seen, s, np.float32(-np.inf))

    @property
    def window(self) -> int | None:
        """Of the layer at hand."""
        config = self.config
        first = 0 if config["model_type"] == "mistral" else config["max_window_layers"]
        assert self.layer is not None
        return config["sliding_window"] if self.layer >= first else None

    def softmax(self, s: Array) -> Array:
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        return self.r(e / e.sum(axis=-1, keepdims=True, dtype=np.float32))

    def values(self, p: Array, v: Array) -> Array:
        v = np.repeat(v, self.heads // self.kv_heads, axis=1).swapaxes(0, 1)
        return self.r(self.dot(p, v)).swapaxes(0, 1).reshape(p.shape[1], -1)

    def silu(self, gate: Array, up: Array) -> Array:
        with np.errstate(over="ignore"):
            return self.r(gate / (1 + np.exp(-gate)))

    def swigl(self, silu: Array, up: Array, gate: Array) -> Array:
        return self.r(silu * up)

    def head(self, x: Array, w: Array) -> Array:
        return self.linear(x, w, name="lm_head")

    def tables(self, tokens: int) -> tuple[Array, Array]:
        theta = np.float32(self.config["rope_parameters"]["rope_theta"])
        inverse = 1 / theta ** (np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim))
        inverse = self.keep("inv_freq", inverse.astype(np.float32), wide=True)
        angle = np.arange(tokens, dtype=np.float32)[:, None] * inverse
        angle = self.keep("rope_angle", np.concatenate((angle, angle), axis=-1), wide=True)
        return self.keep("rope_cos", self.r(np.cos(angle))), self.keep("rope_sin", self.r(np.sin(angle)))

    def run(self, tokens: list[int]) -> dict[str, Array]:
        """Every stage by its documented key."""
        cos, sin = self.tables(len(tokens))
        x = self.keep("embedding", self.weight("model.embed_tokens")[tokens])
        for layer in range(self.config["num_hidden_layers"]):
            self.layer = layer
            x = self.decoder(x, cos, sin)
        self.layer = None
        x = self.keep("final_norm", self.steps["norm"](x, self.weight("model.norm"), name="final_norm"))
        self.keep("lm_head", self.steps["head"](x, self.weight("lm_head")))
        return self.stages

    def decoder(self, x: Array, cos: Array, sin: Array) -> Array:
        norm, linear = self.steps["norm"], self.steps["linear"]
        h = self.keep("attn_norm", norm(x, self.weight("input_layernorm.weight"), name="attn_norm"))
        biased = f"model.layers.{self.layer}.self_attn.q_proj.bias" in self.weights
        parts, plain = [], []
        for name in ("q_proj", "k_proj", "v_proj"):
            w = self.weight(f"self_attn.{name}.weight")
            bias = self.weight(f"self_attn.{name}.bias") if biased else None
            plain.append(linear(h, w, name=name))
            parts.append(linear(h, w, bias, name=name) if biased else plain[-1])
        self.keep("qkv_matmul", np.concatenate(plain, axis=-1))
        self.keep("qkv_bias", np.concatenate(parts, axis=-1))
        q, k, v = (part.reshape(len(x), -1, self.dim) for part in parts)
        if f"model.layers.{self.layer}.self_attn.q_norm.weight" in self.weights:
            q = self.keep("q_norm", norm(q, self.weight("self_attn.q_norm.weight"), name="q_norm"))
            k = self.keep("k_norm", norm(k, self.weight("self_attn.k_norm.weight"), name="k_norm"))
        q, k = (self.keep(f"{n}_post_rope", self.steps["rope"](a, cos, sin)) for n, a in (("q", q), ("k", k)))
        s = self.keep("attn_scores", self.steps["scores"](q, k))
        p = self.keep("attn_softmax", self.steps["softmax"](self.steps["masked"](s)))
        a = self.keep("attention", self.steps["values"](p, v))
        a = self.keep("attn_out", linear(a, self.weight("self_attn.o_proj.weight"), name="o_proj"))
        x = self.keep("post_attn_residual", self.r(x + a))
        h = self.keep("ffn_norm", norm(x, self.weight("post_attention_layernorm.weight"), name="ffn_norm"))
        gate, up = (linear(h, self.weight(f"mlp.{n}.weight"), name=n) for n in ("gate_proj", "up_proj"))
        self.keep("ffn_gate", gate), self.keep("ffn_up", up)
        silu = self.keep("ffn_silu", self.steps["silu"](gate, up))
        h = self.keep("ffn_swigl", self.steps["swigl"](silu, up, gate))
        h = self.keep("ffn_out", linear(h, self.weight("mlp.down_proj.weight"), name="down_proj"))
        return self.keep("post_ffn_residual", self.r(x + h))


# -- mistakes: each changes a Plain before it runs ----------------------------------------------------------------

Mistake = Callable[[Plain], None]


def step(name: str, wrong: Callable[..., Any]) -> Mistake:
    """`wrong(plain, right step, *arguments)` in the place of a step."""

    def change(plain: Plain) -> None:
        right = plain.steps[name]
        plain.steps[name] = lambda *args, **names: wrong(plain, right, *args, **names)

    return change


def weight(name: str, wrong: Callable[[Array], None]) -> Mistake:
    """A weight changed in place, in float32, as if it had been loaded so."""

    def change(plain: Plain) -> None:
        array = plain.weights[name].astype(np.float32)
        wrong(array)
        plain.weights[name] = array

    return change


def gelu_tanh(x: Array) -> Array:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


def gelu_erf(x: Array) -> Array:
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return np.float32(0.5) * x * (1 + erf(x / np.float32(math.sqrt(2))))


def _tiled(plain: Plain, _right: Step, q: Array, k: Array) -> Array:
    k = np.tile(k, (1, plain.heads // plain.kv_heads, 1))
    return plain.r(plain.r(q.swapaxes(0, 1) @ k.transpose(1, 2, 0)) * np.float32(plain.dim**-0.5))


def _scaled(scale: Callable[[Plain], float]) -> Callable[..., Array]:
    def wrong(plain: Plain, _right: Step, q: Array, k: Array) -> Array:
        k = np.repeat(k, plain.heads // plain.kv_heads, axis=1)
        return plain.r(plain.r(q.swapaxes(0, 1) @ k.transpose(1, 2, 0)) * np.float32(scale(plain)))

    return wrong


def _strict(fill: float) -> Callable[..., Array]:
    def wrong(plain: Plain, _right: Step, s: Array) -> Array:
        return np.where(np.tri(s.shape[-1], k=-1, dtype=bool), s, np.float32(fill))

    return wrong


def window(size: Callable[[Plain], int | None]) -> Mistake:
    """Another window than the layer's."""
    return step("masked", lambda plain, _right, s: plain.cut(s, size(plain)))


def _fused(plain: Plain) -> None:
    """q, k, v joined as rows [q, k, v], read as [q.. k v] for each key head."""
    d, group = plain.dim, plain.heads // plain.kv_heads
    for n in range(plain.config["num_hidden_layers"]):
        names = [f"model.layers.{n}.self_attn.{x}_proj.weight" for x in "qkv"]
        rows = np.concatenate([plain.weights[name] for name in names])
        blocks = rows.reshape(plain.kv_heads, group + 2, d, -1)
        q, k, v = blocks[:, :group], blocks[:, group : group + 1], blocks[:, group + 1 :]
        for name, part in zip(names, (q, k, v), strict=True):
            plain.weights[name] = part.reshape(-1, rows.shape[1])


def _low_rank(rank: int) -> Mistake:
    def change(plain: Plain) -> None:
        rng = np.random.default_rng(7)
        for name in ("q_proj", "v_proj"):
            full = f"model.layers.0.self_attn.{name}.weight"
            w = plain.weights[full].astype(np.float32)
            a, b = rng.standard_normal((w.shape[0], rank)), rng.standard_normal((rank, w.shape[1]))
            plain.weights[full] = (w - 0.02 * (a @ b)).astype(np.float32).astype(plain.dtype)

    return change


def _in_float16(plain: Plain, _right: Step, x: Array, w: Array, bias: Array | None = None, name: str = "") -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(np.float16).astype(np.float32) @ w.astype(np.float16).astype(np.float32).T
    return plain.r(y if bias is None else y + bias)


def _with_embedding(plain: Plain, right: Step, x: Array, _w: Array) -> Array:
    return right(x, plain.weights["model.embed_tokens.weight"].astype(np.float32))


def _normed_in_bfloat16(plain: Plain, _right: Step, x: Array, w: Array, name: str = "") -> Array:
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    inverse = (1 / np.sqrt(mean + np.float32(plain.eps))).astype(ml_dtypes.bfloat16).astype(np.float32)
    return plain.r(plain.r(x * inverse) * w)


def _softmax_in(dtype: Any) -> Callable[..., Array]:
    def wrong(plain: Plain, _right: Step, s: Array) -> Array:
        with np.errstate(over="ignore"):
            s = s.astype(dtype)
        e = np.exp((s - s.max(axis=-1, keepdims=True)).astype(np.float32)).astype(dtype)
        total = e.astype(np.float32).sum(axis=-1, keepdims=True).astype(dtype)
        return plain.r((e / total).astype(np.float32))

    return wrong


def _silu_in(dtype: Any) -> Callable[..., Array]:
    def wrong(plain: Plain, _right: Step, gate: Array, up: Array) -> Array:
        x = gate.astype(dtype)
        e = np.exp(-x.astype(np.float32)).astype(dtype)
        return plain.r((x * (dtype(1) / (dtype(1) + e))).astype(np.float32))

    return wrong


MISTAKES: dict[str, Mistake] = {
    "tiled heads": step("scores", _tiled),
    "scale by hidden": step("scores", _scaled(lambda p: p.config["hidden_size"] ** -0.5)),
    "no scale": step("scores", _scaled(lambda p: 1.0)),
    "scale twice": step("scores", _scaled(lambda p: 1 / p.dim)),
    "temperature": step("softmax", lambda p, right, s: right(p.r(s * np.float32(1 / 1.3)))),
    "no mask": step("masked", lambda p, right, s: s),
    "strict mask": step("masked", _strict(-1e9)),
    "strict mask, lowest": step("masked", _strict(float(np.finfo(np.float32).min))),
    "strict mask, infinite": step("masked", _strict(-np.inf)),
    "mask one too many": step("masked", lambda p, right, s: np.where(np.tri(s.shape[-1], k=1), s, np.float32(-np.inf))),
    "window": window(lambda _: 6),
    "fused rows": _fused,
    "low rank": _low_rank(8),
    "gelu tanh": step("silu", lambda p, right, gate, up: p.r(gelu_tanh(gate))),
    "gelu erf": step("silu", lambda p, right, gate, up: p.r(gelu_erf(gate))),
    "silu of up": step("silu", lambda p, right, gate, up: right(up, gate)),
    "silu(up) gate": step("swigl", lambda p, right, silu, up, gate: p.r(p.silu(up, gate) * gate)),
    "silu of up, times gate": lambda p: (
        step("silu", lambda p, right, gate, up: right(up, gate))(p),
        step("swigl", lambda p, right, silu, up, gate: p.r(silu * gate))(p),
    )[0],
    "head is the embedding": step("head", _with_embedding),
    "products in float16": step("linear", _in_float16),
    "1/rms in bfloat16": step("norm", _normed_in_bfloat16),
    "softmax in bfloat16": step("softmax", _softmax_in(ml_dtypes.bfloat16)),
    "silu in bfloat16": step("silu", _silu_in(ml_dtypes.bfloat16)),
}

# Mistake -> the stage that is wrong first, and words of the cause.
NAMED: dict[str, tuple[str, str]] = {
    "tiled heads": ("attn_scores", "key heads are dealt out in turn"),
    "scale by hidden": ("attn_scores", "the scale is 1/sqrt(hidden_size), 64, not 1/sqrt(head_dim)"),
    "no scale": ("attn_scores", "the scale 1/sqrt(head_dim) is missing"),
    "scale twice": ("attn_scores", "the scale 1/sqrt(head_dim) is there twice"),
    "temperature": ("attn_softmax", "as if the scores were divided by 1.3 before the softmax"),
    "no mask": ("attn_softmax", "the causal mask is missing"),
    "strict mask": ("attn_softmax", "the mask hides a query's own position"),
    "strict mask, lowest": ("attn_softmax", "the mask hides a query's own position"),
    "strict mask, infinite": ("attn_softmax", "the mask hides a query's own position"),
    "mask one too many": ("attn_softmax", "the mask shows one position too many"),
    "window": ("attn_softmax", "the mask shows the last 6 keys alone: a window"),
    "fused rows": ("qkv_matmul", "joined as all of q, k, v and read key head by key head"),
    "low rank": ("qkv_matmul", "q_proj.weight and self_attn.v_proj.weight each lacked a matrix of low rank (8, 8)"),
    "gelu tanh": ("ffn_silu", "gelu (by tanh) instead of silu"),
    "gelu erf": ("ffn_silu", "gelu (by erf) instead of silu"),
    "silu of up": ("ffn_silu", "silu of ffn_up, not of ffn_gate"),
    "silu(up) gate": ("ffn_swigl", "silu of ffn_up, times ffn_gate"),
    "silu of up, times gate": ("ffn_silu", "silu of ffn_up, not of ffn_gate"),
    "head is the embedding": ("lm_head", "the embedding in the place of lm_head.weight"),
}
