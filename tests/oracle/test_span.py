"""Judging through stages that were not recorded: what an error becomes on its way, and steps that a program lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, random_weights

from stages.oracle.adjoint import ADJOINTS, carried_back
from stages.oracle.decoder import FORWARD_STAGES
from stages.oracle.experts import EXPERT_STAGES
from stages.oracle.span import CARRIED, carried
from stages.oracle.verdict import STAGES
from stages.spec.forward import DECLARED, RUN_PARAMS, forward_pipeline, parameter_name, stage_options, stage_shape
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage

RNG = np.random.default_rng(7)
TOKENS = 6
# Model -> stages that can have a hidden input.
CASES = [
    (model, stage.name)
    for model in ("qwen3", "qwen2")
    for stage in forward_pipeline(MODELS[model].config("float32")).values()
    if stage.inputs and not stage.identity
] + [("replay", stage.name) for stage in REPLAY.values() if stage.inputs]


Case = tuple[Stage, list[np.ndarray], list[np.ndarray], dict[str, Any]]


def _of_forward(model: str, name: str) -> Case:
    config = MODELS[model].config("float32")
    path, weights = forward_pipeline(config), random_weights(MODELS[model].config("float32"))
    stage = path[name]
    sources = [path.carried[at][1] if at in path.carried else at for at in stage.inputs]
    inputs = [RNG.standard_normal(stage_shape(config, path[source], TOKENS)) for source in sources]
    if name == "attention":
        inputs[0] = np.tril(np.abs(inputs[0]))
        inputs[0] /= inputs[0].sum(axis=-1, keepdims=True)
    names = [parameter_name(stage, param, 0) for param in stage.params if param not in RUN_PARAMS]
    stored = {n: weights.get(n, weights["model.embed_tokens.weight"]) for n in names}
    params = [*stored.values(), *([np.arange(TOKENS, dtype=np.int32)] if "positions" in stage.params else [])]
    options = stage_options(config, stage)
    return stage, inputs, params, dict(options)


def _of_replay(name: str) -> Case:
    """One chunk of 5 rows, of 7 columns and rank 4."""
    stage, sizes = REPLAY[name], {"rows": 5, "cols": 7, "rank": 4, "one": 1}
    inputs = [RNG.standard_normal([sizes[axis] for axis in REPLAY[at].shape.split()]) for at in stage.inputs]
    params = [
        RNG.standard_normal({"u": (5, 4), "s": (4,), "v": (7, 4)}[param]).astype(np.float32) for param in stage.params
    ]
    if name == "normalization":
        inputs[0] = 10 + inputs[0]
    given = {"layout": "torch_v", "transpose": True}
    return stage, inputs, params, {option: given[option] for option in stage.options}


def test_every_stage_with_inputs_has_its_rule() -> None:
    assert {name for _, name in CASES} == CARRIED.keys() - EXPERT_STAGES.keys()
    with_inputs = {s.function for s in DECLARED.values() if s.inputs and s.function in EXPERT_STAGES}
    assert with_inputs == CARRIED.keys() & EXPERT_STAGES.keys()  # tried on right engines: tests/judge/test_experts.py


@pytest.mark.parametrize("size", [1e-7, 1e-3, 0.1])
@pytest.mark.parametrize(("model", "name"), CASES)
def test_no_error_of_the_inputs_becomes_more(model: str, name: str, size: float) -> None:
    """Random errors, all of one sign, or of the value's own: none is beyond, and some are not far below."""
    stage, inputs, params, options = _of_replay(name) if model == "replay" else _of_forward(model, name)
    errors = [size * np.abs(RNG.standard_normal(array.shape)) for array in inputs]
    allowed = carried(stage, [*inputs, *params], errors, options, 0.0)
    value = STAGES[name](*inputs, *params, **options)
    assert allowed.shape == value.shape
    closest = 0.0
    for _ in range(12):
        for shape in ("random", "plus", "minus", "sign"):
            signs = {"plus": np.ones_like, "minus": lambda a: -np.ones_like(a), "sign": np.sign}
            draw = signs.get(shape, lambda a: RNG.uniform(-1, 1, a.shape))
            moved = [array + draw(array) * error for array, error in zip(inputs, errors, strict=True)]
            result = STAGES[name](*moved, *params, **options)
            far = np.abs(result - value)
            if stage.causal:
                far = np.tril(far)
            assert (far <= allowed * (1 + 1e-9) + 1e-12 * np.abs(value)).all(), shape
            closest = max(closest, float(np.nanmax(far / np.maximum(allowed, 1e-300))))
    assert closest > 0.03  # a bound that nothing comes near would see nothing


@pytest.mark.parametrize("name", ["attn_norm", "q_post_rope", "attn_scores"])
def test_a_rounding_inside_is_allowed_where_it_may_have_been_done(name: str) -> None:
    config = MODELS["qwen3"].config("bfloat16")
    path = forward_pipeline(config)
    stage = path[name]
    sources = [path.carried[at][1] if at in path.carried else at for at in stage.inputs]
    inputs = [RNG.standard_normal(stage_shape(config, path[source], TOKENS)) for source in sources]
    params = [np.exp(RNG.standard_normal(64)) for _ in stage.params]
    errors, options = [np.zeros_like(array) for array in inputs], stage_options(config, stage)
    assert not carried(stage, [*inputs, *params], errors, options, 0.0).any()
    narrow = [array.astype(np.float32).astype(path.activations) for array in inputs]
    assert all(n.dtype.itemsize == 2 for n in narrow)
    exact = FORWARD_STAGES[name](*(n.astype(np.float64) for n in narrow), *params, **options)
    rounded = FORWARD_STAGES[name](*narrow, *params, **options)
    allowed = carried(stage, [*(n.astype(np.float64) for n in narrow), *params], errors, options, 2.0**-8)
    assert (np.abs(rounded - exact) > 0).any()
    assert (np.abs(rounded - exact) <= allowed).all()


@pytest.mark.parametrize(("model", "name"), [case for case in CASES if case[1] in ADJOINTS])
def test_an_error_is_carried_back_by_the_transposed_derivative(model: str, name: str) -> None:
    """<back, J d> is <J^T back, d>: the derivative of `STAGES` by differences, the adjoint as it is."""
    stage, inputs, params, options = _of_forward(model, name) if model != "replay" else _of_replay(name)

    def value(arrays: list[np.ndarray]) -> np.ndarray:
        return np.asarray(STAGES[stage.function](*arrays, *params, **options), np.float64)

    result, step = value(inputs), 1e-6
    back = RNG.standard_normal((2, *result.shape))
    carried_to = carried_back(stage, inputs, params, options, back)
    assert carried_to is not None
    for number, found in enumerate(carried_to):
        if found is None:  # RoPE's tables
            continue
        assert found.shape == (2, *inputs[number].shape)
        direction = RNG.standard_normal(inputs[number].shape)
        moved = [[x + sign * step * direction if i == number else x for i, x in enumerate(inputs)] for sign in (1, -1)]
        derivative = (value(moved[0]) - value(moved[1])) / (2 * step)
        for one, other in zip(back, found, strict=True):
            size = np.linalg.norm(one) * np.linalg.norm(derivative)
            assert np.vdot(one, derivative) == pytest.approx(np.vdot(other, direction), abs=1e-7 * size)
