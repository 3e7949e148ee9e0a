"""llama.cpp's C library: where it is, what its structs look like, and its words when it refuses something.

The library is the one inside the wheel `xllamacpp`, which exports llama.cpp's own functions; their declarations are
those of the wheel `llama-cpp-py-sync` of the neighbouring build, for cffi. Struct layouts change between builds of
llama.cpp, so `svf[llama]` names the two exactly, and others are refused.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError

WHEELS = {"llama-cpp-py-sync": "0.11548", "xllamacpp": "2026.10.11549"}
_INSTALL = f"pip install {' '.join(f'{wheel}=={build}' for wheel, build in WHEELS.items())}"
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

        @self.ffi.callback("void(enum ggml_log_level, const char *, void *)")
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
        """The error for what the library would not do, in its own first words: the later ones say what came of it."""
        return InputError(f"llama.cpp {what}: {self.said[0] if self.said else 'it gives no reason'}")


def load() -> Library:
    """The library of the installed wheels; `NotFoundError` that says what to install."""
    for wheel, build in WHEELS.items():
        try:
            found = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            raise NotFoundError(f"{wheel} is not installed, and llama.cpp needs it: {_INSTALL}") from None
        if found != build:
            raise NotFoundError(
                f"{wheel} {found} is installed; the structs that are read here are {build}'s: {_INSTALL}"
            )
    from cffi import FFI
    from llama_cpp_py_sync._cffi_bindings import ffi

    files = importlib.metadata.files("xllamacpp") or []
    path = next(
        (str(file.locate()) for file in files if file.name.startswith("xllamacpp.") and file.suffix == ".so"), ""
    )
    own = FFI()
    own.cdef(_GGML)
    try:
        library = Library(ffi, ffi.dlopen(path), own, own.dlopen(path), WHEELS["xllamacpp"])
    except OSError as error:
        raise NotFoundError(f"llama.cpp's library cannot be loaded: {error}") from error
    library.c.llama_backend_init()
    library.listen()
    return library
