"""Logprobs of sampled tokens as trainers and rollout engines take them, written apart from what judges them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from forward_models import MODELS, Model, random_weights

from stages.commands.backends import load_backend
from stages.files.source import open_model
from stages.files.tensorfile import write_tensors
from stages.run.forward import Forwarder
from stages.spec.config import EMBEDDING, LM_HEAD

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
VOCAB = 300


def write_sharp(
    folder: Path, family: str, dtype: str, *, sharp: float = 1.0, seed: int = 0, moved: float = 0.0
) -> Path:
    """A random checkpoint whose LM head is multiplied by `sharp`, and all of it by 1 + `moved` * normal numbers."""
    model: Model = replace(MODELS[family], vocab=VOCAB)
    weights = random_weights(model.config(dtype), seed)
    rng = np.random.default_rng(seed + 1)
    factor = {LM_HEAD if LM_HEAD in weights else EMBEDDING: sharp}
    for name, array in weights.items():
        wide = array.astype(np.float64) * factor.get(name, 1.0) * (1 + moved * rng.standard_normal(array.shape))
        weights[name] = wide.astype(np.float32).astype(array.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.raw(dtype)))
    write_tensors(folder / "model.safetensors", weights, metadata={"format": "pt"})
    return folder


@cache
def engine(folder: Path, dtype: str, attention: str = "eager") -> Any:
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention).eval()


@dataclass(frozen=True)
class Sampled:
    """One sequence: the tokens from `start` on were sampled."""

    tokens: list[int]
    start: int

    def row(self, logprobs: Iterable[float], **declared: Any) -> dict[str, Any]:
        prompt, completion = self.tokens[: self.start], self.tokens[self.start :]
        return {"prompt": prompt, "completion": completion, "logprobs": list(logprobs), **declared}


@cache
@torch.no_grad()
def sampled(model: Any, count: int, new: int = 16, **how: Any) -> tuple[Sampled, ...]:
    """Sequences of unlike lengths, sampled from the model's processed logits."""
    found = []
    for seed in range(count):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        tokens = rng.integers(0, VOCAB, 4 + 3 * seed).tolist()
        start = len(tokens)
        for _ in range(new):
            row = processed(model(torch.tensor([tokens])).logits[0, -1:].float(), **how)
            tokens.append(int(torch.multinomial(torch.softmax(row, -1)[0], 1, generator=generator)))
        found.append(Sampled(tokens, start))
    return tuple(found)


def processed(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Logits as samplers process them: temperature, top-k, top-p."""
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, index, out), -torch.inf)
    return logits


def taken(logits: torch.Tensor, one: Sampled, *, row: int = 0, token: int = 0, **how: Any) -> list[float]:
    """Each sampled token's logprob; `row` and `token`: of another row of logits, or another token, by so many."""
    places = torch.arange(one.start, len(one.tokens))
    rows = (places - 1 + row).clamp(0, len(one.tokens) - 1)
    tokens = torch.tensor(one.tokens)[(places + token).clamp(0, len(one.tokens) - 1)]
    logprobs = torch.log_softmax(processed(logits[rows], **how), -1)
    found: list[float] = logprobs.gather(-1, tokens[:, None])[:, 0].float().tolist()
    return found


@torch.no_grad()
def prefill(model: Any, one: Sampled) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([one.tokens])).logits[0]
    return found


@torch.no_grad()
def decode(model: Any, one: Sampled) -> torch.Tensor:
    """Token by token from a cache."""
    done = model(torch.tensor([one.tokens[: one.start]]), use_cache=True)
    rows = [done.logits[0]]
    for token in one.tokens[one.start :]:
        done = model(torch.tensor([[token]]), past_key_values=done.past_key_values, use_cache=True)
        rows.append(done.logits[0])
    return torch.cat(rows)


@torch.no_grad()
def batch(model: Any, sequences: Sequence[Sampled]) -> list[torch.Tensor]:
    """All at once, padded on the left."""
    width = max(len(one.tokens) for one in sequences)
    padded = torch.tensor([[0] * (width - len(one.tokens)) + one.tokens for one in sequences])
    mask = torch.tensor([[0] * (width - len(one.tokens)) + [1] * len(one.tokens) for one in sequences])
    logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0)).logits
    return [row[width - len(one.tokens) :] for row, one in zip(logits, sequences, strict=True)]


def by_jax(folder: Path, dtype: str, one: Sampled) -> torch.Tensor:
    """The forward of svf_jax."""
    with open_model(folder) as checkpoint:
        forwarder = Forwarder(_jax(), checkpoint.config, checkpoint, dtype=dtype)
        (result,) = forwarder.run(one.tokens, stages=["lm_head"])
    return torch.tensor(result.array.astype(np.float32)).to(getattr(torch, dtype))


@cache
def _jax() -> Any:
    return load_backend("jax", "cpu")


# In which ways right systems compute logprobs.
WAYS = (
    *("eager", "sdpa", "decode", "log_softmax in the run's dtype", "less logsumexp"),
    *("jax", "batch", "declared"),
)


def clean(folder: Path, dtype: str, sequences: Sequence[Sampled], way: str) -> list[dict[str, Any]]:
    """The rows of a right system, by the way in which it computed them."""
    eager, sdpa = engine(folder, dtype), engine(folder, dtype, "sdpa")
    if way == "jax":  # one alone: each length is compiled anew
        return [one.row(taken(by_jax(folder, dtype, one).float(), one)) for one in sequences[:1]]
    if way == "batch":
        logits = batch(sdpa, sequences)
        return [one.row(taken(of.float(), one)) for one, of in zip(sequences, logits, strict=True)]
    if way == "declared":
        declared = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
        drawn = sampled(eager, 2, **declared)
        return [one.row(taken(prefill(eager, one).float(), one, **declared), **declared) for one in drawn]
    ways: dict[str, Callable[[Sampled], list[float]]] = {
        "eager": lambda one: taken(prefill(eager, one).float(), one),
        "sdpa": lambda one: taken(prefill(sdpa, one).float(), one),
        "decode": lambda one: taken(decode(sdpa, one).float(), one),
        "log_softmax in the run's dtype": lambda one: taken(prefill(sdpa, one), one),
        "less logsumexp": lambda one: _less_logsumexp(prefill(eager, one).float(), one),
    }
    return [one.row(ways[way](one)) for one in sequences]


def _less_logsumexp(logits: torch.Tensor, one: Sampled) -> list[float]:
    rows = logits[one.start - 1 : -1]
    picked = rows.gather(-1, torch.tensor(one.tokens[one.start :])[:, None])[:, 0]
    found: list[float] = (picked - torch.logsumexp(rows, -1)).tolist()
    return found


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_examples(folder: Path) -> None:
    """A trainer's file in float32, and one of a rollout in bfloat16 at temperature 0.7, of the model in `folder`."""
    trainer, rollout = (engine(folder / "MODEL", dtype) for dtype in ("float32", "bfloat16"))
    sequences = sampled(rollout, 4, 32, temperature=0.7)
    write(folder / "trainer.jsonl", [one.row(taken(prefill(trainer, one), one)) for one in sequences])
    cold = [one.row(taken(prefill(rollout, one).float(), one, temperature=0.7)) for one in sequences]
    write(folder / "rollout.jsonl", cold)
