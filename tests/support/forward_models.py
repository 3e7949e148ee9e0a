"""Tiny random models in memory or on disk, and the one table of shapes that forward tests derive from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from stages.files.dump import MANIFEST_FILE
from stages.files.forward_dump import ForwardSide, layer_file, parse_key
from stages.files.tensorfile import sha256, write_tensors
from stages.jobs.forward_one import ForwardCommand, forward_one
from stages.progress import Progress
from stages.run.adapted import ADAPTED_FILE
from stages.selftest.specimens import Shape
from stages.spec.backend import Backend
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.families import parameter_shapes, parse_config
from stages.spec.forward import forward_pipeline
from stages.spec.stage import Stage

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
# Of a model of 64 positions.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.01 * i for i in range(16)],
    "long_factor": [1.1 + 0.7 * i for i in range(16)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Model(Shape):
    """What a test varies; the dtype comes when it is written."""

    layers: int = 2
    positions: int = 512

    def raw(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of this model."""
        return Shape.raw(replace(self, dtype=dtype))

    def config(self, dtype: str = "float32") -> ModelConfig:
        return parse_config(self.raw(dtype), "config.json")


# Every shape that the forward must handle: all families, GQA ratios 1, 2, 4 and 7, head_dim unlike hidden / heads,
# tied and untied, with and without each bias, the six RoPE types, and windows in all layers and in some.
MODELS = {
    "qwen3": Model(),
    "qwen3-untied": Model(tied=False),
    "qwen3-gqa1": Model(heads=3, kv_heads=3, head_dim=16, hidden=96),
    "qwen3-gqa4": Model(heads=8, kv_heads=2, head_dim=24),
    "qwen3-gqa7": Model(heads=7, kv_heads=1, head_dim=64, hidden=112),
    "qwen3-bias": Model(attention_bias=True),
    "qwen3-yarn": Model(rope=YARN),
    "qwen3-linear": Model(rope=LINEAR),
    "qwen3-dynamic": Model(rope=DYNAMIC, positions=64),
    "qwen3-longrope": Model(rope=LONGROPE),
    "qwen3-llama3": Model(rope=LLAMA3),
    "qwen2": Model("qwen2", tied=False),
    "qwen2-tied": Model("qwen2"),
    "qwen2-gqa1": Model("qwen2", heads=2, kv_heads=2, head_dim=32),
    "qwen2-gqa4": Model("qwen2", heads=4, kv_heads=1, head_dim=48),
    "qwen2-gqa7": Model("qwen2", heads=14, kv_heads=2, head_dim=8, hidden=112),
    "qwen2-yarn": Model("qwen2", rope=YARN),
    "qwen2-linear": Model("qwen2", rope=LINEAR),
    "qwen2-dynamic": Model("qwen2", rope=DYNAMIC, positions=64),
    "qwen2-longrope": Model("qwen2", rope=LONGROPE),
    "qwen2-llama3": Model("qwen2", rope=LLAMA3),
    "llama": Model("llama", tied=False, heads=4, kv_heads=4, head_dim=16, hidden=64),
    "llama-tied": Model("llama", rope=LLAMA3),
    "llama-gqa4": Model("llama", tied=False, heads=8, kv_heads=2, head_dim=24),
    "llama-bias": Model("llama", attention_bias=True, eps=1e-5),
    "mistral": Model("mistral", tied=False, eps=1e-5, window=5),
    "mistral-gqa4": Model("mistral", heads=8, kv_heads=2, head_dim=24),
    "qwen3-moe": Model("qwen3_moe", experts=8),
    "qwen3-moe-many": Model("qwen3_moe", experts=40, topk=6, renormalised=False, tied=False, dense=(0,)),
    "qwen2-moe": Model("qwen2_moe", experts=10, topk=3, renormalised=False),
    "qwen2-moe-dense": Model("qwen2_moe", experts=6, dense=(0,), tied=False),
    "qwen2-window": Model("qwen2", window=6, sliding=1),
    "qwen3-window": Model(window=64),
}


def stages_of(config: ModelConfig) -> list[tuple[int | None, Stage]]:
    """The stages of the whole model, and those of one layer of each kind, with that layer."""
    path = forward_pipeline(config)
    layers = {id(kind): layer for layer, kind in enumerate(path.layers)}
    before, after = path.of_model()
    return [(layer, s) for layer in layers.values() for s in path.of_layer(layer)] + [(None, s) for s in before + after]


def tokens_of(count: int, vocab: int = 300) -> list[int]:
    """`count` token ids, some of them repeated."""
    return [int(t) for t in np.random.default_rng(count).integers(0, vocab, count)]


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter, biases and norms too, in the config's dtype; no LM head when it is tied."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(ml_dtypes.bfloat16 if config.dtype == "bfloat16" else config.dtype)
    weights: dict[str, np.ndarray] = {}
    for name, shape in parameter_shapes(config).items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        normal = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = np.exp(0.3 * normal)
        elif name.endswith(".bias"):
            values = 0.3 * normal
        else:
            values = normal * (0.05 if name == EMBEDDING else shape[-1] ** -0.5)
        weights[name] = values.astype(np.float32).astype(dtype)
    return weights


class MemoryWeights:
    """Weights in memory, read as a checkpoint is read; counts what is read."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.weights = dict(weights)
        self.reads: list[tuple[str, int, int | None]] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.reads.append((name, start, stop))
        stored = EMBEDDING if name == LM_HEAD and LM_HEAD not in self.weights else name
        return self.weights[stored][start:stop]


def write_model(folder: Path, model: Model, dtype: str, seed: int = 0) -> Path:
    """A checkpoint with random weights in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.raw(dtype)))
    write_tensors(folder / "model.safetensors", random_weights(model.config(dtype), seed), metadata={"format": "pt"})
    return folder


def forward_command(model: Path, **changes: Any) -> ForwardCommand:
    """`svf forward MODEL --no-production` with `changes`, as the command line parses it."""
    return ForwardCommand(**{"model": str(model), "tokens": "3,141,59,26,53", "production": False, **changes})


def trace(model: Path, backend: Backend, **changes: Any) -> dict[str, Any]:
    """The `svf.forward/1` document of one run in this process; without production unless asked for."""
    return forward_one(forward_command(model, backend=backend.name, **changes), lambda: backend, Progress(False))


def dumped(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a forward dump, by key."""
    side = ForwardSide(folder)
    try:
        return {key: side.read(place) for place, key in side.places.items()}
    finally:
        side.close()


def change_dump(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Rewrite a forward dump after `change(tensors)`: files, shapes, dtypes and sums all speak the same lie."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    tensors = dumped(folder)
    change(tensors)
    files: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        place = parse_key(key)
        assert place is not None
        files.setdefault(layer_file(place[0]), {})[key] = array
    for path in folder.glob("*.safetensors"):
        if path.name != ADAPTED_FILE:
            path.unlink()
    manifest["tensors"] = {}
    for file, held in files.items():
        write_tensors(folder / file, held)
        for key, a in held.items():
            manifest["tensors"][key] = {
                "file": file,
                "dtype": a.dtype.name,
                "shape": list(a.shape),
                "sha256": sha256(a),
            }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return folder
