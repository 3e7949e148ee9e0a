"""Forty dumps that hold next to nothing, judged: layers' outputs alone, or logits alone, of right and wrong engines.

    python benchmarks/little.py [--set installed|strangers] [--only SUBSTRING] [--record FILE]

A Qwen3 of 6 layers, hidden 256, vocabulary 512, 20 tokens. `installed`: transformers (eager, sdpa, decoding) and a
forward in `jax.numpy` (compiled as one, and op by op), whose bits this machine can give. `strangers`: the same forward
in numpy, with products in shuffled blocks of K summed in float32 and functions one unit in the last place off, whose
bits nothing here gives. Each dump is judged by one `svf audit`, of
bfloat16 with `--natives`, in a process of its own. An answer is right
if a right run is called sound, and of a wrong one the culprit's hint names what was planted; `too long` says that it is
too long to tell; a right run that is called wrong is an alarm; another name is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from stages.files.tensorfile import write_tensors
from stages.selftest.specimens import Shape
from stages.spec.families import parameter_shapes, parse_config

LAYERS, HIDDEN, VOCAB, HEADS, KV, DIM, WIDTH = 6, 256, 512, 8, 2, 32, 768
TOKENS = list(range(3, 223, 11))
THETA, EPS = 1e6, 1e-6
Weights = dict[str, np.ndarray]


@dataclass
class Knobs:
    """What a fault may turn in an engine, beside the weights that it is given; by layer."""

    eps: dict[tuple[int, str], float] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)
    theta: float = THETA
    act: dict[int, str] = field(default_factory=dict)
    without_q_norm: set[int] = field(default_factory=set)
    tiled: set[int] = field(default_factory=set)
    seen: dict[int, int] = field(default_factory=dict)  # keys after the query's own that the mask shows


@dataclass(frozen=True)
class Fault:
    """One mistake: `told` are words of which the hint must have all of one group."""

    kind: str
    plant: Callable[[Weights, Knobs], None]
    told: tuple[tuple[str, ...], ...]


def _weight(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}.weight"


def _element(layer: int, name: str, row: int, column: int, become: str) -> Callable[[Weights, Knobs], None]:
    def plant(weights: Weights, _: Knobs) -> None:
        array = weights[_weight(layer, name)]
        new = {"sign": -array[row, column], "zero": 0, "neighbour": array[row, column + 1]}[become]
        array[row, column] = new

    return plant


def _rows(layer: int, name: str, one: int, other: int) -> Callable[[Weights, Knobs], None]:
    def plant(weights: Weights, _: Knobs) -> None:
        array = weights[_weight(layer, name)]
        array[[one, other]] = array[[other, one]]

    return plant


def _copied(to: str, source: str) -> Callable[[Weights, Knobs], None]:
    def plant(weights: Weights, _: Knobs) -> None:
        weights[to] = weights[source].copy()

    return plant


def _knob(name: str, at: Any, value: Any) -> Callable[[Weights, Knobs], None]:
    def plant(_: Weights, knobs: Knobs) -> None:
        if at is None:
            setattr(knobs, name, value)
        elif value is None:
            getattr(knobs, name).add(at)
        else:
            getattr(knobs, name)[at] = value

    return plant


def faults(of: int) -> list[Fault]:
    """The mistakes, in places that differ with `of`."""
    a, b, c = (1 + of) % LAYERS, (2 + of) % LAYERS, (3 + of) % LAYERS
    return [
        Fault("eps x 10 in one k_norm", _knob("eps", (a, "k_norm"), 10 * EPS), ((f"layers.{a}.k_norm", "eps"),)),
        Fault(
            "eps x 1000 in one input norm",
            _knob("eps", (b, "attn_norm"), 1000 * EPS),
            ((f"layers.{b}.attn_norm", "eps"),),
        ),
        Fault(
            "scale x 1.01 in one layer",
            _knob("scale", c, 1.01),
            # An engine that rounds the scale to bfloat16 computes with 1.011 times it.
            ((f"layers.{c}.", "1.01 times"), (f"layers.{c}.", "1.011 times")),
        ),
        Fault("theta 1e4", _knob("theta", None, 1e4), (("rope_theta", "10000"),)),
        Fault(
            "sign of one element of down_proj",
            _element(a, "mlp.down_proj", 5, 7, "sign"),
            ((f"layers.{a}.", "down_proj", "[5, 7]"),),
        ),
        Fault(
            "sign of one element of up_proj",
            _element(b, "mlp.up_proj", 50, 17, "sign"),
            ((f"layers.{b}.", "up_proj", "[50, 17]"),),
        ),
        Fault(
            "one element of q_proj is 0",
            _element(c, "self_attn.q_proj", 40, 9, "zero"),
            ((f"layers.{c}.", "q_proj", "[40, 9]"),),
        ),
        Fault(
            "one element of o_proj is its neighbour",
            _element(a, "self_attn.o_proj", 11, 13, "neighbour"),
            ((f"layers.{a}.", "o_proj", "[11, 13]"),),
        ),
        Fault(
            "two rows of gate_proj swapped", _rows(b, "mlp.gate_proj", 3, 4), ((f"layers.{b}.", "gate_proj", "3", "4"),)
        ),
        Fault("the mask shows one more key", _knob("seen", c, 1), ((f"layers.{c}.", "mask"), (f"layers.{c}.", "key"))),
        Fault("q_norm left out of one layer", _knob("without_q_norm", a, None), ((f"layers.{a}.q_norm", "left out"),)),
        Fault(
            "gelu for silu in one layer", _knob("act", b, "gelu"), ((f"layers.{b}.", "gelu"), (f"layers.{b}.", "GELU"))
        ),
        Fault(
            "GQA heads tiled in one layer",
            _knob("tiled", c, None),
            ((f"layers.{c}.", "head"), (f"layers.{c}.", "tile")),
        ),
        Fault(
            "v_proj of another layer",
            _copied(_weight(a, "self_attn.v_proj"), _weight((a + 1) % LAYERS, "self_attn.v_proj")),
            ((f"layers.{a}.", f"layer {(a + 1) % LAYERS}"),),
        ),
        Fault(
            "one norm's weight is the other's",
            _copied(_weight(b, "post_attention_layernorm"), _weight(b, "input_layernorm")),
            ((f"layers.{b}.ffn_norm", "input_layernorm"),),
        ),
        Fault(
            "scale 1/sqrt(hidden) everywhere",
            lambda _, k: k.scale.update(dict.fromkeys(range(LAYERS), (DIM / HIDDEN) ** 0.5)),
            (("every layer", "hidden_size"), ("every layer", "scal")),
        ),
    ]


# -- the forward of numpy and of jax.numpy ------------------------------------------------------------------------


def forward(
    xp: ModuleType,
    product: Callable[..., Any],
    off: Callable[[Any], Any],
    weights: Mapping[str, Any],
    knobs: Knobs,
    dtype: Any,
) -> dict[str, Any]:
    """Layers' outputs, the final norm and the logits; `off` is what a library's functions add to the last place."""
    wide = xp.float32
    out: dict[str, Any] = {}

    def w(layer: int, name: str) -> Any:
        return weights[_weight(layer, name)]

    def norm(x: Any, weight: Any, eps: float) -> Any:
        x = x.astype(wide)
        root = off(1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + wide(eps)))
        return weight * (x * root).astype(dtype)

    n = len(TOKENS)
    inv = (1 / wide(knobs.theta) ** (xp.arange(0, DIM, 2, dtype=wide) / wide(DIM))).astype(wide)
    angle = xp.concatenate([xp.arange(n, dtype=wide)[:, None] * inv] * 2, axis=-1)
    cos, sin = (off(f(angle)).astype(dtype)[:, None] for f in (xp.cos, xp.sin))

    def turned(x: Any) -> Any:
        half = DIM // 2
        return x * cos + xp.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin

    x = weights["model.embed_tokens.weight"][xp.asarray(TOKENS)]
    out["embedding"] = x
    for i in range(LAYERS):
        eps = {name: knobs.eps.get((i, name), EPS) for name in ("attn_norm", "q_norm", "k_norm", "ffn_norm")}
        y = norm(x, w(i, "input_layernorm"), eps["attn_norm"])
        q, k, v = (product(y, w(i, f"self_attn.{name}_proj")).reshape(n, -1, DIM) for name in "qkv")
        if i not in knobs.without_q_norm:
            q = norm(q, w(i, "self_attn.q_norm"), eps["q_norm"])
        k = norm(k, w(i, "self_attn.k_norm"), eps["k_norm"])
        q, k = turned(q), turned(k)
        if i in knobs.tiled:
            k, v = (xp.concatenate([a] * (HEADS // KV), axis=1) for a in (k, v))
        else:
            k, v = (xp.repeat(a, HEADS // KV, axis=1) for a in (k, v))
        scale = wide(DIM**-0.5 * knobs.scale.get(i, 1.0))
        scores = xp.stack([product(q[:, h], k[:, h]) for h in range(HEADS)])
        seen = xp.tril(xp.ones((n, n), bool), knobs.seen.get(i, 0))
        scores = xp.where(seen, (scores * scale.astype(dtype)).astype(wide), -xp.inf)
        p = off(xp.exp(scores - scores.max(axis=-1, keepdims=True)))
        p = (p / p.sum(axis=-1, keepdims=True)).astype(dtype)
        o = xp.stack([product(p[h], v[:, h].T) for h in range(HEADS)], axis=1).reshape(n, -1)
        x = x + product(o, w(i, "self_attn.o_proj"))
        y = norm(x, w(i, "post_attention_layernorm"), eps["ffn_norm"])
        gate, up = product(y, w(i, "mlp.gate_proj")), product(y, w(i, "mlp.up_proj"))
        g = gate.astype(wide)
        if knobs.act.get(i):
            act = wide(0.5) * g * (1 + xp.tanh(wide(0.7978845608028654) * (g + wide(0.044715) * g * g * g)))
        else:
            act = g / (1 + off(xp.exp(-g)))
        x = x + product(act.astype(dtype) * up, w(i, "mlp.down_proj"))
        out[f"layers.{i}.post_ffn_residual"] = x
    out["final_norm"] = norm(x, weights["model.norm.weight"], EPS)
    out["lm_head"] = product(out["final_norm"], weights["lm_head.weight"])
    return out


def by_numpy(_folder: Path, weights: Weights, knobs: Knobs, dtype: str, block: int) -> dict[str, np.ndarray]:
    """An engine whose bits nothing here has: products in shuffled blocks of so many terms."""
    own = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        k = x.shape[-1]
        order, total = np.random.default_rng(k).permutation(-(-k // block)), np.zeros((len(x), len(w)), np.float32)
        for number in order:
            part = slice(number * block, (number + 1) * block)
            total += x[:, part].astype(np.float32) @ w[:, part].astype(np.float32).T
        return total.astype(own)

    def off(y: np.ndarray) -> np.ndarray:
        return np.nextafter(y, np.where(y.view(np.uint32) & 4, np.inf, -np.inf).astype(np.float32)) * (y != 0)

    with np.errstate(all="ignore"):
        return forward(np, product, off, {k: v.astype(own) for k, v in weights.items()}, knobs, own)


def by_jax(weights: Weights, knobs: Knobs, dtype: str, compiled: bool) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp

    own = jnp.dtype(dtype)

    def run(given: Mapping[str, Any]) -> dict[str, Any]:
        return forward(jnp, lambda x, w: x @ w.T, lambda y: y, given, knobs, own)

    given = {k: jnp.asarray(v.astype(np.float32)).astype(own) for k, v in weights.items()}
    return {k: np.asarray(v) for k, v in (jax.jit(run) if compiled else run)(given).items()}


def by_transformers(
    folder: Path, weights: Weights, knobs: Knobs, dtype: str, attention: str, decode: bool
) -> dict[str, np.ndarray]:
    import torch
    import transformers
    from transformers.models.qwen3 import modeling_qwen3

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    state = {k: torch.from_numpy(v.astype(np.float32)).to(getattr(torch, dtype)) for k, v in weights.items()}
    model.load_state_dict(state)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    for (layer, name), eps in knobs.eps.items():
        at = model.model.layers[layer]
        (getattr(at, names[name]) if name in names else getattr(at.self_attn, name)).variance_epsilon = eps
    for layer, factor in knobs.scale.items():
        model.model.layers[layer].self_attn.scaling *= factor
    for layer in knobs.act:
        model.model.layers[layer].mlp.act_fn = torch.nn.GELU("tanh")
    for layer in knobs.without_q_norm:
        model.model.layers[layer].self_attn.q_norm = torch.nn.Identity()
    if knobs.theta != THETA:
        model.model.rotary_emb.inv_freq = 1 / (knobs.theta ** (torch.arange(0, DIM, 2, dtype=torch.float32) / DIM))
    for layer in knobs.tiled:
        _tile(model.model.layers[layer].self_attn, modeling_qwen3)
    for layer, more in knobs.seen.items():
        mask = torch.where(torch.ones(len(TOKENS), len(TOKENS)).tril(more) > 0, 0.0, torch.finfo(torch.float32).min)
        model.model.layers[layer].self_attn.register_forward_pre_hook(
            functools.partial(_masked, mask[None, None].to(getattr(torch, dtype))), with_kwargs=True
        )
    calls: dict[str, list[Any]] = {}

    def keep(key: str, *call: Any) -> None:
        value = call[-1][0] if isinstance(call[-1], tuple) else call[-1]
        calls.setdefault(key, []).append(value[0].clone())

    modules = {"embedding": model.model.embed_tokens, "final_norm": model.model.norm, "lm_head": model.lm_head}
    modules |= {f"layers.{i}.post_ffn_residual": at for i, at in enumerate(model.model.layers)}
    for key, module in modules.items():
        module.register_forward_hook(functools.partial(keep, key))
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config) if decode else None
        for ids in [[t] for t in TOKENS] if decode else [TOKENS]:
            model(torch.tensor([ids]), past_key_values=cache, use_cache=decode)
    joined = {key: torch.cat(parts).float().numpy() for key, parts in calls.items()}
    return {key: value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for key, value in joined.items()}


def _tile(attention: Any, modeling: Any) -> None:
    """k and v's projections give the heads in the order in which repeating them is tiling them."""
    was = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        repeat = modeling.repeat_kv
        modeling.repeat_kv = lambda x, n: x.repeat(1, n, 1, 1)
        try:
            return was(*args, **kwargs)
        finally:
            modeling.repeat_kv = repeat

    attention.config._attn_implementation = "eager"
    attention.forward = forward


def _masked(mask: Any, _module: Any, args: Any, kwargs: Any) -> Any:
    return args, kwargs | {"attention_mask": mask}


ENGINES: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {
    "transformers eager": functools.partial(by_transformers, attention="eager", decode=False),
    "transformers sdpa": functools.partial(by_transformers, attention="sdpa", decode=False),
    "transformers decoding": functools.partial(by_transformers, attention="sdpa", decode=True),
    "jax compiled": lambda _folder, *run: by_jax(*run, compiled=True),
    "jax op by op": lambda _folder, *run: by_jax(*run, compiled=False),
}
STRANGERS = {f"numpy, blocks of {block}": functools.partial(by_numpy, block=block) for block in (8, 16, 48)}


# -- the forty ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One dump: of which engine, what of it is recorded, and what is wrong."""

    number: int
    engine: str
    dtype: str
    recorded: str
    fault: Fault | None

    @property
    def name(self) -> str:
        return (
            f"{self.number:02} {self.recorded} {self.dtype} {self.engine}: {self.fault.kind if self.fault else 'right'}"
        )


def cases(strangers: bool) -> Iterator[Case]:
    """12 right ones and 28 wrong ones, half of layers' outputs, half of logits, dtypes by turn."""
    number, engines = 0, list(STRANGERS if strangers else ENGINES)
    for recorded in ("hidden", "logits"):
        for of in range(6):
            dtype = ("float32", "bfloat16")[of % 2]
            yield Case(number, engines[of % len(engines)], dtype, recorded, None)
            number += 1
        for of in range(14):
            half = len(faults(0)) // 2
            which = (of + (2 if recorded == "logits" else 0)) % len(faults(0))
            dtype = ("float32", "bfloat16")[(of // 2 + of + which // half) % 2]
            fault, engine = faults(of)[which], engines[number % len(engines)]
            if engine == "transformers decoding" and "mask" in fault.kind:  # which has no key to come
                engine = "transformers eager"
            yield Case(number, engine, dtype, recorded, fault)
            number += 1


def model(folder: Path, dtype: str) -> Weights:
    """The right model in a folder, and its weights."""
    raw = Shape(
        heads=HEADS,
        kv_heads=KV,
        head_dim=DIM,
        hidden=HIDDEN,
        intermediate=WIDTH,
        layers=LAYERS,
        vocab=VOCAB,
        tied=False,
        dtype=dtype,
    ).raw()
    rng, weights = np.random.default_rng(7), Weights()
    for name, shape in parameter_shapes(parse_config(raw, "config.json")).items():
        x = rng.standard_normal(shape)
        wide = np.exp(0.3 * x) if len(shape) == 1 else x * (1.0 if "embed" in name else shape[-1] ** -0.5)
        weights[name] = wide.astype(np.float32).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    write_tensors(folder / "model.safetensors", weights, metadata={"format": "pt"})
    return weights


def _recorded(case: Case, run: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: np.ascontiguousarray(v) for k, v in run.items() if (k == "lm_head") == (case.recorded == "logits")}


def make(case: Case, folder: Path) -> Path:
    """The dump of a case, beside its model."""
    own = folder / f"model-{case.dtype}"
    right = model(own, case.dtype)
    engine, weights, knobs = {**ENGINES, **STRANGERS}[case.engine], {k: v.copy() for k, v in right.items()}, Knobs()
    if case.fault is not None:
        case.fault.plant(weights, knobs)
    kept = _recorded(case, engine(own, weights, knobs, case.dtype))
    if case.fault is not None:
        without = _recorded(case, engine(own, right, Knobs(), case.dtype))
        assert any(not np.array_equal(kept[key], without[key]) for key in kept), f"{case.name}: changes nothing"
    file = folder / f"{case.number:02}.safetensors"
    write_tensors(file, kept)
    return file


def audited(case: Case, folder: Path) -> dict[str, Any]:
    """What `svf audit` says of a case, and how long it took."""
    file, began = folder / f"{case.number:02}.safetensors", time.perf_counter()
    named = ["--model", str(folder / f"model-{case.dtype}"), "--tokens", ",".join(map(str, TOKENS))]
    # Of 16 bits, bits tell more than bounds; of float32 they tell nothing more.
    natives = ["--natives"] if case.dtype == "bfloat16" else []
    command = [str(Path(sys.executable).parent / "svf"), "audit", str(file), *named, *natives, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    try:
        said = json.loads(done.stdout)
    except json.JSONDecodeError:
        return {
            "case": case.name,
            "answer": "wrong",
            "seconds": seconds,
            "hint": done.stderr[-300:],
            "outcome": "error",
        }
    culprit = said.get("culprit") or {}
    hint = str(culprit.get("hint"))
    if case.fault is None:
        answer = "right" if said["outcome"] == "sound" else "too long" if said["outcome"] == "incomplete" else "alarm"
    elif any(
        all(word in hint or word in f"layers.{culprit.get('layer')}.{culprit.get('stage')}" for word in group)
        for group in case.fault.told
    ):
        answer = "right"
    elif said["outcome"] == "sound":
        answer = "missed"
    else:
        unnamed = hint.startswith(("judged from", "no element is beyond"))
        answer = "too long" if said["outcome"] == "incomplete" else "found" if unnamed else "wrong"
    return {
        "case": case.name,
        "answer": answer,
        "seconds": round(seconds, 2),
        "outcome": said["outcome"],
        "at": f"{culprit.get('layer')}.{culprit.get('stage')}",
        "verdict": culprit.get("verdict"),
        "ratio": culprit.get("ratio"),
        "hint": hint,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", choices=("installed", "strangers"), default="installed")
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = []
        for case in cases(asked.set == "strangers"):
            if asked.only in case.name:
                if not (folder / f"{case.number:02}.safetensors").exists():
                    make(case, folder)
                rows.append(audited(case, folder))
                print(json.dumps(rows[-1]), flush=True)
    answers = [row["answer"] for row in rows]
    print({name: answers.count(name) for name in sorted(set(answers))}, max(row["seconds"] for row in rows))
    if asked.record:
        known = json.loads(asked.record.read_text()) if asked.record.exists() else {}
        kept = ("case", "answer", "seconds", "hint")
        known[asked.set] = [{name: row[name] for name in kept} for row in rows]
        asked.record.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
