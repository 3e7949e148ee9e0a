"""RoPE in dumps of other programs: tables not recorded, or made by another one; positions; and why it fails."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import LINEAR, MODELS, YARN, Model, tokens_of, write_model
from helpers import ROOT, fresh, svf, tensors_of

from stages.files.checkpoint import open_checkpoint
from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit
from stages.run.forward import Forwarder
from svf_jax.backend import JaxBackend
from svf_torch.backend import TorchBackend

pytestmark = pytest.mark.slow

TABLES = ("inv_freq", "rope_angle", "rope_cos", "rope_sin")
SUBSETS = [some for count in range(5) for some in itertools.combinations(TABLES, count)]
DTYPES = ("float32", "bfloat16", "float16")
TOKENS = tokens_of(24)
SHAPES = {name: MODELS[name] for name in ("qwen3", "qwen2", "qwen3-llama3", "qwen3-longrope", "qwen3-dynamic")}
Tensors = dict[str, np.ndarray]

# What transformers runs: model -> what is wrong with it, or how it is right.
RUNS: dict[str, tuple[str, ...]] = {
    **{f"qwen3-{dtype}": ("", "bfloat16 frequencies", "frequencies made in bfloat16") for dtype in DTYPES},
    **{f"{name}-float32": ("", "positions from 100") for name in SHAPES if name != "qwen3"},
    **{f"{name}-bfloat16": ("positions from 100",) for name in SHAPES if name != "qwen3"},
}
SHIFTS = ("positions from 100", "padded", "padded, mask ignored", "all at 0 from token 6 on")
SHIFTS += ("3 too many from token 6 on", "keys 2 positions on from token 4 on", "positions from 300")
RUNS |= {f"qwen3-{dtype}": RUNS[f"qwen3-{dtype}"] + SHIFTS for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the dumps of RUNS, by a process that cannot import this project."""
    folder = tmp_path_factory.mktemp("rope")
    words: list[str] = []
    for name, runs in RUNS.items():
        shape, _, dtype = name.rpartition("-")
        model = write_model(folder / name, SHAPES[shape], dtype)
        for run in runs:
            words += [str(model), dtype, str(folder / f"{name} {run}.safetensors"), run]
    program, tokens = ROOT / "tests" / "support" / "foreign_program.py", ",".join(map(str, TOKENS))
    done = subprocess.run(
        [sys.executable, str(program), tokens, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def at_rope(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """RoPE's stages and what they read: all that a change of tables can touch."""
    ends = (*TABLES, "qkv_bias", "q_norm", "k_norm", "q_post_rope", "k_post_rope")
    return {key: array for key, array in tensors.items() if key.rpartition(".")[2] in ends}


def named(lacking: Iterable[str]) -> str:
    return "no " + ", ".join(sorted(lacking)) if lacking else "all tables"


def judged(model: Path, tensors: Mapping[str, np.ndarray], tokens: Iterable[int] = TOKENS) -> dict[str, Any]:
    """The audit of tensors that another program wrote."""
    file = model.parent / "judged.safetensors"
    write_tensors(file, dict(tensors))
    return audit(file, model=str(model), tokens=",".join(map(str, tokens)))


def without(tensors: Tensors, names: Iterable[str]) -> Tensors:
    return {key: array for key, array in tensors.items() if key not in names}


def run_of(made: Path, model: str, run: str) -> tuple[Path, Tensors]:
    return made / model, tensors_of(made / f"{model} {run}.safetensors")


# -- tables that were not recorded -----------------------------------------------------------------------------------


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lacking", SUBSETS, ids=named)
def test_a_right_run_is_sound_whichever_tables_it_lacks(made: Path, dtype: str, lacking: tuple[str, ...]) -> None:
    model, tensors = run_of(made, f"qwen3-{dtype}", "")
    some = tensors if lacking in ((), TABLES) else at_rope(tensors)
    document = judged(model, without(some, lacking))
    assert document["outcome"] == "sound", document["verdict"]
    assert document["notes"] == (["RoPE tables computed from the config"] if lacking else [])
    coverage = document["coverage"]
    assert coverage["judged"] + coverage["given"] == len(some) - len(lacking)
    assert coverage["judged"] == coverage["expected"]
    assert coverage["given"] == 0 or some is not tensors


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ["bfloat16 frequencies", "frequencies made in bfloat16"])
@pytest.mark.parametrize("lacking", SUBSETS, ids=named)
def test_frequencies_in_bfloat16_are_named_whichever_tables_are_lacking(
    made: Path, dtype: str, run: str, lacking: tuple[str, ...]
) -> None:
    model, tensors = run_of(made, f"qwen3-{dtype}", run)
    document = judged(model, without(at_rope(tensors), lacking))
    assert document["outcome"] == "faulty"
    found = document["culprit"]
    recorded = [name for name in (*TABLES, "q_post_rope") if name not in lacking]
    assert found["stage"] == recorded[0]
    # Of theta 1e6 and heads of 32, both ways give nearly the same; which of them is told where it can be.
    assert found["hint"].startswith("as if the inverse frequencies were "), found
    assert found["hint"].endswith("in bfloat16")
    assert found["verdict"] in (("precision",) if found["stage"] == "inv_freq" else ("precision", "bug"))


def test_it_is_said_on_the_command_line(made: Path) -> None:
    file = made / "lacking.safetensors"
    model, tensors = run_of(made, "qwen3-float32", "")
    write_tensors(file, without(tensors, TABLES))
    done = svf("audit", file, "--model", model, "--tokens", ",".join(map(str, TOKENS)))
    assert done.code == 0
    assert "RoPE tables computed from the config." in " ".join(done.out.split())


# name, frequencies as float32 or float64 -> the tables that a program makes of them
Tabled = dict[str, np.ndarray]


def by_backend(backend: Any, head_dim: int, theta: float, positions: np.ndarray) -> Tabled:
    stages, put, get = backend.forward, backend.put, backend.get
    options = {"head_dim": head_dim, "rope_theta": theta, "rope_type": "default", "rope_parameters": ()}
    f = backend.compile(lambda p: stages["inv_freq"](p, **options))(put(positions))
    angle = backend.compile(stages["rope_angle"])(f, put(positions))
    waves = {
        name: get(backend.compile(lambda a, s=stages[name]: s(a, attention_scaling=1.0, dtype="float32"))(angle))
        for name in ("rope_cos", "rope_sin")
    }
    return {"inv_freq": get(f), "rope_angle": get(angle), **waves}


def by_numpy(f: np.ndarray, positions: np.ndarray) -> Tabled:
    angle = positions[:, None].astype(f.dtype) * f
    angle = np.concatenate((angle, angle), axis=1)
    tables = {"inv_freq": f, "rope_angle": angle, "rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}
    return {name: table.astype(np.float32) for name, table in tables.items()}


PROGRAMS: dict[str, Callable[[int, float, np.ndarray], Tabled]] = {
    "torch": lambda d, theta, p: by_backend(TorchBackend(), d, theta, p),
    "jax": lambda d, theta, p: by_backend(JaxBackend(), d, theta, p),
    "exp of a logarithm": lambda d, theta, p: by_numpy(
        np.exp(-(np.arange(0, d, 2, dtype=np.float32) / np.float32(d)) * np.log(np.float32(theta))), p
    ),
    "float64": lambda d, theta, p: by_numpy(theta ** (-np.arange(0, d, 2) / d), p),
}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], Tensors]:
    """A float32 forward of 120 tokens on torch; heads of 80, whose exponents float32 cannot hold."""
    shape = Model(heads=2, kv_heads=1, head_dim=80, layers=1)
    folder = write_model(tmp_path_factory.mktemp("long") / "model", shape, "float32")
    tokens = tokens_of(120)
    with open_checkpoint(folder) as checkpoint:
        results = Forwarder(TorchBackend(), checkpoint.config, checkpoint).run(tokens)
        tensors = {f"layers.{r.layer}.{r.stage}" if r.layer is not None else r.stage: r.array for r in results}
    return folder, tokens, at_rope(tensors)


@pytest.mark.cover(1)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "mixed",
    [("rope_angle",), ("inv_freq",), ("rope_cos",), ("rope_cos", "rope_sin"), TABLES[1:], TABLES],
    ids=" and ".join,
)
def test_tables_of_two_programs_raise_no_alarm(
    program: str, mixed: tuple[str, ...], long_run: tuple[Path, list[int], Tensors]
) -> None:
    """`mixed` by the other program, the rest by torch: one table, the waves, all but one, all."""
    model, tokens, tensors = long_run
    tables = PROGRAMS[program](80, 1e6, np.arange(120, dtype=np.int32))
    document = judged(model, tensors | {name: tables[name] for name in mixed}, tokens)
    assert document["outcome"] == "sound", document["verdict"]
    alone = without(tensors, {*TABLES}.difference(mixed)) | {name: tables[name] for name in mixed}
    document = judged(model, alone, tokens)
    assert document["outcome"] == "sound", document["verdict"]


def test_tables_of_two_programs_are_not_all_believed(long_run: tuple[Path, list[int], Tensors]) -> None:
    """What no right program could have made is found beside tables of another one."""
    model, tokens, tensors = long_run
    other = PROGRAMS["float64"](80, 1e6, np.arange(120, dtype=np.int32))
    wrong: dict[str, Tensors] = {
        "rope_cos": {"rope_cos": other["rope_cos"] + np.float32(1e-4) * other["rope_sin"]},
        "rope_angle": {"rope_angle": other["rope_angle"] * np.float32(1.0001)},
        "inv_freq": {"inv_freq": other["inv_freq"] * np.float32(1.0001)},
        "rope_sin": {"rope_sin": np.sin(other["rope_angle"].astype(np.float16).astype(np.float32))},
    }
    for stage, tables in wrong.items():
        document = judged(model, tensors | {n: other[n] for n in TABLES} | tables, tokens)
        assert document["culprit"]["stage"] == stage, document["verdict"]


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.cover(1)
@pytest.mark.parametrize("model", [name for name, runs in RUNS.items() if "positions from 100" in runs])
@pytest.mark.parametrize("lacking", SUBSETS, ids=named)
def test_a_decode_from_token_100_is_right_at_its_positions(made: Path, model: str, lacking: tuple[str, ...]) -> None:
    folder, tensors = run_of(made, model, "positions from 100")
    document = judged(folder, without(at_rope(tensors) if lacking else tensors, lacking))
    assert document["outcome"] == "sound", document["verdict"]
    assert document["notes"][-1] == "positions start at 100"
    assert "Positions start at 100." in document["verdict"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_padded_row_is_right_and_wrong_if_padding_is_attended_to(made: Path, dtype: str) -> None:
    model, tensors = run_of(made, f"qwen3-{dtype}", "padded")
    assert judged(model, tensors)["outcome"] == "sound"
    assert judged(model, tensors)["notes"] == ["positions start at 5"]
    assert judged(model, without(tensors, TABLES))["outcome"] == "sound"
    model, tensors = run_of(made, f"qwen3-{dtype}", "padded, mask ignored")
    for lacking in ((), TABLES):
        culprit = judged(model, without(tensors, lacking))["culprit"]
        assert (culprit["stage"], culprit["layer"], culprit["verdict"]) == ("attn_softmax", 0, "bug")


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lacking", [(), ("inv_freq",), ("rope_angle",), ("rope_angle", "rope_cos"), TABLES], ids=named)
@pytest.mark.parametrize(
    ("run", "hint"),
    [
        ("all at 0 from token 6 on", "positions are 0 from token 6 on"),
        ("3 too many from token 6 on", "positions are 3 too many from token 6 on"),
    ],
)
def test_a_shift_from_some_token_on_is_a_bug_and_says_from_which(
    made: Path, dtype: str, lacking: tuple[str, ...], run: str, hint: str
) -> None:
    model, tensors = run_of(made, f"qwen3-{dtype}", run)
    culprit = judged(model, without(at_rope(tensors), lacking))["culprit"]
    recorded = [name for name in (*TABLES[1:], "q_post_rope") if name not in lacking]
    assert (culprit["stage"], culprit["hint"]) == (recorded[0], hint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_at_other_positions_than_queries_are_a_bug(made: Path, dtype: str) -> None:
    model, tensors = run_of(made, f"qwen3-{dtype}", "keys 2 positions on from token 4 on")
    for lacking in ((), TABLES):
        culprit = judged(model, without(tensors, lacking))["culprit"]
        assert (culprit["layer"], culprit["stage"]) == (0, "k_post_rope")
        assert culprit["hint"].startswith("from token 4 on as at positions 6, 7, 8")
    # All keys, by a constant: that changes every score.
    right, shifted = (run_of(made, f"qwen3-{dtype}", run)[1] for run in ("", "positions from 100"))
    mixed = {key: shifted[key] if key.endswith("k_post_rope") else array for key, array in right.items()}
    for lacking in ((), TABLES):
        culprit = judged(model, without(mixed, lacking))["culprit"]
        assert (culprit["layer"], culprit["stage"]) == (0, "k_post_rope")
        assert culprit["hint"] == "positions are 100 too many at all tokens"


def rotated(tensors: Tensors, angle: np.ndarray, scale: float = 1.0) -> Tensors:
    """The tables and the turned queries and keys of a float32 Qwen3 run with other angles, and nothing after them."""
    both = np.concatenate((angle, angle), axis=1)
    cos, sin = ((f(both.astype(np.float64)) * scale).astype(np.float32) for f in (np.cos, np.sin))
    made = {"rope_angle": both.astype(np.float32), "rope_cos": cos, "rope_sin": sin}
    for key in [key for key in tensors if key.endswith(("q_norm", "k_norm"))]:
        x = tensors[key]
        half = x.shape[-1] // 2
        turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
        made |= {key: x, key.replace("norm", "post_rope"): x * cos[:, None] + turned * sin[:, None]}
        qkv = key.rpartition(".")[0] + ".qkv_bias"
        made[qkv] = tensors[qkv]
    return made


def culprit_of(model: Path, tensors: Tensors) -> dict[str, Any]:
    culprit: dict[str, Any] = judged(model, tensors)["culprit"]
    return culprit


BF16 = ml_dtypes.bfloat16
# positions and frequencies -> angles of a wrong program, and what is said of it
ANGLES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], str]] = {
    "angles in bfloat16": (lambda p, f: (p * f).astype(BF16), "as if the angles were in bfloat16"),
    "angles in float16": (lambda p, f: (p * f).astype(np.float16), "as if the angles were in float16"),
    "both in bfloat16": (
        lambda p, f: (p * f.astype(BF16).astype(np.float32)).astype(BF16),
        "as if the inverse frequencies and the angles were in bfloat16",
    ),
    "positions in bfloat16": (
        lambda p, f: (300 + p).astype(BF16).astype(np.float32) * f,
        "as if the positions were in bfloat16",
    ),
    "another theta": (
        lambda p, f: p * np.float32(1e4) ** (-np.arange(f.size, dtype=np.float32) / f.size),
        "as if rope_theta were 10000, not 1000000",
    ),
    "every other token": (lambda p, f: 2 * p * f, "from token 1 on as at positions 2, 4, 6, ..."),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("case", ANGLES)
@pytest.mark.parametrize("lacking", [(), ("rope_angle",), TABLES], ids=named)
def test_why_angles_are_wrong_is_said_from_any_stage_that_shows_it(
    made: Path, case: str, lacking: tuple[str, ...]
) -> None:
    model, tensors = run_of(made, "qwen3-float32", "")
    angles, hint = ANGLES[case]
    positions = np.arange(24, dtype=np.float32)[:, None]
    wrong = rotated(tensors, angles(positions, tensors["inv_freq"]).astype(np.float32))
    assert culprit_of(model, without(wrong, lacking))["hint"] == hint
    assert judged(model, rotated(tensors, positions * tensors["inv_freq"]))["culprit"] is None  # the right twin


# -- settings of a config that were lost --------------------------------------------------------------------------


def frequencies_of(config: Model) -> np.ndarray:
    backend = JaxBackend()
    c = config.config("float32")
    options = {"head_dim": c.head_dim, "rope_theta": c.rope_theta, "rope_type": c.rope_type}
    at = backend.put(np.array([23], np.int32))
    return backend.get(backend.forward["inv_freq"](at, **options, rope_parameters=c.rope_parameters))


LLAMA3 = MODELS["qwen3-llama3"].rope
# The model's RoPE, a wrong program's frequencies and factor of cos and sin, and what is said of them.
LOST: dict[str, tuple[Mapping[str, Any], Callable[[np.ndarray, float], tuple[np.ndarray, float]], str]] = {
    "llama3 with Llama's own factor": (
        LLAMA3,
        lambda f, s: (frequencies_of(Model(rope={**LLAMA3, "factor": 8.0})), s),
        "as if factor were 8, not 32",
    ),
    "linear, not scaled": (
        LINEAR,
        lambda f, s: (f * np.float32(3), s),
        "as if the frequencies were not scaled (rope_type linear)",
    ),
    "yarn, attention factor squared": (YARN, lambda f, s: (f, s * s), "as if the attention factor were applied twice"),
    "yarn, no attention factor": (YARN, lambda f, s: (f, 1.0), "as if the attention factor were left out"),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("lacking", [(), ("inv_freq",), ("inv_freq", "rope_angle"), TABLES], ids=named)
def test_a_setting_of_the_config_that_was_lost_is_named(case: str, lacking: tuple[str, ...], tmp_path: Path) -> None:
    rope, change, hint = LOST[case]
    shape = Model(rope=rope, layers=1)
    model, config = write_model(tmp_path / "model", shape, "float32"), shape.config("float32")
    right = frequencies_of(shape)
    with open_checkpoint(model) as checkpoint:
        results = Forwarder(TorchBackend(), config, checkpoint).run(TOKENS, stages=["qkv_bias", "q_norm", "k_norm"])
        tensors = {f"layers.{r.layer}.{r.stage}": r.array for r in results}
    positions = np.arange(24, dtype=np.float32)[:, None]
    for f, scale, expected in ((right, config.attention_factor, None), (*change(right, config.attention_factor), hint)):
        made = rotated(tensors, positions * f, scale) | {"inv_freq": f}
        culprit = judged(model, without(made, lacking))["culprit"]
        assert (culprit and culprit["hint"]) == expected
        if culprit and not lacking:
            assert culprit["stage"] == ("inv_freq" if f is not right else "rope_cos")


def test_a_decode_that_multiplies_where_prefill_divides_says_from_which_token(tmp_path: Path) -> None:
    shape = Model(rope={**LINEAR, "factor": 4.0}, layers=1)
    model = write_model(tmp_path / "model", shape, "float32")
    f, positions = frequencies_of(shape), np.arange(24, dtype=np.float32)[:, None]
    angle = positions * f * np.where(positions < 16, 1, 16).astype(np.float32)
    document = judged(model, {"inv_freq": f, "rope_angle": np.concatenate((angle, angle), axis=1)})
    culprit = document["culprit"]
    assert culprit["stage"] == "rope_angle"
    assert culprit["hint"] == "from token 16 on as at positions 256, 272, 288, ..."


def test_judging_rope_imports_no_framework() -> None:
    done = fresh("import sys, stages.judge.rope; assert not {'torch', 'jax'} & sys.modules.keys()")
    assert done.returncode == 0, done.stderr
