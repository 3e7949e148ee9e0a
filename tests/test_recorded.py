"""What a recorded forward may hold: dtypes, forms, given inputs, steps not recorded, and several faults at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, tokens_of, write_model
from helpers import Result, svf

TOKENS = tokens_of(9)
IDS = ",".join(map(str, TOKENS))
DTYPES = ("float32", "bfloat16", "float16")
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models and our right dumps of them: `<model>-<dtype>` and `<model>-<dtype>-dump`."""
    folder = tmp_path_factory.mktemp("recorded")
    for name in ("qwen3", "qwen2"):
        for dtype in DTYPES:
            model = write_model(folder / f"{name}-{dtype}", MODELS[name], dtype)
            command = ["forward", model, "--tokens", IDS, "--no-production", "--backend", "torch"]
            done = svf(*command, "--out", folder / f"{name}-{dtype}-dump")
            assert done.code == 0, done.err
    return folder


def changed(made: Path, out: Path, change: Callable[[Tensors], object], dtype: str = "float32") -> Path:
    """A copy of a right dump after `change(tensors)`."""
    return change_dump(Path(shutil.copytree(made / f"qwen3-{dtype}-dump", out)), change)


def rows(done: Result) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in done.json["rows"]}


# All faults, not the first.


def two_faults(t: Tensors) -> None:
    """A factor in a product of layer 0, and RoPE's result reversed in layer 1, which attn_scores do not see."""
    t["layers.0.ffn_gate"] = (t["layers.0.ffn_gate"].astype(np.float32) * 1.25).astype(t["layers.0.ffn_gate"].dtype)
    for name in ("q_post_rope", "k_post_rope"):
        t[f"layers.1.{name}"] = np.ascontiguousarray(t[f"layers.1.{name}"][..., ::-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fault_is_told(made: Path, tmp_path: Path, dtype: str) -> None:
    right, wrong = made / f"qwen3-{dtype}-dump", changed(made, tmp_path / "wrong", two_faults, dtype)
    first = [("bug", 0, "ffn_gate")]
    # What was made from the gate before it was changed is wrong from its recorded input too.
    rest = [("bug", 0, "ffn_silu"), ("bug", 1, "q_post_rope"), ("bug", 1, "k_post_rope")]
    for done in (svf("audit", wrong, "--json"), svf("diff", right, wrong, "--no-rerun", "--json")):
        assert done.code == 1
        found = [(c["verdict"], c["layer"], c["stage"]) for c in done.json["culprits"]]
        assert found == first + rest
        assert done.json["culprit"] == done.json["culprits"][0]
        assert all(c["hint"] for c in done.json["culprits"][:1])
        told = "; and 3 more, from their own inputs: ffn_silu of layer 0, q_post_rope of layer 1"
        assert told in done.json["verdict"]
    for done in (svf("audit", right, "--json"), svf("diff", right, right, "--json")):
        assert (done.code, done.json["culprit"], done.json["culprits"]) == (0, None, [])
        assert "more" not in done.json["verdict"]


# What the causal mask throws away.

BLANKS = (0.0, 1e30, np.nan, np.inf)


def blanked(value: float) -> Callable[[Tensors], object]:
    """Scores of keys after their query replaced, in every layer."""

    def change(t: Tensors) -> None:
        for key in [key for key in t if key.endswith("attn_scores")]:
            after = ~np.tri(len(TOKENS), dtype=bool)
            t[key] = np.where(after, np.asarray(value).astype(t[key].dtype), t[key])

    return change


def one_key_seen(t: Tensors) -> None:
    """A score that the mask keeps: the first key's, of the last query."""
    t["layers.1.attn_scores"][2, -1, 0] *= 2


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_keys_to_come_are_not_judged(made: Path, tmp_path: Path, dtype: str) -> None:
    right = made / f"qwen3-{dtype}-dump"
    for number, value in enumerate(BLANKS):
        other = changed(made, tmp_path / str(number), blanked(value), dtype)
        done = svf("audit", other, "--json")
        assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
        done = svf("diff", right, other, "--no-rerun", "--json")
        assert done.code == 0, done.json["verdict"]
        row = rows(done)["layers.1.attn_scores"]
        assert (row["byte_match"], row["max_abs"], row["mismatched"]) == (False, 0, 0)
        assert row["sha256_a"] != row["sha256_b"]
        assert "the causal mask throws them away" in row["note"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_the_mask_keeps_are_judged(made: Path, tmp_path: Path, dtype: str) -> None:
    def both(t: Tensors) -> None:
        blanked(0.0)(t)
        one_key_seen(t)

    wrong = changed(made, tmp_path / "wrong", both, dtype)
    for done in (svf("audit", wrong, "--json"), svf("diff", made / f"qwen3-{dtype}-dump", wrong, "--json")):
        assert (done.code, done.json["culprit"]["layer"], done.json["culprit"]["stage"]) == (1, 1, "attn_scores")
        assert "one element alone is wrong, at [2, 8, 0]" in done.json["culprit"]["hint"]


def test_a_hint_at_scores_needs_only_those_that_the_mask_keeps(made: Path, tmp_path: Path) -> None:
    def unscaled(t: Tensors) -> None:
        t["layers.0.attn_scores"] = t["layers.0.attn_scores"] * np.float32(32**0.5)
        blanked(np.nan)(t)

    done = svf("audit", changed(made, tmp_path / "wrong", unscaled), "--json")
    assert done.json["culprit"]["hint"] == "the scale 1/sqrt(head_dim) is missing"
