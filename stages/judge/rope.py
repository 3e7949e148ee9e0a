"""RoPE in one recorded run: at which positions its tokens stand, whose tables explain a stage, and why one fails.

RoPE is relative: positions shifted by a constant change no score, so a row that was padded on the left, or a decode's
tokens, are right at their own positions. These are found from what was recorded, not asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import ml_dtypes
import numpy as np

from stages.files.tensorfile import sha256
from stages.oracle.bounds import Lambdas
from stages.oracle.decoder import _keys, _queries
from stages.oracle.rope import STAGES, TABLES, TURNED, Rounding, Table, Tables
from stages.oracle.verdict import Oracle, measure
from stages.recipes.rope import THETAS
from stages.spec.config import ModelConfig
from stages.spec.stage import Pipeline, Stage

Place = tuple[int | None, str]

# Positions are looked for up to the model's own length, and no further than this.
_FURTHEST = 1 << 18
_CHUNK = 1 << 14
# Stages that no known cause explained, after which none is looked for any more: each costs dozens of oracles.
_TRIES = 3
# Factors of a scaling that was not carried over.
_FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass
class RopeRun:
    """What of RoPE a run has recorded.

    `read` gives a recorded stage of the declared shape, or None. `tables_of_one` says that one program made all tables:
    an angle is then that of the recorded frequencies, to the bit; else each may be the model's own too.
    """

    config: ModelConfig
    path: Pipeline
    lambdas: Lambdas
    numbers: np.ndarray  # of the recorded tokens, from 0
    places: frozenset[Place]
    read: Callable[[Place], np.ndarray | None]
    as_stored: Callable[[Stage, np.ndarray], Stage]
    tables_of_one: bool
    # Positions of waves that were looked for before, in this recording or in another view of it.
    known: dict[Hashable, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._found: tuple[str, Tables] | None = None
        self._tries = 0

    # -- tables ---------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> Tables:
        """The model's tables at the positions found."""
        return self._tables(self.numbers + self.start)

    def _tables(self, positions: np.ndarray) -> Tables:
        return Tables(self.config, self.path, positions.astype(np.int32), self.lambdas)

    @property
    def positions(self) -> np.ndarray:
        """The positions at which the tokens stand, int32."""
        return self.model.positions

    @property
    def own(self) -> Tables:
        """The tables that were recorded, and what follows from them."""
        recorded = self._recorded()
        return dataclasses.replace(self.model, recorded=recorded) if recorded else self.model

    def _recorded(self) -> dict[str, np.ndarray]:
        found = {name: self.read((None, name)) for name in TABLES}
        return {name: array for name, array in found.items() if array is not None}

    def oracle(self, place: Place, stage: Stage, observed: np.ndarray, recorded: Oracle | None) -> Oracle:
        """What a stage should give: the first that explains what was observed, or else the first.

        `recorded` is from the recorded inputs where all are there. Then what follows from some recorded tables, and the
        model's own: of two programs' tables each may be right.
        """
        if recorded is not None and (self.tables_of_one or measure(recorded, observed).verdict.passes):
            return recorded
        first = recorded
        for tables in ([] if recorded else [self.own]) + ([] if self.tables_of_one else [self.model]):
            for oracle in self._oracles(place, stage, tables, recorded=recorded is not None):
                if measure(oracle, observed).verdict.passes:
                    return oracle
                first = first or oracle
        assert first is not None
        return first

    def _oracles(self, place: Place, stage: Stage, tables: Tables, *, recorded: bool = False) -> Iterator[Oracle]:
        """A stage from these tables, likeliest first: a narrow run may turn in float32, and keep cos and sin so too.

        Of `recorded` tables a recipe says where it was rounded.
        """
        if stage.name in TABLES:
            yield tables.oracle(stage)
            return
        x = self._turned_input(place)
        assert x is not None
        yield tables.oracle(stage, x)
        if self.path["rope_cos"].dtype != "float32":
            if not recorded:
                yield tables.oracle(stage, x.astype(np.float32))
            yield dataclasses.replace(tables, waves="float32").oracle(stage, x.astype(np.float32))

    def _turned_input(self, place: Place) -> np.ndarray | None:
        return self.read((place[0], self.path.at(place).inputs[0]))

    def _explains(self, tables: Tables, place: Place, observed: np.ndarray) -> bool:
        if place[1] in tables.rounded or place[1] in tables.recorded:
            table: Table = getattr(tables, place[1])
            error = np.abs(observed.astype(np.float64) - table.value)
            return bool((error <= table.near).all())
        stage = self.as_stored(self.path.at(place), observed)
        return any(measure(oracle, observed).verdict.passes for oracle in self._oracles(place, stage, tables))

    @property
    def notes(self) -> list[str]:
        """What a reader of the verdict should know: computed tables, and positions that do not start at 0."""
        notes = []
        if any((None, name) not in self.places for name in self._read_tables()):
            notes.append("RoPE tables computed from the config")
        if self.start:
            notes.append(f"positions start at {int(self.numbers[0]) + self.start}")
        return notes

    def _read_tables(self) -> set[str]:
        """The tables that recorded stages are computed from."""
        return {name for place in self.places if place[1] in STAGES for name in self.path.at(place).inputs} & {*TABLES}

    # -- positions ------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> int:
        """By how much the positions are shifted: 0 unless recorded stages are right, all shifted alike, at others."""
        plain = self._tables(self.numbers)
        for group in self._evidence():
            if any(self._explains(plain, place, array) for place, array in group.items()):
                return 0
            for positions in self._estimates(group):
                shift = self._shift(positions)
                if shift is not None and (self.numbers.size > 2 or self._explain_all(group, positions)):
                    return shift
        return 0

    def _shift(self, positions: np.ndarray) -> int | None:
        """By how much all positions are shifted, or would be if they had not been held in fewer bits."""
        first = int(positions[0] - self.numbers[0])
        if (positions - self.numbers == first).all():
            return first
        near = range(first - (first >> 7), first + (first >> 7) + 1)  # a position in 8 bits is off by half of this
        shifts = (at for at in near for narrow in _NARROW.values() if (narrow(self.numbers + at) == positions).all())
        return next(shifts, None)

    def _explain_all(self, group: Mapping[Place, np.ndarray], positions: np.ndarray) -> bool:
        tables = self._tables(positions)
        return all(self._explains(tables, place, array) for place, array in group.items())

    def _evidence(self) -> Iterator[dict[Place, np.ndarray]]:
        """What shows the positions: the angles, cos and sin, or the turned queries and keys of a layer."""
        layers = sorted({layer for layer, stage in self.places if layer is not None and stage in TURNED})
        groups: list[list[Place]] = [[(None, "rope_angle")], [(None, "rope_cos"), (None, "rope_sin")]]
        groups += [[(layer, name) for name in TURNED] for layer in layers]
        for group in groups:
            found = {}
            for place in group:
                array = self.read(place)
                if array is not None and (place[1] in TABLES or self._turned_input(place) is not None):
                    found[place] = array
            if found:
                yield found

    def _estimates(self, group: Mapping[Place, np.ndarray]) -> Iterator[np.ndarray]:
        """Each token's position as stages have it: from one alone, or from a cosine and its sine together."""
        if (None, "rope_angle") in group:
            yield from self._of_angle(group[None, "rope_angle"])
        elif any(place[1] in TABLES for place in group):
            cos, sin = (group.get((None, name)) for name in ("rope_cos", "rope_sin"))
            half = self.config.head_dim // 2
            yield self._of_waves(
                *(None if table is None else table[:, :half].astype(np.float64) for table in (cos, sin))
            )
        else:
            for place, array in group.items():
                yield self._of_turned(place, array)

    def _of_angle(self, angle: np.ndarray) -> Iterator[np.ndarray]:
        # The first frequency has no theta in it: right whatever theta is. longrope has two of them.
        for length in self._lengths:
            first = self._frequencies(length)[0]
            with np.errstate(all="ignore"):
                positions = np.rint(angle[:, 0].astype(np.float64) / first)
            if np.isfinite(positions).all() and (positions >= 0).all() and positions.max() < 2**31:
                yield positions.astype(np.int64)

    def _of_turned(self, place: Place, after: np.ndarray) -> np.ndarray:
        """From the turn between a query or key and what RoPE made of it, all heads together."""
        before, c = self._turned_input(place), self.config
        assert before is not None
        heads, kv_heads, half = c.num_attention_heads, c.num_key_value_heads, c.head_dim // 2
        x = _queries(before, heads, 2 * half) if place[1] == TURNED[0] else _keys(before, heads, kv_heads, 2 * half)
        x, y = x.astype(np.float64), after.astype(np.float64)
        a, b, ya, yb = x[..., :half], x[..., half:], y[..., :half], y[..., half:]
        size = np.maximum((a * a + b * b).sum(axis=1), np.finfo(np.float64).tiny)
        return self._of_waves((a * ya + b * yb).sum(axis=1) / size, (a * yb - b * ya).sum(axis=1) / size)

    @cached_property
    def _furthest(self) -> int:
        return min(max(self.config.max_position_embeddings, 4 * self.numbers.size, 1024), _FURTHEST)

    def _of_waves(self, cos: np.ndarray | None, sin: np.ndarray | None) -> np.ndarray:
        """The position of each row whose cosines and sines are nearest to these, `[tokens, frequencies]`."""
        waves = [(function, wave) for function, wave in ((np.cos, cos), (np.sin, sin)) if wave is not None]
        rows = np.nan_to_num(np.concatenate([wave for _, wave in waves], axis=1))
        functions = [function for function, _ in waves]
        key = (self.config, *functions, sha256(rows))
        if key not in self.known:
            self.known[key] = self._looked_for(rows, functions)
        return self.known[key]

    def _looked_for(self, rows: np.ndarray, functions: Sequence[np.ufunc]) -> np.ndarray:
        if self.config.rope_type != "dynamic":
            of = [self._frequencies(length) for length in self._lengths]
            return self._nearest(rows, functions, lambda positions: [positions[:, None] * f for f in of])
        # Every length has frequencies of its own: the first token tells it.
        tokens = self.numbers.size

        def each(positions: np.ndarray) -> list[np.ndarray]:
            return [positions[:, None] * np.stack([self._frequencies(at + tokens) for at in positions.tolist()])]

        f = self._frequencies(int(self._nearest(rows[:1], functions, each)[0]) + tokens)
        return self._nearest(rows, functions, lambda positions: [positions[:, None] * f])

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Lengths by which the run may have got its frequencies; longrope has two sets."""
        return (self.numbers.size, self._furthest) if self.config.rope_type == "longrope" else (self.numbers.size,)

    def _frequencies(self, length: int) -> np.ndarray:
        return self._tables(np.array([length - 1])).inv_freq.value

    def _nearest(
        self,
        rows: np.ndarray,
        functions: Sequence[np.ufunc],
        angles_of: Callable[[np.ndarray], list[np.ndarray]],
    ) -> np.ndarray:
        best, found = np.full(len(rows), -np.inf), np.zeros(len(rows), np.int64)
        for at in range(0, self._furthest, _CHUNK):
            positions = np.arange(at, min(at + _CHUNK, self._furthest))
            for angles in angles_of(positions):
                table = np.concatenate([function(angles) for function in functions], axis=1)
                # Nearest: |row - table|^2 is least where row . table - |table|^2 / 2 is largest.
                score = rows @ table.T - 0.5 * (table * table).sum(axis=1)
                top = score.argmax(axis=1)
                value = score[np.arange(len(rows)), top]
                found = np.where(value > best, positions[top], found)
                best = np.maximum(best, value)
        return found

    # -- causes ---------------------------------------------------------------------------------------------------

    def cause(self, place: Place, observed: np.ndarray) -> str | None:
        """Why a stage of RoPE fails, if positions, fewer bits or another config of the tables explain it."""
        if place[1] in TURNED and self._turned_input(place) is None:
            return None
        stage = self.as_stored(self.path.at(place), observed)
        right = next(self._oracles(place, stage, self.model)).value
        if not np.isfinite(observed).all() or observed.shape != right.shape:
            return None
        if self._found is not None and self._explains(self._found[1], place, observed):
            return self._found[0]
        if self._tries >= _TRIES:
            return None
        self._tries += 1
        for text, tables in self._wrong(place, observed):
            if self._explains(tables, place, observed):
                self._found = text, tables
                return text
        return None

    def _wrong(self, place: Place, observed: np.ndarray) -> Iterator[tuple[str, Tables]]:
        expected = self.numbers + self.start
        moved = [] if place[1] == "inv_freq" else list(self._positions_of(place, observed))
        for positions in moved:
            text = _in_words(positions, expected)
            if text is not None:
                yield text, self._tables(positions)
        yield from self._in_fewer_bits()
        for text, config in _other_configs(self.config):
            yield text, dataclasses.replace(self.model, config=config)
        for positions in moved:
            if (positions != expected).any():
                yield _listed(positions, expected), self._tables(positions)

    def _positions_of(self, place: Place, observed: np.ndarray) -> Iterator[np.ndarray]:
        group = {place: observed}
        if place[1] in ("rope_cos", "rope_sin"):
            both = {(None, name): self.read((None, name)) for name in ("rope_cos", "rope_sin")}
            group |= {at: array for at, array in both.items() if array is not None}
        return self._estimates(group)

    def _in_fewer_bits(self) -> Iterator[tuple[str, Tables]]:
        f, a, p = "inv_freq", "rope_angle", "positions"
        frequencies, angles = "the inverse frequencies", "the angles"
        for name, narrow in _NARROW.items():
            for text, tables in (
                (frequencies, (f,)),
                (angles, (a,)),
                (f"{frequencies} and {angles}", (f, a)),
                ("the positions", (p,)),
                (f"the positions, {frequencies} and {angles}", (p, f, a)),
                ("cos and sin", ("rope_cos", "rope_sin")),
            ):
                rounded = dict.fromkeys(tables, narrow)
                yield f"as if {text} were in {name}", dataclasses.replace(self.model, rounded=rounded)
            for made in _made_in(narrow, self.config):
                recorded = {f: made}
                text = f"as if {frequencies} were computed in {name}"
                yield text, dataclasses.replace(self.model, recorded=recorded)
                rounded = {a: narrow}
                yield f"{text}, the angles too", dataclasses.replace(self.model, recorded=recorded, rounded=rounded)


def _through(dtype: np.dtype) -> Rounding:
    return lambda x: x.astype(np.float32).astype(dtype).astype(np.float64)


_NARROW: Mapping[str, Rounding] = {
    "bfloat16": _through(np.dtype(ml_dtypes.bfloat16)),
    "float16": _through(np.dtype(np.float16)),
}


def _made_in(narrow: Rounding, config: ModelConfig) -> Iterator[np.ndarray]:
    """Frequencies without scaling whose exponents, power and reciprocal are each rounded."""
    numbers = narrow(np.arange(0, config.head_dim, 2, dtype=np.float64))
    exponents = narrow(numbers / config.head_dim)
    with np.errstate(over="ignore", divide="ignore"):
        yield narrow(1 / narrow(config.rope_theta**exponents))
        yield narrow(config.rope_theta**-exponents)


def _other_configs(config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """What a config becomes when a setting of RoPE is lost on the way, in words."""
    rope = config.rope
    if config.rope_type != "default":
        plain = dataclasses.replace(config, rope_type="default", rope_parameters=())
        kept = tuple(item for item in config.rope_parameters if item[0] == "attention_factor")
        yield (
            f"as if the frequencies were not scaled (rope_type {config.rope_type})",
            dataclasses.replace(plain, rope_parameters=kept),
        )
        yield f"as if rope_type were default, not {config.rope_type}", plain
    for theta in THETAS:
        if theta != config.rope_theta:
            changed = dataclasses.replace(config, rope_theta=theta)
            yield f"as if rope_theta were {theta:.9g}, not {config.rope_theta:.9g}", changed
    if "factor" in rope:
        for factor in _FACTORS:
            if factor != rope["factor"]:
                yield f"as if factor were {factor:g}, not {rope['factor']:g}", _with(config, factor=factor)
    if config.attention_factor != 1:
        yield "as if the attention factor were left out", _with(config, attention_factor=1.0)
        twice = config.attention_factor**2
        yield "as if the attention factor were applied twice", _with(config, attention_factor=twice)
    if config.rope_type == "longrope":
        for one, other in (("short", "long"), ("long", "short")):
            swapped = _with(config, **{f"{one}_factor": rope[f"{other}_factor"]})
            yield f"as if the {other} factors stood in the place of the {one} ones", swapped


def _with(config: ModelConfig, **changes: object) -> ModelConfig:
    return dataclasses.replace(config, rope_parameters=tuple(sorted((config.rope | changes).items())))  # type: ignore[arg-type]


def _in_words(found: np.ndarray, expected: np.ndarray) -> str | None:
    """What was done to positions that are not the expected ones, if it is plain to see, and from which token on."""
    wrong = found != expected
    if not wrong.any():
        return None
    for name, narrow in _NARROW.items():
        if (narrow(expected) == found).all():
            return f"as if the positions were in {name}"
    first = int(np.argmax(wrong))
    rest, shift = found[first:], found[first:] - expected[first:]
    if rest.size > 1 and (rest == rest[0]).all():
        return f"positions are {rest[0]} {_since(first)}"
    if (shift == shift[0]).all():
        return f"positions are {abs(shift[0])} too {'many' if shift[0] > 0 else 'few'} {_since(first)}"
    return None


def _listed(found: np.ndarray, expected: np.ndarray) -> str:
    """The first positions that are not the expected ones, and from which token on."""
    first = int(np.argmax(found != expected))
    rest = found[first:]
    return f"{_since(first)} as at positions {', '.join(map(str, rest[:3].tolist()))}{', ...' if rest.size > 3 else ''}"


def _since(first: int) -> str:
    return f"from token {first} on" if first else "at all tokens"
