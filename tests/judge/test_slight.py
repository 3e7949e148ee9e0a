"""What is wrong by less than right programs differ by, and elements, rows and columns of hidden weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import svf
from planted import Change, Changed, Weights

from stages.files.tensorfile import write_tensors
from stages.judge.through import Search
from stages.judge.tried import Number
from stages.judge.wrong_weights import Share
from stages.selftest.engines import ENGINES
from stages.selftest.specimens import Specimen

pytestmark = pytest.mark.slow


def specimen(dtype: str, family: str = "qwen3") -> Specimen:
    return Specimen(
        family, dtype, heads=4, kv_heads=2, head_dim=32, hidden=128, intermediate=256, layers=3, tied=False, tokens=20
    )


def audited(made: Specimen, folder: Path, engine: str, recorded: str, change: Change | None = None) -> dict[str, Any]:
    """What an audit says of what `recorded` of a run whose weights were changed, of the model as it is."""
    made.write(folder / "model")
    wrong = made if change is None else Changed(made, change)
    run = ENGINES[engine].run(wrong)
    kept = {key: array for key, array in run.items() if key.rpartition(".")[2] in recorded.split()}
    write_tensors(folder / "run.safetensors", kept)
    tokens = ",".join(map(str, made.token_ids()))
    done = svf("audit", folder / "run.safetensors", "--model", folder / "model", "--tokens", tokens, "--json")
    assert done.code in (0, 1), done.error
    return done.json


HIDDEN, LOGITS = "embedding post_ffn_residual final_norm", "lm_head"


@pytest.mark.cover(2)
@pytest.mark.parametrize("recorded", [HIDDEN, LOGITS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_right_engine_has_a_slight_mistake(tmp_path: Path, engine: str, dtype: str, recorded: str) -> None:
    found = audited(specimen(dtype), tmp_path, engine, recorded)
    assert found["outcome"] == "sound", found["culprit"]


def test_two_tokens_that_see_the_same_keys_prove_nothing(tmp_path: Path) -> None:
    """Of this run they agree on a swap of two rows of q_proj, by 52 standard errors, at 0.55 of it."""
    made = Specimen(
        "qwen3",
        "bfloat16",
        heads=4,
        kv_heads=4,
        head_dim=64,
        hidden=32,
        intermediate=384,
        vocab=300,
        layers=2,
        tokens=13,
        seed=1340548699,
        embedding=0.05,
        manner="outliers",
    )
    found = audited(made, tmp_path, "wide probabilities", HIDDEN)
    assert found["outcome"] == "sound", found["culprit"]


def test_steps_of_silu_in_few_bits_are_precision_though_an_element_is_beyond_the_bound(tmp_path: Path) -> None:
    """What MLX compiles on a CPU: each step of silu rounded, and nothing recorded between the gate and the product."""
    made = dataclasses.replace(specimen("bfloat16"), layers=1, intermediate=1024, tokens=64)
    made.write(tmp_path / "model")
    keys = ("ffn_gate", "ffn_up", "ffn_swigl")
    run = {key: ENGINES["blocked"].run(made)[f"layers.0.{key}"] for key in keys}
    gate, up = (run[key].astype(np.float64) for key in keys[:2])
    rest = 1 / (1 + in_bfloat16(np.exp(np.abs(gate))))
    silu = in_bfloat16(gate * in_bfloat16(np.where(gate < 0, rest, 1 - rest)))
    run["ffn_swigl"] = (silu * up).astype(ml_dtypes.bfloat16)
    write_tensors(tmp_path / "run.safetensors", {f"layers.0.{key}": array for key, array in run.items()})
    named = ("--model", tmp_path / "model", "--tokens", ",".join(map(str, made.token_ids())), "--json")
    (row,) = (
        row for row in svf("audit", tmp_path / "run.safetensors", *named).json["rows"] if row["verdict"] != "rounding"
    )
    assert (row["key"], row["verdict"]) == ("layers.0.ffn_swigl", "precision")
    assert row["ratio"] > 1
    assert "exp(|x|)" in row["hint"]
    assert "MLX" in row["usual"]
    assert svf("audit", tmp_path / "run.safetensors", *named, "--accept", "usual").json["outcome"] == "sound"


def in_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def times(name: str, factor: float) -> Change:
    """A norm's weight times a factor: what it gives is so many times what it should be."""

    def change(weights: Weights) -> None:
        weights[name] = (weights[name].astype(np.float32) * factor).astype(weights[name].dtype)

    return change


def sign(name: str, row: int, column: int) -> Change:
    def change(weights: Weights) -> None:
        weights[name][row, column] *= -1

    return change


def swapped(name: str, one: int, other: int, axis: int) -> Change:
    def change(weights: Weights) -> None:
        lines = np.moveaxis(weights[name], axis, 0)
        lines[[one, other]] = lines[[other, one]]

    return change


_LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sign(f"{_LAYER}.mlp.up_proj.weight", 50, 17), ("layers.1.ffn_up", "sign of mlp.up_proj.weight[50, 17]")),
        (sign(f"{_LAYER}.mlp.down_proj.weight", 5, 7), ("layers.1.ffn_out", "sign of mlp.down_proj.weight[5, 7]")),
        (sign(f"{_LAYER}.self_attn.v_proj.weight", 9, 3), ("qkv_matmul", "sign of self_attn.v_proj.weight[9, 3]")),
        (swapped(f"{_LAYER}.mlp.gate_proj.weight", 3, 9, 0), ("layers.1.ffn_gate", "rows 3 and 9 of mlp.gate_proj")),
        (swapped(f"{_LAYER}.self_attn.o_proj.weight", 3, 9, 1), ("attn_out", "columns 3 and 9 of self_attn.o_proj")),
    ],
)
@pytest.mark.parametrize("recorded", [HIDDEN, LOGITS])
def test_what_is_wrong_with_a_hidden_weight_is_told(
    tmp_path: Path, change: Change, words: tuple[str, ...], recorded: str
) -> None:
    found = audited(specimen("float32"), tmp_path, "blocked", recorded, change)
    assert found["outcome"] == "faulty"
    assert all(word in found["culprit"]["hint"] for word in words), found["culprit"]["hint"]


@pytest.mark.parametrize("name", "qkv")
def test_a_bias_that_is_wrong_in_one_element_is_told(tmp_path: Path, name: str) -> None:
    def change(weights: Weights) -> None:
        weights[f"{_LAYER}.self_attn.{name}_proj.bias"][9] *= -1

    found = audited(specimen("float32", "qwen2"), tmp_path, "blocked", HIDDEN, change)
    assert f"sign of self_attn.{name}_proj.bias[9]" in found["culprit"]["hint"]


@pytest.mark.parametrize("engine", ["backwards", "flash", "fused"])
def test_a_factor_below_the_floor_of_the_bound_is_found_by_its_direction(tmp_path: Path, engine: str) -> None:
    """All scores of a layer 3% too large: a bfloat16 layer's output may differ by more."""
    found = audited(specimen("bfloat16"), tmp_path, engine, HIDDEN, times(f"{_LAYER}.self_attn.q_norm.weight", 1.03))
    assert (found["culprit"]["layer"], found["culprit"]["stage"]) == (1, "post_ffn_residual")
    row = next(row for row in found["rows"] if row["key"] == "layers.1.post_ffn_residual")
    assert row["verdict"] == "bug"
    assert row["rms_ratio"] < 2.5  # the statistic of the whole tensor sees nothing
    assert "layers.1.q_norm" in found["culprit"]["hint"]
    assert "times what it should be" in found["culprit"]["hint"]


def test_a_row_of_a_later_part_of_the_vocabulary_has_its_own_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are judged some rows of the head at a time; what is wrong with a row is told by its place in the whole."""
    monkeypatch.setattr("stages.run.forward.LM_HEAD_CHUNK", 128)
    monkeypatch.setattr("stages.run.forward.MIN_CHUNK", 64)
    change = sign("lm_head.weight", 203, 5)
    found = audited(specimen("float32"), tmp_path, "blocked", "embedding post_ffn_residual lm_head", change)
    assert "sign of lm_head.weight[203, 5] is flipped" in found["culprit"]["hint"], found["culprit"]["hint"]


def test_a_model_whose_blocks_add_nothing_is_audited(tmp_path: Path) -> None:
    """As some are before their training: a layer's output is its input, with no error that could be carried back."""

    def nothing(weights: Weights) -> None:
        for name, array in weights.items():
            if "o_proj" in name or "down_proj" in name:
                array[:] = 0

    idle = Changed(specimen("bfloat16"), nothing)
    specimen("bfloat16").write(tmp_path / "model")
    write_tensors(tmp_path / "model" / "model.safetensors", idle.weights(), metadata={"format": "pt"})
    run = ENGINES["blocked"].run(idle)
    kept = {key: array for key, array in run.items() if key.rpartition(".")[2] in HIDDEN.split()}
    write_tensors(tmp_path / "run.safetensors", kept)
    tokens = ",".join(map(str, idle.token_ids()))
    done = svf("audit", tmp_path / "run.safetensors", "--model", tmp_path / "model", "--tokens", tokens, "--json")
    assert done.json["outcome"] == "sound", done.error


def test_a_factor_that_is_hardly_known_has_few_values() -> None:
    """Of one that moves a tensor by next to nothing any value is as likely: the nearest ones are tried."""
    number = Number("attn_scores", "{} times", lambda _x: {}, (1.0,), 1.0)
    tried = list(Search._edited_numbers(Search.__new__(Search), number, Share(0.1, 0.02, 1e9)))
    said = {hypothesis.said for hypothesis in tried}
    assert {"1.02 times", "1.019 times", "1.03 times"} <= said
    assert len(said) < 50


@pytest.mark.parametrize("seed", [0, 1])
def test_a_right_deep_model_is_sound_from_its_logits(tmp_path: Path, seed: int) -> None:
    """Through many layers what roundings do is not of first order: no direction is asked there."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for norm in (p for p in model.parameters() if p.ndim == 1):
            norm.copy_(torch.exp(0.3 * torch.randn(norm.shape)))
        tokens = [(7 * i * i + 13 * i + 5) % 512 for i in range(24)]
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    model.save_pretrained(tmp_path / "model")
    write_tensors(tmp_path / "run.safetensors", {"lm_head": logits.float().numpy().astype(ml_dtypes.bfloat16)})
    named = ("--model", tmp_path / "model", "--tokens", ",".join(map(str, tokens)))
    found = svf("audit", tmp_path / "run.safetensors", *named, "--json").json
    assert found["outcome"] == "sound", found["culprit"]
