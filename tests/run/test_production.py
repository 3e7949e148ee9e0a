"""The production models agree with each other and with the traced path, and an edited one is caught."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from forward_models import MODELS, MemoryWeights, random_weights, tokens_of, write_model
from helpers import some

import svf_jax.production
import svf_torch.production
from stages.errors import InputError
from stages.files.checkpoint import open_checkpoint
from stages.run.forward import Forwarder
from stages.run.production import bucket, compare_production
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.families import parameter_shapes
from svf_jax.backend import JaxBackend
from svf_torch.backend import TorchBackend

pytestmark = pytest.mark.slow

SIDES: dict[str, tuple[ModuleType, Any]] = {
    "torch": (svf_torch.production, TorchBackend),
    "jax": (svf_jax.production, JaxBackend),
}


def traced(side: str, config: ModelConfig, weights: MemoryWeights, tokens: list[int]) -> np.ndarray:
    (result,) = Forwarder(SIDES[side][1](), config, weights).run(tokens, stages=["lm_head"])
    return result.array


@functools.cache
def traced_once(side: str, name: str, seed: int, count: int) -> np.ndarray:
    config = dataclasses.replace(MODELS[name], layers=1).config("float32")
    return traced(side, config, MemoryWeights(random_weights(config, seed)), tokens_of(count))


def compared(side: str, config: ModelConfig, weights: MemoryWeights, tokens: list[int], production: Any) -> dict:
    return judged(traced(side, config, weights, tokens), config, tokens, production)


def judged(logits: np.ndarray, config: ModelConfig, tokens: list[int], production: Any) -> dict:
    reordered = functools.partial(production.reordered, tokens)
    return compare_production(logits, production(tokens), layers=config.num_hidden_layers, reordered=reordered)


def loaded(side: str, config: ModelConfig, weights: MemoryWeights, edit: Callable[[Any], None] | None = None) -> Any:
    """A production model whose loaded modules `edit` changed, as an edit of its source would."""
    module = SIDES[side][0]
    production = module.production(config, weights)
    if edit is None:
        return production
    edit(production.model)
    if side == "jax":
        return module.JaxProduction(production.model, config, "cpu", "highest")
    return production


def relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


# One of each family, of each kind of RoPE and of heads, with and without biases.
FEW = ("qwen3-gqa7", "qwen3-bias", "qwen3-longrope", "qwen2-tied", "qwen2-dynamic", "qwen2-linear", "llama-tied")


@pytest.mark.parametrize("name", some(MODELS, FEW))
def test_both_frameworks_production_models_agree(name: str) -> None:
    tokens = tokens_of(33)
    for dtype in ("float32", "bfloat16") if name in ("qwen3", "qwen2", "qwen3-bias") else ("float32",):
        config = MODELS[name].config(dtype)
        weights = MemoryWeights(random_weights(config, seed=3))
        theirs = svf_torch.production.production(config, weights)
        logits = svf_jax.production.production(config, weights)(tokens)
        assert logits.shape == (33, config.vocab_size)
        reordered = functools.partial(theirs.reordered, tokens)
        result = compare_production(logits, theirs(tokens), layers=2, reordered=reordered)
        assert result["verdict"] in (("rounding",) if dtype == "float32" else ("exact", "suspect"))
        assert result["ratio"] < 0.5


@pytest.mark.cover(1)
@pytest.mark.parametrize("run", [(side, dtype) for side in SIDES for dtype in ("float32", "bfloat16")], ids=" ".join)
@pytest.mark.parametrize("name", ["qwen3-yarn", "qwen2-gqa7"])
@pytest.mark.parametrize("count", [1, 100])
def test_the_traced_path_is_production(run: tuple[str, str], name: str, count: int) -> None:
    side, dtype = run
    config = MODELS[name].config(dtype)
    weights = MemoryWeights(random_weights(config, seed=count))
    result = compared(side, config, weights, tokens_of(count), loaded(side, config, weights))
    if side == "torch":
        assert result["verdict"] == "exact"
    elif dtype == "bfloat16":
        assert result["verdict"] in ("exact", "suspect")
    else:
        assert result["verdict"] in ("exact", "rounding")
        assert result["ratio"] < 0.5  # a margin of 2 at least
    assert result["agrees"] or result["tie"]


def scale_by_a_hundredth(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.01


def drop_q_norm(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_norm = torch.nn.Identity() if isinstance(model, torch.nn.Module) else None


def swap_gate_and_up(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


# What is edited in production alone: fields of the config, and the loaded modules.
MUTANTS: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "attention scale * 1.01": ({}, scale_by_a_hundredth),
    "eps 1e-5 for 1e-6": ({"rms_norm_eps": 1e-5}, None),
    "rope theta 1e4 for 1e6": ({"rope_theta": 1e4}, None),
    "no q_norm": ({}, drop_q_norm),
    "gate and up swapped": ({}, swap_gate_and_up),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        *(("qwen3", mutant) for mutant in MUTANTS),
        *(pytest.param("qwen2", m, marks=pytest.mark.thorough) for m in MUTANTS if m != "no q_norm"),
    ],
)
def test_an_edited_production_model_is_a_bug(side: str, name: str, mutant: str) -> None:
    config = dataclasses.replace(MODELS[name], layers=1).config("float32")
    fields, edit = MUTANTS[mutant]
    weights, tokens = MemoryWeights(random_weights(config, seed=1)), tokens_of(16)
    production = loaded(side, dataclasses.replace(config, **fields), weights, edit)
    result = judged(traced_once(side, name, 1, 16), config, tokens, production)
    assert result["verdict"] == "bug"
    assert result["ratio"] > 20


@pytest.mark.parametrize("side", SIDES)
def test_in_bfloat16_a_mild_edit_is_suspect_and_float32_decides(side: str) -> None:
    wide, narrow = (dataclasses.replace(MODELS["qwen3"], layers=1).config(dtype) for dtype in ("float32", "bfloat16"))
    weights, tokens = MemoryWeights(random_weights(narrow, seed=1)), tokens_of(16)
    asked, logits = [], traced(side, narrow, weights, tokens)

    def in_float32(edit: Callable[[Any], None] | None) -> dict:
        asked.append(edit)
        upcast = MemoryWeights({k: v.astype(np.float32) for k, v in weights.weights.items()})
        return compared(side, wide, upcast, tokens, loaded(side, wide, upcast, edit))

    for edit, verdict in ((scale_by_a_hundredth, "bug"), (None, "exact")):
        production = loaded(side, narrow, weights, edit)
        compare = functools.partial(
            compare_production,
            logits,
            production(tokens),
            layers=1,
            reordered=functools.partial(production.reordered, tokens),
        )
        alone = compare()
        assert alone["verdict"] == ("exact" if edit is None else "suspect")
        result = compare(wider=functools.partial(in_float32, edit))
        assert result["verdict"] == verdict
    assert asked == [scale_by_a_hundredth]  # equal bits need no second opinion


@pytest.mark.parametrize("name", ["qwen3", "qwen3-untied", "qwen3-bias", "qwen2"])
def test_paths_of_the_nnx_state_are_the_checkpoints_names(name: str) -> None:
    config = MODELS[name].config("float32")
    model = svf_jax.production.CausalLM(config, nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    shapes = {".".join(map(str, path)): parameter.shape for path, parameter in state}
    wanted = parameter_shapes(config)
    if config.tie_word_embeddings:
        del wanted[LM_HEAD]
    assert shapes == wanted


def test_a_fresh_model_is_a_function_of_its_seed_and_runs_under_nnx_jit() -> None:
    config = dataclasses.replace(MODELS["qwen3"], layers=1).config("float32")
    jitted, tokens = nnx.jit(lambda model, tokens: model(tokens)), jnp.arange(5)
    one, same, other = (jitted(svf_jax.production.CausalLM(config, nnx.Rngs(seed)), tokens) for seed in (0, 0, 1))
    assert one.shape == (5, config.vocab_size)
    assert jnp.array_equal(one, same)
    assert not jnp.allclose(one, other, atol=1e-2)
    last = svf_jax.production.CausalLM(config, nnx.Rngs(0))(tokens, jnp.array([4]))
    assert jnp.allclose(last, one[4:], atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_every_parameter_has_the_checkpoints_bits(side: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MODELS["qwen3-untied"], "bfloat16")
    with open_checkpoint(folder) as checkpoint:
        model = SIDES[side][0].load_model(checkpoint.config, checkpoint)
        if side == "torch":
            found = {name: TorchBackend().get(p.data) for name, p in model.named_parameters()}
        else:
            state = nnx.to_flat_state(nnx.state(model, nnx.Param))
            found = {".".join(map(str, path)): np.asarray(p[...]) for path, p in state}
        assert found.keys() == checkpoint.tensors.keys()
        for name, array in found.items():
            assert array.tobytes() == checkpoint.read(name).tobytes(), name


def test_transformers_reads_the_raw_config_to_the_same_model(tmp_path: Path) -> None:
    for name in ("qwen3-yarn", "qwen2-linear"):
        with open_checkpoint(write_model(tmp_path / name, MODELS[name], "float32")) as checkpoint:
            ours, theirs = (
                svf_torch.production.production(checkpoint.config, checkpoint, raw_config=raw)(tokens_of(9))
                for raw in (None, checkpoint.raw_config)
            )
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("side", SIDES)
def test_a_missing_an_unexpected_and_a_misshapen_tensor_are_refused_by_name(side: str) -> None:
    load = SIDES[side][0].load_model
    config = MODELS["qwen3"].config("float32")
    weights = random_weights(config)
    norm = "model.layers.1.self_attn.q_norm.weight"

    def refused(changed: dict[str, np.ndarray]) -> str:
        holder = MemoryWeights(changed)
        holder.tensors = changed  # type: ignore[attr-defined]
        with pytest.raises(InputError) as error:
            load(config, holder)
        return str(error.value)

    assert f"missing tensor '{norm}'" in refused({k: v for k, v in weights.items() if k != norm})
    assert "unexpected tensor 'model.layers.0.extra'" in refused({**weights, "model.layers.0.extra": weights[norm]})
    assert f"'{norm}' is [3]" in refused({**weights, norm: weights[norm][:3]})


@pytest.mark.parametrize("side", SIDES)
def test_a_tied_models_adapted_head_is_kept_apart(side: str) -> None:
    config = MODELS["qwen3"].config("float32")
    weights = random_weights(config)
    tokens = tokens_of(5)
    tied = SIDES[side][0].production(config, MemoryWeights(weights))
    head = weights[EMBEDDING].copy()
    head[17] *= 2
    apart = SIDES[side][0].production(config, MemoryWeights({**weights, LM_HEAD: head}))
    expected, got = tied(tokens), apart(tokens)
    assert np.array_equal(np.delete(expected, 17, axis=1), np.delete(got, 17, axis=1))
    assert np.array_equal(2 * expected[:, 17], got[:, 17])


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_padding_on_the_right_changes_no_real_position(name: str) -> None:
    config = MODELS[name].config("float32")
    production = svf_jax.production.production(config, MemoryWeights(random_weights(config)))
    tokens = tokens_of(13)
    plain = production(tokens)
    padded = [production([*tokens, *[fill] * 19])[:13] for fill in (0, 299)]
    assert np.array_equal(padded[0], padded[1])  # what the padding is has no effect at all
    assert compare_production(plain, padded[0], layers=2)["verdict"] in ("exact", "rounding")


@pytest.mark.parametrize("name", some(("qwen3", "qwen2", "qwen3-yarn"), ("qwen3-yarn",)))
def test_both_generate_the_same_tokens_and_each_is_the_forwards_greedy_one(name: str) -> None:
    config = MODELS[name].config("float32")
    weights = MemoryWeights(random_weights(config, seed=5))
    ours, theirs = (SIDES[side][0].production(config, weights) for side in ("jax", "torch"))
    tokens = tokens_of(11)
    ours._layer.clear_cache()  # of other models, whose layers may be the same
    generated = theirs.generate(tokens, 8)
    assert ours.generate(tokens, 8) == generated
    logits = theirs([*tokens, *generated])
    assert generated == [int(row.argmax()) for row in logits[10:-1]]
    assert ours._layer._cache_size() == 2  # lengths 11 to 18: buckets of 16 and 32, one compilation for all layers
    assert ours.generate(tokens, 0) == []


# Frequencies that go by the length: from 65 tokens on they are others.
LENGTHENED = some(("qwen3-dynamic", "qwen2-longrope"), ("qwen3-dynamic",))


@pytest.mark.long
@pytest.mark.parametrize("name", LENGTHENED)
@pytest.mark.parametrize("n", some((60, 64, 65, 70), (60, 65)))
def test_a_length_that_changes_the_frequencies_is_the_sequences_own(name: str, n: int) -> None:
    """Padding to a bucket is no token, and a longer run leaves no trace."""
    config = MODELS[name].config("float32")
    weights = MemoryWeights(random_weights(config, seed=5))
    ours, theirs = (SIDES[side][0].production(config, weights) for side in ("jax", "torch"))
    tokens = tokens_of(n)
    logits = theirs(tokens, last_only=True)
    theirs(tokens_of(300))
    assert np.array_equal(theirs(tokens, last_only=True), logits)
    for side, found in (("torch", logits), ("jax", ours(tokens, last_only=True))):
        row = traced(side, config, weights, tokens)[-1:]
        assert compare_production(row, found, layers=2)["verdict"] in ("exact", "rounding"), side


@pytest.mark.parametrize("name", LENGTHENED)
def test_what_is_generated_over_such_a_length_is_the_forwards(name: str) -> None:
    config = MODELS[name].config("float32")
    weights = MemoryWeights(random_weights(config, seed=5))
    ours, theirs = (SIDES[side][0].production(config, weights) for side in ("jax", "torch"))
    tokens = tokens_of(60)
    generated = theirs.generate(tokens, 8)
    assert ours.generate(tokens, 8) == generated
    for n in range(8):
        assert generated[n] == int(theirs([*tokens, *generated[:n]])[-1].argmax())


def test_buckets_are_powers_of_two_that_hold_the_tokens() -> None:
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 500)] == [16, 16, 32, 32, 64, 512]


@pytest.mark.parametrize("side", SIDES)
def test_the_last_row_alone_is_the_last_row(side: str) -> None:
    config = MODELS["qwen3"].config("float32")
    production = SIDES[side][0].production(config, MemoryWeights(random_weights(config)))
    tokens = tokens_of(7)
    last = production(tokens, last_only=True)
    assert last.shape == (1, config.vocab_size)
    assert relative(last[0], production(tokens)[-1]) < 1e-6


@pytest.mark.parametrize("side", SIDES)
def test_token_ids_are_checked(side: str) -> None:
    config = MODELS["qwen3"].config("float32")
    production = SIDES[side][0].production(config, MemoryWeights(random_weights(config)))
    for tokens in ([], [300], [-1], [[1, 2]]):
        with pytest.raises(InputError):
            production(tokens)


def logits(rows: int = 4, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 50)).astype(dtype)


def test_the_comparison_knows_exact_shape_and_nonfinite() -> None:
    a = logits()
    assert compare_production(a, a.copy(), layers=2)["verdict"] == "exact"
    assert compare_production(a, a[:3], layers=2)["verdict"] == "shape"
    assert compare_production(a, a.astype(np.float16), layers=2)["verdict"] == "shape"
    b = a.copy()
    b[0, 0] = np.nan
    for pair in ((a, b), (b, a), (b, b)):
        assert compare_production(*pair, layers=2)["verdict"] == "nonfinite"


def test_one_wrong_row_of_many_is_a_bug() -> None:
    a = logits(rows=1000)
    b = a.copy()
    b[123] *= 1 + np.float32(1e-5)
    assert compare_production(a, b, layers=2)["verdict"] == "bug"


def test_a_differing_greedy_token_within_the_noise_is_a_tie() -> None:
    a = logits()
    a[-1, 7] = a[-1, 8] = 5.0
    b = a.copy()
    b[-1, 8] = np.nextafter(np.float32(5), np.float32(6))
    result = compare_production(a, b, layers=2)
    assert (result["next_token_traced"], result["next_token"]) == (7, 8)
    assert (result["verdict"], result["agrees"], result["tie"]) == ("rounding", False, True)
    b[-1, 8] = 5.01
    result = compare_production(a, b, layers=2)
    assert (result["verdict"], result["agrees"], result["tie"]) == ("bug", False, False)


def test_a_production_model_that_differs_from_itself_makes_no_excuse() -> None:
    a = logits()
    wrong = a * np.float32(1.01)  # say, miscompiled when compiled whole, and right when it is not
    assert compare_production(a, wrong, layers=2, reordered=lambda: a)["verdict"] == "bug"


def test_models_live_where_they_are_put() -> None:
    config = MODELS["qwen3"].config("float32")
    model = svf_jax.production.load_model(config, MemoryWeights(random_weights(config)))
    assert {p[...].devices().pop() for _, p in nnx.to_flat_state(nnx.state(model))} == {jax.devices("cpu")[0]}
