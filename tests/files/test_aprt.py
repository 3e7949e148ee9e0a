"""APRT stage files: the format's bytes, every refusal, trees written whole or not at all, the flat comparison."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import fresh, one_line, tree
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stages.errors import IncompleteError, InputError, NotFoundError, OutputError
from stages.files import aprt
from stages.files.aprt import WHOLE_MODEL, AprtFile, AprtTree, is_aprt, is_aprt_tree, write_aprt, write_tree
from stages.judge.aprt import compare_files
from stages.judge.metrics import same_bits

BF16 = np.dtype(ml_dtypes.bfloat16)
NAN_BITS = np.uint32([0x7F800001, 0x7FC00000, 0xFFC12345, 0x7FBFFFFF, 0x80000000, 0x7F800000, 1])


def file_of(folder: Path, values: np.ndarray, layer: int | None = None, name: str = "x.bin") -> AprtFile:
    folder.mkdir(exist_ok=True)
    write_aprt(folder / name, layer, values)
    return AprtFile(folder / name)


# The format


def test_golden_bytes_of_a_layers_stage(tmp_path: Path) -> None:
    write_aprt(tmp_path / "ffn_gate.bin", 3, np.float32([[1, -2], [0.5, -0.0]]))
    data = b"APRT" + bytes.fromhex("03000000 04000000 0000803f 000000c0 0000003f 00000080")
    assert (tmp_path / "ffn_gate.bin").read_bytes() == data


def test_golden_bytes_of_a_whole_model_stage(tmp_path: Path) -> None:
    write_aprt(tmp_path / "final_norm.bin", None, np.float32([1]))
    assert (tmp_path / "final_norm.bin").read_bytes() == b"APRT" + bytes.fromhex("ffffffff 01000000 0000803f")


def test_the_header_that_apr_wrote_is_read(tmp_path: Path) -> None:
    # The first 16 bytes of layer-0/embedding.bin for 7 tokens of Qwen2.5-Coder-7B, as that project's notes print them.
    (tmp_path / "layer-0").mkdir()
    start = bytes.fromhex("41505254 00000000 00620000 0000e9ba")
    (tmp_path / "layer-0" / "embedding.bin").write_bytes(start + bytes(100364 - 16))
    file = AprtFile(tmp_path / "layer-0" / "embedding.bin")
    assert (file.layer, file.count, file.place) == (0, 7 * 3584, (None, "embedding"))
    assert file.read(0, 1).tobytes() == start[12:]


@given(
    values=arrays.arrays(np.uint32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)),
    layer=st.one_of(st.none(), st.integers(0, WHOLE_MODEL - 1)),
    data=st.data(),
)
def test_every_bit_comes_back(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, layer: int | None, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("aprt") / "attn_out.bin"
    write_aprt(path, layer, values.view(np.float32))
    assert path.stat().st_size == 12 + 4 * values.size
    file = AprtFile(path)
    assert (file.layer, file.count, file.stage) == (layer, values.size, "attn_out")
    start = data.draw(st.integers(0, values.size))
    stop = data.draw(st.integers(start, values.size))
    assert file.read(start, stop).view(np.uint32).tolist() == values.reshape(-1)[start:stop].tolist()


def test_nan_payloads_are_kept(tmp_path: Path) -> None:
    file = file_of(tmp_path, NAN_BITS.view(np.float32))
    assert file.read().view(np.uint32).tolist() == NAN_BITS.tolist()


def test_all_65536_bfloat16_are_upcast_exactly(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    file = file_of(tmp_path, bits.view(BF16))
    assert (file.read().view(np.uint32) == bits.astype(np.uint32) << 16).all()
    finite = np.isfinite(bits.view(BF16).astype(np.float32))
    assert (file.read()[finite] == bits.view(BF16).astype(np.float32)[finite]).all()


def test_all_65536_float16_are_widened_exactly_and_come_back(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = file_of(tmp_path, bits.view(np.float16)).read()
    nan = np.isnan(bits.view(np.float16))
    # By arithmetic: sign, and mantissa over its power of two; a subnormal has no hidden bit.
    sign, exponent, mantissa = bits >> 15, (bits >> 10 & 31).astype(int), (bits & 1023).astype(np.float64)
    value = np.where(exponent == 0, mantissa / 2.0**24, (1 + mantissa / 1024) * 2.0 ** (exponent - 15))
    value = np.where(exponent == 31, np.inf, value) * np.where(sign, -1.0, 1.0)
    assert (wide[~nan] == value[~nan]).all()
    assert (np.signbit(wide) == sign.astype(bool)).all()
    payload = wide.view(np.uint32)[nan]
    assert (payload >> 13 & 1023 == bits[nan] & 1023).all()
    assert (payload & 0x7F800000 == 0x7F800000).all()
    assert (wide[~nan].astype(np.float16).view(np.uint16) == bits[~nan]).all()


def test_blocks_and_copies_of_a_view_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aprt, "_BLOCK", 7)
    values = np.arange(60, dtype=np.float32).reshape(6, 10)
    file = file_of(tmp_path, values.T)  # row-major as seen, not as stored
    assert file.read().tolist() == values.T.reshape(-1).tolist()
    assert [start for start, _ in file.blocks(25)] == [0, 25, 50]
    assert np.concatenate([block for _, block in file.blocks(25)]).tolist() == file.read().tolist()
    assert same_bits(file_of(tmp_path, values.astype(BF16)).read(), values.reshape(-1))


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    file = file_of(tmp_path, np.float32([1, 2]))
    file.read()
    with pytest.raises(InputError):
        file.read(0, 3)
    assert len(os.listdir("/proc/self/fd")) == before


# What is refused


def test_more_elements_than_the_header_can_hold(tmp_path: Path) -> None:
    huge = np.broadcast_to(np.float32(0), (1 << 16, 1 << 16))  # 2^32 elements of one stored
    with pytest.raises(OutputError) as error:
        write_aprt(tmp_path / "x.bin", 0, huge)
    one_line(error.value, "4294967296", "4294967295")
    with pytest.raises(OutputError, match="4294967296"):
        write_tree(tmp_path / "out", [(0, "attn_scores", huge)])
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("layer", [-1, WHOLE_MODEL, 2**40])
def test_a_layer_the_header_cannot_hold(tmp_path: Path, layer: int) -> None:
    with pytest.raises(OutputError) as error:
        write_aprt(tmp_path / "x.bin", layer, np.float32([1]))
    one_line(error.value, str(layer))
    with pytest.raises(OutputError):
        write_tree(tmp_path / "out", [(layer, "attn_out", np.float32([1]))])
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("dtype", ["float64", ">f4", "int32", "uint32"])
def test_only_what_float32_holds_is_written(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(TypeError, match="APRT holds float32"):
        write_aprt(tmp_path / "x.bin", 0, np.zeros(2, dtype))
    assert tree(tmp_path) == {}


GOOD = struct.pack("<4sII2f", b"APRT", 0, 2, 1.0, 2.0)
BAD = {
    "empty": (b"", "too short"),
    "part of the magic": (b"APR", "too short"),
    "part of the header": (GOOD[:11], "too short"),
    "header alone": (GOOD[:12], "truncated"),
    "a byte less": (GOOD[:-1], "truncated"),
    "a byte more": (GOOD + b"\0", "what follows"),
    "an element more": (GOOD + bytes(4), "what follows"),
    "other magic": (b"APRX" + GOOD[4:], "begins with 'APRT'"),
    "lower case magic": (b"aprt" + GOOD[4:], "begins with 'APRT'"),
    "the model format": (b"APR\0" + GOOD[4:], "begins with 'APRT'"),
    "a short other file": (b"{}", "begins with 'APRT'"),
    "the largest count": (struct.pack("<4sII", b"APRT", 0, 2**32 - 1), str(12 + 4 * (2**32 - 1))),
    "big-endian": (struct.pack(">4sII2f", b"APRT", 0, 2, 1.0, 2.0), "truncated"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    data, words = BAD[name]
    path = tmp_path / "attn_out.bin"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        AprtFile(path)
    one_line(error.value, str(path), words)
    with pytest.raises(InputError):
        AprtTree(tmp_path)


@pytest.mark.faults
@given(data=st.binary(max_size=24))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("aprt") / "x.bin"
    for content in (data, b"APRT" + data):
        path.write_bytes(content)
        try:
            file = AprtFile(path)
        except InputError:
            continue
        layer = WHOLE_MODEL if file.layer is None else file.layer
        assert struct.pack("<4sII", b"APRT", layer, file.count) + file.read().tobytes() == content


@pytest.mark.faults
@pytest.mark.parametrize(("folder", "layer"), [("layer-1", 0), ("layer-0", None), ("layer-0", 1), ("layer-10", 1)])
def test_a_layer_that_its_folder_denies(tmp_path: Path, folder: str, layer: int | None) -> None:
    with pytest.raises(InputError) as error:
        file_of(tmp_path / folder, np.float32([1]), layer, "attn_out.bin")
    one_line(error.value, folder)
    with pytest.raises(InputError):
        AprtTree(tmp_path)


def test_the_folder_counts_from_inside_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "layer-1").mkdir()
    monkeypatch.chdir(tmp_path / "layer-1")
    write_aprt("x.bin", 2, np.float32([1]))
    with pytest.raises(InputError, match="layer-1"):
        AprtFile("x.bin")


def test_what_is_not_there_or_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    for name in ("none.bin", "pipe.bin", "."):
        with pytest.raises(NotFoundError):
            AprtFile(tmp_path / name)
    for path in (tmp_path / "none", tmp_path / "pipe.bin"):
        with pytest.raises(NotFoundError):
            AprtTree(path)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1), (4, None)])
def test_elements_that_are_not_there(tmp_path: Path, start: int, stop: int | None) -> None:
    with pytest.raises(InputError, match="has 3 elements"):
        file_of(tmp_path, np.float32([1, 2, 3])).read(start, stop)


@pytest.mark.faults
def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    file = file_of(tmp_path, np.float32([1, 2]))
    write_aprt(file.path, 1, np.float32([1, 2]))
    with pytest.raises(InputError, match="changed"):
        file.read()
    file.path.write_bytes(file.path.read_bytes()[:-4])
    with pytest.raises(InputError, match="truncated"):
        file.read()


@pytest.mark.faults
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(tmp_path, np.float32([1, 2]))

    def full(fd: int, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aprt, "write_all", full)
    with pytest.raises(OutputError, match="No space"):
        write_aprt(file.path, None, np.float32([3]))
    assert tree(tmp_path).keys() == {"x.bin"}
    assert file.read().tolist() == [1, 2]


# Trees


def stages() -> list[tuple[int | None, str, np.ndarray]]:
    """Some stages of two layers, as a forward run gives them."""
    rng = np.random.default_rng(0)
    shapes = {"attn_norm": (3, 4), "q_post_rope": (3, 2, 2), "attn_scores": (2, 3, 3)}
    found: list[tuple[int | None, str, np.ndarray]] = [
        (None, "inv_freq", rng.standard_normal(2, np.float32)),
        (None, "rope_cos", rng.standard_normal((3, 4), np.float32)),
        (None, "embedding", rng.standard_normal((3, 4), np.float32).astype(BF16)),
    ]
    found += [(n, s, rng.standard_normal(shape, np.float32)) for n in (0, 10) for s, shape in shapes.items()]
    found += [(None, "final_norm", rng.standard_normal((3, 4), np.float32))]
    return [*found, (None, "lm_head", rng.standard_normal((3, 7), np.float32))]


def test_where_a_trees_files_go(tmp_path: Path) -> None:
    written = write_tree(tmp_path / "out", stages())
    in_layers = {f"layer-{n}/{s}.bin" for n in (0, 10) for s in ("attn_norm", "q_post_rope", "attn_scores")}
    at_root = {f"{s}.bin" for s in ("inv_freq", "rope_cos", "final_norm", "lm_head")}
    assert tree(tmp_path / "out").keys() == in_layers | at_root | {"layer-0/embedding.bin"}
    assert written[None, "embedding"] == tmp_path / "out" / "layer-0" / "embedding.bin"
    assert all(path.is_file() for path in written.values())
    assert tree(tmp_path / "out")["layer-0/embedding.bin"][4:8] == bytes(4)
    assert os.listdir(tmp_path) == ["out"]


def test_a_tree_comes_back(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", stages())
    found = AprtTree(tmp_path / "out")
    assert found.extra == []
    assert list(found.files)[:2] == [(None, "embedding"), (None, "final_norm")]
    assert [layer for layer, _ in found.files][-6:] == [0] * 3 + [10] * 3
    assert found.files.keys() == {(layer, stage) for layer, stage, _ in stages()}
    for layer, stage, values in stages():
        expected = values[-1] if stage == "lm_head" else values.astype(np.float32).reshape(-1)
        assert same_bits(found.files[layer, stage].read(), expected), stage


def test_logits_of_one_token_are_written_whole(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", [(None, "lm_head", np.float32([1, 2, 3]))])
    assert AprtTree(tmp_path / "out").files[None, "lm_head"].read().tolist() == [1, 2, 3]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "", ".", "x.bin", "A", "attn_norm\n", "attn\0norm", "naïve"])
def test_a_name_never_becomes_a_path_unchecked(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as error:
        write_tree(tmp_path / "out", [(0, "attn_norm", np.float32([1])), (0, name, np.float32([1]))])
    one_line(error.value, "stage's name")
    assert tree(tmp_path) == {}
    assert os.listdir(tmp_path) == []


def test_a_failing_iterator_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[int | None, str, np.ndarray]]:
        yield 0, "attn_norm", np.float32([1])
        assert tree(tmp_path / "out") == {}, "a part can be seen under the final name"
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_tree(tmp_path / "out", broken())
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="interrupted"):
        write_tree(tmp_path / "out", broken())
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.faults
def test_a_place_that_cannot_take_a_tree(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "layer-3", "file/under"):
        with pytest.raises(OutputError):
            write_tree(tmp_path / name, stages())
    assert tree(tmp_path) == {"full/a": b"mine", "file": b"mine"}


def test_an_empty_folder_or_a_link_to_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_tree(tmp_path / "link", stages())
    assert AprtTree(tmp_path / "real").files.keys() == AprtTree(tmp_path / "link").files.keys()


def test_a_stage_given_twice(tmp_path: Path) -> None:
    twice = [(None, "embedding", np.float32([1])), (0, "embedding", np.float32([1]))]
    with pytest.raises(ValueError, match="given twice"):
        write_tree(tmp_path / "out", twice)
    assert os.listdir(tmp_path) == []


def test_what_is_no_stage_file_is_reported(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", stages())
    out = tmp_path / "out"
    extra = ["layer-0/NOTES.txt", "layer-01/attn_out.bin", "layer-x", "notes.md", "Upper.bin", "layer-0/.x.bin.1.tmp"]
    for name in extra:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    (out / "dangling.bin").symlink_to("nowhere")
    (out / "layer-10" / "sub").mkdir()
    os.mkfifo(out / "pipe.bin")
    found = AprtTree(out)
    assert found.files.keys() == {(layer, stage) for layer, stage, _ in stages()}
    reported = {*extra, "dangling.bin", "layer-10/sub", "pipe.bin", "layer-01"} - {"layer-01/attn_out.bin"}
    assert set(found.extra) == reported


@pytest.mark.faults
def test_one_bad_file_refuses_the_tree_by_name(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", stages())
    path = tmp_path / "out" / "layer-10" / "attn_scores.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError) as error:
        AprtTree(tmp_path / "out")
    one_line(error.value, "layer-10/attn_scores.bin", "truncated")


def test_a_layers_file_outside_its_folder(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", stages())
    (tmp_path / "out" / "layer-0" / "attn_norm.bin").rename(tmp_path / "out" / "attn_norm.bin")
    with pytest.raises(InputError) as error:
        AprtTree(tmp_path / "out")
    one_line(error.value, "layer 0", "no layer's folder")


def test_an_embedding_in_both_places(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", stages())
    write_aprt(tmp_path / "out" / "embedding.bin", None, np.float32([1]))
    with pytest.raises(InputError) as error:
        AprtTree(tmp_path / "out")
    one_line(error.value, "embedding", "keep one of them")


def test_a_folder_without_stage_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage files"):
        AprtTree(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"it has config\.json"):
        AprtTree(tmp_path)


def test_aprt_is_told_from_other_files(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", [(4, "attn_out", np.float32([1]))])
    write_tree(tmp_path / "root", [(None, "lm_head", np.float32([1]))])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.bin").write_bytes(b"pickle")
    assert is_aprt(tmp_path / "tree" / "layer-4" / "attn_out.bin")
    assert not any(map(is_aprt, (tmp_path / "other" / "weights.bin", tmp_path, tmp_path / "none")))
    assert is_aprt_tree(tmp_path / "tree")
    assert is_aprt_tree(tmp_path / "root")
    assert not any(map(is_aprt_tree, (tmp_path / "other", tmp_path, tmp_path / "none", tmp_path / "other/weights.bin")))


# Comparing


def pair(folder: Path, a: np.ndarray, b: np.ndarray, layer: int | None = 2) -> tuple[AprtFile, AprtFile]:
    return file_of(folder / "a", a, layer, "ffn_silu.bin"), file_of(folder / "b", b, layer, "ffn_silu.bin")


def test_equal_files_are_exact_and_flat(tmp_path: Path) -> None:
    a, b = pair(tmp_path, np.float32([[1, 2], [3, 4]]), np.float32([[1, 2], [3, 4]]))
    row = compare_files(a, b)
    assert (row["key"], row["layer"], row["stage"], row["tensor"]) == ("layers.2.ffn_silu", 2, "ffn_silu", None)
    assert (row["verdict"], row["byte_match"], row["max_abs"], row["cosine"]) == ("exact", True, 0, 1)
    assert row["sha256_a"] == row["sha256_b"]
    assert row["flat"] is True
    assert "flat" in row["note"]


def test_one_changed_element_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aprt, "_BLOCK", 16)
    x = np.random.default_rng(0).standard_normal((10, 10), np.float32)
    y = x.copy()
    y[7, 3] += 0.5
    y[2, 1] += 0.25
    row = compare_files(*pair(tmp_path, x, y), top=1)
    d = x.astype(np.float64) - y
    assert row["verdict"] == "unjudged"
    assert (row["mismatched"], row["count"], row["byte_match"]) == (2, 100, False)
    assert (row["max_abs_index"], row["max_abs"]) == ([73], abs(d[7, 3]))
    assert [item["index"] for item in row["top"]] == [[73]]
    assert row["rms"] == pytest.approx(math.sqrt((d * d).mean()))
    cosine = (x.astype(np.float64) * y).sum() / np.linalg.norm(x.astype(float)) / np.linalg.norm(y.astype(float))
    assert row["cosine"] == pytest.approx(cosine, rel=1e-12)
    assert row["sha256_a"] != row["sha256_b"]


def test_top_k_lists_the_largest(tmp_path: Path) -> None:
    y = np.zeros(50, np.float32)
    y[[5, 20, 40]] = 1, 3, 2
    row = compare_files(*pair(tmp_path, np.zeros(50, np.float32), y), top=3)
    assert [(item["index"], item["abs"], item["b"]) for item in row["top"]] == [([20], 3, 3), ([40], 2, 2), ([5], 1, 1)]


def test_only_a_nan_payload_differs(tmp_path: Path) -> None:
    row = compare_files(*pair(tmp_path, np.uint32([0x7FC00000]).view("f4"), np.uint32([0x7FC00001]).view("f4")))
    assert (row["verdict"], row["byte_match"], row["mismatched"]) == ("nonfinite", False, 1)


def test_files_of_other_layers_or_counts_are_not_compared(tmp_path: Path) -> None:
    one, two, other = (file_of(tmp_path, np.zeros(n, np.float32), layer, f"{n}{layer}") for n, layer in
                       ((3, 0), (4, 0), (3, None)))  # fmt: skip
    with pytest.raises(InputError) as error:
        compare_files(one, two)
    one_line(error.value, "3 and 4 elements")
    with pytest.raises(InputError) as error:
        compare_files(one, other)
    one_line(error.value, "layer 0 and the whole model")


def test_two_empty_files_are_no_agreement(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="both empty"):
        compare_files(*pair(tmp_path, np.zeros(0, np.float32), np.zeros(0, np.float32)))


def test_other_names_are_said(tmp_path: Path) -> None:
    a = file_of(tmp_path, np.float32([1]), 0, "post_ffn_residual.bin")
    b = file_of(tmp_path, np.float32([1]), 0, "odd\nname.bin")
    assert r"post_ffn_residual and odd\nname" in compare_files(a, b)["note"]


def test_importing_it_loads_no_framework() -> None:
    code = "import sys, stages.files.aprt, stages.judge.checkpoints; print({'torch', 'jax'} & set(sys.modules))"
    assert fresh(code).stdout == "set()\n"
