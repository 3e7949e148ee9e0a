"""Running the forward on any backend: one layer at a time, and the LM head one chunk of the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from stages.errors import InputError, UsageError, shown
from stages.files.memory import aligned_copy, is_aligned
from stages.oracle.bounds import LAMBDA, Lambdas
from stages.oracle.verdict import Oracle, consult
from stages.recipes.side import SideVerdict
from stages.run.watch import entering
from stages.spec.backend import Backend, Weights, stored_as
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.experts import CHOSEN, MoeConfig, chosen_experts, is_each, of_expert
from stages.spec.families import layer_param
from stages.spec.forward import (
    RUN_PARAMS,
    forward_pipeline,
    parameter_name,
    producers,
    stage_options,
)
from stages.spec.stage import Pipeline, Scope, Stage
from stages.spec.values import StageResult

POSITIONS = ("all", "last")
# Rows of the LM head at a time: 8 chunks of Qwen's 151,936. Products narrower than MIN_CHUNK sum in another order
# than the whole; wider ones have its bits in torch on one thread, and in JAX while the vocabulary is a multiple of 64,
# as Qwen's are. On several threads MKL may sum a wide product as no part of it: docs/findings/forward.md.
LM_HEAD_CHUNK = 20_000
MIN_CHUNK = 4096

_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")


# What of a result an oracle speaks of: columns, all of them or some; or an index of the first axis.
Where = slice | tuple[Any, ...]


def part(observed: np.ndarray, where: Where) -> np.ndarray:
    """What of a result an oracle speaks of."""
    if isinstance(where, tuple):
        return observed[where]
    return observed if where == slice(None) else observed[..., where]


def begin(where: Where, axes: int) -> tuple[int, int]:
    """At which index of which axis a part of a result of so many axes begins."""
    return (where[0].start, 0) if isinstance(where, tuple) else (where.start or 0, axes - 1)


class LoadedWeights:
    """The weights of a model, each read whole at its first use and kept in `dtype`: what several runs share."""

    def __init__(self, weights: Weights, config: ModelConfig, dtype: str = "model"):
        self._weights, self._tied = weights, config.tie_word_embeddings
        self._dtype = stored_dtype(config.dtype if dtype == "model" else dtype)
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def tensors(self) -> Mapping[str, Any] | None:
        """Every tensor that can be read, where the reader behind this one lists them."""
        return getattr(self._weights, "tensors", None)

    def resolve(self, name: str) -> str:
        """The tensor that has the values of a parameter, as far as the reader behind this one tells."""
        return stored_as(self._weights, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self.resolve(name)
        if stored not in self._arrays:
            self._arrays[stored] = self._load(stored)
        return self._arrays[stored][start:stop]

    def _load(self, name: str) -> np.ndarray:
        array = _cast(self._weights.read(name), self._dtype)
        if name == LM_HEAD and self._tied:  # and maybe not adapted apart
            embedding = self.read(EMBEDDING)
            return embedding if np.array_equal(array.view(np.uint8), embedding.view(np.uint8)) else array
        return array


def vocabulary_plan(vocab: int, chunk: int | None = None) -> list[tuple[int, int]]:
    """Row ranges of the LM head: equal chunks of about `chunk` rows, a tail below `MIN_CHUNK` joined to the last."""
    chunk = LM_HEAD_CHUNK if chunk is None else chunk
    if chunk < MIN_CHUNK:
        raise UsageError(f"--lm-head-chunk {chunk}: at least {MIN_CHUNK}; narrower products sum in another order")
    count = max(1, min(-(-vocab // chunk), vocab // MIN_CHUNK))
    # Multiples of 64 columns: in XLA a product of another width may sum its K terms in other blocks.
    size = -(-vocab // (64 * count)) * 64
    plan = [(start, min(start + size, vocab)) for start in range(0, vocab, size)]
    if len(plan) > 1 and plan[-1][1] - plan[-1][0] < MIN_CHUNK:
        plan[-2:] = [(plan[-2][0], vocab)]
    return plan


class Forwarder:
    """A backend's stages for one model, each compiled once per shape and reused over layers and runs.

    `dtype` is what activations and weights are computed in; `model` is the config's. `fuse_layers` compiles all
    stages of a layer together, to see what fusion does to their bits; by default a stage is what is compiled.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        weights: Weights,
        *,
        dtype: str = "model",
        fuse_layers: bool = False,
    ):
        if fuse_layers and isinstance(config, MoeConfig):
            raise UsageError("--jit layer: a layer's experts are read once its router has run; leave it out")
        self.fuse_layers = fuse_layers
        self.backend, self.config, self.weights = backend, config, weights
        self.path = forward_pipeline(config, dtype)
        self.dtype = stored_dtype(self.path.activations)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._needed: dict[int, frozenset[str]] = {}  # by the identity of a layer's pipeline
        self._where = ""  # layers.<n>. within a layer
        self._stacks: dict[str, Any] = {}  # this layer's experts, by the name of a weight

    def run(
        self,
        tokens: Sequence[int],
        *,
        layers: Iterable[int] | None = None,
        stages: Iterable[str] | None = None,
        also: Collection[tuple[int | None, str]] = (),
        positions: str = "all",
        lm_head_chunk: int | None = None,
    ) -> Iterator[StageResult]:
        """The forward of one sequence, propagated; yields what was asked for, in execution order.

        `layers` and `stages`: all by default; stages of the whole model are not of any layer. `also`: single places
        beside them, by layer and stage, of stages that the others are computed from. `positions`: `last`
        captures the last token's row only, where a stage has one, and computes the LM head for that row alone.
        Computes no further than the last thing asked for.
        """
        captured = frozenset(self.path if stages is None else stages)
        before, after = self.path.of_model()
        chosen = frozenset(range(self.config.num_hidden_layers) if layers is None else layers)
        self._check(tokens, captured, chosen, positions)
        kinds = {id(kind): kind for kind in self.path.layers}
        self._needed = {key: self._ancestors(kind, captured) for key, kind in kinds.items()}
        shared = {"positions": np.arange(len(tokens), dtype=np.int32)}
        model: dict[str, Any] = {}
        for stage in before:
            model[stage.name] = self._call(stage, model, self._model_params(stage, tokens, shared))
            if stage.name in captured or (None, stage.name) in also:
                yield self._result(None, stage, model[stage.name], positions)
        after = [stage for stage in after if any(stage.name in needed for needed in self._needed.values())]
        in_layer = captured & {stage.name for stage in self.path.of_layer(None)}
        count = self.config.num_hidden_layers if after else 1 + max(chosen, default=-1) if in_layer else 0
        output: Any = None
        for layer, params in _ahead(self._layer_params, range(count)):
            self._where = f"layers.{layer}."
            self._stacks.clear()
            values = self._layer(layer, output, model, params)
            output = values[self.path.carried["layer_input"][1]]
            for stage in self.path.of_layer(layer):
                if (layer in chosen and stage.name in captured) or (layer, stage.name) in also:
                    yield self._result(layer, stage, values[stage.name], positions)
        self._where = ""
        model[self.path.carried["layer_input"][1]] = output
        for stage in after:
            if stage.by_vocab:
                (name,) = stage.inputs
                rows = model[name][-1:] if positions == "last" else model[name]
                yield StageResult(None, stage.name, self._by_vocab(stage, rows, lm_head_chunk))
            else:
                model[stage.name] = self._call(stage, model, self._model_params(stage, tokens, shared))
                if stage.name in captured or (None, stage.name) in also:
                    yield self._result(None, stage, model[stage.name], positions)

    def isolate(self, stage_name: str, inputs: Mapping[str, np.ndarray], layer: int | None = None) -> np.ndarray:
        """One stage from recorded inputs, by declared name (`producers` says which; also `tokens`, `positions`)."""
        stage = self.path.at((layer, stage_name))
        put = {name: self.backend.put(inputs[name]) for name in stage.inputs}
        if stage.by_vocab:
            return self._by_vocab(stage, put[stage.inputs[0]], None)
        params = [self.backend.put(array) for array in parameters(stage, inputs, self.weights, layer, self.dtype)]
        return self._checked(stage, self._call(stage, put, params))

    def _check(self, tokens: Sequence[int], captured: frozenset[str], chosen: frozenset[int], positions: str) -> None:
        self.config.check_length(len(tokens))
        vocab = self.config.vocab_size
        for place, token in enumerate(tokens):
            if not 0 <= token < vocab:
                raise InputError(f"token {place} is {token}; the model has ids 0 to {vocab - 1}")
        if unknown := sorted(captured - set(self.path)):
            raise UsageError(f"no stage '{shown(unknown[0])}'; there are {', '.join(self.path)}")
        if unknown_layers := sorted(chosen - set(range(self.config.num_hidden_layers))):
            raise UsageError(f"no layer {unknown_layers[0]}; there are 0-{self.config.num_hidden_layers - 1}")
        if positions not in POSITIONS:
            raise UsageError(f"--positions {shown(positions)}: there are {', '.join(POSITIONS)}")

    def _ancestors(self, kind: Pipeline, captured: Iterable[str]) -> frozenset[str]:
        """The stages of a kind without which none of `captured` can be computed: a side branch is left out."""
        needed, carried = set(captured), kind.carried
        if any(self.path[name].scope is Scope.LAYER for name in needed):
            needed.update(last for _, last in carried.values())  # a layer needs the one before it, whole
        for stage in reversed(tuple(kind.values())):
            if stage.name in needed:
                needed.update(carried[name][0] if name in carried else name for name in stage.inputs)
        return frozenset(needed)

    def _layer(self, layer: int, previous: Any, model: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        first, _ = self.path.carried["layer_input"]
        values = {**model, "layer_input": model[first] if layer == 0 else previous}
        put = {name: self.backend.put(array) for name, array in params.items()}
        stages = self._stages(layer)
        return (self._fused_layer if self.fuse_layers else self._layer_values)(stages, values, put)

    def _stages(self, layer: int) -> tuple[Stage, ...]:
        """What is to be computed of a layer."""
        needed = self._needed[id(self.path.of(layer))]
        return tuple(stage for stage in self.path.of_layer(layer) if stage.name in needed)

    def _layer_values(
        self,
        stages: Iterable[Stage],
        values: Mapping[str, Any],
        params: Mapping[str, Any],
        call: Callable[..., Any] | None = None,
    ) -> dict[str, Any]:
        values, call = dict(values), call or self._call
        for stage in stages:
            own = [self._of_experts(name, values) if is_each(name) else params[name] for name in stage.params]
            values[stage.name] = call(stage, values, own)
        return values

    def _of_experts(self, name: str, values: Mapping[str, Any]) -> Any:
        """The weights of the experts that this layer's router has chosen: read no earlier, and no others."""
        full = f"model.{self._where}{name}"
        if full not in self._stacks:
            topk = self.backend.get(values[CHOSEN])
            self._stacks[full] = self.backend.put(_stacked(full, topk, self.weights, self.dtype))
        return self._stacks[full]

    def _fused_layer(
        self, stages: tuple[Stage, ...], values: Mapping[str, Any], params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All stages of a layer in one compiled function, which may compute them in another order and precision."""
        if stages not in self._compiled:
            self._compiled[stages] = self.backend.compile(
                lambda v, p: self._layer_values(stages, v, p, self._uncompiled)
            )
        result: dict[str, Any] = self._compiled[stages](dict(values), dict(params))
        return result

    def _uncompiled(self, stage: Stage, values: Mapping[str, Any], params: Sequence[Any]) -> Any:
        inputs = [values[name] for name in stage.inputs]
        if stage.identity:
            return inputs[0]
        return self.backend.forward[stage.function](*inputs, *params, **stage_options(self.config, stage))

    def _call(self, stage: Stage, values: Mapping[str, Any], params: Sequence[Any]) -> Any:
        inputs = [values[name] for name in stage.inputs]
        if stage.identity:
            return inputs[0]
        entering(self._where + stage.name)
        if stage not in self._compiled:
            function = functools.partial(self.backend.forward[stage.function], **stage_options(self.config, stage))
            self._compiled[stage] = self.backend.compile(function)
        return self._compiled[stage](*inputs, *params)

    def _model_params(self, stage: Stage, tokens: Sequence[int], shared: Mapping[str, np.ndarray]) -> list[Any]:
        given = {"tokens": np.asarray(tokens, np.int32), **shared}
        return [self.backend.put(array) for array in parameters(stage, given, self.weights, None, self.dtype)]

    def _layer_params(self, layer: int) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for stage in self._stages(layer) for name in stage.params if not is_each(name))
        return {name: _cast(self.weights.read(layer_param(layer, name)), self.dtype) for name in names}

    def _by_vocab(self, stage: Stage, rows: Any, chunk: int | None) -> np.ndarray:
        """A stage whose columns are computed from chunks of its weight's rows; the same bits as from the whole."""
        vocab = self.config.vocab_size
        out = np.empty((rows.shape[0], vocab), stored_dtype(stage.dtype))
        for (start, stop), weight in _ahead(self._head_rows, vocabulary_plan(vocab, chunk)):
            part = self._call(stage, {stage.inputs[0]: rows}, [self.backend.put(weight)])
            out[:, start:stop] = self._checked(stage, part)
        return out

    def _head_rows(self, chunk: tuple[int, int]) -> np.ndarray:
        return _cast(self.weights.read(LM_HEAD, *chunk), self.dtype)

    def _result(self, layer: int | None, stage: Stage, out: Any, positions: str) -> StageResult:
        axis = next((i for i, name in enumerate(stage.shape.split()) if name in ("tokens", "queries")), None)
        if positions == "last" and axis is not None:
            out = out[(slice(None),) * axis + (slice(-1, None),)]
        return StageResult(layer, stage.name, self._checked(stage, out))

    def _checked(self, stage: Stage, out: Any) -> np.ndarray:
        array = self.backend.get(out)
        if array.dtype != stored_dtype(stage.dtype):
            raise TypeError(f"{self.backend.name}.{stage.name} gave {array.dtype}, declared {stage.dtype}")
        return array


def run_forward(
    backend: Backend,
    weights: Weights,
    config: ModelConfig,
    tokens: Sequence[int],
    *,
    layers: Iterable[int] | None = None,
    stages: Iterable[str] | None = None,
    dtype: str = "model",
    positions: str = "all",
    lm_head_chunk: int | None = None,
) -> Iterator[StageResult]:
    """One forward, compiled for this call alone; `Forwarder.run` keeps what it compiled."""
    forwarder = Forwarder(backend, config, weights, dtype=dtype)
    return forwarder.run(tokens, layers=layers, stages=stages, positions=positions, lm_head_chunk=lm_head_chunk)


def isolate(
    backend: Backend,
    config: ModelConfig,
    stage: str,
    inputs: Mapping[str, np.ndarray],
    weights: Weights,
    layer: int | None = None,
    *,
    dtype: str = "model",
) -> np.ndarray:
    """One stage from recorded inputs, compiled for this call alone; `Forwarder.isolate` keeps what it compiled."""
    return Forwarder(backend, config, weights, dtype=dtype).isolate(stage, inputs, layer)


def parameters(
    stage: Stage, given: Mapping[str, np.ndarray], weights: Weights, layer: int | None, dtype: np.dtype
) -> list[np.ndarray]:
    """A stage's parameters in declared order, weights in `dtype`.

    Of the embedding only the rows of the tokens are read, and the tokens are numbered anew to match.
    """
    if stage.params == ("tokens", EMBEDDING):
        ids, places = np.unique(given["tokens"], return_inverse=True)
        rows = np.concatenate([weights.read(EMBEDDING, int(token), int(token) + 1) for token in ids])
        return [places.reshape(-1).astype(np.int32), _cast(rows, dtype)]
    return [
        given[name] if name in RUN_PARAMS else _parameter(stage, name, given, weights, layer, dtype)
        for name in stage.params
    ]


def _parameter(
    stage: Stage, name: str, given: Mapping[str, np.ndarray], weights: Weights, layer: int | None, dtype: np.dtype
) -> np.ndarray:
    """A weight, or those of the experts that were chosen, ascending, stacked."""
    full = parameter_name(stage, name, layer)
    if not is_each(name):
        return _cast(weights.read(full), dtype)
    return _stacked(full, given[CHOSEN], weights, dtype)


def _stacked(name: str, topk: np.ndarray, weights: Weights, dtype: np.dtype) -> np.ndarray:
    return np.stack([_cast(weights.read(of_expert(name, expert)), dtype) for expert in chosen_experts(topk)])


def oracles(
    path: Pipeline,
    config: ModelConfig,
    stage: Stage,
    inputs: Mapping[str, np.ndarray],
    weights: Weights,
    layer: int | None = None,
    lambdas: Lambdas = LAMBDA,
    *,
    by_heads: bool = True,
) -> Iterator[tuple[Where, Oracle]]:
    """The oracle of a stage for recorded inputs, and what of the result it speaks of.

    One for the whole result; one per chunk of the vocabulary for the LM head, whose float64 weight is 1.2 GB; some
    heads at a time for attention over so many keys that all scores would be more, unless not `by_heads`.
    """
    given, dtype = [inputs[name] for name in stage.inputs], stored_dtype(path.activations)
    options = stage_options(config, stage)
    if not stage.by_vocab:
        params = parameters(stage, inputs, weights, layer, dtype)
        arguments = (*given, *params)
        parts = _by_heads(stage, arguments, options) if by_heads else [(slice(None), arguments, options)]
        for where, arguments, own in parts:
            yield where, consult(stage, arguments, own, lambdas)
        return
    for start, stop in vocabulary_plan(config.vocab_size):
        weight = _cast(weights.read(LM_HEAD, start, stop), dtype)
        yield slice(start, stop), consult(stage, (*given, weight), options, lambdas)


# Scores judged at a time, 128 MB in float64; a dozen such arrays are there at once.
_SCORES = 1 << 24


def _by_heads(
    stage: Stage, arguments: tuple[np.ndarray, ...], options: Mapping[str, Any]
) -> Iterator[tuple[Where, tuple[np.ndarray, ...], Mapping[str, Any]]]:
    """A stage's arguments and options, whole; those of attention over many keys by heads, and where each part is."""
    first, *rest = arguments
    if stage.function not in ("attn_scores", "attn_softmax", "attention") or any(x.ndim < 2 for x in arguments):
        yield slice(None), arguments, options
        return
    heads, size = (first.shape[1], len(first) * len(rest[0])) if stage.function == "attn_scores" else (
        len(first), first[0].size
    )  # fmt: skip
    kv_heads = options.get("kv_heads", rest[0].shape[1] if stage.function == "attn_scores" else heads)
    group = heads // kv_heads
    many = _SCORES // max(size, 1)
    step = max(1, many // group * group if many >= group else 1)  # within a group, one head: it has one head of keys
    if step >= heads:
        yield slice(None), arguments, options
        return
    for start in range(0, heads, step):
        stop = min(start + step, heads)
        own, keys = slice(start, stop), slice(start // group, (stop - 1) // group + 1)
        if stage.function == "attn_scores":
            yield (own, ...), (first[:, own], rest[0][:, keys]), options
        elif stage.function == "attn_softmax":
            yield (own, ...), (first[own],), options
        else:
            size, count = options["head_dim"], keys.stop - keys.start
            parts = ((0, own), (heads, keys), (heads + kv_heads, keys))  # of q, k and v
            columns = [rest[0][:, (at + x.start) * size : (at + x.stop) * size] for at, x in parts]
            of_part = {**options, "heads": stop - start, "kv_heads": count}
            yield slice(start * size, stop * size), (first[own], np.concatenate(columns, axis=1)), of_part


def judge_stage(
    path: Pipeline,
    config: ModelConfig,
    stage: Stage,
    inputs: Mapping[str, np.ndarray],
    weights: Weights,
    observed: np.ndarray,
    layer: int | None = None,
    lambdas: Lambdas = LAMBDA,
) -> SideVerdict:
    """The verdict on a recorded stage, from its own recorded inputs by declared name."""
    verdict = SideVerdict()
    for columns, oracle in oracles(path, config, stage, inputs, weights, layer, lambdas):
        verdict.add(oracle, part(observed, columns))
    return verdict


def recorded_inputs(
    path: Pipeline,
    stage: Stage,
    recorded: Mapping[tuple[int | None, str], np.ndarray],
    tokens: Sequence[int],
    layer: int | None,
    layers: int,
) -> dict[str, np.ndarray] | None:
    """The inputs of a stage by declared name, from arrays by (layer, stage); None when one was not recorded."""
    sources = producers(path, stage, layer, layers)
    if any(key not in recorded for key in sources.values()):
        return None
    given = {name: recorded[key] for name, key in sources.items()}
    return {**given, "tokens": np.asarray(tokens, np.int32), "positions": np.arange(len(tokens), dtype=np.int32)}


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return array if array.dtype == dtype and is_aligned(array) else aligned_copy(array, dtype)


def _ahead(load: Callable[[_Item], _Loaded], items: Iterable[_Item]) -> Iterator[tuple[_Item, _Loaded]]:
    """Each item and what `load` gives for it, the next being loaded on a thread meanwhile."""
    items = list(items)
    with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
        future = pool.submit(load, items[0]) if items else None
        for index, item in enumerate(items):
            assert future is not None
            loaded = future.result()
            future = pool.submit(load, items[index + 1]) if index + 1 < len(items) else None
            yield item, loaded
