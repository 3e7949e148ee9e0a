"""`svf route`: the router head's stage on every backend, what it reads, and two sides compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import dumped, trace
from helpers import Result, svf, tensors_of, with_tensors

from stages.errors import InputError, UsageError
from stages.files.bundle import OFFSETS_FILE
from stages.files.checkpoint import open_checkpoint
from stages.files.router_head import HEAD_KEY, RouterHead, load_head
from stages.files.selection import Selection, load_manifest
from stages.files.tensorfile import write_tensors
from stages.jobs.route import LOGITS, RouteCommand, _choice, _Given, _Side, compare, route_one
from stages.oracle.verdict import Verdict, consult
from stages.progress import Progress
from stages.recipes.side import SideVerdict
from stages.run.precision import with_precision
from stages.spec.backend import Backend
from stages.spec.router import ROLES, ROUTER
from svf_torch.backend import TorchBackend
from svf_torch.router import ROUTER_STAGES

TOKENS = "3,141,59,26,53"  # what `trace` runs on


def command(model: Path, head: Path, **changes: Any) -> RouteCommand:
    """`svf route MODEL --head HEAD --tokens ...` with `changes`, as the command line parses it."""
    parsed = RouteCommand(
        model=str(model),
        head=head,
        adapted=None,
        layers="2",
        layout="declared",
        tokens=TOKENS,
        tokens_file=None,
        prompt=None,
        backend="torch",
        dtype="model",
        device="cpu",
        precision="native",
        out=None,
    )
    return replace(parsed, **changes)


def routed(backend: Backend, *arguments: Any, **changes: Any) -> dict[str, Any]:
    return route_one(command(*arguments, **changes), lambda: backend, Progress(False))


def refused(done: Result, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, ""), (done.code, done.err, done.out[-300:])
    for word in words:
        assert word in done.error, done.error


# -- the stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["native", "reference", "exact"])
def test_every_backend_computes_the_head_within_its_bound(backend: Backend, precision: str) -> None:
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 1024), (10, 1024)))
    side = with_precision(backend, precision)
    assert side.router.keys() == set(ROUTER)
    logits = side.get(side.compile(side.router[LOGITS.name])(side.put(hidden), side.put(head)))
    oracle = consult(LOGITS, (hidden, head), {})
    assert logits.shape == (1, 10)
    judged = SideVerdict()
    assert judged.add(oracle, logits).passes, judged
    if precision == "exact":
        assert judged.verdict is Verdict.EXACT
        assert logits.tobytes() == oracle.rounded.tobytes()


def test_a_product_in_bfloat16_is_named() -> None:
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 1024), (10, 1024)))
    narrow = [array.astype(ml_dtypes.bfloat16).astype(np.float32) for array in (hidden, head)]
    judged = SideVerdict()
    assert judged.add(consult(LOGITS, (hidden, head), {}), narrow[0] @ narrow[1].T) is Verdict.PRECISION


def test_the_head_reads_the_second_to_last_token_after_the_final_norm(
    model: Path, vector: Path, torch_backend: Backend, tmp_path: Path
) -> None:
    document = routed(torch_backend, model, vector, out=tmp_path / "side.safetensors")
    trace(model, torch_backend, stages="final_norm", out=tmp_path / "trace")
    recorded = tensors_of(tmp_path / "side.safetensors")
    expected = dumped(tmp_path / "trace")["final_norm"][-2].astype(np.float32)
    assert recorded["router_hidden"].tobytes() == expected.tobytes()
    assert document["position"] == 3
    head = np.load(vector)[576:].astype(np.float32).reshape(-1, 64)  # behind 9 x 64 offsets
    logits = head.astype(np.float64) @ expected
    assert np.allclose([row["logit"] for row in document["rows"]], logits, rtol=1e-5, atol=1e-6)
    agents = len(head) - len(ROLES)
    assert [row["output"] for row in document["rows"]] == [*(f"agent {i}" for i in range(agents)), *ROLES]
    assert document["agent"]["index"] == int(np.argmax(logits[:agents]))
    assert document["role"]["name"] == ROLES[int(np.argmax(logits[agents:]))]
    assert (document["outcome"], document["stage"]["verdict"]) in (("agree", "rounding"), ("agree", "exact"))


def test_an_adapted_model_routes_by_its_own_hidden_state(
    made: Path, model: Path, vector: Path, torch_backend: Backend, tmp_path: Path
) -> None:
    """In place, or written by `svf apply`: the same bits; and not those of the model as it was."""
    plain = routed(torch_backend, model, vector)
    adapted = routed(torch_backend, model, vector, adapted=made / "components", layers=None)
    assert svf("apply", made / "components", model, "--out", tmp_path / "applied").code == 0
    applied = routed(torch_backend, tmp_path / "applied", vector)
    assert adapted["rows"] == applied["rows"] != plain["rows"]


def test_a_wrong_head_product_is_a_bug_and_exits_1(model: Path, vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {LOGITS.name: lambda hidden, head: ROUTER_STAGES[LOGITS.name](hidden, head * 1.01)}
    monkeypatch.setattr(TorchBackend, "router", property(lambda _: MappingProxyType(wrong)))
    done = svf("route", model, "--head", vector, "--layers", "2", "--tokens", TOKENS, "--backend", "torch", "--json")
    assert done.code == 1
    assert done.json["stage"]["verdict"] == "bug"
    assert "Bug at router_logits: torch" in done.json["verdict"]


# -- both sides ---------------------------------------------------------------------------------------------------


def test_both_sides_agree_through_the_command_line(made: Path, model: Path, vector: Path) -> None:
    done = svf("route", model, "--adapted", made / "components", "--head", vector, "--tokens", TOKENS, "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["schema"], document["outcome"]) == ("svf.route/1", "agree")
    assert document["agent"]["agrees"]
    assert document["role"]["agrees"]
    assert [side["run"]["backend"] for side in (document["a"], document["b"])] == ["torch", "jax"]
    assert all(row["difference"] <= row["bound"] for row in document["rows"])
    assert document["a"]["run"]["head"] == document["head"]


@pytest.fixture
def pair(model: Path) -> Callable[..., dict[str, Any]]:
    """`compare` of two sides, given what is added to the second one's hidden state, on a head of two agents.

    `swap`: the first side's second agent is an ulp ahead, the second side's first one.
    """

    def compared(shift: float, weight: np.ndarray, swap: bool = False) -> dict[str, Any]:
        hidden = np.ones((1, 64), np.float32)
        other = (hidden + np.float32(shift)).astype(np.float32)
        with open_checkpoint(model) as checkpoint:
            given = _Given(checkpoint, [1, 2, 3], RouterHead(weight))
            run = {"outcome": "agree", "facts": {}}
            sides = [_Side(name, run, h, h @ weight.T) for name, h in (("torch", hidden), ("jax", other))]
            if swap:
                for side, ahead in zip(sides, (1, 0), strict=True):
                    side.logits[0, ahead] = np.nextafter(side.logits[0, 1 - ahead], np.float32(np.inf))
            return compare(sides[0], sides[1], given, "float32")

    return compared


def head_of(agents: list[float]) -> np.ndarray:
    """A head whose rows are constant: logits of ones are 64 times these; the third role clearly wins."""
    return np.repeat(np.array([*agents, 0.1, 0.2, 0.9], np.float32)[:, None], 64, axis=1)


def test_a_clear_choice_agrees(pair: Callable[..., dict[str, Any]]) -> None:
    document = pair(1e-7, head_of([0.5, 0.7]))
    assert document["outcome"] == "agree"
    assert document["agent"]["decided"]
    assert document["verdict"] == "Each side routes to agent 1 as verifier."


def test_a_tie_within_rounding_is_undecided(pair: Callable[..., dict[str, Any]]) -> None:
    document = pair(1e-7, head_of([0.7, np.float32(0.7) * (1 + 2e-7)]))
    assert document["outcome"] == "agree"
    assert not document["agent"]["decided"]
    assert document["role"]["decided"]
    assert "the agent is undecided by rounding: agent 0 is" in document["verdict"]


def test_sides_that_choose_apart_within_rounding_diverge_and_say_so(pair: Callable[..., dict[str, Any]]) -> None:
    document = pair(0.0, head_of([0.7, 0.7]), swap=True)
    assert document["outcome"] == "diverged"
    assert not document["agent"]["agrees"]
    assert document["role"]["agrees"]
    assert document["verdict"].startswith("The sides choose another agent. torch routes to agent 1")
    assert document["verdict"].count("undecided by rounding") == 2


def test_a_hidden_state_beyond_rounding_diverges(pair: Callable[..., dict[str, Any]]) -> None:
    document = pair(1e-2, head_of([0.5, 0.7]))
    assert document["outcome"] == "diverged"
    assert document["agent"]["agrees"]
    assert "hidden states differ beyond rounding" in document["verdict"]


def test_a_choice_is_the_first_of_equals_and_undecided() -> None:
    logits = np.array([1, 3, 3], np.float32)
    found = _choice(["x", "y", "z"], logits, np.full(3, 1e-6))
    assert (found["index"], found["runner_up"], found["margin"], found["decided"]) == (1, "z", 0.0, False)
    alone = _choice(["x"], logits[:1], np.ones(1))
    assert (alone["index"], alone["decided"]) == (0, True)


# -- the head's file ------------------------------------------------------------------------------------------------


def test_a_head_file_and_a_vector_give_the_same_head(vector: Path, selection: Selection, tmp_path: Path) -> None:
    head = load_head(vector, 64, selection, None)
    assert head.weight.shape == (head.agents + 3, 64)
    write_tensors(tmp_path / "head.safetensors", {HEAD_KEY: head.weight})
    assert load_head(tmp_path / "head.safetensors", 64, None, None).sha256 == head.sha256
    write_tensors(tmp_path / "vector.safetensors", {"trinity_router_es_vector": np.load(vector).astype(np.float32)})
    assert load_head(tmp_path / "vector.safetensors", 64, selection, None).sha256 == head.sha256


def test_the_published_vector_has_seven_agents(golden: Path) -> None:
    folder = golden / "trinity-qwen3-0.6b"
    selection = load_manifest(folder / "reference_manifest.json")
    for name in ("sakana_model_iter_60.npy", "trinity_router_es_vector.safetensors"):
        head = load_head(folder / name, 1024, selection, None)
        assert (head.agents, head.weight.shape) == (7, (10, 1024))


def test_bad_heads_are_refused_in_one_line(made: Path, model: Path, vector: Path, bundle: Path, tmp_path: Path) -> None:
    good = np.zeros((10, 64), np.float32)
    nan = good.copy()
    nan[0, 0] = np.nan
    for name, array in (("narrow", good[:, :32]), ("few", good[:3]), ("nan", nan)):
        write_tensors(tmp_path / f"{name}.safetensors", {HEAD_KEY: array})
    with_tensors(bundle / OFFSETS_FILE, lambda t: [a.__iadd__(np.float32(0.01)) for a in t.values()])
    base = ("route", model, "--backend", "torch", "--tokens", TOKENS)
    refused(svf(*base, "--head", vector), 2, "--layers")
    refused(svf(*base, "--head", vector, "--adapted", made / "sample"), 2, "--layers")
    refused(svf(*base, "--head", vector, "--adapted", bundle), 3, "offsets of", "not those of")
    refused(svf(*base, "--head", tmp_path / "narrow.safetensors"), 3, "[10, 32]", "[agents + 3, 64]")
    refused(svf(*base, "--head", tmp_path / "few.safetensors"), 3, "[3, 64]")
    refused(svf(*base, "--head", tmp_path / "nan.safetensors"), 3, "NaN")
    refused(svf(*base, "--head", tmp_path / "none.npy", "--layers", "2"), 4, "does not exist")
    refused(svf("route", model, "--head", vector, "--layers", "2", "--tokens", "5"), 2, "two tokens")
    refused(svf(*base[:2], "--head", vector, "--layers", "2", "--tokens", TOKENS, "--out", tmp_path / "x"), 2, "--out")
    refused(svf(*base, "--head", vector, "--layers", "2", "--layout", "vh"), 2, "--adapted")
    refused(svf(*base, "--head", vector, "--layers", "2", "--out", tmp_path / "no" / "x"), 6, "folder")


def test_a_vector_without_whole_rows_is_refused(vector: Path, selection: Selection) -> None:
    with pytest.raises(UsageError):
        load_head(vector, 64, None, None)
    with pytest.raises(InputError, match="whole rows of 50"):
        load_head(vector, 50, selection, None)
