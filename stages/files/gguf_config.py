"""What the metadata of a GGUF file says of its model, in the words of a `config.json`.

The families then read it as they read any config. A key that changes the computation is obeyed or refused by name;
so is one that is unknown here. Nothing is filled in: where llama.cpp would take a default, the key is asked for.
Facts: `convert_hf_to_gguf.py`, `src/llama-model.cpp` and `ggml/src/ggml-cpu/ops.cpp` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.errors import InputError, shown
from stages.files.gguf_file import GgufArray, GgufFile, GgufTensor, values
from stages.spec.fields import choice, got, number, size, value_of

EMBEDDING, OUTPUT, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
# What llama.cpp computes activations in, whatever the weights are stored as.
DTYPE = "float32"
# Each key that is read below, and each that changes nothing: `{arch}.` is left out.
_READ = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
# Keys that may stand only where they ask for what is computed anyway, and that value.
_ONLY: Mapping[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "tensor_data_layout": "Meta AI original pth",  # rows of q and k in pairs, as every Llama has them in GGUF
    "use_parallel_residual": False,
}
# What llama.cpp calls the families; a Mistral is a llama there, without its window.
_ARCHITECTURES = ("qwen3", "qwen2", "llama")
_SCALINGS = ("none", "linear", "yarn")
# Llama 3.1 and later are stored as divisors of their frequencies alone; these settings are all that were published.
_LOW, _HIGH, _ORIGINAL_LENGTHS = 1.0, 4.0, tuple(2**k for k in range(4, 21))


def raw_config(file: GgufFile) -> dict[str, Any]:
    """The metadata as a `config.json` would say it; `InputError` naming the key that is missing, odd or refused."""
    meta, where = file.metadata, str(file.path)
    if (kind := meta.get("general.type", "model")) != "model":
        raise InputError(f"{where}: general.type: is {got(kind)}, expected model")
    if (count := meta.get("split.count", 1)) not in (0, 1):
        raise InputError(f"{where}: split.count: this is one of {got(count)} files; join them with llama-gguf-split")
    arch = choice(meta, "general.architecture", _ARCHITECTURES, where)
    _refuse_unknown(meta, arch, where)

    def of(key: str) -> int:
        return size(meta, f"{arch}.{key}", where)

    hidden, heads, positions = of("embedding_length"), of("attention.head_count"), of("context_length")
    head_dim = _head_dim(meta, arch, hidden, heads, where)
    return {
        "model_type": arch,
        "hidden_size": hidden,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": of("feed_forward_length"),
        "vocab_size": _vocabulary(file, arch),
        "hidden_act": "silu",
        "rms_norm_eps": number(meta, f"{arch}.attention.layer_norm_rms_epsilon", where),
        "max_position_embeddings": positions,
        "rope_parameters": _rope(file, arch, head_dim, positions),
        "tie_word_embeddings": OUTPUT not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "dtype": DTYPE,
    }


def _refuse_unknown(meta: Mapping[str, Any], arch: str, where: str) -> None:
    for key, value in meta.items():
        own = key.removeprefix(f"{arch}.")
        if own == key or own in _READ:
            continue
        if own not in _ONLY:
            raise InputError(f"{where}: {shown(key)}: is not known, and might change the computation")
        if value != _ONLY[own]:
            raise InputError(f"{where}: {key}: only {got(_ONLY[own])} is supported, got {got(value)}")


def _head_dim(meta: Mapping[str, Any], arch: str, hidden: int, heads: int, where: str) -> int:
    """The length of a head: stated, or what GGUF says it is where it is not."""
    key = f"{arch}.attention.key_length"
    if key in meta:
        head_dim = size(meta, key, where)
    elif hidden % heads:
        raise InputError(f"{where}: {arch}.attention.head_count: {heads} does not divide embedding_length {hidden}")
    else:
        head_dim = hidden // heads
    for other in ("attention.value_length", "rope.dimension_count"):
        if meta.get(f"{arch}.{other}", head_dim) != head_dim:
            raise InputError(
                f"{where}: {arch}.{other}: only {head_dim}, the length of a head, is supported, "
                f"got {got(meta[f'{arch}.{other}'])}"
            )
    return head_dim


def _vocabulary(file: GgufFile, arch: str) -> int:
    """Rows of the embedding; the metadata may say the same."""
    if EMBEDDING not in file.tensors:
        raise InputError(f"{file.path}: no tensor '{EMBEDDING}', whose rows are the vocabulary")
    rows = file.tensors[EMBEDDING].shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    said = {
        f"{arch}.vocab_size": file.metadata.get(f"{arch}.vocab_size", rows),
        "tokenizer.ggml.tokens": tokens.count if isinstance(tokens, GgufArray) else rows,
    }
    for key, count in said.items():
        if count != rows:
            raise InputError(f"{file.path}: {key}: {got(count)} contradicts the {rows} rows of {EMBEDDING}")
    return rows


def _rope(file: GgufFile, arch: str, head_dim: int, positions: int) -> dict[str, Any]:
    meta, where, own = file.metadata, str(file.path), f"{arch}.rope.scaling."
    theta = number(meta, f"{arch}.rope.freq_base", where)
    kind = choice(meta, f"{own}type", _SCALINGS, where) if f"{own}type" in meta else "none"
    divisors = file.tensors.get(FREQUENCIES)
    if divisors is not None:
        if kind != "none":
            raise InputError(f"{where}: {own}type: {kind} contradicts '{FREQUENCIES}', which scales too; keep one")
        return {"rope_theta": theta, **_divided(_read(file, divisors, head_dim), theta, head_dim, positions)}
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    found = {"rope_theta": theta, "rope_type": kind, "factor": number(meta, f"{own}factor", where, least=1.0)}
    if kind == "yarn":
        value_of(meta, f"{own}original_context_length", where, "")
        found["original_max_position_embeddings"] = size(meta, f"{own}original_context_length", where)
        for name in ("beta_fast", "beta_slow"):
            if f"{own}yarn_{name}" in meta:
                found[name] = number(meta, f"{own}yarn_{name}", where)
    return found


def _read(file: GgufFile, tensor: GgufTensor, head_dim: int) -> np.ndarray:
    place = f"{file.path}: '{FREQUENCIES}'"
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise InputError(f"{place}: is {tensor.type} {list(tensor.shape)}, expected F32 [{head_dim // 2}]")
    found = values(file.raw(tensor, 0, 1), tensor.type)[0]
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise InputError(f"{place}: holds something else than numbers above 0, by which frequencies are divided")
    return found


def _divided(divisors: np.ndarray, theta: float, head_dim: int, positions: int) -> dict[str, Any]:
    """The RoPE whose frequencies are divided so: Llama 3's settings where they give these divisors, else the divisors.

    LongRoPE with one list for all lengths, and no other factor, is just that.
    """
    factor = float(divisors.max())
    for original in _ORIGINAL_LENGTHS if factor > 1 else ():
        settings = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
        expected = _llama3_divisors(settings, theta, head_dim)
        # The converter computes in float32: a blend is off by some units, which 1 / (blend) enlarges by the factor.
        if (np.abs(divisors - expected) <= expected * 2.0**-24 * 8 * (1 + factor)).all():
            return settings
    one = [float(x) for x in divisors]
    return {
        "rope_type": "longrope",
        "short_factor": one,
        "long_factor": one,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def _llama3_divisors(settings: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    share = (settings["original_max_position_embeddings"] / wavelengths - _LOW) / (_HIGH - _LOW)
    share = np.clip(share, 0, 1)
    return 1 / ((1 - share) / settings["factor"] + share)
