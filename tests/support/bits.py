"""float32 arrays with fewer mantissa bits, as kernels leave them."""

import numpy as np

from stages.recipes.value import keep


def keep_bits(x: np.ndarray, bits: int, rounding: str = "even") -> np.ndarray:
    return keep(x.astype(np.float64), bits, rounding).astype(np.float32)
