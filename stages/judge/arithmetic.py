"""Hidden stages by a backend's own functions: which of its ways to compute gives a recorded tensor to the last byte.

A way is stage by stage, with attention in one call, one token after another with a cache, or all hidden stages compiled
as one. Where one gives all bytes there is nothing to estimate; a hypothesis with which one gives all bytes is proved.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.recorded_run import ForwardRun, find, sources_of, weights_of
from stages.judge.spans import given_at, span_of
from stages.judge.tried import Edits
from stages.run.forward import parameters
from stages.spec.backend import Backend
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import RUN_PARAMS, stage_options
from stages.spec.profiles import TABLES

_ATTENTION = "attention"


@dataclass(frozen=True)
class Step:
    """One stage of a span: its function of the backend, `""` a copy of its first input, and what it is called with."""

    at: Place
    function: str
    options: Mapping[str, Any]
    inputs: tuple[Place, ...]
    params: tuple[np.ndarray, ...]
    fused: bool = False

    @property
    def call(self) -> tuple[Any, ...]:
        """What a compiled function is kept by."""
        return self.function, self.fused, repr(sorted(self.options.items()))

    def alike(self, other: Step) -> bool:
        """Whether it is the same call of the same inputs and the very same params."""
        params = len(self.params) == len(other.params) and all(map(operator.is_, self.params, other.params))
        return params and self.inputs == other.inputs and self.call == other.call


def program(place: Place, run: ForwardRun) -> list[Step]:
    """The hidden stages of a recorded one, and itself, in execution order."""
    assert run.path is not None
    assert run.config is not None
    span, steps = span_of(place, run), []
    dtype = stored_dtype(run.path.activations)
    for at in (*span.hidden, span.acting):
        stage = run.path.at(at)
        sources = tuple(sources_of(at, run).values())
        if stage.identity:
            steps.append(Step(at, "", {}, sources, ()))
            continue
        params = tuple(parameters(stage, given_at(run, at), weights_of(run), at[0], dtype))
        steps.append(Step(at, stage.function, stage_options(run.config, stage), sources, params))
    return steps


def edited(steps: Sequence[Step], edits: Edits) -> list[Step]:
    """The steps with some stages changed."""
    changed = []
    for step in steps:
        edit = edits.get(step.at)
        if edit is not None and edit.copied:
            step = replace(step, function="", options={}, params=())
        elif edit is not None:
            own = step.params if edit.params is None else edit.params
            params = tuple(np.asarray(new, old.dtype) for new, old in zip(own, step.params, strict=True))
            step = replace(step, options={**step.options, **(edit.options or {})}, params=params)
        changed.append(step)
    return changed


def _fused(steps: Sequence[Step], backend: Backend) -> list[Step] | None:
    """The steps with attention in one call; None where no step is left out by that."""
    by_place = {step.at: step for step in steps}
    found, gone = [], set()
    for step in steps:
        softmax = by_place.get(step.inputs[0]) if step.function == _ATTENTION else None
        scores = by_place.get(softmax.inputs[0]) if softmax is not None else None
        if softmax is None or scores is None or _ATTENTION not in backend.fused or not scores.function:
            found.append(step)
            continue
        gone |= {softmax.at, scores.at}
        options = {**step.options, **scores.options, **softmax.options}
        found.append(replace(step, options=options, inputs=(*scores.inputs, step.inputs[1]), fused=True))
    return [step for step in found if step.at not in gone] if gone else None


@dataclass
class Arithmetic:
    """One way in which a backend computes stages that nobody recorded.

    `by_token`: as a decode with a cache does, one token after another, but for the first `at_once`.
    """

    backend: Backend
    how: str
    fused: bool = False
    whole: bool = False
    by_token: bool = False
    at_once: int = 0

    def __post_init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._decoded: dict[Place, tuple[Step, list[np.ndarray]]] = {}
        self._known: dict[Place, tuple[Step, Any]] = {}  # of the last program: what a step was, and what it gave

    @property
    def words(self) -> str:
        facts = self.backend.facts()
        by = f"{self.backend.name} {facts.get(self.backend.name, '')}".strip()
        first = f"the first {self.at_once} tokens at once, then " if self.at_once else ""
        decoded = f", {first}one token after another" if self.by_token else ""
        return f"as {by} computes it on this machine, {self.how}{decoded}"

    def start(self) -> None:
        """Another program begins; what follows are its edits."""
        self._known.clear()
        self._decoded.clear()

    def calls(self, steps: Sequence[Step], run: ForwardRun, rows: int) -> Iterator[np.ndarray]:
        """The last step's value of the last `rows` tokens from what was recorded, a call's tokens at a time; nothing
        where this way is no way of its own."""
        chosen = _fused(steps, self.backend) if self.fused else list(steps)
        if chosen is None or (self.whole and len(chosen) < 2):
            return
        if self.by_token:
            before = len(run.tokens) - rows
            for value in self._decoded_calls(chosen, run):
                if len(value) > before:
                    yield value[max(before, 0) :]
                before -= len(value)
            return
        inside = {step.at for step in chosen}
        leaves = list(dict.fromkeys(at for step in chosen for at in step.inputs if at not in inside))
        recorded = [self.backend.put(_read(run, at)) for at in leaves]
        value = self._as_one(chosen, leaves, recorded) if self.whole else self._one_by_one(chosen, leaves, recorded)
        yield self.backend.get(value)[-rows:]

    def _one_by_one(self, steps: Sequence[Step], leaves: Sequence[Place], recorded: Sequence[Any]) -> Any:
        """What is as it was before, of inputs that are, is not computed again."""
        values = dict(zip(leaves, recorded, strict=True))
        same = set(leaves)
        for step in steps:
            arguments = [values[at] for at in step.inputs]
            known = self._known.get(step.at)
            if known is not None and known[0].alike(step) and same.issuperset(step.inputs):
                values[step.at] = known[1]
                same.add(step.at)
                continue
            own = [self.backend.put(array) for array in step.params] if step.function else []
            values[step.at] = self._function(step)(*arguments, *own) if step.function else arguments[0]
            if step.at not in self._known:
                self._known[step.at] = (step, values[step.at])
                same.add(step.at)
        return values[steps[-1].at]

    def least_at_once(self, given: Iterable[tuple[np.ndarray | None, np.ndarray]]) -> int:
        """How many first tokens were at once, at least; 0 of none. Of what one token after another gives of some
        tensors, the rows after a last wrong one are right; the tensor that says most counts."""
        least = 0
        for value, observed in given if self.by_token else ():
            if value is not None and value.shape == observed.shape:
                wrong = np.flatnonzero((value != observed).reshape(len(value), -1).any(axis=1))
                if len(wrong) and wrong[-1] < len(value) - 1:
                    least = max(least, int(wrong[-1]) + 1)
        return least

    def _decoded_calls(self, steps: Sequence[Step], run: ForwardRun) -> Iterator[np.ndarray]:
        """The last step for the tokens of one call after another; a cache has the keys and values of those before."""
        assert run.path is not None
        count, known = len(run.tokens), dict[Place, np.ndarray]()
        inside = {step.at for step in steps}
        for at in {at for step in steps for at in step.inputs if at not in inside}:
            known[at] = _read(run, at)
            axis = run.path.at(at).shape.split()[0]
            if at[1] not in TABLES and (axis not in ("tokens", "queries") or len(known[at]) != count):
                return
        for step in (step for step in steps if step.at[1] in TABLES):
            known[step.at] = self._call(step, [known[at] for at in step.inputs], step.params)
        by_call = [step for step in steps if step.at[1] not in TABLES]
        made, same = dict[Place, list[np.ndarray]](), known.keys() - inside
        for step in by_call:  # what is as it was before, of inputs that are, is not computed again
            before = self._decoded.get(step.at)
            if before is not None and before[0].alike(step) and same.issuperset(set(step.inputs) - known.keys()):
                made[step.at] = before[1]
                same.add(step.at)
        calls = [(0, self.at_once)] * (self.at_once > 0) + [(t, t + 1) for t in range(self.at_once, count)]
        for number, (start, stop) in enumerate(calls):
            for step in by_call:
                if step.at not in same:
                    made.setdefault(step.at, []).append(self._of_call(step, run, known, made, number, start, stop))
            yield made[steps[-1].at][number]
        for step in by_call:
            self._decoded.setdefault(step.at, (step, made[step.at]))

    def _of_call(
        self,
        step: Step,
        run: ForwardRun,
        known: Mapping[Place, np.ndarray],
        made: Mapping[Place, Sequence[np.ndarray]],
        number: int,
        start: int,
        stop: int,
    ) -> np.ndarray:
        """A step for the tokens from `start` to `stop`, which are call `number`'s."""
        assert run.path is not None
        arguments = []
        for place, at in enumerate(step.inputs):
            cached = (step.function, place) in _CACHED
            if at in known:
                arguments.append(known[at][0 if cached else start : stop])
            else:
                arguments.append(np.concatenate(made[at][: number + 1]) if cached else made[at][number])
        of_run = [name in RUN_PARAMS for name in run.path.at(step.at).params]
        params = [p[start:stop] if own else p for p, own in zip(step.params, of_run, strict=False)]
        return self._call(step, arguments, params)

    def _call(self, step: Step, arguments: Sequence[np.ndarray], params: Sequence[np.ndarray]) -> np.ndarray:
        if not step.function:
            return arguments[0]
        put = self.backend.put
        return self.backend.get(self._function(step)(*map(put, arguments), *map(put, params)))

    def _function(self, step: Step) -> Callable[..., Any]:
        if step.call not in self._compiled:
            self._compiled[step.call] = self.backend.compile(self._plain(step))
        return self._compiled[step.call]

    def _plain(self, step: Step) -> Callable[..., Any]:
        functions = self.backend.fused if step.fused else self.backend.forward
        return functools.partial(functions[step.function], **step.options)

    def _as_one(self, steps: Sequence[Step], leaves: Sequence[Place], recorded: Sequence[Any]) -> Any:
        """All steps compiled as one function, once for layers that are alike."""
        order = {at: number for number, at in enumerate((*leaves, *(step.at for step in steps)))}
        key = tuple((step.call, tuple(order[at] for at in step.inputs), len(step.params)) for step in steps)
        if key not in self._compiled:
            plain = [self._plain(step) if step.function else None for step in steps]
            wiring = [[order[at] for at in step.inputs] for step in steps]
            counts = [len(step.params) for step in steps]

            def run(*arrays: Any) -> Any:
                values, rest = list(arrays[: len(leaves)]), list(arrays[len(leaves) :])
                for function, inputs, count in zip(plain, wiring, counts, strict=True):
                    own, rest = rest[:count], rest[count:]
                    arguments = [values[i] for i in inputs]
                    values.append(function(*arguments, *own) if function is not None else arguments[0])
                return values[-1]

            self._compiled[key] = self.backend.compile(run)
        params = [self.backend.put(array) for step in steps for array in step.params]
        return self._compiled[key](*recorded, *params)


# Inputs, by stage and number, that a decode has in its cache: keys, and values; of attention in one call both.
_CACHED = {("attn_scores", 1), (_ATTENTION, 1), (_ATTENTION, 2)}


def _read(run: ForwardRun, at: Place) -> np.ndarray:
    """A recorded stage in the run's dtype, if nothing is lost by it."""
    assert run.path is not None
    found = find(run, at)
    assert found is not None
    array, dtype = run.read(found), stored_dtype(run.path.at(at).dtype)
    narrowed = array.astype(dtype)
    return narrowed if np.array_equal(narrowed.astype(array.dtype), array) else array


def arithmetics(backend: Backend) -> Iterator[Arithmetic]:
    """The ways of a backend, in words."""
    jitted = backend.facts().get("jit") == "True"  # else nothing is compiled
    for by_token in (False,) if jitted else (False, True):  # a call of each length would be compiled
        yield Arithmetic(backend, "stage by stage", by_token=by_token)
        if backend.fused:
            yield Arithmetic(backend, "attention in one call", fused=True, by_token=by_token)
    if jitted:
        yield Arithmetic(backend, "compiled as one", whole=True)
