"""Whether a traced run and its production model agree."""

from __future__ import annotations

from typing import Any


def sound(document: dict[str, Any]) -> bool:
    """Whether instrumenting changed nothing and repeating changed nothing."""
    production, repeated = document["production"], document["deterministic"]
    agrees = not production["ran"] or (
        production["verdict"] in ("exact", "rounding") and production.get("generated_agrees", True)
    )
    return agrees and (repeated is None or repeated["identical"])
