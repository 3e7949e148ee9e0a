"""Wrong programs for a recorded tensor: each hidden stage given another function, number or weight.

What is tried here is the catalogue's other functions, numbers that programs get wrong, weights of other places, and an
element, row or column of a weight; through.py asks which of them explains the tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.files.forward_dump import Place, forward_key
from stages.judge.activations import joined, least_of, taken_at
from stages.judge.hints import Case
from stages.judge.mix_ups import ALIKE
from stages.judge.recorded_run import ForwardRun, Span, sources_of, weights_of
from stages.judge.spans import computed, given_at, span_of, value_of, way_of
from stages.judge.wrong_weights import Element, Line, beside
from stages.oracle.activations import Taken
from stages.oracle.bounds import U32
from stages.oracle.decoder import attn_softmax
from stages.oracle.rope import TABLES
from stages.oracle.rounding import round_once, widened
from stages.oracle.span import Value, Way
from stages.oracle.verdict import STAGES, Oracle, consult, judged_part
from stages.recipes.at import At
from stages.recipes.attention import DEALT
from stages.recipes.catalogue import LEFT_OUT, right_value, ways_of
from stages.recipes.catalogue import Way as CatalogueWay
from stages.recipes.elements import CLEAR, become, stored_as
from stages.recipes.recipe import Class
from stages.recipes.rope import THETAS
from stages.run.forward import parameters
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import RUN_PARAMS, parameter_name, stage_options
from stages.spec.noise import Noise
from stages.spec.stage import Scope, Stage

Arrays = Sequence[np.ndarray]
# A stage's value of its inputs, or None where that function is not to be had.
Function = Callable[[Arrays], np.ndarray | None]
# A stage's value of its inputs and a number.
Of = Callable[[Arrays, float], np.ndarray]
# Axes of the sequence, and bytes of params that are kept in float64.
_BY_TOKEN, _MOST_WIDE = ("tokens", "queries", "keys"), 1 << 26
# Words that begin with the stage itself.
_IT = "it "
_LEFT_OUT = f"{_IT}were left out"
_EPS = (0.0, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Edit:
    """A stage changed so that a framework's own function of it can be called: other options or params, or left out."""

    options: Mapping[str, Any] | None = None
    params: Arrays | None = None
    copied: bool = False


Edits = Mapping[Place, Edit]


@dataclass(frozen=True)
class Hypothesis:
    """Another function in the place of some stages: where, in words, and what it is; as edits, where it is one.

    `about` is the element of which it says what it is instead, the likeliest first; `usual` says who does so by itself.
    """

    where: str
    said: str
    kind: Class
    instead: Mapping[Place, Function]
    edits: Edits | None = None
    about: str = ""
    usual: str = ""

    @property
    def words(self) -> str:
        return in_words([self])


@dataclass(frozen=True)
class Number:
    """A number that a hypothesis leaves open: `of` gives the functions of one, from which of `starts` it is sought.

    `said` are its words, with `{}` for the number; `right` is the number of the model. `edits` gives the edits of one.
    `of_config`: it is one number of the config, for all layers. It is not sought below `least`. `text` writes it.
    """

    where: str
    said: str
    of: Callable[[float], Mapping[Place, Function]]
    starts: Sequence[float]
    right: float
    edits: Callable[[float], Edits] | None = None
    of_config: bool = False
    least: float = 0.0
    text: Callable[[float], str] = "{:.9g}".format

    def hypothesis(self, x: float, shown: float | None = None) -> Hypothesis:
        """The hypothesis that it is `x`."""
        edits = None if self.edits is None else self.edits(x)
        said = self.said.format(self.text(x if shown is None else shown))
        return Hypothesis(self.where, said, Class.OTHER, self.of(x), edits)


class Tried:
    """A recorded tensor that hidden stages lead to, or a part of it that an oracle speaks of; and what it would be of
    wrong ones."""

    def __init__(self, place: Place, run: ForwardRun, oracle: Oracle, observed: np.ndarray, start: int = 0):
        assert run.path is not None
        assert run.config is not None
        self.run, self.path, self.config = run, run.path, run.config
        self.begin(span_of(place, run), oracle, observed, start)

    def begin(self, span: Span, oracle: Oracle, observed: np.ndarray, start: int = 0) -> None:
        """`start`: the first row of the weights of a stage that is judged by parts of the vocabulary."""
        self.start = start
        self.span, self.oracle, self.case = span, oracle, Case(oracle, observed)
        self.places = [at for at in self.span.hidden if not self.stage(at).identity]
        typical = oracle.bound if oracle.typical is None else oracle.typical()
        # What is exactly known weighs no more than a unit of it: its error is the bound's to tell.
        floor = U32 * np.abs(oracle.value) + float(np.max(typical, initial=0.0)) * 1e-9 + np.finfo(np.float64).tiny
        self.weight = 1 / np.maximum(np.broadcast_to(typical, oracle.value.shape), floor)
        self.until = 0.0
        self.params, self.values = functools.cache(self._params), functools.cache(self._value)
        self.inputs_of, self.stage_of = functools.cache(self.sources), functools.cache(self.stage)
        self.options_of = functools.cache(self.options)
        # Tokens of which all is computed: a causal model's first ones need no later ones, and show most that is wrong.
        self.tokens: int | None = None

    # -- where values come from: of other recordings than forwards, these are others --------------------------------

    def sources(self, at: Place) -> list[Place]:
        """The places of a stage's inputs."""
        return list(sources_of(at, self.run).values())

    def known(self, at: Place) -> Value:
        """A stage as recorded, or computed from what is."""
        return value_of(self.run, at)

    def computed(self, at: Place, inputs: Sequence[Value]) -> Value:
        """A hidden stage from these inputs."""
        return computed(self.run, at, inputs)

    def way(self) -> Way:
        """How the tensor is judged."""
        return way_of(self.span.acting, self.run)

    def taken(self, at: Place, inputs: Arrays) -> Arrays:
        """What a stage's kernel takes its inputs to before it computes."""
        taken = self.kernel(at)
        return inputs if taken is None else [taken.cell(inputs[0])[1], *inputs[1:]]

    # -- values of wrong programs ---------------------------------------------------------------------------------

    def value(self, instead: Mapping[Place, Function]) -> np.ndarray | None:
        """The tensor's float64 value, had these stages another function; None where one is not to be had."""
        changed: dict[Place, np.ndarray] = {}
        for at in self.span.hidden:
            sources = self.inputs_of(at)
            if at not in instead and changed.keys().isdisjoint(sources):
                continue
            value = instead.get(at, functools.partial(self.right, at))([self.given(s, changed) for s in sources])
            if value is None:
                return None
            changed[at] = value
        acting = self.span.acting
        inputs = [self.given(at, changed) for at in self.inputs_of(acting)]
        if self.oracle.stage.by_vocab:
            inputs = [array[-len(self.oracle.value) :] for array in inputs]
        found = instead.get(acting, functools.partial(self.right, acting))(inputs)
        return None if found is None else judged_part(self.oracle.stage, found)

    def given(self, at: Place, changed: Mapping[Place, np.ndarray]) -> np.ndarray:
        return changed[at] if at in changed else self.values(at)

    def _value(self, at: Place) -> np.ndarray:
        """As recorded or computed; of scores also those that a right mask hides, and a wrong one may not."""
        if at in self.span.hidden and self.stage_of(at).causal:
            return self.right(at, [self.values(source) for source in self.inputs_of(at)])
        return widened(self.first(self.known(at).array, self.stage_of(at).shape))

    @property
    def layers(self) -> int:
        """Layers that the hidden stages are of."""
        return len({layer for layer, _ in self.places if layer is not None})

    @property
    def count(self) -> int:
        """Tokens that are computed."""
        return len(self.run.tokens)

    @property
    def elements(self) -> int:
        """Elements of all stages on the way, and of the tensor."""
        return sum(self.known(at).array.size for at in self.span.hidden) + self.oracle.value.size

    def ask_at_most(self, tokens: int) -> bool:
        """Ask of the first so many tokens alone, where there are more; False where these were not recorded."""
        many = self.count > tokens
        self.ask(tokens if many else None)
        return not many or self.count == len(self.case.got)

    @property
    def expected(self) -> np.ndarray:
        """The right value of the tokens that are asked."""
        return self.first(self.oracle.value, self.oracle.stage.shape)

    def first(self, array: np.ndarray, shape: str) -> np.ndarray:
        """As much of it as belongs to the tokens that are asked."""
        if self.tokens is None:
            return array
        axes = shape.split()
        return array[tuple(slice(self.tokens if axis in _BY_TOKEN else None) for axis in axes[: array.ndim])]

    def right(self, at: Place, inputs: Arrays) -> np.ndarray:
        stage = self.stage_of(at)
        if stage.identity:
            return inputs[0]
        return self.of_taken(at, inputs, self.params(at), self.options_of(at))

    def kernel(self, at: Place) -> Taken | None:
        """What a stage's kernel takes its first input to; None where it computes with that."""
        return taken_at(self.run, at)

    def of_taken(self, at: Place, inputs: Arrays, params: Arrays, options: Mapping[str, Any]) -> np.ndarray:
        """What a stage gives of inputs, once its kernel has taken them to what it computes with."""
        stage, taken = self.stage_of(at), self.taken(at, inputs)
        value = widened(np.asarray(STAGES[stage.function](*taken, *params, **options)))
        kernel = self.kernel(at)
        rows = slice(self.start, self.start + value.shape[-1]) if stage.by_vocab else slice(None)
        if kernel is None:
            return value
        sums = kernel.sums(inputs[0], taken[0], joined(least_of(self.run, at, rows)))
        return value if sums is None else value + sums.extra

    def stage(self, at: Place) -> Stage:
        return self.oracle.stage if at == self.span.acting else self.path.at(at)

    def options(self, at: Place) -> Mapping[str, Any]:
        return self.oracle.options if at == self.span.acting else stage_options(self.config, self.path.at(at))

    def _params(self, at: Place) -> Arrays:
        stage = self.stage(at)
        if at == self.span.acting:
            found = self.oracle.arguments[len(stage.inputs) :]
        else:
            dtype = stored_dtype(self.path.activations)
            found = tuple(parameters(stage, given_at(self.run, at), weights_of(self.run), at[0], dtype))
        of_run = [name in RUN_PARAMS for name in stage.params]
        wide = sum(array.nbytes for array in found) < _MOST_WIDE
        return [
            array[: self.tokens] if own else array.astype(np.float64) if wide else array
            for array, own in zip(found, of_run, strict=True)
        ]

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """What was recorded of the tokens that are asked, and its weight."""
        got, weight = (self.first(array, self.oracle.stage.shape) for array in (self.case.got, self.weight))
        return got, weight

    def ask(self, tokens: int | None) -> None:
        if tokens != self.tokens:
            self.tokens = tokens
            self.params.cache_clear()
            self.values.cache_clear()

    # -- what is tried --------------------------------------------------------------------------------------------

    def functions(self, *classes: Class) -> Iterator[Hypothesis]:
        """Each other function of the catalogue: in all layers at once, then in each stage alone, the last one first."""
        for where, alike in self._everywhere():
            yield from self._functions(alike, where, classes)
        for at in (self.span.acting, *reversed(self.places)):
            yield from self._functions([at], self._where(at), classes)
        if Class.OTHER in classes:
            yield from self._exchanged()
            yield from self._masks()
            yield from self._moved_on()
            yield from self._dealt()

    def _everywhere(self) -> Iterator[tuple[str, list[Place]]]:
        """The stages of one name in all layers, or in all that slide and in all that do not."""
        everywhere: dict[str, dict[int | None, list[Place]]] = {}
        for at in (*self.places, self.span.acting):
            stage = self.stage(at)
            everywhere.setdefault(stage.name, {}).setdefault(stage.window, []).append(at)
        for name, kinds in everywhere.items():
            for window, alike in kinds.items():
                which = "" if len(kinds) == 1 else " that slides" if window else " that does not slide"
                if len(alike) > 1:
                    yield f"{name} of every layer{which}", alike

    def _dealt(self) -> Iterator[Hypothesis]:
        """Heads of keys and values dealt out in turn, in one layer and in all."""
        inside = {*self.places, self.span.acting}
        pairs = [pair for at in inside for pair in [tuple((at[0], name) for name in DEALT)] if at == pair[0]]
        pairs = sorted(pair for pair in pairs if inside.issuperset(pair))
        for alike in (pairs, *([pair] for pair in pairs)) if len(pairs) > 1 else (pairs,):
            functions: dict[Place, Function] = {
                at: functools.partial(self._way, DEALT[at[1]], Class.OTHER, at) for pair in alike for at in pair
            }
            if functions:
                where = "attention of every layer" if len(alike) > 1 else " and ".join(map(forward_key, functions))
                yield Hypothesis(where, " and ".join(DEALT.values()), Class.OTHER, functions)

    def _wrong_rows(self) -> np.ndarray:
        """Which tokens of the tensor are beyond its bound somewhere."""
        rows = np.abs(self.case.got - self.oracle.value) > self.oracle.bound
        return np.flatnonzero(rows.reshape(len(rows), -1).any(axis=1))

    def _masks(self) -> Iterator[Hypothesis]:
        """A sliding window, as many keys wide as there are right rows before the first wrong one; the key of the first
        wrong row hidden, as if it were padding."""
        wrong = self._wrong_rows()
        places = [at for at in (self.span.acting, *self.places) if self.stage(at).noise is Noise.SOFTMAX]
        if not len(wrong) or self.stage(self.span.acting).noise in (Noise.SOFTMAX, Noise.SCORES):
            return
        first = int(wrong[0])
        tried = {
            f"the mask shows the last {first} keys alone: a window": functools.partial(_in_window, first),
            f"the mask hides the key of token {first}, as if it were padding": functools.partial(_without_key, first),
        }
        every = [(where, alike) for where, alike in self._everywhere() if alike[0] in places]
        for where, alike in (*every, *((self._where(at), [at]) for at in places)):
            own = self.stage(alike[0]).window
            told = own is not None and abs(first - own) <= 1  # by the catalogue
            for said, function in list(tried.items())[1 if told or not first else 0 :]:
                yield Hypothesis(where, said, Class.OTHER, dict.fromkeys(alike, function))

    def _moved_on(self) -> Iterator[Hypothesis]:
        """Positions that go on with another number from the first wrong row on, as after a cache that was cut."""
        wrong = self._wrong_rows()
        for at in self.places if len(wrong) and wrong[0] else ():
            for by in (-1, 1) if at[1] == "rope_angle" else ():
                (positions,) = self.params(at)
                moved = positions + by * (np.arange(len(positions)) >= wrong[0])
                said = f"positions are {abs(by)} {'less' if by < 0 else 'more'} from token {wrong[0]} on"
                yield replace(self._with_params(at, self._where(at), said, [moved]), edits=None)

    def _exchanged(self) -> Iterator[Hypothesis]:
        """An elementwise stage after the recorded one, not before it."""
        acting = self.span.acting
        for at in self.span.missing:
            alone = len(self.stage(at).inputs) == 1 and not self.params(at) and not self.params(acting)
            if alone and not self.stage(at).identity and self.known(at).array.shape == self.oracle.value.shape:
                last = functools.partial(self._after, at, acting)
                said = f"{_IT}came after {self.stage(acting).name}, not before it"
                yield Hypothesis(self._where(at), said, Class.OTHER, {at: lambda x: x[0], acting: last})

    def _after(self, at: Place, acting: Place, inputs: Arrays) -> np.ndarray:
        return self.right(at, [self.right(acting, inputs)])

    def _where(self, at: Place) -> str:
        return "" if at == self.span.acting else forward_key(at)

    def _functions(self, places: Sequence[Place], where: str, classes: Sequence[Class]) -> Iterator[Hypothesis]:
        first = places[0]
        inputs = [self.given(at, {}) for at in self.sources(first)]
        right = self.given(first, {}) if first != self.span.acting else self.seen()[0]
        if self.stage(first).by_vocab or not inputs:
            return
        if inputs[0].shape == right.shape and Class.OTHER in classes:
            yield self._left_out(places, where)
        for way in ways_of(self._at(first, inputs, *classes), *classes):
            said = _LEFT_OUT if way.words in LEFT_OUT else way.words
            functions: dict[Place, Function] = {
                at: functools.partial(self._way, way.words, way.kind, at) for at in places
            }
            if len(places) == 1:
                functions = {first: self._known(self._as_stored(first, way), functions[first])}
            yield Hypothesis(where, said, way.kind, functions, usual=way.usual)

    def _known(self, value: np.ndarray, function: Function) -> Function:
        """`function`, of which the value is known as long as as many tokens are asked."""
        tokens = self.tokens
        return lambda inputs: value if tokens == self.tokens else function(inputs)

    def _left_out(self, places: Sequence[Place], where: str) -> Hypothesis:
        copied = dict.fromkeys(places, Edit(copied=True))
        return Hypothesis(where, _LEFT_OUT, Class.OTHER, dict.fromkeys(places, lambda x: x[0]), copied)

    def each_left_out(self) -> Iterator[Hypothesis]:
        """Each stage left out that gives what has its input's shape."""
        for at in self.places:
            inputs = self.sources(at)
            if inputs and self.given(inputs[0], {}).shape == self.values(at).shape:
                yield self._left_out([at], self._where(at))

    def _at(self, at: Place, inputs: Arrays, *classes: Class) -> At:
        """A stage of these inputs: without roundings inside it, but for ways that are known by them."""
        arguments = (*self.taken(at, inputs), *self.params(at))
        oracle = consult(self.stage(at), arguments, self.options(at), self.oracle.lambdas)
        inside = self.stage(at).dtype if Class.NARROWER in classes else "float64"
        return At(oracle, inside=inside, right=right_value)

    def _way(self, words: str, kind: Class, at: Place, inputs: Arrays) -> np.ndarray | None:
        ways = ways_of(self._at(at, inputs, kind), kind, only=words)
        return next((self._as_stored(at, way) for way in ways), None)

    def _as_stored(self, at: Place, way: CatalogueWay) -> np.ndarray:
        """Of a hidden stage whose way is known by its roundings, with the last one too."""
        if way.kind is not Class.NARROWER or at == self.span.acting:
            return way.value
        return round_once(way.value, stored_dtype(self.stage(at).dtype)).astype(np.float64)

    def other_weights(self) -> Iterator[Hypothesis]:
        """Weights of the neighbouring layers, and those of one shape that a loader may mix up."""
        dtype, weights = stored_dtype(self.path.activations), weights_of(self.run)
        for at in (self.span.acting, *reversed(self.places)):
            stage, where = self.stage(at), self._where(at)
            if at[0] is None or not stage.params:
                continue
            for layer in (at[0] - 1, at[0] + 1):
                if 0 <= layer < self.config.num_hidden_layers:
                    said = f"the weights of layer {layer} in the place of layer {at[0]}'s"
                    params = parameters(stage, given_at(self.run, at), weights, layer, dtype)
                    yield self._with_params(at, where, said, params)
                    yield from self._each_alone(at, layer, params)
            if stage.noise is Noise.PRODUCT:
                negated = [-param for param in self.params(at)]
                yield self._with_params(at, where, "its weights have the other sign", negated)
            for one, other in (*ALIKE, *(pair[::-1] for pair in ALIKE)):
                if stage.params == (one,):
                    params = [weights.read(parameter_name(stage, other, at[0])).astype(dtype)]
                    said = f"{other} in the place of {one}"
                    yield self._with_params(at, where, said, params)

    def _each_alone(self, at: Place, layer: int, others: Arrays) -> Iterator[Hypothesis]:
        """Of a stage with several weights, each of another layer."""
        names = self.stage(at).params
        for number, name in enumerate(names if len(names) > 1 else ()):
            params = list(self.params(at))
            params[number] = others[number]
            yield self._with_params(at, self._where(at), f"layer {layer}'s {name} in the place of its own", params)

    def _with_params(self, at: Place, where: str, said: str, params: Arrays) -> Hypothesis:
        options = self.options(at)
        instead = {at: lambda x: self.of_taken(at, x, params, options)}
        return Hypothesis(where, said, Class.OTHER, instead, {at: Edit(params=params)})

    def numbers(self) -> Iterator[Number]:
        """A factor of each stage, the eps of each norm, theta, and what RoPE, softmax and SiLU may be given."""
        places = (self.span.acting, *reversed(self.places))
        norms = [at for at in places if self.stage(at).noise is Noise.RMS_NORM]
        if len({at[0] for at in norms}) > 1:
            yield self._option(norms, "eps", "every norm", _EPS)
        scores = [at for at in places if self.stage(at).noise is Noise.SCORES]
        if len(scores) > 1:
            sizes = (self.config.hidden_size, self.config.num_attention_heads, 1)
            scales = [size**-0.5 for size in sizes]
            yield self._option(scores, "scaling", "attn_scores of every layer", scales)
        tables = [at for at in places if at[1] == "inv_freq"]
        if tables:
            yield self._option(tables, "rope_theta", "RoPE", THETAS)
        yield from self._of_tables([at for at in places if at[1] in TABLES])
        for at in places:
            stage = self.stage(at)
            if at in norms:
                yield self._option([at], "eps", self._where(at), _EPS)
            of_layer = stage.inputs and not stage.by_vocab and stage.scope is not Scope.MODEL
            recovered = at == self.span.acting and self.way().cell is not None  # its factor may be of logits
            if of_layer or stage.name == "embedding" or recovered:
                of = functools.partial(self._times, at)
                edits = functools.partial(self._rescaled, at) if stage.noise is Noise.SCORES else None
                starts = (1.0, 0.5, 2.0) if stage.name == "embedding" else (1.0,)  # a norm after it hides small ones
                yield Number(self._where(at), _FACTOR, of, starts, 1.0, edits)
            for said, text, change in _OF_SCORES if stage.noise is Noise.SCORES else ():
                of = functools.partial(self._then, at, change)
                yield Number(self._where(at), said, of, (1e-3,), 0.0, text=text)
            for said, start, right, function in _INSIDE.get(
                stage.function if stage.noise is Noise.EXACT else stage.noise, ()
            ):
                inside = functools.partial(_inside, at, function)
                yield Number(self._where(at), said, inside, (start,), right)

    def _of_tables(self, tables: Sequence[Place]) -> Iterator[Number]:
        """A factor of cos and sin, together and alone, and of the angles."""
        waves = [at for at in tables if at[1] in ("rope_cos", "rope_sin")]
        for alike in (waves, *([at] for at in waves)) if len(waves) > 1 else (waves,):
            if alike:
                of = functools.partial(self._all_times, alike)
                yield Number(" and ".join(map(forward_key, alike)), _FACTOR, of, (1.0,), 1.0)
        for at in tables:
            if at[1] == "rope_angle":
                of = functools.partial(self._times, at)
                yield Number(self._where(at), _FACTOR, of, _OF_ANGLES, 1.0)

    def _all_times(self, places: Sequence[Place], factor: float) -> Mapping[Place, Function]:
        return {at: function for place in places for at, function in self._times(place, factor).items()}

    def _rescaled(self, at: Place, factor: float) -> Edits:
        return {at: Edit(options={"scaling": float(self.options(at)["scaling"]) * factor})}

    def _times(self, at: Place, factor: float) -> Mapping[Place, Function]:
        return {at: lambda x: self.right(at, x) * factor}

    def _then(self, at: Place, change: Callable[[np.ndarray, float], np.ndarray], x: float) -> Mapping[Place, Function]:
        return {at: lambda inputs: change(self.right(at, inputs), x)}

    def _option(self, places: Sequence[Place], name: str, where: str, starts: Sequence[float]) -> Number:
        own = float(self.options(places[0])[name])

        def function(at: Place, number: float, inputs: Arrays) -> np.ndarray:
            options = {**self.options(at), name: number}
            return widened(np.asarray(STAGES[self.stage(at).function](*inputs, *self.params(at), **options)))

        def of(number: float) -> Mapping[Place, Function]:
            return {at: functools.partial(function, at, number) for at in places}

        def edits(number: float) -> Edits:
            return dict.fromkeys(places, Edit(options={name: number}))

        said = f"as if {name} were {{}}, not {own:g}"
        of_config = len(places) > 1 or name == "rope_theta"
        return Number(where, said, of, [x for x in starts if x != own], own, edits, of_config)

    # -- weights that may be wrong ----------------------------------------------------------------------------------

    def changes(self, instead: Mapping[Place, Function]) -> dict[Place, np.ndarray]:
        """What each of these stages differs by, of the right inputs."""
        found = {}
        for at, function in instead.items():
            inputs = [self.given(source, {}) for source in self.inputs_of(at)]
            value = function(inputs)
            found[at] = np.full(1, np.nan) if value is None else value - self.right_value_of(at)
        return found

    def right_value_of(self, at: Place) -> np.ndarray:
        return self.expected if at == self.span.acting else self.values(at)

    def slopes(self, number: Number) -> dict[Place, np.ndarray]:
        """What each of a number's stages moves by with it."""
        x = number.right
        step = 1e-4 * (abs(x) or 1.0)
        return {at: change / step for at, change in self.changes(number.of(x + step)).items()}

    def weight_at(self, one: Element | Line, change: float, room: float = 0.0) -> Hypothesis:
        """A weight so changed; an element by `change`, give or take `room`."""
        if isinstance(one, Line):
            return self.with_line(one)
        weight = self.params(one.at)[one.param]
        old, others = float(weight[one.index]), beside(weight, one.index)
        room = max(room, CLEAR * abs(change))
        new, text = become(
            self.named_element(one), old, old + change - room, old + change + room, others, stored_as(weight)
        )
        return self.with_element(one, new, text)

    def with_line(self, line: Line) -> Hypothesis:
        params = list(self.params(line.at))
        params[line.param] = line.changed(params[line.param])
        said = line.said(self.stage(line.at).params[line.param], self._first_row(line.at) if line.axis == 0 else 0)
        return self._with_params(line.at, self._where(line.at), said, params)

    def with_element(self, one: Element, new: float, text: str) -> Hypothesis:
        params = list(self.params(one.at))
        params[one.param] = params[one.param].copy()
        params[one.param][one.index] = new
        return replace(self._with_params(one.at, self._where(one.at), text, params), about=self.named_element(one))

    def named_element(self, one: Element) -> str:
        index = (one.index[0] + self._first_row(one.at), *one.index[1:])
        return f"{self.stage(one.at).params[one.param]}[{', '.join(map(str, index))}]"

    def _first_row(self, at: Place) -> int:
        """Which row of the whole weights a stage's first one is."""
        return self.start if self.stage(at).by_vocab else 0


def in_words(alike: Sequence[Hypothesis]) -> str:
    places = " or ".join(dict.fromkeys(one.where for one in alike if one.where))
    said = alike[0].said
    if said.startswith(_IT):
        return f"as if {places or 'it'} {said.removeprefix(_IT)}"
    return f"in {places}, not recorded: {said}" if places else said


def _in_window(width: int, inputs: Arrays) -> np.ndarray:
    queries, keys = np.indices(inputs[0].shape[-2:])
    return attn_softmax(np.where(keys > queries - width, inputs[0], -np.inf))


def _without_key(key: int, inputs: Arrays) -> np.ndarray:
    """A query that sees no other one sees it all the same."""
    queries, keys = np.indices(inputs[0].shape[-2:])
    return attn_softmax(np.where((keys == key) & (queries > 0), -np.inf, inputs[0]))


def _biased(scores: np.ndarray, slope: float) -> np.ndarray:
    queries, keys = np.indices(scores.shape[-2:])
    return scores - slope * np.maximum(queries - keys, 0)


def _capped(scores: np.ndarray, x: float) -> np.ndarray:
    """c tanh(scores / c) of x = c^-2, of which it is a smooth function about 0, where nothing is cut."""
    root = np.sqrt(x)
    return np.tanh(scores * root) / root if x > 0 else scores - x * scores**3 / 3


def _sloped(inputs: Arrays, slope: float) -> np.ndarray:
    return inputs[0] / (1 + np.exp(-slope * inputs[0]))


def _scaled(inputs: Arrays, factor: float) -> np.ndarray:
    return attn_softmax(inputs[0] * factor)


def _with_more(inputs: Arrays, more: float) -> np.ndarray:
    """Softmax whose sum of exponentials, the largest being 1, has `more` in it."""
    p = attn_softmax(inputs[0])
    largest = p.max(axis=-1, keepdims=True)
    return p / (1 + more * largest)


# What scores may be made into: in words, how the number is written, and the function, which of 0 changes nothing.
_OF_SCORES: tuple[tuple[str, Callable[[float], str], Callable[[np.ndarray, float], np.ndarray]], ...] = (
    ("capped softly at {}", lambda x: f"{max(x, 1e-300) ** -0.5:.4g}", _capped),
    ("each score is {} less for each token between", "{:.9g}".format, _biased),
)
_FACTOR = "every value is {} times what it should be"
_OF_ANGLES = (1.0, 0.5, 2.0, np.pi / 180, 180 / np.pi)
# What a stage of a kind, or an exact function, may be given: in words, from which number it is sought, the right one,
# and the function.
_ADDED = (
    ("what the block added is {} times what it should be", 1.0, 1.0, lambda x, factor: x[0] + factor * x[1]),
    ("what it was added to is {} times what it should be", 1.0, 1.0, lambda x, factor: factor * x[0] + x[1]),
)
_INSIDE: Mapping[str, Sequence[tuple[str, float, float, Of]]] = MappingProxyType(
    {
        Noise.SILU: [("as if it were x sigmoid({} x)", 1.0, 1.0, _sloped)],
        Noise.SOFTMAX: [
            ("as if the sum of exponentials had {} more in it", 1e-2, 0.0, _with_more),
            ("as if the scores were {} times what they should be", 1.0, 1.0, _scaled),
        ],
        "post_attn_residual": _ADDED,
        "post_ffn_residual": _ADDED,
    }
)


def _inside(at: Place, function: Of, x: float) -> Mapping[Place, Function]:
    return {at: lambda inputs: function(inputs, x)}
