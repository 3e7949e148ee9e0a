"""What a running module of `flax.nnx` computes, by its modules' calls. Twin of svf_torch/capture.py.

Arrays of JAX never change, so what is kept is what was there. Under jit the values are handed out of the compiled
program, in its order, and so are part of what is compiled.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from stages.errors import InputError, UsageError
from stages.files.source import open_model
from stages.run.captured import Call, Record, known_source
from stages.run.production import greedy
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig, RawConfig
from stages.spec.families import parse_config
from stages.spec.forward import forward_pipeline
from stages.spec.sites import Reached, Site, reached
from svf_jax.production import load_model

ENGINE = "nnx"
# What a module is called by in its own attributes while it is captured: jit hands that on to its copy.
_MARK = "svf_captured_as"
_SERIAL = itertools.count()
_LOGITS: Reached = (None, Site("", "lm_head", of_layer=False))


class InMemory:
    """The weights of a model as they are now, by the checkpoint's names."""

    def __init__(self, model: nnx.Module):
        nodes = nnx.iter_graph(model)
        self._tensors = {_plain(path): node for path, node in nodes if isinstance(node, nnx.Param)}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of parameter `name`; `InputError` where the model has none of that name."""
        found = self._tensors.get(name, self._tensors.get(name.removeprefix("model.")))
        if found is None:
            raise InputError(f"the model in memory has no parameter '{name}'; give source, the checkpoint that it has")
        return np.asarray(found[...])[start:stop]


@contextmanager
def capture(model: Any, *, source: str | None = None, deep: bool = False) -> Iterator[Record]:
    """Record every call of `model` in the block, by its modules' calls.

    `source` is the folder or hub model whose config and weights it has; by default its `config` says. Nothing reaches
    queries and keys after RoPE here: `UsageError` for `deep`. `InputError` for a model whose config or modules are not
    of a known family. What was split from the model before the block is not seen.
    """
    if deep:
        raise UsageError("deep: modules of nnx call attention each in its own way, so there is nothing to wrap")
    raw = _raw_config(model, source)
    config = parse_config(raw, f"the config of {type(model).__name__}")
    record = Record(config, raw, known_source(source, None), InMemory(model))
    modules = {_plain(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    found = reached([name for name in modules if name], forward_pipeline(config))
    taking = _Taking(record, {name: modules[name] for name in found}, found)
    with ExitStack() as stack:
        for cls in {type(module) for module in (model, *taking.modules.values())}:
            stack.enter_context(_calls_of(cls, taking))
        stack.enter_context(taking.marked(model))
        yield record
        jax.effects_barrier()  # what compiled code has still to hand out


def run(
    config: ModelConfig,
    raw_config: RawConfig,
    weights: Weights,
    source: str,
    rows: Sequence[Sequence[int]],
    *,
    attention: str = "own",
    compiled: bool = False,
    cache: str = "none",
    generate: int = 0,
    dtype: str = "model",
    device: str = "cpu",
    deep: bool = False,
) -> tuple[Record, list[list[int]]]:
    """Load a checkpoint into our production model, run each of the token ids `rows` by itself, and decode.

    The record, and for each row the `generate` greedy tokens that followed, all of them run through the model too.
    `UsageError` for another attention than the model's own, and for a cache: it has none.
    """
    if attention != "own" or cache != "none":
        raise UsageError(f"{ENGINE} has its own attention and no cache; leave --attention and --kv-cache out")
    del raw_config  # transformers reads it by itself; here the parsed one is all there is
    model = load_model(config, weights, dtype, device)
    with capture(model, source=source, deep=deep) as record, jax.default_matmul_precision("highest"):
        graph, state = nnx.split(model)

        def forward(state: nnx.State, tokens: Array) -> Array:
            return nnx.merge(graph, state)(tokens)

        # The model prescribes roundings that XLA would leave out, see svf_jax/production.py.
        called = jax.jit(forward, compiler_options={"xla_allow_excess_precision": False}) if compiled else forward
        found = [_decode(functools.partial(called, state), row, generate) for row in rows]
    return record, found


class _Taking:
    """Calls of modules whose arrays are kept, and calls of the model that they belong to."""

    def __init__(self, record: Record, modules: Mapping[str, nnx.Module], places: Mapping[str, Sequence[Reached]]):
        self.record, self.modules, self.places = record, modules, places
        self.seen: dict[Reached, np.ndarray] = {}
        self.compiled = False
        self._serial = next(_SERIAL)
        self._logits = not any(site.stage == "lm_head" for at in places.values() for _, site in at)

    @contextmanager
    def marked(self, model: nnx.Module) -> Iterator[None]:
        """Give each module its name, by which its copies are known; another one in every capture."""
        named = {**self.modules, "": model}
        for name, module in named.items():
            setattr(module, _MARK, f"{self._serial}:{name}")
        try:
            yield
        finally:
            for module in named.values():
                delattr(module, _MARK)

    def call(self, module: nnx.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module by its `own` function, keeping what it is given and gives, wherever that is a stage."""
        serial, _, name = str(getattr(module, _MARK, "")).partition(":")
        if serial != str(self._serial):
            return own(module, *args, **kwargs)
        if not name:
            self._hand_out(self._begin, *_tokens(args, kwargs))
        for layer, site in self.places.get(name, ()):
            if site.given:
                self._hand_out(functools.partial(self._keep, (layer, site)), _first(args, kwargs))
        out = own(module, *args, **kwargs)
        for layer, site in self.places.get(name, ()):
            if not site.given and (isinstance(out, tuple) or site.member == 0):
                given = out[site.member] if isinstance(out, tuple) else out
                self._hand_out(functools.partial(self._keep, (layer, site)), given)
        if not name:
            if self._logits and isinstance(out, jax.Array):
                self._hand_out(functools.partial(self._keep, _LOGITS), out)
            self._hand_out(self._end)
        return out

    def _hand_out(self, take: Callable[..., None], *arrays: Array) -> None:
        """Have `take` called with arrays as they are when the program runs."""
        if any(isinstance(array, jax.core.Tracer) for array in arrays) or (not arrays and self.compiled):
            self.compiled = True
            jax.debug.callback(take, *arrays, ordered=True)
        else:
            take(*arrays)

    def _keep(self, at: Reached, array: Array) -> None:
        self.seen[at] = np.array(array)

    def _begin(self, tokens: Array, *mask: Array) -> None:
        self.seen.clear()  # what a call that failed left
        self._ids = np.array(tokens, np.int64)
        self._real = np.array(mask[0]) != 0 if mask else np.ones(self._ids.shape, bool)

    def _end(self) -> None:
        n, single = self._ids.shape[-1], self._ids.ndim == 1
        arrays = {}
        for at, array in self.seen.items():
            table = array.ndim == 2 and at[1].stage.startswith("rope_")
            batch = array[None] if single or table else array
            if batch.shape[1] == n:  # which rows of the logits were asked for, nobody knows
                arrays[at] = batch
        self.seen.clear()
        self.record.facts |= self._facts()
        self.record.calls.append(Call(self._ids.reshape(-1, n), self._real.reshape(-1, n), 0, arrays))

    def _facts(self) -> dict[str, str]:
        device = jax.devices()[0]
        return {
            "engine": ENGINE,
            "flax": flax.__version__,
            "jax": jax.__version__,
            "attention": "own",
            "compiled": str(self.compiled),
            "cache": "none",
            "autocast": "none",
            "device": "cpu" if device.platform == "cpu" else f"gpu: {device.device_kind}",
            "matmul_precision": str(jax.config.values["jax_default_matmul_precision"] or "the device's"),
        }


@contextmanager
def _calls_of(cls: Any, taking: _Taking) -> Iterator[None]:
    """Have calls of a class's modules go through `taking`."""
    own, inherited = cls.__call__, "__call__" not in vars(cls)

    @functools.wraps(own)
    def called(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return taking.call(self, own, args, kwargs)

    cls.__call__ = called
    try:
        yield
    finally:
        if inherited:
            del cls.__call__
        else:
            cls.__call__ = own


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The token ids of a call of the model, and its attention mask where it has one."""
    ids = jnp.asarray(kwargs.get("input_ids", args[0] if args else next(iter(kwargs.values()), 0.0)))
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim not in (1, 2):
        raise InputError("the model was called without token ids; a captured run must name its tokens")
    mask = kwargs.get("attention_mask")
    return [ids] if mask is None else [ids, mask]


def _raw_config(model: nnx.Module, source: str | None) -> RawConfig:
    """A model's config as its file has it."""
    if source is not None:
        with open_model(source) as checkpoint:
            return checkpoint.raw_config
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise InputError(f"{type(model).__name__} has no config that says its family; give source, its checkpoint")
    found: RawConfig = config.to_dict()
    return found


def _plain(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _decode(model: Callable[[Array], Array], row: Sequence[int], generate: int) -> list[int]:
    """Greedy tokens, each from a call on all before it."""
    found: list[int] = []
    for step in range(generate + 1):
        logits = model(jnp.asarray([*row, *found], jnp.int32))
        if step < generate:
            found.append(greedy(np.asarray(logits)))
    return found
