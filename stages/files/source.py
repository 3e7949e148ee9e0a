"""Where a model is read from: its config and its tensors, whatever they are stored in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from stages.files.checkpoint import open_checkpoint, open_recorded
from stages.files.gguf_file import is_gguf
from stages.files.gguf_model import GgufModel
from stages.files.tensorfile import TensorInfo
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig


class ModelSource(Weights, Protocol):
    """An open model; a context manager. `files.checkpoint.Checkpoint` is one, `files.gguf_model.GgufModel` another.

    `path`: where it lies. `source`: what the user named. `revision`: the hub's commit, None for what is local.
    `raw_config`: its `config.json`, or what says the same. `tensors`: name -> dtype and shape, of what is stored.
    """

    path: Path
    source: str
    revision: str | None
    raw_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def config(self) -> ModelConfig:
        """The checked meaning of the config; `InputError` naming what is refused."""

    def resolve(self, name: str) -> str:
        """The stored tensor that parameter `name` has its values from: itself, or the embedding of a tied LM head."""

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of the tensor that `name` resolves to."""

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns `[start:stop]` of the matrix that `name` resolves to."""

    def check(self) -> None:
        """`InputError`, naming tensors, unless names, shapes and dtypes are what the config asks for."""

    def fingerprint(self) -> dict[str, str | int]:
        """What the model is, without reading its weights: digests by name, and `bytes`."""

    def weights_sha256(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 over the bytes of each named tensor, as it is read."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def open_model(source: str | os.PathLike[str], *, recorded: bool = False) -> ModelSource:
    """Open what the user named: a folder, a GGUF file, or a hub model `org/name[@revision]`.

    A hub model is fetched unless `HF_HUB_OFFLINE` is set.

    `recorded`: what a file names, whose word reaches no network. Config and weights are checked by `ModelSource.check`.
    `NotFoundError` when it is not there or the hub is out of reach, `InputError` when it is malformed.
    """
    if is_gguf(Path(source)):
        return GgufModel(Path(source), os.fspath(source))
    return open_recorded(os.fspath(source)) if recorded else open_checkpoint(source)
