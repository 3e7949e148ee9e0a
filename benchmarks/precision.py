"""What each precision costs, as a ratio to native: replay of one 3072x1024 tensor, forwards of two small models.

python benchmarks/precision.py [--rounds N] [--tokens N] [--only replay,tiny,0.6b]

One run: modes and backends take turns, each in a process of its own with everything compiled before; the least of
N rounds counts. Targets: reference at most 3, exact at most 12 times native. On a machine that others use, look at the
ratio of CPU seconds, on one CPU (`taskset -c 0`): elapsed time then tells of the others, and waiting threads spin.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from stages.commands.backends import load_backend
from stages.jobs.synth import config_json
from stages.run.forward import Forwarder, LoadedWeights
from stages.run.precision import MODES, precision_fields
from stages.run.replay import Replayer
from stages.spec.config import LM_HEAD, ModelConfig
from stages.spec.families import parameter_shapes, parse_config
from stages.spec.values import ReplayTask

BACKENDS = ("torch", "jax")
WORKLOADS = ("replay", "tiny", "0.6b")


class RandomWeights:
    """Weights of `config`, normal with a standard deviation of 1/sqrt(width); norms about 1."""

    def __init__(self, config: ModelConfig):
        rng = np.random.default_rng(0)
        self.arrays = {}
        for name, shape in parameter_shapes(config).items():
            if name == LM_HEAD and config.tie_word_embeddings:
                continue
            normal = rng.standard_normal(shape, np.float32)
            self.arrays[name] = np.exp(0.3 * normal) if len(shape) == 1 else normal * np.float32(shape[-1] ** -0.5)
        self.arrays.setdefault(LM_HEAD, self.arrays["model.embed_tokens.weight"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.arrays[name][start:stop]


def replay_task(rows: int, cols: int) -> ReplayTask:
    """Factors of the size of a real weight's; orthogonal ones cost the same."""
    rng = np.random.default_rng(0)
    u, v = (rng.standard_normal((n, cols), np.float32) / np.float32(np.sqrt(n)) for n in (rows, cols))
    s = np.sort(rng.uniform(0.1, 4, cols).astype(np.float32))[::-1].copy()
    source = ((u * s) @ v.T).astype(np.float32)
    offsets = (0.02 * rng.standard_normal(cols)).astype(np.float32)
    return ReplayTask("weight", (rows, cols), lambda a, z: u[a:z], s, v, offsets, lambda a, z: source[a:z], "torch_v")


def config_of(workload: str, dtype: str) -> ModelConfig:
    """The tiny model, or two layers of the 0.6B one with its whole LM head."""
    config = parse_config(config_json("tiny" if workload == "tiny" else "qwen3-0.6b"), workload)
    layers = config.num_hidden_layers if workload == "tiny" else 2
    return dataclasses.replace(config, num_hidden_layers=layers, dtype=dtype)


def work_of(workload: str, backend: object, tokens: int) -> Callable[[], object]:
    """One run of a workload, whole."""
    if workload == "replay":
        replayer, task = Replayer(backend), replay_task(3072, 1024)
        return lambda: [chunk.stop for chunk in replayer.run(task)]
    config = config_of(workload.split()[0], workload.split()[1])
    weights = LoadedWeights(RandomWeights(config), config)
    forwarder = Forwarder(backend, config, weights)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, tokens).tolist()
    return lambda: [result.stage for result in forwarder.run(ids)]


def serve(name: str, mode: str, workload: str, tokens: int) -> None:
    """A process of one backend and mode: a line in, one timed run, its seconds out; at the end what was flagged."""
    backend = load_backend(name, "cpu", mode)
    work = work_of(workload, backend, tokens)
    work()
    print(json.dumps(precision_fields(backend)), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter(), time.process_time()
        work()
        print(json.dumps((time.perf_counter() - start[0], time.process_time() - start[1])), flush=True)


def measure(workload: str, name: str, rounds: int, tokens: int) -> None:
    """Time all modes of one backend in turns and print them."""
    children = {}
    for mode in MODES:
        command = [sys.executable, __file__, "--serve", name, mode, workload, "--tokens", str(tokens)]
        children[mode] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found = {mode: json.loads(child.stdout.readline()) for mode, child in children.items()}
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, child in children.items():
            child.stdin.write("\n")
            child.stdin.flush()
            seconds[mode].append(tuple(json.loads(child.stdout.readline())))
    for child in children.values():
        child.stdin.close()
        child.wait()
    least = {mode: [min(times) for times in zip(*pairs, strict=True)] for mode, pairs in seconds.items()}
    ratios = "  ".join(_of_native(mode, least[mode], least["native"]) for mode in MODES)
    exact = found["exact"]
    share = f"1 in {exact['elements'] // exact['flagged']:,}" if exact["flagged"] else "none"
    print(f"{workload:14} {name:6} {ratios}  flagged {share}, {exact['corrected']} changed", flush=True)


def _of_native(mode: str, least: list[float], native: list[float]) -> str:
    elapsed, cpu = (mine / its for mine, its in zip(least, native, strict=True))
    return f"{mode} {least[0]:.3f} s ({elapsed:.1f}x, CPU {cpu:.1f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve, given.tokens)
        return
    for workload in given.only.split(","):
        kinds = [workload] if workload == "replay" else [f"{workload} {dtype}" for dtype in ("float32", "bfloat16")]
        for kind in kinds:
            for name in BACKENDS:
                measure(kind, name, given.rounds, given.tokens)


if __name__ == "__main__":
    main()
