"""An original `svd_weights.pt`: a pickled dict of `<parameter>.U / .S / .V`, as `torch.svd` returns them.

Read as `pickle_file.py` says. Refused is also whatever is not a floating-point matrix of finite numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.errors import InputError, shown
from stages.files.tensorfile import TensorWriter
from svf_torch.pickle_file import ask_child, dense, dtype_of, load_tensors, serve

if TYPE_CHECKING:
    import torch

PARTS = ("U", "S", "V")
FLOATS = ("float32", "float16", "bfloat16", "float64")
# Converting and checking a chunk takes a few copies of it: 16 MiB of float32 is nothing beside BASE_MEMORY.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class SvdWeights:
    """What `load_svd_weights` wrote: float32 tensors `<name>.U`, `.S`, `.V` in the safetensors file `path`.

    sha256 is of each tensor's float32 bytes; `converted` maps each tensor that was not float32 in the pickle to the
    dtype it had there.
    """

    path: Path
    sha256: dict[str, str]
    converted: dict[str, str]


def load_svd_weights(
    path: Path, names: list[str], out: Path, *, memory_limit: int | None = None, timeout: float = 600
) -> SvdWeights:
    """Write U [m, k], S [k] and V [n, k] of parameters `names` from the pickle `path` to the safetensors file `out`.

    `memory_limit` is the child's address space in bytes (default 3 times the file + 4 GiB), `timeout` in seconds.
    `NotFoundError` when `path` is not there, `ResourceError` when memory runs out, `OutputError` when `out` cannot be
    written, `InputError` for everything refused: what is not a tensor, names that are missing, a timeout.
    """
    details = {"names": names}
    reply = ask_child(__spec__.name, path, out, details, memory_limit=memory_limit, timeout=timeout)
    return SvdWeights(Path(out).absolute(), reply["sha256"], reply["converted"])


def _convert(path: Path, names: list[str], out: Path) -> dict[str, Any]:
    """Check the requested tensors of `path` and write them as float32 to `out`."""
    tensors = _requested(path, load_tensors(path), names)
    for name in names:
        _check_shapes(path, name, *(tensors[f"{name}.{part}"].shape for part in PARTS))
    specs = {key: (np.dtype(np.float32), tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorWriter(out, specs, hashes=True) as writer:
        for key, tensor in tensors.items():
            _write(writer, path, key, tensor)
        digests = writer.commit()
    converted = {key: dtype_of(tensor) for key, tensor in tensors.items() if dtype_of(tensor) != "float32"}
    return {"sha256": digests, "converted": converted}


def _requested(path: Path, loaded: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors `<name>.U`, `.S`, `.V` of `loaded`, each checked to be dense, floating-point and really there."""
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: expected a dict of '<parameter>.U', '.S', '.V', got {type(loaded).__name__}")
    keys = [f"{name}.{part}" for name in names for part in PARTS]
    missing = [key for key in keys if key not in loaded]
    if missing:
        there = ", ".join(shown(key, 60) for key in list(loaded)[:6]) or "nothing"
        raise InputError(f"{path}: no {_some(missing)}; the file has {there}{_more(len(loaded) - 6)}")
    return {key: dense(f"{path}: '{shown(key)}'", loaded[key], FLOATS) for key in keys}


def _some(keys: list[str]) -> str:
    return ", ".join(f"'{shown(key, 60)}'" for key in keys[:6]) + _more(len(keys) - 6)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _check_shapes(path: Path, name: str, u: torch.Size, s: torch.Size, v: torch.Size) -> None:
    # V may lie as [k, n]: the layout diagnosis names that, this reader does not guess.
    ok = len(u) == 2 and len(s) == 1 and len(v) == 2 and s[0] == u[1] and s[0] in v and 0 not in (*u, *v)
    if not ok:
        raise InputError(
            f"{path}: '{shown(name)}' has U {list(u)}, S {list(s)}, V {list(v)}; "
            "expected [m, k], [k], [n, k] as torch.svd returns them"
        )


def _write(writer: TensorWriter, path: Path, key: str, tensor: torch.Tensor) -> None:
    import torch

    rows = max(1, CHUNK_ELEMENTS // max(1, tensor[0].numel()))
    for start in range(0, len(tensor), rows):
        chunk = tensor[start : start + rows].to(torch.float32).contiguous()
        if not torch.isfinite(chunk).all():
            raise InputError(f"{path}: '{shown(key)}' has NaN, Inf or a value beyond float32 after row {start}")
        writer.write(key, chunk.numpy(), start)


if __name__ == "__main__":
    serve(lambda path, out, request: _convert(path, request["names"], out))
