"""What OpenVINO computes from a file of `torch.onnx`: values inside its graph, which keeps their names, as outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import openvino

from stages.errors import InputError, UsageError
from stages.run.captured import Record
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig, RawConfig
from svf_onnx.session import Argument, Exported, Session, exported, words

ENGINE = "openvino"
_DEVICE = "CPU"
_HINT = "INFERENCE_PRECISION_HINT"
# As OpenVINO calls them; a CPU that has no units for one computes in float32.
_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_NUMPY = {
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def run(
    config: ModelConfig,
    raw_config: RawConfig,
    weights: Weights,
    source: str,
    rows: Sequence[Sequence[int]],
    *,
    file: str | None = None,
    attention: str | None = None,
    compiled: bool = False,
    cache: str | None = None,
    generate: int = 0,
    dtype: str = "model",
    device: str = "cpu",
    deep: bool = False,
) -> tuple[Record, list[list[int]]]:
    """Have OpenVINO run each of the token ids `rows` by itself from an ONNX `file`, and decode.

    As `capture.run` of ONNX Runtime, but that OpenVINO always optimises the graph, and that `dtype` is its precision
    hint; `model`: none, and OpenVINO chooses by the processor.
    """
    record = Record(config, raw_config, source, weights)
    graph = exported(ENGINE, file, record, deep)
    if attention is not None or cache is not None or device != "cpu" or compiled or dtype not in ("model", *_HINTS):
        raise UsageError(
            f"{ENGINE} computes what its graph says, here on the CPU and always optimised; leave --attention, "
            f"--kv-cache, --device and --compile out; --dtype is its hint: {' or '.join(_HINTS)}"
        )
    session = _open(graph, record, dtype)
    return record, [session.decode(list(row), generate) for row in rows]


def _open(graph: Exported, record: Record, dtype: str) -> Session:
    core = openvino.Core()
    hint = {_HINT: _HINTS[dtype]} if dtype != "model" else {}
    try:
        model = core.read_model(str(graph.file))
        had = {name for output in model.outputs for name in output.names}
        model.add_outputs([name for name in graph.names if name not in had])
        compiled = core.compile_model(model, _DEVICE, hint)
    except Exception as error:  # of its C++ code, of no one class
        raise InputError(f"OpenVINO does not load {graph.file}: {words(error)}") from error
    record.facts |= {
        "openvino": openvino.__version__,
        "precision hint": hint.get(_HINT, "none"),
        "computed in": compiled.get_property(_HINT).get_type_name(),
        "threads": str(compiled.get_property("INFERENCE_NUM_THREADS")),
    }
    request = compiled.create_infer_request()

    def call(given: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        try:
            request.infer(dict(given))
            return {name: _array(request.get_tensor(name)) for name in graph.names}
        except Exception as error:  # of its C++ code, of no one class
            raise InputError(f"OpenVINO does not run it: {words(error)}") from error

    return Session(graph, [_argument(one) for one in compiled.inputs], call, record)


def _argument(one: Any) -> Argument:
    kind = one.element_type.get_type_name()
    shape = [None if size.is_dynamic else size.get_length() for size in one.partial_shape]
    return Argument(one.any_name, _NUMPY.get(kind), kind, shape)


def _array(tensor: Any) -> np.ndarray:
    """A copy, in its own type: of bfloat16 OpenVINO gives numpy the bytes alone."""
    kind = _NUMPY[tensor.element_type.get_type_name()]
    return np.array(tensor.data).view(kind).reshape(tuple(tensor.shape))
