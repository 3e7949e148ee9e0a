"""A file of `torch.onnx` in an engine: which of its values are stages, what its inputs are given, how it decodes.

What is asked for cannot be fused away: without `deep` only what modules give, so that what is inside of one is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from stages.errors import InputError, UsageError
from stages.files.forward_dump import forward_key
from stages.run.captured import Call, Record
from stages.run.production import greedy
from stages.spec.sites import ROTATED, Reached
from svf_onnx.graph import Graph

_HEADS_FIRST = {"attn_scores", "attn_softmax", *(site.stage for site in ROTATED)}
_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_KINDS = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float32))


@dataclass(frozen=True)
class Exported:
    """An ONNX `file`: its graph, and which of its values are which stages, by layer and site."""

    file: Path
    proto: Any
    values: Mapping[Reached, str]

    @property
    def names(self) -> list[str]:
        """The values, each once."""
        return list(dict.fromkeys(self.values.values()))

    @property
    def facts(self) -> dict[str, str]:
        """What the file says of itself."""
        opsets = (entry.version for entry in self.proto.opset_import if not entry.domain)
        return {
            "exporter": f"{self.proto.producer_name} {self.proto.producer_version}".strip() or "unnamed",
            "opset": str(max(opsets, default=0)),
        }


@dataclass(frozen=True)
class Argument:
    """An input of a graph; `kind` is None of a type that is not known, whose name in the engine's words is `said`."""

    name: str
    kind: np.dtype | None
    said: str
    shape: Sequence[int | None]

    def given(self, tokens: Sequence[int]) -> np.ndarray:
        """What it is given: the tokens, their mask and positions; caches are empty."""
        n = len(tokens)
        known = {"input_ids": np.asarray(tokens), "attention_mask": np.ones(n), "position_ids": np.arange(n)}
        if self.name in known and self.kind in _KINDS:
            return known[self.name][None].astype(self.kind)
        if self.name.startswith("past") and self.kind == np.float32 and len(self.shape) == 4:
            batch, *rest = (size or 0 for size in self.shape)
            return np.zeros((batch or 1, *rest), self.kind)
        raise InputError(
            f"the graph has an input {self.name} of {self.said}; what is known is input_ids, attention_mask, "
            "position_ids and past_key_values"
        )


@dataclass(frozen=True)
class Session:
    """A graph that an engine has taken. `call` computes values of it from its inputs, both by name."""

    exported: Exported
    arguments: Sequence[Argument]
    call: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
    record: Record

    def decode(self, tokens: list[int], generate: int) -> list[int]:
        """Greedy tokens of one sequence, each from a call on all before it; the last call is recorded."""
        found: list[int] = []
        for step in range(generate + 1):
            arrays = self._run([*tokens, *found])
            if step < generate:
                found.append(greedy(next(array for (_, site), array in arrays.items() if site.stage == "lm_head")[0]))
        ids = np.asarray([[*tokens, *found]], np.int64)
        self.record.calls.append(Call(ids, np.ones(ids.shape, bool), 0, arrays))
        return found

    def _run(self, tokens: Sequence[int]) -> dict[Reached, np.ndarray]:
        """What it computes of tokens, by layer and site: `[1, rows, ...]`, as declared."""
        out = self.call({argument.name: argument.given(tokens) for argument in self.arguments})
        return {at: self._rows(at, out[name], len(tokens)) for at, name in self.exported.values.items()}

    def _rows(self, at: Reached, array: np.ndarray, n: int) -> np.ndarray:
        layer, site = at
        stage = self.record.path[site.stage]
        if site.stage in _HEADS_FIRST and array.ndim == 4:
            array = array.swapaxes(1, 2)
        rows = array.reshape(array.shape[1:]) if array.ndim > 1 and array.shape[0] == 1 else array
        sizes = {**self.record.config.sizes, "tokens": n, "queries": n, "keys": n}
        axes = stage.shape.split()
        if axes[0] == "heads":
            axes = [axes[1], axes[0], *axes[2:]]
        expected = tuple(math.prod(sizes[name] for name in axis.split("*")) for axis in axes)
        if axes[-1] == "qkv":
            expected = (n, sizes["kv_heads" if site.part else "heads"] * sizes["head_dim"])
        fits = rows.shape == expected or (site.stage == "lm_head" and rows.shape[1:] == expected[1:])
        if not fits:
            raise InputError(
                f"{forward_key((layer, site.stage))}: value {self.exported.values[at]} of the graph is "
                f"{list(array.shape)}, expected {list(expected)} ({' '.join(axes)}); is it of another model than "
                "--model?"
            )
        return np.ascontiguousarray(rows)[None]


def exported(engine: str, file: str | None, record: Record, deep: bool) -> Exported:
    """An ONNX file of the record's model; `UsageError` where there is none, `InputError` for one of another model."""
    if file is None:
        raise UsageError(f"{engine} runs ONNX files, and {record.source} is none")
    try:
        model = onnx.load(file, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise InputError(f"{file} is no ONNX file: {words(error)}") from error
    if any(tensor.data_type in _NARROW for tensor in model.graph.initializer):
        raise InputError(
            f"{file} has weights in 16 bits; what {engine} does of these is not known here: export float32"
        )
    values = Graph(model.graph).values(record.path, deep)
    _check_layers(values, record, Path(file))
    record.facts |= {
        "engine": engine,
        "values asked for": "modules' and those inside" if deep else "modules'",
        "device": "cpu",
    }
    found = Exported(Path(file), model, values)
    record.facts |= found.facts
    return found


def _check_layers(values: Mapping[Reached, str], record: Record, file: Path) -> None:
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


def words(error: Exception) -> str:
    """The first line of what an engine says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
