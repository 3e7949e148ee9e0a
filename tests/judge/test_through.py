"""A model of `transformers` of which little was recorded: right runs are sound, what is wrong is named where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forward_models import Model, write_model
from helpers import svf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from stages.judge.arithmetic import Arithmetic

IDS = list(range(3, 135, 11))
TOKENS = ",".join(map(str, IDS))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("through") / "model"
    write_model(folder, Model(heads=4, kv_heads=2, head_dim=32, hidden=64, intermediate=160, layers=3), "bfloat16")
    return folder


def run(
    source: Path,
    out: Path,
    dtype: str,
    change: Change = lambda _m: None,
    attention: str = "sdpa",
    at_once: int = len(IDS),
) -> dict:
    """Dumps of the layers' outputs, and of the logits alone; after `at_once` tokens one after another, with a cache."""
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=DTYPES[dtype], attn_implementation=attention).eval()
    change(model)
    calls: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _m, _i, o: calls.setdefault(name, []).append((o[0] if isinstance(o, tuple) else o)[0])

    model.model.embed_tokens.register_forward_hook(keep("embedding"))
    for n, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(f"layers.{n}.post_ffn_residual"))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for ids in (IDS[:at_once], *([token] for token in IDS[at_once:])):
            if ids:
                calls.setdefault("lm_head", []).append(model(torch.tensor([ids]), past_key_values=cache).logits[0])
    found = {name: torch.cat(parts).contiguous() for name, parts in calls.items()}
    logits = found.pop("lm_head")
    save_file(found, out / "hidden.safetensors")
    save_file({"lm_head": logits}, out / "logits.safetensors")
    return {"hidden": out / "hidden.safetensors", "logits": out / "logits.safetensors"}


def same(one: Path, other: Path) -> bool:
    tensors = load_file(other)
    return all(torch.equal(values, tensors[name]) for name, values in load_file(one).items())


def audit(dump: Path, source: Path, *more: str) -> dict[str, Any]:
    done = svf("audit", dump, "--model", source, "--tokens", TOKENS, "--json", *more)
    assert done.code in (0, 1), done.error
    return done.json


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_run_is_sound_whatever_was_recorded(source: Path, tmp_path: Path, dtype: str, attention: str) -> None:
    for name, dump in run(source, tmp_path, dtype, attention=attention).items():
        found = audit(dump, source)
        assert found["outcome"] == "sound", found["verdict"]
        assert found["coverage"]["judged"] == len(found["rows"])
        floors = [row["floor"] for row in found["rows"] if row.get("floor")]
        least, most = (1e-7, 1e-5) if dtype == "float32" else (1e-3, 0.1)
        assert len(floors) == {"hidden": 3, "logits": 2}[name]
        assert all(least < floor < most for floor in floors)


def scale(by: float) -> Change:
    def change(model: Any) -> None:
        model.model.layers[1].self_attn.scaling *= by

    return change


def theta(model: Any) -> None:
    model.model.rotary_emb.inv_freq = 1 / 1e4 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32)


def no_q_norm(model: Any) -> None:
    model.model.layers[1].self_attn.q_norm = torch.nn.Identity()


def gelu(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = torch.nn.GELU()


def another_layers_norm(model: Any) -> None:
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm


# What is wrong -> the layer whose output fails first, and what must be said of it.
FAULTS: dict[str, tuple[Change, int, str]] = {
    "scale": (scale(1.05), 1, "layers.1.attn_scores"),
    "theta": (theta, 0, "as if rope_theta were 10000, not 1e+06"),
    "no q_norm": (no_q_norm, 1, "as if layers.1.q_norm were left out"),
    "gelu": (gelu, 2, "in layers.2.ffn_silu, not recorded: gelu (by erf) instead of silu"),
    "another layer's norm": (another_layers_norm, 1, "the weights of layer 0 in the place of layer 1's"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named_in_a_stage_that_was_not_recorded(source: Path, tmp_path: Path, fault: str) -> None:
    change, layer, said = FAULTS[fault]
    dumps = run(source, tmp_path, "float32", change)
    hidden, logits = audit(dumps["hidden"], source), audit(dumps["logits"], source)
    assert (hidden["culprit"]["layer"], hidden["culprit"]["stage"]) == (layer, "post_ffn_residual")
    assert said in hidden["culprit"]["hint"]
    assert logits["outcome"] == "faulty"
    assert said in logits["culprit"]["hint"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_backends_own_functions_give_every_byte_from_logits_alone(
    source: Path, tmp_path: Path, attention: str
) -> None:
    found = audit(run(source, tmp_path, "bfloat16", attention=attention)["logits"], source, "--natives")
    (row,) = found["rows"]
    assert (row["verdict"], row["bits"]) == ("exact", row["elements"])
    assert {"sdpa": "attention in one call", "eager": "stage by stage"}[attention] in row["recipe"]


@pytest.mark.parametrize("at_once", [0, 5, 9])
def test_a_decode_comes_out_to_the_last_byte(source: Path, tmp_path: Path, at_once: int) -> None:
    decoded = run(source, tmp_path, "bfloat16", at_once=at_once)
    (tmp_path / "whole").mkdir()
    whole = run(source, tmp_path / "whole", "bfloat16")
    for name, dump in decoded.items():
        rows = [row for row in audit(dump, source, "--natives")["rows"] if row["through"]]
        assert {row["verdict"] for row in rows} == {"exact"}
        if not at_once and not same(dump, whole[name]):  # a CPU may sum one row as it sums many
            assert all("one token after another" in row["recipe"] for row in rows)


def test_how_many_tokens_were_at_once_is_learned_from_the_last_wrong_row() -> None:
    backend = SimpleNamespace(name="torch", facts=lambda: {"torch": "2"})
    way = Arithmetic(backend, "stage by stage", by_token=True)  # type: ignore[arg-type]
    value, observed = np.zeros((6, 4)), np.zeros((6, 4))
    assert way.least_at_once([(value, observed)]) == 0  # all rows are right
    observed[[0, 2], 1] = 1
    assert way.least_at_once([(value, value), (value, observed), (None, observed)]) == 3
    way.at_once = 3
    assert way.words.endswith("stage by stage, the first 3 tokens at once, then one token after another")


def zeroed(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight.data[40, 9] = 0


def test_an_element_of_a_decode_in_bfloat16_is_proved(source: Path, tmp_path: Path) -> None:
    found = audit(run(source, tmp_path, "bfloat16", zeroed, at_once=0)["hidden"], source, "--natives")
    assert "self_attn.q_proj.weight[40, 9] is 0" in found["culprit"]["hint"]
    assert "every byte is there" in found["culprit"]["hint"]


def test_what_rounding_hides_is_proved_by_every_byte(source: Path, tmp_path: Path) -> None:
    """A scale off by 1% in bfloat16 is less than right programs differ by; with it alone all bytes are there."""
    dump = run(source, tmp_path, "bfloat16", scale(1.01))["hidden"]
    assert audit(dump, source)["outcome"] == "sound"
    found = audit(dump, source, "--natives")
    assert (found["outcome"], found["culprit"]["layer"], found["culprit"]["verdict"]) == ("faulty", 1, "bug")
    assert "in layers.1.attn_scores, not recorded: every value is 1.01 times" in found["culprit"]["hint"]
    assert "every byte is there" in found["culprit"]["hint"]
    exact = [row["layer"] for row in found["rows"] if row["verdict"] == "exact" and row["layer"] is not None]
    assert exact == [0, 2]


def test_numbers_of_right_runs_are_within_what_they_are_judged_by(source: Path, tmp_path: Path) -> None:
    for dtype in DTYPES:
        for dump in run(source, tmp_path, dtype).values():
            rows = [row for row in audit(dump, source)["rows"] if row.get("floor")]
            # Of 16-bit logits of one vector half a step is nearly all of the bound.
            assert all(row["ratio"] <= (0.75 if row["stage"] != "lm_head" else 1) for row in rows)
            assert all(np.isfinite(row["rms_ratio"]) and row["rms_ratio"] <= 1.6 for row in rows)
