"""The orders in which a recorded forward took its products: projections, scores, weighted values, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from stages.errors import InputError
from stages.files.forward_dump import Place, forward_key
from stages.judge.forward import ForwardRun, fits, open_run, oracles_of, order_of, span_of, why_unjudged
from stages.oracle.verdict import Oracle
from stages.order.candidates import family
from stages.order.findings import Found, known_first
from stages.order.infer import ProductEvidence, infer
from stages.spec.noise import Noise
from stages.spec.stage import Stage

# Noise kinds of stages that are sums of products, and what they do to the sum afterwards.
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
    """The products that a recorded stage is made of: one a weight, or one a head."""
    assert run.path is not None
    stage, start = run.path.at(place), 0
    for chosen, oracle in oracles_of(place, run, recorded):
        if stage.noise is Noise.PRODUCT:
            x, *weights = oracle.arguments
            for weight in weights:
                at = slice(start, start + len(weight)) if chosen == slice(None) else chosen
                yield ProductEvidence(x[-len(recorded) :], weight.T, recorded[:, at])
                start += len(weight)
        elif stage.noise is Noise.SCORES:
            yield from _scores(oracle, recorded)
        else:
            yield from _weighted(oracle, recorded)


def _scores(oracle: Oracle, recorded: np.ndarray) -> Iterator[ProductEvidence]:
    q, k = oracle.arguments
    scaling = np.float32(oracle.options["scaling"])
    for head in range(q.shape[1]):
        keys = k[:, head // (q.shape[1] // k.shape[1])]
        yield ProductEvidence(q[:, head], keys.T, recorded[head], finish=lambda sums: sums * scaling)


def _weighted(oracle: Oracle, recorded: np.ndarray) -> Iterator[ProductEvidence]:
    probabilities, qkv = oracle.arguments
    heads, kv_heads, dim = (oracle.options[name] for name in ("heads", "kv_heads", "head_dim"))
    values = qkv[:, (heads + kv_heads) * dim :].reshape(len(qkv), kv_heads, dim)
    for head in range(heads):
        columns = recorded[:, head * dim : (head + 1) * dim]
        yield ProductEvidence(probabilities[head], values[:, head // (heads // kv_heads)], columns)


def _some_columns(evidence: ProductEvidence, count: int) -> ProductEvidence:
    """`count` of the columns, spread evenly, the first and the last among them."""
    width = evidence.recorded.shape[1]
    at = np.unique(np.linspace(0, width - 1, min(count, width)).astype(int))
    return ProductEvidence(evidence.a, evidence.b[:, at], evidence.recorded[:, at], evidence.finish)
