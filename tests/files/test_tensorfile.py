"""Safetensors files: the package's own bytes, slices, every malformed header, and writing whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import fresh, one_line, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import InputError, NotFoundError, OutputError
from stages.files.tensorfile import TensorFile, TensorWriter, sha256, write_tensors
from stages.judge.metrics import same_bits
from stages.spec.dtypes import DTYPES, dtype_name, stored_dtype

F32 = np.dtype(np.float32)


def test_golden_bytes_of_a_2x2_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": np.float32([[1, 2], [3, 4]])})
    header = b'{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("0000803f 00000040 00004040 00008040")
    assert (tmp_path / "a.safetensors").read_bytes() == len(header).to_bytes(8, "little") + header + data


def every_dtype() -> dict[str, np.ndarray]:
    """Arrays of every dtype that numpy has by itself, shapes from empty to three axes."""
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (5,), (), (0, 3), (2, 3, 2)]
    found = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        if name != "BF16":  # safetensors.numpy cannot write it; see the next test
            found[f"z.{name}"] = rng.integers(0, 2, shapes[i % len(shapes)]).astype(dtype)
            found[f"a.{name}"] = rng.integers(0, 2, (3,)).astype(dtype)
    return found


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"note": "ünicode"}])
def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    write_tensors(tmp_path / "ours", every_dtype(), metadata=metadata)
    safetensors.numpy.save_file(every_dtype(), tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_bfloat16_is_that_of_safetensors_torch(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    others = {"b": np.float32([1]), "a": np.uint16([2]), "x": np.float16([3])}
    write_tensors(tmp_path / "ours", {"w": bits.view(ml_dtypes.bfloat16), **others})
    tensors = {"w": torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)}
    tensors |= {name: torch.from_numpy(array) for name, array in others.items()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = {**every_dtype(), "bf": np.float32([np.nan, np.inf, -0.0, 1e-40]).astype(ml_dtypes.bfloat16)}
    write_tensors(tmp_path / "a", written)
    read = tensors_of(tmp_path / "a")
    assert sorted(read) == sorted(written)
    assert all(same_bits(read[name], written[name]) for name in written)


NON_CONTIGUOUS = {
    "transposed": lambda a: a.T,
    "every second row": lambda a: a[::2],
    "every second column": lambda a: a[:, ::2],
    "reversed": lambda a: a[::-1, ::-1],
    "fortran": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("kind", NON_CONTIGUOUS)
def test_non_contiguous_arrays_are_written_as_they_read(tmp_path: Path, kind: str) -> None:
    array = NON_CONTIGUOUS[kind](np.arange(24, dtype=np.float32).reshape(4, 6))
    digests = write_tensors(tmp_path / "a", {"w": array}, hashes=True)
    read = tensors_of(tmp_path / "a")["w"]
    assert read.shape == array.shape
    assert np.array_equal(read, array)
    assert digests["w"] == sha256(array) == hashlib.sha256(array.tobytes()).hexdigest()


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), data=st.data())
def test_any_slice_along_either_axis(tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "slices.safetensors"
    whole = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    write_tensors(path, {"before": np.ones(3, np.float32), "w": whole, "x": np.ones(2, np.uint8)})
    axis = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, whole.shape[axis]))
    stop = data.draw(st.integers(start, whole.shape[axis]))
    with TensorFile(path) as file:
        read = file.read("w", start, stop, axis)
    assert read.flags.c_contiguous
    assert np.array_equal(read, whole[start:stop] if axis == 0 else whole[:, start:stop])


@pytest.mark.parametrize(("start", "stop", "axis"), [(0, 5, 0), (3, 5, 0), (-1, 2, 0), (3, 2, 0), (0, 3, 1), (2, 9, 1)])
def test_rows_that_are_not_there_are_refused_not_taken_from_the_next_tensor(
    tmp_path: Path, start: int, stop: int, axis: int
) -> None:
    write_tensors(tmp_path / "a", {"w": np.zeros((4, 2), np.float32), "x": np.ones((9, 2), np.float32)})
    with TensorFile(tmp_path / "a") as file, pytest.raises(InputError) as error:
        file.read("w", start, stop, axis)
    one_line(error.value, "'w'", "[4, 2]", f"{start}:{stop}")


def test_a_tensor_without_columns_has_no_slice_of_columns(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"s": np.zeros(4, np.float32), "c": np.zeros((2, 2, 2), np.float32)})
    with TensorFile(tmp_path / "a") as file:
        for name in ("s", "c"):
            with pytest.raises(InputError, match="along axis 1"):
                file.read(name, 0, 1, 1)


def test_sha256_of_a_stored_tensor_is_that_of_its_bytes(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((7, 5))
    write_tensors(tmp_path / "a", {"v": np.zeros(3), "w": array})
    with TensorFile(tmp_path / "a") as file:
        assert file.sha256("w") == sha256(array) == hashlib.sha256(array.tobytes()).hexdigest()
        assert file.sha256("v") != file.sha256("w")


def test_dtype_names_are_those_of_declarations() -> None:
    assert stored_dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
    assert stored_dtype("float32") == F32
    assert [dtype_name(d) for d in (np.float32, ml_dtypes.bfloat16)] == ["float32", "bfloat16"]


# Malformed files. Each is bytes, and a word that its error must have.


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


TWO = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "a header longer than the file": (raw({"w": entry()})[:30], "truncated"),
    "a header of 2^63 bytes": (b"\xff" * 8 + b"{}", "header of"),
    "a header just too long": ((3).to_bytes(8, "little") + b"{}", "header of"),
    "a git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "no JSON": (raw(b"{nope"), "JSON"),
    "no UTF-8": (raw(b'{"\xff\xfe":1}'), "JSON"),
    "deep nesting": (raw(b"[" * 100_000), "JSON"),
    "a list": (raw([]), "not a JSON object"),
    "duplicate names": (raw(TWO, bytes(8)), "duplicate key 'w'"),
    "duplicate fields": (raw(b'{"w":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,8]}}'), "duplicate"),
    "metadata that is no map": (raw({"__metadata__": [1]}), "__metadata__"),
    "metadata with a number": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "an entry that is a number": (raw({"w": 1}), "expected dtype, shape and data_offsets"),
    "an entry without shape": (raw({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "expected dtype"),
    "an entry with more fields": (raw({"w": {**entry(), "more": 1}}, bytes(8)), "expected dtype"),
    "an unknown dtype": (raw({"w": entry("F31")}, bytes(8)), "F31"),
    "a dtype that is a number": (raw({"w": {**entry(), "dtype": 3}}, bytes(8)), "dtype 3"),
    "a dtype that is a list": (raw({"w": {**entry(), "dtype": ["F32"]}}, bytes(8)), "dtype"),
    "a negative size": (raw({"w": entry(shape=[-2])}, bytes(8)), "shape [-2]"),
    "a size that is a bool": (raw({"w": entry(shape=[True, 2])}, bytes(8)), "shape"),
    "a size that is a float": (raw({"w": entry(shape=[2.0])}, bytes(8)), "shape"),
    "a size of 2^70": (raw({"w": entry(shape=[2**70])}, bytes(8)), "shape"),
    "sizes whose product overflows": (raw({"w": entry(shape=[2**32, 2**32])}, bytes(8)), "needs"),
    "one offset": (raw({"w": entry(offsets=[0])}, bytes(8)), "data_offsets"),
    "negative offsets": (raw({"w": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets"),
    "offsets turned round": (raw({"w": entry(offsets=[8, 0])}, bytes(8)), "needs 8 bytes"),
    "too few bytes for the shape": (raw({"w": entry(shape=[3])}, bytes(8)), "needs 12 bytes"),
    "too many bytes for the shape": (raw({"w": entry(shape=[1])}, bytes(8)), "needs 4 bytes"),
    "an overlap": (raw({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "two tensors in one place": (raw({"v": entry(), "w": entry()}, bytes(8)), "overlaps"),
    "a hole": (raw({"v": entry(), "w": entry(offsets=[12, 20])}, bytes(20)), "hole"),
    "a hole at the start": (raw({"w": entry(offsets=[4, 12])}, bytes(12)), "hole"),
    "bytes cut off": (raw({"w": entry()}, bytes(7)), "truncated"),
    "bytes too many": (raw({"w": entry()}, bytes(9)), "the file has"),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_one_line(tmp_path: Path, kind: str) -> None:
    data, word = MALFORMED[kind]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        TensorFile(path)
    one_line(error.value, str(path), word)


def test_the_malformed_cases_start_from_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(raw({"__metadata__": {"a": "b"}, "v": entry(), "w": entry(offsets=[8, 16])}, bytes(16)))
    with TensorFile(path) as file:
        assert list(file.tensors) == ["v", "w"]
        assert file.metadata == {"a": "b"}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["\x00", "\x1b[31mred", "a\nb", "\u202eabc", "x" * 500], ids=repr)
def test_a_hostile_name_is_printed_safely(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw({name: entry("F31")}, bytes(8)))
    with pytest.raises(InputError) as error:
        TensorFile(path)
    assert len(one_line(error.value, "F31").removeprefix(str(path))) < 400
    write_tensors(path, {name: np.zeros(1, np.float32)})
    with TensorFile(path) as file, pytest.raises(InputError) as error:
        file.read("other\x1b")
    one_line(error.value, "no tensor 'other\\x1b'")


def test_a_missing_tensor_is_named_with_what_is_there(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {f"w{i}": np.zeros(1, np.float32) for i in range(8)})
    with TensorFile(tmp_path / "a") as file, pytest.raises(InputError) as error:
        file.read("nope")
    one_line(error.value, "no tensor 'nope'", "w0", "w5", "and 2 more")


def test_a_file_that_is_not_there_or_a_folder_is_not_found(tmp_path: Path) -> None:
    for path, word in ((tmp_path / "none", "does not exist"), (tmp_path, "not a regular file")):
        with pytest.raises(NotFoundError) as error:
            TensorFile(path)
        one_line(error.value, word)


@pytest.mark.faults
def test_a_file_truncated_while_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"w": np.zeros(1000, np.float32)})
    with TensorFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(500)
        with pytest.raises(InputError, match="truncated while reading 'w'"):
            file.read("w")


# Writing.


def spec(rows: int = 4, cols: int = 6) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {"w": (F32, (rows, cols)), "b": (F32, (cols,))}


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_in_any_interleaving_give_the_whole_files_bytes(tmp_path: Path, axis: int) -> None:
    w, b = np.arange(24, dtype=np.float32).reshape(4, 6), np.ones(6, np.float32)
    whole = write_tensors(tmp_path / "whole", {"w": w, "b": b}, hashes=True)
    with TensorWriter(tmp_path / "slices", spec(), hashes=True) as writer:
        cut = (w[:1], w[1:]) if axis == 0 else (w[:, :1], w[:, 1:])
        writer.write("w", cut[0], 0, axis)
        writer.write("b", b)
        writer.write("w", cut[1], 1, axis)
        digests = writer.commit()
    assert (tmp_path / "slices").read_bytes() == (tmp_path / "whole").read_bytes()
    assert digests == whole == {"w": sha256(w), "b": sha256(b)}


def test_hashes_of_named_tensors_alone(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a", spec(), hashes={"b"}) as writer:
        writer.write("w", np.zeros((4, 6), np.float32))
        writer.write("b", np.ones(6, np.float32))
        assert writer.commit() == {"b": sha256(np.ones(6, np.float32))}


def test_without_commit_nothing_is_left(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a", spec()) as writer:
        writer.write("w", np.zeros((4, 6), np.float32))
        assert not (tmp_path / "a").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_an_error_inside_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    with pytest.raises(KeyboardInterrupt), TensorWriter(tmp_path / "a", spec()):
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "kept")]


def test_a_tensor_not_written_in_full_is_not_committed(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a", spec()) as writer:
        writer.write("w", np.zeros((3, 6), np.float32))
        writer.write("b", np.zeros(6, np.float32))
        with pytest.raises(RuntimeError, match="not written in full: \\['w'\\]"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_than_announced_is_refused(tmp_path: Path) -> None:
    with (
        TensorWriter(tmp_path / "a", spec()) as writer,
        pytest.raises(TypeError, match="expected float32, got float64"),
    ):
        writer.write("w", np.zeros((4, 6)))


def test_a_folder_that_is_not_there_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error:
        write_tensors(tmp_path / "none" / "a", {"w": np.zeros(1, np.float32)})
    one_line(error.value, "cannot be written")


FULL_DISK = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from stages.errors import OutputError
from stages.files.tensorfile import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
write_tensors(path, {"w": np.ones(4, np.float32)})
before = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_tensors(path, {"w": np.zeros(1_000_000, np.float32)}, hashes=True)
except OutputError as error:
    assert "cannot be written" in str(error) and "\\n" not in str(error), error
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    print("refused")
"""


@pytest.mark.faults
def test_a_full_disk_is_an_output_error_and_the_earlier_file_stays(tmp_path: Path) -> None:
    done = fresh(FULL_DISK, tmp_path / "a.safetensors")
    assert done.stdout.strip() == "refused", done.stderr
