"""One tensor of one side of a comparison of checkpoints: its values and, of a GGUF file's, its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stages.files.gguf_model import GgufInfo, GgufModel
from stages.files.source import ModelSource
from stages.files.tensorfile import TensorInfo
from stages.judge.quantised import Found, Intervals, exactly, intervals, is_narrow

# Elements of one look at blocks: float64 takes eight bytes for each, and a table of codes sixteen values.
_BLOCK_ELEMENTS = 1 << 18

Order = Callable[[np.ndarray, int], np.ndarray]  # rows, length of a head -> the rows in another order


@dataclass(frozen=True)
class Stored:
    """One tensor of one side, under the name that it is stored by. `order`: how rows of heads of `head` are turned."""

    checkpoint: ModelSource
    info: TensorInfo
    head: int = 0
    order: Order = lambda rows, _: rows

    def rows(self, start: int, stop: int) -> np.ndarray:
        if not self.info.shape:
            return self.whole()
        return self._ordered(lambda first, last: self.checkpoint.read(self.info.name, first, last), start, stop)

    def columns(self, start: int, stop: int) -> np.ndarray:
        return self.checkpoint.columns(self.info.name, start, stop)

    def whole(self) -> np.ndarray:
        return self.checkpoint.read(self.info.name)

    def sha256(self) -> str:
        return self.checkpoint.weights_sha256([self.info.name])[self.info.name]

    @property
    def kind(self) -> str | None:
        """The type of a GGUF file's tensor that has fewer bits than float32; None of any other."""
        if isinstance(self.info, GgufInfo) and (self.info.quantised or self.info.dtype.itemsize == 2):
            return self.info.stored.type
        return None

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Stored rows of a GGUF file's matrix; a vector is one row."""
        model, info = self.checkpoint, self.info
        assert isinstance(model, GgufModel)
        assert isinstance(info, GgufInfo)
        if len(info.shape) == 1:
            return model.raw(info, 0, 1)
        return self._ordered(lambda first, last: model.raw(info, first, last), start, stop)

    def _ordered(self, read: Callable[[int, int], np.ndarray], start: int, stop: int) -> np.ndarray:
        if not self.head:
            return read(start, stop)
        first, last = start // self.head * self.head, -(-stop // self.head) * self.head
        return self.order(read(first, last), self.head)[start - first : stop - first]


def blocks_of(stored: Stored, other: Stored, *, turned: bool = False, whole: bool = True) -> Found:
    """What the blocks of `stored` are beside the weights of `other`, or beside its transpose where `turned`.

    Not `whole`: no further than the first wrong one.
    """
    assert stored.kind is not None
    found = Found(stored.kind)
    for start, stop in _ranges(stored):
        found.add(
            start, intervals(stored.raw(start, stop), stored.kind), _meant(stored.kind, other, start, stop, turned)
        )
        if found.wrong and not whole:
            break
    return found


def weights_of(other: Stored, start: int, stop: int) -> np.ndarray:
    """Rows of weights, a vector as one row."""
    return other.rows(start, stop) if len(other.info.shape) > 1 else other.whole()[None]


def _ranges(stored: Stored) -> Iterator[tuple[int, int]]:
    rows = stored.info.shape[0] if len(stored.info.shape) > 1 else 1
    step = max(1, _BLOCK_ELEMENTS // stored.info.shape[-1])
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _meant(kind: str, other: Stored, start: int, stop: int, turned: bool) -> Intervals:
    """The weights that the rows should stand for: those of `other`, or those that its own codes may stand for."""
    if turned:
        return exactly(np.ascontiguousarray(other.columns(start, stop).T), direct=is_narrow(kind))
    if other.kind is not None:
        return intervals(other.raw(start, stop), other.kind)
    return exactly(weights_of(other, start, stop), direct=is_narrow(kind))
