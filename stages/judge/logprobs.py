"""`svf logprobs`: the logprobs of one or two systems against the model's in float64, and what their difference is.

Each side is judged by itself, through the whole forward from its tokens; only then the difference of both is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, SvfError, shown
from stages.files.forward_dump import Place
from stages.files.logprobs import Line, LogprobFile, read_logprobs
from stages.files.source import ModelSource, open_model
from stages.judge import logprob_causes as causes
from stages.judge.logprob_causes import Cause, Sample, declared
from stages.judge.recorded_run import ForwardRun
from stages.judge.spans import values_of
from stages.judge.wording import number, times
from stages.oracle.bounds import LAMBDA, RMS_COUNT, RMS_THROUGH
from stages.oracle.logprobs import PLAIN, Logits, Logprobs, Processing, logits_of, logprobs_of
from stages.oracle.span import LEAST_SEEN, SURELY
from stages.oracle.spread import Spread
from stages.oracle.verdict import Verdict
from stages.progress import Report
from stages.run.forward import vocabulary_plan
from stages.spec.config import LM_HEAD
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import forward_pipeline

EXIT_CODES = {"agree": 0, "sound": 0, "diverged": 1, "faulty": 1, "incomplete": 5}
# Logits that are held at a time: 64 MB of float64, of which some ten arrays are made.
_BLOCK = 1 << 23
# And in all, of those that causes ask for again: 256 MB with their variances.
_HELD = 1 << 24
# Tokens on which a cause is tried before it is on all.
_FEW = 64
# Lines of which, where no cause explains all that fail, each is asked alone.
_ALONE = 8
# Causes that explain a side about equally well, in units of twice the logarithm of the likelihood, are all named.
_EQUAL = 20.0
# No token counts for more in the likelihood, in squares of its deviation: its choice may have been another.
_MOST_UNLIKELY = 25.0
_APPLIED = " had been applied"
# What errs in RMS by no more than its deviations is explained as well as it can be: no more causes are tried.
_TYPICAL = 1.0
# Median of error / deviation of right runs in 16 bits: 0.08 was the least seen. Of a mistake in a few tokens it is 0.
_LEAST_TYPICAL = 0.03
# Standard errors at which what a narrower format does to the weights is seen in logprobs, or is not.
_SEEN = 4.0


@dataclass(frozen=True)
class LogprobsCommand:
    """What `svf logprobs` was asked."""

    a: Path
    b: Path | None
    model: str
    a_dtype: str = "model"
    b_dtype: str = "model"
    other_model: str | None = None
    top: int = 5


@dataclass
class _Unrecorded:
    """A forward of which nothing was recorded."""

    label: str = "logprobs"
    facts: dict[str, str] = field(default_factory=dict)
    places: dict[Place, str] = field(default_factory=dict)

    def read(self, place: Place) -> np.ndarray:
        raise KeyError(place)

    def shape(self, place: Place) -> list[int]:
        raise KeyError(place)

    def sha256(self, place: Place) -> str:
        raise KeyError(place)

    def close(self) -> None:
        """Nothing is open."""


class Forward:
    """Float64 final norms of a model's sequences, in a run of one dtype, each computed once; and logits of them."""

    def __init__(self, name: str, checkpoint: ModelSource, dtype: str, progress: Report):
        self.name, self.checkpoint, self.progress = name, checkpoint, progress
        self.path = forward_pipeline(checkpoint.config, dtype)
        self.dtype = stored_dtype(self.path.activations)
        self._kept: dict[bytes, tuple[np.ndarray, Spread]] = {}
        self._logits: dict[tuple[bytes, bytes], Logits] = {}
        self.vocab = checkpoint.config.vocab_size

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for start, stop in vocabulary_plan(self.vocab):
            yield slice(start, stop), self.checkpoint.read(LM_HEAD, start, stop).astype(self.dtype)

    def prepare(self, lines: Sequence[Line]) -> None:
        """Compute what is not there yet."""
        missing = {line.tokens.tobytes(): line for line in lines if line.tokens.tobytes() not in self._kept}
        for done, (key, line) in enumerate(missing.items()):
            self.progress(f"float64 forward of {len(missing)} sequences in {self.dtype.name}", done / len(missing))
            run = ForwardRun(
                _Unrecorded(),
                self.checkpoint.config,
                self.path,
                line.tokens.tolist(),
                "all",
                self.checkpoint,
                self.checkpoint,
            )
            (value,) = values_of(run, [(None, "final_norm")])
            self._kept[key] = value.array, value.spread

    def logits(self, line: Line, rows: np.ndarray) -> Logits:
        """Of some positions of a sequence; kept for the causes that ask for the same ones."""
        key = line.tokens.tobytes(), rows.tobytes()
        if key in self._logits:
            return self._logits[key]
        array, spread = self._kept[key[0]]
        own, row = (e[rows] if isinstance(e, np.ndarray) and e.ndim else e for e in (spread.own, spread.row))
        found = logits_of(array[rows], Spread(own, row), self.chunks, self.dtype, LAMBDA)
        if sum(one.values.size for one in self._logits.values()) + found.values.size > _HELD:
            self._logits.clear()
        self._logits[key] = found
        return found


@dataclass(frozen=True)
class Tokens:
    """The compared tokens of a side, flat: of each its line and its place in the line's sequence."""

    lines: tuple[Line, ...]
    line: np.ndarray
    place: np.ndarray
    observed: np.ndarray

    def part(self, kept: np.ndarray) -> Tokens:
        return Tokens(self.lines, self.line[kept], self.place[kept], self.observed[kept])

    def by_line(self) -> Iterator[tuple[Line, np.ndarray]]:
        """Each line that has a token here, and where its tokens stand."""
        for index in np.unique(self.line):
            yield self.lines[index], np.flatnonzero(self.line == index)

    def without(self, count: int) -> Tokens:
        """The same tokens where the first ones of every sequence are not there."""
        if not count:
            return self
        lines = tuple(replace(line, tokens=line.tokens[count:], start=line.start - count) for line in self.lines)
        return Tokens(lines, self.line, self.place - count, self.observed)

    @property
    def used(self) -> list[Line]:
        return [self.lines[i] for i in np.unique(self.line)]

    @property
    def ids(self) -> np.ndarray:
        return np.array([self.lines[i].tokens[p] for i, p in zip(self.line, self.place, strict=True)], np.int64)


def expected(forward: Forward, tokens: Tokens, how: causes.How, stored: str | None) -> Logprobs:
    """The float64 logprobs of tokens, as processed; NaN where the sequence has no such row or token.

    `stored`: the 16-bit format that holds all of them, which a run in 16 bits may have rounded them to.
    """
    found = np.full((5, len(tokens.place)), np.nan)
    for line, at in tokens.by_line():
        way = how(line)
        if forward.dtype.itemsize < 4:
            way = replace(way, stored=stored)
        rows, targets = tokens.place[at] - 1 + way.row, tokens.place[at] + way.token
        there = (rows >= 0) & (rows < len(line.tokens)) & (targets < len(line.tokens)) & (targets >= 1)
        at, rows, targets = at[there], rows[there], line.tokens[targets[there]]
        size = max(1, _BLOCK // forward.vocab)
        for start in range(0, len(at), size):
            part = slice(start, start + size)
            made = logprobs_of(forward.logits(line, rows[part]), targets[part], way)
            found[:, at[part]] = made.value, made.low, made.high, made.deviation, made.own
    return Logprobs(*found)


@dataclass(frozen=True)
class Fit:
    """Observed logprobs against expected ones: each error over its bound, and all of them in deviations."""

    error: np.ndarray
    ratio: np.ndarray
    rms: float
    median: float
    likelihood: float

    @property
    def worst(self) -> float:
        return float(np.max(self.ratio, initial=0.0))

    @property
    def systematic(self) -> bool:
        return len(self.ratio) >= RMS_COUNT and self.rms > RMS_THROUGH

    @property
    def passes(self) -> bool:
        return self.worst <= 1 and not self.systematic


def fit(tokens: Tokens, made: Logprobs, step: float) -> Fit:
    """`step`: to which the logprobs were written."""
    there = ~np.isnan(made.value)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(there, made.error(tokens.observed), 0.0)
        ratio = np.where(there, error / (made.bound + step / 2), 0.0)
        width = np.square(made.deviation) + (np.square(made.high - made.low) + step * step) / 12
        square = np.square(error) / width
        # From the likeliest choice: what a choice of others may explain is not what tells two causes apart.
        likely = np.square(made.deviation) + step * step / 12
        off = np.minimum(np.square(tokens.observed - made.value) / likely, _MOST_UNLIKELY)
    counted, count = square[there & np.isfinite(width)], max(int(there.sum()), 1)
    median = float(np.sqrt(np.median(counted))) if len(counted) else 0.0
    likelihood = float(np.sum(off[there] + np.log(likely[there])))
    return Fit(error, np.nan_to_num(ratio, nan=np.inf), float(np.sqrt(np.sum(counted) / count)), median, likelihood)


@dataclass(frozen=True)
class _Tried:
    """A cause that explains what it was tried on: twice its negative log-likelihood, and what it gives."""

    cost: float
    cause: Cause
    made: Logprobs
    fit: Fit


@dataclass
class Side:
    """One system: what it gave, what the model gives for it, and what explains the difference."""

    letter: str
    file: LogprobFile
    tokens: Tokens
    forward: Forward
    made: Logprobs
    fit: Fit
    verdict: Verdict = Verdict.ROUNDING
    cause: Cause | None = None
    equal: tuple[Cause, ...] = ()
    hint: str | None = None
    scope: list[int] | None = None  # lines that a cause is of, where not of all
    explained: Logprobs | None = None  # as processed by the cause, of its lines

    @property
    def final(self) -> np.ndarray:
        """What the side's logprobs should be, given what was done to them."""
        return self.made.value if self.explained is None else self.explained.value

    @property
    def deviation(self) -> float:
        """What right programs differ by, in RMS."""
        return float(np.sqrt(np.mean(np.square(self.made.deviation))))

    @property
    def floor(self) -> float:
        """The least error of all logprobs, in RMS, that is seen; of few tokens one of them must be beyond its bound."""
        if len(self.tokens.place) < RMS_COUNT:
            return float(np.sqrt(np.mean(np.square(_bounds(self)))))
        return RMS_THROUGH * math.hypot(self.deviation, self.file.step / math.sqrt(12))


def judge(command: LogprobsCommand, progress: Report) -> dict[str, Any]:
    """The `svf.logprobs/1` document."""
    files = [read_logprobs(path) for path in (command.a, command.b) if path is not None]
    with ExitStack() as stack, np.errstate(all="ignore"):  # a file may hold numbers of any size
        bench = _Bench(command, stack, progress)
        _check(files, bench.checkpoint)
        pairs, unpaired = _paired(files)
        sides = [
            bench.side(letter, file, lines, dtype)
            for letter, file, lines, dtype in zip("ab", files, pairs, (command.a_dtype, command.b_dtype), strict=False)
        ]
        for side in sides:
            others = [line for other in sides if other is not side for line in other.tokens.lines]
            bench.explain(side, others)
        return _document(command, sides, unpaired)


def _check(files: Sequence[LogprobFile], checkpoint: ModelSource) -> None:
    """`InputError` naming the line whose tokens the model cannot have."""
    vocab = checkpoint.config.vocab_size
    for file in files:
        for line in file.lines:
            if (bad := np.flatnonzero(line.tokens >= vocab)).size:
                raise InputError(
                    f"{file.path}: line {line.number}: token {int(line.tokens[bad[0]])} at position {int(bad[0])}; "
                    f"the vocabulary has {vocab} ids. Another model's tokens?"
                )
            try:
                checkpoint.config.check_length(len(line.tokens))
            except SvfError as error:
                raise type(error)(f"{file.path}: line {line.number}: {error}") from None


def _paired(files: Sequence[LogprobFile]) -> tuple[list[tuple[Line, ...]], int]:
    """The lines that all files have, in the first one's order; and how many have no partner.

    `InputError` where none has one, naming how the first two lines differ.
    """
    if len(files) == 1:
        return [files[0].lines], 0
    waiting: dict[tuple[int, bytes], list[Line]] = {}
    for line in files[1].lines:
        waiting.setdefault(line.key, []).append(line)
    pairs = [(line, waiting[line.key].pop(0)) for line in files[0].lines if waiting.get(line.key)]
    if not pairs:
        a, b = files[0].lines[0], files[1].lines[0]
        raise InputError(f"{files[1].path}: no sequence of {files[0].path} is in it: {_differ(a, b)}")
    unpaired = len(files[0].lines) + len(files[1].lines) - 2 * len(pairs)
    return [tuple(pair[i] for pair in pairs) for i in (0, 1)], unpaired


def _differ(a: Line, b: Line) -> str:
    if a.start != b.start:
        return f"of the first lines one begins to be sampled at {a.start}, the other at {b.start}"
    size = min(len(a.tokens), len(b.tokens))
    apart = np.flatnonzero(a.tokens[:size] != b.tokens[:size])
    if apart.size:
        at = int(apart[0])
        return f"of the first lines position {at} is token {int(a.tokens[at])} and {int(b.tokens[at])}"
    return f"the first lines have {len(a.tokens)} and {len(b.tokens)} tokens"


class _Bench:
    """The forwards that a comparison asks for, each opened once."""

    def __init__(self, command: LogprobsCommand, stack: ExitStack, progress: Report):
        self.command, self.stack, self.progress = command, stack, progress
        self._models: dict[str, ModelSource] = {}
        self._forwards: dict[tuple[str, str], Forward] = {}
        self.checkpoint = self._model(command.model)

    def _model(self, name: str) -> ModelSource:
        if name not in self._models:
            found = self.stack.enter_context(open_model(name))
            found.check()
            self._models[name] = found
        return self._models[name]

    def forward(self, name: str, dtype: str) -> Forward:
        checkpoint = self._model(name)
        asked = checkpoint.config.dtype if dtype == "model" else dtype
        if (name, asked) not in self._forwards:
            self._forwards[name, asked] = Forward(name, checkpoint, dtype, self.progress)
        return self._forwards[name, asked]

    def side(self, letter: str, file: LogprobFile, lines: tuple[Line, ...], dtype: str) -> Side:
        forward = self.forward(self.command.model, dtype)
        tokens = _tokens(lines)
        if not len(tokens.place):
            raise InputError(f"{file.path}: no logprob in the lines that both files have")
        forward.prepare(lines)
        self.progress(f"judging {letter}", 0.5)
        made = expected(forward, tokens, declared, file.stored)
        return Side(letter, file, tokens, forward, made, fit(tokens, made, file.step))

    def explain(self, side: Side, others: Sequence[Line]) -> None:
        """The verdict on a side, and the causes that explain what fails."""
        if side.fit.passes:
            side.hint = _blind(side)
            side.verdict = Verdict.UNJUDGED if side.hint else Verdict.ROUNDING
            return
        beyond = side.fit.ratio > 1
        if beyond.any() and not side.tokens.observed[beyond].any() and not beyond.all():
            side.verdict, side.hint = Verdict.BUG, _zeros(side, beyond)
            return
        everything = np.ones(len(side.tokens.place), bool)
        failing = np.isin(side.tokens.line, np.unique(side.tokens.line[beyond]))
        some = failing if failing.any() and not failing.all() else None
        if self._named(side, everything, others) or (some is not None and self._named(side, some, others)):
            return
        if self._lines_alone(side, others) or self._tokens_alone(side) or self._of_another_forward(side):
            return
        side.verdict = Verdict.BUG if side.fit.worst > SURELY else Verdict.SUSPECT
        side.hint = _rest(side)

    def _named(self, side: Side, kept: np.ndarray, others: Sequence[Line]) -> bool:
        """Whether a cause explains these tokens of a side; it is told."""
        found = self._causes(side, kept, others)
        if not found:
            return False
        best, made = found[0]
        side.cause, side.equal = best, tuple(cause for cause, _ in found[1:])
        side.verdict = Verdict.PRECISION if best.narrower else Verdict.BUG
        side.hint = " or ".join(cause.words for cause, _ in found)
        side.explained = _overlaid(side.explained or side.made, made, kept)
        if not kept.all():
            side.scope = sorted({*(side.scope or []), *(side.tokens.lines[i].number for i in side.tokens.line[kept])})
            side.hint = f"{_lines(side.scope)}: {side.hint}"
        return True

    def _causes(self, side: Side, kept: np.ndarray, others: Sequence[Line]) -> list[tuple[Cause, Logprobs]]:
        """The best cause of those that bring every one of these tokens back, and those that do so about as well."""
        lines = [side.tokens.lines[i] for i in np.unique(side.tokens.line[kept])]
        sample = _sample(side, kept)
        first = causes.simple(lines, others, side.forward.dtype.name, side.file.stored) + causes.fitted(sample)
        found = self._tried(side, kept, [*first, *self._of_other_model(lines)])
        if not found or found[0].fit.rms > _TYPICAL or side.forward.dtype.itemsize < 4:
            temperatures = {declared(line).temperature for line in (*lines, *others)}
            found += self._tried(side, kept, causes.joined(sample, temperatures))
        found.sort(key=lambda one: one.cost)
        equal = [one for one in found if one.cost - found[0].cost <= _EQUAL]
        # Of one kind that with the rounder numbers.
        kinds: dict[str, _Tried] = {}
        for one in sorted(equal, key=lambda one: one.cause.digits):
            kinds.setdefault(one.cause.kind, one)
        told: list[_Tried] = []
        for one in sorted(kinds.values(), key=lambda one: one.cost):
            if not any(_adds_a_step(one.cause, more.cause) for more in told):
                told.append(one)
        return [(one.cause, one.made) for one in told]

    def _of_other_model(self, lines: Sequence[Line]) -> list[Cause]:
        name = self.command.other_model
        if name is None:
            return []
        words = f"the weights of {shown(name)}"
        found = [Cause(words, declared, model=name)]
        if any(declared(line) != PLAIN for line in lines):
            found.append(Cause(f"{words}, and nothing applied to the logits", lambda _line: PLAIN, model=name))
        return found

    def _tried(self, side: Side, kept: np.ndarray, some: Sequence[Cause]) -> list[_Tried]:
        """Those of some causes that bring every kept token back, the best first."""
        tokens, step, found = side.tokens.part(kept), side.file.step, []
        for done, cause in enumerate(some):
            self.progress(f"{side.letter}: {cause.words}?", done / len(some))
            forward = self.forward(cause.model or side.forward.name, cause.dtype or side.forward.dtype.name)
            given = tokens.without(cause.left_out)
            forward.prepare(given.used)
            few = _even(len(tokens.place), _FEW)
            if not fit(tokens.part(few), expected(forward, given.part(few), cause.how, side.file.stored), step).passes:
                continue
            made = expected(forward, given, cause.how, side.file.stored)
            got = fit(tokens, made, step)
            there = int(np.sum(~np.isnan(made.value)))
            if got.passes and there > cause.digits:
                # What a shift does not reach, at the ends, counts as the others do.
                cost = got.likelihood * len(tokens.place) / there + 2 * math.log(10) * cause.digits
                found.append(_Tried(cost, cause, made, got))
        return sorted(found, key=lambda one: one.cost)

    def _of_another_forward(self, side: Side) -> bool:
        """Whether a prompt without its first token explains a side, or fewer bits from the first stage on."""
        everything = np.ones(len(side.tokens.place), bool)
        own = side.forward.dtype.name
        narrower = {"float32": ("float16", "bfloat16"), "float16": ("bfloat16",)}.get(own, ())
        some = [Cause(f"as if computed in {name}, not {own}", declared, narrower=True, dtype=name) for name in narrower]
        if all(line.start > 1 for line in side.tokens.lines):
            some.append(Cause("as if the first token of every prompt had been left out", declared, left_out=1))
        for one in self._tried(side, everything, some):
            sure = not one.cause.narrower or _leans(side, one.made)
            if sure or _typical(one.fit):
                side.cause, side.explained, side.hint = one.cause, one.made, one.cause.words
                side.verdict = Verdict.PRECISION if one.cause.narrower else Verdict.BUG
                if not sure:
                    side.verdict = Verdict.SUSPECT
                    side.hint = f"{one.cause.words}, or of weights that differ by as little (a stale step?)"
                return True
        return False

    def _lines_alone(self, side: Side, others: Sequence[Line]) -> bool:
        """Whether each of a few failing lines has a cause of its own."""
        failing = np.unique(side.tokens.line[side.fit.ratio > 1])
        if not 1 < len(failing) <= _ALONE:
            return False
        said: dict[str, list[int]] = {}
        explained = side.made
        for index in failing:
            kept = side.tokens.line == index
            found = self._causes(side, kept, others)
            if not found:
                return False
            explained = _overlaid(explained, found[0][1], kept)
            said.setdefault(" or ".join(c.words for c, _ in found), []).append(side.tokens.lines[index].number)
        side.explained, side.verdict = explained, Verdict.BUG
        side.scope = sorted(n for numbers in said.values() for n in numbers)
        side.hint = "; ".join(f"{_lines(numbers)}: {words}" for words, numbers in said.items())
        return True

    def _tokens_alone(self, side: Side) -> bool:
        """Whether each of a few failing tokens has the logprob of another token at its place."""
        failing = np.flatnonzero(side.fit.ratio > 1)
        if not 0 < len(failing) <= _ALONE or (side.fit.systematic and len(failing) == len(side.fit.ratio)):
            return False
        said = []
        for at in failing:
            one = side.tokens.part(np.array([at]))
            other = _other_token(side, one)
            if other is None:
                return False
            line = one.lines[one.line[0]]
            said.append(f"line {line.number}, position {one.place[0]}: the logprob of token {other}, not {one.ids[0]}")
        side.verdict, side.hint = Verdict.BUG, "; ".join(said)
        return True


def _tokens(lines: tuple[Line, ...]) -> Tokens:
    kept = [np.flatnonzero(~np.isnan(line.logprobs)) for line in lines]
    return Tokens(
        lines,
        np.repeat(np.arange(len(lines)), [len(k) for k in kept]),
        np.concatenate([line.start + k for line, k in zip(lines, kept, strict=True)]),
        np.concatenate([line.logprobs[k] for line, k in zip(lines, kept, strict=True)]),
    )


def _adds_a_step(cause: Cause, likelier: Cause) -> bool:
    """Whether a cause is a likelier one and a step more, which adds nothing; what was found to be applied is a step
    beside nothing at all."""
    if likelier.words == causes.NOTHING:
        return cause.digits > 0 and cause.words.endswith(_APPLIED)
    return cause.words.startswith(f"{likelier.words.removesuffix(_APPLIED)} and ")


def _typical(found: Fit) -> bool:
    """Whether most tokens err as in a run of that format; not one alone, nor all much less."""
    return found.median > _LEAST_TYPICAL


def _leans(side: Side, made: Logprobs) -> bool:
    """Whether a side's errors show what a narrower format does to the weights: nothing else would."""
    moved = made.value - side.made.value
    error = side.tokens.observed - side.made.value
    weight = 1 / np.square(made.deviation)
    power = float(np.sum(weight * moved * moved))
    if power <= 0:
        return False
    share = float(np.sum(weight * moved * error)) / power
    left = error - share * moved
    deviation = math.sqrt(float(np.sum(np.square(weight * moved * left)))) / power
    return share > _SEEN * deviation and abs(share - 1) < _SEEN * deviation


def _even(count: int, wanted: int) -> np.ndarray:
    """Places of so many of `count` things, evenly."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int))


def _sample(side: Side, kept: np.ndarray) -> Sample:
    """As many of these tokens as may be held, evenly, with their logits."""
    at = np.flatnonzero(kept)
    count = min(len(at), max(8, _BLOCK // (2 * side.forward.vocab)))
    at = at[_even(len(at), count)]
    tokens = side.tokens.part(at)
    logits = np.empty((len(at), side.forward.vocab))
    for line, where in tokens.by_line():
        logits[where] = side.forward.logits(line, tokens.place[where] - 1).values
    return Sample(
        logits, tokens.ids, tokens.observed, expected(side.forward, tokens, lambda _line: PLAIN, side.file.stored)
    )


def _overlaid(under: Logprobs, over: Logprobs, kept: np.ndarray) -> Logprobs:
    """`over` where there is a value of it, in the place of the `kept` ones."""
    found = [array.copy() for array in _fields(under)]
    there = np.flatnonzero(kept)[~np.isnan(over.value)]
    for array, new in zip(found, _fields(over), strict=True):
        array[there] = new[~np.isnan(over.value)]
    return Logprobs(*found)


def _fields(found: Logprobs) -> tuple[np.ndarray, ...]:
    return found.value, found.low, found.high, found.deviation, found.own


def _blind(side: Side) -> str | None:
    """Why nothing can be told of a side that passes: any logprobs would; None where a wrong function would not."""
    contrast, moved = _contrast(side), RMS_THROUGH * side.deviation
    if not contrast:
        return "nothing to tell: the logits of a row are all the same"
    if moved <= LEAST_SEEN * contrast:
        return None
    return f"too long to tell: rounding alone may move the logits by {number(moved / contrast)} of what they differ by"


def _contrast(side: Side) -> float:
    """By how much the logits of a row differ, in RMS: what a wrong function would move logprobs by."""
    rows = side.tokens.part(_even(len(side.tokens.place), 16))
    spreads = [np.var(side.forward.logits(line, rows.place[at] - 1).values, axis=-1) for line, at in rows.by_line()]
    return float(np.sqrt(np.mean(np.concatenate(spreads))))


def _other_token(side: Side, one: Tokens) -> int | None:
    """The only other token whose logprob at its place the observed one is."""
    line, row = one.lines[one.line[0]], one.place - 1
    vocab = side.forward.vocab
    logits = side.forward.logits(line, np.repeat(row, 1))
    way = declared(line)
    plain = logits.values[0] / way.temperature
    value = plain - plain.max() - np.log(np.sum(np.exp(plain - plain.max())))
    near = np.argsort(np.abs(value - one.observed[0]))[: min(3, vocab)]
    fits = []
    for token in near:
        made = logprobs_of(logits, np.array([token]), way)
        if made.error(one.observed)[0] <= made.bound[0] + side.file.step / 2:
            fits.append(int(token))
    return fits[0] if len(fits) == 1 and fits[0] != one.ids[0] else None


def _zeros(side: Side, beyond: np.ndarray) -> str:
    """What some logprobs are that are 0, and whether all others are right."""
    others = fit(side.tokens.part(~beyond), Logprobs(*(x[~beyond] for x in _fields(side.made))), side.file.step)
    rest = "those of all others are right" if others.passes else "and all others together err more than rounding does"
    said = "1 logprob is 0" if beyond.sum() == 1 else f"{beyond.sum()} logprobs are 0"
    return f"{said}, {rest}: masked tokens? write null there"


def _rest(side: Side) -> str:
    """Where errors that nothing explains are, and what has such errors."""
    if not side.tokens.observed.any():
        return "every logprob is 0: were they recorded?"
    beyond = side.fit.ratio > 1
    lines = np.unique(side.tokens.line[beyond])
    share = float(np.mean(beyond))
    if not beyond.any():
        return "no token is beyond its bound, but all together err more than rounding does: other weights, or a step?"
    first = int(np.argmax(beyond))
    line = side.tokens.lines[side.tokens.line[first]]
    said = f"none of the known causes; {share:.0%} of the tokens are beyond rounding, in {len(lines)} of "
    said += f"{len(side.tokens.lines)} sequences"
    growth = _growth(side)
    if share > 0.5 and growth < 2:
        return f"{said}, from the first on and alike at all positions, as other weights (a stale step?) would do"
    said += f", first at line {line.number}, position {int(side.tokens.place[first])}"
    return f"{said}, {growth:.2g} times larger late in a sequence than early" if growth >= 2 else said


def _growth(side: Side) -> float:
    """RMS of the errors in the last quarter of the sampled tokens over that in the first."""
    starts = np.array([line.start for line in side.tokens.lines])[side.tokens.line]
    sizes = np.array([len(line.tokens) for line in side.tokens.lines])[side.tokens.line] - starts
    share = (side.tokens.place - starts) / sizes
    late, early = (side.fit.error[part] for part in (share >= 0.75, share < 0.25))
    if not len(late) or not len(early):
        return 1.0
    return float(np.sqrt(np.mean(late**2)) / max(np.sqrt(np.mean(early**2)), 1e-300))


def _lines(numbers: Sequence[int]) -> str:
    few = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"line{'s' if len(numbers) > 1 else ''} {few}"


# -- the document -----------------------------------------------------------------------------------------------


def _document(command: LogprobsCommand, sides: Sequence[Side], unpaired: int) -> dict[str, Any]:
    document: dict[str, Any] = {
        "schema": "svf.logprobs/1",
        "outcome": _outcome(sides, unpaired),
        "verdict": "",
        "model": command.model,
        "a": _side(sides[0]),
        "b": _side(sides[1]) if len(sides) == 2 else None,
        "unpaired": unpaired,
        "split": _split(sides) if len(sides) == 2 else None,
        "worst": _worst(sides, command.top),
    }
    document["verdict"] = _sentence(document, _differently(sides))
    return document


def _outcome(sides: Sequence[Side], unpaired: int) -> str:
    if any(side.verdict.fails for side in sides) or _differently(sides):
        return "diverged" if len(sides) == 2 else "faulty"
    if unpaired or any(side.verdict is Verdict.UNJUDGED for side in sides):
        return "incomplete"
    return "agree" if len(sides) == 2 else "sound"


def _differently(sides: Sequence[Side]) -> str | None:
    """What both sides say was applied, where that is not the same."""
    if len(sides) != 2:
        return None
    a, b = sides
    pairs = zip(a.tokens.lines, b.tokens.lines, strict=True)
    apart = next(((declared(x), declared(y)) for x, y in pairs if declared(x) != declared(y)), None)
    return None if apart is None else f"a has {causes.words_of(apart[0])} applied, b {causes.words_of(apart[1])}"


def _side(side: Side) -> dict[str, Any]:
    explained = side.cause
    way = None if explained is None else explained.how(side.tokens.lines[side.tokens.line[0]])
    return {
        "source": str(side.file.path),
        "dtype": side.forward.dtype.name,
        "sequences": len(side.tokens.lines),
        "tokens": len(side.tokens.place),
        "verdict": side.verdict.value,
        "hint": side.hint,
        "ratio": side.fit.worst,
        "rms": side.fit.rms,
        "beyond": float(np.mean(side.fit.ratio > 1)),
        "floor": side.floor,
        "deviation": side.deviation,
        "mean_abs_error": float(np.mean(side.fit.error)),
        "declared": [_way(way) for way in dict.fromkeys(map(declared, side.tokens.lines))],
        "found": None if way is None else _way(way),
        "lines": side.scope,
        "stored": side.file.stored,
        "step": side.file.step or None,
    }


def _way(way: Processing) -> dict[str, Any]:
    return {
        "temperature": way.temperature,
        "top_k": way.top_k,
        "top_p": way.top_p,
        "unit": way.unit,
        "logits": way.logits,
        "row": way.row,
        "token": way.token,
        "likeliest": way.likeliest,
        "stored": way.stored,
    }


def _split(sides: Sequence[Side]) -> dict[str, Any]:
    """The difference a - b of every token that both have, in parts that add up to it."""
    a, b, at = _both(sides)
    one, two = sides[0].made, sides[1].made
    difference = sides[0].tokens.observed[a] - sides[1].tokens.observed[b]
    declared_apart = one.value[a] - two.value[b]
    found = (sides[0].final[a] - one.value[a]) - (sides[1].final[b] - two.value[b])
    with np.errstate(invalid="ignore"):
        left = difference - (sides[0].final[a] - sides[1].final[b])  # finite, too, where a side rules a token out
    budget = np.sqrt(np.square(_bounds(sides[0])[a]) + np.square(_bounds(sides[1])[b]))
    rounding = np.clip(np.nan_to_num(left), -budget, budget)
    parts = {"rounding": rounding, "declared": declared_apart, "cause": found, "rest": left - rounding}
    ratio = np.exp(np.clip(difference, -80, 80))
    return {
        "tokens": len(at),
        "mean_abs": _mean(difference),
        "max_abs": float(np.max(np.abs(difference))),
        "mean": float(np.mean(difference)),
        "budget": _mean(budget),
        "beyond": float(np.mean(np.abs(difference) > budget)),
        "rest_beyond": float(np.mean(np.abs(left - rounding) > 0)),
        "parts": {name: {"mean_abs": _mean(x), "max_abs": float(np.max(np.abs(x)))} for name, x in parts.items()},
        "k1": float(-np.mean(difference)),
        "k3": float(np.mean(ratio - 1 - difference)),
        "ratio_max": float(np.max(ratio)),
        "ratio_min": float(np.min(ratio)),
    }


def _bounds(side: Side) -> np.ndarray:
    found: np.ndarray = side.made.bound + side.file.step / 2
    return found


def _mean(array: np.ndarray) -> float:
    return float(np.mean(np.abs(array)))


def _both(sides: Sequence[Side]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Where in each side the tokens stand that both have."""
    places = [
        {(int(i), int(p)): n for n, (i, p) in enumerate(zip(s.tokens.line, s.tokens.place, strict=True))} for s in sides
    ]
    at = [key for key in places[0] if key in places[1]]
    if not at:
        raise InputError(f"{sides[1].file.path}: no token has a logprob in both files; null is not compared")
    return np.array([places[0][key] for key in at]), np.array([places[1][key] for key in at]), at


def _worst(sides: Sequence[Side], top: int) -> list[dict[str, Any]]:
    """The tokens that differ most: of two sides from each other, of one from float64; in units of their bounds."""
    if len(sides) == 1:
        side = sides[0]
        order = np.argsort(-side.fit.ratio, kind="stable")[:top]
        return [_token(side, int(n), None, None, float(side.fit.ratio[n])) for n in order]
    a, b, _ = _both(sides)
    difference = sides[0].tokens.observed[a] - sides[1].tokens.observed[b]
    budget = np.sqrt(np.square(_bounds(sides[0])[a]) + np.square(_bounds(sides[1])[b]))
    order = np.argsort(-np.abs(difference) / budget, kind="stable")[:top]
    return [_token(sides[0], int(a[n]), sides[1], int(b[n]), float(abs(difference[n]) / budget[n])) for n in order]


def _token(side: Side, n: int, other: Side | None, m: int | None, ratio: float) -> dict[str, Any]:
    line = side.tokens.lines[side.tokens.line[n]]
    place = int(side.tokens.place[n])
    return {
        "line": line.number,
        "position": place,
        "token": int(line.tokens[place]),
        "a": float(side.tokens.observed[n]),
        "b": None if other is None else float(other.tokens.observed[m]),
        "expected_a": float(side.made.value[n]),
        "expected_b": None if other is None else float(other.made.value[m]),
        "ratio": ratio,
    }


def _sentence(document: Mapping[str, Any], differently: str | None) -> str:
    sides = [(letter, document[letter]) for letter in "ab" if document[letter]]
    wrong = [(letter, side) for letter, side in sides if Verdict(side["verdict"]).fails]
    if wrong:
        return "; ".join(_wrong(letter, side, len(sides)) for letter, side in wrong) + "."
    total = sides[0][1]["tokens"]
    if document["outcome"] == "diverged":
        blind = [f"; {letter}: {side['hint']}" for letter, side in sides if side["hint"]]
        right = "Each side is right as declared" if not blind else "Neither side is beyond rounding as declared"
        return f"{right}, but they are logprobs of two distributions: {differently}{''.join(blind)}."
    if document["outcome"] == "incomplete":
        blind = [f"{letter}: {side['hint']}" for letter, side in sides if side["hint"]]
        if document["unpaired"]:
            blind.append(f"{document['unpaired']} sequences are in one file only")
        return f"Nothing is beyond rounding in {total} tokens, but not all could be judged: {'; '.join(blind)}."
    floors = ", ".join(f"{letter} above {number(side['floor'])}" for letter, side in sides)
    return f"All {total} tokens are rounding; errors in RMS would be seen in {floors}."


def _wrong(letter: str, side: Mapping[str, Any], count: int) -> str:
    name = f"{letter}: " if count == 2 else ""
    far = f"{number(side['rms'])} deviations in RMS, of right runs {number(RMS_THROUGH)} at most"
    if side["ratio"] > 1:
        far = times(side["ratio"]) or "no finite value"
    return f"{name}{side['verdict']}, {side['hint']} ({far})"
