"""`svf convert`: dense tensors bit for bit, anything else refused in one line, and nothing in the file is ever run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import ROOT, svf, tensors_of

from stages.errors import InputError
from svf_torch import convert_file

pytestmark = pytest.mark.faults


def saved(folder: Path, value: Any, *, legacy: bool = False) -> Path:
    torch.save(value, folder / "weights.pt", _use_new_zipfile_serialization=not legacy)
    return folder / "weights.pt"


def here(folder: Path, value: Any, entry: str | None = None) -> dict[str, np.ndarray]:
    """What the child does, in this process: a child takes seconds, most of it for importing torch."""
    convert_file._answer(saved(folder, value), folder / "out.safetensors", entry)
    return tensors_of(folder / "out.safetensors")


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_file_is_converted_in_a_child_and_the_parent_loads_no_torch(tmp_path: Path) -> None:
    saved(tmp_path, {"w": torch.randn(5, 3).to(torch.bfloat16), "n": torch.tensor(7)})
    code = (
        "import sys; from pathlib import Path; from svf_torch.convert_file import convert\n"
        "convert(Path('weights.pt'), Path('folder')); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, check=True)
    assert tensors_of(tmp_path / "folder" / "model.safetensors")["n"] == 7


def test_every_dtype_keeps_its_bits(tmp_path: Path) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    given = {
        "bf16": bits.view(torch.bfloat16),
        "f16": bits.clone().view(torch.float16),
    }  # every pattern, NaN payloads too
    given |= {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in convert_file.DTYPES}
    arrays = here(tmp_path, given)
    for name, tensor in given.items():
        assert arrays[name].tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
        assert arrays[name].shape == tuple(tensor.shape)
    assert arrays["bf16"].dtype == ml_dtypes.bfloat16


def test_views_shared_and_empty_tensors_are_written_as_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_file, "CHUNK_ELEMENTS", 8)
    big = torch.randn(7, 5)
    given = {
        "t": big.T,
        "tied": big,
        "p": torch.nn.Parameter(torch.ones(2)),
        "e": torch.empty(0, 3),
        "s": torch.tensor(1.5),
    }
    arrays = here(tmp_path, given)
    for name, tensor in given.items():
        assert np.array_equal(arrays[name], tensor.detach().numpy()), name


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "ran"
    path = saved(tmp_path, {"w": torch.ones(2), "x": Canary(canary)}, legacy=legacy)
    done = svf("convert", path, tmp_path / "out.safetensors")
    assert done.code == 3
    assert "posix.system" in done.error
    assert not canary.exists()
    assert not (tmp_path / "out.safetensors").exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # the canary does sing when it is run


def repeated() -> dict[str, torch.Tensor]:
    big = torch.zeros(1000)
    return {f"w{i}": big for i in range(3)}


REFUSED = [
    ("stride 0", lambda: {"w": torch.zeros(1).expand(10**6, 10**6)}, "repeated view"),
    ("one storage again and again", repeated, "repeated views"),
    ("sparse", lambda: {"w": torch.eye(3).to_sparse()}, "sparse"),
    ("quantized", lambda: {"w": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)}, "quantized"),
    ("nested tensor", lambda: {"w": torch.nested.nested_tensor([torch.eye(2), torch.eye(3)])}, "nested"),
    ("complex", lambda: {"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
    ("float8", lambda: {"w": torch.ones(2).to(torch.float8_e4m3fn)}, "float8"),
    ("meta", lambda: {"w": torch.empty(2, device="meta")}, "device 'meta'"),
    ("dict in a dict", lambda: {"state_dict": {"w": torch.ones(2)}}, "--entry: state_dict"),
    ("number", lambda: {"w": torch.ones(2), "epoch": 3}, "'epoch' is a int"),
    ("list", lambda: [torch.ones(2)], "got list"),
    ("a bare tensor", lambda: torch.ones(2), "got Tensor"),
    ("nothing", dict, "no tensors"),
    ("a name that is none", lambda: {3: torch.ones(2)}, "no tensor's name"),
    ("the header's name", lambda: {"__metadata__": torch.ones(2)}, "no tensor's name"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "match"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_no_dict_of_dense_tensors_is_refused(tmp_path: Path, make: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        here(tmp_path, make())
    assert str(caught.value).isprintable()
    assert os.listdir(tmp_path) == ["weights.pt"]


def test_a_dict_inside_is_chosen_by_name(tmp_path: Path) -> None:
    value = {"state_dict": {"w": torch.ones(2)}, "epoch": 3}
    assert list(here(tmp_path, value, "state_dict")) == ["w"]
    with pytest.raises(InputError, match="no dict 'model' inside; --entry may be state_dict"):
        here(tmp_path, value, "model")


def test_an_output_that_exists_is_refused_before_the_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for out in ("out.safetensors", "folder"):
        done = svf("convert", tmp_path / "no.pt", tmp_path / out)
        assert (done.code, (tmp_path / "out.safetensors").read_text()) == (6, "mine")
        assert out in done.error


def test_a_missing_file_is_not_found_and_leaves_no_folder(tmp_path: Path) -> None:
    assert svf("convert", tmp_path / "no.pt", tmp_path / "out").code == 4
    assert not os.listdir(tmp_path)


def test_a_pickle_is_opened_in_one_place() -> None:
    """Calls of `load`, `loads` and `Unpickler` on pickle-like modules, in the whole source; numpy's never unpickles."""
    found = set()
    for path in [ROOT / "cli.py", *(p for d in ("stages", "svf_torch", "svf_jax") for p in (ROOT / d).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("load", "loads", "Unpickler")
            ):
                module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if module == "torch":
                    assert keywords["weights_only"] is True
                    found.add(path.name)
                if module in ("pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"):
                    found.add(f"{path.name}: {module}")
                if module in ("np", "numpy"):
                    assert keywords.get("allow_pickle") is False, path
    assert found == {"pickle_file.py"}
