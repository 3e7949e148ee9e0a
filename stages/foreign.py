"""Forwards recorded by other programs: safetensors with the documented keys, or APRT, given the model and the tokens.

docs/foreign-dumps.md says how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np

from stages.aprt import AprtTree, is_aprt_tree
from stages.backend import Weights
from stages.errors import InputError, NotFoundError, shown
from stages.forward import DTYPES, forward_path, stage_shape
from stages.forward_dump import Place, forward_key, parse_key
from stages.forward_judge import ForwardRun, order_of, stage_of
from stages.qwen import QwenConfig
from stages.stage import Path as StagePath
from stages.stage import Stage
from stages.tensorfile import TensorFile, sha256, stored_dtype

Reader = Callable[[], np.ndarray]
_BF16 = np.dtype(ml_dtypes.bfloat16)
_NARROW = (_BF16, np.dtype(np.float16))


class ForeignSide:
    """Stages of another program with the face of a `ForwardSide`: shaped and typed as the model's path declares.

    A batch axis of 1 is dropped, flat values are given their shape where they have as many elements, and float32
    values of a bfloat16 or float16 run are cast back. What does not fit is handed on as it is, to be judged `shape`.
    """

    def __init__(self, label: str, readers: Mapping[Place, Reader], shapes: Mapping[Place, tuple[int, ...]]):
        self.label = label
        self._shapes = dict(shapes)
        self.facts: dict[str, str] = {}
        self.places = {place: forward_key(place) for place in readers}
        self._readers = dict(readers)
        self._path: StagePath | None = None
        self._config: QwenConfig | None = None
        self._tokens = 0

    def interpret(self, path: StagePath, config: QwenConfig, tokens: int) -> None:
        """Say what the values mean, from now on."""
        self._path, self._config, self._tokens = path, config, tokens

    def raw(self, place: Place) -> np.ndarray:
        """A stage as stored."""
        return self._readers[place]()

    def read(self, place: Place) -> np.ndarray:
        """A stage as declared, if it fits."""
        assert self._path is not None
        stage, array = stage_of(self._path, place), self.raw(place)
        array = array.reshape(self._shape(stage, array.shape))
        dtype = stored_dtype(stage.dtype)
        narrowed = dtype in _NARROW and array.dtype == np.float32 and _holds(dtype, array)
        return array.astype(dtype) if narrowed else array

    def _shape(self, stage: Stage, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The declared shape if what is stored has it but for a batch axis of 1, or flat; otherwise what is stored."""
        assert self._config is not None
        expected = stage_shape(self._config, stage, self._tokens)
        size = int(np.prod(stored, dtype=object))
        if stored == (1, *expected) or (len(stored) == 1 and size == np.prod(expected, dtype=object)):
            return expected
        return (1, size) if stage.by_vocab and size == expected[-1] else stored  # logits of the last token alone

    def shape(self, place: Place) -> list[int]:
        assert self._path is not None
        return list(self._shape(stage_of(self._path, place), self._shapes[place]))

    def sha256(self, place: Place) -> str:
        return sha256(self.raw(place))

    def close(self) -> None:
        """Nothing to close: whoever opened the files closes them."""


def open_foreign(
    path: Path, config: QwenConfig, weights: Weights, tokens: Sequence[int], stack: ExitStack
) -> ForwardRun:
    """The forward of another program at `path`; `InputError` naming a key that is no stage of this model."""
    side = open_side(path, stack)
    order_of(forward_path(config), side.places)
    for layer, stage in side.places:
        if layer is not None and layer >= config.num_hidden_layers:
            key = forward_key((layer, stage))
            raise InputError(f"{path}: '{key}': the model has layers 0 to {config.num_hidden_layers - 1}")
    config.check_length(len(tokens))
    dtype, why = _activations(side)
    side.facts = {"dtype": dtype, "dtype taken": why, "tokens": str(len(tokens))}
    declared = forward_path(config, dtype)
    side.interpret(declared, config, len(tokens))
    return ForwardRun(side, config, declared, list(tokens), "all", weights)


def open_side(path: Path, stack: ExitStack) -> ForeignSide:
    """The stages that another program recorded at `path`, not yet interpreted; `InputError` naming an odd key."""
    if is_aprt_tree(path):
        tree = AprtTree(path)
        if tree.extra:
            raise InputError(f"{path}: '{shown(tree.extra[0])}' is no stage file; name the folder that has them alone")
        flat = {place: (file.count,) for place, file in tree.files.items()}
        return ForeignSide(f"{path} (APRT, flat)", {place: file.read for place, file in tree.files.items()}, flat)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        what = "no *.safetensors and no APRT stage files" if path.is_dir() else "no such file"
        raise (InputError if path.is_dir() else NotFoundError)(f"{path}: {what}")
    readers: dict[Place, Reader] = {}
    shapes: dict[Place, tuple[int, ...]] = {}
    for name in files:
        file = TensorFile(name)
        stack.callback(file.close)
        for key in file.tensors:
            place = parse_key(key)
            if place is None:
                raise InputError(
                    f"{name}: '{shown(key)}' is no key of a forward; expected layers.<n>.<stage> or <stage>"
                )
            if place in readers:
                raise InputError(f"{name}: '{shown(key)}' is also in another file of {path}; which one counts?")
            _check_dtype(file, key, place)
            readers[place], shapes[place] = _reader(file, key), file.info(key).shape
    if not readers:
        raise InputError(f"{path}: holds no tensors")
    return ForeignSide(str(path), readers, shapes)


def _reader(file: TensorFile, key: str) -> Reader:
    return lambda: file.read(key)


def _check_dtype(file: TensorFile, key: str, place: Place) -> None:
    dtype = file.info(key).dtype
    wanted = (np.dtype(np.float32),) if DTYPES.get(place[1]) == "float32" else (np.dtype(np.float32), *_NARROW)
    if dtype not in wanted:
        names = " or ".join(d.name for d in wanted)
        raise InputError(f"{file.path}: '{shown(key)}' is {dtype.name}, expected {names}")


def _activations(side: ForeignSide) -> tuple[str, str]:
    """The dtype that the program computed in, and what says so."""
    stored: set[str] = set()
    wider: dict[str, str] = {}  # narrow dtype -> a computed stage, stored in float32, with values that it has not
    for place, key in side.places.items():
        if DTYPES.get(place[1]) == "float32":
            continue
        array = side.raw(place)
        stored.add(array.dtype.name)
        # The embedding is a copy: of a narrow checkpoint it says nothing about the arithmetic.
        if place[1] != "embedding" and array.dtype == np.float32:
            wider |= {d.name: key for d in _NARROW if d.name not in wider and not _holds(d, array)}
    narrow = sorted(stored - {"float32"})
    if len(narrow) > 1:
        raise InputError(f"{side.label}: some stages are {narrow[0]}, some {narrow[1]}; one dtype for all activations")
    if narrow and narrow[0] in wider:
        raise InputError(
            f"{side.label}: some stages are {narrow[0]}, '{wider[narrow[0]]}' is not; one dtype for all activations"
        )
    if narrow and stored == set(narrow):
        return narrow[0], "as stored"
    fitting = narrow or [d.name for d in _NARROW if d.name not in wider]
    if fitting and any(stage not in ("embedding", *_TABLES) for _, stage in side.places):
        return fitting[0], f"every stored value is one of {fitting[0]}"
    return "float32", "as stored"


def _holds(dtype: np.dtype, array: np.ndarray) -> bool:
    """Whether every value of a float32 array is one of a narrower dtype."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(dtype).astype(np.float32), array))


# Stages that may have few bits whatever they were computed in: cos and sin of position 0 alone are 1 and 0.
_TABLES = ("inv_freq", "rope_angle", "rope_cos", "rope_sin")
