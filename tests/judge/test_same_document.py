"""However fast, the document is the same: recorded by the code before it was made faster, and by any way to judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, trace, write_model

from stages.judge import both, stats
from stages.judge.audit import audit
from stages.judge.forward_diff import NOT_ASKED, diff_forward
from stages.oracle.components import ReferenceBackend
from stages.run import forward
from stages.spec.backend import Delegate

RECORDED = Path(__file__).with_name("same_document.json")
FIELDS = ("verdict_a", "verdict_b", "ratio_a", "ratio_b", "rms_ratio_a", "rms_ratio_b", "bits_b", "hint_b", "max_abs",
          "max_abs_index", "mean_abs", "rel_l2", "cosine", "std_ratio", "mismatched", "stats_b")  # fmt: skip
# Products, which may be off by a unit in the last place.
NUDGED = ("qkv_matmul", "attn_scores", "attn_out", "ffn_gate", "ffn_out", "lm_head")


class Nudged(Delegate):
    """The reference with each product moved by a unit in the last place or not, and a wrong ffn_up in layer 1."""

    def __init__(self) -> None:
        super().__init__(ReferenceBackend())
        self._rng, self._ups = np.random.default_rng(5), 0
        self.forward = {name: self._moved(name, function) for name, function in self.inside.forward.items()}

    def _moved(self, name: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(*arrays: np.ndarray, **options: Any) -> np.ndarray:
            out = function(*arrays, **options)
            if name == "ffn_up":
                self._ups += 1
                return out * np.float32(1.01) if self._ups == 2 else out
            if name not in NUDGED:
                return out
            return np.nextafter(out, out + self._rng.integers(-1, 2, out.shape).astype(np.float32))

        return call


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two recorded sides that need no framework, and so are the same wherever they are made."""
    folder = tmp_path_factory.mktemp("pair")
    model = write_model(folder / "model", MODELS["qwen3"], "float32")
    for name, backend in (("a", ReferenceBackend()), ("b", Nudged())):
        trace(model, backend, tokens="3,1,4,1,5", out=folder / name)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def document(pair: tuple[Path, Path]) -> dict[str, Any]:
    return diff_forward(*pair, rerun=False)


def printed(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the document says, to six digits, which is more than a text shows."""
    rows = {row["key"]: {field: row[field] for field in FIELDS} for row in document["rows"]}
    verdict = document["verdict"].replace(document["b"]["source"], "b")
    whole = {"verdict": verdict, **{name: document[name] for name in ("outcome", "logits", "growth")}}
    return {key: " ".join(map(_short, row.values())) for key, row in {**rows, "whole": whole}.items()}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return "(" + " ".join(f"{key}={_short(item)}" for key, item in items) + ")"
    return str(value)


def test_verdicts_and_numbers_are_those_that_were_recorded(document: dict[str, Any]) -> None:
    assert printed(document) == json.loads(RECORDED.read_text())


def test_two_threads_say_what_one_says(
    pair: tuple[Path, Path], document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(both, "is_small", lambda _run: False)
    assert diff_forward(*pair, rerun=False) == document


@pytest.mark.parametrize("scores", [1, 60])  # one head at a time: within a group of keys, and two that share one
def test_attention_by_heads_is_judged_as_whole(
    pair: tuple[Path, Path], document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, scores: int
) -> None:
    monkeypatch.setattr(forward, "_SCORES", scores)
    assert printed(diff_forward(*pair, rerun=False)) == printed(document)
    by_heads = audit(pair[1], rerun=False)
    monkeypatch.undo()
    for found, whole in zip(by_heads["rows"], audit(pair[1], rerun=False)["rows"], strict=True):
        assert [_short(found[x]) for x in found] == [_short(whole[x]) for x in found]


def test_without_verdicts_the_metrics_are_the_same_and_nothing_is_judged(
    pair: tuple[Path, Path], document: dict[str, Any]
) -> None:
    alone = diff_forward(*pair, verdicts=False)
    metrics = ("key", "sha256_b", "stats_a", "stats_b", "max_abs", "top", "rel_l2", "cosine", "first_difference")
    for found, judged in zip(alone["rows"], document["rows"], strict=True):
        assert [found[name] for name in metrics] == [judged[name] for name in metrics]
        assert (found["verdict_a"], found["ratio_a"]) == (None, None)
        assert found["verdict"] == ("exact" if found["byte_match"] else "unjudged")
    assert alone["logits"] == document["logits"]
    assert (alone["outcome"], NOT_ASKED in alone["verdict"]) == ("incomplete", True)
    assert diff_forward(pair[0], pair[0], verdicts=False)["outcome"] == "agree"


def test_the_largest_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for number in range(300):
        x = rng.integers(-3, 3, rng.integers(1, 40)).astype(np.float64)
        x[rng.random(x.size) < 0.3] = (np.nan, np.inf, x[0])[number % 3]
        for count in (1, 5):
            assert stats._top(x, count) == np.argsort(-x, kind="stable")[:count].tolist()
