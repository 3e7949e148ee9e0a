"""What to ask a GPU first, one part at a time: python benchmarks/gpu.py PART [--cpu], JSON lines to stdout.

benchmarks/gpu.sh runs them all. `units`: which tensor core, bit by bit; `narrow_sums`: whether partial sums are kept in
16 bits; `xla`: what its precisions compute; `functions`: how far elementary functions err; `repeats`: whether another
process gives the same bytes. `summary FOLDER` tells of every document there what is neither exact nor rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from tensor_core import UNITS, Array, in_slices, operands, product, stored, tf32

CPU = "--cpu" in sys.argv
DEVICE = "cpu" if CPU else "cuda"
U = 2.0**-24
# Half an ulp of the format, relative.
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
FLAG = {"bfloat16": "allow_bf16_reduced_precision_reduction", "float16": "allow_fp16_reduced_precision_reduction"}
Row = dict[str, Any]


def on_torch(dtype: str, *arrays: Array) -> list[Any]:
    import torch

    return [torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE).to(getattr(torch, dtype)) for a in arrays]


def accumulators(dtype: str, a: Array, b: Array) -> Iterator[tuple[str, Array, bool]]:
    """The product by each library, as float32, and whether it is the accumulator itself, not yet rounded."""
    import jax
    import jax.numpy as jnp
    import torch

    x, y = on_torch(dtype, a, b)
    try:
        yield "torch", torch.mm(x, y, out_dtype=torch.float32).cpu().numpy(), True
    except (RuntimeError, TypeError, NotImplementedError):  # no such kernel here
        yield "torch", torch.mm(x, y).float().cpu().numpy(), dtype == "float32"
    dot = jax.jit(lambda p, q: jax.lax.dot(p, q, precision="default", preferred_element_type=jnp.float32))
    yield "jax", np.asarray(dot(jnp.asarray(a, dtype), jnp.asarray(b, dtype))), True


def units() -> Iterator[Row]:
    """The part of the elements that each emulated unit gives to the bit; at K = 16 the step alone."""
    import torch

    matmul = torch.backends.cuda.matmul
    for flag in FLAG.values():
        setattr(matmul, flag, False)
    for dtype in ("bfloat16", "float16", "float32"):
        matmul.allow_tf32 = dtype == "float32"
        for k in (16, 64) if CPU else (16, 64, 256, 1024, 4096):
            a, b = (stored(x, dtype) for x in operands("normal", 16, k, 64))
            for library, got, wide in accumulators(dtype, a, b):
                equal = {
                    name: float((stored(sums, got_as(dtype, wide)) == got).mean())
                    for name, sums in sums_of(a, b, dtype)
                }
                best = dict(sorted(equal.items(), key=lambda item: -item[1])[:4])
                yield {"library": library, "dtype": dtype, "k": k, "accumulator seen": wide, "equal": best}
    matmul.allow_tf32 = False


def got_as(dtype: str, wide: bool) -> str:
    return "float32" if wide else dtype


def sums_of(a: Array, b: Array, dtype: str) -> Iterator[tuple[str, Array]]:
    """Each unit's product, of one accumulator and of slices of K that are added in float32; and a chain of FMAs."""
    chain = np.zeros((len(a), b.shape[1]))
    for k in range(a.shape[1]):
        chain = (a[:, k, None].astype(np.float64) * b[k] + chain).astype(np.float32).astype(np.float64)
    yield "fma chain", chain.astype(np.float32)
    for unit in UNITS:
        if unit.format != ("tf32" if dtype == "float32" else dtype):
            continue
        for how in ("truncated", "even", "away") if dtype == "float32" else ("",):
            x, y = (tf32(a, how), tf32(b, how)) if how else (a, b)
            for slices in (1, 2, 4, 8):
                if slices == 1 or a.shape[1] >= 64 * slices:
                    name = " ".join(filter(None, (unit.device, unit.format, how, f"in {slices}")))
                    yield name, product(x, y, unit) if slices == 1 else in_slices(x, y, unit, slices, "float32")


def narrow_sums() -> Iterator[Row]:
    """Error beyond one rounding, in what a right sum may be off: far above 1 where partial sums are kept in 16 bits."""
    import torch

    shapes = ((1, 4096, 1024), (16, 3072, 1024), (64, 3072, 1024), (16, 12288, 4096), (64, 12288, 1024))
    for dtype, flag in FLAG.items():
        for m, k, n in shapes[:1] if CPU else shapes:
            a, b = (stored(x, dtype) for x in operands("normal", m, k, n))
            right = a.astype(np.float64) @ b
            may = ROUNDOFF[dtype] * np.abs(right) + 640 * U * k / 1024 * np.sqrt((a * a) @ (b * b))
            row: Row = {"dtype": dtype, "shape": [m, k, n]}
            for allowed in (True, False):
                setattr(torch.backends.cuda.matmul, flag, allowed)
                got = torch.mm(*on_torch(dtype, a, b)).float().cpu().numpy()
                row["allowed" if allowed else "refused"] = float((np.abs(got - right) / may).max())
            yield row


def xla() -> Iterator[Row]:
    """What XLA's precisions err by, in u of the root of the terms' squares, and how much of it is Hopper's TF32."""
    import jax
    import jax.numpy as jnp

    yield {"devices": [str(d) for d in jax.devices()], "jax": jax.__version__}
    a, b = operands("normal", 64, 64 if CPU else 3072, 256)
    right, spread = a.astype(np.float64) @ b, np.sqrt((a * a) @ (b * b))
    hopper = next(unit for unit in UNITS if unit.device == "NVIDIA H200" and unit.format == "tf32")
    presets = ("TF32_TF32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9")
    for precision in (None, "high", "highest", *presets):
        try:
            got = np.asarray(jax.jit(lambda x, y, p=precision: jnp.matmul(x, y, precision=p))(a, b))
        except Exception as error:  # an algorithm that this jaxlib or device lacks, by whatever class it says so
            yield {"precision": str(precision), "error": str(error).splitlines()[0][:200]}
            continue
        off = np.abs(got - right) / (U * spread)
        few = [product(tf32(a[:8], how), tf32(b[:, :64], how), hopper) for how in ("truncated", "even", "away")]
        equal = [float((one == got[:8, :64]).mean()) for one in few]
        yield {
            "precision": str(precision),
            "rms, max": [float(np.sqrt((off**2).mean())), float(off.max())],
            "tf32": equal,
        }


def functions() -> Iterator[Row]:
    """Largest error of elementary functions in u, against float64."""
    import jax
    import jax.numpy as jnp
    import torch

    exact: dict[str, tuple[float, float, Callable[[Array], Array]]] = {
        "exp": (-80, 0, np.exp),
        "rsqrt": (1e-6, 1e6, lambda x: 1 / np.sqrt(x)),
        "cos": (0, 40000, np.cos),
        "sin": (0, 40000, np.sin),
        "silu": (-80, 80, lambda x: x / (1 + np.exp(-x))),
    }
    for name, (low, high, f) in exact.items():
        near = np.geomspace(max(low, 1e-6), high or 1, 1 << (10 if CPU else 19))
        x = np.unique(np.concatenate([np.linspace(low, high, 1 << (12 if CPU else 21)), near]).astype(np.float32))
        want = f(x.astype(np.float64))
        ours = torch.nn.functional.silu if name == "silu" else getattr(torch, name)
        theirs = jax.nn.silu if name == "silu" else jax.lax.rsqrt if name == "rsqrt" else getattr(jnp, name)
        for library, got in (
            ("torch", ours(*on_torch("float32", x)).cpu().numpy()),
            ("jax", np.asarray(jax.jit(theirs)(x))),
        ):
            off = (got - want) / (U * np.maximum(np.abs(want), 2.0**-126))
            worst = int(np.abs(off).argmax())
            rms = float(np.sqrt((off**2).mean()))
            yield {
                "function": name,
                "library": library,
                "max": float(np.abs(off[worst])),
                "at": float(x[worst]),
                "rms": rms,
            }


_REPEAT = """
import hashlib, numpy as np, jax, jax.numpy as jnp
r = np.random.default_rng(0)
for m, k, n in ((16, 3072, 1024), (64, 1024, 3072)):
    for dtype in ("float32", "bfloat16"):
        a, b = jnp.asarray(r.normal(size=(m, k)), dtype), jnp.asarray(r.normal(size=(k, n)), dtype)
        y = jax.jit(lambda p, q: jnp.matmul(p, q, precision="highest"))(a, b)
        print((m, k, n), dtype, hashlib.sha256(np.asarray(y).tobytes()).hexdigest()[:12])
"""


def repeats() -> Iterator[Row]:
    """The same XLA products in other processes, which may tune other kernels: whether the bytes are the same."""
    for flags in ("",) if CPU else ("", "--xla_gpu_autotune_level=0"):
        environment = {**os.environ, "XLA_FLAGS": flags}
        command = [sys.executable, "-c", _REPEAT]
        runs = [
            subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
            for _ in range(2 if CPU else 3)
        ]
        outputs = [run.stdout.splitlines() for run in runs]
        yield {"flags": flags, "same bytes": all(lines == outputs[0] for lines in outputs), "first": outputs[0]}


def summary(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        try:
            document = json.loads(file.read_text())
        except ValueError:  # lines of a part, or a run that was cut short
            continue
        rows = [row for row in document.get("rows") or [] if row.get("verdict") not in ("exact", "rounding", None)]
        told = [(row.get("key"), row["verdict"], row.get("ratio"), row.get("hint")) for row in rows[:6]]
        print(file.stem, document.get("outcome"), document.get("culprit"), told)


if __name__ == "__main__":
    if sys.argv[1] == "summary":
        summary(Path(sys.argv[2]))
    else:
        for row in {f.__name__: f for f in (units, narrow_sums, xla, functions, repeats)}[sys.argv[1]]():
            print(json.dumps(row), flush=True)
