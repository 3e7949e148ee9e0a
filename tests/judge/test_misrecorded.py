"""Mistakes of recording: named as that, with what is there instead; a model's own mistakes are never called so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forward_models import Model, change_dump, dumped, random_weights, tokens_of, write_model
from helpers import svf as command
from plain_forward import MISTAKES, Plain

import svf
from stages.files.tensorfile import write_tensors

pytestmark = pytest.mark.slow

MODEL = Model(layers=3, heads=4, kv_heads=2, head_dim=16, hidden=64)
TOKENS = ",".join(map(str, tokens_of(14)))
OTHERS = ",".join(map(str, tokens_of(15)[:14]))
Stages = dict[str, np.ndarray]
Mistake = Callable[[Stages, Stages], object]
# A layer in the middle.
L = "layers.1."


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right run, `0`, and another row of its batch, `1`."""
    folder = tmp_path_factory.mktemp("misrecorded")
    write_model(folder / "model", MODEL, "float32")
    done = command(
        "capture", folder / "model", "--tokens", TOKENS, "--beside", OTHERS, "--out", folder / "out", "--deep"
    )
    assert done.code == 0, done.err
    return folder / "out"


def put(place: str, source: str) -> Mistake:
    return lambda stages, _: stages.update({place: stages[source].reshape(stages[place].shape).copy()})


def swap(one: str, other: str) -> Mistake:
    return lambda stages, _: stages.update({one: stages[other], other: stages[one]})


def rows(place: str, order: Callable[[int], list[int]]) -> Mistake:
    return lambda stages, _: stages.update({place: stages[place][order(len(stages[place]))].copy()})


def _shifted(stages: Stages, _other: Stages) -> None:
    """Hidden states, the first of which is the embedding, under the names of the layers."""
    for n in (2, 1):
        stages[f"layers.{n}.post_ffn_residual"] = stages[f"layers.{n - 1}.post_ffn_residual"]
    stages["layers.0.post_ffn_residual"] = stages["embedding"]


def _tokens_before_batch(stages: Stages, other: Stages) -> None:
    place = L + "ffn_norm"
    both = np.stack((stages[place], other[place]), axis=1).reshape(-1, stages[place].shape[1])
    stages[place] = both[: len(stages[place])].copy()


def _before_its_norm(stages: Stages, _other: Stages) -> None:
    stages[L + "q_norm"] = stages[L + "qkv_matmul"][:, :64].reshape(stages[L + "q_norm"].shape).copy()


def _of_another_shape(stages: Stages, _other: Stages) -> None:
    stages[L + "ffn_norm"] = stages[L + "ffn_gate"]


def _keys_first(stages: Stages, _other: Stages) -> None:
    q, k, v = np.split(stages[L + "qkv_matmul"], [64, 96], axis=1)
    stages[L + "qkv_matmul"] = np.concatenate((k, q, v), axis=1)


# What was planted -> how, where it is named, and what is said.
PLANTED: dict[str, tuple[Mistake, str, str]] = {
    "a hidden state that is already normed": (
        put("layers.2.post_ffn_residual", "final_norm"), "layers.2.post_ffn_residual", "what final_norm should be"),
    "the last token's for all": (rows(L + "attn_norm", lambda n: [n - 1] * n), L + "attn_norm", "row of the last"),
    "overwritten by the residual's +=": (
        put(L + "attn_out", L + "post_attn_residual"), L + "attn_out", f"what {L}post_attn_residual should be"),
    "a buffer that the next layer wrote over": (
        put("layers.0.ffn_norm", L + "ffn_norm"), "layers.0.ffn_norm", f"what {L}ffn_norm should be"),
    "a tuple's wrong member": (swap("rope_cos", "rope_sin"), "rope_cos", "what rope_sin should be"),
    "a transposed batch": (_tokens_before_batch, L + "ffn_norm", "7 rows are of no token"),
    "the residual, not the sublayer": (
        put(L + "ffn_out", L + "post_ffn_residual"), L + "ffn_out", f"what {L}post_ffn_residual should be"),
    "hidden states shifted by a layer": (_shifted, "layers.0.post_ffn_residual", "what embedding should be"),
    "pre-norm for post-norm": (
        put(L + "attn_norm", "layers.0.post_ffn_residual"), L + "attn_norm", "layers.0.post_ffn_residual"),
    "queries before their norm": (_before_its_norm, L + "q_norm", f"the q of {L}qkv_matmul"),
    "gate and up exchanged": (swap(L + "ffn_gate", L + "ffn_up"), L + "ffn_gate", f"what {L}ffn_up should be"),
    "the fused activation's product": (
        put(L + "ffn_silu", L + "ffn_swigl"), L + "ffn_silu", f"what {L}ffn_swigl should be"),
    "activated in place": (put(L + "ffn_gate", L + "ffn_silu"), L + "ffn_gate", f"what {L}ffn_silu should be"),
    "keys before queries": (_keys_first, L + "qkv_matmul", "in the order k, q, v"),
    "attention after o_proj": (put(L + "attention", L + "attn_out"), L + "attention", f"what {L}attn_out should be"),
    "keys before RoPE": (put(L + "k_post_rope", L + "k_norm"), L + "k_post_rope", f"what {L}k_norm should be"),
    "the residual before the sum": (
        put(L + "post_attn_residual", "layers.0.post_ffn_residual"), L + "post_attn_residual",
        "what layers.0.post_ffn_residual should be"),
    "one token late": (rows(L + "ffn_out", lambda n: [0, *range(n - 1)]), L + "ffn_out", "rows are 1 too late"),
    "the last logits for all": (rows("lm_head", lambda n: [n - 1] * n), "lm_head", "row of the last"),
    "labels' logits": (rows("lm_head", lambda n: [*range(1, n), n - 1]), "lm_head", "rows are 1 too early"),
    "the input of the final norm": (
        put("final_norm", "layers.2.post_ffn_residual"), "final_norm", "what layers.2.post_ffn_residual should be"),
    "both norms exchanged": (swap(L + "attn_norm", L + "ffn_norm"), L + "attn_norm", f"what {L}ffn_norm should be"),
    "the branch, not the product": (put(L + "ffn_swigl", L + "ffn_up"), L + "ffn_swigl", f"what {L}ffn_up should be"),
    "a member of another shape": (_of_another_shape, L + "ffn_norm", f"what {L}ffn_gate should be"),
    "a layer's output as the embedding": (
        put("embedding", "layers.0.post_ffn_residual"), "embedding", "what layers.0.post_ffn_residual should be"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_of_recording_is_named_and_nothing_else_is(mistake: str, captured: Path, tmp_path: Path) -> None:
    plant, place, said = PLANTED[mistake]
    folder = Path(shutil.copytree(captured / "0", tmp_path / "dump"))
    other = dumped(captured / "1")
    change_dump(folder, lambda stages: plant(stages, other))
    found = svf.audit(folder)
    wrong = {row["key"]: row for row in found.rows if row["verdict"] not in ("exact", "rounding")}
    assert {row["verdict"] for row in wrong.values()} == {"misrecorded"}
    assert said in wrong[place]["hint"]
    assert wrong[place]["hint"].endswith("the model went on with the right value")
    assert found.outcome == "faulty"
    assert found.verdict.startswith("Misrecorded at ")


def test_the_same_is_said_of_another_programs_file(captured: Path, tmp_path: Path) -> None:
    stages = dumped(captured / "0")
    PLANTED["activated in place"][0](stages, {})
    write_tensors(tmp_path / "port.safetensors", stages)
    tokens = [int(token) for token in TOKENS.split(",")]
    found = svf.audit(tmp_path / "port.safetensors", model=captured.parent / "model", tokens=tokens)
    assert found.culprit is not None
    assert (found.culprit["stage"], found.culprit["verdict"]) == ("ffn_gate", "misrecorded")


def test_a_comparison_blames_the_recording_too(captured: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(captured / "0", tmp_path / "dump"))
    change_dump(folder, lambda stages: PLANTED["overwritten by the residual's +="][0](stages, {}))
    found = svf.diff(captured / "0", folder)
    assert found.culprit is not None
    assert (found.culprit["stage"], found.culprit["side"]) == ("attn_out", "b")
    assert "the model went on with the right value" in found.culprit["hint"]
    assert [row["key"] for row in found.rows if row["verdict"] not in ("exact", "rounding")] == [L + "attn_out"]


def test_a_right_recording_has_none(captured: Path) -> None:
    assert svf.audit(captured / "0").outcome == "sound"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_models_own_mistake_is_none(mistake: str, tmp_path: Path) -> None:
    """What goes on with a wrong value: each is planted in the program itself."""
    write_model(tmp_path / "model", MODEL, "float32")
    forward = Plain(MODEL.raw("float32"), random_weights(MODEL.config("float32"), 0), "float32")
    MISTAKES[mistake](forward)
    tokens = [int(token) for token in TOKENS.split(",")]
    with np.errstate(all="ignore"):
        write_tensors(tmp_path / "port.safetensors", forward.run(tokens))
    rows = svf.audit(tmp_path / "port.safetensors", model=tmp_path / "model", tokens=tokens).rows
    assert [row["key"] for row in rows if row["verdict"] == "misrecorded"] == []
