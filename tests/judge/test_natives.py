"""The backends' own functions explain the last bits: of each, in each dtype, and never those of anything wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, dumped, trace, write_model
from helpers import svf

from stages.commands.backends import load_backend
from stages.files.tensorfile import write_tensors
from stages.judge import natives
from stages.judge.audit import audit
from stages.order.infer_forward import PRODUCT_KINDS
from stages.order.ordered_backend import OrderedBackend
from stages.progress import Progress
from stages.recipes.orders import SAMPLE
from stages.spec.backend import Backend
from stages.spec.forward import DECLARED
from stages.sums.candidates import family
from stages.sums.evaluate import product
from stages.sums.orders import words
from stages.sums.text import parse_order

pytestmark = pytest.mark.slow

TOKENS = "3,141,59,26,53,58,97,93"
BOTH = ["torch", "jax"]


@pytest.fixture(scope="module", params=[(name, dtype) for name in BOTH for dtype in ("float32", "bfloat16")])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model` and its dump in `dump`."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
    backend: Backend = request.getfixturevalue(f"{name}_backend")
    trace(write_model(folder / "model", MODELS["qwen3"], dtype), backend, out=folder / "dump", tokens=TOKENS)
    return folder


def test_every_bit_of_our_own_backends_is_explained(recorded: Path) -> None:
    document = audit(recorded / "dump", natives=True)
    assert document["outcome"] == "sound"
    found = document["explained"]
    assert found["bits"] == found["elements"] > 10_000
    assert {row["verdict"] for row in document["rows"]} == {"exact"}
    assert "all to the last bit by" in document["verdict"]


def test_so_is_another_programs_file_with_its_model_and_tokens(recorded: Path) -> None:
    """The same tensors without a manifest: neither the model nor the backend is told."""
    file = recorded / "foreign.safetensors"
    write_tensors(file, dumped(recorded / "dump"))
    given: dict[str, Any] = {"model": str(recorded / "model"), "tokens": TOKENS}
    document = audit(file, natives=True, **given)
    assert document["explained"]["bits"] == document["explained"]["elements"]


def test_what_is_wrong_stays_wrong(recorded: Path, tmp_path: Path) -> None:
    dump = Path(shutil.copytree(recorded / "dump", tmp_path / "dump"))
    key = "layers.1.ffn_gate"
    change_dump(dump, lambda tensors: tensors.update({key: (tensors[key] * 1.25).astype(tensors[key].dtype)}))
    document = audit(dump, natives=True)
    assert (document["outcome"], document["culprit"]["stage"], document["culprit"]["layer"]) == (
        "faulty",
        "ffn_gate",
        1,
    )


def test_a_replay_of_ours_is_explained(tmp_path: Path) -> None:
    for backend in BOTH:
        assert svf("replay", "--backend", backend, "--out", tmp_path / backend).code == 0
        document = svf("audit", tmp_path / backend, "--natives", "--json").json
        assert document["explained"]["bits"] == document["explained"]["elements"] > 1_000


def test_a_backend_that_cannot_be_asked_is_told_and_changes_nothing(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, _child: Any) -> Any:
        raise natives.SvfError(f"{name} is not installed")

    plain = audit(recorded / "dump")
    monkeypatch.setattr(natives, "document_of", refuse)
    document = audit(recorded / "dump", natives=True)
    asked = [row for row in document["rows"] if row["verdict"] == "rounding"]
    assert all("torch could not be asked: torch is not installed" in row["note"] for row in asked)
    assert [row["verdict"] for row in document["rows"]] == [row["verdict"] for row in plain["rows"]]


def test_elements_alike_are_counted_as_far_as_they_are_judged() -> None:
    stage = DECLARED["ffn_gate"]
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert natives._alike(stage, x, np.where(x == 3, 0, x).astype(np.float32)) == 3
    assert natives._alike(stage, x, x.astype(np.float64)) is None


SUMMED = (
    "left",
    "fma",
    "right",
    "pairs",
    "halves",
    "blocks(24, fma, left)",
    "blocks(16, left, halves)",
    "lanes(8, fma, halves)",
    "lanes(4, blocks(4, left, left), left)",
    "lanes(8, left, pairs, first)",
)


def in_order(folder: Path, text: str, backend: Backend) -> Path:
    """A float32 dump of one whose products are all summed in that order."""
    order, model = parse_order(text), write_model(folder / "model", MODELS["qwen3"], "float32")
    products = [stage.name for stage in DECLARED.values() if stage.noise in PRODUCT_KINDS]
    ordered = OrderedBackend(backend, {(name, k): order for name in products for k in range(1, 257)}, text)
    trace(model, ordered, out=folder / "dump", tokens=TOKENS)
    return folder / "dump"


@pytest.mark.parametrize("text", SUMMED)
def test_products_are_explained_by_the_order_that_they_were_summed_in(
    text: str, tmp_path: Path, torch_backend: Backend
) -> None:
    dump = in_order(tmp_path, text, torch_backend)
    rows = {row["key"]: row for row in audit(dump)["rows"]}
    asked = [key for key, row in rows.items() if DECLARED[row["stage"]].noise in PRODUCT_KINDS]
    keys = tuple(key for key in asked if rows[key]["elements"] - rows[key]["bits"] >= SAMPLE)
    assert len(keys) >= 12
    found = natives.natives(natives.NativesRequest(dump, natives.ORDERS, keys), load_backend, Progress(False))["stages"]
    assert {key: one["bits"] for key, one in found.items()} == {key: rows[key]["elements"] for key in keys}
    tensors, rng = dumped(dump), np.random.default_rng(0)
    for stage, made_of in (("ffn_gate", "ffn_norm"), ("ffn_out", "ffn_swigl")):
        x = rng.standard_normal((60, tensors[f"layers.1.{made_of}"].shape[1]), np.float32)
        said = found[f"layers.1.{stage}"]["recipe"].removeprefix("summed in float32: ")
        # The first of those that are the same additions.
        named = next(order for order in family(x.shape[1]) if words(order, "K") == said)
        assert np.array_equal(product(named, x, x.T), product(parse_order(text), x, x.T)), said


def test_an_audit_names_the_order_and_calls_the_row_exact(tmp_path: Path, torch_backend: Backend) -> None:
    document = audit(in_order(tmp_path, "blocks(16, left, halves)", torch_backend), natives=True)
    rows = [row for row in document["rows"] if row["stage"].startswith("ffn_gate")]
    assert rows
    for row in rows:
        assert (row["verdict"], row["class"], row["bits"]) == ("exact", "equivalent", row["elements"])
        assert row["recipe"].endswith("K in blocks of 16, a chain in each, blocks added upper half on to lower")
    assert document["explained"]["bits"] == document["explained"]["elements"]


def test_one_changed_bit_is_explained_by_no_order(tmp_path: Path, torch_backend: Backend) -> None:
    dump = in_order(tmp_path, "blocks(16, left, halves)", torch_backend)
    key = "layers.1.ffn_gate"

    def nudge(tensors: dict[str, np.ndarray]) -> None:
        changed = tensors[key].copy()
        changed[3, 5] = np.nextafter(changed[3, 5], np.float32(np.inf))
        tensors[key] = changed

    change_dump(dump, nudge)
    found = natives.natives(natives.NativesRequest(dump, natives.ORDERS, (key,)), load_backend, Progress(False))
    assert found["stages"] == {}
