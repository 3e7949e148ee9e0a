"""The torch forward has the bits of transformers' eager modules, stage by stage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forward_models import MODELS, Model, tokens_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from stages.files.checkpoint import open_checkpoint
from stages.run.forward import Forwarder
from stages.spec.forward import forward_pipeline
from stages.spec.stage import Scope
from svf_torch.backend import TorchBackend

PROMPTS = (1, 2, 7, 500)
# What no hook reaches inside the loop over experts and between it and the shared one: what follows has their bits.
UNREACHED = (
    "router_probs",
    "expert_gate",
    "expert_up",
    "expert_silu",
    "expert_swigl",
    "expert_out",
    "shared_weight",
    "shared_gated",
)
Recorded = dict[tuple[int | None, str], Tensor]


class Calls(TorchFunctionMode):
    """Catches what no hook reaches: the angle that cos is taken of, and the scores that the mask is added to."""

    def __init__(self, recorded: Recorded):
        super().__init__()
        self.recorded, self.layers = recorded, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cos:
            self.recorded[None, "rope_angle"] = args[0][0]
        if func in (torch.Tensor.add, torch.Tensor.__add__) and is_mask(args[1]):
            self.recorded[self.layers, "attn_scores"] = args[0][0]
            self.layers += 1
        return func(*args, **(kwargs or {}))


def is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[:2] == (1, 1) and x.shape[2] == x.shape[3]


def record(model: Any, tokens: list[int], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Recorded:
    """Every stage of one production forward, without the batch axis."""
    recorded: Recorded = {}
    with ExitStack() as stack, monkeypatch.context() as patch:

        def output(module: Any, layer: int | None, stage: str, pick: int | None = None) -> None:
            def hook(_module: Any, _args: Any, out: Any) -> None:
                recorded[layer, stage] = (out if pick is None else out[pick])[0]

            stack.callback(module.register_forward_hook(hook).remove)

        def argument(module: Any, layer: int, stage: str) -> None:
            def hook(_module: Any, args: Any) -> None:
                recorded[layer, stage] = args[0][0]

            stack.callback(module.register_forward_pre_hook(hook).remove)

        def whole(module: Any, layer: int, stage: str, pick: int | None = None) -> None:
            """The output of what has no batch axis."""

            def hook(_module: Any, _args: Any, out: Any) -> None:
                out = out if pick is None else out[pick]
                recorded[layer, stage] = out if out.is_floating_point() else out.to(torch.int32)

            stack.callback(module.register_forward_hook(hook).remove)

        def feed_forward(mlp: Any, layer: int, of: str, output: Any) -> None:
            """A dense feed-forward; what goes into its last product is what silu gave times up."""
            output(mlp.gate_proj, layer, f"{of}_gate")
            output(mlp.up_proj, layer, f"{of}_up")
            output(mlp.act_fn, layer, f"{of}_silu")
            swiglu = recorded_argument if output is whole else argument
            swiglu(mlp.down_proj, layer, f"{of}_swigl")
            output(mlp.down_proj, layer, f"{of}_out")

        def recorded_argument(module: Any, layer: int, stage: str) -> None:
            def hook(_module: Any, args: Any) -> None:
                recorded[layer, stage] = args[0]

            stack.callback(module.register_forward_pre_hook(hook).remove)

        body = model.model
        output(body.rotary_emb, None, "rope_cos", 0)
        output(body.rotary_emb, None, "rope_sin", 1)
        output(body.embed_tokens, None, "embedding")
        for n, layer in enumerate(body.layers):
            attn, mlp = layer.self_attn, layer.mlp
            output(layer.input_layernorm, n, "attn_norm")
            for name in "qkv":
                output(getattr(attn, f"{name}_proj"), n, f"{name}_proj")
            if hasattr(attn, "q_norm"):
                output(attn.q_norm, n, "q_norm")
                output(attn.k_norm, n, "k_norm")
            output(attn, n, "attn_softmax", 1)
            argument(attn.o_proj, n, "attention")
            output(attn.o_proj, n, "attn_out")
            argument(layer.post_attention_layernorm, n, "post_attn_residual")
            output(layer.post_attention_layernorm, n, "ffn_norm")
            output(mlp, n, "ffn_out")
            if hasattr(mlp, "experts"):
                whole(mlp.gate, n, "router_logits", 0)
                whole(mlp.gate, n, "router_weights", 1)
                whole(mlp.gate, n, "router_topk", 2)
                whole(mlp.experts, n, "moe_out")
                if hasattr(mlp, "shared_expert"):
                    whole(mlp.shared_expert_gate, n, "shared_score")
                    feed_forward(mlp.shared_expert, n, "shared", whole)
            else:
                feed_forward(mlp, n, "ffn", output)
            output(layer, n, "post_ffn_residual")
        output(body.norm, None, "final_norm")
        output(model.lm_head, None, "lm_head")
        turned: list[tuple[Tensor, Tensor]] = []
        module: Any = sys.modules[type(model).__module__]
        rotate = module.apply_rotary_pos_emb

        def rotated(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            turned.append(rotate(*args, **kwargs))
            return turned[-1]

        patch.setattr(module, "apply_rotary_pos_emb", rotated)
        with torch.inference_mode(), Calls(recorded):
            model(torch.tensor([tokens]), use_cache=False, **options)
        recorded[None, "inv_freq"] = body.rotary_emb.inv_freq  # of this sequence: it may go by its length
    for n, (q, k) in enumerate(turned):
        recorded[n, "q_post_rope"], recorded[n, "k_post_rope"] = q[0].transpose(0, 1), k[0].transpose(0, 1)
        recorded[n, "qkv_bias"] = torch.cat([recorded.pop((n, f"{name}_proj")) for name in "qkv"], dim=-1)
    return recorded


def make(folder: Path, model: Model, dtype: str, seed: int = 0) -> Any:
    """A random model saved by transformers, and loaded again by it."""
    config = AutoConfig.for_model(**model.raw(dtype))
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp(0.3 * torch.randn(parameter.shape)))
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            elif "embed" not in name and "lm_head" not in name:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    made.save_pretrained(folder)
    return load(folder, dtype)


def load(folder: Path, dtype: str) -> Any:
    """transformers' model, each parameter at the start of an allocation.

    Read without a cast they lie in the mapped file, 8 bytes off alignment or not as the header's length has it, and
    MKL's float32 products of few rows then have other bits (docs/findings/forward.md): production's own, not ours.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager"
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A production model and the same checkpoint in our hands."""
    folder = tmp_path_factory.mktemp("model")
    production = make(folder, MODELS[request.param], dtype)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        yield production, Forwarder(TorchBackend(), checkpoint.config, checkpoint)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def differing(production: Recorded, forwarder: Forwarder, tokens: list[int], **options: Any) -> list[str]:
    """Stages whose bits differ, out of all; a stage that neither hook nor patch reached is in the list too."""
    wrong = []
    for result in forwarder.run(tokens, **options):
        place = f"{result.layer}.{result.stage}"
        key = (result.layer, result.stage)
        if key == (result.layer, "qkv_matmul") and forwarder.path["qkv_bias"].identity:
            key = (result.layer, "qkv_bias")
        if key not in production:
            wrong.append(f"{place} was not recorded")
            continue
        expected = TorchBackend().get(production[key])
        if expected.shape != result.array.shape or not np.array_equal(bits(expected), bits(result.array)):
            wrong.append(place)
    return wrong


@pytest.mark.cover(1)
@pytest.mark.parametrize("count", PROMPTS)
def test_every_stage_has_the_bits_of_production(pair: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    production, forwarder = pair
    tokens = tokens_of(count)
    wrong = differing(record(production, tokens, monkeypatch), forwarder, tokens)
    if not forwarder.path["qkv_bias"].identity:  # a side branch: production never computes it
        layers = range(forwarder.config.num_hidden_layers)
        assert [w for w in wrong if "qkv_matmul" in w] == [f"{n}.qkv_matmul was not recorded" for n in layers]
        wrong = [w for w in wrong if "qkv_matmul" not in w]
    inside = {f"{name} was not recorded" for name in UNREACHED}
    assert " ".join(w for w in wrong if w.partition(".")[2] not in inside) == ""


@pytest.mark.cover(1)
@pytest.mark.parametrize("count", [1, 7])
def test_the_last_position_has_the_bits_of_production(pair: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    production, forwarder = pair
    tokens = tokens_of(count)
    recorded = record(production, tokens, monkeypatch, logits_to_keep=1)
    results = list(forwarder.run(tokens, stages=["lm_head", "attn_softmax"], positions="last"))
    assert [r.array.shape[-2] for r in results] == [1] * 3
    assert np.array_equal(bits(results[-1].array), bits(TorchBackend().get(recorded[None, "lm_head"])))
    softmax = TorchBackend().get(recorded[0, "attn_softmax"])[:, -1:]
    assert np.array_equal(bits(results[0].array), bits(softmax))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On several, a CPU's library may sum a wide product in another order than its parts (docs/findings/forward.md)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_real_width_has_the_bits_of_production_with_the_lm_head_in_chunks(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    model = Model("qwen2", heads=14, kv_heads=2, head_dim=64, hidden=896, intermediate=4864, vocab=20_400, layers=1)
    production = make(tmp_path, model, dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        forwarder = Forwarder(TorchBackend(), checkpoint.config, checkpoint)
        for count in (1, 13, 64):
            tokens = tokens_of(count, model.vocab)
            recorded = record(production, tokens, monkeypatch)
            stages = [name for name in forwarder.path if name != "qkv_matmul"]
            assert differing(recorded, forwarder, tokens, stages=stages, lm_head_chunk=4096) == []


def test_the_comparison_sees_one_changed_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    production = make(tmp_path, MODELS["qwen3"], "float32")
    with torch.no_grad():
        production.model.layers[1].mlp.up_proj.weight[3, 5] += 0.01
    with open_checkpoint(tmp_path) as checkpoint:
        forwarder = Forwarder(TorchBackend(), checkpoint.config, checkpoint)
        wrong = differing(record(production, tokens_of(7), monkeypatch), forwarder, tokens_of(7))
    after = [name for name in forwarder.path if name in ("ffn_up", "ffn_swigl", "ffn_out", "post_ffn_residual")]
    assert wrong == [*(f"1.{name}" for name in after), "None.final_norm", "None.lm_head"]


def test_a_float32_run_of_a_bfloat16_checkpoint_is_the_float32_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, MODELS["qwen3"], "bfloat16")
    production = load(tmp_path, "float32")
    with open_checkpoint(tmp_path) as checkpoint:
        forwarder = Forwarder(TorchBackend(), checkpoint.config, checkpoint, dtype="float32")
        assert differing(record(production, tokens_of(7), monkeypatch), forwarder, tokens_of(7)) == []


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_hooks_reach_every_stage_but_the_side_branch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    production = make(tmp_path, MODELS[name], "float32")
    recorded = {stage for _, stage in record(production, tokens_of(2), monkeypatch)}
    path = forward_pipeline(MODELS[name].config("float32"))
    assert {s.name for s in path.values() if s.scope is Scope.LAYER or s.name} - recorded == {"qkv_matmul"}
