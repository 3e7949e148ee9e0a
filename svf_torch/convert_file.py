"""Any pickled file of tensors as safetensors, bit for bit: `svf convert`. Read as `pickle_file.py` says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError, OutputError, shown
from stages.files.folders import ensure_space, new_folder
from stages.files.tensorfile import TensorFile, TensorWriter
from stages.spec.dtypes import dtype_name, stored_dtype
from svf_torch.pickle_file import ask_child, dense, dtype_of, load_tensors, serve

if TYPE_CHECKING:
    import torch

# All that torch and the writer both have. Complex, quantised and 8-bit floats are refused.
DTYPES = (
    *("float64", "float32", "bfloat16", "float16"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
)
# A tied embedding and LM head are one storage under two names, so a file may unpack to somewhat more than it holds;
# never to twice that, unless one storage is shown again and again.
SHARED_FACTOR = 2
# Elements handled at a time: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24
# Beside the ten minutes that any file gets: a disk slower than this is not worth waiting for.
BYTES_PER_SECOND = 20e6


def convert(path: Path, out: Path, entry: str | None = None, *, memory_limit: int | None = None) -> dict[str, Any]:
    """Write every tensor of the pickle `path` to `out`; the `svf.convert/1` document.

    `out` is a new `.safetensors` file, or a new folder for `model.safetensors`. `entry` names a dict inside the
    file's dict, such as `state_dict`. Dtype and bits stay. Refused: see `ask_child`, and whatever is no dense tensor.
    """
    if out.suffix == ".safetensors":
        if out.exists() or out.is_symlink():
            raise OutputError(f"{out}: exists; name a new file")
        return _convert(path, out, entry, memory_limit)
    with new_folder(out) as folder:
        return _convert(path, folder / "model.safetensors", entry, memory_limit)


def _convert(path: Path, out: Path, entry: str | None, memory_limit: int | None) -> dict[str, Any]:
    timeout = 600 + (path.stat().st_size / BYTES_PER_SECOND if path.is_file() else 0)
    reply = ask_child(__spec__.name, path, out, {"entry": entry}, memory_limit=memory_limit, timeout=timeout)
    with TensorFile(out) as file:
        infos = list(file.tensors.values())
    return {
        "schema": "svf.convert/1",
        "source": str(path),
        "out": str(out),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(dtype_name(info.dtype) for info in infos)),
        "sha256": reply["sha256"],
    }


def _answer(path: Path, out: Path, entry: str | None) -> dict[str, Any]:
    """In the child: check all tensors, then write them."""
    loaded = _dict(path, load_tensors(path), entry)
    tensors = {str(key): dense(f"{path}: '{shown(key)}'", value, DTYPES) for key, value in loaded.items()}
    _check_sum(path, tensors)
    specs = {key: (stored_dtype(dtype_of(tensor)), tuple(tensor.shape)) for key, tensor in tensors.items()}
    ensure_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    with TensorWriter(out, specs, hashes=True) as writer:
        for key, tensor in tensors.items():
            _write(writer, key, tensor)
        return {"sha256": writer.commit()}


def _dict(path: Path, loaded: Any, entry: str | None) -> Mapping[str, Any]:
    """The dict of names and values that is to be converted; `InputError` naming what stands in the way."""
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: expected a dict of names and tensors, got {type(loaded).__name__}")
    if entry is not None:
        if not isinstance(loaded.get(entry), Mapping):
            raise InputError(f"{path}: no dict '{shown(entry)}' inside; --entry may be {_dicts(loaded) or 'left out'}")
        return _dict(path, loaded[entry], None)
    if nested := _dicts(loaded):
        raise InputError(f"{path}: tensors lie in dicts inside the file; choose one with --entry: {nested}")
    names = [key for key in loaded if not isinstance(key, str) or not key or key == "__metadata__"]
    if names:
        raise InputError(f"{path}: {shown(repr(names[0]), 60)} is no tensor's name")
    if not loaded:
        raise InputError(f"{path}: holds no tensors")
    return loaded


def _dicts(loaded: Mapping[Any, Any]) -> str:
    names = [shown(key, 60) for key, value in loaded.items() if isinstance(value, Mapping)]
    return ", ".join(names[:6])


def _check_sum(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`InputError` when all tensors together show the same bytes again and again."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    needed, stored = sum(tensor.nbytes for tensor in tensors.values()), sum(held.values())
    if needed > SHARED_FACTOR * stored:
        raise InputError(
            f"{path}: {len(tensors)} tensors claim {needed} bytes, the file holds {stored}; refused as repeated views"
        )


def _write(writer: TensorWriter, key: str, tensor: torch.Tensor) -> None:
    import torch

    dtype = stored_dtype(dtype_of(tensor))
    rows = max(1, CHUNK_ELEMENTS * len(tensor) // max(1, tensor.numel())) if tensor.ndim else 1
    for start in range(0, len(tensor), rows) if tensor.ndim else (0,):
        chunk = tensor[start : start + rows] if tensor.ndim else tensor
        # Bytes, since numpy knows no bfloat16 of torch's.
        raw = chunk.contiguous().reshape(-1).view(torch.uint8).numpy()
        writer.write(key, raw.view(dtype).reshape(tuple(chunk.shape)), start)


if __name__ == "__main__":
    serve(lambda path, out, request: _answer(path, out, request["entry"]))
