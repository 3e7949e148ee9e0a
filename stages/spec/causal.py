"""What the causal mask leaves, and a sliding window of it."""

import numpy as np


def up_to_query(scores: np.ndarray, window: int | None = None) -> np.ndarray:
    """Which keys the causal mask leaves to each query, `[queries, keys]`; of a `window` the last so many alone."""
    queries, keys = scores.shape[-2:]
    # The queries are the last of the keys' positions.
    seen = np.tri(queries, keys, keys - queries, dtype=bool)
    return seen if window is None else seen & ~np.tri(queries, keys, keys - queries - window, dtype=bool)
