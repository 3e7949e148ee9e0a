"""Somebody else's program: runs a Qwen in transformers, records it as docs/foreign-dumps.md says, and may be wrong.

Imports nothing of this project. python foreign_program.py TOKENS MODEL DTYPE OUT FAULT [MODEL DTYPE OUT FAULT ...]
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

ROTATE = modeling_qwen3.apply_rotary_pos_emb


def run(folder, tokens, dtype, out, fault):
    attention = "sdpa" if fault == "sdpa" else "eager"  # sdpa lets out neither scores nor probabilities
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
    stages: dict[str, torch.Tensor] = {}

    def keep(key, value):
        """Record a value; of a decode, each call's rows after those before it."""
        value = value.detach().clone()
        if key in stages and key.endswith(("attn_scores", "attn_softmax")):
            # A decode computes no keys to come: nothing stands there, or for the probabilities 0.
            blank = float("nan") if key.endswith("attn_scores") else 0.0
            before = torch.nn.functional.pad(stages[key], (0, value.shape[-1] - stages[key].shape[-1]), value=blank)
            value = torch.cat((before, value), dim=1)
        elif key in stages:
            value = torch.cat((stages[key], value), dim=0)
        stages[key] = value

    def output(module, key, pick=None):
        module.register_forward_hook(lambda _m, _a, out: keep(key, (out if pick is None else out[pick])[0]))

    def argument(module, key):
        module.register_forward_pre_hook(lambda _m, args: keep(key, args[0][0]))

    body = model.model
    output(body.rotary_emb, "rope_cos", 0)
    output(body.rotary_emb, "rope_sin", 1)
    output(body.embed_tokens, "embedding")
    for n, layer in enumerate(body.layers):
        at, attn, mlp = f"layers.{n}.", layer.self_attn, layer.mlp
        output(layer.input_layernorm, at + "attn_norm")
        for name in "qkv":
            output(getattr(attn, f"{name}_proj"), at + name)
        if hasattr(attn, "q_norm"):
            output(attn.q_norm, at + "q_norm")
            output(attn.k_norm, at + "k_norm")
        argument(attn.o_proj, at + "attention")
        output(attn.o_proj, at + "attn_out")
        argument(layer.post_attention_layernorm, at + "post_attn_residual")
        output(layer.post_attention_layernorm, at + "ffn_norm")
        output(mlp.gate_proj, at + "ffn_gate")
        output(mlp.up_proj, at + "ffn_up")
        output(mlp.act_fn, at + "ffn_silu")
        argument(mlp.down_proj, at + "ffn_swigl")
        output(mlp.down_proj, at + "ffn_out")
        output(layer, at + "layer_output")
    output(body.norm, "final_norm")
    output(model.lm_head, "lm_head")

    calls = {"rope": 0}

    def rotated(q, k, cos, sin, *args, **kwargs):
        n = calls["rope"] % len(body.layers)
        calls["rope"] += 1
        if fault == "sin has the other sign" and n == 1:
            sin = -sin
        before = k
        q, k = ROTATE(q, k, cos, sin, *args, **kwargs)
        if fault == "keys 2 positions on from token 4 on":
            later = [torch.cat((x[:, :4], x[:, 6:], x[:, -2:]), dim=1) for x in (cos, sin)]
            k = ROTATE(before, before, *later)[1]
        keep(f"layers.{n}.q_post_rope", q[0].transpose(0, 1))
        keep(f"layers.{n}.k_post_rope", k[0].transpose(0, 1))
        return q, k

    def attend(module, query, key, value, mask, scaling, **_):
        n, groups = module.layer_idx, query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if fault == "wrong kv head map" and n == 1:
            keys = key.repeat(1, groups, 1, 1)
        scores = query @ keys.transpose(2, 3)
        if not (fault == "no 1/sqrt(d)" and n == 1):
            scores = scores * scaling
        masked = scores if mask is None or (fault == "no mask" and n == 0) else scores + mask
        p = torch.softmax(masked, dim=-1, dtype=torch.float32).to(query.dtype)
        keep(f"layers.{n}.attn_scores", scores[0])
        keep(f"layers.{n}.attn_softmax", p[0])
        return (p @ values).transpose(1, 2).contiguous(), p

    for code in (modeling_qwen2, modeling_qwen3):
        code.apply_rotary_pos_emb, code.eager_attention_forward = rotated, attend
    with torch.no_grad():
        if fault == "eps":
            body.layers[1].post_attention_layernorm.variance_epsilon = 1e-3
        if fault == "one weight":
            body.layers[0].mlp.down_proj.weight[3, 5] += 0.5
        if fault == "gate and up swapped":
            gate, up = body.layers[1].mlp.gate_proj, body.layers[1].mlp.up_proj
            gate.weight, up.weight = up.weight, gate.weight
        if fault == "theta":
            body.rotary_emb.inv_freq.copy_(body.rotary_emb.inv_freq**1.1)
        if fault == "bfloat16 inside":
            gate = body.layers[1].mlp.gate_proj
            gate.forward = lambda x: (x.bfloat16() @ gate.weight.bfloat16().T).float()
        frequencies = body.rotary_emb.inv_freq
        if fault == "bfloat16 frequencies":
            frequencies.copy_(frequencies.bfloat16())
        if fault == "frequencies made in bfloat16":
            exponents = torch.arange(0, 2 * len(frequencies), 2).bfloat16() / (2 * len(frequencies))
            frequencies.copy_(1 / model.config.rope_parameters["rope_theta"] ** exponents)
        padding = 5 if fault.startswith("padded") else 0
        first = int(fault.split()[-1]) if fault.startswith("positions from") else 0
        positions = first + torch.arange(padding + len(tokens))
        if fault == "all at 0 from token 6 on":
            positions[6:] = 0
        if fault == "3 too many from token 6 on":
            positions[6:] += 3
        options = {}
        if fault == "padded":
            options["attention_mask"] = (torch.arange(len(positions)) >= padding)[None]
        if fault == "decode":
            cache = DynamicCache(config=model.config)
            for part in (tokens[:4], *([token] for token in tokens[4:])):
                model(torch.tensor([part]), past_key_values=cache, use_cache=True)
        else:
            model(torch.tensor([[0] * padding + tokens]), position_ids=positions[None], use_cache=False, **options)
        frequencies = body.rotary_emb.inv_freq
        keep("inv_freq", frequencies)  # dynamic and longrope go by the sequence's length
        angle = positions.float()[:, None] * frequencies
        keep("rope_angle", torch.cat((angle, angle), dim=-1))
        for key, value in stages.items():
            if padding and key != "inv_freq":
                pairs = key.rpartition(".")[2] in ("attn_scores", "attn_softmax")
                stages[key] = value[:, padding:, padding:] if pairs else value[padding:]

    for n in range(len(body.layers)):
        joined = torch.cat([stages.pop(f"layers.{n}.{name}") for name in "qkv"], dim=-1)
        stages[f"layers.{n}.qkv_bias"] = joined
        if body.layers[n].self_attn.q_proj.bias is None:
            stages[f"layers.{n}.qkv_matmul"] = joined.clone()
    if fault == "unknown key":
        stages["layers.0.attn_bias"] = stages["embedding"].clone()
    if fault == "no cos":
        del stages["rope_cos"]
    if fault == "head-first":
        stages["layers.1.q_post_rope"] = stages["layers.1.q_post_rope"].transpose(0, 1)
    if fault == "as float32":
        stages = {key: value.float() for key, value in stages.items()}
    if fault == "a batch axis":
        stages = {key: value[None] for key, value in stages.items()}
    stages = {key: value.contiguous() for key, value in stages.items()}
    if out.endswith(".safetensors"):
        save_file(stages, out)
    else:
        Path(out).mkdir()
        for part in {key.rpartition(".")[0] for key in stages}:
            some = {key: value for key, value in stages.items() if key.rpartition(".")[0] == part}
            save_file(some, f"{out}/{part or 'model'}.safetensors")


ids, *words = sys.argv[1:]
for at in range(0, len(words), 4):
    folder, dtype, out, fault = words[at : at + 4]
    run(folder, [int(token) for token in ids.split(",")], dtype, out, fault)
