"""A Llama and a Mistral that `transformers` made: forward, audit and diff are sound, and a mistake is named."""

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
from plain_forward import MISTAKES, Mistake, Plain, step, window
from transformers import AutoConfig, AutoModelForCausalLM

from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit
from svf_torch.backend import TorchBackend

TOKENS = tokens_of(24)
BACKEND = TorchBackend()
WORDS = ",".join(map(str, TOKENS))


# A Llama with biases, GQA and Llama 3's RoPE; a Mistral whose window is shorter than the prompt.
MADE = {"llama": dataclasses.replace(MODELS["llama-bias"], rope=LLAMA3), "mistral": MODELS["mistral"]}


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in MADE for dtype in ("float32", "bfloat16")], ids="-".join
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model saved by transformers, and its forward on both sides."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MADE[name].raw(dtype))
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
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


def _in_layer(layer: int, mistake: Mistake) -> Mistake:
    """A mistake of one layer."""

    def change(plain: Plain) -> None:
        right = dict(plain.steps)
        mistake(plain)
        for name, wrong in plain.steps.items():
            plain.steps[name] = _either(plain, layer, wrong, right[name])

    return change


def _either(plain: Plain, layer: int, wrong: Any, right: Any) -> Any:
    return lambda *args, **kwargs: (wrong if plain.layer == layer else right)(*args, **kwargs)


# A mistake -> the stage that is wrong first, and words of the cause.
NAMED: dict[str, tuple[Mistake | None, str, str]] = {
    "right": (None, "", ""),
    "theta": (_theta, "inv_freq", "rope_theta"),
    "eps": (_eps, "attn_norm", "as if eps were 1e-05, not 1e-06"),
    "scale": (MISTAKES["no scale"], "attn_scores", "the scale 1/sqrt(head_dim) is missing"),
    "tiled heads": (MISTAKES["tiled heads"], "attn_scores", "key heads are dealt out in turn"),
    "half the silu": (step("silu", lambda p, right, gate, up: right(gate, up) / 2), "ffn_silu", ""),
}


# The same of windows, in a Mistral of 5 keys and a Qwen2 whose second layer sees 6.
WINDOWED: dict[str, tuple[Mistake | None, str, str]] = {
    "right": (None, "", ""),
    "no window": (window(lambda _: None), "attn_softmax", "the sliding window is missing"),
    "one too narrow": (window(lambda p: p.window and p.window - 1), "attn_softmax", "one key too narrow"),
    "one too wide": (window(lambda p: p.window and p.window + 1), "attn_softmax", "one key too wide"),
    "half": (window(lambda p: p.window and 3), "attn_softmax", "the last 3 keys alone"),
    "no window in one layer": (_in_layer(1, window(lambda _: None)), "attn_softmax", "the sliding window is missing"),
    "no mask": (MISTAKES["no mask"], "attn_softmax", "the causal mask is missing"),
}
CASES = [
    *(("llama-gqa4", name, NAMED[name]) for name in NAMED),
    *((model, name, WINDOWED[name]) for model in ("mistral", "qwen2-window") for name in WINDOWED),
]


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def test_a_mistake_in_another_program_is_named(
    case: tuple[str, str, tuple[Mistake | None, str, str]], dtype: str, tmp_path: Path
) -> None:
    name, _, (mistake, stage, words) = case
    model = MODELS[name]
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


# What the engine's window is of a config's 9 -> words.
OTHER_WINDOWS = {9: "", 0: "the sliding window is missing", 8: "one key too narrow", 10: "one key too wide"}


@pytest.mark.cover(2)
@pytest.mark.parametrize("recorded", ["layers' outputs", "logits"])
@pytest.mark.parametrize("window", OTHER_WINDOWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mistral", "qwen2-window"])
def test_another_window_shows_in_little(name: str, dtype: str, window: int, recorded: str, tmp_path: Path) -> None:
    """transformers' own forward, of which next to nothing was recorded."""
    model = dataclasses.replace(MODELS[name], layers=4, hidden=128, window=9)
    other = dataclasses.replace(model, window=window or None)
    torch.manual_seed(1)
    engine = AutoModelForCausalLM.from_config(AutoConfig.for_model(**other.raw(dtype)), dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in engine.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        out = engine(torch.tensor([tokens_of(40)]), output_hidden_states=True, use_cache=False)
    engine.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.raw(dtype)))
    states = {f"layers.{n}.post_ffn_residual": x[0] for n, x in enumerate(out.hidden_states[1:-1])}
    kept = {"lm_head": out.logits[0]} if recorded == "logits" else {"embedding": out.hidden_states[0][0], **states}
    write_tensors(tmp_path / "recorded.safetensors", {key: BACKEND.get(x) for key, x in kept.items()})
    found = audit(tmp_path / "recorded.safetensors", model=str(tmp_path), tokens=",".join(map(str, tokens_of(40))))
    words = OTHER_WINDOWS[window]
    assert found["outcome"] == ("faulty" if words else "sound")
    assert words in ((found["culprit"] or {}).get("hint") or "")
