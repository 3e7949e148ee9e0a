"""Random checkpoints: seeded, reproducible to the byte, shaped like real ones and never downloaded.

Every value comes from PCG64 and operations that IEEE 754 rounds in one way (multiply, divide, square root, cast),
never from BLAS; the one `exp`, in the norms, goes through a rounding to bfloat16 that hides its last bits. So the
same preset, seed and dtype give the same file on another machine, as long as NumPy draws normals as it does now.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from stages.errors import UsageError, shown
from stages.files.checkpoint import CONFIG, LM_HEAD, WEIGHTS
from stages.files.folders import ensure_space, prepare_folder
from stages.files.jsonio import write_all, write_atomic, write_json
from stages.files.tensorfile import TensorWriter
from stages.spec.config import DTYPES as DTYPE_NAMES
from stages.spec.config import EMBEDDING, FULL, ModelConfig
from stages.spec.families import parameter_shapes, parse_config

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in DTYPE_NAMES
}

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256  # after the 256 bytes, each of which is its own id

# 16 MiB of float32: fits no cache, but each pass over it runs at memory speed and the peak stays small.
CHUNK_ELEMENTS = 1 << 22
# Room for config, tokenizer and headers beside the weights.
_OTHER_BYTES = 1 << 20


@dataclass(frozen=True)
class Preset:
    """The shape of a model; tied embeddings, rope_theta 1e6 and eps 1e-6 in every preset."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    window: int | None = None


# fmt: off
PRESETS: dict[str, Preset] = {
    #                       family  hidden layers heads kv  dim  inter. vocab  positions
    "tiny":         Preset("qwen3",    64,     4,   4,  2,  32,  192,    512,   512),
    "llama":        Preset("llama",    64,     4,   4,  2,  32,  192,    512,   512),
    "mistral":      Preset("mistral",  64,     4,   4,  2,  32,  192,    512,   512, window=16),
    "qwen3-0.6b":   Preset("qwen3",  1024,    28,  16,  8, 128, 3072, 151936, 40960),
    "qwen2.5-0.5b": Preset("qwen2",   896,    24,  14,  2,  64, 4864, 151936, 32768),
}
# fmt: on

# Magnitudes, chosen by running the Qwen presets on 63 tokens of text in float32. Logits have standard deviation
# 2 to 3 and 29 to 47 different arg-maxima; the largest attention weight of a row averages 0.13 to 0.23. With a
# residual gain of 2 a tied head repeats its input token with certainty; with 32 the token is lost in the layers.
_LOGIT_STD = 2.0
_RESIDUAL_GAIN = 8.0
_NORM_SPREAD = 0.25  # of log(weight): most norm weights between 0.6 and 1.6, as in trained models
_BIAS_STD = 0.25
_OUTLIER_GAIN = 4.0
_OUTLIER_EVERY = 512  # one output channel in so many


def synthesize(
    out: str | os.PathLike[str],
    preset: str,
    seed: int = 0,
    dtype: str = "bfloat16",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write a random checkpoint with a byte-level tokenizer into the new folder `out`; returns a summary.

    `config.json` is written last: a folder without it is unfinished. `progress` is called with bytes done, bytes
    in all, and the tensor's name. `UsageError` for an unknown preset or dtype, `OutputError` and `ResourceError`,
    before anything is computed, for a folder that cannot take the files.
    """
    if preset not in PRESETS:
        raise UsageError(f"preset '{shown(preset)}' does not exist; there are {', '.join(PRESETS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{shown(dtype)}' is not supported; there are {', '.join(DTYPES)}")
    raw = config_json(preset, dtype)
    config = parse_config(raw, f"preset {preset}")
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if name != LM_HEAD}  # all are tied
    parameters = sum(math.prod(shape) for shape in shapes.values())
    size = parameters * DTYPES[dtype].itemsize
    folder = prepare_folder(out)
    ensure_space(folder, size + _OTHER_BYTES)
    _write_weights(folder / WEIGHTS, config, shapes, seed, DTYPES[dtype], size, progress)
    _write_tokenizer(folder, config.max_position_embeddings)
    write_json(folder / "generation_config.json", {"eos_token_id": END_OF_TEXT_ID, "do_sample": False})
    write_json(folder / CONFIG, raw)
    return {
        "schema": "svf.synth/1",
        "out": str(folder),
        "preset": preset,
        "seed": seed,
        "dtype": dtype,
        "parameters": parameters,
        "tensors": len(shapes),
        "bytes": size,
    }


def config_json(preset: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """The `config.json` of a preset, in the style of transformers 5."""
    p = PRESETS[preset]
    windows: dict[str, dict[str, Any]] = {
        "llama": {"mlp_bias": False},
        "mistral": {"sliding_window": p.window},
    }
    layers = {"layer_types": [FULL] * p.layers, "max_window_layers": p.layers}
    window = windows.get(p.family, {"sliding_window": None, "use_sliding_window": False, **layers})
    head_dim = {"head_dim": p.head_dim} if p.family != "qwen2" else {}
    biases = {"attention_bias": False} if p.family not in ("qwen2", "mistral") else {}
    return dict(
        sorted(
            {
                "architectures": [f"{p.family.capitalize()}ForCausalLM"],
                "attention_dropout": 0.0,
                "bos_token_id": None,
                "dtype": dtype,
                "eos_token_id": END_OF_TEXT_ID,
                "hidden_act": "silu",
                "hidden_size": p.hidden,
                "initializer_range": 0.02,
                "intermediate_size": p.intermediate,
                "max_position_embeddings": p.positions,
                "model_type": p.family,
                "num_attention_heads": p.heads,
                "num_hidden_layers": p.layers,
                "num_key_value_heads": p.kv_heads,
                "pad_token_id": None,
                "rms_norm_eps": 1e-06,
                "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
                "tie_word_embeddings": True,
                "transformers_version": "5.0.0",
                "use_cache": True,
                "vocab_size": p.vocab,
                **window,
                **head_dim,
                **biases,
            }.items()
        )
    )


def _write_weights(
    path: Path,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    dtype: np.dtype,
    size: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    specs = {name: (dtype, shape) for name, shape in shapes.items()}
    done = 0
    with TensorWriter(path, specs, metadata={"format": "pt"}) as writer:
        for name, shape in shapes.items():
            for start, values in _blocks(name, shape, config, _generator(seed, name)):
                writer.write(name, values.astype(dtype, copy=False), start)
                done += values.size * dtype.itemsize
                if progress is not None:
                    progress(done, size, name)
        writer.commit()


def random_tensor(config: ModelConfig, name: str, seed: int = 0) -> np.ndarray:
    """One parameter as `synthesize` writes it in float32, in memory; a tied LM head is the embedding."""
    stored = EMBEDDING if name == LM_HEAD and config.tie_word_embeddings else name
    shape = parameter_shapes(config)[stored]
    return np.concatenate([values for _, values in _blocks(stored, shape, config, _generator(seed, stored))])


def _blocks(
    name: str, shape: tuple[int, ...], config: ModelConfig, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and float32 values of each block of rows of tensor `name`; the values do not depend on the cut."""
    if len(shape) == 1:
        yield 0, _vector(name, shape[0], rng)
        return
    rows, columns = shape
    scale, outliers = _scales(name, rows, columns, config, rng)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = rng.standard_normal((min(step, rows - start), columns), dtype=np.float32)
        block *= scale
        block[[row - start for row in outliers if start <= row < start + len(block)]] *= _OUTLIER_GAIN
        yield start, block


def _generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers of one tensor, whatever the others are and in whichever order they are made."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _vector(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A bias, or a norm's log-normal weight: float32 values that bfloat16 holds, `[size]`."""
    normal = rng.standard_normal(size)
    values = normal * _BIAS_STD if name.endswith(".bias") else np.exp(normal * _NORM_SPREAD)
    # Through bfloat16: whether this machine's exp ends in one bit or another no longer shows.
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def _scales(
    name: str, rows: int, columns: int, config: ModelConfig, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """What to multiply a normal matrix with: float32 `[columns]`, and the rows that are outliers.

    The columns fall off as 1/sqrt(j), in random order, so that singular values do likewise, as in trained
    weights; their root mean square is the matrix's standard deviation.
    """
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    embedding_std = _LOGIT_STD / math.sqrt(config.hidden_size)
    if name == "model.embed_tokens.weight":
        std = embedding_std
    elif residual:
        std = _RESIDUAL_GAIN * embedding_std / math.sqrt(2 * config.num_hidden_layers * columns)
    else:
        std = 1 / math.sqrt(columns)
    falling = 1 / np.sqrt(np.arange(1, columns + 1, dtype=np.float64))
    falling *= std * math.sqrt(columns / math.fsum(falling**2))
    order = np.argsort(rng.random(columns), kind="stable")
    outliers = [] if name == "model.embed_tokens.weight" else _outliers(rows, rng)
    return falling[order].astype(np.float32), outliers


def _outliers(rows: int, rng: np.random.Generator) -> list[int]:
    """Output channels far larger than the others; every trained model has some."""
    return sorted({int(x * rows) for x in rng.random(max(1, rows // _OUTLIER_EVERY))})


def _write_tokenizer(folder: Path, positions: int) -> None:
    """A byte-level tokenizer: the id of each byte is its value; every UTF-8 text survives a round trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise RuntimeError(f"{END_OF_TEXT} has id {tokenizer.token_to_id(END_OF_TEXT)}, not {END_OF_TEXT_ID}")
    text = json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False)
    write_atomic(folder / "tokenizer.json", lambda fd: write_all(fd, text.encode() + b"\n"))
    settings = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's byte-level vocabulary, by byte value."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
