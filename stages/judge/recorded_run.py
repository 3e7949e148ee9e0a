"""One recorded forward with what judging it needs: its path, weights and tokens; and what of it was recorded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.files.aprt import is_aprt_tree
from stages.files.dump import Dump, changed
from stages.files.forward_dump import AprtSide, ForwardSide, Place, advice, forward_key
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import TensorFile
from stages.judge.rope import RopeRun
from stages.judge.same_model import other_model
from stages.oracle.bounds import LAMBDA, Lambdas
from stages.oracle.span import Value
from stages.oracle.verdict import Oracle
from stages.run.adapted import ADAPTED_FILE, AdaptedWeights
from stages.run.calibration import lambdas_of
from stages.run.forward import POSITIONS
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.experts import CHOSEN
from stages.spec.families import parse_config
from stages.spec.forward import (
    ANY_MODEL,
    DECLARED,
    forward_pipeline,
    producers,
    recorded_shape,
)
from stages.spec.stage import Pipeline, Scope, Stage

# What a stage may be stored in.
FLOATS = ("bfloat16", "float16", "float32", "float64")
# What a forward may say it was computed in; `model` is what its config says.
RUN_DTYPES = ("model", "float32", "bfloat16", "float16")


Turn = Callable[[np.ndarray], np.ndarray]


class Recorded(Protocol):
    """A recorded forward, read by layer and stage."""

    label: str
    facts: dict[str, str]
    places: dict[Place, str]

    def read(self, place: Place) -> np.ndarray: ...

    def shape(self, place: Place) -> list[int]: ...

    def sha256(self, place: Place) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Span:
    """From what a recorded stage is judged: recorded stages, through hidden ones, which were not recorded.

    `acting` is the stage that it is judged as: of a copy whose original was not recorded, the original. `missing` are
    the inputs of that which are hidden; `from_start` says that a way up ends at the model's input, not at a recorded
    stage.
    """

    acting: Place
    recorded: tuple[Place, ...]
    hidden: tuple[Place, ...]
    missing: tuple[Place, ...]
    from_start: bool


@dataclass
class ForwardRun:
    """One side: its recorded stages, and its config, path, weights and tokens as far as they are known."""

    side: Recorded
    config: ModelConfig | None  # None: an APRT tree, which says nothing of its model
    path: Pipeline | None
    tokens: list[int]
    positions: str
    weights: Weights | None  # None: unavailable
    checkpoint: ModelSource | None = None  # what `weights` come from, adapted or not
    adapted: TensorFile | None = None  # the adapted ones among them
    misshapen: set[Place] = field(default_factory=set)  # nothing can be said of a stage that reads one of these
    lambdas: Lambdas = field(default_factory=lambda: LAMBDA)
    read_as: dict[Place, str] = field(default_factory=dict)  # how a stage was read, where not simply as it was recorded
    orders: dict[Place, Turn] = field(default_factory=dict)  # another order of axes, where the shape does not tell
    turned: dict[Place, Turn] = field(default_factory=dict)  # what is done to a recorded array to get its values

    activations: str | None = None  # what kernels take the inputs of products to, if that is declared (activations.py)

    # What adapted weights may be off that another program adapted itself, by the calibrated and the rigorous bounds.
    doubts: tuple[Weights, ...] = ()

    # Positions that RoPE's waves were found at; the same in every view of the recording.
    waves: dict[Hashable, np.ndarray] = field(default_factory=dict)

    # Stages that are no recording, but follow from one, with what they may be off (recovered.py).
    recovered: dict[Place, Value] = field(default_factory=dict, init=False)

    # What was judged of this recording: which of `_readings` a stage was computed by; the makers of inputs that recipes
    # compute again; of stages judged through others what they can see, and of failed ones why, and the `Named` that
    # explains them; hidden stages, as far as they are needed again; the last oracle of a stage judged through others.
    readings: dict[Place, int] = field(default_factory=dict, init=False)
    makers: dict[Place, Oracle | None] = field(default_factory=dict, init=False)
    floors: dict[Place, float] = field(default_factory=dict, init=False)
    hints: dict[Place, str | None] = field(default_factory=dict, init=False)
    found: dict[Place, Any] = field(default_factory=dict, init=False)
    spans: dict[Place, Span] = field(default_factory=dict, init=False)
    instead: dict[Place, ForwardRun] = field(default_factory=dict, init=False)  # judged as of this run (inferred.py)
    values: dict[Place, Value] = field(default_factory=dict, init=False)
    through: dict[tuple[Place, str], Oracle] = field(default_factory=dict, init=False)

    def read(self, place: Place) -> np.ndarray:
        """A recorded stage's values."""
        return self.values_of(place, self.side.read(place))

    def values_of(self, place: Place, array: np.ndarray) -> np.ndarray:
        """The values of a stage that `array` was recorded of."""
        if place[1] == CHOSEN:  # numbers of experts, whatever holds them
            array = array.astype(np.int32)
        return self.turned[place](array) if place in self.turned else array

    def of(self, side: Recorded) -> ForwardRun:
        """The run with another recording, of which nothing was judged yet: what `init=False` keeps begins anew."""
        return dataclasses.replace(self, side=side, turned=dict(self.turned))

    @functools.cached_property
    def rope(self) -> RopeRun:
        """RoPE as this run has it: its positions, and the tables that were not recorded."""
        assert self.path is not None
        assert self.config is not None
        # One run wrote a dump of ours; what was imported into one may be of two programs.
        of_one = isinstance(self.side, ForwardSide) and "imported from" not in self.side.facts
        numbers = np.arange(len(self.tokens), dtype=np.int32)[chosen(self)]
        return RopeRun(
            self.config,
            self.path,
            self.lambdas,
            numbers,
            frozenset(self.side.places),
            lambda place: _recorded(self, place),
            lambda stage, observed: as_stored(self, stage, observed),
            of_one,
            self.waves,
        )

    @property
    def notes(self) -> list[str]:
        """What a reader of the verdict should know of how the run was judged."""
        of_rope = [] if self.path is None or self.config is None else self.rope.notes
        declared = self.activations and f"inputs of products as {self.activations}, declared"
        window = None if self.config is None else self.config.sliding_window
        untested = (
            window and len(self.tokens) <= window and f"{len(self.tokens)} tokens fit the sliding window of {window}"
        )
        return [*of_rope, *([declared] if declared else []), *([f"{untested}: it was not tested"] if untested else [])]


def chosen(run: ForwardRun) -> slice:
    return slice(-1, None) if run.positions == "last" else slice(None)


def _recorded(run: ForwardRun, place: Place) -> np.ndarray | None:
    """A stage of the declared shape, recorded under its own name or as what it is a copy of; None where it is not."""
    found = find(run, place)
    return run.read(found) if found is not None and found not in run.misshapen and fits(run, found) else None


def open_run(folder: Path, model: str | None, stack: ExitStack) -> ForwardRun:
    """A forward dump with the model it names, or that of `model`; or an APRT tree, of which nothing is known."""
    if is_aprt_tree(folder):
        return ForwardRun(AprtSide(folder), None, None, [], "all", None)
    side = ForwardSide(folder)
    stack.callback(side.close)
    manifest = side.dump.manifest
    recorded = manifest["model"]
    config = parse_config(recorded["config"], f"{folder}: model config")
    path = forward_pipeline(config, _checked_dtype(folder, manifest))
    _check_manifest(folder, manifest, config, path)
    tokens: list[int] = manifest["tokens"]
    checkpoint = _checkpoint(folder, recorded, model, stack)
    adapted = _adapted(side.dump)
    weights = checkpoint if checkpoint is None or adapted is None else AdaptedWeights(checkpoint, adapted)
    positions, lambdas = str(manifest.get("positions", "all")), lambdas_of(side.facts, str(folder))
    return ForwardRun(side, config, path, tokens, positions, weights, checkpoint, adapted, lambdas=lambdas)


def _checked_dtype(folder: Path, manifest: Mapping[str, Any]) -> str:
    dtype = manifest.get("dtype", "model")
    if dtype not in RUN_DTYPES:
        raise InputError(f"{folder}: the manifest's dtype is {shown(dtype)}, expected {', '.join(RUN_DTYPES)}")
    return str(dtype)


def _check_manifest(folder: Path, manifest: Mapping[str, Any], config: ModelConfig, path: Pipeline) -> None:
    """`InputError` naming the first field of a forward's manifest that is not of this model."""
    layers, stages = manifest.get("layers"), manifest.get("stages")
    known = {*path, *path.aliases}
    for name, good in {
        "tokens": max(manifest["tokens"]) < config.vocab_size,
        "layers": max(layers or (0,)) < config.num_hidden_layers,
        "stages": stages is None or known.issuperset(stages),
        "positions": manifest.get("positions", "all") in POSITIONS,
    }.items():
        if not good:
            raise InputError(
                f"{folder}: the manifest's '{name}' is {shown(manifest.get(name))}, which no forward dump has"
            )


def _checkpoint(folder: Path, recorded: Mapping[str, Any], model: str | None, stack: ExitStack) -> ModelSource | None:
    """The model a dump was made from: the given one, or the recorded one if it is on this disk and still the same."""
    try:
        found = open_model(str(recorded.get("source")), recorded=True) if model is None else open_model(model)
        checkpoint = stack.enter_context(found)
    except (InputError, NotFoundError):
        if model is not None:
            raise
        return None
    if checkpoint.fingerprint() != recorded.get("fingerprint"):
        if model is None:
            return None
        now = {"fingerprint": checkpoint.fingerprint(), "config": checkpoint.raw_config}
        what = other_model(now, recorded) or "the tensor headers differ"
        raise InputError(f"{model}: is not the model that {folder} was made from: {what}")
    return checkpoint


def _adapted(dump: Dump) -> TensorFile | None:
    """The adapted weights that a dump keeps; `InputError` naming one that is not as its manifest says."""
    digests = dump.manifest.get("adapted_sha256") or {}
    if not digests:
        return None
    file = dump.file(ADAPTED_FILE)
    for name, digest in digests.items():
        if file.sha256(name) != digest:
            raise changed(file.path, name)
    return file


def about(run: ForwardRun, model: str | None = None) -> dict[str, Any]:
    """What was run, for a reader: the model as the dump or the user (`model`) names it, dtype, tokens, layers."""
    manifest = run.side.dump.manifest if isinstance(run.side, ForwardSide) else {}
    named = model or (manifest.get("model") or {}).get("source")
    layers = {layer for layer, _ in run.side.places if layer is not None}
    components = manifest.get("components") or {}
    return {
        "model": named,
        "dtype": manifest.get("dtype") or run.side.facts.get("dtype"),
        "tokens": len(run.tokens) or None,
        "layers": len(layers),
        "components": components.get("source"),
    }


def order_of(path: Pipeline | None, have: Iterable[Place]) -> list[Place]:
    """The places that are there, in execution order; `InputError` naming one that the model, or any model, has not."""
    have = set(have)
    # Of an APRT tree nothing is known: the order of every stage that there is serves for any.
    path = path or ANY_MODEL
    before, after = path.of_model()
    order: list[Place] = [(None, s.name) for s in before]
    for layer in sorted({layer for layer, _ in have if layer is not None}):
        order += [(layer, name) for name in (*(s.name for s in path.of_layer(layer)), *path.aliases)]
    order += [(None, s.name) for s in after]
    unknown = sorted(have - set(order), key=str)
    if unknown:
        key, names = forward_key(unknown[0]), ", ".join(path)
        raise InputError(f"'{key}' is no stage of this model{advice(key) or f'; there are {names}'}")
    return [place for place in order if place in have]


def promised(run: ForwardRun) -> set[Place]:
    """What a dump's manifest says was recorded: a stage that is not there is missing. Nothing of another program's."""
    if not isinstance(run.side, ForwardSide) or run.path is None:
        return set()
    manifest, path = run.side.dump.manifest, run.path
    stages = [path.at((None, name)) for name in manifest.get("stages") or []]
    layers: list[int] = manifest.get("layers") or []
    places = {(n, s.name) for s in stages for n in (layers if s.scope is Scope.LAYER else [None])}
    return {(n, name) for n, name in places if name in path.of(n)}


def fits(run: ForwardRun, place: Place) -> bool:
    """Whether a recorded stage has the shape that the model and the tokens give it."""
    assert run.path is not None
    assert run.config is not None
    stage = run.path.at(place)
    return run.side.shape(place) == list(recorded_shape(run.config, stage, len(run.tokens), run.positions))


def as_stored(run: ForwardRun, stage: Stage, observed: np.ndarray) -> Stage:
    """The stage with the dtype in which its values are there: logits may be float32 in a bfloat16 run.

    A dump of ours says what it was computed in; what is stored there in less does not fit, and stays as declared.
    """
    less = observed.dtype.itemsize < stored_dtype(stage.dtype).itemsize and isinstance(run.side, ForwardSide)
    known = observed.dtype.name in FLOATS and not less
    return dataclasses.replace(stage, dtype=observed.dtype.name) if known else stage


def flows(run: ForwardRun, place: Place) -> bool:
    """Whether a stage is stored in the activations' dtype, whatever that is."""
    assert run.path is not None
    return DECLARED[run.path.at(place).function].dtype == "model"


def find(run: ForwardRun, source: Place) -> Place | None:
    """Where a stage is recorded: under its own name, or an alias; a copy's values also under the original's."""
    assert run.path is not None
    names = (source[1], *(alias for alias, name in run.path.aliases.items() if name == source[1]))
    found = next(((source[0], name) for name in names if (source[0], name) in run.side.places), None)
    copied = found is None and run.path.at(source).identity
    return find(run, (source[0], run.path.at(source).inputs[0])) if copied else found


def sources_of(place: Place, run: ForwardRun) -> dict[str, Place]:
    """Where each input of a stage would be recorded."""
    assert run.path is not None
    assert run.config is not None
    return producers(run.path, run.path.at(place), place[0], run.config.num_hidden_layers)


def inputs_of(place: Place, run: ForwardRun) -> dict[str, np.ndarray]:
    """The recorded inputs of a stage by declared name, and the run's tokens and positions."""
    inputs: dict[str, np.ndarray] = {}
    for name, source in sources_of(place, run).items():
        found = find(run, source)
        assert found is not None
        inputs[name] = run.read(found)
    return inputs | given(run)


def given(run: ForwardRun) -> dict[str, np.ndarray]:
    """The run's tokens and their positions."""
    return {"tokens": np.asarray(run.tokens, np.int32)[chosen(run)], "positions": run.rope.positions}


def weights_of(run: ForwardRun) -> Weights:
    return run.weights if run.weights is not None else _NoWeights()


class _NoWeights:
    """Stands for weights in stages that take none."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise UsageError(f"{name}: the weights are unavailable")
