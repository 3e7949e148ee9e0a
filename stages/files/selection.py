"""Which tensors TRINITY adapts, in which order, and which slice of the router vector each one gets."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, UsageError, shown
from stages.files.jsonio import read_bytes, read_object
from stages.files.npy import read_npy_header
from stages.files.tensorfile import TensorFile

ROUTER_VECTOR_KEY = "trinity_router_es_vector"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# A router vector has one value per singular value and head weight: 150 KB published; 1 GB is no vector.
_MAX_VECTOR_BYTES = 1 << 30

# Names of the Bumblebee parameters, as in the published manifest for Qwen3-0.6B.
_ELIXIR = {
    "model.embed_tokens.weight": "embedder.token_embedding.kernel",
    "lm_head.weight": "language_modeling_head.output.kernel",
    "self_attn.q_proj.weight": "self_attention.query.kernel",
    "self_attn.k_proj.weight": "self_attention.key.kernel",
    "self_attn.v_proj.weight": "self_attention.value.kernel",
    "self_attn.o_proj.weight": "self_attention.output.kernel",
    "mlp.gate_proj.weight": "ffn.gate.kernel",
    "mlp.up_proj.weight": "ffn.intermediate.kernel",
    "mlp.down_proj.weight": "ffn.output.kernel",
}


@dataclass(frozen=True)
class SelectedTensor:
    """One adapted weight and its slice `[offset_start:offset_end]` of the offsets."""

    source_name: str
    elixir_name: str
    shape: tuple[int, int]
    offset_start: int
    offset_end: int

    @property
    def singular_values(self) -> int:
        return min(self.shape)

    @property
    def safe_key(self) -> str:
        return safe_key(self.source_name)


@dataclass(frozen=True)
class Sample:
    """The tensor that the original tool reports on, and the orientation of its final stages."""

    source_name: str
    target_shape: tuple[int, int]
    expected_bf16_sha256: str | None


@dataclass(frozen=True)
class Selection:
    """Selected tensors in state-dict order, the sample, and the manifest they come from (None: by rule)."""

    tensors: tuple[SelectedTensor, ...]
    sample: Sample
    path: Path | None

    @property
    def offset_count(self) -> int:
        return max(t.offset_end for t in self.tensors)

    def table(self) -> str:
        """Expected offsets per tensor, for error messages."""
        return "; ".join(f"{t.source_name} {t.offset_start}:{t.offset_end}" for t in self.tensors)


def safe_key(name: str) -> str:
    """The tensor name as bundle keys hold it: other characters than letters, digits, `_ . -` become `__`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "__", name)


def layer_of(name: str) -> int | None:
    """Decoder layer of a parameter name; None for whole-model tensors."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def elixir_name(name: str) -> str:
    """Bumblebee's name of a parameter."""
    layer = layer_of(name)
    if layer is None:
        return _ELIXIR.get(name, name)
    tail = name.removeprefix(f"model.layers.{layer}.")
    return f"decoder.blocks.{layer}.{_ELIXIR.get(tail, tail)}"


def select_by_rule(shapes: Mapping[str, tuple[int, ...]], layers: Iterable[int]) -> Selection:
    """Selection rule of TRINITY over `shapes` in state-dict order.

    Rank over 1 and every dimension over 1; `model.layers.<i>.` for chosen layers alone; all else always.
    """
    wanted = set(layers)
    present = {layer_of(name) for name in shapes}
    missing = sorted(wanted - {layer for layer in present if layer is not None})
    if missing:
        count = sum(layer is not None for layer in present)
        raise UsageError(f"layer {missing[0]} does not exist; the model has layers 0 to {count - 1}")
    tensors: list[SelectedTensor] = []
    position = 0
    for name, shape in shapes.items():
        layer = layer_of(name)
        if len(shape) < 2 or min(shape) < 2 or (layer is not None and layer not in wanted):
            continue
        rows, cols = shape
        tensors.append(SelectedTensor(name, elixir_name(name), (rows, cols), position, position + min(shape)))
        position += min(shape)
    if not tensors:
        raise UsageError("the selection rule picks no tensor of this model")
    sample = next((t for t in tensors if t.source_name.endswith("mlp.gate_proj.weight")), tensors[0])
    # The original reports on gate_proj as Axon stores it, [in, out]: the source's transpose.
    return Selection(tuple(tensors), Sample(sample.source_name, (sample.shape[1], sample.shape[0]), None), None)


def load_manifest(path: Path) -> Selection:
    """The selection in a reference manifest; every field checked, errors name the entry."""
    raw = read_object(path)
    entries = raw.get("selected_tensors")
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list 'selected_tensors'; is this a reference manifest?")
    tensors = tuple(_entry(entry, f"{path}: selected_tensors[{i}]") for i, entry in enumerate(entries))
    _check_offsets(tensors, path)
    return Selection(tensors, _sample(raw, tensors, path), path)


def _entry(entry: Any, where: str) -> SelectedTensor:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object")
    name = entry.get("source_name")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: source_name is missing")
    shape = _shape(entry.get("shape"), f"{where} ({shown(name)}): shape")
    start, end = entry.get("offset_start"), entry.get("offset_end")
    if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end:
        raise InputError(f"{where} ({shown(name)}): offset_start, offset_end are {shown(start)}, {shown(end)}")
    rank = entry.get("singular_values", end - start)
    if rank != min(shape) or end - start != rank:
        raise InputError(
            f"{where} ({shown(name)}): shape {list(shape)} has {min(shape)} singular values, "
            f"the manifest says {shown(rank)} and gives {end - start} offsets"
        )
    return SelectedTensor(name, str(entry.get("elixir_name") or elixir_name(name)), shape, start, end)


def _shape(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise InputError(f"{where}: expected two positive sizes, got {shown(value)}")
    return (value[0], value[1])


def _check_offsets(tensors: tuple[SelectedTensor, ...], path: Path) -> None:
    names: set[str] = set()
    position = 0
    for t in tensors:
        if t.source_name in names:
            raise InputError(f"{path}: tensor '{shown(t.source_name)}' is selected twice")
        if t.offset_start != position:
            raise InputError(
                f"{path}: offsets of '{shown(t.source_name)}' start at {t.offset_start}, but the tensors before it "
                f"end at {position}"
            )
        names.add(t.source_name)
        position = t.offset_end


def _sample(raw: Mapping[str, Any], tensors: tuple[SelectedTensor, ...], path: Path) -> Sample:
    value = raw.get("sample_adapted_tensor")
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object 'sample_adapted_tensor'")
    by_name = {t.source_name: t for t in tensors}
    name = value.get("source_name")
    if name not in by_name:
        raise InputError(f"{path}: the sample '{shown(name)}' is not among the selected tensors")
    target = _shape(value.get("sample_reconstructed_shape"), f"{path}: sample_reconstructed_shape")
    source = by_name[name].shape
    if target not in (source, (source[1], source[0])):
        raise InputError(
            f"{path}: sample_reconstructed_shape {list(target)} is neither {list(source)} nor its transpose"
        )
    expected = value.get("sample_reconstructed_bf16_sha256")
    if expected is not None and not (isinstance(expected, str) and re.fullmatch("[0-9a-f]{64}", expected)):
        raise InputError(f"{path}: sample_reconstructed_bf16_sha256 is not a sha256")
    return Sample(name, target, expected)


@dataclass(frozen=True)
class RouterVector:
    """The one-dimensional TRINITY vector as float32, with the sha256 of its file and the dtype it had there."""

    values: np.ndarray
    sha256: str
    stored_dtype: str

    def offsets(self, tensor: SelectedTensor) -> np.ndarray:
        """Scale offsets of one tensor, `[singular_values]`."""
        return self.values[tensor.offset_start : tensor.offset_end].copy()


def load_router_vector(path: Path, selection: Selection, hidden: int | None = None) -> RouterVector:
    """Read `.npy` or safetensors; SVF offsets first, then the router head `[agents + 3, hidden]`.

    `InputError` unless it is one-dimensional, finite and as long as the selection needs; the expected table
    is in the message.
    """
    raw = read_bytes(path, _MAX_VECTOR_BYTES)
    if path.suffix == ".npy":
        read_npy_header(path)  # before an array of any size is made
        try:
            values = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{path}: not a readable .npy file: {shown(error)}") from None
    else:
        with TensorFile(path) as file:
            values = file.read(ROUTER_VECTOR_KEY)
    if values.ndim != 1 or values.dtype.kind != "f":
        raise InputError(f"{path}: expected a one-dimensional float vector, got {values.dtype} {list(values.shape)}")
    extra = values.size - selection.offset_count
    if extra < 0 or (hidden and extra % hidden):
        raise InputError(
            f"{path}: {values.size} values; expected {selection.offset_count} offsets"
            + (f" and then a router head of whole rows of {hidden}" if hidden else "")
            + f": {selection.table()}"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise InputError(f"{path}: NaN or infinity in float32 at index {int(np.flatnonzero(~np.isfinite(narrow))[0])}")
    return RouterVector(narrow, hashlib.sha256(raw).hexdigest(), values.dtype.name)
