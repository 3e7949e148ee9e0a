"""The forward path: its declaration, its three implementations against the oracle, and how it is run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from forward_models import MODELS, MemoryWeights, Model, random_weights, stages_of, tokens_of, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError, UsageError
from stages.files.checkpoint import open_checkpoint
from stages.oracle import bounds as noise
from stages.oracle import decoder as reference_decoder
from stages.oracle import experts as reference_experts
from stages.oracle.components import ReferenceBackend
from stages.oracle.rounding import round_once
from stages.oracle.verdict import Verdict
from stages.run.forward import (
    Forwarder,
    LoadedWeights,
    isolate,
    judge_stage,
    recorded_inputs,
    run_forward,
    vocabulary_plan,
)
from stages.spec.experts import is_each, of_expert
from stages.spec.forward import DECLARED, RUN_PARAMS, forward_pipeline, producers, stage_options
from stages.spec.noise import Noise
from stages.spec.selectors import resolve_layers, resolve_stages
from stages.spec.stage import Pipeline, Scope, Stage
from svf_jax import decoder as jax_decoder
from svf_jax import experts as jax_experts
from svf_jax.backend import JaxBackend
from svf_torch import decoder as torch_decoder
from svf_torch import experts as torch_experts
from svf_torch.backend import TorchBackend

BACKENDS = {"torch": TorchBackend, "jax": JaxBackend, "reference": ReferenceBackend}
TWINS = {
    "torch": (torch_decoder, torch_experts),
    "jax": (jax_decoder, jax_experts),
    "reference": (reference_decoder, reference_experts),
}
# fmt: off
ORIGINAL = [
    "embedding", "attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attention", "attn_out",
    "post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out", "post_ffn_residual",
    "layer_output", "final_norm", "lm_head",
]
ADDED = ["inv_freq", "rope_angle", "rope_cos", "rope_sin", "q_norm", "k_norm", "attn_scores", "attn_softmax"]
OF_EXPERTS = [
    "router_logits", "router_probs", "router_topk", "router_weights", "expert_gate", "expert_up", "expert_silu",
    "expert_swigl", "expert_out", "moe_out", "shared_gate", "shared_up", "shared_silu", "shared_swigl", "shared_out",
    "shared_score",
    "shared_weight", "shared_gated",
]
# fmt: on
Recorded = dict[tuple[int | None, str], np.ndarray]


def forwarder(name: str = "qwen3", dtype: str = "float32", backend: Any = None) -> Forwarder:
    config = MODELS[name].config(dtype)
    return Forwarder(backend or TorchBackend(), config, MemoryWeights(random_weights(config)))


def record(runner: Forwarder, tokens: list[int], **options: Any) -> Recorded:
    return {(result.layer, result.stage): result.array for result in runner.run(tokens, **options)}


@cache
def torch_run(name: str, dtype: str, count: int) -> Recorded:
    return record(forwarder(name, dtype), tokens_of(count))


@cache
def torch_run_as_float32(name: str) -> Recorded:
    config = MODELS[name].config("bfloat16")
    return record(
        Forwarder(TorchBackend(), config, MemoryWeights(random_weights(config)), dtype="float32"), tokens_of(7)
    )


def verdicts(runner: Forwarder, recorded: Recorded, tokens: list[int]) -> dict[tuple[int | None, str], Verdict]:
    """The isolated verdict on every recorded stage."""
    found = {}
    for (layer, name), observed in recorded.items():
        stage = runner.path.at((layer, name))
        inputs = recorded_inputs(runner.path, stage, recorded, tokens, layer, runner.config.num_hidden_layers)
        assert inputs is not None
        side = judge_stage(runner.path, runner.config, stage, inputs, runner.weights, observed, layer)
        found[layer, name] = side.verdict
    return found


def failing(runner: Forwarder, recorded: Recorded, tokens: list[int]) -> dict[str, set[Verdict]]:
    failed: dict[str, set[Verdict]] = {}
    for (_, name), verdict in verdicts(runner, recorded, tokens).items():
        if not verdict.passes:
            failed.setdefault(name, set()).add(verdict)
    return failed


# -- the declaration -------------------------------------------------------------------------------------------


def test_there_are_nineteen_original_stages() -> None:
    assert len(set(ORIGINAL)) == 19
    assert {*ORIGINAL, *ADDED, *OF_EXPERTS} == {*(stage.name for stage in DECLARED.values()), "layer_output"}


@pytest.mark.parametrize("name", MODELS)
def test_every_original_and_added_stage_can_be_asked_for_by_name(name: str) -> None:
    path = forward_pipeline(MODELS[name].config("float32"))
    of_experts = OF_EXPERTS if "moe" in name else []
    names = [stage for stage in ORIGINAL + ADDED + of_experts if stage not in path.absent]
    present = [stage for stage in names if stage in path or stage == "layer_output"]
    assert set(resolve_stages(",".join(present), path)) == set(path)
    assert resolve_stages("layer_output", path) == ("post_ffn_residual",)
    assert list(path)[:5] == ["inv_freq", "rope_angle", "rope_cos", "rope_sin", "embedding"]
    assert list(path)[-2:] == ["final_norm", "lm_head"]


def test_what_a_family_lacks_is_declared() -> None:
    qwen3, qwen2 = (forward_pipeline(MODELS[name].config("float32")) for name in ("qwen3", "qwen2"))
    assert (qwen3.absent, qwen2.absent) == ((), ("q_norm", "k_norm"))
    assert qwen3["qkv_bias"].identity
    assert qwen3["qkv_bias"].inputs == ("qkv_matmul",)
    assert not qwen2["qkv_bias"].identity
    assert qwen2["qkv_bias"].inputs == ("attn_norm",)  # product and bias in one call, as production has it
    assert "qkv_matmul" not in {name for stage in qwen2.values() for name in stage.inputs}
    assert forward_pipeline(MODELS["qwen3-bias"].config("float32"))["attn_out"].params[-1] == "self_attn.o_proj.bias"
    with pytest.raises(KeyError):
        qwen2["q_norm"]


@pytest.mark.parametrize("name", MODELS)
def test_stages_follow_their_inputs_and_parameters_exist(name: str) -> None:
    config = MODELS[name].config("float32")
    path = forward_pipeline(config)
    weights = random_weights(config) | {"lm_head.weight": np.empty(0)}
    read: set[str] = set()
    for layer, stage in stages_of(config):
        experts = range(getattr(config, "num_experts", 0))
        every = [e for p in stage.params for e in ([of_expert(p, n) for n in experts] if is_each(p) else [p])]
        names = {param if layer is None else f"model.layers.{layer}.{param}" for param in every} - {*RUN_PARAMS}
        assert names <= set(weights)
        read |= names
        for source, (at, producer) in producers(path, stage, layer, 2).items():
            assert producer in path, source
            assert (at is None) == (path.at((at, producer)).scope is Scope.MODEL)
    kinds = {f"model.layers.{layer}." for layer, _ in stages_of(config) if layer is not None}
    assert read == {name for name in weights if "layers" not in name or name.startswith(tuple(kinds))}


def test_only_the_frequencies_and_angles_are_always_float32() -> None:
    path = forward_pipeline(MODELS["qwen3"].config("bfloat16"))
    assert {name for name, stage in path.items() if stage.dtype == "float32"} == {"inv_freq", "rope_angle"}
    assert {s.dtype for s in forward_pipeline(MODELS["qwen3"].config("bfloat16"), "float32").values()} == {"float32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (Stage("b", inputs=("a",)),)}, "no earlier stage produces its input 'a'"),
        ({"stages": (Stage("a", absent=True), Stage("b", inputs=("a",)))}, "no earlier stage produces"),
        ({"stages": (Stage("a"), Stage("a"))}, "declared twice"),
        ({"stages": (Stage("a", params=("w",)),)}, "'w' is not a parameter"),
        (
            {"stages": (Stage("a"), Stage("b", inputs=("a",), params=("w",), identity=True)), "params": ("w",)},
            "one input",
        ),
        ({"stages": (Stage("a"),), "carried": {"x": ("a", "z")}}, "no stage 'z'"),
        ({"stages": (Stage("a"),), "aliases": {"y": "z"}}, "no stage 'z'"),
        ({"stages": (Stage("a", inputs=("x",), scope=Scope.LAYER),), "carried": {"x": ("e", "a")}}, "no earlier stage"),
    ],
)
def test_wrong_wiring_is_an_error_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline(**{"name": "p", "params": (), **changes})


# -- the three implementations ---------------------------------------------------------------------------------


def functions(module: Any) -> list[tuple[str, list[str], str]]:
    """Name, argument names and first docstring line of each public function, in order."""
    tree = ast.parse(inspect.getsource(module))
    return [
        (
            node.name,
            [a.arg for a in (*node.args.args, *node.args.kwonlyargs)],
            (ast.get_docstring(node) or "").splitlines()[0],
        )
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def test_twins_have_the_same_functions_in_the_same_order_with_the_same_first_lines() -> None:
    public = {side: [[one for one in functions(m) if one[0] in DECLARED] for m in TWINS[side]] for side in TWINS}
    assert {name for module in public["torch"] for name, _, _ in module} == set(DECLARED)
    assert public["torch"] == public["jax"] == public["reference"]
    for side, (decoder, experts) in TWINS.items():
        names = [[name for name, _, _ in module] for module in public[side]]
        assert [list(decoder.FORWARD_STAGES), list(experts.EXPERT_STAGES)] == names


@pytest.mark.parametrize("name", MODELS)
def test_functions_take_what_the_declaration_says(name: str) -> None:
    for stage in forward_pipeline(MODELS[name].config("float32")).stages:
        signature = inspect.signature(TorchBackend().forward[stage.function]).parameters.values()
        options = [p.name for p in signature if p.kind is p.KEYWORD_ONLY]
        positional = [p for p in signature if p.kind is not p.KEYWORD_ONLY]
        assert options == list(stage.options)
        if not stage.identity:
            required = [p for p in positional if p.default is p.empty]
            assert len(required) <= len(stage.inputs) + len(stage.params) <= len(positional)


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_torch_and_the_reference_keep_the_bounds_on_every_stage(name: str, dtype: str) -> None:
    tokens = tokens_of(7)
    runner = forwarder(name, dtype)
    assert failing(runner, torch_run(name, dtype, 7), tokens) == {}
    own = record(forwarder(name, dtype, ReferenceBackend()), tokens)
    assert set(verdicts(runner, own, tokens).values()) == {Verdict.EXACT}


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-gqa7", "qwen3-yarn", "qwen3-bias", "qwen2-gqa4", "qwen2-linear"])
def test_jax_agrees_with_torch_on_every_stage_fed_torchs_inputs(name: str, dtype: str) -> None:
    tokens, recorded = tokens_of(7), torch_run(name, dtype, 7)
    runner = forwarder(name, dtype, JaxBackend())
    for layer, stage_name in recorded:
        stage = runner.path[stage_name]
        inputs = recorded_inputs(runner.path, stage, recorded, tokens, layer, 2)
        assert inputs is not None
        out = runner.isolate(stage_name, inputs, layer)
        side = judge_stage(runner.path, runner.config, stage, inputs, runner.weights, out, layer)
        assert side.verdict.passes, (layer, stage_name, side)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 65])
def test_a_propagated_run_keeps_the_bounds(backend: str, count: int) -> None:
    runner = forwarder("qwen3", "bfloat16", BACKENDS[backend]())
    assert failing(runner, record(runner, tokens_of(count)), tokens_of(count)) == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stage_in_isolation_gives_what_the_run_gave(backend: str) -> None:
    runner = forwarder("qwen2", "float32", BACKENDS[backend]())
    tokens = tokens_of(7)
    recorded = record(runner, tokens)
    for (layer, name), expected in recorded.items():
        inputs = recorded_inputs(runner.path, runner.path[name], recorded, tokens, layer, 2)
        assert inputs is not None
        assert np.array_equal(runner.isolate(name, inputs, layer), expected), name


# -- mutants: another function is a bug at exactly that stage --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """torch with one stage replaced."""

    stage: str
    function: Callable[..., Any]
    inner: TorchBackend = dataclasses.field(default_factory=TorchBackend)
    name: str = "mutant"

    @property
    def forward(self) -> Mapping[str, Callable[..., Any]]:
        return {**self.inner.forward, self.stage: self.function}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


STAGES = torch_decoder.FORWARD_STAGES


def interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: int) -> torch.Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


def wrong_groups(q: torch.Tensor, k: torch.Tensor, *, scaling: float) -> torch.Tensor:
    keys = k.transpose(0, 1).repeat(q.shape[1] // k.shape[1], 1, 1)
    return torch.matmul(q.transpose(0, 1), keys.transpose(1, 2)) * scaling


QKV = inspect.unwrap(STAGES["qkv_matmul"])  # shapes of a mutant are not the declared ones
MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "theta 1e4 for 1e6": ("inv_freq", lambda p, **o: STAGES["inv_freq"](p, **{**o, "rope_theta": 1e4})),
    "theta a thousandth off": ("inv_freq", lambda p, **o: STAGES["inv_freq"](p, **{**o, "rope_theta": 1.001e6})),
    "positions + 1": ("rope_angle", lambda f, p: STAGES["rope_angle"](f, p + 1)),
    "cos and sin swapped": ("rope_cos", STAGES["rope_sin"]),
    "next token": ("embedding", lambda t, w: STAGES["embedding"]((t + 1) % len(w), w)),
    "eps 1e-5 for 1e-6": ("attn_norm", lambda x, w, *, eps: STAGES["attn_norm"](x, w, eps=1e-5)),
    "q and k swapped": (
        "qkv_matmul",
        lambda x, q, k, v: inspect.unwrap(STAGES["qkv_matmul"])(x, torch.cat((k, q)), k[:0], v),
    ),
    "heads reversed": ("q_norm", lambda *a, **o: STAGES["q_norm"](*a, **o).flip(1)),
    "pairs interleaved": ("q_post_rope", interleaved),
    "k not turned": ("k_post_rope", lambda k, c, s, **_: k.clone()),
    "no 1/sqrt(d)": ("attn_scores", lambda q, k, *, scaling: STAGES["attn_scores"](q, k, scaling=1.0)),
    "wrong GQA map": ("attn_scores", wrong_groups),
    "no mask": ("attn_softmax", lambda s, *, window: torch.softmax(s, dim=-1)),
    "heads of v swapped": ("attention", lambda p, x, **o: STAGES["attention"](p.flip(0), x, **o)),
    "o_proj transposed": ("attn_out", lambda x, w: x[:, : len(w)] @ w[:, : len(w)]),
    "residual twice": ("post_attn_residual", lambda x, y: x + y + x),
    "gelu": ("ffn_silu", lambda x: torch.nn.functional.gelu(x)),
    "gate not multiplied": ("ffn_swigl", lambda s, u: s),
    "norm without weight": ("final_norm", lambda x, w, *, eps: STAGES["final_norm"](x, torch.ones_like(w), eps=eps)),
    "one logit moved": ("lm_head", lambda x, w: STAGES["lm_head"](x, w) + torch.eye(len(x), len(w)) * 0.1),
}


@pytest.mark.parametrize("mutation", MUTANTS)
def test_a_mutant_is_a_bug_at_exactly_its_stage(mutation: str) -> None:
    stage, function = MUTANTS[mutation]
    runner = forwarder("qwen3", "float32", Mutant(stage, function))
    assert failing(runner, record(runner, tokens_of(7)), tokens_of(7)) == {stage: {Verdict.BUG}}


def test_a_mutant_of_bfloat16_is_found_too() -> None:
    for mutation in ("no 1/sqrt(d)", "wrong GQA map", "gelu", "eps 1e-5 for 1e-6"):
        stage, function = MUTANTS[mutation]
        model = dataclasses.replace(MODELS["qwen3"], eps=1e-6)
        config = model.config("bfloat16")
        weights = random_weights(config)
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * weights[
            "model.norm.weight"
        ].dtype.type(0.05)
        runner = Forwarder(Mutant(stage, function), config, MemoryWeights(weights))
        assert set(failing(runner, record(runner, tokens_of(7)), tokens_of(7))) == {stage}, mutation


def test_the_judge_alone_calls_a_right_run_right_and_a_moved_element_wrong() -> None:
    tokens, runner = tokens_of(7), forwarder()
    recorded = dict(torch_run("qwen3", "float32", 7))
    for name in ("attn_scores", "ffn_out", "attn_norm", "attn_softmax", "post_ffn_residual"):
        array = recorded[1, name].copy()
        array[..., 2, 1] += 1e-3
        inputs = recorded_inputs(runner.path, runner.path[name], recorded, tokens, 1, 2)
        assert inputs is not None
        side = judge_stage(runner.path, runner.config, runner.path[name], inputs, runner.weights, array, 1)
        assert side.verdict is Verdict.BUG, name


# -- running ---------------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_computed_and_read() -> None:
    runner = forwarder("qwen2")
    weights = runner.weights
    assert isinstance(weights, MemoryWeights)
    tokens = [5, 9, 5]
    [result] = runner.run(tokens, layers=[0], stages=["ffn_gate"])
    assert (result.layer, result.stage, result.array.shape) == (0, "ffn_gate", (3, 160))
    read = [name for name, *_ in weights.reads]
    assert not any(name.startswith("model.layers.1.") or name == "lm_head.weight" for name in read)
    assert [r for r in weights.reads if "embed" in r[0]] == [(read[0], 5, 6), (read[0], 9, 10)]
    assert "qkv_matmul" not in runner._compiled  # a side branch that nobody asked for
    assert {r.stage for r in runner.run(tokens)} == set(runner.path)


def test_captured_stages_do_not_depend_on_what_else_is_captured() -> None:
    full = torch_run("qwen3", "bfloat16", 7)
    for chosen in (["lm_head"], ["ffn_swigl", "rope_cos"], ["k_norm"], ["qkv_matmul"]):
        part = record(forwarder("qwen3", "bfloat16"), tokens_of(7), layers=[1], stages=chosen)
        assert {name for _, name in part} == set(chosen)
        assert {layer for layer, _ in part} <= {None, 1}
        for key, array in part.items():
            assert np.array_equal(array, full[key])


def test_layers_stream_with_one_read_ahead() -> None:
    config = dataclasses.replace(MODELS["qwen3"], layers=5).config("float32")
    weights = MemoryWeights(random_weights(config))
    runner = Forwarder(TorchBackend(), config, weights)
    for result in runner.run(tokens_of(2)):
        if result.layer is not None:
            seen = {int(name.split(".")[2]) for name, *_ in list(weights.reads) if name.startswith("model.layers.")}
            assert max(seen) <= result.layer + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stage_compiles_once_and_serves_every_layer_and_run(backend: str) -> None:
    inner = BACKENDS[backend]()
    compiled: list[Any] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def compile(self, fn: Any) -> Any:
            compiled.append(fn)
            return inner.compile(fn)

    runner = forwarder("qwen3", "float32", Counting())
    for _ in range(2):
        record(runner, tokens_of(2))
    assert len(compiled) == len(runner.path) - 1  # qkv_bias is an identity


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_the_lm_head_in_chunks_has_the_bits_of_the_whole(backend: str, dtype: str, count: int) -> None:
    config = Model(vocab=19_200, hidden=256).config(dtype)  # XLA keeps the order for multiples of 64
    weights = MemoryWeights(random_weights(config))
    runner = Forwarder(BACKENDS[backend](), config, weights)
    whole, chunked = (
        record(runner, tokens_of(count), stages=["lm_head"], lm_head_chunk=chunk) for chunk in (20_000, 4096)
    )
    assert np.array_equal(whole[None, "lm_head"], chunked[None, "lm_head"])


@given(vocab=st.integers(1, 200_000), chunk=st.integers(4096, 40_000))
def test_a_vocabulary_plan_covers_it_without_narrow_chunks(vocab: int, chunk: int) -> None:
    plan = vocabulary_plan(vocab, chunk)
    assert [start for start, _ in plan] == [0, *(stop for _, stop in plan[:-1])]
    assert plan[-1][1] == vocab
    assert len(plan) == 1 or min(stop - start for start, stop in plan) >= 4096
    assert all(start % 64 == 0 for start, _ in plan)
    assert max(stop - start for start, stop in plan) < 2 * (chunk + 4096 + 64)


def test_the_last_position_is_the_last_row_of_all() -> None:
    runner = forwarder("qwen3", "bfloat16", ReferenceBackend())
    everything, last = (record(runner, tokens_of(7), positions=p) for p in ("all", "last"))
    for (layer, name), array in everything.items():
        axes = runner.path[name].shape.split()
        row = array[-1:] if axes[0] == "tokens" else array[:, -1:] if "queries" in axes else array
        assert np.array_equal(last[layer, name], row), name


def test_float32_activations_on_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path, MODELS["qwen3"], "bfloat16")) as checkpoint:
        results = list(run_forward(TorchBackend(), checkpoint, checkpoint.config, [1, 2], dtype="float32"))
        embedding = next(r.array for r in results if r.stage == "embedding")
        assert {r.array.dtype.name for r in results} == {"float32"}
        assert np.array_equal(embedding, checkpoint.read("model.embed_tokens.weight", 1, 3).astype(np.float32))
        inputs = {"layer_input": embedding}
        again = isolate(TorchBackend(), checkpoint.config, "attn_norm", inputs, checkpoint, 0, dtype="float32")
        assert np.array_equal(again, next(r.array for r in results if r.stage == "attn_norm"))


@pytest.mark.parametrize("name", ["qwen3", "qwen3-untied"])
def test_loaded_weights_give_the_same_run_and_keep_a_tied_head_once(name: str) -> None:
    runner = forwarder(name, "bfloat16")
    loaded = LoadedWeights(runner.weights, runner.config, "float32")
    assert {loaded.read(n).ctypes.data % 64 for n in random_weights(runner.config)} == {0}
    head, embedding = loaded.read("lm_head.weight"), loaded.read("model.embed_tokens.weight")
    assert np.shares_memory(head, embedding) == runner.config.tie_word_embeddings
    for weights in (runner.weights, loaded):
        again = Forwarder(TorchBackend(), runner.config, weights, dtype="float32")
        expected = torch_run_as_float32(name)
        for key, array in record(again, tokens_of(7)).items():
            assert np.array_equal(array, expected[key])


def test_an_adapted_head_of_a_tied_model_stays_its_own() -> None:
    config = MODELS["qwen3"].config("float32")
    weights = random_weights(config)
    adapted = weights | {"lm_head.weight": weights["model.embed_tokens.weight"] * np.float32(2)}
    for held in (MemoryWeights(adapted), LoadedWeights(MemoryWeights(adapted), config)):
        got = record(Forwarder(TorchBackend(), config, held), tokens_of(7))
        assert np.array_equal(got[None, "lm_head"], 2 * torch_run("qwen3", "float32", 7)[None, "lm_head"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_gat", r"no stage 'ffn_gat'; there are inv_freq, .*lm_head, layer_output \(= post_ffn_residual\)"),
        ("q_norm", "forward qwen2 has no such step; it has inv_freq"),
        (" , ", "is empty"),
    ],
)
def test_an_unknown_stage_is_refused_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve_stages(text, forward_pipeline(MODELS["qwen2"].config("float32")))
    assert caught.value.exit_code == 2


def test_layers_are_resolved_or_refused_with_what_there_is() -> None:
    assert resolve_layers("all", 6) == tuple(range(6))
    assert resolve_layers("0,3-5, 4", 6) == (0, 3, 4, 5)
    for text in ("6", "3-6", "-1", "a", "", "5-3", "1-", "٣", "0,,1", "9" * 40):
        with pytest.raises(UsageError, match="there are 0-5"):
            resolve_layers(text, 6)


def test_tokens_that_the_model_has_not_are_refused() -> None:
    runner = forwarder()
    for tokens, message in (([], "at least one token"), ([1, 300], "token 1 is 300"), ([-1], "token 0 is -1")):
        with pytest.raises(InputError, match=message):
            list(runner.run(tokens))
    with pytest.raises(UsageError, match="at least 4096"):
        list(runner.run([1], lm_head_chunk=100))


# -- rounding and bounds ---------------------------------------------------------------------------------------


@given(st.floats(-(2.0**130), 2.0**130, allow_nan=False))
def test_rounding_once_to_bfloat16_is_to_nearest_even(value: float) -> None:
    [got] = round_once(np.array([value]), np.dtype(ml_dtypes.bfloat16))
    bits = int(np.abs(got).view(np.uint16))
    if not np.isfinite(got):
        assert abs(value) >= (2 - 2.0**-8) * 2.0**127
        return
    near = [np.uint16(b).view(ml_dtypes.bfloat16) for b in (bits - 1, bits + 1) if 0 <= b < 0x7F80]
    error = abs(Fraction(float(np.abs(got))) - Fraction(abs(value)))
    others = [abs(Fraction(float(x)) - Fraction(abs(value))) for x in near]
    assert all(error < other or (error == other and bits % 2 == 0) for other in others)


def test_rounding_by_way_of_float32_would_go_wrong() -> None:
    just_above_a_tie = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(round_once(just_above_a_tie, np.dtype(ml_dtypes.bfloat16))[0]) == 1 + 2.0**-7
    assert float(just_above_a_tie.astype(ml_dtypes.bfloat16)[0]) == 1.0


ORDERS: dict[str, Callable[[np.ndarray], np.float32]] = {
    "forwards": lambda t: np.add.accumulate(t, dtype=np.float32)[-1],
    "backwards": lambda t: np.add.accumulate(t[::-1], dtype=np.float32)[-1],
    "largest first": lambda t: np.add.accumulate(t[np.argsort(-np.abs(t))], dtype=np.float32)[-1],
}


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 300), order=st.sampled_from(sorted(ORDERS)))
def test_no_order_of_summation_exceeds_the_rigorous_bounds(seed: int, k: int, order: str) -> None:
    rng = np.random.default_rng(seed)
    total = ORDERS[order]
    x, w = (
        rng.standard_normal(k).astype(np.float32) * np.float32(10.0) ** rng.integers(-3, 4, k).astype(np.float32)
        for _ in range(2)
    )
    exact = reference_decoder._linear(x[None], w[None])
    assert abs(total(x * w) - exact) <= noise.rigorous(Noise.PRODUCT, (x[None], w[:, None]), exact, np.dtype("f4"))
    value = reference_decoder._rms_norm(x[None], w, 1e-6)
    mean = total(x * x) / np.float32(k) + np.float32(1e-6)
    norm = w * (x * (np.float32(1) / np.sqrt(mean)))
    operands = reference_decoder.OPERANDS["attn_norm"](x[None], w, eps=1e-6)
    assert (abs(norm - value) <= noise.rigorous(Noise.RMS_NORM, operands, value, np.dtype("f4"))).all()
    scores = np.clip(x, -80, 80)[None, None]
    p = reference_decoder.attn_softmax(scores)
    e = np.exp(scores - scores.max())
    operands = reference_decoder.OPERANDS["attn_softmax"](scores, window=None)
    assert (abs(e / total(e[0, 0]) - p) <= noise.rigorous(Noise.SOFTMAX, operands, p, np.dtype("f4"))).all()


def test_every_kind_of_the_path_has_bounds_and_they_grow_from_calibrated_to_rigorous_where_sums_are_long() -> None:
    kinds = {stage.noise for stage in forward_pipeline(MODELS["qwen3"].config("float32")).values()}
    assert kinds - {Noise.EXACT} <= set(noise.BOUNDS)
    assert set(noise.LAMBDA) == set(Noise)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 1024)).astype(np.float32), rng.standard_normal((1024, 4)).astype(np.float32)
    value = a.astype(np.float64) @ b.astype(np.float64)
    for kind, operands in ((Noise.PRODUCT, (a, b)), (Noise.SCORES, (a, b, 0.1, np.dtype("f4")))):
        ratio = noise.rigorous(kind, operands, value, np.dtype("f4")) / noise.calibrated(
            kind, operands, value, np.dtype("f4")
        )
        assert (ratio > 1).all()


def test_an_element_on_a_prescribed_rounding_boundary_may_flip() -> None:
    dtype = np.dtype(ml_dtypes.bfloat16)
    normed = np.array([[1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-10]])  # a tie of bfloat16, and no tie
    bound = noise.calibrated(Noise.RMS_NORM, (normed, np.ones(2), dtype), normed, dtype)
    assert bound[0, 0] > 2.0**-7 > bound[0, 1]


def test_options_are_those_of_the_config() -> None:
    path, config = forward_pipeline(MODELS["qwen3-yarn"].config("bfloat16")), MODELS["qwen3-yarn"].config("bfloat16")
    assert stage_options(config, path["attn_scores"]) == {"scaling": 32**-0.5}
    assert stage_options(config, path["rope_cos"]) == {
        "attention_scaling": config.rope["attention_factor"],
        "dtype": "bfloat16",
    }
