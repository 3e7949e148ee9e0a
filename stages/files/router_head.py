"""The router head's weights: a semantic export's own file, or the end of a router vector behind the SVF offsets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.errors import InputError, UsageError
from stages.files.bundle import Bundle, offsets_key
from stages.files.selection import RouterVector, Sample, SelectedTensor, Selection, load_router_vector
from stages.files.tensorfile import TensorFile
from stages.spec.router import ROLES

HEAD_KEY = "trinity.router_head.linear.weight"


@dataclass(frozen=True)
class RouterHead:
    """`weight`: float32 `[agents + roles, hidden]`, agents first. `sha256`: of its bytes."""

    weight: np.ndarray

    @property
    def agents(self) -> int:
        return len(self.weight) - len(ROLES)

    @property
    def outputs(self) -> list[str]:
        """A name for each row."""
        return [f"agent {i}" for i in range(self.agents)] + list(ROLES)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.weight.tobytes()).hexdigest()


def load_head(path: Path, hidden: int, selection: Selection | None, bundle: Bundle | None) -> RouterHead:
    """The head in `path`: safetensors with `trinity.router_head.linear.weight`, or a router vector.

    In a vector it begins behind the offsets, of which `selection`, or else an all-selected `bundle`, tells the count.
    `InputError` for another width, too few rows, NaN, or a vector whose offsets are not those of `bundle`.
    """
    stored = None if path.suffix == ".npy" else _stored(path)
    if stored is not None:
        return _checked(stored, path, hidden)
    selection = selection or (None if bundle is None else _selection_of(bundle))
    if selection is None:
        raise UsageError(
            f"--head {path}: is a router vector, in which the head comes after the offsets of the adapted tensors; "
            "name these tensors: --adapted COMPONENTS with all selected tensors, or --layers 26"
        )
    vector = load_router_vector(path, selection, hidden)
    if bundle is not None:
        _check_offsets(vector, selection, bundle, path)
    return _checked(vector.values[selection.offset_count :].reshape(-1, hidden), path, hidden)


def _stored(path: Path) -> np.ndarray | None:
    with TensorFile(path) as file:
        return file.read(HEAD_KEY) if HEAD_KEY in file.tensors else None


def _checked(weight: np.ndarray, path: Path, hidden: int) -> RouterHead:
    if weight.ndim != 2 or weight.shape[1] != hidden or len(weight) <= len(ROLES):
        raise InputError(
            f"{path}: router head is {list(weight.shape)}, expected [agents + {len(ROLES)}, {hidden}] with at least "
            "one agent; is it of another model, or were other layers adapted?"
        )
    with np.errstate(over="ignore"):  # refused below
        narrow = np.ascontiguousarray(weight, np.float32)
    if not np.isfinite(narrow).all():
        raise InputError(f"{path}: router head: NaN or infinity in float32")
    return RouterHead(narrow)


def _selection_of(bundle: Bundle) -> Selection | None:
    """The bundle's tensors with their offsets; None when they are not all that the vector adapts."""
    tensors = []
    position = 0
    for entry in bundle.entries:
        if entry.offset_start != position or entry.offset_end != position + min(entry.shape):
            return None
        position += min(entry.shape)
        tensors.append(
            SelectedTensor(entry.source_name, entry.elixir_name, entry.shape, entry.offset_start, entry.offset_end)
        )
    first = tensors[0]
    if len(tensors) == 1:  # a sample's bundle does not say what else is adapted
        return None
    return Selection(tuple(tensors), Sample(first.source_name, first.shape, None), None)


def _check_offsets(vector: RouterVector, selection: Selection, bundle: Bundle, path: Path) -> None:
    stored = {entry.source_name for entry in bundle.entries}
    for tensor in selection.tensors:
        if tensor.source_name not in stored:
            continue
        if not np.array_equal(bundle.offsets.read(offsets_key(tensor.source_name)), vector.offsets(tensor)):
            raise InputError(
                f"{path}: offsets of {tensor.source_name} are not those of {bundle.folder}; a head belongs to the "
                "weights it was trained with: give the vector that the components were made with"
            )
