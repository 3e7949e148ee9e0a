"""The models that faults are planted in and that clean runs are made of: tiny Qwen checkpoints with random weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.files.tensorfile import write_tensors
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.families import parameter_shapes, parse_config


@dataclass(frozen=True)
class Shape:
    """The shape of a tiny model, from which its `config.json` follows."""

    family: str = "qwen3"
    dtype: str = "float32"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32  # not hidden / heads
    hidden: int = 64
    intermediate: int = 160
    vocab: int = 300
    layers: int = 3
    tied: bool = True
    attention_bias: bool = False
    eps: float = 1e-6
    positions: int = 1024
    window: int | None = None  # of the layers from `sliding` on; of all in families where all slide
    sliding: int = 0
    experts: int = 0
    topk: int = 2
    renormalised: bool = True
    dense: tuple[int, ...] = ()  # layers without experts
    rope: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()  # beside or in the place of the defaults

    def raw(self) -> dict[str, Any]:
        """The `config.json` of this model."""
        return {
            "model_type": self.family,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "max_window_layers": self.sliding,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **self._rope()},
            "sliding_window": self.window,
            "tie_word_embeddings": self.tied,
            "use_sliding_window": self.window is not None,
            "vocab_size": self.vocab,
            **({"attention_bias": self.attention_bias} if not self.family.startswith("qwen2") else {}),
            **(self._experts() if self.experts else {}),
        }

    def _experts(self) -> dict[str, Any]:
        return {
            "num_experts": self.experts,
            "num_experts_per_tok": self.topk,
            "norm_topk_prob": self.renormalised,
            "moe_intermediate_size": self.intermediate // 4,
            "shared_expert_intermediate_size": self.intermediate // 2,
            "mlp_only_layers": list(self.dense),
            "decoder_sparse_step": 1,
        }

    def _rope(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dict(self.rope).items()}

    def config(self) -> ModelConfig:
        return parse_config(self.raw(), "config.json")


@dataclass(frozen=True)
class Specimen(Shape):
    """A shape, and how its random weights are scaled."""

    tokens: int = 20
    seed: int = 0
    embedding: float = 0.05  # standard deviation of the embedding: what the first norm is given
    block: float = 1.0  # of what a block adds to the residual stream, over its usual size
    sharpness: float = 1.0  # of the norms of queries and keys: large ones make softmax pick one key
    manner: str = "plain"  # how weights are distributed, see MANNERS

    def token_ids(self) -> list[int]:
        """Random token ids."""
        return [int(t) for t in np.random.default_rng(self.seed).integers(0, self.vocab, self.tokens)]

    def write(self, folder: Path) -> Path:
        """A checkpoint of this specimen in the new `folder`."""
        folder.mkdir(parents=True)
        weights = self.weights()
        write_tensors(folder / "model.safetensors", weights, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.raw()))
        return folder

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter, biases and norms too; no LM head where it is tied."""
        rng, dtype = np.random.default_rng((self.seed, 1)), stored_dtype(self.dtype)
        shapes = parameter_shapes(self.config())
        if self.tied:
            del shapes[LM_HEAD]
        return {name: self._values(name, shape, rng).astype(dtype) for name, shape in shapes.items()}

    def _values(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        normal = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            sharp = self.sharpness if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            values = sharp * np.exp(0.3 * normal)
        elif name.endswith(".bias"):
            values = 0.3 * normal
        elif name == EMBEDDING:
            values = self.embedding * normal
        else:
            gain = self.block if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            values = gain * shape[-1] ** -0.5 * normal
        return MANNERS[self.manner](name, values, rng).astype(np.float32)


def _sparse(_name: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values * (rng.random(values.shape) < 0.1) if values.ndim == 2 else values


def _large_norms(name: str, values: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return values**5 if name.endswith("norm.weight") else values


def _outliers(_name: str, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values * np.exp(1.5 * rng.standard_normal(values.shape[-1], np.float32))


def _tiny(name: str, values: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return values * 1e-36 if name.endswith(("down_proj.weight", "o_proj.weight")) else values


def _same_sign(_name: str, values: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return np.abs(values)


MANNERS: Mapping[str, Callable[[str, np.ndarray, np.random.Generator], np.ndarray]] = {
    "plain": lambda _name, values, _rng: values,
    "sparse": _sparse,  # nine of ten weights are 0
    "large norms": _large_norms,  # norm weights from 0.01 to 100
    "outliers": _outliers,  # columns of very different sizes, as in trained models
    "tiny": _tiny,  # what blocks add is next to the smallest float32
    "same sign": _same_sign,  # nothing cancels
}

_SMALL = Specimen()
# Square experts, all of which some token is sent to.
_EXPERTS = Specimen(family="qwen3_moe", intermediate=256, experts=6, topk=3, layers=2)
_SHARED = dataclasses.replace(_EXPERTS, family="qwen2_moe", head_dim=16, renormalised=False)
# The specimens that faults are planted in. `eps` faults show by mean x^2, which a weak block keeps the same in all
# layers: 4e-4, 0.6 and 4.4 (numerics.md).
SPECIMENS: Mapping[str, Specimen] = {
    "qwen3": dataclasses.replace(_SMALL, tied=False),
    "qwen2": dataclasses.replace(_SMALL, family="qwen2", head_dim=16),
    "qwen2-untied": dataclasses.replace(_SMALL, family="qwen2", head_dim=16, tied=False, seed=1),
    "qwen3-bf16": dataclasses.replace(_SMALL, dtype="bfloat16", seed=2),
    "qwen2-bf16": dataclasses.replace(_SMALL, family="qwen2", head_dim=16, dtype="bfloat16", tied=False, seed=3),
    "qwen3-f16": dataclasses.replace(_SMALL, dtype="float16", seed=9),
    "quiet": dataclasses.replace(_SMALL, embedding=0.02, block=0.01, seed=4),
    "plain": dataclasses.replace(_SMALL, embedding=0.775, block=0.1, seed=5),
    "loud": dataclasses.replace(_SMALL, embedding=2.1, block=0.1, seed=6),
    "sharp": dataclasses.replace(_SMALL, sharpness=10.0, seed=7),
    "qwen3-moe": dataclasses.replace(_EXPERTS, seed=10),
    "qwen3-moe-bf16": dataclasses.replace(_EXPERTS, dtype="bfloat16", seed=11),
    "qwen2-moe": dataclasses.replace(_SHARED, seed=12),
    "qwen2-moe-bf16": dataclasses.replace(_SHARED, dtype="bfloat16", seed=13),
    # Its decomposed layer is 1; the bundle has nine tensors: tall, wide and square ones.
    "bundle": dataclasses.replace(_SMALL, seed=8),
    "square": dataclasses.replace(_SMALL, seed=8),
    "bundle-bf16": dataclasses.replace(_SMALL, dtype="bfloat16", seed=8),
}
