"""The last bits: what the installed backends' own functions give of a recorded run's inputs, each in a child.

A recipe in numpy cannot know another library's exponential. Where a backend, run stage by stage from the recorded
inputs, gives the recorded bytes, every bit is explained, and the row is `exact`. Of what is left, float32 products and
norms are summed in the orders that libraries sum in (recipes/orders.py), in a child that needs no backend. Nothing
else changes: other bits prove nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from stages.errors import SvfError
from stages.files.forward_dump import Place, parse_key
from stages.files.kinds import Recording, one_recording
from stages.files.replay_recorded import open_side
from stages.files.scratch import scratch_folder
from stages.judge.arithmetic import Arithmetic, Step, arithmetics, edited, program
from stages.judge.forward import is_small, oracles_of, threads
from stages.judge.forward_pair import Named
from stages.judge.opened import open_forward
from stages.judge.recorded_run import ForwardRun, inputs_of
from stages.judge.rows import Row
from stages.judge.spans import span_of
from stages.judge.through import Search
from stages.oracle.verdict import Oracle, Verdict, canonical, consult, judged_part
from stages.progress import Progress, Report
from stages.recipes.orders import Asked
from stages.recipes.recipe import Class
from stages.run.calibration import facts_of
from stages.run.children import document_of, run_child
from stages.run.forward import Forwarder, part
from stages.run.replay import Replayer, chunk_plan, default_chunk_rows
from stages.spec.backend import SIDES, Backend, Loader
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage

# What is asked after the backends.
ORDERS = "orders"
# Of one stage: `bits`, elements given to the last bit, and the `recipe` in words.
Given = dict[str, Any]
# What a stage should give and what was recorded, by columns or by rows.
Parts = Iterable[tuple[Oracle, np.ndarray]]


@dataclass(frozen=True)
class NativesRequest:
    """The rows of a recorded run that a backend's own functions are asked for, and the run as `svf audit` names it.

    `backend` may be `ORDERS`, which asks the orders of summation. `failing` are those of `keys` of which it is asked
    what would give every byte. `settled` is a file that is there once another backend gave every bit.
    """

    job: ClassVar[str] = "natives"

    path: Path
    backend: str
    keys: tuple[str, ...]
    failing: tuple[str, ...] = ()
    settled: Path | None = None
    model: str | None = None
    tokens: str | None = None
    tokens_file: Path | None = None
    prompt: str | None = None
    adapted: Path | None = None
    layout: str = "declared"
    components: Path | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is left to be asked."""
        return self.settled is not None and self.settled.exists()


def ask(rows: Sequence[Row], asked: NativesRequest, progress: Report, named: Callable[[Row], bool]) -> None:
    """Rows that are within rounding, in place: `exact` where a backend gives every bit; `backend` of `asked` is open.

    A backend that is not installed, or cannot run them, is told in the rows' notes. `named`: whether one thing is known
    to be wrong with a row that fails.
    """
    progress(f"asking {' and '.join(SIDES)} for the last bits", 0.0)
    failing = [row["key"] for row in rows if _open(row) and not _passes(row)]
    through = [row for row in rows if row.get("through")]
    recorded = [row for row in through if not row.get("recovered")]
    if len(recorded) == 1:  # no other tells which way is the engine's
        (row,) = recorded
        if any(not _passes(one) and named(one) for one in through):
            rows = [other for other in rows if other is not row]
        # Of one tensor alone 16 bits tell little: what would give every byte is asked where it passes, too.
        elif _open(row) and stored_dtype(row["dtype"]).itemsize < 4:
            failing.append(row["key"])
    _ask(rows, replace(asked, failing=tuple(failing)), SIDES)
    progress(f"asking {ORDERS} for the last bits", 0.8)
    wide = [row for row in rows if stored_dtype(row.get("dtype") or "float32").itemsize == 4]  # orders tell no others
    _ask([row for row in wide if not row.get("through")], asked, (ORDERS,))


def _ask(rows: Sequence[Row], asked: NativesRequest, names: Sequence[str]) -> None:
    """Rows asked of several at once, which wait for libraries more than for each other."""
    rows = [row for row in rows if _open(row)]
    if not rows:
        return
    request = replace(asked, keys=tuple(row["key"] for row in rows))

    through = [row for row in rows if row.get("through")]

    def document(name: str, settled: Path) -> dict[str, Any]:
        try:
            child = run_child(replace(request, backend=name, settled=settled))
            found: dict[str, Any] = document_of(name, child)
        except SvfError as error:
            return {"stages": {}, "why": str(error)}
        if through and _whole(through, found) == len(through):
            settled.touch()
        return found

    with scratch_folder("natives") as folder, ThreadPoolExecutor(len(names)) as pool:
        asked_each = functools.partial(document, settled=folder / "settled")
        documents = dict(zip(names, pool.map(asked_each, names), strict=True))
    # Once a backend gives some of the tensors to the last byte, what it does not give is not another's.
    known = False
    for name in sorted(names, key=lambda name: -_whole(rows, documents[name])):
        for row in rows:
            if _open(row) and not (known and row.get("through")):
                _take(row, name, documents[name])
        known |= _whole(rows, documents[name]) > 0


def _whole(rows: Sequence[Row], document: dict[str, Any]) -> int:
    """Tensors behind hidden stages of which a backend gave every byte, as they are or with one thing changed."""
    found = ((row, document["stages"].get(row["key"], {})) for row in rows if row.get("through"))
    return sum("proved" in given or given.get("bits") == row["elements"] for row, given in found)


def _passes(row: Row) -> bool:
    return Verdict(row["verdict"]).passes


def _open(row: Row) -> bool:
    if row.get("proved") or row.get("recovered"):
        return False
    if row.get("through"):  # what fails there is asked too: with one thing changed, all bytes may be there
        return row["verdict"] not in (Verdict.EXACT, Verdict.SHAPE, Verdict.NONFINITE)
    return row["verdict"] == Verdict.ROUNDING and row.get("bits") != row.get("elements")


def _take(row: Row, name: str, document: dict[str, Any]) -> None:
    """What one backend gave, where it explains more than is explained."""
    found = document["stages"].get(row["key"])
    if found is None and (name in SIDES or "why" in document):
        said = f"{name} could not be asked: {document.get('why', 'its inputs were not recorded')}"
        row["note"] = "; ".join(filter(None, (row.get("note"), said)))
    elif found is not None and "proved" in found:
        row |= {"verdict": Verdict.BUG.value, "hint": found["proved"], "proved": True, "class": Class.OTHER.value}
        row |= {"bits": row["elements"], "recipe": found["proved"]}
    elif found is not None and found["bits"] > (row.get("bits") or 0):
        if _passes(row) or found["bits"] == row["elements"]:
            row |= {**found, "class": Class.EQUIVALENT.value}
        if row["bits"] == row["elements"]:
            row["verdict"] = Verdict.EXACT.value


def natives(request: NativesRequest, load: Loader, progress: Progress) -> dict[str, Any]:
    """The child's side: how many elements of each stage are given to the last bit, and by what, in words."""
    replayed = one_recording(request.path) is Recording.REPLAY
    with ExitStack() as stack:
        if request.backend == ORDERS:
            found = _in_orders(_replay_oracles if replayed else _forward_oracles, request, stack, progress)
        else:
            backend = load(request.backend, "cpu", "native")
            by = f"as {request.backend} {facts_of(backend).get(request.backend, '')} computes it on this machine"
            given = (_replayed if replayed else _forward)(request, backend, stack, progress)
            found = {key: {"bits": bits, "recipe": by} for key, bits in given if bits is not None}
            if not replayed:
                found |= _through(request, backend, stack, progress)
    return {"schema": "svf.natives/1", "stages": found}


def _in_orders(
    oracles: Callable[..., Iterator[tuple[str, Parts]]], request: NativesRequest, stack: ExitStack, progress: Progress
) -> dict[str, Given]:
    asked, found = Asked(), {}
    for key, parts in oracles(request, stack, progress):
        all_parts = list(parts)
        order = asked.of_all(all_parts)
        if order is not None:
            bits = sum(observed.size for _, observed in all_parts)
            found[key] = {"bits": bits, "recipe": f"summed in float32: {order}"}
    return found


def _places(request: NativesRequest, stack: ExitStack, progress: Progress) -> Iterator[tuple[str, Place, ForwardRun]]:
    named = Named(request.model, request.tokens, request.tokens_file, request.prompt)
    run = open_forward(request.path, named, request.adapted, request.layout, stack, progress)
    for number, key in enumerate(request.keys):
        progress(f"{request.backend}: {key}", number / len(request.keys))
        place = parse_key(key)
        assert place is not None
        yield key, place, run


def _forward_oracles(request: NativesRequest, stack: ExitStack, progress: Progress) -> Iterator[tuple[str, Parts]]:
    for key, place, run in _places(request, stack, progress):
        observed = run.read(place)
        yield key, ((oracle, part(observed, columns)) for columns, oracle in oracles_of(place, run, observed))


def _forward(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, int | None]]:
    forwarder = None
    for key, place, run in _places(request, stack, progress):
        if span_of(place, run).hidden:
            continue
        assert run.path is not None
        assert run.config is not None
        assert run.weights is not None
        forwarder = forwarder or Forwarder(backend, run.config, run.weights, dtype=run.path.activations)
        stage = run.path.at(place)
        yield key, _alike(stage, forwarder.isolate(stage.name, inputs_of(place, run), place[0]), run.read(place))


def _through(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Of what was judged through hidden stages: the bits that the best of the backend's ways gives, which is learned
    where it is right; and a hypothesis with which it gives all of them."""
    places = [one for one in _places(request, stack, progress) if span_of(one[1], one[2]).hidden]
    if places and is_small(places[0][2]):
        stack.enter_context(threadpool_limits(1))  # a framework's threads, too, take longer to meet than to compute
    sizes = {key: run.read(at).size for key, at, run in places}
    ways, bits = list[Arithmetic](), list[dict[str, int | None]]()
    for way in arithmetics(backend):
        if request.over or (way.by_token and any(found[key] == sizes[key] for found in bits for key in sizes)):
            break  # what one call gives needs no call of each token
        decodes = not way.by_token or _begins(way, places) or any(_gives_rows(other, places) for other in ways)
        ways.append(way)
        bits.append(_given(way, places) if decodes else dict.fromkeys(sizes))
    # The way of most tensors that are right to the last byte is the engine's, and is asked first where one is not.
    order = sorted(range(len(ways)), key=lambda i: -sum(bits[i][key] == sizes[key] for key in sizes))
    known = [i for i in order if any(bits[i][key] == sizes[key] for key in sizes)]
    if not ways:
        return {}
    found: dict[str, dict[str, Any]] = {}
    until = time.process_time() + _SECONDS if known else _MOST_SECONDS
    least = 0.0 if known else _LEAST_SECONDS
    for key, at, run in places:
        best = max(order, key=lambda i: bits[i][key] or 0)
        most = bits[best][key] or 0
        if most:
            found[key] = {"bits": most, "recipe": ways[best].words}
        # Where an engine is right and no way gives its bytes, none gives those of a mistake.
        worth = bool(known) or (key in request.failing and len(request.failing) >= len(places))
        if most < sizes[key] and worth and time.process_time() + least < until and not request.over:
            progress(f"{request.backend}: what is wrong in {key}", 0.5)
            proved = _proved([ways[i] for i in known or order if not ways[i].whole], at, run, until)
            if proved is not None:
                found[key] = {"proved": proved}
    return found


# Seconds of processor that are spent on hypotheses, with compiling them; where no way is known to be the engine's, all
# that is done takes so many at most, and with less than so many left none is tried.
_SECONDS, _MOST_SECONDS, _LEAST_SECONDS = 2.0, 6.0, 2.0
# After one that gives every byte, those are tried that explain at least so much of what it does, and so many at most:
# others may give every byte, too.
_AS_MUCH, _AFTER = 0.7, 12


def _proved(ways: Sequence[Arithmetic], at: Place, run: ForwardRun, until: float) -> str | None:
    """The hypotheses with which one of the ways gives every byte, in words."""
    observed = run.read(at)
    columns, oracle = next(oracles_of(at, run, observed))
    steps = program(at, run)
    for way in ways:
        way.start()
    # What each gives of the right program is kept, and not computed again; a decode stops where it gives other bytes.
    given = [None if way.by_token and number else _native(way, steps, run, observed) for number, way in enumerate(ways)]
    native = next((value for value in given if value is not None), None)
    if native is None:
        return None
    said: list[str] = []
    least, after, last = 0.0, 0, ""
    with np.errstate(all="ignore"), threads(run):
        right = part(native, columns).astype(np.float64)
        for gain, hypothesis in Search(at, run, oracle, part(observed, columns)).edited(right):
            assert hypothesis.edits is not None
            if time.process_time() > until or gain < least or after > _AFTER:
                break
            if hypothesis.about and hypothesis.about == last:
                continue  # a likelier number of that element gave all bytes
            changed = edited(steps, hypothesis.edits)
            for way in ways:
                if _gives(way, changed, at, run, observed):
                    said.append(hypothesis.words)
                    last, least, ways = hypothesis.about, max(least, _AS_MUCH * gain), [way]
                    break
            after += bool(said)
    if not said:
        return None
    return f"{', or '.join(dict.fromkeys(said))}: then every byte is there, {ways[0].words}"


def _begins(way: Arithmetic, places: Sequence[tuple[str, Place, ForwardRun]]) -> bool:
    """Whether a decode gives the first token of some tensor to the last bit."""
    for _, at, run in places:
        way.start()
        observed = run.read(at)
        first = next(way.calls(program(at, run), run, len(observed)), None)
        if first is not None and np.array_equal(first, observed[: len(first)]):
            return True
    return False


def _gives_rows(way: Arithmetic, places: Sequence[tuple[str, Place, ForwardRun]]) -> bool:
    """Whether a way of one call gives some token of some tensor to the last bit, as those of a prompt would be."""
    for _, at, run in places:
        way.start()
        observed = run.read(at)
        value = None if way.by_token else _native(way, program(at, run), run, observed)
        if value is not None and value.shape == observed.shape:
            alike = (value == observed).reshape(len(value), -1).all(axis=1)
            if alike.any():
                return True
    return False


def _given(way: Arithmetic, places: Sequence[tuple[str, Place, ForwardRun]]) -> dict[str, int | None]:
    """How many elements of each of some tensors a way gives to the last bit."""

    def values() -> Iterator[tuple[np.ndarray | None, np.ndarray]]:
        for _, at, run in places:
            way.start()
            yield _native(way, program(at, run), run, run.read(at)), run.read(at)

    def bits(found: Iterable[tuple[np.ndarray | None, np.ndarray]]) -> dict[str, int | None]:
        return {
            key: None if value is None or run.path is None else _alike(run.path.at(at), value, observed)
            for (key, at, run), (value, observed) in zip(places, found, strict=True)
        }

    alone = list(values())
    best, chosen, least = bits(alone), 0, way.least_at_once(alone)
    # A row may come out right by chance: the first tokens may be a few more than its last wrong one says.
    for at_once in range(least, least + _CHANCE) if least else ():
        way.at_once = at_once
        found = bits(values())
        if sum(count or 0 for count in found.values()) > sum(count or 0 for count in best.values()):
            best, chosen = found, at_once
    way.at_once = chosen
    return best


# Rows in sequence that may be given to the last bit by another way than the engine's.
_CHANCE = 6


def _gives(way: Arithmetic, steps: Sequence[Step], at: Place, run: ForwardRun, observed: np.ndarray) -> bool:
    """Whether a way gives every byte of what was recorded; what comes after its first other byte is not computed."""
    assert run.path is not None
    start = 0
    try:
        for value in way.calls(steps, run, len(observed)):
            own = observed[start : start + len(value)]
            if value.dtype.itemsize > own.dtype.itemsize:
                return False
            if _alike(run.path.at(at), value.astype(own.dtype), own) != own.size:
                return False
            start += len(value)
    except (ValueError, TypeError, RuntimeError):  # a framework's, of operands whose shapes do not go together
        return False
    return start == len(observed)


def _native(way: Arithmetic, steps: Sequence[Step], run: ForwardRun, observed: np.ndarray) -> np.ndarray | None:
    """What a way gives of what was recorded, as it is stored there."""
    try:
        calls = list(way.calls(steps, run, len(observed)))
    except (ValueError, TypeError, RuntimeError):  # as above
        return None
    if not calls or calls[0].dtype.itemsize > observed.dtype.itemsize:
        return None
    return np.concatenate(calls).astype(observed.dtype)


def _chunks(
    request: NativesRequest, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, Stage, dict[str, Any], Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]]]:
    """Of each stage asked for: its options, and the arguments and the recorded values of each chunk."""
    side = stack.enter_context(open_side(request.path, request.components))
    for number, key in enumerate(request.keys):
        progress(f"{request.backend}: {key}", number / len(request.keys))
        safe, _, name = key.removeprefix("tensor.").rpartition(".")
        tensor, stage = side.tensors[safe], REPLAY[name]
        plan = chunk_plan(tensor.rows, default_chunk_rows(tensor.shape))
        parts = ((chunk.arguments(stage), chunk.values.get(name)) for chunk in tensor.chunks(plan))
        have = ((tuple(given), values) for given, values in parts if given is not None and values is not None)
        yield key, stage, {"layout": tensor.layout, "transpose": tensor.transpose}, have


def _replay_oracles(request: NativesRequest, stack: ExitStack, progress: Progress) -> Iterator[tuple[str, Parts]]:
    for key, stage, options, parts in _chunks(request, stack, progress):
        own = {name: options[name] for name in stage.options}
        yield key, ((consult(stage, given, own), values) for given, values in parts)


def _replayed(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, int | None]]:
    replayer = Replayer(backend)
    for key, stage, options, parts in _chunks(request, stack, progress):
        bits = (_alike(stage, replayer.isolate(stage, given, options), values) for given, values in parts)
        yield key, sum(count or 0 for count in bits)


def _alike(stage: Stage, native: np.ndarray, observed: np.ndarray) -> int | None:
    """Elements with the same bits, as far as they are judged; None of another shape or dtype."""
    if native.shape != observed.shape or native.dtype != observed.dtype:
        return None
    one, other = (canonical(judged_part(stage, a)) for a in (native, observed))
    return int(np.count_nonzero(one == other))
