"""RoPE's tables of a model, each with how far a right program's own may lie from it; and whose tables explain a stage.

Frequencies have no one right float32 value: a power, exp(-log) and float64 give others, and an angle is off by as much
times its position. So a table that was not recorded is computed together with what it may be off by, and that goes
through what reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from stages.oracle import bounds as noise
from stages.oracle.bounds import U32, Lambdas
from stages.oracle.decoder import OPERANDS
from stages.oracle.rounding import round_once
from stages.oracle.verdict import Oracle, Unsure, consult
from stages.spec.config import ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import stage_options
from stages.spec.profiles import TABLES
from stages.spec.stage import Pipeline, Stage

TURNED = ("q_post_rope", "k_post_rope")
# All that this module judges.
STAGES = (*TABLES, *TURNED)

Rounding = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Table:
    """A table: its value, and how far a right program's may lie from it by the calibrated and the rigorous bounds."""

    value: np.ndarray
    near: np.ndarray | float = 0.0
    far: np.ndarray | float = 0.0


@dataclass(frozen=True)
class Tables:
    """RoPE's tables of `config` at `positions`; those in `recorded` are taken as they are.

    `rounded` names tables (and `positions`) that pass through fewer bits on their way to the next: how a wrong program
    would have computed.
    """

    config: ModelConfig
    path: Pipeline
    positions: np.ndarray
    lambdas: Lambdas
    recorded: Mapping[str, np.ndarray] = field(default_factory=dict)
    rounded: Mapping[str, Rounding] = field(default_factory=dict)
    waves: str | None = None  # the dtype of cos and sin, if not the path's

    @cached_property
    def inv_freq(self) -> Table:
        return self._table("inv_freq", self._oracle(self.path["inv_freq"], (self.positions,)))

    @cached_property
    def rope_angle(self) -> Table:
        return self._table("rope_angle", self._angle(self.path["rope_angle"]))

    @cached_property
    def rope_cos(self) -> Table:
        return self._stored("rope_cos")

    @cached_property
    def rope_sin(self) -> Table:
        return self._stored("rope_sin")

    def oracle(self, stage: Stage, turned: np.ndarray | None = None) -> Oracle:
        """What `stage` should give from these tables; `turned` are the queries or keys that RoPE turns."""
        if stage.name == "inv_freq":
            return self._oracle(stage, (self.positions,))
        if stage.name == "rope_angle":
            return self._angle(stage)
        if stage.name in TABLES:
            return self._wave(stage)
        assert turned is not None
        cos, sin = self.rope_cos, self.rope_sin
        unsure = None if _sure(cos, sin) else _turned_unsure(stage, stage_options(self.config, stage), cos, sin)
        return self._oracle(stage, (turned, cos.value, sin.value), unsure)

    def _oracle(self, stage: Stage, arguments: tuple[np.ndarray, ...], unsure: Unsure | None = None) -> Oracle:
        return consult(stage, arguments, stage_options(self.config, stage), self.lambdas, unsure)

    def _angle(self, stage: Stage) -> Oracle:
        f, positions = self.inv_freq, self.positions
        if "positions" in self.rounded:
            positions = self.rounded["positions"](positions.astype(np.float64))
        at = np.abs(positions.astype(np.float64))[:, None]
        near, far = (np.tile(at * error, 2) for error in (f.near, f.far))
        return self._oracle(stage, (f.value, positions), None if _sure(f) else lambda _: (near, far))

    def _wave(self, stage: Stage) -> Oracle:
        angle = self.rope_angle
        slope = np.sin if stage.name == "rope_cos" else np.cos
        steep, scale = np.abs(slope(angle.value.astype(np.float64))), self.config.attention_factor

        def unsure(_: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
            # |cos(a + e) - cos(a)| is at most e |sin a| + e^2/2, and 2
            near, far = (
                scale * np.minimum(e * steep + e * e / 2, 2.0) for e in map(np.asarray, (angle.near, angle.far))
            )
            return near, far

        return self._oracle(stage, (angle.value,), None if _sure(angle) else unsure)

    def _table(self, name: str, oracle: Oracle) -> Table:
        """A float32 table as it goes into the next one; its stored rounding is within its bounds."""
        if name in self.recorded:
            return Table(self.recorded[name])
        value, near, far = oracle.value, oracle.bound, oracle.rigorous()
        narrow = self.rounded.get(name)
        return Table(value, near, far) if narrow is None else _rounded(value, near, far, narrow)

    def _stored(self, name: str) -> Table:
        """cos or sin as the model stores it, and how far another right one may be stored from it."""
        if name in self.recorded:
            return Table(self.recorded[name])
        stage = self.path[name] if self.waves is None else dataclasses.replace(self.path[name], dtype=self.waves)
        oracle, dtype = self._wave(stage), stored_dtype(stage.dtype)
        near, far = _before(oracle)
        stored = lambda x: round_once(x, dtype).astype(np.float64)  # noqa: E731
        if name in self.rounded:
            table = _rounded(oracle.value, near, far, lambda x: stored(self.rounded[name](x)))
        elif dtype != np.float32:
            table = _rounded(oracle.value, near, far, stored)
        else:
            table = Table(stored(oracle.value), *(error + U32 * np.abs(oracle.value) for error in (near, far)))
        return Table(table.value.astype(dtype), table.near, table.far)


def _sure(*tables: Table) -> bool:
    return all(isinstance(table.near, float) for table in tables)


def _rounded(value: np.ndarray, near: np.ndarray, far: np.ndarray, rounding: Rounding) -> Table:
    """`value` rounded, and how far the rounding of another within the bounds may lie from it."""
    middle = rounding(value)
    flips = (np.maximum(rounding(value + e) - middle, middle - rounding(value - e)) for e in (near, far))
    return Table(middle, *flips)


def _before(oracle: Oracle) -> tuple[np.ndarray, np.ndarray]:
    """The two bounds of a cosine or sine in float32, before it is stored in fewer bits."""
    size = float(oracle.options["attention_scaling"])
    near = noise.cos_sin_bound(oracle.lambdas[oracle.stage.noise], size, oracle.value)
    far = noise.cos_sin_rigorous(size, oracle.value)
    more = (0.0, 0.0) if oracle.unsure is None else oracle.unsure(oracle.arguments)
    return near + more[0], far + more[1]


def _turned_unsure(stage: Stage, options: Mapping[str, int], cos: Table, sin: Table) -> Unsure:
    """What the tables' errors add to a turned query or key: |x| times them, each product rounded to x's dtype."""

    def added(arguments: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        x, shape = arguments[0], arguments[1].shape
        products = OPERANDS[stage.function](x, *arguments[1:3], **options)

        def of(*errors: np.ndarray | float) -> np.ndarray:
            wide = [np.broadcast_to(np.asarray(error, np.float64), shape) for error in errors]
            moved = OPERANDS[stage.function](x, *wide, **options)
            pairs = zip(map(np.asarray, products), map(np.asarray, moved), strict=True)
            direct, turned = (noise.after_prescribed(product, np.abs(error), x.dtype) for product, error in pairs)
            return direct + turned

        return of(cos.near, sin.near), of(cos.far, sin.far)

    return added
