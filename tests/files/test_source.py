"""A model is whatever has `ModelSource`'s face: one that lies in no safetensors file is run and judged like any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from forward_models import MODELS, MemoryWeights, random_weights
from helpers import svf

from stages.errors import NotFoundError
from stages.files import source
from stages.files.checkpoint import Checkpoint
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import TensorInfo
from stages.spec.families import parse_config


class InMemory(MemoryWeights):
    """A random model in memory, as some other format's reader would have it."""

    def __init__(self, name: str):
        self.path, self.source, self.revision = Path("/nowhere") / name, name, None
        self.raw_config: dict[str, Any] = MODELS["llama-tied"].raw("float32")
        self.config = parse_config(self.raw_config, name)
        super().__init__(random_weights(self.config))
        self.tensors = {name: TensorInfo(name, a.dtype, a.shape, 0) for name, a in self.weights.items()}

    def resolve(self, name: str) -> str:
        return name if name in self.weights else "model.embed_tokens.weight"

    def info(self, name: str) -> TensorInfo:
        return self.tensors[self.resolve(name)]

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.weights[self.resolve(name)][:, start:stop]

    def check(self) -> None:
        pass

    def fingerprint(self) -> dict[str, str | int]:
        return {"headers_sha256": hashlib.sha256(self.source.encode()).hexdigest()}

    def weights_sha256(self, names: Iterable[str]) -> dict[str, str]:
        return {name: hashlib.sha256(self.read(name).tobytes()).hexdigest() for name in names}

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def opened(name: Any) -> Any:
    if "memory" in str(name):
        return InMemory(Path(name).name)
    raise NotFoundError(f"{name}: is not here")


def test_a_model_of_another_format_is_run_and_judged_like_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "open_checkpoint", opened)
    monkeypatch.setattr(source, "open_recorded", opened)
    words = ("--tokens", "3,1,4,1,5", "--backend", "reference", "--out", tmp_path / "dump", "--json")
    done = svf("forward", "memory", *words)
    assert done.code == 0, done.err
    done = svf("audit", tmp_path / "dump", "--json")
    assert (done.code, done.json["outcome"]) == (0, "sound")
    done = svf("audit", tmp_path / "dump", "--model", "another memory", "--json")
    assert done.code == 3
    assert "is not the model" in done.error


def test_a_checkpoint_is_a_source(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_model(tmp_path / "nothing")
    kind: type[ModelSource] = Checkpoint  # mypy checks the face
    assert all(hasattr(kind, name) for name in vars(ModelSource) if not name.startswith("_"))
