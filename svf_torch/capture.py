"""What a running model of `transformers` computes, by hooks on its modules. Twin of svf_jax/capture.py.

Every tensor is copied where the hook gets it, so what a later operation writes over it does not matter. Hooks are there
while the model is compiled, and so are part of what is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stages.errors import InputError, NotFoundError, UsageError
from stages.run.captured import Call, Record, known_source
from stages.spec.backend import Weights
from stages.spec.config import LM_HEAD, ModelConfig, RawConfig
from stages.spec.families import parse_config
from stages.spec.forward import forward_pipeline
from stages.spec.sites import ROTATED, Reached, reached
from svf_torch.backend import device_name, to_numpy
from svf_torch.production import load_model

ENGINE = "transformers"


class InMemory:
    """The weights of a model as they are now, by the checkpoint's names."""

    def __init__(self, model: nn.Module):
        self._tensors = {_plain(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of parameter `name`; `InputError` where the model has none of that name."""
        found = self._tensors.get(name, self._tensors.get(name.removeprefix("model.")))
        if found is None:
            raise InputError(f"the model in memory has no parameter '{name}'; load it from a checkpoint")
        return to_numpy(found[start:stop])


@contextmanager
def capture(model: Any, *, source: str | None = None, deep: bool = False) -> Iterator[Record]:
    """Record every call of `model` in the block, by hooks; with `deep`, queries and keys after RoPE too.

    `source` is the folder or hub model that it was loaded from; by default what the model says, if that is on this
    disk. `InputError` for a model whose config or modules are not of a known family.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    raw = _raw_config(inner)
    config = parse_config(raw, f"the config of {type(inner).__name__}")
    named = known_source(source, getattr(inner, "name_or_path", None))
    record = Record(config, raw, named, InMemory(inner))
    compiled = inner is not model or getattr(inner, "_compiled_call_impl", None) is not None
    taking = _Taking(record, inner, compiled)
    with ExitStack() as stack:
        if compiled:  # what was compiled before knows nothing of the hooks, and what is compiled now nothing else
            torch._dynamo.reset()
            stack.callback(torch._dynamo.reset)
        for name, places in reached([name for name, _ in inner.named_modules()], forward_pipeline(config)).items():
            taking.hook(inner.get_submodule(name), places, stack)
        if deep:
            stack.enter_context(_attention_wrapped(inner, taking))
        stack.enter_context(taking.calls_of(model))
        yield record


def run(
    config: ModelConfig,
    raw_config: RawConfig,
    weights: Weights,
    source: str,
    rows: Sequence[Sequence[int]],
    *,
    attention: str = "sdpa",
    compiled: bool = False,
    cache: str = "dynamic",
    generate: int = 0,
    dtype: str = "model",
    device: str = "cpu",
    deep: bool = False,
) -> tuple[Record, list[list[int]]]:
    """Load a checkpoint into `transformers`' class, run token ids `rows` as one batch, padded on the left, and decode.

    The record, and for each row the `generate` greedy tokens that followed, all of them run through the model too.
    """
    model = load_model(config, weights, dtype, device, raw_config)
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise NotFoundError(f"transformers cannot use {attention} here: {error}") from error
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    called = torch.compile(model) if compiled else model
    with torch.inference_mode(), capture(called, source=source, deep=deep) as record:
        found = _decode(called, ids, mask, _cache(model, cache, longest + generate), generate)
    return record, found


class _Taking:
    """Hooks that copy what they see, and calls that they see it in."""

    def __init__(self, record: Record, model: Any, compiled: bool):
        self.record, self.model, self.compiled = record, model, compiled
        self.places: list[Reached] = []
        self.seen: dict[int, Tensor] = {}  # by the number of the place

    def hook(self, module: nn.Module, places: Sequence[Reached], stack: ExitStack) -> None:
        """Copy what a module is given and gives, wherever that is a stage."""
        seen = self.seen  # compiled code may set an item of a dict that it is given, and make nothing
        given = [self.number(at) for at in places if at[1].given]
        gives = [(self.number(at), at[1].member) for at in places if not at[1].given]

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            for number in given:
                seen[number] = _copied(args[0] if args else next(iter(kwargs.values())))

        def after(_module: nn.Module, _args: Any, out: Any) -> None:
            for number, member in gives:
                if isinstance(out, tuple) or member == 0:
                    seen[number] = _copied(out[member] if isinstance(out, tuple) else out)

        if given:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if gives:
            stack.callback(module.register_forward_hook(after).remove)

    def number(self, at: Reached) -> int:
        """The number of a place, under which what is seen there is kept."""
        self.places.append(at)
        return len(self.places) - 1

    @contextmanager
    def calls_of(self, model: Any) -> Iterator[None]:
        """Have each call of the model begun and ended here, outside of what is compiled."""
        compiled = model.__dict__.get("_compiled_call_impl") if isinstance(model, nn.Module) else None
        if compiled is None:
            with ExitStack() as stack:
                stack.callback(model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                stack.callback(model.register_forward_hook(self._end, with_kwargs=True).remove)
                yield
            return

        def called(*args: Any, **kwargs: Any) -> Any:
            self._begin(model, args, kwargs)
            out = compiled(*args, **kwargs)
            self._end(model, args, kwargs, out)
            return out

        model._compiled_call_impl = called
        try:
            yield
        finally:
            model._compiled_call_impl = compiled

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.seen.clear()  # what a call that failed left
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InputError("the model was called without input_ids; a captured run must name its tokens")
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        self.record.check_start(before)
        self._tokens, self._before = to_numpy(ids).astype(np.int64), before
        self._real = _real(kwargs.get("attention_mask"), self._tokens.shape, before)
        self.record.facts |= self._facts(cache, ids.device)
        self._check_autocast()

    def _end(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        if self.record.facts["cache"] == "none" and getattr(out, "past_key_values", None) is not None:
            self.record.facts["cache"] = type(out.past_key_values).__name__
        chosen = isinstance(kwargs.get("logits_to_keep"), Tensor)  # which rows of the logits these are, nobody knows
        n = self._tokens.shape[1]
        own = slice(self._before, self._before + n)  # keys of a cache: those before, these, and room for more
        arrays = {
            self.places[number]: to_numpy(tensor[:, own] if tensor.ndim > 2 and tensor.shape[1] > n else tensor)
            for number, tensor in self.seen.items()
            if not (chosen and self.places[number][1].stage == LM_HEAD.removesuffix(".weight"))
        }
        self.seen.clear()
        self.record.calls.append(Call(self._tokens, self._real, self._before, arrays))

    def _check_autocast(self) -> None:
        """`InputError` where some operations cast weights and others do not: no bound is declared for that."""
        narrow, weights = (self.record.facts[name] for name in ("autocast", "weights"))
        if narrow not in ("none", weights):
            raise InputError(
                f"autocast computes products in {narrow} and the rest in {weights}; to judge a run, load the model in "
                "one of them and leave autocast out"
            )

    def _facts(self, cache: Any, device: torch.device) -> dict[str, str]:
        kind = device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return {
            "engine": ENGINE,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "attention": str(self.model.config._attn_implementation),
            "compiled": str(self.compiled),
            "cache": "none" if cache is None else type(cache).__name__,
            "weights": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "autocast": "none" if narrow is None else str(narrow).removeprefix("torch."),
            "device": device_name(str(device)),
            "threads": str(torch.get_num_threads()),
        }


@contextmanager
def _attention_wrapped(model: Any, taking: _Taking) -> Iterator[None]:
    """Have `transformers` call attention through a function that copies the queries and keys that it gets."""
    name = model.config._attn_implementation
    numbers = {module: [taking.number((layer, site)) for site in ROTATED] for module, layer in _attentions(model)}
    kept = taking.seen
    own = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)

    def attend(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        if module in numbers:
            for number, x in zip(numbers[module], (query, key), strict=True):
                kept[number] = _copied(x.transpose(1, 2))
        return (own or _attention_of(module, name))(module, query, key, *rest, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if own is not None:
            ALL_ATTENTION_FUNCTIONS[name] = own


def _attentions(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and hasattr(module, "o_proj"):
            yield module, layer


def _attention_of(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that a module would call."""
    found = ALL_ATTENTION_FUNCTIONS._global_mapping.get(name)
    return found or sys.modules[type(module).__module__].eager_attention_forward


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone()


def _real(mask: Any, shape: tuple[int, ...], before: int) -> np.ndarray:
    """Which positions of a call, `[batch, n]`, are no padding, by the attention mask that it was given."""
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if mask is None:
        return np.ones(shape, bool)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UsageError(
            f"an attention mask of {type(mask).__name__} does not say which positions are padding; give the model a "
            "two-dimensional one"
        )
    n = shape[1]
    given = to_numpy(mask)
    if mask.ndim == 2:
        given = given[:, before : before + n] if given.shape[1] >= before + n else given[:, -n:]
        return np.broadcast_to(given != 0, shape).copy()
    # Of padding no query is real, and so it does not even see itself.
    own = given[:, 0, np.arange(n), before + np.arange(n)]
    return np.broadcast_to(own if own.dtype == bool else own == 0, shape).copy()


def _raw_config(model: nn.Module) -> dict[str, Any]:
    """A model's config as its file has it, in the dtype that its weights have."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise InputError(f"{type(model).__name__} has no config of transformers; capture takes a transformers model")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {**{name: value for name, value in config.to_dict().items() if name != "torch_dtype"}, "dtype": dtype}


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")


def _cache(model: Any, name: str, length: int) -> Any:
    if name == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=length)
    return transformers.DynamicCache(config=model.config) if name == "dynamic" else None


def _decode(model: Any, ids: Tensor, mask: Tensor, cache: Any, generate: int) -> list[list[int]]:
    """Greedy tokens, one at a time through the cache; without a cache, each from a call on all before it."""
    found: list[list[int]] = [[] for _ in ids]
    given = ids
    for step in range(generate + 1):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        out = model(
            input_ids=given,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if step == generate:
            break
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        for row, (chosen,) in zip(found, token.tolist(), strict=True):
            row.append(chosen)
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        given = token if cache is not None else torch.cat((given, token), dim=1)
    return found
