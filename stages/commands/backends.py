"""The table of backends: where each class, engine and framework's probe is; imported when one is needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.spec.backend import Backend

BACKENDS = {
    "torch": "svf_torch.backend:TorchBackend",
    "jax": "svf_jax.backend:JaxBackend",
    "reference": "stages.oracle.components:ReferenceBackend",
}
# Engines whose own models can be captured: the module with its `capture` and `run`.
ENGINES = {
    "transformers": "svf_torch.capture",
    "nnx": "svf_jax.capture",
    "llama.cpp": "svf_llama.capture",
    "onnxruntime": "svf_onnx.capture",
    "openvino": "svf_onnx.openvino",
}
_OURS = {"stages", *(module.partition(".")[0] for module in ENGINES.values())}
PROBES = {"torch": "svf_torch.probe:probe", "jax": "svf_jax.probe:probe"}


def load_backend(name: str, device: str, precision: str = "native", **options: Any) -> Backend:
    """The backend called `name`, its framework imported now, computing in `precision`."""
    from stages.run.precision import with_precision

    backend: Backend = attribute(BACKENDS[name])(device=device, **options)
    return with_precision(backend, precision)


def attribute(place: str) -> Any:
    """What stands at `module:name`, the module imported now; `NotFoundError` where a package that it needs is not."""
    from stages.errors import NotFoundError

    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        raise NotFoundError(f"{error.name} is not installed, and this needs it: pip install {error.name}") from error
