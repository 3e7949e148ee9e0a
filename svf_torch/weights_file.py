"""An original `svd_weights.pt`: a pickled dict of `<parameter>.U / .S / .V`, as `torch.svd` returns them.

A pickle is a program. It is run only by torch's `weights_only` loader, which knows tensors and plain containers,
and only in a child process whose address space and time are limited; the parent, which does not even load torch,
gets a safetensors file and one JSON line. Refused is whatever is not a dense floating-point matrix of finite
numbers, backed by that many bytes in the file.

Child: `python -P -m svf_torch.weights_file`, with the request as JSON on stdin.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.errors import InputError, NotFoundError, OutputError, ResourceError, SvfError, shown
from stages.jsonio import parse_json
from stages.tensorfile import TensorWriter

if TYPE_CHECKING:
    import torch

PARTS = ("U", "S", "V")
FLOATS = ("float32", "float16", "bfloat16", "float64")
# Importing torch 2.13 takes 0.6 GiB of address space; a CUDA build, or one allocator arena per thread, some more.
BASE_MEMORY = 4 * 1024**3
# A file of tensors is mapped once; a legacy or recompressed one is read, unpacked and rebuilt: three times its size.
MEMORY_PER_BYTE = 3
# Converting and checking a chunk takes a few copies of it: 16 MiB of float32 is nothing beside BASE_MEMORY.
CHUNK_ELEMENTS = 1 << 22
CHILD_ERRORS: dict[str, type[SvfError]] = {
    error.__name__: error for error in (InputError, NotFoundError, OutputError, ResourceError)
}


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
    path, out = Path(path).absolute(), Path(out).absolute()
    if not path.is_file():
        raise NotFoundError(f"{path}: {'is not a regular file' if path.exists() else 'does not exist'}")
    if memory_limit is None:
        memory_limit = MEMORY_PER_BYTE * path.stat().st_size + BASE_MEMORY
    request = {"path": str(path), "names": names, "out": str(out), "memory_limit": memory_limit}
    reply = _ask_child(request, timeout)
    if reply.get("error") in CHILD_ERRORS:
        raise CHILD_ERRORS[reply["error"]](str(reply.get("message")))
    return SvdWeights(out, reply["sha256"], reply["converted"])


def _ask_child(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    path = request["path"]
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": root + (os.pathsep + inherited if inherited else ""),
        # Nothing here is computed in parallel, and each thread would reserve address space.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "svf_torch.weights_file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        stdout, stderr = child.communicate(json.dumps(request).encode(), timeout)
    except subprocess.TimeoutExpired:
        raise InputError(f"{path}: not read after {timeout:g} s; it is not a plain file of SVD weights") from None
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
        # TensorWriter's temporary file, which a child that was killed leaves behind.
        target = Path(request["out"])
        target.with_name(f".{target.name}.{child.pid}.tmp").unlink(missing_ok=True)
    if child.returncode in (-6, -9):  # abort after a failed allocation in C++; the kernel's out-of-memory killer
        raise ResourceError(f"{path}: the process reading it died (signal {-child.returncode}), likely of memory")
    if child.returncode != 0:
        lines = stderr.decode(errors="replace").strip().splitlines()
        reason = shown(lines[-1], 200) if lines else "no message"
        raise InputError(f"{path}: the process reading it failed ({child.returncode}): {reason}")
    reply = parse_json(stdout, f"{path}: reply of the process reading it")
    if not isinstance(reply, dict) or not ({"error", "message"} <= set(reply) or {"sha256", "converted"} <= set(reply)):
        raise InputError(f"{path}: the process reading it replied {shown(reply)}")
    return reply


def main() -> None:
    """The child: one request on stdin, one JSON line on stdout."""
    import torch  # noqa: F401  (before the limit: see below)

    request = json.loads(sys.stdin.buffer.read())
    path = Path(request["path"])
    try:
        limit = request["memory_limit"]
        # After torch is imported, so that a limit below what torch takes is an answer and not a failed import.
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        reply = _convert(path, request["names"], Path(request["out"]))
    except SvfError as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        if not _is_memory(error):
            raise
        limit_mib = request["memory_limit"] // 2**20
        message = f"{path}: reading it takes more than the {limit_mib} MiB of address space it may use"
        reply = {"error": "ResourceError", "message": message}
    print(json.dumps(reply), flush=True)


def _is_memory(error: BaseException | None) -> bool:
    """Whether memory ran out; torch says so in the text of a RuntimeError, or wraps the cause."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(
            phrase in text for phrase in ("allocate memory", "not enough memory", "bad_alloc")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _convert(path: Path, names: list[str], out: Path) -> dict[str, Any]:
    """Check the requested tensors of `path` and write them as float32 to `out`."""
    tensors = _requested(path, _load(path), names)
    for name in names:
        _check_shapes(path, name, *(tensors[f"{name}.{part}"].shape for part in PARTS))
    specs = {key: (np.dtype(np.float32), tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorWriter(out, specs, hashes=True) as writer:
        for key, tensor in tensors.items():
            _write(writer, path, key, tensor)
        digests = writer.commit()
    converted = {key: _dtype(tensor) for key, tensor in tensors.items() if _dtype(tensor) != "float32"}
    return {"sha256": digests, "converted": converted}


def _load(path: Path) -> Any:
    """The object in `path`, by torch's weights_only loader."""
    import torch

    stored = _checked_zip(path)
    try:
        # Mapped, only the requested tensors are read: a file of a whole model's SVD is several GB.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    except pickle.UnpicklingError as error:
        if _is_memory(error):
            raise
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {shown(found[1])}, which is no tensor" if found else "it is not a pickle of plain tensors"
        raise InputError(f"{path}: refused: {what}; expected a dict of '<parameter>.U', '.S', '.V'") from None
    except Exception as error:  # a damaged pickle can raise anything: EOFError, KeyError, RuntimeError, IndexError
        if _is_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = shown(lines[0], 160) if lines else type(error).__name__
        raise InputError(f"{path}: not a readable torch file: {reason}; is it truncated?") from None


def _checked_zip(path: Path) -> bool:
    """Whether `path` is a zip of uncompressed records, whose checksums (torch does not look at them) are right."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: damaged or truncated zip: {shown(error)}") from None
    if damaged is not None:
        raise InputError(f"{path}: record '{shown(damaged)}' does not have its checksum; copy the file again")
    return stored


def _requested(path: Path, loaded: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors `<name>.U`, `.S`, `.V` of `loaded`, each checked to be dense, floating-point and really there."""
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: expected a dict of '<parameter>.U', '.S', '.V', got {type(loaded).__name__}")
    keys = [f"{name}.{part}" for name in names for part in PARTS]
    missing = [key for key in keys if key not in loaded]
    if missing:
        there = ", ".join(shown(key, 60) for key in list(loaded)[:6]) or "nothing"
        raise InputError(f"{path}: no {_some(missing)}; the file has {there}{_more(len(loaded) - 6)}")
    return {key: _dense(f"{path}: '{shown(key)}'", loaded[key]) for key in keys}


def _some(keys: list[str]) -> str:
    return ", ".join(f"'{shown(key, 60)}'" for key in keys[:6]) + _more(len(keys) - 6)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _dense(place: str, tensor: Any) -> torch.Tensor:
    """`tensor` if it is a dense CPU tensor of floats with as many bytes as its shape says."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise InputError(f"{place} is a {type(tensor).__name__}, expected a tensor")
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"{tensor.layout}"
        raise InputError(f"{place} is {kind.removeprefix('torch.')}, expected a dense tensor")
    if tensor.device.type != "cpu":
        raise InputError(f"{place} is on device '{tensor.device.type}' and has no values")
    if _dtype(tensor) not in FLOATS:
        raise InputError(f"{place} is {_dtype(tensor)}, expected one of {', '.join(FLOATS)}")
    needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > held:
        shape = "x".join(map(str, tensor.shape))
        raise InputError(
            f"{place} claims {shape}, {needed} bytes, but the file holds {held}; refused as a repeated view"
        )
    return tensor.detach().resolve_neg()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
    main()
