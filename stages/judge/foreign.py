"""Forwards recorded by other programs: safetensors with the documented keys, APRT, or what a tool that we have a table
of writes, given the model and the tokens.

docs/foreign-dumps.md says how to write one.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from stages.errors import InputError, NotFoundError, shown
from stages.files.aprt import AprtTree, is_aprt_tree
from stages.files.forward_dump import Place, advice, forward_key, parse_key
from stages.files.tensorfile import TensorFile, sha256
from stages.files.tool_dumps import open_recorded, table_of
from stages.judge.recorded_run import ForwardRun, Turn, order_of
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.experts import CHOSEN
from stages.spec.forward import DECLARED, forward_pipeline, recorded_shape
from stages.spec.stage import Pipeline, Stage

Reader = Callable[[], np.ndarray]
# Narrower ones first: what a value fits into is the first that holds it.
_NARROW = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_WIDE = (np.dtype(np.float32), np.dtype(np.float64))
# Stages that may have few bits whatever they were computed in: cos and sin of position 0 alone are 1 and 0, and the
# embedding of a narrow checkpoint is a copy.
_SAY_NOTHING = ("inv_freq", "rope_angle", "rope_cos", "rope_sin", "embedding")
# The residual stream, which engines keep in float32 between kernels of fewer bits: it tells only where nothing else is.
_STREAM = ("post_attn_residual", "post_ffn_residual", "layer_output")


@dataclass(frozen=True)
class Form:
    """How a stage was stored: brought to the declared axes by `order`, then to the declared `shape`; a note if so."""

    shape: tuple[int, ...]
    batch: bool = False  # a first axis of 1 is dropped
    order: tuple[int, ...] | None = None
    note: str | None = None

    def declared(self, array: np.ndarray) -> np.ndarray:
        """The array as the path declares it."""
        array = array[0] if self.batch else array
        array = array if self.order is None else array.transpose(self.order)
        return np.ascontiguousarray(array).reshape(self.shape)


@dataclass(frozen=True)
class Values:
    """What a stage's values are: the dtype that they are stored in, and the names of those that hold them all.

    Every dtype holds infinities and NaN: what has nothing else tells nothing.
    """

    stored: np.dtype
    held: frozenset[str]
    tells: bool

    def taken(self, run: np.dtype) -> np.dtype:
        """The dtype to judge them in, in a run of dtype `run`: that one if it holds them, else float32, else as is."""
        if self.stored in _NARROW or run.name in self.held:
            return self.stored if self.stored in _NARROW else run
        return _WIDE[0] if _WIDE[0].name in self.held and run != _WIDE[1] else self.stored


class ForeignSide:
    """Stages of another program with the face of a `ForwardSide`: shaped and typed as the model's path declares.

    A batch axis of 1 is dropped, flat values are given their shape where they have as many elements, axes in another
    order are turned (`notes` says which). Values stored wider than they are, of a bfloat16 or float16 run in float32,
    of a float32 run in float64, are cast back, stage by stage. What does not fit is handed on as it is, to be judged
    `shape`.
    """

    def __init__(self, label: str, readers: Mapping[Place, Reader], shapes: Mapping[Place, tuple[int, ...]]):
        self.label = label
        self._shapes = dict(shapes)
        self.facts: dict[str, str] = {}
        self.tokens: tuple[int, ...] | None = None  # where the program recorded them
        self.places = {place: forward_key(place) for place in readers}
        self._readers = dict(readers)
        self._forms: dict[Place, Form] = {}
        self._values: dict[Place, Values] = {}
        self._run_dtype = np.dtype(np.float32)
        self._fixed: frozenset[Place] = frozenset()  # float32 whatever the activations are

    def interpret(self, path: Pipeline, config: ModelConfig, tokens: int, positions: str) -> None:
        """Say what the values mean, from now on."""
        self._run_dtype = stored_dtype(path.activations)
        self._fixed = frozenset(at for at in self.places if DECLARED[path.at(at).function].dtype == "float32")
        for place in self.places:
            stage = path.at(place)
            expected = recorded_shape(config, stage, tokens, positions)
            full = recorded_shape(config, stage, tokens, positions, joined=False)
            self._forms[place] = _form(stage, self._shapes[place], expected, full)

    @property
    def notes(self) -> dict[Place, str]:
        """By place, what was done to a stage before it is judged, where it was recorded in another order of axes."""
        return {place: form.note for place, form in self._forms.items() if form.note}

    @property
    def orders(self) -> dict[Place, Turn]:
        """By place, the stage with its first two axes in the other order, where both are of one length."""
        found: dict[Place, Turn] = {}
        for place, form in self._forms.items():
            axes = self._shapes[place][form.batch :]
            if len(axes) == 3 and axes[0] == axes[1] > 1 and form.order is None:
                found[place] = functools.partial(_swapped, axes)
        return found

    def raw(self, place: Place) -> np.ndarray:
        """A stage as stored."""
        return self._readers[place]()

    def stored_shape(self, place: Place) -> tuple[int, ...]:
        """A stage's shape as stored."""
        return self._shapes[place]

    def read(self, place: Place) -> np.ndarray:
        """A stage as declared, if it fits, in the dtype that its values have."""
        array, fixed = self._forms[place].declared(self.raw(place)), place in self._fixed
        if fixed and array.dtype in _NARROW:
            return array.astype(np.float32)
        return array.astype(self.values(place).taken(_WIDE[0] if fixed else self._run_dtype), copy=False)

    def values(self, place: Place) -> Values:
        """What a stage's values are; read once."""
        if place not in self._values:
            array = self.raw(place)
            narrower = {d.name for d in (*_NARROW, _WIDE[0]) if array.dtype in _WIDE and _holds(d, array)}
            tells = bool(np.isfinite(array).any())
            self._values[place] = Values(array.dtype, frozenset({array.dtype.name} | narrower), tells)
        return self._values[place]

    def shape(self, place: Place) -> list[int]:
        return list(self._forms[place].shape)

    def sha256(self, place: Place) -> str:
        return sha256(self.raw(place))

    def close(self) -> None:
        """Nothing to close: whoever opened the files closes them."""


def _swapped(axes: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """A declared array, stored as three `axes`, with the first two of them in the other order."""
    return np.ascontiguousarray(array.reshape(axes).swapaxes(0, 1)).reshape(array.shape)


def _form(stage: Stage, stored: tuple[int, ...], expected: tuple[int, ...], full: tuple[int, ...]) -> Form:
    """How to read a stage of a stored shape; `full` is the expected one with its joined axes apart."""
    size = int(np.prod(stored, dtype=object))
    if size != np.prod(expected, dtype=object):
        fits = stage.by_vocab and size == expected[-1]  # logits of the last token alone
        return Form((1, size)) if fits else Form(stored)
    plain = (expected, full, (expected[0], size // max(expected[0], 1)), (size,))
    batch = stored not in plain and stored[0] == 1
    axes = stored[1:] if batch else stored
    if axes in plain:
        return Form(expected, batch)
    names = stage.shape.replace("*", " ").split()
    for order in itertools.permutations(range(len(axes))):
        if tuple(axes[i] for i in order) == full:
            had = [names[order.index(i)] for i in range(len(axes))]
            note = f"recorded {had[0]} first, {' '.join(had)}: judged as {' '.join(names)}"
            return Form(expected, batch, order, note)
    return Form(stored)


def open_foreign(
    path: Path, config: ModelConfig, weights: Weights, tokens: Sequence[int], stack: ExitStack
) -> ForwardRun:
    """The forward of another program at `path`; `InputError` naming a key that is no stage of this model."""
    side = open_side(path, stack, config.num_hidden_layers)
    if side.tokens is not None and list(side.tokens) != list(tokens):
        ran = ",".join(map(str, side.tokens[:8])) + (",..." if len(side.tokens) > 8 else "")
        raise InputError(f"{path}: ran {len(side.tokens)} tokens, {ran}, which are not those of --tokens")
    for layer, stage in side.places:
        if layer is not None and layer >= config.num_hidden_layers:
            key = forward_key((layer, stage))
            raise InputError(f"{path}: '{key}': the model has layers 0 to {config.num_hidden_layers - 1}")
    order_of(forward_pipeline(config), side.places)
    config.check_length(len(tokens))
    positions = _positions(side, forward_pipeline(config), config, len(tokens))
    dtype, why = _activations(side, config.dtype)
    side.facts |= {"dtype": dtype, "dtype taken": why, "tokens": str(len(tokens))}
    declared = forward_pipeline(config, dtype)
    side.interpret(declared, config, len(tokens), positions)
    return ForwardRun(side, config, declared, list(tokens), positions, weights, read_as=side.notes, orders=side.orders)


def open_side(path: Path, stack: ExitStack, layers: int | None = None) -> ForeignSide:
    """The stages that another program recorded at `path`, not yet interpreted; `InputError` naming an odd key.

    `layers`: the model's; where it is not known, what only the last layer has is left out.
    """
    if is_aprt_tree(path):
        tree = AprtTree(path)
        if tree.extra:
            raise InputError(
                f"{path}: '{shown(tree.extra[0])}' is no stage file; name a folder that holds only stage files"
            )
        flat = {place: (file.count,) for place, file in tree.files.items()}
        return ForeignSide(f"{path} (APRT, flat)", {place: file.read for place, file in tree.files.items()}, flat)
    if (table := table_of(path)) is not None:
        recorded = open_recorded(table, path, layers, stack)
        read = {place: functools.partial(recorded.read, place) for place in recorded.pieces}
        side = ForeignSide(str(path), read, {place: recorded.shape(place) for place in recorded.pieces})
        side.facts, side.tokens = recorded.facts, recorded.tokens
        return side
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
                expected = "layers.<n>.<stage> or <stage>"
                raise InputError(f"{name}: '{shown(key)}' is no key of a forward, expected {expected}{advice(key)}")
            if place in readers:
                raise InputError(f"{name}: '{shown(key)}' is also in another file of {path}; keep one of them")
            _check_dtype(file, key)
            readers[place], shapes[place] = _reader(file, key), file.info(key).shape
    if not readers:
        raise InputError(f"{path}: holds no tensors")
    return ForeignSide(str(path), readers, shapes)


def _reader(file: TensorFile, key: str) -> Reader:
    return lambda: file.read(key)


def _check_dtype(file: TensorFile, key: str) -> None:
    place = parse_key(key)
    counts = (np.dtype(np.int32), np.dtype(np.int64)) if place is not None and place[1] == CHOSEN else ()
    dtype, wanted = file.info(key).dtype, (*_WIDE, *_NARROW, *counts)
    if dtype not in wanted:
        names = " or ".join(d.name for d in wanted)
        raise InputError(f"{file.path}: '{shown(key)}' is {dtype.name}, expected {names}")


def _positions(side: ForeignSide, path: Pipeline, config: ModelConfig, tokens: int) -> str:
    """Which positions were recorded, all or the last; `InputError` for another number of them than of tokens."""
    counts: Counter[int] = Counter()
    for place in side.places:
        stage = path.at(place)
        if stage.shape.startswith("tokens") and not stage.by_vocab:
            each = int(np.prod(recorded_shape(config, stage, 1), dtype=object))
            size = int(np.prod(side.stored_shape(place), dtype=object))
            counts[size // each if size % each == 0 else 0] += 1
    found, times = counts.most_common(1)[0] if counts else (0, 0)
    if found == 0 or tokens in counts or 2 * times <= counts.total():
        return "all"
    if found == 1:
        return "last"
    raise InputError(f"{side.label}: the dump has {found} tokens, but --tokens has {tokens}")


def _activations(side: ForeignSide, model: str) -> tuple[str, str]:
    """The dtype that the program computed in, and what says so: that of most stages, the model's own on a tie.

    A stage says what its values are, not what they were stored in: float32 may hold nothing but bfloat16.
    """
    saying = [place for place in side.places if place[1] not in _SAY_NOTHING and side.values(place).tells]
    asked = [place for place in saying if place[1] not in _STREAM] or saying
    counts = Counter(name for place in asked for name in side.values(place).held)
    dtypes = [d.name for d in (*_NARROW, *_WIDE)]
    most = [name for name in dtypes if 2 * counts[name] > len(asked)]
    half = [name for name in dtypes if 2 * counts[name] == len(asked) and name == model and asked]
    dtype = next(iter(most + half), "float32")
    others: dict[str, dict[str, None]] = {}
    for place in saying:
        taken = side.values(place).taken(stored_dtype(dtype)).name
        if taken != dtype:
            others.setdefault(taken, {})[place[1]] = None
    # The bounds are those of float32's operations: of a float64 run they see what float32 would.
    how_far = ", judged to float32's resolution" if dtype == "float64" else ""
    if all(side.values(place).stored.name == dtype for place in saying):
        return dtype, f"as stored{how_far}"
    if not others:
        return dtype, f"every stored value is one of {dtype}{how_far}"
    listed = "; ".join(f"{', '.join(stages)}: {name}" for name, stages in others.items())
    return dtype, f"most stored values are of {dtype}{how_far}; {listed}"


def _holds(dtype: np.dtype, array: np.ndarray) -> bool:
    """Whether every value of a wider array is one of a narrower dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.array_equal(array.astype(dtype).astype(array.dtype), array, equal_nan=True))
