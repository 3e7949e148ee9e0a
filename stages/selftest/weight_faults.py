"""Faults in reading weights: every stage that uses the tensor gets the wrong one, the first of them is to be named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import EVERYWHERE, FLOAT32, Fault, Load, bfloat16, float16, float32, next_value, typical
from stages.selftest.making import QWEN3
from stages.spec.config import EMBEDDING, LM_HEAD

GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
Q, K, V, O = (f"self_attn.{name}_proj.weight" for name in "qkvo")  # noqa: E741
FIRST_NORM, SECOND_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
MATRICES = (Q, K, V, O, GATE, UP, DOWN)
UNTIED = ("qwen3", "qwen2-untied", "qwen2-bf16")
Loader = Callable[[Load], np.ndarray]


def _changed(change: Callable[[np.ndarray], np.ndarray]) -> Loader:
    return lambda load: change(load.right())


def _ulp(load: Load) -> np.ndarray:
    """One element one unit of bfloat16 away, whatever the weights are stored in."""
    import ml_dtypes

    array = load.right()
    place = typical(array, load.rng)
    moved = next_value(array[place].reshape(1).astype(ml_dtypes.bfloat16), (0,))
    array[place] = moved.astype(array.dtype)[0]
    return array


def _row(change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Loader:
    """One row of a matrix, changed."""

    def load_(load: Load) -> np.ndarray:
        array = load.right()
        at = int(load.rng.integers(len(array)))
        array[at] = change(array[at], load.rng)
        return array

    return load_


def _swapped_halves(array: np.ndarray) -> np.ndarray:
    return np.roll(array, len(array) // 2, axis=0)


def _faults() -> Iterator[tuple[str, tuple[str, ...], str, Loader, tuple[str, ...]]]:
    norms, all_norms = (FIRST_NORM, SECOND_NORM), (FIRST_NORM, SECOND_NORM, "model.norm.weight")
    yield "neighbour layer's weight", (*MATRICES, *norms), "a layer off by one", Load.of_neighbour, EVERYWHERE
    yield "gate and up swapped", (GATE,), "mixed up in loading", lambda load: load.beside(UP), EVERYWHERE
    yield "up is the gate", (UP,), "mixed up in loading", lambda load: load.beside(GATE), EVERYWHERE
    yield "the layer's norms swapped", norms[:1], "mixed up", lambda load: load.beside(SECOND_NORM), EVERYWHERE
    yield "head norms swapped", (Q_NORM,), "mixed up in loading", lambda load: load.beside(K_NORM), QWEN3
    yield "norm filled with ones", all_norms, "a missing tensor", _changed(np.ones_like), EVERYWHERE
    yield "weight + 1 bfloat16 ulp", MATRICES, "one element of the larger half", _ulp, FLOAT32
    yield "head + 1 bfloat16 ulp", (LM_HEAD,), "one element of the larger half", _ulp, FLOAT32
    yield "a row of zeros", MATRICES, "corrupt", _row(lambda row, _: 0 * row), EVERYWHERE
    yield "a row scrambled", MATRICES, "corrupt", _row(lambda row, rng: row[rng.permutation(row.size)]), EVERYWHERE
    yield "heads in another order", (Q, K, V), "halves of the heads swapped", _changed(_swapped_halves), EVERYWHERE
    yield "weights through bfloat16", MATRICES, "a checkpoint of float32, cast", _changed(bfloat16), FLOAT32
    yield "weights through float16", MATRICES, "a checkpoint of float32, cast", _changed(float16), FLOAT32
    yield "the embedding for the head", (LM_HEAD,), "tied, and it is not", lambda load: load.read(EMBEDDING), UNTIED
    yield "the head's rows shifted", (LM_HEAD,), "a padded vocabulary", _changed(lambda a: np.roll(a, 1, 0)), EVERYWHERE
    yield "weights negated", (O, DOWN), "the other sign", _changed(lambda a: (-float32(a)).astype(a.dtype)), EVERYWHERE


WEIGHT_FAULTS = tuple(Fault(name, at, doc, load=load, on=on) for name, at, doc, load, on in _faults())
