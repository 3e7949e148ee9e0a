"""What ONNX Runtime computes from a file of `torch.onnx`: values inside its graph, asked for as outputs of it.

What is asked for cannot be fused away: without `deep` only what modules give, so that what is inside of one is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from stages.errors import InputError, UsageError
from stages.files.forward_dump import forward_key
from stages.run.captured import Call, Record
from stages.run.production import greedy
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig, RawConfig
from stages.spec.sites import ROTATED, Reached
from stages.spec.stage import Pipeline
from svf_onnx.graph import Graph

ENGINE = "onnxruntime"
_PROVIDER = "CPUExecutionProvider"
_FOLDER = "session.model_external_initializers_file_folder_path"
_LOUD = 4  # only what ends the process is logged: errors are raised
_HEADS_FIRST = {"attn_scores", "attn_softmax", *(site.stage for site in ROTATED)}


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
    if file is None:
        raise UsageError(f"{ENGINE} runs ONNX files, and {source} is none")
    if attention is not None or cache is not None or device != "cpu" or dtype != "model":
        raise UsageError(
            f"{ENGINE} computes what its graph says, here on the CPU; leave --attention, --kv-cache, --device and "
            "--dtype out"
        )
    record = Record(config, raw_config, source, weights)
    session = _open(Path(file), record, compiled, deep)
    return record, [_decode(session, record, list(row), generate) for row in rows]


@dataclass(frozen=True)
class _Session:
    """A graph that ONNX Runtime has taken, and which of its values are which stages."""

    session: Any
    values: dict[Reached, str]
    path: Pipeline
    sizes: dict[str, int]

    def run(self, tokens: Sequence[int]) -> dict[Reached, np.ndarray]:
        """What it computes of tokens, by layer and site: `[1, rows, ...]`, as declared."""
        given = {argument.name: _input(argument, tokens) for argument in self.session.get_inputs()}
        names = list(dict.fromkeys(self.values.values()))
        try:
            out = dict(zip(names, self.session.run(names, given), strict=True))
        except Exception as error:  # of its C++ code, of no one class
            raise InputError(f"ONNX Runtime does not run it: {_words(error)}") from error
        return {at: self._rows(at, out[name], len(tokens)) for at, name in self.values.items()}

    def _rows(self, at: Reached, array: np.ndarray, n: int) -> np.ndarray:
        layer, site = at
        stage = self.path[site.stage]
        if site.stage in _HEADS_FIRST and array.ndim == 4:
            array = array.swapaxes(1, 2)
        rows = array.reshape(array.shape[1:]) if array.ndim > 1 and array.shape[0] == 1 else array
        sizes = {**self.sizes, "tokens": n, "queries": n, "keys": n}
        axes = stage.shape.split()
        if axes[0] == "heads":
            axes = [axes[1], axes[0], *axes[2:]]
        expected = tuple(math.prod(sizes[name] for name in axis.split("*")) for axis in axes)
        if axes[-1] == "qkv":
            expected = (n, sizes["kv_heads" if site.part else "heads"] * sizes["head_dim"])
        fits = rows.shape == expected or (site.stage == "lm_head" and rows.shape[1:] == expected[1:])
        if not fits:
            raise InputError(
                f"{forward_key((layer, site.stage))}: value {self.values[at]} of the graph is {list(array.shape)}, "
                f"expected {list(expected)} ({' '.join(axes)}); is it of another model than --model?"
            )
        return np.ascontiguousarray(rows)[None]


def _open(file: Path, record: Record, compiled: bool, deep: bool) -> _Session:
    try:
        model = onnx.load(file, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise InputError(f"{file} is no ONNX file: {_words(error)}") from error
    values = Graph(model.graph).values(record.path, deep)
    _check_layers(values, record, file)
    named = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in {*values.values()} - named)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if compiled else levels.ORT_DISABLE_ALL
    options.log_severity_level = _LOUD
    options.add_session_config_entry(_FOLDER, str(file.resolve().parent))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[_PROVIDER])
    except Exception as error:  # of its C++ code, of no one class
        raise InputError(f"ONNX Runtime does not load {file}: {_words(error)}") from error
    record.facts |= {
        "engine": ENGINE,
        "onnxruntime": onnxruntime.__version__,
        "provider": ", ".join(session.get_providers()),
        "optimisation": "all" if compiled else "none",
        "values asked for": "modules' and those inside" if deep else "modules'",
        "exporter": f"{model.producer_name} {model.producer_version}".strip() or "unnamed",
        "opset": str(max((entry.version for entry in model.opset_import if not entry.domain), default=0)),
        "device": "cpu",
        "threads": str(options.intra_op_num_threads or "its own choice"),
    }
    return _Session(session, values, record.path, record.config.sizes)


def _check_layers(values: dict[Reached, str], record: Record, file: Path) -> None:
    """`InputError` unless every layer of the model is there, and each gives the same stages."""
    expected = range(record.config.num_hidden_layers)
    of = {n: {site.stage for layer, site in values if layer == n} for n in {at for at, _ in values} - {None}}
    if {*of} != {*expected}:
        raise InputError(
            f"{file} has {len(of)} layers, and the model {len(expected)}; --model says which checkpoint it was made of"
        )
    for n in expected:
        if lacking := set.union(*of.values()) - of[n]:
            raise InputError(f"{file}: layer {n} lacks {', '.join(sorted(lacking))}, which another layer has")


def _input(argument: Any, tokens: Sequence[int]) -> np.ndarray:
    """What an input of the graph is given: the tokens, their mask and positions; caches are empty."""
    n = len(tokens)
    known = {"input_ids": np.asarray(tokens), "attention_mask": np.ones(n), "position_ids": np.arange(n)}
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    kind = kinds.get(argument.type)
    if argument.name in known and kind is not None:
        return known[argument.name][None].astype(kind)
    if argument.name.startswith("past") and kind is np.float32 and len(argument.shape) == 4:
        batch, *rest = (size if isinstance(size, int) else 0 for size in argument.shape)
        return np.zeros((batch or 1, *rest), kind)
    raise InputError(
        f"the graph has an input {argument.name} of {argument.type}; what is known is input_ids, attention_mask, "
        "position_ids and past_key_values"
    )


def _decode(session: _Session, record: Record, tokens: list[int], generate: int) -> list[int]:
    """Greedy tokens of one sequence, each from a call on all before it; the last call is recorded."""
    found: list[int] = []
    for step in range(generate + 1):
        arrays = session.run([*tokens, *found])
        if step < generate:
            found.append(greedy(next(array for (_, site), array in arrays.items() if site.stage == "lm_head")[0]))
    ids = np.asarray([[*tokens, *found]], np.int64)
    record.calls.append(Call(ids, np.ones(ids.shape, bool), 0, arrays))
    return found


def _words(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
