"""`svf demo`: the whole chain on the built-in tiny model, with a few words for a newcomer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.jobs.replay import replay_both
from stages.jobs.replay_one import ReplayCommand
from stages.progress import Progress


def run(progress: Progress) -> dict[str, Any]:
    """Make the tiny model and bundle, replay every layout on each backend, and compare."""
    return replay_both(ReplayCommand(layout="all", all_selected=True), progress)


def explain(document: Mapping[str, Any], missing: str | None) -> None:
    """What the table below means; `missing`: how to get what an HTML report needs, where that is not there."""
    names = sorted({row["tensor"] for row in document["rows"]})
    print(
        f"""A random tiny Qwen3 was decomposed into U, S and V. {len(names)} adapted weights were then rebuilt from them
by PyTorch and by JAX/XLA, each in a process of its own, in ten stages. Every stage is judged by itself,
from its own inputs, against float64 and a rounding-error bound:
  exact     bit-identical to the correctly rounded result
  rounding  within the bound: another order of summation, not another function
  bug       beyond what any order of summation could give
Of the layouts of V, only the right one gives the weights back when the offsets are zero.
"""
    )
    if missing:
        print(f"For an HTML report of this: {missing}\n")
