"""llama.cpp's C library: where it is, what its structs look like, and its words when it refuses something.

Declarations are those of the wheel `llama-cpp-py-sync`, for cffi. Its own library is used where the system can load it,
else the one inside the wheel of `xllamacpp` of the neighbouring build. Struct layouts change between builds of
llama.cpp, so `svf[llama]` names the two exactly.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError

# Build of llama.cpp that the declarations are of, and the wheels that hold it or the next one.
DECLARED, WHEELS = "0.11548", ("llama-cpp-py-sync", "xllamacpp")
_INSTALL = "pip install 'svf[llama]'"
# Of `struct ggml_tensor` what comes first, which no build has changed since 2023, and functions on it.
_GGML = """
struct ggml_tensor { int type; void * buffer; int64_t ne[4]; size_t nb[4]; };
const char * ggml_get_name(const void *);
const char * ggml_op_desc(const void *);
const char * ggml_type_name(int);
bool ggml_is_contiguous(const void *);
void ggml_backend_tensor_get(const void *, void *, size_t, size_t);
"""
_FLOAT32 = 0
_WORST = 4  # GGML_LOG_LEVEL_ERROR


@dataclass(frozen=True)
class Node:
    """One node of ggml's graph while it runs: its name, its operation, and where its values are."""

    library: Library
    pointer: Any

    @property
    def name(self) -> str:
        return self.library.text(self.library.ggml.ggml_get_name(self.pointer))

    @property
    def op(self) -> str:
        return self.library.text(self.library.ggml.ggml_op_desc(self.pointer))

    def array(self) -> np.ndarray:
        """A copy in float32, its axes from the slowest: what ggml calls `ne[3], ne[2], ne[1], ne[0]`."""
        ggml, tensor = self.library.ggml, self.library.own.cast("struct ggml_tensor *", self.pointer)
        if tensor.type != _FLOAT32 or not ggml.ggml_is_contiguous(self.pointer):
            kind = self.library.text(ggml.ggml_type_name(tensor.type))
            raise InputError(f"llama.cpp's node {self.name} ({self.op}) is {kind} or strided, expected whole float32")
        out = np.empty([*tensor.ne][::-1], np.float32)
        ggml.ggml_backend_tensor_get(self.pointer, self.library.own.from_buffer(out), 0, out.nbytes)
        return out


@dataclass
class Library:
    """The loaded library `c` with its `ffi`; `version` in words. `said` is what it logged as errors."""

    ffi: Any
    c: Any
    own: Any
    ggml: Any
    version: str
    said: list[str] = field(default_factory=list)
    _kept: list[Any] = field(default_factory=list)

    def text(self, pointer: Any) -> str:
        found: bytes = self.ffi.string(self.ffi.cast("char *", int(self.own.cast("intptr_t", pointer))))
        return found.decode(errors="replace")

    def listen(self) -> None:
        """Keep what it logs as errors, and print nothing."""

        @self.ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[misc]
        def logged(level: int, text: Any, _user: Any) -> None:
            if level == _WORST:
                self.said.append(self.ffi.string(text).decode(errors="replace").strip())

        self._kept.append(logged)
        self.c.llama_log_set(logged, self.ffi.NULL)

    def watch(self, wanted: Callable[[Node], bool], take: Callable[[Node], None], failed: list[BaseException]) -> Any:
        """A callback for `cb_eval`: each `wanted` node is handed to `take`; what that raises goes to `failed`, and
        the run is ended."""

        def seen(tensor: Any, ask: bool, _user: Any) -> bool:
            node = Node(self, self.own.cast("void *", int(self.ffi.cast("intptr_t", tensor))))
            try:
                if ask:
                    return wanted(node)
                take(node)
            except BaseException as error:  # none may pass through C code
                failed.append(error)
                return False
            return True

        callback = self.ffi.callback("bool(struct ggml_tensor *, bool, void *)", seen)
        self._kept.append(callback)
        return callback

    def refused(self, what: str) -> InputError:
        """The error for what the library would not do, in its own last words."""
        return InputError(f"llama.cpp {what}: {self.said[-1] if self.said else 'it gives no reason'}")


def load() -> Library:
    """The library of the installed wheels; `NotFoundError` that says what to install."""
    if importlib.util.find_spec("llama_cpp_py_sync") is None:
        raise NotFoundError(f"llama.cpp's declarations (llama-cpp-py-sync) are not installed: {_INSTALL}")
    found = importlib.metadata.version(WHEELS[0])
    if found != DECLARED:
        raise NotFoundError(
            f"llama-cpp-py-sync {found} is installed, and this reads the structs of {DECLARED}: {_INSTALL}"
        )
    from cffi import FFI
    from llama_cpp_py_sync._cffi_bindings import ffi

    own, tried = FFI(), []
    own.cdef(_GGML)
    for wheel in WHEELS:
        for path in _libraries(wheel):
            try:
                c, ggml = ffi.dlopen(str(path)), own.dlopen(str(path))
                c.llama_backend_init()
            except (OSError, AttributeError) as error:
                tried.append(str(error))
                continue
            library = Library(ffi, c, own, ggml, f"{wheel} {importlib.metadata.version(wheel)}")
            library.listen()
            return library
    raise NotFoundError(f"no llama.cpp library can be loaded ({'; '.join(tried) or 'none is installed'}): {_INSTALL}")


def _libraries(wheel: str) -> list[Path]:
    """The shared libraries of a wheel that hold llama.cpp."""
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = ("libllama.so", "libllama.dylib", "xllamacpp.abi3.so")
    return [Path(str(file.locate())) for file in files if file.name in names]
