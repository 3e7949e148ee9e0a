"""A Llama that `transformers` made: forward, audit and diff are sound, and a mistake is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forward_models import LLAMA3, MODELS, random_weights, tokens_of
from helpers import svf
from plain_forward import MISTAKES, Mistake, Plain, step
from transformers import AutoConfig, AutoModelForCausalLM

from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit

TOKENS = tokens_of(24)
WORDS = ",".join(map(str, TOKENS))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM with biases, GQA and Llama 3's RoPE, saved by transformers, and its forward on both sides."""
    folder = tmp_path_factory.mktemp("llama")
    model = dataclasses.replace(MODELS["llama-bias"], rope=LLAMA3)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**model.raw(request.param))
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, request.param))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder / "model")
    for side in ("torch", "jax"):
        words = ("--tokens", WORDS, "--backend", side, "--out", folder / side, "--json")
        done = svf("forward", folder / "model", *words)
        assert done.code == 0, done.out + done.err
        (folder / f"{side}.json").write_text(done.out)
    return folder


def test_the_forward_is_production_s_on_both_sides(made: Path) -> None:
    verdicts = [json.loads((made / f"{side}.json").read_text())["production"]["verdict"] for side in ("torch", "jax")]
    assert verdicts in (["exact", "rounding"], ["exact", "exact"])


def test_its_recordings_are_sound_alone_and_together(made: Path) -> None:
    for words in (["audit", made / "torch"], ["audit", made / "jax"]):
        done = svf(*words, "--json")
        assert (done.code, done.json["outcome"]) == (0, "sound")
    done = svf("diff", made / "torch", made / "jax", "--json")
    assert (done.code, done.json["outcome"]) == (0, "agree")


def _eps(plain: Plain) -> None:
    plain.eps = 1e-5


def _theta(plain: Plain) -> None:
    plain.config = {**plain.config, "rope_parameters": {"rope_theta": 1e4}}


# A mistake -> the stage that is wrong first, and words of the cause.
NAMED: dict[str, tuple[Mistake | None, str, str]] = {
    "right": (None, "", ""),
    "theta": (_theta, "inv_freq", "rope_theta"),
    "eps": (_eps, "attn_norm", "as if eps were 1e-05, not 1e-06"),
    "scale": (MISTAKES["no scale"], "attn_scores", "the scale 1/sqrt(head_dim) is missing"),
    "tiled heads": (MISTAKES["tiled heads"], "attn_scores", "key heads are dealt out in turn"),
    "half the silu": (step("silu", lambda p, right, gate, up: right(gate, up) / 2), "ffn_silu", ""),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMED)
def test_a_mistake_in_another_program_s_llama_is_named(name: str, dtype: str, tmp_path: Path) -> None:
    mistake, stage, words = NAMED[name]
    model = MODELS["llama-gqa4"]
    raw: dict[str, Any] = model.raw(dtype)
    weights = random_weights(model.config(dtype))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_tensors(tmp_path / "model.safetensors", weights, metadata={"format": "pt"})
    plain = Plain(raw, weights, dtype)
    if mistake is not None:
        mistake(plain)
    with np.errstate(all="ignore"):
        write_tensors(tmp_path / "recorded.safetensors", plain.run(TOKENS))
    found = audit(tmp_path / "recorded.safetensors", model=str(tmp_path), tokens=WORDS)
    if mistake is None:
        assert (found["outcome"], found["culprit"]) == ("sound", None)
        return
    assert (found["outcome"], found["culprit"]["stage"]) == ("faulty", stage)
    assert words in (found["culprit"]["hint"] or "")
