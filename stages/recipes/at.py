"""A stage at hand: its inputs as recorded, or computed again without the rounding between two stages."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from stages.oracle.cores import WIDEST, Core
from stages.oracle.verdict import Oracle
from stages.recipes.fewer_bits import Lost, Narrow, largest
from stages.recipes.recipe import NARROW
from stages.recipes.value import Value, nearest, point
from stages.spec.noise import Noise


class Unknown(Exception):
    """A recipe asks for what was not recorded, or for what this model does not have."""


class At:
    """One stage with what its recipes read.

    `unrounded` names inputs that are computed again from their own recorded inputs, not rounded to the storage dtype;
    of `depth` 2 and more, theirs are too. `rounded`: they are, of inputs that were not recorded. `inside` is the dtype
    of the roundings inside the stage, of which those `left_out` are not done; `lost` is what its kernel does in fewer
    bits. `part`: of a joined product one alone; `rows` and `columns`: of the result, where not all are asked for.
    `right` gives what the prescribed recipe of another stage gives.
    """

    def __init__(
        self,
        oracle: Oracle,
        *,
        unrounded: tuple[str, ...] = (),
        depth: int = 1,
        inside: str | None = None,
        part: int | None = None,
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
        lost: Lost | None = None,
        rounded: bool = False,
        left_out: frozenset[str] = frozenset(),
        right: Callable[[At], Value] | None = None,
    ):
        self.oracle, self.stage, self.options = oracle, oracle.stage, oracle.options
        self.unrounded, self.depth, self.part, self.rows = unrounded, depth, part, rows
        self.columns, self.lost, self.rounded, self.right = columns, lost, rounded, right
        self.left_out = left_out
        self.steps: dict[str, None] = {}
        self.inside = inside or self.run
        self._memo: dict[Any, Value] = {}
        self._makers: dict[str, At] = {}
        self._peaks: dict[int, float] = {}

    @property
    def run(self) -> str:
        """The dtype of the run's activations: of the recorded inputs, or of what is stored."""
        given = self.oracle.arguments[: len(self.stage.inputs)]
        floats = [a.dtype.name for a in given if a.dtype.kind != "i"] if not self.oracle.hidden else []
        wide = [name for name in floats if name not in NARROW]
        return self.stage.dtype if not floats else wide[0] if wide else floats[0]

    def but(self, **changes: Any) -> At:
        """The same stage with other inputs; what was computed for it is kept where it still holds."""
        names = ("unrounded", "depth", "inside", "part", "rows", "columns", "lost", "rounded", "left_out", "right")
        other = At(self.oracle, **{**{name: getattr(self, name) for name in names}, **changes})
        other._memo, other._makers, other._peaks = self._memo, self._makers, self._peaks
        return other

    def lam(self, kind: Noise) -> float:
        """The calibrated lambda of a kind of noise."""
        return self.oracle.lambdas[kind]

    def array(self, number: int) -> np.ndarray:
        """An argument as it was recorded or stored."""
        return self.oracle.arguments[number]

    def input(self, number: int) -> Value:
        """An input as recorded, or as the recipe computes it again; of `rows` alone where the recipe asks for few."""
        name = self.stage.inputs[number]
        return self.cut(self.raw(name, self.depth)) if name in self.unrounded else self.recorded(number)

    def recorded(self, number: int) -> Value:
        """An input as recorded."""
        return self.whole(number) if self.rows is None else self._some(number, self.rows)

    def cut(self, value: Value) -> Value:
        return value if self.rows is None else value.map(lambda a: a[self.rows])

    def whole(self, number: int) -> Value:
        """An argument as stored, or taken to fewer bits."""
        return self._some(number, None)

    def _some(self, number: int, some: np.ndarray | None) -> Value:
        """`whole`, of `some` of its first axis alone."""
        taken = self._taken(number)
        key = ("recorded", number, taken and taken.name, None if some is None else some.tobytes())
        if key not in self._memo:
            array = self.oracle.arguments[number]
            wide = (array if some is None else array[some]).astype(np.float64)
            self._memo[key] = point(wide) if taken is None else taken.value(wide, self._peak(taken, number))
        return self._memo[key]

    def kept(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What another row made of the same few places; of all places it is made again, since it would fill memory."""
        if self.rows is None:
            return make()
        columns = None if self.columns is None else self.columns.tobytes()
        inputs = (self.unrounded, self.depth, self.rounded, self.lost, self.inside, self.part)
        full = (key, self.rows.tobytes(), columns, inputs)
        if full not in self._memo:
            self._memo[full] = make()
        return self._memo[full]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight as stored."""
        return self.oracle.arguments[len(self.stage.inputs) + self.stage.params.index(name)].shape

    def weight(self, name: str) -> np.ndarray:
        """A weight `[columns of the result, K]`, or the bias of these; of `columns` alone where few are asked for."""
        return self._some(len(self.stage.inputs) + self.stage.params.index(name), self.columns).mid

    def least(self, name: str) -> np.ndarray | None:
        """What the codes of a weight are counted from, `[columns of the result, blocks]`; None of types from 0."""
        of = self.oracle.least.get(name)
        found = None if of is None else of()
        return found if found is None or self.columns is None else found[self.columns]

    def _peak(self, taken: Narrow, number: int) -> float | None:
        """The largest magnitude of an argument, where its scale goes by that."""
        if not taken.whole:
            return None
        if number not in self._peaks:
            self._peaks[number] = largest(self.oracle.arguments[number])
        return self._peaks[number]

    def _taken(self, number: int) -> Narrow | None:
        """What an argument is taken to before it is used."""
        return self.lost.narrow if self.lost is not None and number in self.lost.which else None

    def taken(self, x: np.ndarray) -> np.ndarray:
        """A factor that is made inside the stage, of operands that are taken to fewer bits."""
        return x if self.lost is None or not self.lost.which else self.lost.narrow.of(x)

    def core(self, pieces: str | None, *, asked: bool) -> Core | None:
        """The tensor core that sums a product: of `pieces` of that format, of what it is taken to, or of the run's.

        `asked`: by a row that is about it; `Unknown` where the device has none. Otherwise one of the run's own format
        counts only where the device is known.
        """
        cores = self.oracle.lambdas.cores
        taken = self.lost.narrow.core if self.lost is not None and self.lost.which else None
        core = cores.get(pieces or taken or self.run)
        if asked and core is None:
            raise Unknown("a tensor core")
        return core if asked or pieces or taken or cores is not WIDEST else None

    def on_gpu(self) -> None:
        """`Unknown` on a CPU."""
        if not self.oracle.lambdas.cores:
            raise Unknown("a GPU")

    def result(self, value: Value) -> Value:
        """What the stage's kernel keeps of its result."""
        return value.map(self.lost.narrow.of) if self.lost is not None and self.lost.result else value

    @property
    def biases(self) -> tuple[int, ...]:
        """Which arguments are biases of a product: vectors beside matrices."""
        first = len(self.stage.inputs)
        of_weights = [(i, a.ndim) for i, a in enumerate(self.oracle.arguments) if i >= first]
        return tuple(i for i, axes in of_weights if axes == 1) if any(axes == 2 for _, axes in of_weights) else ()

    def params(self) -> list[tuple[str, np.ndarray]]:
        """The stage's weights by the checkpoint's name, float64."""
        first = len(self.stage.inputs)
        return [(name, self.whole(first + i).mid) for i, name in enumerate(self.stage.params)]

    def maker(self, name: str) -> At:
        """The stage that made an input, by its own recorded inputs."""
        if name not in self._makers:
            make = self.oracle.made.get(name)
            oracle = make() if make is not None else None
            if oracle is None:
                raise Unknown(name)
            self._makers[name] = At(oracle, inside="float32", right=self.right)
        return self._makers[name]

    def raw(self, name: str, depth: int) -> Value:
        """An input computed again in float32, not rounded to the storage dtype."""
        key = ("raw", name, depth)
        if key not in self._memo:
            maker = self.maker(name)
            if depth > 1:
                known = tuple(n for n in maker.stage.inputs if n in maker.oracle.made)
                maker = maker.but(unrounded=known, depth=depth - 1)
            assert self.right is not None
            self._memo[key] = self.right(maker)
        return self._memo[key].once(self.run) if self.rounded else self._memo[key]

    def stream(self, name: str, *, raw: bool = False) -> Value:
        """A residual stream kept in float32 up to the input `name`: what each branch before it added, as recorded or,
        `raw`, not rounded either. `Unknown` where `name` is no sum, or nothing would be narrower."""
        if self.run not in NARROW:
            raise Unknown("no rounding to leave out")
        key = ("stream", name, raw)
        if key not in self._memo:
            maker = self.maker(name)
            if len(maker.stage.inputs) != 2 or maker.stage.params:
                raise Unknown(name)
            self._memo[key] = maker.sum_of_stream(raw=raw)
        return self.cut(self._memo[key])

    def sum_of_stream(self, *, raw: bool = False) -> Value:
        """Of a residual: the stream before it and what its branch adds."""
        before, branch = self.stage.inputs
        try:
            stream = self.stream(before, raw=raw) if self.run in NARROW else self.recorded(0)
        except Unknown:
            stream = self.recorded(0)
        added = self.cut(self.raw(branch, 1)) if raw else self.recorded(1)
        return (stream + added).soft(1)

    def stored(self, value: Value, step: str = "") -> Value:
        """A rounding inside the stage, to the activations' dtype; `steps` keeps the names of what was rounded."""
        if step:
            self.steps[step] = None
        return value.soft(1) if step in self.left_out else value.to(self.inside)

    def narrow(self, x: np.ndarray | float) -> np.ndarray:
        """A number that is held in the activations' dtype."""
        return nearest(x, self.inside)
