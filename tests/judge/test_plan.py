"""`svf audit --plan`: what a recording would show, before anything is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forward_models import MODELS, write_model
from helpers import svf

import stages.judge.plan as planning
from stages.judge.audit import audit
from stages.judge.forward_pair import Named
from stages.judge.plan import plan

STAGES = ("attention", "post_ffn_residual", "lm_head")
TOKENS = ",".join(str((3 + 37 * i) % 61) for i in range(16))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers."""
    return write_model(tmp_path_factory.mktemp("plan") / "model", MODELS["qwen3"], request.param)


def planned(model: Path, stages: str | None, layers: str | None = None) -> dict[str, Any]:
    return plan(Named(str(model), TOKENS), stages, layers, progress=lambda _label, _done: None)


def rows(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in document["rows"]}


def test_a_plan_promises_what_an_audit_then_sees(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "dump"
    command = ["forward", model, "--tokens", TOKENS, "--backend", "reference", "--no-production"]
    assert svf(*command, "--stages", ",".join(STAGES), "--out", out).code == 0
    told, seen = rows(planned(model, ",".join(STAGES))), rows(audit(out))
    assert told.keys() == seen.keys()
    for key, row in seen.items():
        assert row["verdict"] in ("exact", "rounding")
        assert told[key]["floor"] == row["floor"], key
        assert set(told[key]["through"]) <= set(row["through"])
    assert told["layers.1.attention"]["from"] == ["layers.0.post_ffn_residual"]
    assert told["layers.1.attention"]["through"][0] == "layers.1.attn_norm"
    assert told["layers.0.attention"]["from"] == ["tokens"]


def test_the_stage_that_is_named_does_what_is_said(model: Path) -> None:
    before = planned(model, "hidden")
    assert before["profile"]["name"] == "hidden"
    assert before["stages"] == ["embedding", "post_ffn_residual", "final_norm"]
    record = before["record"]
    after = rows(planned(model, ",".join((*before["stages"], record["stage"]))))
    (gained,) = record["rows"]
    assert after[gained["key"]]["floor"] == gained["floor"] < 0.8 * rows(before)[gained["key"]]["floor"]
    assert rows(before)[gained["key"]]["shorten"] == gained
    assert f"Record {record['stage']} too" in before["verdict"]
    # What is recorded beside it is judged as well, and no more bluntly.
    own = f"{gained['key'].rpartition('.')[0]}.{record['stage']}"
    assert after[own]["floor"] == gained["own"]


def test_stages_whose_inputs_are_recorded_need_no_more(model: Path) -> None:
    document = planned(model, "all")
    assert document["record"] is None
    assert {row["verdict"] for row in document["rows"]} == {"seen"}
    assert all(row["through"] == [] and row["shorten"] is None for row in document["rows"])


def test_what_is_too_long_is_said_with_what_shortens_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    floor = rows(planned(model, "logits"))["lm_head"]["floor"]
    monkeypatch.setattr(planning, "LEAST_SEEN", floor / 2)
    document = planned(model, "logits")
    (row,) = document["rows"]
    assert row["verdict"] == "too long"
    assert row["shorten"]["stage"] in {key.rpartition(".")[2] for key in row["through"]}
    assert "0 of 1 recorded tensors would be judged; of 1 nothing could be told, first lm_head" in document["verdict"]


def test_fewer_layers_say_nothing_of_what_comes_after_all(model: Path) -> None:
    document = planned(model, "post_ffn_residual,final_norm", "0")
    assert document["layers"] == {"computed": [0], "of": 2}
    assert rows(document)["final_norm"]["verdict"] == "not computed"
    assert "1 of 1 recorded tensors would be judged" in document["verdict"]
    assert "final_norm not computed (--layers all)" in document["verdict"]


def test_the_command_prints_a_table_and_refuses_what_does_not_apply(model: Path, tmp_path: Path) -> None:
    done = svf("audit", "--plan", "--model", model, "--stages", "attention,post_ffn_residual")
    assert done.code == 0
    assert "errors seen above" in done.out
    document = svf("audit", "--plan", "--model", model, "--stages", "engine", "--dtype", "bfloat16", "--json").json
    assert (document["schema"], document["dtype"], len(document["tokens"])) == ("svf.plan/1", "bfloat16", 16)
    for words, said in (
        (("--plan",), "--plan needs --model"),
        (("--plan", "--model", model, "--stages", "nothing"), "no stage 'nothing'"),
        (("--plan", "--model", model, tmp_path), "DUMP does not apply to --plan"),
        ((), "svf audit DUMP"),
        ((tmp_path, "--dtype", "float32"), "--dtype applies to --plan"),
    ):
        refused = svf("audit", *words)
        assert (refused.code, said in refused.error) == (2, True), refused.error
