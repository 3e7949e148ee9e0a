"""Error of native float32 products in units of two noise scales, on a bundle's own operands.

python benchmarks/product_bound.py BUNDLE     # a bundle with all-selected stages, from svf decompose
"""

import sys
from pathlib import Path

import jax
import numpy as np
import torch

from stages.files.bundle import Bundle
from stages.oracle.bounds import U32, product_bound

ROWS = 8192


def main(folder: Path) -> None:
    multiply = jax.jit(lambda a, b: a @ b.T)
    print(f"{'tensor':42} {'side':6} {'old max':>8} {'new max':>8} {'new rms':>8} {'|r|/spread':>10}")
    with Bundle(folder) as bundle:
        recorded = bundle.recorded(all_selected=True)
        if recorded is None:
            sys.exit(f"{folder}: no all-selected stages")
        for entry in bundle.entries:
            a = recorded.read(entry.source_name, "u_scaled", 0, min(ROWS, entry.shape[0]))
            v = bundle.load(entry).v
            exact = a.astype(np.float64) @ v.astype(np.float64).T
            spread = np.sqrt(((a * a) @ (v * v).T).astype(np.float64))
            old = U32 * (np.sqrt(a.shape[1]) * spread + np.abs(exact))
            new = product_bound(a, v.T, exact)
            native = {
                "jax": np.asarray(multiply(a, v)),
                "torch": (torch.from_numpy(a) @ torch.from_numpy(v).T).numpy(),
            }
            for side, result in native.items():
                error = np.abs(result - exact)
                worst = np.unravel_index((error / old).argmax(), error.shape)
                print(
                    f"{entry.source_name:42} {side:6} {(error / old).max():8.3f} {(error / new).max():8.3f} "
                    f"{np.sqrt(((error / new) ** 2).mean()):8.3f} {np.abs(exact[worst]) / spread[worst]:10.2f}"
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
