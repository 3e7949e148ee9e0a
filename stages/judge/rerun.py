"""Settling a `suspect`: the stage is run again from its recorded inputs on the backend that wrote the dump.

Natively, and in reference precision, in a process of its own. If the function is right in reference precision and the
recorded bytes come again, bits were lost (`precision`); otherwise something else was computed (`bug`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.errors import InputError
from stages.files.forward_dump import ForwardSide, parse_key
from stages.files.replay_recorded import open_side
from stages.judge.forward import oracles_of
from stages.judge.metrics import same_bits
from stages.judge.recorded_run import ForwardRun, inputs_of
from stages.judge.recorded_run import open_run as open_forward_run
from stages.judge.rows import Row
from stages.oracle.verdict import Oracle, Verdict, consult, judged_part, worst
from stages.progress import Progress
from stages.recipes.side import SideVerdict
from stages.run.calibration import FACT, facts_of
from stages.run.children import ChildResult, run_child
from stages.run.forward import Forwarder, part
from stages.run.replay import Replayer, chunk_plan, default_chunk_rows
from stages.spec.backend import Backend, Loader
from stages.spec.environment import AUTOTUNE, xla_flag, xla_flags
from stages.spec.replay import REPLAY

# One part of a stage: its oracle, what was recorded, and what the two runs gave.
Part = tuple[Oracle, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Recorded:
    """A dump that may be run again: what to give the child, and the facts that it recorded."""

    path: Path
    backend: str | None  # None: another program's
    facts: Mapping[str, str]
    positions: str = "all"
    source: Path | str | None = None  # components of a replay, model of a forward, where others than recorded

    @property
    def why_not(self) -> str | None:
        """Why its stages cannot be run again one by one; None when they can."""
        if self.backend is None:
            return "another program wrote it"
        if self.facts.get("jit") == "layer":
            return "its layers were compiled whole (--jit layer)"
        return "it holds the last position alone" if self.positions == "last" else None


def recorded_of(run: ForwardRun, model: str | None) -> Recorded:
    """A forward as `resolve_suspects` takes it; `model` is where the weights are, if not where the dump says."""
    backend = run.side.dump.backend if isinstance(run.side, ForwardSide) else None
    return Recorded(Path(run.side.label), backend, run.side.facts, run.positions, model)


@dataclass(frozen=True)
class RerunResult:
    """What running a stage again gave: whether the recorded bytes, and how reference precision is judged."""

    reproduced: bool
    reference: str
    reference_ratio: float
    bits: float  # -log2 of the recorded values' relative error


def resolve_suspects(rows: Sequence[Row], dump: Recorded, letter: str = "") -> None:
    """Settle the suspect rows of one side (`a`, `b`; of an audit, ``), in place; without a reason to, nothing runs."""
    end = f"_{letter}" if letter else ""
    suspects = [row for row in rows if row.get(f"verdict{end}") == Verdict.SUSPECT and not row.get("through")]
    if not suspects:
        return
    if dump.why_not is not None:
        for row in suspects:
            _add_hint(row, end, f"not run again: {dump.why_not}")
        return
    child = _child([row["key"] for row in suspects], dump)
    document = child.document
    for row in suspects:
        if document is None:
            why = child.error or f"it ended with {child.returncode}; its message stands above"
            _add_hint(row, end, f"the {dump.backend} backend could not run it again: {why}")
            continue
        again = RerunResult(**document["stages"][row["key"]])
        verdict, hint = decide(again, dump.facts, document["facts"])
        row[f"verdict{end}"] = verdict.value
        _add_hint(row, end, hint)
        if letter and row["verdict"] == Verdict.SUSPECT:
            sides = (row["verdict_a"], row["verdict_b"])
            row["verdict"] = worst(*(Verdict(side) for side in sides if side is not None)).value


def _add_hint(row: Row, end: str, hint: str) -> None:
    row[f"hint{end}"] = "; ".join(filter(None, (row.get(f"hint{end}"), hint)))


def decide(again: RerunResult, recorded: Mapping[str, str], now: Mapping[str, str]) -> tuple[Verdict, str]:
    """What a suspect is, and why.

    Other versions, threads or settings than recorded may rightly give other bytes, and so may a GPU, whose kernels
    are chosen anew in each process: then it stays `suspect`, unless the function is wrong in reference precision, which
    nothing excuses.
    """
    if not Verdict(again.reference).passes:
        return Verdict.BUG, (
            f"run again in reference precision it is {again.reference_ratio:.3g} times the bound from the oracle: "
            "the backend computes another function"
        )
    if again.reproduced:
        return Verdict.PRECISION, (
            f"the right function with about {again.bits:.1f} significant bits: run again it gives these bytes, and in "
            "reference precision the oracle's values"
        )
    changed = [
        f"{name} {recorded[name] or 'none'} then, {now[name] or 'none'} now"
        for name in now
        if name in recorded and name not in (FACT, "jit") and recorded[name] != now[name]
    ]
    if changed:
        return Verdict.SUSPECT, f"run again it gives other bytes, but elsewhere: {', '.join(changed)}"
    if recorded.get("device", "cpu") != "cpu" or now.get("device", "cpu") != "cpu":
        return _other_bytes_of_a_gpu(recorded, now)
    return Verdict.BUG, (
        "run again on the same versions it gives other bytes, within its bound: the program that wrote this dump "
        "was not this code"
    )


def _other_bytes_of_a_gpu(recorded: Mapping[str, str], now: Mapping[str, str]) -> tuple[Verdict, str]:
    """Where kernels are tuned, other bytes are no proof (openxla issue 37902: even of a plain sum)."""
    if recorded.get(AUTOTUNE) == now.get(AUTOTUNE) == "0":
        return Verdict.BUG, (
            f"run again on the same versions, both without autotuning ({AUTOTUNE} 0), it gives other bytes, within its "
            "bound"
        )
    remedy = f"; run both with XLA_FLAGS=--{AUTOTUNE}=0 to know" if AUTOTUNE in now else ""
    return Verdict.SUSPECT, (
        f"run again it gives other bytes, which proves nothing on a GPU: another process may take other kernels{remedy}"
    )


@dataclass(frozen=True)
class RerunRequest:
    """Which stages of a dump to run again, and on what."""

    job: ClassVar[str] = "rerun"

    dump: Path
    backend: str
    device: str
    precision: str
    jit: bool
    source: str | None
    keys: tuple[str, ...]


def _child(keys: Sequence[str], dump: Recorded) -> ChildResult:
    """How the child ended; without a document when it could not do it."""
    assert dump.backend is not None
    request = RerunRequest(
        dump=dump.path,
        backend=dump.backend,
        device=dump.facts.get("device", "cpu").partition(": ")[0],
        precision=dump.facts.get("precision", "native"),
        jit=dump.facts.get("jit") not in ("none", "False"),
        source=None if dump.source is None else str(dump.source),
        keys=tuple(keys),
    )
    return run_child(request, _environment(dump.facts))


def _environment(recorded: Mapping[str, str]) -> dict[str, str]:
    """What the child's environment takes from the dump's: that nothing was tuned. No other value of a file's is set."""
    if recorded.get(AUTOTUNE) != "0" or xla_flag(AUTOTUNE) == "0":
        return {}
    return {"XLA_FLAGS": f"{' '.join(xla_flags(os.environ.get('XLA_FLAGS', '')))} --{AUTOTUNE}=0".strip()}


def run_again(request: RerunRequest, load: Loader, _progress: Progress) -> dict[str, Any]:
    """The child's side: run the requested stages of a dump again."""
    options = {} if request.jit else {"jit": False}
    native = load(request.backend, request.device, request.precision, **options)
    reference = load(request.backend, request.device, "reference", **options)
    with ExitStack() as stack:
        of = _forward_parts if parse_key(request.keys[0]) else _replay_parts
        parts = of(request.dump, request.source, native, reference, stack)
        return {
            "schema": "svf.rerun/1",
            "stages": {key: asdict(compared(parts(key))) for key in request.keys},
            "facts": facts_of(native),
        }


def compared(parts: Iterator[Part]) -> RerunResult:
    """Sum up the parts of one stage."""
    reproduced, verdict, squares, total = True, SideVerdict(), 0.0, 0.0
    for oracle, observed, native, reference in parts:
        reproduced = reproduced and same_bits(observed, native)
        verdict.add(oracle, reference)
        error = (judged_part(oracle.stage, observed).astype(np.float64) - oracle.value).reshape(-1)
        value = oracle.value.reshape(-1)
        squares, total = squares + float(error @ error), total + float(value @ value)
    bits = float(-0.5 * np.log2(max(squares, 2.0**-1000) / max(total, 2.0**-1000)))
    return RerunResult(reproduced, verdict.verdict.value, verdict.ratio, bits)


def _forward_parts(
    path: Path, model: str | None, native: Backend, reference: Backend, stack: ExitStack
) -> Callable[[str], Iterator[Part]]:
    run = open_forward_run(path, model, stack)
    if run.path is None or run.config is None or run.weights is None:
        raise InputError(f"{path}: the model that it was made from is unavailable; give --model")
    dtype = run.path.activations
    both = [Forwarder(backend, run.config, run.weights, dtype=dtype) for backend in (native, reference)]

    def parts(key: str) -> Iterator[Part]:
        place = parse_key(key)
        assert place is not None
        assert run.path is not None
        stage, inputs = run.path.at(place), inputs_of(place, run)
        observed = run.side.read(place)
        one, other = (forwarder.isolate(stage.name, inputs, place[0]) for forwarder in both)
        for columns, oracle in oracles_of(place, run, observed):
            yield oracle, part(observed, columns), part(one, columns), part(other, columns)

    return parts


def _replay_parts(
    path: Path, components: str | None, native: Backend, reference: Backend, stack: ExitStack
) -> Callable[[str], Iterator[Part]]:
    side = stack.enter_context(open_side(path, Path(components) if components else None))
    both = [Replayer(backend) for backend in (native, reference)]

    def parts(key: str) -> Iterator[Part]:
        safe, _, name = key.removeprefix("tensor.").rpartition(".")
        tensor, stage = side.tensors[safe], REPLAY[name]
        options = {"layout": tensor.layout, "transpose": tensor.transpose}
        for chunk in tensor.chunks(chunk_plan(tensor.rows, default_chunk_rows(tensor.shape))):
            arguments = chunk.arguments(stage)
            if name not in chunk.values:
                continue
            if arguments is None:
                raise InputError(f"{path}: the operands of {key} are unavailable; give --components")
            one, other = (replayer.isolate(stage, arguments, options) for replayer in both)
            oracle = consult(stage, arguments, {option: options[option] for option in stage.options})
            yield oracle, chunk.values[name], one, other

    return parts
