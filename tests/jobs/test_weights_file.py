"""`svd_weights.pt`: read as plain tensors or refused in one line; nothing in it is ever run."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.errors import InputError, NotFoundError, OutputError, ResourceError, SvfError
from stages.files.tensorfile import TensorFile, sha256
from svf_torch import weights_file
from svf_torch.weights_file import load_svd_weights

pytestmark = [pytest.mark.faults, pytest.mark.slow]

NAME = "model.layers.0.self_attn.q_proj.weight"


def factors(m: int = 6, n: int = 4) -> dict[str, torch.Tensor]:
    u, s, v = torch.svd(torch.arange(m * n, dtype=torch.float32).reshape(m, n).sin())
    return {f"{NAME}.U": u, f"{NAME}.S": s, f"{NAME}.V": v}


@pytest.fixture
def load(tmp_path):
    """Save an object as a .pt file (or take bytes as they are) and load `NAME` from it."""

    def load(saved, names=(NAME,), *, legacy=False, **options):
        path = save(saved, tmp_path, legacy)
        return load_svd_weights(path, list(names), tmp_path / "out.safetensors", **options)

    return load


def save(saved, folder: Path, legacy: bool = False) -> Path:
    path = folder / "svd_weights.pt"
    if isinstance(saved, bytes):
        path.write_bytes(saved)
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture
def refused(load, tmp_path):
    """Load must raise `error`: one line that names the file, and neither a result nor a part of one is left."""

    def refused(match: str, saved, names=(NAME,), error: type[SvfError] = InputError, **options) -> str:
        with pytest.raises(error, match=match) as caught:
            load(saved, names, **options)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "svd_weights.pt") in str(caught.value)
        assert os.listdir(tmp_path) == ["svd_weights.pt"]
        return str(caught.value)

    return refused


def written(result) -> dict[str, np.ndarray]:
    with TensorFile(result.path) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize("legacy", [False, True])
def test_float32_factors_arrive_bit_by_bit(load, legacy):
    saved = factors()
    result = load(OrderedDict(saved, other=torch.ones(2)), legacy=legacy)
    arrays = written(result)
    assert sorted(arrays) == sorted(saved)
    for key, tensor in saved.items():
        assert arrays[key].tobytes() == tensor.contiguous().numpy().tobytes()
        assert result.sha256[key] == sha256(arrays[key])
    assert result.converted == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_and_are_named(load, dtype):
    saved = factors()
    saved[f"{NAME}.U"] = saved[f"{NAME}.U"].to(dtype)
    result = load(saved)
    assert result.converted == {f"{NAME}.U": str(dtype).removeprefix("torch.")}
    assert (written(result)[f"{NAME}.U"] == saved[f"{NAME}.U"].float().numpy()).all()


def test_views_parameters_and_many_rows_are_read_as_values(load, monkeypatch):
    big = torch.randn(5000, 1030)
    saved = {
        f"{NAME}.U": big[:, 2:1026],
        f"{NAME}.S": torch.nn.Parameter(torch.arange(1024.0, 0, -1)),
        f"{NAME}.V": torch._neg_view(torch.randn(1024, 1024).T),
    }
    arrays = written(load(saved))
    for key, tensor in saved.items():
        assert (arrays[key] == tensor.detach().resolve_neg().numpy()).all()


def test_a_recompressed_zip_is_read(load, tmp_path):
    torch.save(factors(), tmp_path / "svd_weights.pt")
    with zipfile.ZipFile(tmp_path / "svd_weights.pt") as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "svd_weights.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in records.items():
            target.writestr(name, data)
    arrays = written(load((tmp_path / "svd_weights.pt").read_bytes()))
    assert (arrays[f"{NAME}.U"] == factors()[f"{NAME}.U"].numpy()).all()


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_calls_something_is_refused_and_not_run(refused, tmp_path_factory, how, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path_factory.mktemp("canary") / "ran"
    saved = {**factors(), "extra": Canary(canary)}
    if how == "bare pickle":
        saved = pickle.dumps({"a": Canary(canary)}, protocol=2)
    refused(r"refused: it asks for posix\.system", saved, legacy=how == "legacy")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the canary does sing when it is run


def test_a_whole_module_is_refused(refused):
    refused(r"refused: it asks for torch\.nn\.modules\.linear\.Linear", torch.nn.Linear(2, 2))


def with_u(u) -> dict:
    return {**factors(), f"{NAME}.U": u}


# The dense original has 24 values; `match` names what is wrong with it.
BAD_TENSORS = [
    ("sparse", lambda: torch.eye(6, 4).to_sparse(), "sparse_coo"),
    ("csr", lambda: torch.eye(6, 4).to_sparse_csr(), "sparse_csr"),
    ("quantized", lambda: torch.quantize_per_tensor(torch.eye(6, 4), 0.1, 0, torch.qint8), "quantized"),
    ("nested", lambda: torch.nested.nested_tensor([torch.eye(2), torch.eye(3)]), "nested"),
    ("meta", lambda: torch.empty(6, 4, device="meta"), "device 'meta'"),
    ("expanded", lambda: torch.zeros(1).expand(10**6, 10**6), "repeated view"),
    ("one row repeated", lambda: torch.ones(1, 4).expand(6, 4), "repeated view"),
    ("int64", lambda: torch.ones(6, 4, dtype=torch.int64), "is int64"),
    ("bool", lambda: torch.ones(6, 4, dtype=torch.bool), "is bool"),
    ("complex", lambda: torch.ones(6, 4, dtype=torch.complex64), "is complex64"),
    ("float8", lambda: torch.ones(6, 4).to(torch.float8_e4m3fn), "is float8_e4m3fn"),
    ("NaN", lambda: torch.full((6, 4), torch.nan), "NaN"),
    ("Inf", lambda: torch.full((6, 4), -torch.inf), "Inf"),
    ("too large for float32", lambda: torch.full((6, 4), 1e300, dtype=torch.float64), "beyond float32"),
    ("one-dimensional", lambda: torch.ones(24), "expected \\[m, k\\], \\[k\\], \\[n, k\\]"),
    ("another k", lambda: torch.ones(6, 5), "expected \\[m, k\\]"),
    ("scalar", lambda: torch.tensor(1.0), "expected \\[m, k\\]"),
    ("empty", lambda: torch.ones(0, 4), "expected \\[m, k\\]"),
    ("list", lambda: [1.0, 2.0], "is a list"),
]


def convert(path: Path) -> None:
    """What the child does, in this process: a child takes a second, most of it for importing torch."""
    weights_file._convert(path, [NAME], path.with_name("out.safetensors"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "match"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS])
def test_what_is_not_a_dense_finite_matrix_is_refused(tmp_path, make, match):
    with pytest.raises(InputError, match=match) as caught:
        convert(save(with_u(make()), tmp_path))
    assert NAME in str(caught.value)
    assert os.listdir(tmp_path) == ["svd_weights.pt"]


@pytest.mark.filterwarnings("ignore")
def test_a_refusal_in_the_child_reaches_the_parent(refused):
    assert NAME in refused("repeated view", with_u(torch.zeros(1).expand(10**6, 10**6)))
    jagged = torch.nested.nested_tensor([torch.eye(2), torch.ones(3, 2)], layout=torch.jagged)
    refused("not a pickle of plain tensors", with_u(jagged))


def test_not_a_dict_is_refused(refused):
    refused(r"expected a dict of .* got list", [torch.eye(3)])


def test_missing_names_are_listed_beside_what_is_there(refused):
    expected = r"no 'a\.U', 'a\.S', 'a\.V', 'b\.U', 'b\.S', 'b\.V'; the file has .*q_proj"
    refused(expected, factors(), names=("a", NAME, "b"))
    refused(r"no 'model.*\.V'; the file has", {key: value for key, value in factors().items() if not key.endswith("V")})


@pytest.mark.parametrize(
    "data",
    [b"", b"not a pickle", b"\x80\x02", pickle.dumps(3), b"PK\x03\x04 and no zip", b"\x00" * 4096, b"{}"],
    ids=["empty", "text", "two bytes", "number", "zip magic", "zeros", "json"],
)
def test_not_a_torch_file_is_refused(refused, data):
    refused("svd_weights", data)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(tmp_path, legacy):
    whole = save(factors(600, 40), tmp_path, legacy).read_bytes()
    convert(save(whole, tmp_path))
    for size in (len(whole) - 1, len(whole) // 2, 100):
        with pytest.raises(InputError):
            convert(save(whole[:size], tmp_path))


def test_a_flipped_byte_in_a_tensor_is_refused(refused, tmp_path):
    torch.save(factors(600, 40), tmp_path / "svd_weights.pt")
    damaged = bytearray((tmp_path / "svd_weights.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    refused(r"checksum", bytes(damaged))


def test_a_missing_file_or_a_folder_is_not_found(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(NotFoundError):
            load_svd_weights(path, [NAME], tmp_path / "out.safetensors")


@pytest.mark.processes
@pytest.mark.parametrize("legacy", [False, True])
def test_too_little_memory_is_a_resource_error(refused, legacy):
    saved = {**factors(), "big": torch.zeros(2**27)}
    refused(r"MiB of address space", saved, legacy=legacy, memory_limit=2**30, error=ResourceError)


def test_a_small_zip_that_grows_is_refused(refused):
    # A list doubled by nothing but memo references would be lazy; these are 2 GiB of real strings, deflated to 2 MB.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as record:
            record.write(b"\x80\x04]")
            block = b"\x8e" + (2**28).to_bytes(8, "little") + bytes(2**28) + b"a"
            for _ in range(2):
                record.write(block)
            record.write(b".")
        archive.writestr("archive/version", "3\n")
    refused("unpacks to 536870", buffer.getvalue())


@pytest.mark.processes
def test_a_slow_file_is_stopped(refused):
    started = time.monotonic()
    refused(r"not read after 0\.2 s", factors(), timeout=0.2)
    assert time.monotonic() - started < 5


def test_an_output_that_cannot_be_written_is_an_output_error(tmp_path):
    torch.save(factors(), tmp_path / "svd_weights.pt")
    with pytest.raises(OutputError):
        load_svd_weights(tmp_path / "svd_weights.pt", [NAME], tmp_path / "no folder" / "out.safetensors")


def test_it_runs_from_another_folder_and_the_parent_does_not_load_torch(tmp_path):
    torch.save(factors(), tmp_path / "svd_weights.pt")
    (tmp_path / "torch.py").write_text("raise SystemExit('the torch of the current folder')")
    code = (
        "import sys; from pathlib import Path; from svf_torch.weights_file import load_svd_weights as load\n"
        f"load(Path('svd_weights.pt'), ['{NAME}'], Path('out.safetensors')); assert 'torch' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.append({root!r})\n{code}"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert (tmp_path / "out.safetensors").is_file()
