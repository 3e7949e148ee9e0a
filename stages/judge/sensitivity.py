"""Where in hidden stages a recorded tensor's error most likely begins: it is carried back to all of them at once.

Random vectors of the tensor's own noise are carried back beside the error. What arrives of them at a hidden value says
how much an error there moves the tensor; what arrives of the error says how much of it a change there would explain. So
every hidden value, every number and every element, row and column of a weight is asked for the price of a few forwards.
It is an estimate, of first order: who asks computes the likeliest changes as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.tried import Tried
from stages.judge.wrong_weights import Element, Line, Share
from stages.oracle.adjoint import carried_back
from stages.spec.noise import Noise

# Random vectors: of 8, what a change explains is known to 50%, enough to choose whom to ask; of 32 to 25%, of 64: 18%.
FEW, SOME, MANY = 8, 32, 64
# They are carried back of so many of the first tokens, and in so many bytes, at most.
_MOST_TOKENS, _MOST_BYTES = 256, 1 << 30
# Of each weight, so many rows and columns are worth asking, and so many elements of a row.
_MOST, _MOST_OF_ROW = 6, 12
# Rows or columns of a weight of which each is compared with each.
_MOST_LINES = 4096


class Sensitivity:
    """How a tensor differs from `value`, and its noise, carried back to the hidden stages that have an adjoint."""

    def __init__(self, search: Tried, value: np.ndarray, probes: int):
        self.search, self.probes = search, probes
        got, weight = search.seen()
        error = (got - value) * weight
        self.square = float(np.sum(error * error))
        self.typical = float(np.sqrt(self.square / max(int(np.count_nonzero(error)), 1)))
        first, rng = np.empty((probes + 1, *error.shape), np.float32), np.random.default_rng(0)
        self.of: dict[Place, np.ndarray] = {search.span.acting: first}
        with np.errstate(all="ignore"):
            first[0] = error * weight
            for probe in first[1:]:  # one at a time: in float64 all of them take twice the memory that is allowed for
                probe[...] = rng.choice((-1.0, 1.0), error.shape) * weight
            self._carry()

    def _carry(self) -> None:
        search, hidden = self.search, frozenset(self.search.span.hidden)
        for at in (search.span.acting, *reversed(search.span.hidden)):
            back = self.of.get(at)
            if back is None:
                continue
            stage, sources = search.stage_of(at), search.inputs_of(at)
            inputs = [search.given(source, {}) for source in sources]
            if at == search.span.acting and stage.by_vocab:
                inputs = [array[-back.shape[1] :] for array in inputs]
            found = carried_back(stage, inputs, search.params(at), search.options_of(at), back)
            for source, own in zip(sources, found or (), strict=False):
                if own is not None and source in hidden:
                    self.of[source] = _added(self.of.get(source), own, search.given(source, {}).shape)

    # -- what a change explains -----------------------------------------------------------------------------------

    def explained(self, changes: Mapping[Place, np.ndarray]) -> Share | None:
        """What changed values of some stages explain; None of a stage to which nothing was carried."""
        total = np.zeros(self.probes + 1)
        for at, change in changes.items():
            back = self.of.get(at)
            if back is None or change.size != back[0].size or not np.isfinite(change).all():
                return None
            total += back.reshape(len(back), -1).astype(np.float64) @ change.reshape(-1)
        own, square = float(total[0]), float(np.mean(total[1:] ** 2))
        if not square > 0 or not np.isfinite(square) or not self.square:
            return None
        return self._share(own, square)

    def _share(self, own: float, square: float) -> Share:
        """Of what a change has in common with the error, and its own square."""
        return Share(own * own / square / self.square, own / square, self.typical / np.sqrt(square))

    def weights(self, least: float = 0.0) -> Iterator[Element | Line]:
        """Elements, rows and columns of the weights of all products and norms that explain most; of stages in whose
        result some column is off by `least` standard deviations in RMS. None of a tensor without any error."""
        if not self.square:
            return
        with np.errstate(all="ignore"):
            for at in (self.search.span.acting, *reversed(self.search.places)):
                stage = self.search.stage_of(at)
                if at not in self.of or not stage.inputs or self._largest_column(at) < least:
                    continue
                if stage.noise is Noise.PRODUCT:
                    yield from self._of_product(at)
                elif stage.noise is Noise.RMS_NORM:
                    yield from self._of_norm(at)

    def _largest_column(self, at: Place) -> float:
        back = self.of[at].reshape(self.probes + 1, -1, self.of[at].shape[-1])
        off = back[0] ** 2 / np.mean(back[1:] ** 2, axis=0)
        return float(np.sqrt(np.nanmax(np.mean(off, axis=0), initial=0.0))) / self.typical

    def _of_norm(self, at: Place) -> Iterator[Element]:
        (weight,) = self.search.params(at)
        value = self.search.right(at, [self.search.given(source, {}) for source in self.search.inputs_of(at)])
        change = (value / np.where(weight == 0, np.inf, weight)).reshape(-1, weight.size).astype(np.float32)
        back = self.of[at].reshape(self.probes + 1, -1, weight.size)
        each = np.einsum("mtc,tc->mc", back, change)
        yield from self._elements(at, 0, each[0], np.mean(each[1:] ** 2, axis=0))

    def _of_product(self, at: Place) -> Iterator[Element | Line]:
        (source,), back = self.search.inputs_of(at), self.of[at]
        x = self.search.given(source, {})[-back.shape[1] :].astype(np.float32)
        for number, weight, part in self._joined(at, 2):
            wide, noise = weight.astype(np.float32), np.mean(part[1:] ** 2, axis=0)
            yield from self._elements_of_rows(at, number, part, x, part[0].T @ x, noise.T @ (x * x))
            few = part[: FEW + 1]
            yield from self._lines(at, number, 0, few, x @ wide.T)
            yield from self._lines(at, number, 1, few @ wide, x)
        for number, _, part in self._joined(at, 1):
            each = part.sum(axis=1)
            yield from self._elements(at, number, each[0], np.mean(each[1:] ** 2, axis=0))

    def _joined(self, at: Place, axes: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """A product's weights (2 axes) or biases (1), whose results are joined: which param, it, and its columns."""
        start = 0
        for number, param in enumerate(self.search.params(at)):
            if param.ndim == axes:
                yield number, param, self.of[at][..., start : start + len(param)]
                start += len(param)

    def _elements(self, at: Place, number: int, own: np.ndarray, square: np.ndarray) -> Iterator[Element]:
        for flat in self._largest(own * own / square):
            index = tuple(int(i) for i in np.unravel_index(flat, own.shape))
            yield Element(self._share(float(own[index]), float(square[index])), at, number, index)

    def _elements_of_rows(
        self, at: Place, number: int, back: np.ndarray, x: np.ndarray, own: np.ndarray, square: np.ndarray
    ) -> Iterator[Element]:
        """`square` takes each token's effect as one by itself, which attention mixes: it finds the rows that are worth
        asking, of which each element's is then taken over all tokens."""
        gains = own * own / square
        for row in dict.fromkeys(i // gains.shape[1] for i in self._largest(gains)):
            of_row = np.mean((back[1:, :, row] @ x) ** 2, axis=0)
            for column in self._largest(own[row] ** 2 / of_row, _MOST_OF_ROW):
                share = self._share(float(own[row, column]), float(of_row[column]))
                yield Element(share, at, number, (row, column))

    def _lines(self, at: Place, number: int, axis: int, back: np.ndarray, y: np.ndarray) -> Iterator[Line]:
        """Rows of a weight move its result's columns, its columns those of what it is given: `y` `[tokens, lines]`."""
        noise, lines = np.mean(back[1:] ** 2, axis=0), np.arange(y.shape[1])
        own, square = np.sum(back[0] * y, axis=0), np.sum(noise * y * y, axis=0)
        # A large change does more or less than its derivative says: what counts is its direction.
        for i in self._largest(np.where(own < 0, own * own / square, 0)):
            share = self._share(float(-own[i]), float(square[i]))
            yield from (Line(share, at, number, axis, i, factor=factor) for factor in (0.0, -1.0))
        if len(lines) > _MOST_LINES:
            return
        copied = back[0].T @ y - own[:, None]  # of line i as line k
        squares = noise.T @ (y * y) - 2 * ((noise * y).T @ y) + square[:, None]
        for swapped in (False, True):
            if swapped:
                copied, squares = np.triu(copied + copied.T, 1), squares + squares.T
            gains = np.where((copied > 0) & (squares > 0), copied * copied / squares, 0)
            gains[lines, lines] = 0
            for flat in self._largest(gains):
                one, other = divmod(flat, len(lines))
                share = self._share(float(copied[one, other]), float(squares[one, other]))
                yield Line(share, at, number, axis, one, other, swapped)

    def _largest(self, gains: np.ndarray, most: int = _MOST) -> Iterator[int]:
        """Where the largest are in the flat array."""
        flat = np.where(np.isfinite(gains), gains, 0.0).reshape(-1)
        for i in np.argpartition(-flat, min(most, flat.size) - 1)[:most]:
            if flat[i] > 0:
                yield int(i)


def sensitivity_of(
    search: Tried, probes: int, native: np.ndarray | None = None, most: int = _MOST_TOKENS
) -> Sensitivity | None:
    """How a tensor differs from the right value, or from a `native` one, carried back with `probes` random vectors, or
    fewer; of the first `most` tokens, or as many as there is room for. None where too few of them were recorded."""
    each = 4 * search.elements / max(search.count, 1)
    tokens = min(search.count, most, int(_MOST_BYTES / each / (FEW + 1)))
    fits = tokens > 0 if search.count else each * (FEW + 1) < _MOST_BYTES
    if not fits or not search.ask_at_most(tokens):
        return None
    room = int(_MOST_BYTES / each / max(tokens, 1)) - 1
    value = search.expected if native is None else search.first(native, search.oracle.stage.shape)
    return Sensitivity(search, value, max(FEW, min(probes, room)))


def _added(before: np.ndarray | None, own: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With what another reader of a value has carried back; of its last tokens alone, the others 0."""
    if own.shape[1:] != shape:
        whole = np.zeros((len(own), *shape), own.dtype)
        whole[:, -own.shape[1] :] = own
        own = whole
    return own if before is None else before + own
