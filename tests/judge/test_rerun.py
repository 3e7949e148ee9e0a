"""A suspect is settled by running its stage again: what it turns into, and when it stays one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import Faulty
from forward_models import MODELS, change_dump, trace, write_model
from helpers import svf, with_json

from stages.commands.backends import load_backend
from stages.files.dump import MANIFEST_FILE
from stages.judge import rerun
from stages.judge.rerun import Recorded, RerunRequest, RerunResult, decide
from stages.oracle.verdict import Verdict
from stages.progress import Progress
from stages.spec.backend import Backend

pytestmark = pytest.mark.slow

KEY = "layers.1.ffn_out"
FACTS = {"torch": "2.13.0", "threads": "2", "environment": ""}
ON_GPU = {"device": "gpu:0: NVIDIA H200", "jax": "0.12", "xla_gpu_autotune_level": "default"}
H200 = {"device": "cuda: H200"}
NOT_TUNED = {**ON_GPU, "xla_gpu_autotune_level": "0"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("rerun") / "model", MODELS["qwen3"], "float32")


def systematic(values: np.ndarray) -> np.ndarray:
    """Each value a little too large: every one within its bound, all of them together not."""
    return values * np.float32(1 + 2.0**-19)


def faulty_dump(tiny: Path, out: Path, backend: Backend) -> Path:
    """A dump whose ffn_out of layer 1 is off; what reads it was computed from the right one, and is left out."""
    trace(tiny, backend, out=out, tokens="3,141,59,26,53,58,97,93")

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[KEY] = systematic(tensors[KEY])
        tensors["layers.1.post_ffn_residual"] = tensors["layers.1.post_attn_residual"] + tensors[KEY]
        for key in ("final_norm", "lm_head"):
            del tensors[key]

    change_dump(out, change)
    with_json(
        out / MANIFEST_FILE, lambda m: m.update(stages=[s for s in m["stages"] if s not in ("final_norm", "lm_head")])
    )
    return out


@pytest.fixture(scope="module")
def dump(tiny: Path, tmp_path_factory: pytest.TempPathFactory, torch_backend: Backend) -> Path:
    return faulty_dump(tiny, tmp_path_factory.mktemp("rerun") / "dump", torch_backend)


def row_of(document: Any, key: str = KEY) -> dict[str, Any]:
    return next(row for row in document["rows"] if row["key"] == key)


AGAIN = {
    # reproduced, reference, ratio, bits
    "lost bits": (RerunResult(True, "rounding", 0.2, 17.3), FACTS, Verdict.PRECISION, "about 17.3 significant bits"),
    "exact reference": (
        RerunResult(True, "exact", 0.0, 17.3),
        FACTS,
        Verdict.PRECISION,
        "in reference precision the oracle's",
    ),
    "another function": (
        RerunResult(True, "suspect", 2.5, 17.3),
        FACTS,
        Verdict.BUG,
        "2.5 times the bound from the oracle",
    ),
    "not this code": (RerunResult(False, "exact", 0.0, 17.3), FACTS, Verdict.BUG, "was not this code"),
    "another version": (
        RerunResult(False, "exact", 0.0, 17.3),
        {**FACTS, "torch": "2.14.0"},
        Verdict.SUSPECT,
        "torch 2.13.0 then, 2.14.0 now",
    ),
    "another version and function": (
        RerunResult(False, "bug", 9.0, 17.3),
        {**FACTS, "torch": "2.14.0"},
        Verdict.BUG,
        "another function",
    ),
    "another setting": (
        RerunResult(False, "exact", 0.0, 17.3),
        {**FACTS, "environment": "MKL_CBWR=COMPATIBLE"},
        Verdict.SUSPECT,
        "environment none then, MKL_CBWR=COMPATIBLE now",
    ),
    "another calibration is no other code": (
        RerunResult(False, "exact", 0.0, 17.3),
        {**FACTS, "calibration": "shipped"},
        Verdict.BUG,
        "was not this code",
    ),
}


@pytest.mark.parametrize("case", AGAIN)
def test_what_a_suspect_becomes(case: str) -> None:
    again, now, verdict, words = AGAIN[case]
    found, hint = decide(again, {**FACTS, "calibration": "2026-11-20: product 2/4"}, now)
    assert found is verdict
    assert words in hint


@pytest.mark.parametrize(("again", "recorded", "now", "verdict", "words"), [
    (RerunResult(False, "exact", 0.0, 17.3), ON_GPU, ON_GPU, Verdict.SUSPECT, "--xla_gpu_autotune_level=0 to know"),
    (RerunResult(False, "exact", 0.0, 17.3), NOT_TUNED, ON_GPU, Verdict.SUSPECT, "elsewhere"),
    (RerunResult(False, "exact", 0.0, 17.3), NOT_TUNED, NOT_TUNED, Verdict.BUG, "both without autotuning"),
    (RerunResult(False, "exact", 0.0, 17.3), H200, H200, Verdict.SUSPECT, "nothing"),
    (RerunResult(False, "bug", 9.0, 17.3), ON_GPU, ON_GPU, Verdict.BUG, "another function"),
    (RerunResult(True, "exact", 0.0, 9.0), ON_GPU, ON_GPU, Verdict.PRECISION, "about 9.0 significant bits"),
])  # fmt: skip
def test_other_bytes_of_a_gpu_are_no_proof(
    again: RerunResult, recorded: dict[str, str], now: dict[str, str], verdict: Verdict, words: str
) -> None:
    found, hint = decide(again, recorded, now)
    assert found is verdict
    assert words in hint
    assert "was not this code" not in hint


def test_a_dump_that_was_not_tuned_is_run_again_without_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    assert rerun._environment({"xla_gpu_autotune_level": "0", "environment": "XLA_FLAGS=--xla_dump_to=/tmp"}) == {
        "XLA_FLAGS": "--xla_a=1 --xla_gpu_autotune_level=0"
    }
    assert rerun._environment({"xla_gpu_autotune_level": "default", "XLA_FLAGS": "--xla_dump_to=/tmp"}) == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    assert rerun._environment({"xla_gpu_autotune_level": "0"}) == {}


def test_an_audit_without_rerun_leaves_a_suspect_with_its_statistic(dump: Path) -> None:
    result = svf("audit", dump, "--no-rerun", "--json")
    row = row_of(result.json)
    assert result.code == 1
    assert (row["verdict"], row["ratio"] < 1) == ("suspect", True)
    assert "all together err" in row["hint"]
    assert result.json["culprit"]["stage"] == "ffn_out"


def test_an_audit_runs_a_suspect_again_and_finds_other_code(dump: Path) -> None:
    result = svf("audit", dump, "--json")
    row = row_of(result.json)
    assert (result.code, row["verdict"]) == (1, "bug")
    assert "was not this code" in row["hint"]
    assert [r["key"] for r in result.json["rows"] if r["verdict"] not in ("exact", "rounding")] == [KEY]


def test_a_diff_settles_the_side_that_is_suspect(
    dump: Path, tiny: Path, tmp_path: Path, torch_backend: Backend
) -> None:
    trace(tiny, torch_backend, out=tmp_path / "right", tokens="3,141,59,26,53,58,97,93")
    change_dump(tmp_path / "right", lambda tensors: [tensors.pop(key) for key in ("final_norm", "lm_head")])
    document = svf("diff", tmp_path / "right", dump, "--json").json
    row = row_of(document)
    assert (row["verdict"], row["verdict_a"], row["verdict_b"]) == ("bug", "rounding", "bug")
    assert (document["culprit"]["side"], document["culprit"]["stage"]) == ("b", "ffn_out")
    assert row["rms_ratio_b"] > 3 * row["rms_ratio_a"] > 0


def test_a_dump_of_other_versions_stays_suspect(dump: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(dump, target_is_directory=True)
    manifest = json.loads((dump / MANIFEST_FILE).read_text())
    recorded = Recorded(dump, "torch", {**manifest["facts"], "torch": "1.0"})
    rows = [{"key": KEY, "verdict": "suspect", "hint": None}]
    rerun.resolve_suspects(rows, recorded)
    assert rows[0]["verdict"] == "suspect"
    assert "torch 1.0 then" in str(rows[0]["hint"])


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (Recorded(Path("x"), None, {}), "another program wrote it"),
        (Recorded(Path("x"), "jax", {"jit": "layer"}), "compiled whole"),
        (Recorded(Path("x"), "torch", {}, positions="last"), "last position alone"),
    ],
)
def test_what_cannot_be_run_again_stays_suspect(recorded: Recorded, words: str) -> None:
    rows = [{"key": KEY, "verdict": "suspect", "hint": "why"}, {"key": "other", "verdict": "bug", "hint": None}]
    rerun.resolve_suspects(rows, recorded)
    assert rows[0] == {"key": KEY, "verdict": "suspect", "hint": f"why; not run again: {recorded.why_not}"}
    assert words in rows[0]["hint"]
    assert rows[1] == {"key": "other", "verdict": "bug", "hint": None}


def run_again(dump: Path, load: Callable[..., Backend], *keys: str) -> dict[str, Any]:
    """What the child answers for stages of `dump`."""
    request = RerunRequest(dump, "torch", "cpu", "native", True, None, keys)
    return rerun.run_again(request, load, Progress(False))


def loader(change: Callable[..., Any] | None, *, both: bool = False) -> Callable[..., Backend]:
    """`load_backend`, with ffn_out changed natively, or in reference precision as well."""

    def load(name: str, device: str, precision: str, **options: Any) -> Backend:
        backend = load_backend(name, device, "native", **options)
        if change is None or (precision == "reference" and not both):
            return load_backend(name, device, precision, **options)
        return Faulty(backend, "ffn_out", lambda stage: lambda *a: change(stage(*a)))  # type: ignore[return-value]

    return load


ONE = np.float32(1 + 2.0**-19)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (loader(lambda out: out * ONE), Verdict.PRECISION),
        (loader(lambda out: out * ONE, both=True), Verdict.BUG),
        (loader(None), Verdict.BUG),
    ],
    ids=["fewer bits natively", "another function", "this code is right"],
)
def test_the_child_tells_lost_bits_from_another_function(
    dump: Path, load: Callable[..., Backend], expected: Verdict
) -> None:
    document = run_again(dump, load, KEY)
    again = RerunResult(**document["stages"][KEY])
    assert decide(again, {}, document["facts"])[0] is expected
    assert 18 < again.bits < 20  # off by 2^-19


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_run_again_a_clean_forward_gives_its_bytes(name: str, tiny: Path, tmp_path: Path) -> None:
    backend = load_backend(name, "cpu")
    trace(tiny, backend, out=tmp_path / "dump")
    keys = [
        key for key in json.loads((tmp_path / "dump" / MANIFEST_FILE).read_text())["tensors"] if "qkv_bias" not in key
    ]
    document = run_again(tmp_path / "dump", lambda *_a, **_o: backend, *keys)
    assert [key for key in keys if not document["stages"][key]["reproduced"]] == []


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_run_again_a_clean_replay_gives_its_bytes(name: str, made: Path, tmp_path: Path) -> None:
    backend = load_backend(name, "cpu")
    assert svf("replay", made / "components", "--backend", name, "--out", tmp_path / "dump", "--json").code == 0
    tensors = json.loads((tmp_path / "dump" / MANIFEST_FILE).read_text())["tensors"]
    keys = [key for key in tensors if key.endswith(("matmul_pre_norm", "normalization", "u_scaled"))]
    document = run_again(tmp_path / "dump", lambda *_a, **_o: backend, *keys)
    assert len(keys) == 27
    assert all(document["stages"][key]["reproduced"] for key in keys)
