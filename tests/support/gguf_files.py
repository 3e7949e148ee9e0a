"""GGUF files as llama.cpp's converter writes them, from tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from forward_models import Model, random_weights

from stages.files.checkpoint import open_checkpoint
from stages.files.gguf_config import FREQUENCIES
from stages.files.gguf_model import gguf_names
from stages.spec.config import ModelConfig

Edit = Callable[[dict[str, Any]], object]


def write_gguf(
    path: Path,
    model: Model,
    dtype: str = "float32",
    *,
    kind: str = "F32",
    weights: Mapping[str, np.ndarray] | None = None,
    raw: Mapping[str, np.ndarray] | None = None,
    edit: Edit = lambda _: None,
    seed: int = 0,
) -> Path:
    """The model that `write_model` writes with the same arguments, its matrices quantised to `kind`.

    `weights`: by parameter, instead of random ones. `raw`: the stored bytes of some parameters, `[rows, bytes]`.
    `edit` changes the metadata, key to value, before it is written.
    """
    config = model.config(dtype)
    given = random_weights(config, seed) if weights is None else weights
    return write_config(path, config, given, kind=kind, raw=raw or {}, edit=edit)


def gguf_of(folder: Path, path: Path, kind: str) -> Path:
    """A checkpoint as GGUF, its matrices quantised, with no tokenizer, which llama.cpp wants to be told."""
    with open_checkpoint(folder) as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
        said = {"tokenizer.ggml.model": "none", f"{checkpoint.config.family}.vocab_size": checkpoint.config.vocab_size}
        return write_config(path, checkpoint.config, weights, kind=kind, raw={}, edit=lambda had: had.update(said))


def write_config(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    *,
    kind: str,
    raw: Mapping[str, np.ndarray],
    edit: Edit,
) -> Path:
    metadata = described(config)
    edit(metadata)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", config.family))
    for key, value in metadata.items():
        add(writer, key, value)
    stored = gguf_names(config)
    for name, array in weights.items():
        wide = paired(name, array.astype(np.float32), config)
        if name in raw:
            writer.add_tensor(stored[name], raw[name], raw_dtype=gguf.GGMLQuantizationType[kind])
            continue
        own = kind if array.ndim > 1 else "F32"
        data = gguf.quantize(wide, gguf.GGMLQuantizationType[own])
        writer.add_tensor(stored[name], np.ascontiguousarray(data), raw_dtype=gguf.GGMLQuantizationType[own])
    if config.rope_type == "llama3":
        writer.add_tensor(FREQUENCIES, llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def described(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model."""
    arch, rope = config.family, config.rope
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if config.rope_type in ("linear", "yarn"):
        said |= {"rope.scaling.type": config.rope_type, "rope.scaling.factor": rope["factor"]}
    if config.rope_type == "yarn":
        said["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{arch}.{key}": value for key, value in said.items()}


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def paired(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """q and k of a Llama with the rows of each head in pairs, as the converter turns them."""
    if config.family != "llama" or not any(part in name for part in ("q_proj", "k_proj")):
        return array
    half = config.head_dim // 2
    return array.reshape(-1, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def llama3_divisors(config: ModelConfig) -> np.ndarray:
    """By what the frequencies of Llama 3 are divided, in float32 as the converter computes it."""
    rope, one = config.rope, np.float32(1)
    powers = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelengths = np.float32(2 * np.pi) / (one / np.float32(config.rope_theta) ** powers)
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = (np.float32(length) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = one / ((one - smooth) / np.float32(rope["factor"]) + smooth)
    long, short = wavelengths > length / low, wavelengths < length / high
    return np.where(short, one, np.where(long, np.float32(rope["factor"]), blended)).astype(np.float32)
