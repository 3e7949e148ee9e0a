"""The forward command on one backend: trace, dump, repeat, and compare with the production model."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.errors import UsageError
from stages.files.aprt import write_tree
from stages.files.bundle import Bundle
from stages.files.folders import check_folder
from stages.files.forward_dump import ForwardDump, ForwardSide, Place, forward_key, run_fields
from stages.files.jsonio import copy_atomic
from stages.files.memory import available_bytes
from stages.files.scratch import scratch_folder
from stages.files.source import ModelSource, open_model
from stages.files.tokens import token_ids
from stages.jobs.builtin import default_source
from stages.judge import stats
from stages.judge.metrics import Difference
from stages.order.ordered_backend import order_rows, with_order
from stages.order.resolve import orders_at
from stages.progress import Progress
from stages.run.adapted import ADAPTED_FILE, adapt
from stages.run.budget import check_memory, forward_bytes, hold_memory
from stages.run.calibration import facts_of
from stages.run.forward import Forwarder, LoadedWeights
from stages.run.precision import NATIVE, precision_fields
from stages.run.production import compare_production, greedy, with_stored_head
from stages.spec.backend import BOTH, Backend, Production, Weights
from stages.spec.config import LM_HEAD, ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.families import parameter_shapes
from stages.spec.forward import forward_pipeline, producers
from stages.spec.selectors import resolve_layers, resolve_stages
from stages.spec.stage import Pipeline, Scope
from stages.spec.values import StageResult

# A loaded production model takes its weights and, while it runs, activations and a copy of the largest weight.
_PRODUCTION_OVERHEAD = 1.4
_MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class ForwardCommand:
    """What `svf forward` was asked; fields as in its `--help`. `model` None: the built-in tiny one."""

    job: ClassVar[str] = "forward"

    model: str | None = None
    tokens: str | None = None
    tokens_file: Path | None = None
    prompt: str | None = None
    backend: str = BOTH
    layers: str = "all"
    stages: str = "all"
    positions: str = "all"
    dtype: str = "model"
    adapted: Path | None = None
    layout: str = "declared"
    repeat: int = 1
    out: Path | None = None
    format: str = "safetensors"
    device: str = "cpu"
    jit: str = "stage"
    production: bool | None = None  # None: when the weights fit memory
    generate: int = 0
    top: int = 5
    precision: str = "native"
    timeout: float | None = None
    resume: bool = False
    max_memory: int | None = None
    order: str | None = None
    close_up: bool = False  # whether statistics of every stage are wanted, for a report
    with_inputs: bool = False  # record what the asked stages read too, so that each can be judged
    order_at: Path | None = None  # where the orders are taken from, when `order` is a backend's name


def with_model(command: ForwardCommand, progress: Progress) -> ForwardCommand:
    """The command with the built-in tiny model filled in when it names none."""
    if command.model is not None:
        return command
    folder, fresh = default_source()
    progress.say(f"no model given: using the built-in tiny one {'made now ' if fresh else ''}in {folder / 'model'}")
    return replace(command, model=str(folder / "model"))


def forward_one(
    command: ForwardCommand,
    backend: Callable[[], Backend],
    progress: Progress,
    reading: Callable[[Weights], Weights] = lambda weights: weights,
) -> dict[str, Any]:
    """Trace one forward on one backend; the `svf.forward/1` document.

    `reading` may put another reader before the weights: what it changes is computed with, and not told in the dump.
    """
    if command.repeat > 1 and command.out is not None and command.format == "aprt":
        raise UsageError("--repeat compares with the first run's dump, which --format aprt does not keep in full")
    command = with_model(command, progress)
    assert command.model is not None
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_model(command.model))
        job = _Job(command, checkpoint, stack, progress)
        if command.out is not None and not command.resume:
            check_folder(command.out)
        hold_memory(job.needed, command.max_memory, "try fewer tokens")
        orders = orders_at(command.order_at or Path(command.order), progress) if command.order else None
        return job.run(with_order(backend(), orders, command.order or NATIVE), reading)


def check_forward(command: ForwardCommand, checkpoint: ModelSource) -> list[int]:
    """The run's token ids; refuses what a side would refuse before it computes, so that it is said once."""
    with ExitStack() as stack:
        job = _Job(command, checkpoint, stack, Progress(False))
        check_memory(job.needed, command.max_memory, "try fewer tokens")
        if command.adapted is not None:
            Bundle(command.adapted).close()
        return job.tokens.tolist()


class _Job:
    """One forward: what was asked for, resolved against the model."""

    def __init__(self, command: ForwardCommand, checkpoint: ModelSource, stack: ExitStack, progress: Progress):
        self.command, self.checkpoint, self.stack, self.progress = command, checkpoint, stack, progress
        checkpoint.check()
        self.config = checkpoint.config
        self.tokens = token_ids(command, checkpoint)
        self.config.check_length(len(self.tokens))
        path = forward_pipeline(self.config, command.dtype)
        self.layers = resolve_layers(command.layers, self.config.num_hidden_layers)
        self.stages = resolve_stages(command.stages, path)
        if command.adapted is None and command.layout != "declared":
            raise UsageError(f"--layout {command.layout} needs --adapted COMPONENTS")
        self.needed = forward_bytes(self.config, path, len(self.tokens))  # bytes of memory
        self.adapted: dict[str, str] | None = None  # tensor -> layout
        self.adapted_sha256: dict[str, str] | None = None
        self.statistics: list[dict[str, Any]] | None = [] if command.close_up else None
        self.components: dict[str, Any] | None = None  # the bundle, as the manifest names it

    def run(self, backend: Backend, reading: Callable[[Weights], Weights]) -> dict[str, Any]:
        command = self.command
        scratch = self.stack.enter_context(scratch_folder("forward"))
        weights = self._loaded(reading(self._weights(backend, scratch)), command.dtype)
        forwarder = Forwarder(backend, self.config, weights, dtype=command.dtype, fuse_layers=command.jit == "layer")
        self.inputs = self._inputs(forwarder.path) if command.with_inputs else frozenset()
        logits, digest = self._trace(forwarder, backend, scratch)
        repeated = self._repeat(forwarder, scratch) if command.repeat > 1 else None
        generated = self._generate(forwarder) if command.generate else None
        production = self._production(backend, weights, logits, generated)
        return {
            "schema": "svf.forward/1",
            "backend": backend.name,
            "model": command.model,
            "tokens": self.tokens.tolist(),
            "positions": command.positions,
            "dtype": forwarder.path.activations,
            "layers": list(self.layers),
            "stages": list(self.stages),
            "next_token": greedy(logits),
            "top5": stats.top_tokens(logits[-1].astype(np.float32)),
            "lm_head_sha256": digest,
            "adapted": self.adapted,
            "generated": generated,
            "production": production,
            "deterministic": repeated,
            "facts": facts_of(backend),
            "jit": command.jit,
            **precision_fields(backend),
            "orders": order_rows(backend),
            "stats": self.statistics,
            "out": str(command.out) if command.out else None,
        }

    def _inputs(self, path: Pipeline) -> frozenset[Place]:
        """What the asked stages of the asked layers read and are not themselves."""
        places = [
            (layer, path.at((layer, name)))
            for name in self.stages
            for layer in (self.layers if path[name].scope is Scope.LAYER else (None,))
            if name in path.of(layer)
        ]
        layers = self.config.num_hidden_layers
        found = {source for layer, stage in places for source in producers(path, stage, layer, layers).values()}
        return frozenset(found - {(layer, stage.name) for layer, stage in places})

    def _weights(self, backend: Backend, scratch: Path) -> Weights:
        """The checkpoint, or the checkpoint with the bundle's adapted tensors in place of its own."""
        command = self.command
        if command.adapted is None:
            return self.checkpoint
        found = adapt(command.adapted, command.layout, self.checkpoint, backend, scratch, self.stack, self.progress)
        self.adapted, self.adapted_sha256, self.components = found.layouts, found.sha256, found.components
        self.config = with_stored_head(self.config, found.weights)
        return found.weights

    def _loaded(self, weights: Weights, dtype: str) -> Weights:
        """The weights, kept in memory where production needs all of them anyway, and the very same values."""
        own = stored_dtype(self.config.dtype)
        exact = np.can_cast(own, own if dtype == "model" else stored_dtype(dtype))
        return LoadedWeights(weights, self.config, dtype) if exact and self.why_not is None else weights

    def _trace(self, forwarder: Forwarder, backend: Backend, scratch: Path) -> tuple[np.ndarray, str]:
        """Run once, writing what was asked for; the logits and their sha256."""
        command = self.command
        results = self._results(forwarder)
        kept: list[np.ndarray] = []

        def asked() -> Iterator[StageResult]:
            for result in results:
                if result.stage == "lm_head":
                    kept.append(result.array)
                if result.stage in self.stages:
                    self._measure(result)
                if result.stage in self.stages or (result.layer, result.stage) in self.inputs:
                    yield result

        if command.out is not None and command.format == "aprt":
            write_tree(command.out, ((r.layer, r.stage, r.array) for r in asked()))
        elif command.out is not None or command.repeat > 1:
            folder = command.out if command.out is not None else scratch / "first"
            with ForwardDump(folder, resume=command.resume) as dump:
                for _ in dump.record(asked()):
                    pass
                if self.adapted is not None:  # so that a diff can judge the stages that used them
                    copy_atomic(scratch / ADAPTED_FILE, folder / ADAPTED_FILE)
                dump.commit(self._manifest(forwarder, backend))
        else:
            for _ in asked():
                pass
        return kept[0], hashlib.sha256(np.ascontiguousarray(kept[0]).reshape(-1).view(np.uint8).data).hexdigest()

    def _measure(self, result: StageResult) -> None:
        if self.statistics is not None:
            place = {"layer": result.layer, "tensor": None, "stage": result.stage}
            self.statistics.append({**place, **stats.population(result.array)})

    def _results(self, forwarder: Forwarder) -> Iterator[StageResult]:
        """The asked stages and the logits, with progress."""
        wanted = dict.fromkeys((*self.stages, "lm_head"))
        total = self.config.num_hidden_layers
        for result in forwarder.run(
            self.tokens.tolist(),
            layers=self.layers,
            stages=wanted,
            also=self.inputs,
            positions=self.command.positions,
        ):
            done = total if result.layer is None else result.layer
            self.progress(f"{forwarder.backend.name} forward, {result.stage}", done / total)
            yield result

    def _manifest(self, forwarder: Forwarder, backend: Backend) -> dict[str, Any]:
        command = self.command
        return {
            "backend": backend.name,
            "facts": {**facts_of(backend), "jit": command.jit},
            "precision": command.precision,
            **run_fields(self.checkpoint, str(command.model), self.tokens.tolist()),
            "dtype": forwarder.path.activations,
            "positions": command.positions,
            "layers": list(self.layers),
            "stages": list(self.stages),
            "inputs": sorted(map(forward_key, self.inputs)),
            "adapted": self.adapted,
            "adapted_sha256": self.adapted_sha256,
            "components": self.components,
            "layout": command.layout if command.adapted else None,
        }

    def _repeat(self, forwarder: Forwarder, scratch: Path) -> dict[str, Any]:
        """Run again and again; how many elements were not byte-identical to the first run's."""
        side = ForwardSide(self.command.out or scratch / "first")
        different = elements = 0
        first: str | None = None
        try:
            for _ in range(self.command.repeat - 1):
                for result in self._results(forwarder):
                    if (result.layer, result.stage) not in side.places:
                        continue
                    d = Difference(0)
                    d.add(side.read((result.layer, result.stage)), result.array)
                    different, elements = different + d.mismatched, elements + d.count
                    if d.mismatched and first is None:
                        first = result.stage if result.layer is None else f"layers.{result.layer}.{result.stage}"
        finally:
            side.close()
        return {
            "runs": self.command.repeat,
            "identical": different == 0,
            "different_elements": different,
            "elements": elements,
            "first": first,
        }

    def _generate(self, forwarder: Forwarder) -> list[int]:
        """Greedy tokens of the traced path, each from a forward of all before it."""
        tokens = self.tokens.tolist()
        for step in range(self.command.generate):
            self.progress(f"{forwarder.backend.name} generating", step / self.command.generate)
            (last,) = [r.array for r in forwarder.run(tokens, layers=(), stages=("lm_head",), positions="last")]
            tokens.append(greedy(last))
        return tokens[len(self.tokens) :]

    def _production(
        self, backend: Backend, weights: Weights, logits: np.ndarray, generated: list[int] | None
    ) -> dict[str, Any]:
        """The comparison with the uninstrumented model, or why there is none."""
        command = self.command
        if self.why_not is not None:
            return {"ran": False, "why": self.why_not}
        self.progress(f"{backend.name} production model", 0.0)
        tokens, last = self.tokens.tolist(), command.positions == "last"

        model = self._model(backend, weights, command.dtype)
        if model is None:
            return {"ran": False, "why": f"{backend.name} is the specification and has no production model"}
        found = compare_production(
            logits,
            model(tokens, last_only=last),
            layers=self.config.num_hidden_layers,
            reordered=lambda: model.reordered(tokens, last_only=last),
            wider=lambda: self._wider(backend, self._loaded(weights, "float32"), tokens, last),
        )
        if generated is not None:
            produced = model.generate(tokens, command.generate)
            found |= {"generated": produced, "generated_agrees": produced == generated}
        return found

    def _model(self, backend: Backend, weights: Weights, dtype: str) -> Production | None:
        return backend.production(self.config, weights, dtype=dtype, raw_config=self.checkpoint.raw_config)

    def _wider(self, backend: Backend, weights: Weights, tokens: list[int], last: bool) -> dict[str, Any]:
        """The same comparison in float32, for a dtype too narrow to decide."""
        forwarder = Forwarder(backend, self.config, weights, dtype="float32")
        run = forwarder.run(tokens, layers=(), stages=("lm_head",), positions=self.command.positions)
        (traced,) = [result.array for result in run]
        model = self._model(backend, weights, "float32")
        assert model is not None
        return compare_production(
            traced,
            model(tokens, last_only=last),
            layers=self.config.num_hidden_layers,
            reordered=lambda: model.reordered(tokens, last_only=last),
        )

    @functools.cached_property
    def why_not(self) -> str | None:
        """Why there is no production; asked before anything is loaded, whose memory would count as taken."""
        command = self.command
        if command.production is False:
            return "--no-production"
        if command.precision != NATIVE:
            return f"production computes natively, this trace in {command.precision} precision"
        if command.order is not None:
            return f"production sums as it does, this trace in the order of {command.order}"
        if command.production is None:
            needed = production_bytes(self.config, command.dtype)
            free = min(available_bytes(), command.max_memory or sys.maxsize)
            if needed > _MEMORY_SHARE * free:
                return (
                    f"the weights need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; --production forces"
                )
        return None


def production_bytes(config: ModelConfig, dtype: str) -> int:
    """Memory that the production model of `config` takes."""
    size = stored_dtype(config.dtype if dtype == "model" else dtype).itemsize
    shapes = parameter_shapes(config)
    count = sum(int(np.prod(s)) for n, s in shapes.items() if n != LM_HEAD or not config.tie_word_embeddings)
    return int(count * size * _PRODUCTION_OVERHEAD)
