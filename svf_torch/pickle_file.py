"""A pickled torch file (`.pt`, `.pth`, `.bin`), opened in the only place that ever opens one: a limited child process.

A pickle is a program. It is run only by torch's `weights_only` loader, which knows tensors and plain containers,
and only in a child whose address space and time are limited; the parent, which does not even load torch, gets a
safetensors file and one JSON line. Refused is whatever is not a dense tensor backed by that many bytes in the file.

A child is a module of this package with `if __name__ == "__main__": serve(reply)`; `ask_child` starts it.
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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError, NotFoundError, OutputError, ResourceError, SvfError, shown
from stages.jsonio import parse_json
from stages.pickle_listing import ZIP_ERRORS

if TYPE_CHECKING:
    import torch

# Importing torch 2.13 takes 0.6 GiB of address space; a CUDA build, or one allocator arena per thread, some more.
BASE_MEMORY = 4 * 1024**3
# A file of tensors is mapped once; a legacy or recompressed one is read, unpacked and rebuilt: three times its size.
MEMORY_PER_BYTE = 3
CHILD_ERRORS: dict[str, type[SvfError]] = {
    error.__name__: error for error in (InputError, NotFoundError, OutputError, ResourceError)
}


def ask_child(
    module: str, path: Path, out: Path, details: Mapping[str, Any], *, memory_limit: int | None, timeout: float
) -> dict[str, Any]:
    """What the child `python -P -m MODULE` replies when asked to convert the pickle `path` to the safetensors `out`.

    `details` go with the request. `memory_limit` is the child's address space in bytes (default 3 times the file +
    4 GiB), `timeout` in seconds. `NotFoundError` when `path` is not there, `ResourceError` when memory runs out,
    `OutputError` when `out` cannot be written, `InputError` for everything refused, a timeout too.
    """
    path, out = Path(path).absolute(), Path(out).absolute()
    if not path.is_file():
        raise NotFoundError(f"{path}: {'is not a regular file' if path.exists() else 'does not exist'}")
    if memory_limit is None:
        memory_limit = MEMORY_PER_BYTE * path.stat().st_size + BASE_MEMORY
    reply = _run(module, {**details, "path": str(path), "out": str(out), "memory_limit": memory_limit}, timeout)
    if reply.get("error") in CHILD_ERRORS:
        raise CHILD_ERRORS[reply["error"]](str(reply.get("message")))
    return reply


def _run(module: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
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
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        stdout, stderr = child.communicate(json.dumps(request).encode(), timeout)
    except subprocess.TimeoutExpired:
        raise InputError(f"{path}: not read after {timeout:g} s; it is not a plain file of tensors") from None
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
    if not isinstance(reply, dict) or not ({"error", "message"} <= set(reply) or "sha256" in reply):
        raise InputError(f"{path}: the process reading it replied {shown(reply)}")
    return reply


def serve(answer: Callable[[Path, Path, dict[str, Any]], dict[str, Any]]) -> None:
    """The child: one request on stdin, `answer(path, out, request)` as one JSON line on stdout."""
    import torch  # noqa: F401  (before the limit: see below)

    request = json.loads(sys.stdin.buffer.read())
    path = Path(request["path"])
    try:
        limit = request["memory_limit"]
        # After torch is imported, so that a limit below what torch takes is an answer and not a failed import.
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        reply = answer(path, Path(request["out"]), request)
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


def load_tensors(path: Path) -> Any:
    """The object in `path`, by torch's weights_only loader; `InputError` for a pickle that asks for anything else."""
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
        raise InputError(f"{path}: refused: {what}; expected a dict of names and tensors") from None
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
    except ZIP_ERRORS as error:
        raise InputError(f"{path}: damaged or truncated zip: {shown(error)}") from None
    if damaged is not None:
        raise InputError(f"{path}: record '{shown(damaged)}' does not have its checksum; copy the file again")
    return stored


def dense(place: str, tensor: Any, dtypes: Collection[str]) -> torch.Tensor:
    """`tensor` if it is a dense CPU tensor of one of `dtypes` with as many bytes as its shape says."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise InputError(f"{place} is a {type(tensor).__name__}, expected a tensor")
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"{tensor.layout}"
        raise InputError(f"{place} is {kind.removeprefix('torch.')}, expected a dense tensor")
    if tensor.device.type != "cpu":
        raise InputError(f"{place} is on device '{tensor.device.type}' and has no values")
    if dtype_of(tensor) not in dtypes:
        raise InputError(f"{place} is {dtype_of(tensor)}, expected one of {', '.join(dtypes)}")
    needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > held:
        shape = "x".join(map(str, tensor.shape))
        raise InputError(
            f"{place} claims {shape}, {needed} bytes, but the file holds {held}; refused as a repeated view"
        )
    return tensor.detach().resolve_neg()


def dtype_of(tensor: torch.Tensor) -> str:
    """The dtype's name without `torch.`."""
    return str(tensor.dtype).removeprefix("torch.")
