"""Faults in reading weights: every stage that uses the tensor gets the wrong one, the first of them is to be named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import EVERYWHERE, FLOAT32, Fault, Load, bfloat16, float16, float32, next_value, typical
from stages.spec.config import EMBEDDING, LM_HEAD

GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
Q, K, V, O = (f"self_attn.{name}_proj.weight" for name in "qkvo")  # noqa: E741
FIRST_NORM, SECOND_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
MATRICES = (Q, K, V, O, GATE, UP, DOWN)
QWEN3 = ("qwen3", "qwen3-bf16")
UNTIED = ("qwen3", "qwen2-untied", "qwen2-bf16")


def _changed(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Callable[[Load], np.ndarray]:
    return lambda load: change(load.right(), load.rng)


def _element(load: Load) -> np.ndarray:
    array = load.right()
    place = typical(array, load.rng)
    array[place] = array[place].astype(np.float32) * np.float32(1 + load.size)
    return array


def _ulp(load: Load) -> np.ndarray:
    """One element one unit of bfloat16 away, whatever the weights are stored in."""
    array = load.right()
    place = typical(array, load.rng)
    moved = next_value(array[place].reshape(1).astype(_bfloat16()), (0,))
    array[place] = moved.astype(array.dtype)[0]
    return array


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _zero_row(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    array[int(rng.integers(len(array)))] = 0
    return array


def _scrambled_row(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = int(rng.integers(len(array)))
    array[row] = array[row][rng.permutation(array.shape[1])]
    return array


def _swapped_heads(load: Load) -> np.ndarray:
    array = load.right()
    half = len(array) // 2
    return np.concatenate((array[half:], array[:half]))


def _faults() -> Iterator[Fault]:
    yield Fault(
        "neighbour layer's weight", (*MATRICES, FIRST_NORM, SECOND_NORM), "a layer off by one", load=Load.of_neighbour
    )
    yield Fault("gate and up swapped", (GATE,), "mixed up in loading", load=lambda load: load.beside(UP))
    yield Fault("up is the gate", (UP,), "mixed up in loading", load=lambda load: load.beside(GATE))
    yield Fault(
        "the layer's norms swapped", (FIRST_NORM,), "mixed up in loading", load=lambda load: load.beside(SECOND_NORM)
    )
    yield Fault("head norms swapped", (Q_NORM,), "mixed up in loading", load=lambda load: load.beside(K_NORM), on=QWEN3)
    yield Fault(
        "norm filled with ones",
        (FIRST_NORM, SECOND_NORM, "model.norm.weight"),
        "a missing tensor",
        load=_changed(lambda a, _: np.ones_like(a)),
    )
    yield Fault("weight + 1 bfloat16 ulp", MATRICES, "one element of the larger half", load=_ulp, on=FLOAT32)
    yield Fault("head + 1 bfloat16 ulp", (LM_HEAD,), "one element of the larger half", load=_ulp, on=FLOAT32)
    yield Fault(
        "loaded element x (1 + size)",
        MATRICES,
        "one of the larger half",
        load=_element,
        on=FLOAT32,
        size=6e-05,
    )
    yield Fault("a row of zeros", MATRICES, "corrupt", load=_changed(_zero_row))
    yield Fault("a row scrambled", MATRICES, "corrupt", load=_changed(_scrambled_row))
    yield Fault("heads in another order", (Q, K, V), "halves of the heads swapped", load=_swapped_heads)
    yield Fault(
        "weights through bfloat16",
        MATRICES,
        "a checkpoint of float32, cast",
        load=_changed(lambda a, _: bfloat16(a)),
        on=FLOAT32,
    )
    yield Fault(
        "weights through float16",
        MATRICES,
        "a checkpoint of float32, cast",
        load=_changed(lambda a, _: float16(a)),
        on=FLOAT32,
    )
    yield Fault(
        "the embedding for the head",
        (LM_HEAD,),
        "tied, and it is not",
        load=lambda load: load.read(EMBEDDING),
        on=UNTIED,
    )
    yield Fault(
        "the head's rows shifted", (LM_HEAD,), "a padded vocabulary", load=_changed(lambda a, _: np.roll(a, 1, axis=0))
    )
    yield Fault(
        "weights negated",
        (O, DOWN),
        "the other sign",
        load=_changed(lambda a, _: (-float32(a)).astype(a.dtype)),
        on=EVERYWHERE,
    )


WEIGHT_FAULTS: tuple[Fault, ...] = tuple(_faults())
