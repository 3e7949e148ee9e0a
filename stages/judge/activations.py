"""What the kernels of a run take the inputs of its products to, as its user declares it.

Undeclared, a run is judged as one that multiplies what it recorded, and a recipe names what it multiplied instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from stages.errors import UsageError, shown
from stages.files.forward_dump import Place
from stages.files.gguf_model import GgufModel
from stages.oracle.activations import Q8_1, TAKEN, Taken
from stages.oracle.verdict import Oracle
from stages.spec.forward import parameter_name
from stages.spec.noise import Noise

if TYPE_CHECKING:
    from stages.judge.recorded_run import ForwardRun

# By the type of the weights: as ggml does on a CPU; in CUDA's products of many tokens, and of up to eight.
GGML, MMQ, MMVQ, FLOAT32 = "ggml", "ggml_mmq", "ggml_mmvq", "float32"
CHOICES = (FLOAT32, *TAKEN, GGML, MMQ, MMVQ)
_PLAIN = {"F32": FLOAT32, "F16": "float16", "BF16": "bfloat16"}
_OTHERS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
# `vec_dot_type` of `type_traits_cpu` in ggml/src/ggml-cpu/ggml-cpu.c; `mmq_get_q8_1_ds_layout` in
# ggml/src/ggml-cuda/mmq.cuh, whose layout of Q2_K and IQ1 is not known here; what ggml/src/ggml-cuda/vecdotq.cuh reads.
_OF_WEIGHTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        GGML: {
            **_PLAIN,
            **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4"), "q8_0"),
            **dict.fromkeys(("Q4_1", "Q5_1"), "q8_1"),
            **dict.fromkeys(_OTHERS, "q8_k"),
        },
        MMQ: {
            **_PLAIN,
            **dict.fromkeys(("Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q5_K"), "q8_1_ds4"),
            **dict.fromkeys(("Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "Q3_K", "Q6_K", "IQ4_XS"), "q8_1_d4"),
            **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "q8_1_d4"),
        },
        MMVQ: {
            **_PLAIN,
            **dict.fromkeys(("Q8_0", "IQ4_NL", "MXFP4", *_OTHERS), "q8_0"),
            **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), "q8_1_ds4"),
        },
    }
)
# What kernels do that go by the type of the weights, in words, and which these are.
KERNELS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        GGML: ("take their inputs to what goes with their weights", "as ggml does on a CPU"),
        MMQ: ("take their inputs to CUDA's Q8_1 (mmq)", "as ggml does on CUDA with more than eight tokens"),
        MMVQ: ("take their inputs to CUDA's Q8_1 (mmvq)", "as ggml does on CUDA with up to eight tokens"),
    }
)


def declare(run: ForwardRun, activations: str | None) -> None:
    """Have `run` judged by what its user declares; `UsageError` for what there is not, or where it does not apply."""
    if activations not in (None, *CHOICES):
        raise UsageError(f"activations {shown(activations)}: there are {', '.join(CHOICES)}")
    if activations is not None and run.path is None:
        raise UsageError("activations are of a model's products, and this tree says nothing of its model")
    if activations is not None and run.path is not None and run.path.activations != FLOAT32:
        raise UsageError(
            f"activations are taken to {activations} by kernels of float32 runs; this one is {run.path.activations}"
        )
    if activations in KERNELS and _gguf(run) is None:
        raise UsageError(
            f"activations {activations} follow from the types of a GGUF file's weights; give it as --model"
        )
    run.activations = activations


def _gguf(run: ForwardRun) -> GgufModel | None:
    return next((one for one in (run.weights, run.checkpoint) if isinstance(one, GgufModel)), None)


def inferable(run: ForwardRun) -> Sequence[str]:
    """Kinds of kernels that a run may have had which says nothing of them: those for the weights of a GGUF file."""
    asked = run.activations is None and run.path is not None and run.path.activations == FLOAT32
    return tuple(KERNELS) if asked and _gguf(run) is not None else ()


def taken_at(run: ForwardRun, place: Place) -> Taken | None:
    """What a stage's kernel takes its input to; None where it is no product, or multiplies what it is given.

    None too of a stage whose weights are of types that ask for different ones, and of a type that is unknown here.
    """
    assert run.path is not None
    stage = run.path.at(place)
    if run.activations in (None, FLOAT32) or stage.noise is not Noise.PRODUCT or not stage.inputs:
        return None
    if run.activations not in KERNELS:
        return TAKEN[str(run.activations)]
    weights = _gguf(run)
    assert weights is not None
    infos = [weights.info(parameter_name(stage, name, place[0])) for name in stage.params]
    of = _OF_WEIGHTS[run.activations]
    kinds = {of.get(info.stored.type) for info in infos if len(info.shape) > 1}
    kind = kinds.pop() if len(kinds) == 1 else None
    return TAKEN.get(kind) if kind is not None else None


def least_of(run: ForwardRun, place: Place, rows: slice = slice(None)) -> Mapping[str, Callable[[], np.ndarray | None]]:
    """What the codes of a product's weights are counted from, by parameter, of blocks as kernels have them: `rows` of
    each, `[rows, blocks]`; None of types that count from 0, and of weights that no GGUF file holds."""
    assert run.path is not None
    stage, weights = run.path.at(place), _gguf(run)
    if weights is None or stage.noise is not Noise.PRODUCT or not stage.inputs:
        return {}
    names = {name: parameter_name(stage, name, place[0]) for name in stage.params if not name.endswith(".bias")}
    return {
        name: functools.partial(weights.least, full, Q8_1.size, rows.start or 0, rows.stop)
        for name, full in names.items()
    }


def joined(least: Mapping[str, Callable[[], np.ndarray | None]]) -> np.ndarray | None:
    """Of a stage's weights what `least_of` says, joined as their products are; None where one has none."""
    found = [of() for of in least.values()]
    whole = [array for array in found if array is not None]
    return np.concatenate(whole) if whole and len(whole) == len(found) else None


def settled(oracle: Oracle, taken: Taken, given: np.ndarray, observed: np.ndarray) -> Oracle:
    """The oracle of a product, which was made for its input as `taken`, from the input as it was `given`.

    The input's doubtful numbers are those within their cells that are nearest to what was recorded: each right kernel
    has one of them, and the record tells which.
    """
    least, middle, most = taken.cell(given)
    doubtful, offsets = np.argwhere(least != most), joined(oracle.least)
    sums = taken.sums(given, middle, offsets)
    found = oracle if sums is None else oracle.summing(sums)
    if not len(doubtful) or observed.shape != oracle.value.shape:
        return found
    weights = [a for a in oracle.arguments[1:] if a.ndim == 2]
    x, left = middle.copy(), observed.astype(np.float64) - found.value
    for row, k in doubtful:
        column = np.concatenate([w[:, k] for w in weights]).astype(np.float64)
        if sums is not None and not sums.follows:
            column -= sums.least[:, k * sums.least.shape[1] // x.shape[1]]
        share = float(left[row] @ column) / max(float(column @ column), np.finfo(np.float64).tiny)
        other = min((least[row, k], middle[row, k], most[row, k]), key=lambda end: abs(end - middle[row, k] - share))
        left[row] -= (other - x[row, k]) * column
        x[row, k] = other
    found = oracle.of((x.astype(np.float32), *oracle.arguments[1:]))
    sums = taken.sums(given, x, offsets)
    return found if sums is None else found.summing(sums)
