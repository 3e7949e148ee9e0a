"""The calibrate command: run every stage of both paths on a backend, and measure its rounding against the oracle."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from stages.jobs.synth import config_json, random_tensor
from stages.oracle.bounds import RMS_COUNT, Lambdas
from stages.oracle.verdict import Oracle, Verdict, consult, measure
from stages.progress import Progress
from stages.run import calibration
from stages.run.calibration import Calibration
from stages.run.children import run_sides
from stages.run.forward import Forwarder, oracles, part, recorded_inputs
from stages.run.replay import Replayer
from stages.spec.backend import BOTH, SIDES, Backend, Loader
from stages.spec.config import ModelConfig
from stages.spec.families import parse_config
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask

_ONE = Lambdas(dict.fromkeys(Noise, 1.0))
# Preset, tokens and seed: products over K of 64 to 4,864, softmax over 1 to 500 keys; one token, where libraries take
# other kernels; both families. The vocabulary is cut to one chunk: more columns are more of the same sums.
FORWARDS = (
    ("tiny", 1, 0),
    ("tiny", 64, 1),
    ("tiny", 500, 2),
    ("qwen3-0.6b", 1, 0),
    ("qwen3-0.6b", 64, 0),
    ("qwen2.5-0.5b", 16, 1),
)
_VOCAB = 4096
# Rows, columns and seed of replayed weights: K of 64 and of 1,024, tall, wide and square.
REPLAYS = ((192, 64, 0), (64, 64, 1), (64, 192, 2), (2048, 1024, 0))


class _Random:
    """The weights of a synthesized model, each made when first read."""

    def __init__(self, config: ModelConfig, seed: int):
        self._make = functools.cache(lambda name: random_tensor(config, name, seed))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._make(name)[start:stop]


class Measured:
    """Largest error / bound and its RMS per noise kind, at lambda 1, over everything added."""

    def __init__(self) -> None:
        self.seen: dict[Noise, float] = {}
        self.rms: dict[Noise, float] = {}

    def add(self, parts: Iterator[tuple[Oracle, np.ndarray]]) -> None:
        """Add one stage's output, in parts with an oracle each."""
        squares, count, kind = 0.0, 0, Noise.EXACT
        for oracle, observed in parts:
            judged, kind = measure(oracle, observed), oracle.stage.noise
            failed = judged.verdict is Verdict.BUG and kind is Noise.EXACT  # wrong by half an ulp is wrong
            worst = np.inf if failed else judged.ratio
            self.seen[kind] = max(self.seen.get(kind, 0.0), worst)
            squares, count = squares + judged.squares, count + judged.count
        if count >= RMS_COUNT and kind is not Noise.EXACT:
            self.rms[kind] = max(self.rms.get(kind, 0.0), float(np.sqrt(squares / count)))


def calibrate_one(backend: Backend, progress: Progress) -> dict[str, Any]:
    """Measure one backend in this process and keep the result; the `svf.calibrate/1` document."""
    measured, replayer = Measured(), Replayer(backend)
    for number, (rows, columns, seed) in enumerate(REPLAYS):
        progress(f"{backend.name} replay of {rows} x {columns}", number / len(REPLAYS) / 2)
        measure_replay(replayer, (rows, columns), seed, measured)
    for number, (preset, tokens, seed) in enumerate(FORWARDS):
        progress(f"{backend.name} {preset}, {tokens} tokens", 0.5 + number / len(FORWARDS) / 2)
        measure_forward(backend, preset, tokens, seed, measured)
    facts = {k: v for k, v in calibration.facts_of(backend).items() if k != calibration.FACT}
    found = Calibration(calibration.today(), measured.seen, measured.rms)
    return document([calibration.document(backend.name, facts, found, calibration.store(facts, found))])


@dataclass(frozen=True)
class CalibrateCommand:
    """What `svf calibrate` was asked."""

    job: ClassVar[str] = "calibrate"

    backend: str = BOTH
    device: str = "cpu"


def calibrate(command: CalibrateCommand, load: Loader, progress: Progress) -> dict[str, Any]:
    """Measure as asked; each of both backends in a process of its own."""
    if command.backend != BOTH:
        return calibrate_one(load(command.backend, command.device), progress)
    documents = run_sides({name: replace(command, backend=name) for name in SIDES}, progress)
    return document([backend for one in documents for backend in one["backends"]])


def document(backends: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole `svf.calibrate/1` document."""
    faulty = any(backend["faults"] for backend in backends)
    return {
        "schema": calibration.SCHEMA,
        "outcome": "faulty" if faulty else "calibrated",
        "safety": calibration.SAFETY,
        "cap": calibration.CAP,
        "backends": list(backends),
    }


EXIT_CODES = {"calibrated": 0, "faulty": 1}


def measure_forward(backend: Backend, preset: str, tokens: int, seed: int, measured: Measured) -> None:
    """Add every stage of one layer of a synthesized model, each from the inputs that it had."""
    raw = {**config_json(preset, "float32"), "num_hidden_layers": 1, "vocab_size": _VOCAB}
    config = parse_config({**raw, "layer_types": raw["layer_types"][:1]}, f"preset {preset}")
    weights = _Random(config, seed)
    forwarder = Forwarder(backend, config, weights, dtype="float32")
    ids = np.random.default_rng((seed, tokens)).integers(0, _VOCAB, tokens).tolist()
    recorded = {(r.layer, r.stage): r.array for r in forwarder.run(ids)}
    for (layer, name), observed in recorded.items():
        stage = forwarder.path.at((layer, name))
        inputs = recorded_inputs(forwarder.path, stage, recorded, ids, layer, config.num_hidden_layers)
        assert inputs is not None
        parts = oracles(forwarder.path, config, stage, inputs, weights, layer, _ONE)
        measured.add((oracle, part(observed, where)) for where, oracle in parts)


def measure_replay(replayer: Replayer, shape: tuple[int, int], seed: int, measured: Measured) -> None:
    """Add every stage of one random weight's replay; its singular values fall as those of trained weights do."""
    rng, rank = np.random.default_rng((seed, *shape)), min(shape)
    u, v = (rng.standard_normal((n, rank), np.float32) * np.float32(n**-0.5) for n in shape)
    s = (np.arange(1, rank + 1) ** -0.5 * 8).astype(np.float32)
    offsets = rng.uniform(-0.17, 0.17, rank).astype(np.float32)
    task = ReplayTask(
        "random", shape, lambda i, j: u[i:j], s, v, offsets, lambda i, j: (u[i:j] * s) @ v.T, layout="torch_v"
    )
    for chunk in replayer.run(task):
        for name, observed in chunk.values.items():
            stage = REPLAY[name]
            arguments = chunk.arguments(stage)
            assert arguments is not None
            options = {option: task.options[option] for option in stage.options}
            measured.add(iter([(consult(stage, arguments, options, _ONE), observed)]))
