"""The final norm that logits hold: judged in the place of logits, so that a mistake of the head is told from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import svf
from planted import Change, Changed, Weights

from stages.files.tensorfile import write_tensors
from stages.selftest.engines import ENGINES
from stages.selftest.specimens import Specimen


def audited(folder: Path, dtype: str, change: Change | None = None, **options: Any) -> dict[str, Any]:
    """What an audit says of the logits of a run whose weights were changed, of the model as it is."""
    made = Specimen(
        "qwen3", dtype, heads=4, kv_heads=2, head_dim=16, hidden=64, intermediate=128, layers=2, tied=False, tokens=12
    )
    made.write(folder / "model")
    run = ENGINES["blocked"].run(made if change is None else Changed(made, change))
    write_tensors(folder / "run.safetensors", {"lm_head": run["lm_head"]})
    tokens = ",".join(map(str, made.token_ids()))
    asked = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = svf("audit", folder / "run.safetensors", "--model", folder / "model", "--tokens", tokens, "--json", *asked)
    assert done.code in (0, 1), done.error
    return done.json


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_logits_are_the_heads_of_a_right_final_norm(tmp_path: Path, dtype: str) -> None:
    norm, head = audited(tmp_path, dtype)["rows"]
    assert (norm["stage"], norm["recovered"], norm["verdict"]) == ("final_norm", True, "rounding")
    assert "least squares on the head, whose condition is" in norm["note"]
    assert head["verdict"] == "rounding"
    assert head["floor"] < norm["floor"]


def test_a_wrong_layer_is_told_of_the_final_norm_and_not_of_the_head(tmp_path: Path) -> None:
    def plant(weights: Weights) -> None:
        weights["model.layers.0.mlp.down_proj.weight"][5, 7] *= -4

    norm, head = audited(tmp_path, "float32", plant, stages="final_norm,lm_head")["rows"]
    assert (norm["verdict"], head["verdict"]) == ("bug", "rounding")


def test_an_element_of_the_head_is_seen_whatever_the_layers_round(tmp_path: Path) -> None:
    """Through the layers, in bfloat16, it is less than right programs differ by."""

    def plant(weights: Weights) -> None:
        weights["lm_head.weight"][17, 9] += 0.0625

    found = audited(tmp_path, "bfloat16", plant)
    assert found["outcome"] == "faulty"
    assert found["culprit"]["stage"] == "lm_head"
    assert "column 17" in found["culprit"]["hint"]
