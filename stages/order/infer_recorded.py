"""`svf infer`: the orders in which a recorded replay summed, from its stages and components; needs no framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, UsageError
from stages.files.kinds import Recording
from stages.files.replay_recorded import Side, SideTensor, open_side
from stages.judge.diff import kind_of
from stages.order.findings import Found, document, known_first
from stages.order.infer_forward import infer_forward
from stages.progress import Report
from stages.run.replay import MIN_CHUNK_ROWS, chunk_plan, default_chunk_rows
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage
from stages.spec.values import Chunk
from stages.sums.candidates import family, family_of_sums
from stages.sums.infer import ProductEvidence, SumEvidence, infer

PRODUCTS = tuple(stage for stage in REPLAY.values() if stage.noise is Noise.PRODUCT)
RATIOS = tuple(stage for stage in REPLAY.values() if stage.noise is Noise.SUM_RATIO)


def infer_recorded(
    path: Path,
    *,
    components: Path | None = None,
    model: str | None = None,
    rows: int | None = None,
    columns: int | None = None,
    check: bool = False,
    progress: Report = lambda _label, _done: None,
) -> dict[str, Any]:
    """The `svf.orders/1` document of a replay (dump, bundle, stage file) or of a forward dump.

    Of each tensor of a replay the first `rows`, of each product of a forward `columns`; all by default. With `check`,
    `UsageError` for an option that says nothing to what `path` holds. `InputError` when no sum can be looked at: its
    operands or its result were not recorded.
    """
    forward = kind_of(path) is Recording.FORWARD
    idle = {"--components": components, "--rows": rows} if forward else {"--model": model, "--columns": columns}
    given = next((option for option, value in idle.items() if value is not None), None)
    if given is not None and check:
        raise UsageError(f"{given} has no meaning for {'a forward dump' if forward else 'a replay'}; leave it out")
    if forward:
        return document(str(path), infer_forward(path, model=model, columns=columns, progress=progress))
    with open_side(path, components) as side:
        found = [one for tensor in side.tensors.values() for one in _products(tensor, rows, progress)]
        found += _ratios(side, progress)
    if not found:
        raise InputError(
            f"{path}: no product or sum is recorded together with its operands; give the bundle with --components"
        )
    return document(str(path), found)


def operands(stage: Stage, chunk: Chunk, layout: str) -> tuple[np.ndarray, np.ndarray] | None:
    """What a product stage multiplies, `[M, K]` and `[K, N]`; None when a part was not recorded."""
    arguments = chunk.arguments(stage)
    if arguments is None:
        return None
    *left, v = arguments
    # zero_source_f32 scales U by S itself; both libraries round that before they multiply.
    a = left[0] * left[1] if len(left) == 2 else left[0]
    return a, v.T if LAYOUTS[layout].transposed else v


def _products(tensor: SideTensor, rows: int | None, progress: Report) -> list[Found]:
    total = min(tensor.rows, rows or tensor.rows)
    found: dict[str, Found] = {}
    plan = chunk_plan(tensor.rows, max(MIN_CHUNK_ROWS, min(total, default_chunk_rows(tensor.shape))))
    for chunk in tensor.chunks(plan):
        if chunk.start >= total:
            break
        stop = min(chunk.stop, total)
        for stage in PRODUCTS:
            pair = operands(stage, chunk, tensor.layout)
            if pair is None or stage.name not in chunk.values:
                continue
            _check_shapes(f"{tensor.source_name}: {stage.name}", *pair, chunk.values[stage.name])
            kept = slice(0, stop - chunk.start)
            evidence = ProductEvidence(pair[0][kept], pair[1], chunk.values[stage.name][kept])
            one = found.setdefault(stage.name, Found(stage.name, (tensor.source_name,), evidence.terms))
            one.add(infer(evidence, known_first(found.values(), family)), chunk.start)
            progress(f"{tensor.source_name} {stage.name}", stop / total)
    return list(found.values())


def _check_shapes(name: str, a: np.ndarray, b: np.ndarray, product: np.ndarray) -> None:
    """`InputError` unless `a @ b` can have given `product`."""
    shapes = [list(x.shape) for x in (a, b, product)]
    if [len(shape) for shape in shapes] != [2, 2, 2] or shapes[2] != [len(a), b.shape[1]] or a.shape[1] != len(b):
        raise InputError(f"{name} is {shapes[2]}, but its factors are {shapes[0]} and {shapes[1]}")


def _ratios(side: Side, progress: Report) -> list[Found]:
    """sum(S) / sum(scaled_s) is one number a tensor: those of all tensors with as many terms are one evidence."""
    by_terms: dict[int, list[SideTensor]] = {}
    for tensor in side.tensors.values():
        if tensor.components is not None and {"scaled_s", "normalization"} <= set(tensor.stages):
            by_terms.setdefault(tensor.components.s.size, []).append(tensor)
    found = []
    for stage in RATIOS:
        for terms, tensors in by_terms.items():
            progress(f"{stage.name} of {len(tensors)} tensors", 0.0)
            numerators = [t.components.s for t in tensors if t.components is not None]
            denominators = [_read(tensor, "scaled_s", terms) for tensor in tensors]
            recorded = [_read(tensor, stage.name, 1) for tensor in tensors]
            evidence = SumEvidence(
                np.stack([np.stack(numerators), np.stack(denominators)]),
                np.concatenate(recorded)[None],
                finish=lambda sums: sums[0] / sums[1],
            )
            one = Found(stage.name, tuple(t.source_name for t in tensors), terms)
            one.add(infer(evidence, family_of_sums))
            found.append(one)
    return found


def _read(tensor: SideTensor, stage: str, size: int) -> np.ndarray:
    file, key = tensor.stages[stage]
    if file.info(key).shape != (size,):
        raise InputError(f"{tensor.source_name}: {stage} is {list(file.info(key).shape)}, expected [{size}]")
    return file.read(key)
