"""A pickled torch file (`.pt`, `.pth`, `.bin`), opened in the only place that ever opens one: a limited child process.

A pickle is a program. It is run only by torch's `weights_only` loader, which knows tensors and plain containers,
and only in a child whose address space and time are limited; the parent, which does not even load torch, gets a
safetensors file and one JSON line. Refused is whatever is not a dense tensor backed by that many bytes in the file.

A child is a module of this package with `if __name__ == "__main__": serve(reply)`; `ask_child` starts it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError, NotFoundError, shown
from stages.files import confined
from stages.files.confined import Limits, ask, is_memory
from stages.files.pickle_listing import check_pickle, list_pickle, open_zip

if TYPE_CHECKING:
    import torch

# Importing torch 2.13 takes 0.6 GiB of address space; a CUDA build, or one allocator arena per thread, some more.
BASE_MEMORY = 4 * 1024**3
# A file of tensors is mapped once; a legacy or recompressed one is read, unpacked and rebuilt: three times its size.
MEMORY_PER_BYTE = 3
# Processor time beside what the bytes take: the import, and lists of 100,000 tensors.
BASE_SECONDS = 60
# A processor that unpacks and hashes less than this in a second is not worth waiting for.
BYTES_PER_CPU_SECOND = 20e6


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
    size = path.stat().st_size
    if memory_limit is None:
        memory_limit = MEMORY_PER_BYTE * size + BASE_MEMORY
    limits = Limits(memory_limit, BASE_SECONDS + int(size / BYTES_PER_CPU_SECOND), timeout)

    def unfinished(pid: int) -> None:  # TensorWriter's temporary file, which a child that was killed leaves behind
        out.with_name(f".{out.name}.{pid}.tmp").unlink(missing_ok=True)

    request = {**details, "path": str(path), "out": str(out)}
    reply = ask(module, request, path, limits, plain="a plain file of tensors", ended=unfinished)
    if "sha256" not in reply:
        raise InputError(f"{path}: the process reading it replied {shown(reply)}")
    return reply


def serve(answer: Callable[[Path, Path, dict[str, Any]], dict[str, Any]]) -> None:
    """The child: one request on stdin, `answer(path, out, request)` as one JSON line on stdout."""
    import torch  # noqa: F401  (before the limits)

    confined.serve(lambda request: answer(Path(request["path"]), Path(request["out"]), request))


def load_tensors(path: Path) -> Any:
    """The object in `path`, by torch's weights_only loader; `InputError` for a pickle that asks for anything else."""
    import torch

    list_pickle(path)  # its limits: of opcodes, of names, of what a zip unpacks to
    stored = _checked_zip(path)
    try:
        # Mapped, only the requested tensors are read: a file of a whole model's SVD is several GB.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    except pickle.UnpicklingError as error:
        if is_memory(error):
            raise
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {shown(found[1])}, which is no tensor" if found else "it is not a pickle of plain tensors"
        raise InputError(f"{path}: refused: {what}; expected a dict of names and tensors") from None
    except Exception as error:  # a damaged pickle can raise anything: EOFError, KeyError, RuntimeError, IndexError
        if is_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = shown(lines[0], 160) if lines else type(error).__name__
        raise InputError(f"{path}: not a readable torch file: {reason}; is it truncated?") from None


def _checked_zip(path: Path) -> bool:
    """Whether `path` is a zip of uncompressed records, whose checksums (torch does not look at them) are right."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    check_pickle(path)
    with open_zip(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


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
