"""The orders in which a recorded forward took its products: projections, scores, weighted values, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from stages.errors import InputError
from stages.files.forward_dump import Place, forward_key
from stages.judge.forward import oracles_of, why_unjudged
from stages.judge.recorded_run import ForwardRun, fits, open_run, order_of
from stages.judge.spans import span_of
from stages.order.findings import Found, known_first
from stages.recipes.orders import sums_of
from stages.run.forward import part
from stages.spec.noise import Noise
from stages.spec.stage import Stage
from stages.sums.candidates import family
from stages.sums.infer import ProductEvidence, infer

# Noise kinds of stages that are sums of products.
PRODUCT_KINDS = (Noise.PRODUCT, Noise.SCORES, Noise.WEIGHTED)


def infer_forward(
    folder: Path, *, model: str | None, columns: int | None, progress: Callable[[str, float], None]
) -> list[Found]:
    """What was found of every product of a forward dump, per layer and stage; of `columns` columns spread over each.

    `InputError` for a dump that is not float32: a product rounded to bfloat16 keeps too little of its order.
    """
    with ExitStack() as stack:
        run = open_run(folder, model, stack)
        if run.path is None or run.path.activations != "float32":
            raise InputError(
                f"{folder}: an order can be found only in a float32 dump of known weights; run with --dtype float32"
            )
        places = [place for place in order_of(run.path, run.side.places) if _is_product(run.path.at(place))]
        found: list[Found] = []
        for number, place in enumerate(places):
            progress(forward_key(place), number / len(places))
            if not fits(run, place):
                raise InputError(f"{folder}: '{forward_key(place)}' is {run.side.shape(place)}, which no forward gives")
            if why_unjudged(place, run) is None and not span_of(place, run).hidden:
                found.append(_infer_place(place, run, found, columns))
        return found


def _is_product(stage: Stage) -> bool:
    return stage.noise in PRODUCT_KINDS and not any(param.endswith(".bias") for param in stage.params)


def _infer_place(place: Place, run: ForwardRun, before: list[Found], columns: int | None) -> Found:
    recorded = run.side.read(place)
    parts = list(_evidence(place, run, recorded))
    one = Found(place[1], (forward_key(place),), parts[0].terms)
    for evidence in parts:
        shown = evidence if columns is None else _some_columns(evidence, columns)
        one.add(infer(shown, known_first([one, *before[::-1]], family)))
    return one


def _evidence(place: Place, run: ForwardRun, recorded: np.ndarray) -> Iterator[ProductEvidence]:
    """The products that a recorded stage is made of: one a weight, or all heads' in one."""
    for chosen, oracle in oracles_of(place, run, recorded):
        for sums in sums_of(oracle, part(recorded, chosen)):
            first = next(iter(sums.ways.values()))
            assert isinstance(first, ProductEvidence)
            yield first


def _some_columns(evidence: ProductEvidence, count: int) -> ProductEvidence:
    """`count` of the columns, spread evenly, the first and the last among them."""
    width = evidence.recorded.shape[1]
    at = np.unique(np.linspace(0, width - 1, min(count, width)).astype(int))
    return replace(
        evidence,
        b=evidence.b[..., at],
        recorded=evidence.recorded[:, at],
        finish=lambda sums, rows, cols: evidence.finish(sums, rows, at[cols]),
    )
