"""Two checkpoints: each status by a mutant that earns it, labels that nobody believes, and bounded memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import DOWN, EMBED, GATE, HEAD, K_PROJ, fresh, one_line, some, tensors_of, with_json, with_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.files.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, open_checkpoint
from stages.files.jsonio import to_json
from stages.files.tensorfile import write_tensors
from stages.jobs.synth import config_json
from stages.judge import checkpoints as checkpoint_diff
from stages.judge.checkpoints import SCHEMA, Status, diff_checkpoints
from stages.judge.document import EXIT_CODES

BF16 = np.dtype(ml_dtypes.bfloat16)
V_PROJ = K_PROJ.replace("k_proj", "v_proj")
LAST_NORM = "model.norm.weight"


@pytest.fixture
def other(model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint (tied, bfloat16), to be changed."""
    return Path(shutil.copytree(model, tmp_path / "other"))


def compare(a: Path, b: Path, **options: Any) -> dict[str, Any]:
    with open_checkpoint(a) as x, open_checkpoint(b) as y:
        document = diff_checkpoints(x, y, **options)
    assert document["schema"] == SCHEMA
    assert document["outcome"] in EXIT_CODES
    assert json.loads(to_json(document))
    assert sum(document["counts"].values()) == len(document["rows"])
    one_line(ValueError(document["verdict"]))
    return document


def row(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (r for r in document["rows"] if r["tensor"] == name)
    return found


def apart(document: dict[str, Any]) -> dict[str, str]:
    """Tensors that are not identical, and what they are."""
    return {r["tensor"]: r["status"] for r in document["rows"] if r["status"] != Status.IDENTICAL}


def small(folder: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    """A folder with these tensors, of no model: `diff_checkpoints` asks for none."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({**config_json("tiny"), **changes}))
    write_tensors(folder / WEIGHTS, tensors)
    return folder


def statuses(folder: Path, a: np.ndarray, b: np.ndarray) -> tuple[str, str]:
    """Status of one tensor, both ways round."""
    x, y = small(folder / "x", {"w": a}), small(folder / "y", {"w": b})
    return compare(x, y)["rows"][0]["status"], compare(y, x)["rows"][0]["status"]


# Agreement


def test_a_checkpoint_agrees_with_its_copy(model: Path, other: Path) -> None:
    document = compare(model, other)
    assert document["outcome"] == "agree"
    assert {r["status"] for r in document["rows"]} == {Status.IDENTICAL}
    assert document["coverage"] == {"compared": len(document["rows"]), "expected": len(document["rows"])}
    assert document["config"] == {"understood": True, "reason": None, "differences": []}
    assert document["rows"][0]["tensor"] == EMBED  # in state-dict order


def test_shards_are_one_checkpoint(model: Path, other: Path) -> None:
    tensors = tensors_of(other / WEIGHTS)
    (other / WEIGHTS).unlink()
    names = list(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, mine in parts.items():
        write_tensors(other / file, {name: tensors[name] for name in mine})
    weight_map = {name: file for file, mine in parts.items() for name in mine}
    (other / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert compare(model, other)["outcome"] == "agree"


def upcast(folder: Path) -> None:
    with_tensors(folder / WEIGHTS, lambda t: t.update({n: x.astype(np.float32) for n, x in t.items()}))


def test_an_exact_upcast_agrees(model: Path, other: Path) -> None:
    upcast(other)
    with_json(other / CONFIG, lambda c: c.update(dtype="float32"))
    document = compare(model, other)
    assert document["outcome"] == "agree"
    assert {r["status"] for r in document["rows"]} == {Status.DTYPE}
    fields = [{"field": "dtype", "a": "bfloat16", "b": "float32", "changes_computation": False}]
    assert document["config"]["differences"] == fields


def test_an_upcast_with_one_bit_more_differs(model: Path, other: Path) -> None:
    upcast(other)

    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors[GATE].view(np.uint32)[5, 6] ^= 1

    with_tensors(other / WEIGHTS, flip)
    document = compare(model, other)
    assert document["outcome"] == "diverged"
    found = row(document, GATE)
    assert (found["status"], found["mismatched"], found["max_abs_index"]) == (Status.DIFFERENT, 1, [5, 6])


def test_a_config_dtype_that_would_cast_the_weights_counts(model: Path, other: Path) -> None:
    with_json(other / CONFIG, lambda c: c.update(dtype="float32"))  # the tensors stay bfloat16
    document = compare(model, other)
    assert document["outcome"] == "diverged"
    assert document["config"]["differences"][0]["changes_computation"] is True


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_of_equal_values(tmp_path: Path, dtype: type) -> None:
    x = np.float32([[0, -0.0, 1.5], [np.inf, np.nan, -2]])
    assert statuses(tmp_path, x, x.astype(dtype)) == (Status.DTYPE, Status.DTYPE)


def test_a_nan_is_no_number(tmp_path: Path) -> None:
    assert statuses(tmp_path, np.float32([np.nan, 1]), np.float64([2, 1])) == (Status.DIFFERENT,) * 2


def test_the_sign_of_zero_is_a_value(tmp_path: Path) -> None:
    assert statuses(tmp_path, np.float32([0.0]), np.float64([-0.0])) == (Status.DIFFERENT,) * 2


def test_a_nan_payload_in_one_dtype_is_a_difference(tmp_path: Path) -> None:
    a, b = (np.uint32([bits, 0]).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert statuses(tmp_path, a, b) == (Status.DIFFERENT,) * 2


def test_integers_that_no_dtype_joins_are_not_believed(tmp_path: Path) -> None:
    assert statuses(tmp_path, np.int64([1]), np.float32([1])) == (Status.DIFFERENT,) * 2
    assert statuses(tmp_path / "x", np.int32([1]), np.float32([1])) == (Status.DTYPE,) * 2


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3, 2)])
def test_odd_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    assert statuses(tmp_path, x, x) == (Status.IDENTICAL,) * 2


# Mutants


def test_one_changed_element_is_found(model: Path, other: Path) -> None:
    with_tensors(other / WEIGHTS, lambda t: t[DOWN].__setitem__((3, 5), 100))
    document = compare(model, other, top=2)
    assert document["outcome"] == "diverged"
    assert apart(document) == {DOWN: Status.DIFFERENT}
    found = row(document, DOWN)
    assert (found["mismatched"], found["max_abs_index"], found["max_abs_b"]) == (1, [3, 5], 100)
    assert len(found["top"]) == 1
    assert found["layer"] == 2
    assert DOWN in document["verdict"]


@pytest.mark.parametrize("name", [GATE, DOWN, K_PROJ])
def test_a_transposed_matrix_is_named(model: Path, other: Path, name: str) -> None:
    with_tensors(other / WEIGHTS, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    for a, b in ((model, other), (other, model)):
        document = compare(a, b)
        assert document["outcome"] == "diverged"
        assert apart(document) == {name: Status.TRANSPOSED}
    square = row(document, name)["shape_a"] == row(document, name)["shape_b"]
    assert square == (name == K_PROJ)
    assert ("square" in row(document, name)["note"]) == square


def test_a_transposed_matrix_in_another_dtype(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert statuses(tmp_path, x, np.ascontiguousarray(x.T).astype(BF16)) == (Status.TRANSPOSED,) * 2


def test_a_symmetric_matrix_is_identical(tmp_path: Path) -> None:
    assert statuses(tmp_path, np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)) == (Status.IDENTICAL,) * 2


def test_swapped_shapes_without_the_transposes_values(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    y = x.reshape(4, 3) + 1
    a, b = small(tmp_path / "a", {"w": x}), small(tmp_path / "b", {"w": y})
    found = compare(a, b)["rows"][0]
    assert found["status"] == Status.DIFFERENT
    assert found["against_transpose"] is True
    assert found["max_abs"] == np.abs(x - y.T).max()
    assert "swapped" in found["note"]
    same = compare(a, small(tmp_path / "c", {"w": x.reshape(4, 3)}))["rows"][0]
    assert same["status"] == Status.SHAPE
    assert "the same bytes in the same order, only the label of the shape differs" in same["note"]


def test_a_transpose_with_one_element_changed_is_different_and_says_what_it_is_near(model: Path, other: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[K_PROJ] = np.ascontiguousarray(tensors[K_PROJ].T)
        tensors[K_PROJ][0, 1] += np.asarray(0.5, BF16)

    with_tensors(other / WEIGHTS, change)
    found = row(compare(model, other), K_PROJ)
    assert found["status"] == Status.DIFFERENT
    assert "transpose is much nearer" in found["note"]


def test_a_label_is_not_believed(model: Path, other: Path) -> None:
    labels = {"transposed": "true", f"{K_PROJ}.transposed": "true", "layout": "in out"}
    write_tensors(other / WEIGHTS, tensors_of(other / WEIGHTS), metadata=labels)
    with_json(other / CONFIG, lambda c: c.update(transposed=True))
    assert compare(model, other)["outcome"] == "agree"
    with_tensors(other / WEIGHTS, lambda t: t[K_PROJ].__setitem__((0, 0), 9))
    write_tensors(other / WEIGHTS, tensors_of(other / WEIGHTS), metadata=labels)
    assert apart(compare(model, other)) == {K_PROJ: Status.DIFFERENT}


def test_a_shape_alone_is_not_believed(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    assert statuses(tmp_path, x, np.ascontiguousarray(x[::-1].T)) == (Status.DIFFERENT,) * 2
    assert statuses(tmp_path / "x", x, np.zeros((4, 3), np.float32)) == (Status.DIFFERENT,) * 2


def test_swapped_tensors_both_differ(model: Path, other: Path) -> None:
    with_tensors(other / WEIGHTS, lambda t: t.update({K_PROJ: t[V_PROJ], V_PROJ: t[K_PROJ]}))
    assert apart(compare(model, other)) == {K_PROJ: Status.DIFFERENT, V_PROJ: Status.DIFFERENT}


@pytest.mark.parametrize("shape", [(13,), (4, 3), (12, 1), (3, 2, 2), ()])
def test_shapes_that_no_transposition_explains(tmp_path: Path, shape: tuple[int, ...]) -> None:
    a, b = np.zeros(12, np.float32), np.zeros(shape, np.float32)
    assert statuses(tmp_path, a, b) == (Status.SHAPE,) * 2


def test_a_row_and_a_column_are_transposes(tmp_path: Path) -> None:
    x = np.arange(5, dtype=np.float32)
    assert statuses(tmp_path, x[None], x[:, None]) == (Status.TRANSPOSED,) * 2


def test_missing_and_extra_tensors(model: Path, other: Path) -> None:
    with_tensors(other / WEIGHTS, lambda t: t.pop(GATE))
    document = compare(model, other)
    assert (document["outcome"], apart(document)) == ("diverged", {GATE: Status.MISSING})
    assert document["coverage"]["compared"] == document["coverage"]["expected"] - 1
    assert (row(document, GATE)["shape_a"], row(document, GATE)["shape_b"]) == ([192, 64], None)
    document = compare(other, model)
    assert (document["outcome"], apart(document)) == ("diverged", {GATE: Status.EXTRA})


def test_a_renamed_tensor_is_missing_and_extra(model: Path, other: Path) -> None:
    with_tensors(other / WEIGHTS, lambda t: t.update({"other.name": t.pop(LAST_NORM)}))
    assert apart(compare(model, other)) == {LAST_NORM: Status.MISSING, "other.name": Status.EXTRA}


def test_nothing_compared_is_no_agreement(tmp_path: Path) -> None:
    document = compare(small(tmp_path / "a", {}), small(tmp_path / "b", {}))
    assert document["outcome"] == "incomplete"
    assert "Nothing" in document["verdict"]


# Tied embeddings


def untie(folder: Path, head: np.ndarray | None) -> None:
    with_json(folder / CONFIG, lambda c: c.update(tie_word_embeddings=False))
    if head is not None:
        with_tensors(folder / WEIGHTS, lambda t: t.update({HEAD: head}))


def test_a_tied_head_equals_a_stored_copy(model: Path, other: Path) -> None:
    untie(other, tensors_of(model / WEIGHTS)[EMBED])
    for a, b, who in ((model, other, "a ties"), (other, model, "b ties")):
        document = compare(a, b)
        assert document["outcome"] == "agree"
        assert apart(document) == {HEAD: Status.TIED}
        assert who in row(document, HEAD)["note"]
        (field,) = document["config"]["differences"]
        assert (field["field"], field["changes_computation"]) == ("tie_word_embeddings", False)


def test_an_untied_head_with_other_values_differs(model: Path, other: Path) -> None:
    head = tensors_of(model / WEIGHTS)[EMBED]
    head[7, 8] += np.asarray(1, BF16)
    untie(other, head)
    for a, b in ((model, other), (other, model)):
        document = compare(a, b)
        assert document["outcome"] == "diverged"
        assert apart(document) == {HEAD: Status.DIFFERENT}
        assert row(document, HEAD)["max_abs_index"] == [7, 8]


def test_a_transposed_head_is_no_tied_one(model: Path, other: Path) -> None:
    untie(other, np.ascontiguousarray(tensors_of(model / WEIGHTS)[EMBED].T))
    assert apart(compare(model, other)) == {HEAD: Status.TRANSPOSED}


def test_a_head_that_is_neither_tied_nor_stored_is_missing(model: Path, other: Path) -> None:
    untie(other, None)
    document = compare(model, other)
    assert (document["outcome"], apart(document)) == ("diverged", {HEAD: Status.MISSING})
    assert apart(compare(other, model)) == {HEAD: Status.EXTRA}


def test_a_stored_head_that_tying_would_overrule_is_refused(model: Path, other: Path, tmp_path: Path) -> None:
    head = tensors_of(model / WEIGHTS)[EMBED][::-1].copy()
    untie(other, head)
    tied = Path(shutil.copytree(model, tmp_path / "tied"))
    with_tensors(tied / WEIGHTS, lambda t: t.update({HEAD: head}))
    with pytest.raises(InputError) as error:
        compare(tied, other)
    one_line(error.value, "tie_word_embeddings", HEAD)
    with_tensors(tied / WEIGHTS, lambda t: t.update({HEAD: t[EMBED]}))
    assert apart(compare(tied, other)) == {HEAD: Status.DIFFERENT}


# Configs

CHANGES: dict[str, tuple[str, Any]] = {
    "rope_parameters": ("rope_theta", {"rope_theta": 10000.0, "rope_type": "default"}),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
    "num_attention_heads": ("num_attention_heads", 2),
    "num_key_value_heads": ("num_key_value_heads", 1),
    "head_dim": ("head_dim", 64),
    "attention_bias": ("qkv_bias", True),
    "model_type": ("family", "qwen2"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_config_fields_that_change_the_computation(model: Path, other: Path, key: str) -> None:
    field, value = CHANGES[key]
    with_json(other / CONFIG, lambda c: c.update({key: value}))
    document = compare(model, other)
    assert document["outcome"] == "diverged"  # though every tensor is identical
    assert not apart(document)
    assert field in [d["field"] for d in document["config"]["differences"] if d["changes_computation"]]
    assert field in document["verdict"]


def test_scaled_rope_is_listed_with_its_parameters(model: Path, other: Path) -> None:
    rope = {"rope_theta": 1000000.0, "rope_type": "linear", "factor": 2.0}
    with_json(other / CONFIG, lambda c: c.update(rope_parameters=rope))
    differences = {d["field"]: (d["a"], d["b"]) for d in compare(model, other)["config"]["differences"]}
    assert differences == {"rope_type": ("default", "linear"), "rope_parameters": ({}, {"factor": 2.0})}


def test_config_fields_that_change_nothing(model: Path, other: Path) -> None:
    with_json(other / CONFIG, lambda c: c.update(max_position_embeddings=77, attention_dropout=0.5, use_cache=False))
    document = compare(model, other)
    assert document["outcome"] == "agree"
    assert [d["field"] for d in document["config"]["differences"]] == ["max_position_embeddings"]


def test_a_refused_config_is_no_agreement(model: Path, other: Path) -> None:
    with_json(other / CONFIG, lambda c: c.update(hidden_act="gelu"))
    document = compare(model, other)
    assert document["outcome"] == "incomplete"
    assert "hidden_act" in document["config"]["reason"]
    differences = [{"field": "hidden_act", "a": "silu", "b": "gelu", "changes_computation": None}]
    assert document["config"]["differences"] == differences
    with_tensors(other / WEIGHTS, lambda t: t.pop(GATE))
    assert compare(model, other)["outcome"] == "diverged"


# Blocks, progress and memory


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.integers(1, 64),
    seed=st.integers(0, 3),
    turned=st.booleans(),
    data=st.data(),
)
def test_any_cut_into_blocks_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    block: int,
    seed: int,
    turned: bool,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    y = x.copy()
    changed = data.draw(st.one_of(st.none(), st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))))
    if changed:
        y[changed] += 1
    stored = np.ascontiguousarray(y.T) if turned else y
    a, b = small(folder / "a", {"w": x}), small(folder / "b", {"w": stored})
    whole = compare(a, b)["rows"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_diff, "BLOCK_BYTES", block)
        cut = compare(a, b)["rows"]
    for name in ("rel_l2", "rms", "cosine", "mean_abs"):  # sums, taken in another order
        assert cut[0].pop(name, 0.0) == pytest.approx(whole[0].pop(name, 0.0), rel=1e-12)
    # A difference of two sums: it loses digits where the mean is large beside the deviation.
    ratios = [rows[0].pop("std_ratio", None) for rows in (cut, whole)]
    assert (ratios[0] or 0.0) == pytest.approx(ratios[1] or 0.0, rel=1e-6)
    cut[0].pop("note"), whole[0].pop("note")  # has rel_l2 in it
    assert cut == whole
    if not changed:
        flat = shape == (1, 1) or not turned or np.array_equal(x, x.T)
        assert whole[0]["status"] == (Status.IDENTICAL if flat else Status.TRANSPOSED)
    elif not turned or shape[0] != shape[1]:
        assert whole[0]["status"] == Status.DIFFERENT
        assert whole[0]["max_abs_index"] == list(changed)
        assert whole[0]["mismatched"] == 1


def test_progress_rises_from_zero(model: Path, other: Path) -> None:
    told: list[tuple[str, float]] = []
    compare(model, other, progress=lambda label, done: told.append((label, done)))
    fractions = [done for _, done in told]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] < 1
    assert EMBED in told[0][0]


def test_every_tensor_is_read_on_both_sides(model: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[tuple[Path, str]] = set()
    original = Checkpoint.read

    def spy(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        read.add((self.path, name))
        return original(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read", spy)
    rows = compare(model, other)["rows"]
    assert read == {(path, r["tensor"]) for path in (model, other) for r in rows}


MEMORY = """
import re, sys
from stages.files.checkpoint import open_checkpoint
from stages.judge.checkpoints import diff_checkpoints

def peak():
    # not ru_maxrss, which a child has from its parent
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = peak()
with open_checkpoint(sys.argv[1]) as a, open_checkpoint(sys.argv[2]) as b:
    document = diff_checkpoints(a, b)
print(document["rows"][0]["status"], peak() - before)
"""


@pytest.mark.parametrize("square", some([False, True], [False]))
def test_memory_is_bounded_by_blocks_not_by_tensors(tmp_path: Path, square: bool) -> None:
    shape = (5120, 5120) if square else (102_400, 256)  # 105 MB
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    small(tmp_path / "a", {"w": x})
    small(tmp_path / "turned", {"w": np.ascontiguousarray(x.T)})
    x[-1, -1] += 1
    small(tmp_path / "changed", {"w": x})
    for a, b, expected in (
        ("a", "turned", Status.TRANSPOSED),
        ("turned", "a", Status.TRANSPOSED),
        ("changed", "turned", Status.DIFFERENT),
        ("a", "changed", Status.DIFFERENT),
    ):
        result = fresh(MEMORY, tmp_path / a, tmp_path / b)
        assert result.returncode == 0, result.stderr
        status, megabytes = result.stdout.split()
        assert status == expected
        assert float(megabytes) < 100, f"{a} and {b}: one tensor alone is 105 MB"
