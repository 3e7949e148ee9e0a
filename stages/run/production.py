"""The production models of the backends: what they share, and how their logits are judged against the traced path's.

docs/findings/production.md has the measurements behind `ALL_LIMIT` and `ROW_LIMIT`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stages.errors import InputError, shown
from stages.oracle.bounds import rounding_unit
from stages.oracle.verdict import Verdict
from stages.spec.backend import Weights, stored_as
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.families import parameter_shapes

# Largest RMS difference in units of the noise that is still rounding: over all rows, and in the worst row. Seen on
# right models: 1.5 and 4.4; on the mildest planted fault: 2,600 (float32).
ALL_LIMIT = 8.0
ROW_LIMIT = 24.0
# Rows of the embedding that are compared with the LM head's at a time: 8 to 64 MB in a real model.
_HEAD_ROWS = 4096
# An expert's matrix by its published name.
_EXPERT = re.compile(r"(?P<before>.*\.experts)\.\d+\.(?P<after>\w+\.weight)", re.ASCII)
# Padded lengths of a generation: a power of two, this at least.
_SHORTEST_BUCKET = 16


def with_stored_head(config: ModelConfig, weights: Weights) -> ModelConfig:
    """`config`, untied when the weights have an LM head of their own after all.

    Weights adapted tensor by tensor do; copied into a tied model, one of the two would silently win.
    """
    if not config.tie_word_embeddings or stored_as(weights, LM_HEAD) == EMBEDDING:
        return config
    for start in range(0, config.vocab_size, _HEAD_ROWS):
        stop = min(start + _HEAD_ROWS, config.vocab_size)
        head, embedding = (weights.read(name, start, stop) for name in (LM_HEAD, EMBEDDING))
        if head.dtype != embedding.dtype or not np.array_equal(_bits(head), _bits(embedding)):
            return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def parameters_of(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter's name and value, read one at a time; the LM head last, and only when it is not tied.

    `InputError` for one that is missing or of another shape, and, where `weights` lists its `tensors`, for one that
    the config has no place for.
    """
    wanted = parameter_shapes(config)
    tensors = getattr(weights, "tensors", None)
    for name in tensors if tensors is not None else ():
        if name not in wanted:
            raise InputError(
                f"unexpected tensor '{shown(name)}': {config.family} with this config has no such parameter"
            )
    for name, shape in wanted.items():
        if name == LM_HEAD and config.tie_word_embeddings:
            continue
        try:
            array = weights.read(name)
        except KeyError:
            raise InputError(f"missing tensor '{name}': {config.family} with this config needs it") from None
        if array.shape != shape:
            raise InputError(f"'{name}' is {list(array.shape)}, the config asks for {list(shape)}")
        yield name, array


def stacked_experts(parameters: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters, those of a layer's experts as one, `mlp.experts.gate_proj.weight`, `[experts, out, in]`."""
    held: dict[str, list[np.ndarray]] = {}
    for name, array in parameters:
        match = _EXPERT.fullmatch(name)
        if match is None:
            yield from _stacks(held)
            yield name, array
        else:
            held.setdefault(f"{match['before']}.{match['after']}", []).append(array)
    yield from _stacks(held)


def _stacks(held: dict[str, list[np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """What is held, which is all of a layer's, and no longer."""
    for name in list(held):
        yield name, np.stack(held.pop(name))


def stacked_names(names: Iterable[str]) -> list[str]:
    """Names of parameters as `stacked_experts` has them."""
    return list(dict.fromkeys(_EXPERT.sub(r"\g<before>.\g<after>", name) for name in names))


def check_names(config: ModelConfig, names: Sequence[str]) -> None:
    """`InputError` unless a model's own parameter names are the checkpoint's, those of experts stacked: none keeps an
    initial value.
    """
    tied = {LM_HEAD} if config.tie_word_embeddings else set()
    wanted = set(stacked_names(parameter_shapes(config))) - tied
    odd = sorted(wanted ^ set(names))
    if odd:
        near = difflib.get_close_matches(odd[0], [*names, *wanted], n=2)
        raise InputError(f"the production model and the config disagree on '{odd[0]}' (similar: {', '.join(near)})")


def checked_tokens(config: ModelConfig, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids as int32; `InputError` for none, too many, or one outside the vocabulary."""
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise InputError(f"expected one sequence of token ids, got an array of shape {list(ids.shape)}")
    config.check_length(len(ids))
    outside = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
    if outside.size:
        place = int(outside[0])
        raise InputError(f"token {place} is {ids[place]}; the model has ids 0 to {config.vocab_size - 1}")
    return ids.astype(np.int32)


def bucket(tokens: int) -> int:
    """The length that `tokens` are padded to: a power of two, so that a generation compiles few times."""
    return max(_SHORTEST_BUCKET, 1 << (tokens - 1).bit_length())


def greedy(logits: np.ndarray) -> int:
    """The token with the largest logit of the last row; the first of several."""
    return int(np.argmax(logits[-1].astype(np.float32)))


def compare_production(
    traced: np.ndarray,
    production: np.ndarray,
    *,
    layers: int,
    reordered: Callable[[], np.ndarray] | None = None,
    wider: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Whether the traced path and the production model of one backend compute the same function, by their logits.

    Both are `[tokens, vocab]`, or `[1, vocab]` of the last token, in the activations' dtype. `layers`: of the model.
    `reordered`: production's logits in another legitimate order (`Production.reordered`), asked for unless the bits
    agree. `wider`: this comparison in float32, asked for when bfloat16 or float16 cannot decide: there a changed
    constant is no larger than rounding, and only equal bits say that nothing changed.

    `verdict`: `exact`; `rounding`, when `ratio`, the difference over what is allowed, is at most 1; `bug` beyond;
    `suspect` for a narrow dtype within it and no `wider`; `nonfinite`; `shape`. `agrees`: the last row's greedy
    tokens are the same. `tie`: they differ, and production's own preference is below the noise. `margin`: between
    production's best two tokens. `noise`: RMS, in logits, None when the bits agree.
    """
    result: dict[str, Any] = {"ran": True, "max_abs": None, "ratio": None, "noise": None}
    if traced.shape != production.shape or traced.dtype != production.dtype:
        return result | {"verdict": str(Verdict.SHAPE), "agrees": False, "tie": False}
    t, p = traced.astype(np.float64), production.astype(np.float64)
    if not (np.isfinite(t).all() and np.isfinite(p).all()):
        return result | {"verdict": str(Verdict.NONFINITE), "agrees": False, "tie": False}
    best = np.partition(p[-1], -2)[-2:] if p.shape[1] > 1 else np.array([0.0, np.inf])
    tokens = greedy(traced), greedy(production)
    result |= {
        "next_token_traced": tokens[0],
        "next_token": tokens[1],
        "agrees": tokens[0] == tokens[1],
        "tie": False,
        "margin": float(best[1] - best[0]),
        "max_abs": float(np.max(np.abs(t - p))),
    }
    if np.array_equal(_bits(traced), _bits(production)):
        return result | {"ratio": 0.0, "verdict": str(Verdict.EXACT)}
    noise = _noise(t, p, None if reordered is None else reordered().astype(np.float64), layers, traced.dtype)
    rows = np.sqrt(np.mean(np.square(t - p), axis=1))
    ratio = max(_rms(rows) / (ALL_LIMIT * noise), float(rows.max()) / (ROW_LIMIT * noise))
    tie = tokens[0] != tokens[1] and p[-1, tokens[1]] - p[-1, tokens[0]] <= 2 * ROW_LIMIT * noise
    result |= {"ratio": ratio, "noise": noise, "tie": bool(tie)}
    if ratio > 1:
        return result | {"verdict": str(Verdict.BUG)}
    if traced.dtype == np.float32:
        return result | {"verdict": str(Verdict.ROUNDING)}
    if wider is None:
        return result | {"verdict": str(Verdict.SUSPECT)}
    in_float32 = wider()
    same = Verdict(in_float32["verdict"]).passes
    return result | {"verdict": str(Verdict.ROUNDING) if same else in_float32["verdict"], "float32": dict(in_float32)}


def _noise(t: np.ndarray, p: np.ndarray, r: np.ndarray | None, layers: int, dtype: np.dtype) -> float:
    """RMS difference, in logits, that rounding alone makes between two ways of computing one model.

    At least what the 2 additions per layer to the residual stream, the final norm and the logits' own rounding make:
    `2 layers + 2` independent steps of one unit of the logits' size. More when production differs more from itself
    reordered; but if the traced path agrees better with the reordered model, production's own order is at fault, not
    the noise.
    """
    least = rounding_unit(dtype) * np.sqrt(2 * layers + 2) * max(_rms(p), 2.0**-126)
    return least if r is None else max(least, min(_rms(r - p), _rms(r - t)))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
