"""How far tensor cores are off, by an emulator in numpy: python benchmarks/gpu_rounding.py. No GPU is needed.

Of each unit and K the largest error of a float32 accumulator, over seven kinds of data, in parts of the bound of a sum
in float32 (lambda times its noise), and of that with what the unit's own accumulators cut off. Then how products that
are stored as their operands are judged, where the dump names the device and where it does not.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from stages.oracle.bounds import LAMBDA, product_bound
from stages.oracle.cores import cores_of
from stages.oracle.verdict import consult
from stages.recipes.side import SideVerdict
from stages.spec.forward import DECLARED
from stages.spec.noise import Noise

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from tensor_core import KINDS, STORED, UNITS, Array, Unit, operands, product, stored, tf32

DEPTHS = (64, 256, 1024, 3072, 12288)
LAM = LAMBDA[Noise.PRODUCT]


def taken(x: Array, unit: Unit) -> Array:
    """Numbers of the unit's format."""
    return tf32(x) if unit.format == "tf32" else stored(x, unit.format)


def ratios(a: Array, b: Array, got: Array, unit: Unit) -> tuple[float, float]:
    """Largest error over the bound of a float32 sum, and over that with what the unit cuts off."""
    right = a.astype(np.float64) @ b
    error, scale = np.abs(got - right), LAM * product_bound(a, b, right)
    of_root, of_result = cores_of(unit.device)[unit.format].lost
    root = np.sqrt((a * a) @ (b * b) + right * right)
    cut = 2.0**-24 * a.shape[1] * (of_root * root + of_result * np.abs(right))
    return float((error / scale).max()), float((error / (scale + cut)).max())


def verdict(x: Array, y: Array, got: Array, unit: Unit, device: str | None) -> str:
    dtype = "float32" if unit.format == "tf32" else unit.format
    stage = dataclasses.replace(DECLARED["ffn_gate"], dtype=dtype)
    lambdas = dataclasses.replace(LAMBDA, cores=cores_of(device))
    arguments = (x.astype(STORED[dtype]), np.ascontiguousarray(y.T).astype(STORED[dtype]))
    side = SideVerdict()
    side.add(consult(stage, arguments, {}, lambdas), got.astype(STORED[dtype]))
    return (
        f"{side.verdict}, {'TF32' if 'TF32-like (truncated)' in (side.recipe or '') else 'other words'}"
        if (unit.format == "tf32")
        else str(side.verdict)
    )


def main() -> None:
    print(f"{'unit':32}" + "".join(f"{k:>14}" for k in DEPTHS))
    counts: dict[str, Counter[str]] = {"named": Counter(), "unknown": Counter()}
    for unit in UNITS:
        cells = []
        for k in DEPTHS:
            worst = np.zeros(2)
            for kind in KINDS:
                x, y = operands(kind, 8, k, 24)
                a, b = taken(x, unit), taken(y, unit)
                got = product(a, b, unit)
                worst = np.maximum(worst, ratios(a, b, got, unit))
                for known, device in (("named", unit.device), ("unknown", None)):
                    given = (x, y) if unit.format == "tf32" else (a, b)
                    counts[known][f"{unit.format}: {verdict(*given, got, unit, device)}"] += 1
            cells.append(f"{worst[0]:7.2f} {worst[1]:6.2f}")
        print(f"{unit.device} {unit.format}".ljust(32) + "".join(cells), flush=True)
    for known, count in counts.items():
        print(f"device {known}: " + "; ".join(f"{n} {words}" for words, n in sorted(count.items())))


if __name__ == "__main__":
    main()
