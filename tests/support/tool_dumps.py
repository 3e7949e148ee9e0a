"""Forwards recorded as other tools write them: by the tool itself where it installs, else file by file as its code.

Imports nothing of this project. Each writer runs a model in transformers, right or with a fault, and writes to `out`.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.model_debugging_utils import model_addition_debugger_context

Model = Any
Fault = Callable[[Model], None]


def right(_model: Model) -> None:
    """No fault."""


def swapped(model: Model) -> None:
    """Gate and up of layer 1 in each other's place."""
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight


def loaded(folder: Path, fault: Fault) -> Model:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        fault(model)
    return model.eval()


def transformers_debugger(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right, **options: Any) -> None:
    """What `model_addition_debugger_context` writes."""
    model = loaded(folder, fault)
    options = {"do_prune_layers": False, "use_repr": False, **options}
    with torch.no_grad(), model_addition_debugger_context(model, debug_path=str(out), **options):
        model(input_ids=torch.tensor([list(tokens)]), use_cache=False)


class Called:
    """One call of a module: its name and class, and the tensors that went in and came out, copied."""

    def __init__(self, name: str, module: Any, given: Sequence[Any], out: Any):
        self.name, self.kind = name, type(module).__name__
        self.inputs = [x.clone() for x in given if isinstance(x, torch.Tensor)]
        outs = out if isinstance(out, tuple | list) else getattr(out, "to_tuple", lambda: (out,))()
        self.outputs = [x.clone() for x in outs if isinstance(x, torch.Tensor)]


def calls_of(model: Model, tokens: Sequence[int]) -> list[Called]:
    """Every module's call in the order in which they end, as hooks see it."""
    seen: list[Called] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, given, out, name=name: seen.append(Called(name, m, given, out)))
    with torch.no_grad():
        model(torch.tensor([list(tokens)]), use_cache=False)
    return seen


def _sglang(folder: Path, tokens: Sequence[int], fault: Fault) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Name and outputs of the modules of SGLang's Qwen3 and Qwen2: q, k, v and gate, up fused, norms that add."""
    model = loaded(folder, fault)
    rotated: list[tuple[torch.Tensor, torch.Tensor]] = []
    code = sys.modules[type(model).__module__]
    plain = code.apply_rotary_pos_emb

    def rotate(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = plain(*args, **kwargs)
        rotated.append((q.clone(), k.clone()))
        return q, k

    code.apply_rotary_pos_emb = rotate
    try:
        of = {call.name: call for call in calls_of(model, tokens)}
    finally:
        code.apply_rotary_pos_emb = plain

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0].clone()

    yield "model.embed_tokens", [rows(of["model.embed_tokens"].outputs[0])]
    for n in range(len(model.model.layers)):
        at = f"model.layers.{n}."
        norm = of[at + "input_layernorm"]
        yield at + "input_layernorm", [rows(x) for x in (*norm.outputs, *(norm.inputs if n else ()))]
        parts = [rows(of[f"{at}self_attn.{name}_proj"].outputs[0]) for name in "qkv"]
        yield at + "self_attn.qkv_proj", [torch.cat(parts, dim=-1)]
        for name in ("q_norm", "k_norm"):
            if f"{at}self_attn.{name}" in of:
                each = rows(of[f"{at}self_attn.{name}"].outputs[0])
                yield f"{at}self_attn.{name}", [each.reshape(-1, each.shape[-1])]
        yield at + "self_attn.rotary_emb", [rows(x).transpose(0, 1).flatten(1) for x in rotated[n]]
        yield at + "self_attn.attn", [rows(of[at + "self_attn.o_proj"].inputs[0])]
        yield at + "self_attn.o_proj", [rows(of[at + "self_attn.o_proj"].outputs[0])]
        norm = of[at + "post_attention_layernorm"]
        yield at + "post_attention_layernorm", [rows(x) for x in (*norm.outputs, *norm.inputs)]
        gate_up = [rows(of[f"{at}mlp.{name}_proj"].outputs[0]) for name in ("gate", "up")]
        yield at + "mlp.gate_up_proj", [torch.cat(gate_up, dim=-1)]
        yield at + "mlp.act_fn", [rows(of[at + "mlp.down_proj"].inputs[0])]
        yield at + "mlp.down_proj", [rows(of[at + "mlp.down_proj"].outputs[0])]
    norm = of["model.norm"]
    yield "model.norm", [rows(x) for x in (*norm.outputs, *norm.inputs)]


def sglang_hooks(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """One pass as `TensorDumper` saves it, after another whose logits lie in its file."""
    inside = out / "TP0_PP0_Rank0_pid4711"
    inside.mkdir(parents=True)
    kept: dict[str, Any] = {"model": torch.zeros(3, 64), "logits_processor": torch.zeros(1, 300)}
    for name, outputs in _sglang(folder, tokens, fault):
        kept[name] = outputs[0] if len(outputs) == 1 else outputs
        if name.endswith(".rotary_emb"):  # one module under every layer's name: each call writes over all of them
            kept |= {f"model.layers.{n}.self_attn.rotary_emb": outputs for n in range(2)}
    kept["model.forward_batch_info.input_ids"] = torch.tensor(tokens)
    kept["model.forward_batch_info.seq_lens"] = torch.tensor([len(tokens)])
    kept["model.forward_batch_info.positions"] = torch.arange(len(tokens))
    torch.save(kept, inside / "Pass00001.pt")


def sglang_dumper(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right, rank: int = 0) -> None:
    """A step as `dumper` saves it with DUMPER_NON_INTRUSIVE_MODE=all, and one decoded token after it."""
    out.mkdir(exist_ok=True)
    count = 0

    def dump(step: int, name: str, value: torch.Tensor) -> None:
        nonlocal count
        shared = re.sub(r"layers\.\d+(\.self_attn\.rotary_emb)", r"layers.0\1", name)  # by its first name alone
        count += 1
        tags: dict[str, Any] = {"step": step, "rank": rank, "dump_index": count, "name": shared}
        tags["recompute_status"] = "disabled"
        if (found := re.search(r"layers\.(\d+)", name)) is not None:
            tags["layer_id"] = int(found[1])
        meta = {**tags, "world_rank": 0, "world_size": 1, "sglang_parallel_info": {"tp_rank": 0, "tp_size": 1}}
        file = "___".join(f"{key}={given}" for key, given in tags.items()) + ".pt"
        torch.save({"value": value, "meta": meta}, out / file)

    dump(0, "input_ids", torch.tensor(tokens))
    dump(0, "positions", torch.arange(len(tokens)))
    for name, outputs in _sglang(folder, tokens, fault):
        for number, value in enumerate(outputs):
            dump(0, f"non_intrusive__{name}.output" + (f".{number}" if len(outputs) > 1 else ""), value)
            dump(1, f"non_intrusive__{name}.output" + (f".{number}" if len(outputs) > 1 else ""), value[-1:].clone())
    dump(1, "input_ids", torch.tensor(tokens[-1:]))


def _msprobe(out: Path, entries: Sequence[tuple[str, str, str, list[Any], list[Any]]]) -> None:
    """msprobe's files of modules' calls: name, class, number of the call, inputs and outputs."""
    data = out / "dump_tensor_data"
    data.mkdir(parents=True)
    listed: dict[str, Any] = {}
    for name, kind, call, inputs, outputs in entries:
        entry = f"Module.{name}.{kind}.forward.{call}"
        listed[entry] = {"input_args": [], "input_kwargs": {}, "output": []}
        for end, part, tensors in (("input", "input_args", inputs), ("output", "output", outputs)):
            for number, tensor in enumerate(tensors):
                file = f"{entry}.{end}.{number}.pt"
                torch.save(tensor, data / file)
                about = {"type": "torch.Tensor", "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
                listed[entry][part].append({**about, "requires_grad": False, "data_name": file})
    head = {"task": "tensor", "level": "L0", "framework": "pytorch", "dump_data_dir": str(data), "data": listed}
    (out / "dump.json").write_text(json.dumps(head, indent=1))
    for name in ("stack.json", "construct.json"):
        (out / name).write_text("{}")


def msprobe(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """What msprobe dumps of a model in transformers at level L0, and a decoded token's call of each after it."""
    entries = []
    for call in calls_of(loaded(folder, fault), tokens):
        if call.name:
            entries.append((call.name, call.kind, "0", call.inputs, call.outputs))
            later = [x[:, -1:].clone() for x in call.outputs]
            entries.append((call.name, call.kind, "1", [], later))
    _msprobe(out, entries)


def msprobe_fused(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """What msprobe dumps of an engine with vLLM's modules; RoPE, which the layers share, under the first one's name."""
    entries: list[tuple[str, str, str, list[Any], list[Any]]] = []
    for name, outputs in _sglang(folder, tokens, fault):
        inputs = [torch.tensor(tokens)] if name == "model.embed_tokens" else []
        kind = {"norm": "RMSNorm"}.get(name.rpartition(".")[2], "Layer")
        if name.endswith(".attn"):
            before = outputs
        if name.endswith(".o_proj"):
            inputs = before
        if name.endswith(".rotary_emb"):
            entries.append(("model.layers.0.self_attn.rotary_emb", "RotaryEmbedding", name.split(".")[2], [], outputs))
        else:
            entries.append((name, kind, "0", inputs, outputs))
    _msprobe(out, entries)


def _bumblebee(folder: Path, tokens: Sequence[int], fault: Fault) -> dict[str, torch.Tensor]:
    """Outputs of Bumblebee's layers, which it maps to those of transformers."""
    of = {call.name: call.outputs[0] for call in calls_of(loaded(folder, fault), tokens) if call.outputs}
    parts = {
        "self_attention_norm": "input_layernorm",
        **{f"self_attention.{long}": f"self_attn.{long[0]}_proj" for long in ("query", "key", "value")},
        **{f"self_attention.{long}_norm": f"self_attn.{long[0]}_norm" for long in ("query", "key")},
        "self_attention.output": "self_attn.o_proj",
        "output_norm": "post_attention_layernorm",
        **{
            f"ffn.{name}": f"mlp.{at}_proj"
            for name, at in (("gate", "gate"), ("intermediate", "up"), ("output", "down"))
        },
    }
    names = {"embedder.token_embedding": "model.embed_tokens", "output_norm": "model.norm"}
    names["language_modeling_head.output"] = "lm_head"
    for n in range(2):
        names |= {f"decoder.blocks.{n}.{name}": f"model.layers.{n}.{at}" for name, at in parts.items()}
    return {name: of[at] for name, at in names.items() if at in of}


def nx_safetensors(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """Bytes as Elixir's `Safetensors.write!`: keys sorted, no padding of the header, no metadata."""
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    entries, data = [], b""
    for name, tensor in sorted(_bumblebee(folder, tokens, fault).items()):
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        entry = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        entries.append((name, entry))
        data += raw
    header = json.dumps(dict(entries), separators=(",", ":")).encode()
    out.mkdir()
    (out / "hooks.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


def nx_npy(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """Bytes as Elixir's `Npy.save`; bfloat16 as float32, since it has no name for that."""
    out.mkdir()
    for name, tensor in _bumblebee(folder, tokens, fault).items():
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({', '.join(map(str, tensor.shape))}), }}"
        header += " " * (63 - (len(header) + 10) % 64) + "\n"
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        (out / f"{name}.npy").write_bytes(start + tensor.float().numpy().tobytes())


def _documented(folder: Path, tokens: Sequence[int], fault: Fault) -> Iterator[tuple[str, torch.Tensor]]:
    """Documented keys and stages of the modules of `_sglang`."""
    one = {"input_layernorm": "attn_norm", "self_attn.qkv_proj": "qkv_bias", "self_attn.attn": "attention"}
    one |= {"self_attn.o_proj": "attn_out", "post_attention_layernorm": "ffn_norm", "mlp.act_fn": "ffn_swigl"}
    one |= {"mlp.down_proj": "ffn_out", "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    for name, outputs in _sglang(folder, tokens, fault):
        layer, _, inside = name.removeprefix("model.layers.").partition(".")
        if inside in one:
            stage = outputs[0].reshape(len(tokens), -1) if inside.endswith(("q_norm", "k_norm")) else outputs[0]
            yield f"layers.{layer}.{one[inside]}", stage
        if inside == "mlp.gate_up_proj":
            for part, stage in zip(("ffn_gate", "ffn_up"), outputs[0].chunk(2, dim=-1), strict=True):
                yield f"layers.{layer}.{part}", stage
        if inside == "post_attention_layernorm":
            yield f"layers.{layer}.post_attn_residual", outputs[1]
        if name == "model.embed_tokens":
            yield "embedding", outputs[0]
        if name == "model.norm":
            yield "final_norm", outputs[0]


def npy(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """`numpy.save` of each stage under its documented key; float16 and float64 have names there, bfloat16 has none."""
    out.mkdir()
    for key, stage in _documented(folder, tokens, fault):
        np.save(out / f"{key}.npy", stage.float().numpy())


def tensorrt_llm(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """Bytes as TensorRT-LLM's `saveNpy`: a dtype without byte order, bfloat16 as float32, a header that ends at 16."""
    out.mkdir()

    def save(name: str, array: np.ndarray) -> None:
        ends = ", " if array.ndim == 1 else ""
        shape = ", ".join(map(str, array.shape)) + ends
        header = f"{{'descr': '{array.dtype.str[1:]}', 'fortran_order': False, 'shape': ({shape})}}"
        base = 6 + 4 + len(header)
        pad = 16 * ((base + 1 + 15) // 16)
        header += " " * (pad - base - 1) + "\n"
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        (out / f"{name}.npy").write_bytes(start + array.tobytes())

    save("request_ids", np.array([1], np.int64))
    save("input_ids", np.array(tokens, np.int32))
    for key, stage in _documented(folder, tokens, fault):
        inside = ".mlp" if ".ffn_gate" in key or ".ffn_up" in key else ""
        at, _, last = key.rpartition(".")
        name = f"transformer.{at}{inside}.{last}" if at else f"transformer.{last}"
        save(name, stage.float().numpy())


def tensorrt_edge(folder: Path, tokens: Sequence[int], out: Path, fault: Fault = right) -> None:
    """What TensorRT Edge-LLM dumps of a prefill and a decode: tensors by their names in the ONNX graph."""
    model = loaded(folder, fault)
    of = {call.name: call for call in calls_of(model, tokens)}
    kept = {"logits [profile 0]": of["lm_head"].outputs[0], "/model/norm/Mul_1_output_0": of["model.norm"].outputs[0]}
    for n in range(len(model.model.layers)):
        at, module = f"/model/layers.{n}/", f"model.layers.{n}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            kept[f"{at}{name}/Mul_1_output_0"] = of[module + name].outputs[0]
        for name in "qkv":
            proj = model.get_submodule(f"{module}self_attn.{name}_proj")
            y = of[f"{module}self_attn.{name}_proj"].outputs[0]
            if proj.bias is None:
                kept[f"{at}self_attn/{name}_proj/MatMul_output_0"] = y
            else:
                kept[f"{at}self_attn/{name}_proj/Add_output_0"] = y
        attention = of[module + "self_attn.o_proj"].inputs[0]
        kept[at + "self_attn/AttentionPlugin_output_0"] = attention.reshape(*attention.shape[:2], -1, 16)
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            kept[f"{at}{name.replace('.', '/')}/MatMul_output_0"] = of[module + name].outputs[0]
        kept[at + "mlp/act_fn/Mul_output_0"] = of[module + "mlp.act_fn"].outputs[0]
        kept[at + "mlp/Mul_output_0"] = of[module + "mlp.down_proj"].inputs[0]
        kept[at + "Add_output_0"] = of[module + "post_attention_layernorm"].inputs[0]
        kept[at + "Add_1_output_0"] = of[module.removesuffix(".")].outputs[0]
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, out / "step_000_prefill.safetensors")
    later = {name: tensor[:, -1:].contiguous() for name, tensor in kept.items()}
    save_file(later, out / "step_001_decode.safetensors")


def onnx_names(folder: Path, tokens: Sequence[int], out: Path) -> set[str]:
    """The names of all values in the graph that torch.onnx makes of the model's modules."""
    model = loaded(folder, right)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = model.model, model.lm_head

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(1, 1, len(tokens), len(tokens))
            return self.lm_head(self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["ids"], "output_names": ["logits"]}
        torch.onnx.export(Whole(), (torch.tensor([list(tokens)]),), str(out), dynamo=False, opset_version=17, **names)
    return {value for node in onnx.load(out).graph.node for value in node.output}


WRITERS: dict[str, Callable[..., None]] = {
    "transformers": transformers_debugger,
    "sglang_hooks": sglang_hooks,
    "sglang_dumper": sglang_dumper,
    "msprobe": msprobe,
    "msprobe_fused": msprobe_fused,
    "nx_safetensors": nx_safetensors,
    "nx_npy": nx_npy,
    "npy": npy,
    "tensorrt_llm": tensorrt_llm,
    "tensorrt_edge": tensorrt_edge,
}
