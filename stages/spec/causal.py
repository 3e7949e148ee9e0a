"""What the causal mask leaves."""

import numpy as np


def up_to_query(scores: np.ndarray) -> np.ndarray:
    """Which keys the causal mask leaves to each query, `[queries, keys]`."""
    queries, keys = scores.shape[-2:]
    # The queries are the last of the keys' positions.
    return np.tri(queries, keys, keys - queries, dtype=bool)
