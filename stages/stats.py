"""Population statistics of a stage, and what logits say: for people, beside the verdict, never instead of it."""

from __future__ import annotations

from typing import Any

import numpy as np


def population(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, min, max and count of a stage's values, in float64; non-finite ones are counted."""
    wide = values.astype(np.float64).reshape(-1)
    finite = wide[np.isfinite(wide)]
    if not finite.size:
        return {"mean": None, "std": None, "min": None, "max": None, "count": wide.size, "nonfinite": wide.size}
    return {
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        "min": float(finite.min()),
        "max": float(finite.max()),
        "count": wide.size,
        "nonfinite": wide.size - finite.size,
    }


def std_ratio(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """Standard deviation of b over a's; None when undefined. Refused over different counts by the caller."""
    if a["count"] != b["count"]:
        raise ValueError(f"a ratio of statistics over {a['count']} and {b['count']} values means nothing")
    if not a["std"] or b["std"] is None:
        return None
    return float(b["std"] / a["std"])


def logits(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """How two sets of logits `[positions, vocabulary]` agree: top-1, top-5, the last position's margin, KL.

    `kl` is KL(softmax(a) || softmax(b)) in nats, the largest over positions; `margin` is the distance between a's
    two largest logits at the last position: a greedy token that differs within it may be a tie.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    top_a, top_b = _top(x, 5), _top(y, 5)
    log_p, log_q = _log_softmax(x), _log_softmax(y)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    last = np.sort(x[-1])[::-1]
    overlap = [len(set(p) & set(q)) / len(p) for p, q in zip(top_a.tolist(), top_b.tolist(), strict=True)]
    return {
        "top1_agreement": float(np.mean(top_a[:, 0] == top_b[:, 0])),
        "top5_agreement": float(np.mean(overlap)),
        "next_token_a": int(top_a[-1, 0]),
        "next_token_b": int(top_b[-1, 0]),
        "margin": float(last[0] - last[1]) if last.size > 1 else None,
        "kl": float(max(kl.max(), 0.0)),
    }


def top_tokens(row: np.ndarray, count: int = 5) -> list[dict[str, Any]]:
    """The `count` largest logits of one position, largest first; ties by the lower id, as argmax has them."""
    return [{"token": int(i), "logit": float(row[i])} for i in _top(row.astype(np.float64)[None], count)[0]]


def _top(x: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-x, axis=-1, kind="stable")[:, :count]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # an infinity gives a NaN, which the verdict on the logits has already named
        shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
