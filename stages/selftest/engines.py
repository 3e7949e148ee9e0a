"""Right forwards written apart from the backends, in numpy, as engines compute them: each records what it has.

Nothing here knows how a run is judged. What an engine keeps inside a kernel it does not record, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from stages.selftest.specimens import Specimen
from stages.spec.config import EMBEDDING, LM_HEAD
from stages.spec.dtypes import stored_dtype

Arrays = dict[str, np.ndarray]
# Of float32 operands `[rows, K]` and `[columns, K]`, their product.
Product = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Terms that are summed at a time, and keys that one step of an online softmax sees.
_BLOCK, _KEYS = 32, 8


def at_once(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x @ w.T


def backwards(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The last term first."""
    return np.ascontiguousarray(x[:, ::-1]) @ np.ascontiguousarray(w[:, ::-1]).T


def by_blocks(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The sum of blocks, one after another."""
    total = np.zeros((len(x), len(w)), np.float32)
    for start in range(0, x.shape[1], _BLOCK):
        part = slice(start, start + _BLOCK)
        total += x[:, part] @ w[:, part].T
    return total


def one_by_one(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One term after another."""
    total = np.zeros((len(x), len(w)), np.float32)
    for k in range(x.shape[1]):
        total += x[:, k : k + 1] * w[:, k]
    return total


@dataclass(frozen=True)
class Engine:
    """How an engine computes a forward.

    `fused`: norms, RoPE and the activation round once; silu is not recorded. `online`: softmax block by block of keys,
    scores in float32; neither scores nor probabilities are recorded. `wide` keeps probabilities in float32, `stream`
    the residual stream. `folded` scales q, not the scores. `steps`: one token after another, with a cache.
    """

    name: str
    doc: str
    product: Product = at_once
    fused: bool = False
    online: bool = False
    wide: bool = False
    stream: bool = False
    folded: bool = False
    steps: bool = False

    def run(self, specimen: Specimen) -> Arrays:
        """What it records of a forward of the specimen's tokens, by key."""
        forward, tokens = _Forward(self, specimen), np.asarray(specimen.token_ids())
        with np.errstate(all="ignore"):
            if not self.steps:
                return forward(tokens, 0)
            steps = [forward(tokens[at : at + 1], at) for at in range(len(tokens))]
        return {key: _joined([step[key] for step in steps], len(tokens)) for key in steps[0]}


def _joined(parts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    """Along the tokens; of scores and probabilities, keys to come are 0."""
    if parts[0].ndim == 1:
        return parts[0]
    if parts[-1].ndim == 3 and len(parts) > 1 and parts[0].shape != parts[-1].shape:
        wide = [np.pad(part, ((0, 0), (0, 0), (0, tokens - part.shape[-1]))) for part in parts]
        return np.concatenate(wide, axis=1)
    return np.concatenate(parts)


@dataclass
class _Forward:
    """One forward by an engine, in one call or in steps."""

    engine: Engine
    specimen: Specimen
    cache: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = stored_dtype(self.specimen.dtype)
        self.weights: Mapping[str, np.ndarray] = {
            name: array.astype(np.float32) for name, array in self.specimen.weights().items()
        }

    def __call__(self, tokens: np.ndarray, start: int) -> Arrays:
        s, out = self.specimen, Arrays()
        exponent = np.arange(0, s.head_dim, 2, dtype=np.float32) / np.float32(s.head_dim)
        out["inv_freq"] = np.float32(1) / np.float32(1e6) ** exponent
        positions = np.arange(start, start + len(tokens), dtype=np.float32)
        out["rope_angle"] = np.tile(positions[:, None] * out["inv_freq"], 2)
        self.cos, self.sin = (wave(out["rope_angle"]).astype(self.dtype) for wave in (np.cos, np.sin))
        out |= {"rope_cos": self.cos, "rope_sin": self.sin}
        out["embedding"] = self.weights[EMBEDDING][tokens].astype(self.dtype)
        x = self.wide(out["embedding"]) if self.engine.stream else out["embedding"]
        for layer in range(s.layers):
            made, x = self.layer(layer, x)
            out |= {f"layers.{layer}.{name}": array for name, array in made.items()}
        out["final_norm"] = self.norm(x, self.weights["model.norm.weight"])
        head = self.weights[EMBEDDING if s.tied else LM_HEAD]
        out["lm_head"] = self.engine.product(self.wide(out["final_norm"]), head).astype(self.dtype)
        return out

    def wide(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    def layer(self, layer: int, x: np.ndarray) -> tuple[Arrays, np.ndarray]:
        """The stages of one layer, and the stream after it."""
        out = Arrays()
        w = {name.removeprefix(f"model.layers.{layer}."): array for name, array in self.weights.items()}
        out["attn_norm"] = self.norm(x, w["input_layernorm.weight"])
        q, k, v = self.projected(out, w)
        out["q_post_rope"], out["k_post_rope"] = self.turned(q), self.turned(k)
        out["attention"] = self.attention(out, layer, v)
        out["attn_out"] = self.linear(out["attention"], w["self_attn.o_proj.weight"])
        x = out["post_attn_residual"] = self.added(x, out["attn_out"])
        out["ffn_norm"] = self.norm(x, w["post_attention_layernorm.weight"])
        for name in ("gate", "up"):
            out[f"ffn_{name}"] = self.linear(out["ffn_norm"], w[f"mlp.{name}_proj.weight"])
        gate = self.wide(out["ffn_gate"])
        silu = gate / (1 + np.exp(-gate))
        if not self.engine.fused:
            out["ffn_silu"] = silu.astype(self.dtype)
            silu = self.wide(out["ffn_silu"])
        out["ffn_swigl"] = (silu * self.wide(out["ffn_up"])).astype(self.dtype)
        out["ffn_out"] = self.linear(out["ffn_swigl"], w["mlp.down_proj.weight"])
        x = out["post_ffn_residual"] = self.added(x, out["ffn_out"])
        return out, x

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        return (self.engine.product(self.wide(x), weight) + np.float32(bias)).astype(self.dtype)

    def added(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        total = self.wide(x) + self.wide(y)
        return total if self.engine.stream else total.astype(self.dtype)

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = self.wide(x)
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.specimen.eps))
        if not self.engine.fused:
            normed = self.wide(normed.astype(self.dtype))
        return (normed * weight).astype(self.dtype)

    def projected(self, out: Arrays, w: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """q, k and v by heads, q and k normed where the family does so."""
        s, names = self.specimen, [f"self_attn.{name}_proj" for name in "qkv"]
        parts = [self.linear(out["attn_norm"], w[f"{n}.weight"], w.get(f"{n}.bias", 0.0)) for n in names]
        out["qkv_bias" if f"{names[0]}.bias" in w else "qkv_matmul"] = np.concatenate(parts, axis=-1)
        heads = [part.reshape(len(part), -1, s.head_dim) for part in parts]
        for number, name in enumerate(("q_norm", "k_norm")):
            if f"self_attn.{name}.weight" in w:
                heads[number] = out[name] = self.norm(heads[number], w[f"self_attn.{name}.weight"])
        return heads

    def turned(self, x: np.ndarray) -> np.ndarray:
        wide, half = self.wide(x), x.shape[-1] // 2
        other = np.concatenate((-wide[..., half:], wide[..., :half]), axis=-1)
        direct, turned = wide * self.wide(self.cos)[:, None], other * self.wide(self.sin)[:, None]
        if not self.engine.fused:
            direct, turned = (self.wide(part.astype(self.dtype)) for part in (direct, turned))
        return (direct + turned).astype(self.dtype)

    def attention(self, out: Arrays, layer: int, v: np.ndarray) -> np.ndarray:
        """Attention of these queries to the keys so far."""
        k, s, scale = out["k_post_rope"], self.specimen, np.float32(self.specimen.head_dim**-0.5)
        if layer in self.cache:
            k, v = (np.concatenate(pair) for pair in zip(self.cache[layer], (k, v), strict=True))
        self.cache[layer] = k, v
        q = self.wide(out["q_post_rope"])
        if self.engine.folded:
            q, scale = self.wide((q * scale).astype(self.dtype)), np.float32(1)
        keys, values = (np.repeat(self.wide(x), s.heads // s.kv_heads, axis=1).swapaxes(0, 1) for x in (k, v))
        q = q.swapaxes(0, 1)
        seen = np.tri(q.shape[1], len(k), len(k) - q.shape[1], dtype=np.bool_)
        if self.engine.online:
            given = self.online(q, keys, values, scale, seen)
        else:
            product = self.wide((q @ keys.swapaxes(1, 2)).astype(self.dtype))
            out["attn_scores"] = (product * scale).astype(self.dtype)
            scores = np.where(seen, self.wide(out["attn_scores"]), -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out["attn_softmax"] = p if self.engine.wide else p.astype(self.dtype)
            given = self.wide(out["attn_softmax"]) @ values
        return given.swapaxes(0, 1).reshape(q.shape[1], -1).astype(self.dtype)

    def online(
        self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: np.float32, seen: np.ndarray
    ) -> np.ndarray:
        """Block by block of keys with the largest score so far, as flash attention; divided by the sum at the end."""
        largest = np.full((*q.shape[:2], 1), -np.inf, np.float32)
        total, given = np.zeros_like(largest), np.zeros_like(q)
        for start in range(0, keys.shape[1], _KEYS):
            part = slice(start, start + _KEYS)
            scores = np.where(seen[:, part], (q @ keys[:, part].swapaxes(1, 2)) * scale, np.float32(-np.inf))
            now = np.maximum(largest, scores.max(axis=-1, keepdims=True))
            p, less = np.exp(scores - now), np.exp(largest - now)
            total = total * less + p.sum(axis=-1, keepdims=True)
            given = given * less + self.wide(p.astype(self.dtype)) @ values[:, part]
            largest = now
        return given / total


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("backwards", "products sum the last term first", backwards),
        Engine("blocked", "products sum blocks of 32", by_blocks),
        Engine("chained", "products sum one term after another; the scale is in q", one_by_one, folded=True),
        Engine("flash", "online softmax, scores in float32", online=True),
        Engine("wide probabilities", "probabilities stay float32", wide=True),
        Engine("float32 stream", "the residual stream stays float32", stream=True),
        Engine("fused", "norms, RoPE and the activation round once; flash", by_blocks, fused=True, online=True),
        Engine("decode", "one token after another, with a cache", steps=True),
    )
}
