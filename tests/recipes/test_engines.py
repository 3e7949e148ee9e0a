"""Kernels of engines that others wrote, run as they are: right ones are sound or in fewer bits as told, wrong ones not.

MLX on its CPU, ONNX Runtime, PyTorch and JAX, stage by stage from random operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from onnx import helper

import svf

mx.set_default_device(mx.Device(mx.cpu))
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
TOKENS, HEADS, DIM = 24, 4, 32
Array = np.ndarray
Call = tuple[tuple[Array, ...], dict[str, Any], Callable[..., Any]]


def _random(*shape: int, seed: int = 0, size: float = 1.0) -> Array:
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# -- MLX ----------------------------------------------------------------------------------------------------------


def _mlx(x: Array, dtype: str) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(DTYPES[dtype])


def _numpy(x: mx.array, dtype: str) -> Array:
    # float32 holds every number of the narrow ones
    return np.array(x.astype(mx.float32)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def calls(hidden: int) -> dict[str, Call]:
    """Stage -> its operands in float32, its options, and how MLX computes it of MLX's arrays."""
    x, gate = _random(TOKENS, hidden), _random(TOKENS, hidden, seed=1, size=3)
    near_1 = 1 + _random(hidden, seed=2, size=0.2)
    wide = _random(192, hidden, seed=3, size=hidden**-0.5)
    scores = np.where(np.tri(TOKENS, dtype=bool), _random(HEADS, TOKENS, TOKENS, seed=4, size=3), -np.inf)
    return {
        "attn_norm": ((x, near_1), {"eps": 1e-6}, lambda a, w: mx.fast.rms_norm(a, w, 1e-6)),
        "ffn_gate": ((x, wide), {}, lambda a, w: a @ w.T),
        "ffn_silu": ((gate,), {}, nn.silu),
        "ffn_swigl": ((gate, x), {}, lambda a, b: a * b),
        "attn_softmax": ((scores,), {}, lambda a: mx.softmax(a, axis=-1, precise=True)),
        "post_attn_residual": ((x, gate), {}, lambda a, b: a + b),
    }


USUAL = {("ffn_silu", "bfloat16"), ("ffn_silu", "float16")}


@pytest.mark.parametrize("hidden", [64, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage_of_mlx_is_right_or_in_fewer_bits_as_mlx_does(dtype: str, hidden: int) -> None:
    for stage, (operands, options, function) in calls(hidden).items():
        given = [_mlx(a, dtype) for a in operands]
        found = svf.judge(stage, _numpy(function(*given), dtype), *(_numpy(a, dtype) for a in given), **options)
        if (stage, dtype) in USUAL:
            assert found.verdict == "precision", (stage, found)
            assert "as MLX does on" in (found.hint or ""), (stage, found)
        else:
            assert found, (stage, found)


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "eps": ("attn_norm", lambda a, w: mx.fast.rms_norm(a, w, 1e-3), "as if eps were 0.001, not 1e-06"),
    "no weight": ("attn_norm", lambda a, w: mx.fast.rms_norm(a, None, 1e-6), "the norm's weight is missing"),
    "gelu": ("ffn_silu", nn.gelu_approx, "gelu (by tanh) instead of silu"),
    "sum": ("ffn_swigl", lambda a, b: a + b, "silu and up are added"),
    "no mask": ("attn_softmax", lambda a: mx.softmax(mx.where(a == -mx.inf, 0, a), axis=-1), ""),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_stage_of_mlx_is_a_bug(name: str, dtype: str) -> None:
    stage, function, words = WRONG[name]
    operands, options, _ = calls(64)[stage]
    given = [_mlx(a, dtype) for a in operands]
    found = svf.judge(stage, _numpy(function(*given), dtype), *(_numpy(a, dtype) for a in given), **options)
    assert found.verdict == "bug", found
    unnamed = name == "gelu" and dtype != "float32"  # its own roundings are nobody's row
    assert found.hint is None if unnamed else words in (found.hint or ""), found


# -- PyTorch's and JAX's own functions ------------------------------------------------------------------------------


def _torch(function: Callable[..., torch.Tensor]) -> Callable[..., Array]:
    """A function of torch tensors, on numpy arrays of any of the three dtypes."""

    def called(*arrays: Array) -> Array:
        given = [torch.from_numpy(a.astype(np.float32)).to(getattr(torch, a.dtype.name)) for a in arrays]
        return np.asarray(function(*given).float().numpy()).astype(arrays[0].dtype)

    return called


def _norm_of_flax(x: Array, w: Array) -> Array:
    norm = nnx.RMSNorm(x.shape[-1], epsilon=1e-6, dtype=x.dtype, param_dtype=w.dtype, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(w)
    return np.asarray(norm(jnp.asarray(x)))


LIBRARIES: dict[str, tuple[str, Callable[..., Array], str]] = {
    "F.rms_norm": ("attn_norm", _torch(lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6)), ""),
    "nnx.RMSNorm": ("attn_norm", _norm_of_flax, ""),
    "F.linear": ("ffn_gate", _torch(F.linear), ""),
    "jnp.matmul": ("ffn_gate", lambda x, w: np.asarray(jnp.asarray(x) @ jnp.asarray(w).T), ""),
    "F.silu": ("ffn_silu", _torch(F.silu), ""),
    "jax.nn.silu": ("ffn_silu", lambda x: np.asarray(jax.nn.silu(jnp.asarray(x))), "as jax.nn.silu does on"),
    "torch.sigmoid": ("ffn_silu", _torch(lambda x: x * torch.sigmoid(x)), "as x * torch.sigmoid(x) does on"),
    "jax.nn.sigmoid": (
        "ffn_silu",
        lambda x: np.asarray(jnp.asarray(x) * jax.nn.sigmoid(jnp.asarray(x))),
        "as jax.nn.silu does on",
    ),
    "F.softmax": ("attn_softmax", _torch(lambda x: F.softmax(x, -1, dtype=torch.float32)), ""),
    "jax.nn.softmax": (
        "attn_softmax",
        lambda x: np.asarray(jax.nn.softmax(jnp.asarray(x), axis=-1)),
        "as jax.nn.softmax does on",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_function_of_a_library_is_right_or_in_fewer_bits_as_it_does(name: str, dtype: str) -> None:
    stage, function, usual = LIBRARIES[name]
    operands, options, _ = calls(256)[stage]
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    given = [a.astype(kind) for a in operands]
    found = svf.judge(stage, function(*given), *given, **options)
    if usual and dtype != "float32":
        assert (found.verdict, usual in (found.hint or "")) == ("precision", True), found
    else:
        assert found, found


# -- ONNX Runtime -------------------------------------------------------------------------------------------------


def _run(nodes: list[onnx.NodeProto], **inputs: Array) -> Array:
    """The graph's `y`, as ONNX Runtime computes it with all its optimisations."""
    given = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, a.shape) for name, a in inputs.items()]
    made = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    model = helper.make_model(
        helper.make_graph(nodes, "stage", given, made), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], inputs)[0])


def _silu(gate: Array, slope: float = 1.0) -> Array:
    node = helper.make_node
    return _run(
        [node("Mul", ["x", "k"], ["z"]), node("Sigmoid", ["z"], ["s"]), node("Mul", ["x", "s"], ["y"])],
        x=gate,
        k=np.array([slope], np.float32),
    )


def _norm(x: Array, w: Array) -> Array:
    node = helper.make_node
    nodes = [
        node("Pow", ["x", "two"], ["xx"]),
        node("ReduceMean", ["xx"], ["mean"], axes=[-1]),
        node("Add", ["mean", "eps"], ["under"]),
        node("Sqrt", ["under"], ["root"]),
        node("Reciprocal", ["root"], ["over"]),
        node("Mul", ["x", "over"], ["normed"]),
        node("Mul", ["normed", "w"], ["y"]),
    ]
    return _run(nodes, x=x, w=w, two=np.array([2], np.float32), eps=np.array([1e-6], np.float32))


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 8.0])
def test_the_silu_of_onnx_runtime_is_sound(size: float) -> None:
    """Its sigmoid is right to parts of 1, so below 0 the product has few right bits."""
    gate = _random(64, 1024, seed=5, size=size)
    found = svf.judge("ffn_silu", _silu(gate), gate)
    assert found, found


@pytest.mark.parametrize("power", [-21, -18, -12])
def test_a_wrong_slope_shows_beside_onnx_runtimes_sigmoid(power: int) -> None:
    gate = _random(64, 1024, seed=5, size=3)
    assert not svf.judge("ffn_silu", _silu(gate, 1 + 2.0**power), gate)


@pytest.mark.parametrize("hidden", [64, 1024, 4096])
def test_other_stages_of_onnx_runtime_are_sound(hidden: int) -> None:
    node = helper.make_node
    x, w = _random(TOKENS, hidden, seed=6), 1 + _random(hidden, seed=7, size=0.2)
    wide = _random(192, hidden, seed=8, size=hidden**-0.5)
    scores = np.where(np.tri(TOKENS, dtype=bool), _random(HEADS, TOKENS, TOKENS, seed=9, size=3), np.float32(-1e9))
    found = {
        "norm": svf.judge("attn_norm", _norm(x, w), x, w, eps=1e-6),
        "product": svf.judge(
            "ffn_gate", _run([node("MatMul", ["x", "w"], ["y"])], x=x, w=np.ascontiguousarray(wide.T)), x, wide
        ),
        "softmax": svf.judge("attn_softmax", _run([node("Softmax", ["x"], ["y"], axis=-1)], x=scores), scores),
    }
    assert all(found.values()), found
