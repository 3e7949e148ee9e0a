"""`svf diff` of GGUF with its source: right blocks of every quantiser pass, and each mistake is named by its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from forward_models import LLAMA3, MODELS, Model, random_weights, write_model
from gguf_files import paired, write_gguf
from helpers import svf
from quantisers import quantised

from stages.files.gguf_file import block_sizes
from stages.judge.quantised import LAYOUTS, Found, cause, exactly, intervals
from stages.spec.config import LM_HEAD

RNG = np.random.default_rng(1)
NORMAL = 0.02 * RNG.standard_normal((32, 1024))
MAGNITUDES = 10.0 ** RNG.uniform(-6, 0, (32, 32)).repeat(32, axis=1)
# As weights are, and as they rarely are: all are rows of 1,024.
WEIGHTS = {
    "normal": NORMAL,
    "heavy": 0.02 * RNG.standard_t(2, NORMAL.shape),
    "positive": RNG.uniform(0.5, 1, NORMAL.shape),
    "subnormal scales": 5e-5 * NORMAL,
    "blocks of all sizes": 50 * NORMAL * MAGNITUDES,
    "nearly all zero": np.where(RNG.random(NORMAL.shape) < 0.9, 0, NORMAL),
    "outliers": np.where(RNG.random(NORMAL.shape) < 0.003, 5, NORMAL),
    "blocks of zeros": np.where(np.arange(1024) < 512, 0, NORMAL),
}
WEIGHTS = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
IMPORTANCE = {
    "none": None,
    "mild": np.exp(RNG.standard_normal(1024)),
    "of all sizes": 10.0 ** RNG.uniform(-3, 3, 1024),
}
FITTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def found_in(kind: str, raw: np.ndarray, weights: np.ndarray) -> Found:
    found = Found(kind)
    for row in range(0, len(raw), 10):
        found.add(row, intervals(raw[row : row + 10], kind), exactly(weights[row : row + 10]))
    return found


def cause_of(found: Found, raw: np.ndarray, weights: np.ndarray) -> str:
    return cause(found, lambda start, stop: raw[start:stop], lambda start, stop: weights[start:stop])


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_right_block_is_accused(kind: str, importance: str) -> None:
    for name, weights in WEIGHTS.items():
        raw = quantised(kind, weights, IMPORTANCE[importance])
        found = found_in(kind, raw, weights)
        assert found.blocks == weights.size // block_sizes()[kind][0]
        if kind not in FITTED or importance == "none":
            assert found.right, (name, found)
            continue
        assert found.right or (found.fitted and not cause_of(found, raw, weights)), (name, found)
        raw.reshape(-1, block_sizes()[kind][1])[700] = 7
        found = found_in(kind, raw, weights)
        assert not found.fitted
        assert not found.right


@pytest.mark.parametrize("kind", LAYOUTS)
def test_nor_one_that_went_by_a_file_of_16_bits(kind: str) -> None:
    for by in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16):
        between = gguf.dequantize(gguf.quantize(WEIGHTS["heavy"], by), by)
        assert found_in(kind, quantised(kind, between), WEIGHTS["heavy"]).right


def blocks_of(kind: str, raw: np.ndarray) -> np.ndarray:
    return raw.reshape(-1, block_sizes()[kind][1])


def scales(kind: str) -> np.ndarray:
    own = np.ones(block_sizes()[kind][1], bool)
    for part in LAYOUTS[kind].codes:
        own[part] = False
    return own


def swapped(kind: str, blocks: np.ndarray, at: Any) -> str:
    part = LAYOUTS[kind].nibbles
    assert part is not None
    blocks[at, part] = (blocks[at, part] << 4) | (blocks[at, part] >> 4)
    return "the two codes in each byte are swapped"


def shifted(kind: str, blocks: np.ndarray, at: Any) -> str:
    own = scales(kind)
    if isinstance(at, int):
        blocks[at, own] = blocks[at + 1, own]
        return "it holds the scale of block "
    blocks[:, own] = np.roll(blocks[:, own], 1, axis=0)
    return "each block holds the scale of the previous one"


def zeroed(kind: str, blocks: np.ndarray, at: Any) -> str:
    blocks[at] = 0
    return "it holds zeros alone"


# Of those that the bytes can hold: two codes in one, and scales that differ from their neighbours'.
MISTAKES = [
    (kind, fault)
    for kind, layout in LAYOUTS.items()
    for fault in (swapped, shifted, zeroed)
    if not (fault is swapped and layout.nibbles is None) and not (fault is shifted and kind == "MXFP4")
]


@pytest.mark.parametrize(("kind", "fault"), MISTAKES)
def test_each_mistake_of_bytes_is_found_and_named(kind: str, fault: Callable[..., str]) -> None:
    weights, each = WEIGHTS["normal"], 1024 // block_sizes()[kind][0]
    for at in (2 * each + 1, slice(None)):
        raw = quantised(kind, weights).copy()
        text = fault(kind, blocks_of(kind, raw), at)
        found = found_in(kind, raw, weights)
        assert not found.right
        assert text in (cause_of(found, raw, weights) or "nothing")
        if isinstance(at, int):
            first, size = found.place(), block_sizes()[kind][0]
            assert (found.wrong, first["row"], first["block"]) == (1, 2, 1)
            assert first["columns"] == [size, 2 * size - 1]


def density(kind: str) -> float:
    block, width = block_sizes()[kind]
    return width / block


PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b and density(a) == density(b)]


@pytest.mark.parametrize(("kind", "real"), PAIRS)
def test_another_type_s_bytes_are_named(kind: str, real: str) -> None:
    raw = quantised(real, WEIGHTS["normal"])
    found = found_in(kind, raw, WEIGHTS["normal"])
    assert found.wrong > 0.9 * found.blocks
    assert cause_of(found, raw, WEIGHTS["normal"]) == f"the bytes are {real}'s"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_first_version_s_order_of_codes_is_named(kind: str) -> None:
    raw = quantised(kind, WEIGHTS["normal"]).copy()
    codes = blocks_of(kind, raw)[:, LAYOUTS[kind].nibbles]
    both = np.concatenate([codes & 15, codes >> 4], axis=1)
    codes[:] = both[:, ::2] | (both[:, 1::2] << 4)
    found = found_in(kind, raw, WEIGHTS["normal"])
    assert "as in the first versions" in cause_of(found, raw, WEIGHTS["normal"])


SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 256, "intermediate": 512, "layers": 1}
LLAMA = dataclasses.replace(MODELS["llama"], rope=LLAMA3, **SIZES)
QWEN = dataclasses.replace(LLAMA, family="qwen3", rope=MODELS["qwen3"].rope)
DOWN, GATE, O_PROJ = (
    f"model.layers.0.{name}.weight" for name in ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj")
)


def compared(*sides: Path, code: int) -> dict[str, Any]:
    done = svf("diff", *sides, "--json")
    assert done.code == code, done.out + done.err
    return dict(done.json)


def odd(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {r["tensor"]: r for r in document["rows"] if r["status"] not in ("identical", "dtype", "quantised")}


def stored(kind: str, model: Model, dtype: str = "float32", family: str | None = None) -> dict[str, np.ndarray]:
    """The rows of each matrix as a right quantiser makes them, turned as a family's are: the model's own."""
    config = model.config(dtype)
    turned = dataclasses.replace(config, family=family or config.family)
    matrices = {n: a.astype(np.float32) for n, a in random_weights(config).items() if a.ndim > 1}
    return {name: quantised(kind, paired(name, array, turned)) for name, array in matrices.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K"])
def test_a_right_file_agrees_with_its_folder(kind: str, dtype: str, tmp_path: Path) -> None:
    raw = stored(kind, LLAMA, dtype)
    file = write_gguf(tmp_path / "m.gguf", LLAMA, dtype, kind=kind, raw=raw)
    folder = write_model(tmp_path / "hf", LLAMA, dtype)
    document = compared(file, folder, code=0)
    assert (document["outcome"], odd(document)) == ("agree", {})
    assert not any(d["changes_computation"] for d in document["config"]["differences"])
    exact = "identical" if kind == {"float32": "F32", "bfloat16": "BF16"}[dtype] else None
    status = exact or ("dtype" if kind == "F32" else "quantised")
    (row,) = (r for r in document["rows"] if r["tensor"] == DOWN)
    assert row["status"] == status or (kind, dtype, row["status"]) == ("F16", "bfloat16", "dtype")
    assert compared(folder, file, code=0)["outcome"] == "agree"


def test_two_files_of_one_model_agree_whatever_their_types(tmp_path: Path) -> None:
    kinds = ("Q8_0", "Q4_K", "Q6_K")
    files = {k: write_gguf(tmp_path / f"{k}.gguf", LLAMA, kind=k, raw=stored(k, LLAMA)) for k in kinds}
    assert compared(files["Q8_0"], files["Q4_K"], code=0)["counts"]["quantised"] > 0
    assert compared(files["Q4_K"], files["Q6_K"], code=0)["outcome"] == "agree"
    assert compared(files["Q4_K"], files["Q4_K"], code=0)["counts"]["identical"] == 12
    other = write_gguf(tmp_path / "other.gguf", LLAMA, kind="Q8_0", seed=1)
    assert compared(files["Q4_K"], other, code=1)["counts"]["different"] > 0


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("model", [LLAMA, QWEN], ids=["llama", "qwen3"])
def test_rows_turned_in_another_family_s_way_are_named(kind: str, model: Model, tmp_path: Path) -> None:
    raw = stored(kind, model, family="qwen3" if model is LLAMA else "llama")
    file = write_gguf(tmp_path / "m.gguf", model, kind=kind, raw=raw)
    found = odd(compared(file, write_model(tmp_path / "hf", model, "float32"), code=1))
    statuses = {name.split(".")[-2]: row["status"] for name, row in found.items()}
    assert statuses == {"q_proj": "permuted", "k_proj": "permuted"}


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
def test_a_transposed_square_and_wrong_blocks_are_named_with_their_place(kind: str, tmp_path: Path) -> None:
    raw = {name: rows.copy() for name, rows in stored(kind, LLAMA).items()}
    raw[O_PROJ] = quantised(kind, random_weights(LLAMA.config())[O_PROJ].T)
    if kind != "F32":
        blocks = blocks_of(kind, raw[GATE])
        blocks[7] = blocks[8]
    file = write_gguf(tmp_path / "m.gguf", LLAMA, kind=kind, raw=raw)
    folder = write_model(tmp_path / "hf", LLAMA, "float32")
    for sides in ((file, folder), (folder, file)):
        found = odd(compared(*sides, code=1))
        assert found[O_PROJ]["status"] == "transposed"
        if kind != "F32":
            each = 256 // block_sizes()[kind][0]
            first = found[GATE]["quantised"]["first"]
            assert (first["row"], first["block"]) == (7 // each, 7 % each)
            assert f"1 of {len(blocks)} blocks hold other weights" in found[GATE]["note"]
        assert len(found) == 1 + (kind != "F32")


def test_a_type_without_a_bound_is_not_judged(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", LLAMA, kind="IQ3_S", raw=stored("IQ3_S", LLAMA))
    document = compared(file, write_model(tmp_path / "hf", LLAMA, "float32"), code=5)
    assert document["outcome"] == "incomplete"
    assert {r["status"] for r in document["rows"]} == {"identical", "unjudged"}


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_16_bit_number_that_is_not_the_nearest_is_told(kind: str, tmp_path: Path) -> None:
    raw = stored(kind, LLAMA)
    raw[GATE].view(np.uint16)[5, 9] += 1  # one unit further from 0
    file = write_gguf(tmp_path / "m.gguf", LLAMA, kind=kind, raw=raw)
    found = odd(compared(file, write_model(tmp_path / "hf", LLAMA, "float32"), code=1))
    assert {name: row["quantised"]["first"]["row"] for name, row in found.items()} == {GATE: 5}
    assert found[GATE]["quantised"]["first"]["columns"] == [9, 9]


def test_what_is_wrong_is_shown_before_what_agrees(tmp_path: Path) -> None:
    raw = stored("Q8_0", LLAMA, "bfloat16")
    raw[LM_HEAD] = raw[LM_HEAD][::-1].copy()  # the last tensor of all
    file = write_gguf(tmp_path / "m.gguf", LLAMA, "bfloat16", kind="Q8_0", raw=raw)
    shown = svf("diff", file, write_model(tmp_path / "hf", LLAMA, "bfloat16")).out.splitlines()
    assert shown[2].startswith(LM_HEAD)
    assert any("input_layernorm" in line for line in shown)  # float32 in the file: equal in another dtype
    assert any(line.startswith("Q8_0: 8 tensors, ") for line in shown)
