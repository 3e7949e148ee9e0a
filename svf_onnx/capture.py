"""What ONNX Runtime computes from a file of `torch.onnx`: values inside its graph, asked for as outputs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from stages.errors import InputError, UsageError
from stages.run.captured import Record
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig, RawConfig
from svf_onnx.session import Argument, Exported, Session, exported, words

ENGINE = "onnxruntime"
_PROVIDER = "CPUExecutionProvider"
_FOLDER = "session.model_external_initializers_file_folder_path"
_LOUD = 4  # only what ends the process is logged: errors are raised
_KINDS: dict[str, np.dtype] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(float)": np.dtype(np.float32),
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
    """Have ONNX Runtime run each of the token ids `rows` by itself from an ONNX `file`, and decode.

    `source` is the checkpoint that the file was made from. The record is of the tokens and the `generate` greedy ones
    after them, all of them in one call; these tokens for each row. `compiled`: with every optimisation of the graph,
    else none. `UsageError` for what it has not; `InputError` for a file that it does not load or that is of another
    model.
    """
    record = Record(config, raw_config, source, weights)
    graph = exported(ENGINE, file, record, deep)
    if attention is not None or cache is not None or device != "cpu" or dtype != "model":
        raise UsageError(
            f"{ENGINE} computes what its graph says, here on the CPU; leave --attention, --kv-cache, --device and "
            "--dtype out"
        )
    session = _open(graph, record, compiled)
    return record, [session.decode(list(row), generate) for row in rows]


def _open(graph: Exported, record: Record, compiled: bool) -> Session:
    outputs = graph.proto.graph.output
    named = {output.name for output in outputs}
    outputs.extend(onnx.ValueInfoProto(name=name) for name in graph.names if name not in named)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if compiled else levels.ORT_DISABLE_ALL
    options.log_severity_level = _LOUD
    options.add_session_config_entry(_FOLDER, str(graph.file.resolve().parent))
    try:
        session = onnxruntime.InferenceSession(graph.proto.SerializeToString(), options, providers=[_PROVIDER])
    except Exception as error:  # of its C++ code, of no one class
        raise InputError(f"ONNX Runtime does not load {graph.file}: {words(error)}") from error
    record.facts |= {
        "onnxruntime": onnxruntime.__version__,
        "provider": ", ".join(session.get_providers()),
        "optimisation": "all" if compiled else "none",
        "threads": str(options.intra_op_num_threads or "its own choice"),
    }

    def call(given: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        try:
            return dict(zip(graph.names, session.run(graph.names, dict(given)), strict=True))
        except Exception as error:  # of its C++ code, of no one class
            raise InputError(f"ONNX Runtime does not run it: {words(error)}") from error

    return Session(graph, [_argument(one) for one in session.get_inputs()], call, record)


def _argument(one: Any) -> Argument:
    shape = [size if isinstance(size, int) else None for size in one.shape]
    return Argument(one.name, _KINDS.get(one.type), one.type, shape)
