"""What it costs to sum in another library's order, as a ratio to the native product, within one run.

    python benchmarks/order.py [--rows 3072] [--backend torch|jax|both] [--functions]

Each backend in a process of its own; the best of five interleaved runs. `steps` is the exact evaluation on the host,
for orders that no kernel keeps, over 64 rows and scaled up.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

COLS = TERMS = 1024
STEPPED_ROWS = 64
RUNS = 5
ORDERS = {"blocks of 192 (torch's)": "blocks(192, fma, left)", "blocks of 512 (JAX's)": "blocks(512, fma, left)"}


def best(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each function: the best of interleaved runs, the first of which is not counted."""
    seconds = dict.fromkeys(functions, float("inf"))
    for run in range(RUNS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if run:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure(name: str, rows: int) -> None:
    """Print the seconds and ratios of one backend, in this process."""
    from stages.commands.backends import load_backend
    from stages.order.ordered_backend import BLOCKED, OrderedBackend
    from stages.sums.evaluate import product
    from stages.sums.text import parse_order

    backend, stage = load_backend(name, "cpu"), "matmul_pre_norm"
    rng = np.random.default_rng(0)
    a, v = (rng.standard_normal((size, TERMS), np.float32) for size in (rows, COLS))
    left, right = backend.put(a), backend.put(v)
    native = backend.compile(lambda x, y: backend.replay[stage](x, y, layout="torch_v"))
    functions: dict[str, Callable[[], object]] = {"native": lambda: backend.get(native(left, right))}
    for label, text in ORDERS.items():
        ordered = OrderedBackend(backend, {(stage, TERMS): parse_order(text)}, text)
        functions[label] = lambda ordered=ordered: backend.get(ordered.product(stage, left, right.T))  # type: ignore[misc]
        functions[label]()
        assert ordered.how[stage, TERMS] == BLOCKED, f"{name} has no kernel that keeps {text}"
    seconds = best(functions)
    start = time.perf_counter()
    product(parse_order("lanes(8, fma, halves)"), a[:STEPPED_ROWS], v.T)
    seconds["step by step on the host"] = (time.perf_counter() - start) * rows / STEPPED_ROWS
    print(f"{name}, {rows} x {TERMS} times {TERMS} x {COLS}, float32")
    for label, value in seconds.items():
        print(f"  {label:28} {value:8.3f} s   {value / seconds['native']:7.2f} x native")


def functions() -> None:
    """Print how far apart the two libraries are in stages that hold a function, from the same float32 inputs."""
    from stages.commands.backends import load_backend

    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, TERMS), np.float32)
    angles = np.outer(np.arange(64), 1e6 ** (-np.arange(64) / 64)).astype(np.float32)
    table = {"attention_scaling": 1.0, "dtype": "float32"}
    cases: dict[str, tuple[tuple[np.ndarray, ...], dict[str, object]]] = {
        "attn_norm": ((x, np.ones(TERMS, np.float32)), {"eps": 1e-6}),
        "attn_softmax": ((rng.standard_normal((16, 64, 64), np.float32) * 4,), {}),
        "ffn_silu": ((x,), {}),
        "rope_cos": ((angles,), table),
        "rope_sin": ((angles,), table),
    }
    sides = [load_backend(name, "cpu") for name in ("torch", "jax")]
    print("torch against jax, same inputs: elements that differ by so many units in the last place")
    for stage, (arrays, options) in cases.items():
        one, other = (
            side.get(side.compile(partial(side.forward[stage], **options))(*map(side.put, arrays))) for side in sides
        )
        apart = np.abs(one.view(np.int32).astype(np.int64) - other.view(np.int32))  # same signs: as many steps apart
        shares = [f"{count}: {np.mean(apart == count):.1%}" for count in range(4)]
        print(f"  {stage:14} {'  '.join(shares)}  more: {np.mean(apart > 3):.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--functions", action="store_true", help="elementwise stages, which no order explains, instead")
    parser.add_argument("--backend", choices=("torch", "jax", "both"), default="both")
    asked = parser.parse_args()
    if asked.functions:
        functions()
        return
    if asked.backend != "both":
        measure(asked.backend, asked.rows)
        return
    for name in ("torch", "jax"):
        subprocess.run([sys.executable, __file__, "--backend", name, "--rows", str(asked.rows)], check=True)


if __name__ == "__main__":
    main()
