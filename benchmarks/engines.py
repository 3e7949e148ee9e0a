"""Every engine that is installed, run as it is on tiny Qwen3 and Qwen2 models: right ones, and ones with a fault.

    python benchmarks/engines.py [--only SUBSTRING] [--record FILE]

A fault is in the weights or the config that the engine is handed; the audit has the right ones. Found means that the
culprit that `svf audit` names is the stage that the fault is in, or the span that ends there. `--record` writes what
docs/engines.md shows (`make engines`), after each row; engines that share nothing run in processes of their own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from forward_models import Model, random_weights, tokens_of

from stages.commands.backends import ENGINES, attribute
from stages.files.forward_dump import forward_key
from stages.files.source import open_model
from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit
from stages.run.captured import Call, Record
from stages.spec.forward import forward_pipeline
from stages.spec.sites import ROTATED, Reached, Site, reached

MODELS = {
    family: Model(
        family, tied=False, heads=4, kv_heads=2, head_dim=64, hidden=256, intermediate=512, vocab=96, layers=2, eps=1e-5
    )
    for family in ("qwen3", "qwen2")
}
TOKENS = tokens_of(12, 96)
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fault:
    """One mistake, in the shape of a model or in its weights; `stages` are those that it may be first seen in."""

    name: str
    stages: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[Weights], Weights] = lambda given: given


def _layer(n: int, name: str) -> str:
    return f"model.layers.{n}.{name}.weight"


def _changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], Weights]:
    return lambda given: {**given, name: np.ascontiguousarray(change(given[name]))}


def _swapped(a: str, b: str) -> Callable[[Weights], Weights]:
    return lambda given: {**given, a: given[b], b: given[a]}


def _without_head_norm_or_bias(given: Weights) -> Weights:
    norm, bias = _layer(1, "self_attn.q_norm"), "model.layers.1.self_attn.q_proj.bias"
    name = norm if norm in given else bias
    return {**given, name: np.full_like(given[name], 1 if name == norm else 0)}


def _rows_swapped(w: np.ndarray) -> np.ndarray:
    return w[[1, 0, *range(2, len(w))]]


_QKV = ("qkv_matmul", "qkv_bias")
FAULTS = (
    Fault(
        "RoPE's theta 10,000, not 1,000,000",
        ("inv_freq", "rope_angle", "rope_cos", "q_post_rope", "k_post_rope", "attention"),
        model={"rope": {"rope_theta": 1e4}},
    ),
    Fault("epsilon of the norms 1e-3, not 1e-5", ("attn_norm",), model={"eps": 1e-3}),
    Fault(
        "gate and up swapped",
        ("ffn_gate", "ffn_up"),
        weights=_swapped(_layer(1, "mlp.gate_proj"), _layer(1, "mlp.up_proj")),
    ),
    Fault("k and v swapped", _QKV, weights=_swapped(_layer(0, "self_attn.k_proj"), _layer(0, "self_attn.v_proj"))),
    Fault("two rows of o_proj swapped", ("attn_out",), weights=_changed(_layer(0, "self_attn.o_proj"), _rows_swapped)),
    Fault("o_proj transposed", ("attn_out",), weights=_changed(_layer(1, "self_attn.o_proj"), np.transpose)),
    Fault(
        "down_proj of the other layer",
        ("ffn_out",),
        weights=_swapped(_layer(0, "mlp.down_proj"), _layer(1, "mlp.down_proj")),
    ),
    Fault(
        "a norm's weight + 1",
        ("ffn_norm",),
        weights=_changed(_layer(0, "post_attention_layernorm"), lambda w: w + w.dtype.type(1)),
    ),
    Fault(
        "no weight of q_norm (Qwen3), no bias of q_proj (Qwen2)", ("q_norm", *_QKV), weights=_without_head_norm_or_bias
    ),
    Fault(
        "rows of the LM head one too far", ("lm_head",), weights=_changed("lm_head.weight", lambda w: np.roll(w, 1, 0))
    ),
)
NO_FAULT = Fault("right", ())
# What the page says beside the table.
NOTES = (
    "The models have an epsilon of 1e-5. With 1e-6, as Qwen3 checkpoints have, keras-hub 0.32.0 is found wrong, and "
    'is: `svf audit` says "Bug at q_norm of layer 0, 13.8 times the bound: as if eps were 1e-05, not 1e-06", for '
    "its Qwen3 does not hand the checkpoint's epsilon to these two norms.",
    "",
    "The checkpoints say theta in two places: mlx-lm's Qwen2 does not read `rope_parameters`, where transformers 5 "
    "writes it, and computes with 1,000,000 whatever it says; keras-hub was given the older place too.",
    "",
    "MLX in bfloat16 is judged with `--accept usual`: it rounds each step of silu to bfloat16, as MLX does by itself.",
    "",
    "keras-hub and mlx-lm are in no extra of `svf`, for they ask for much that is not needed here: "
    "`pip install --no-deps keras keras-hub optree namex h5py mlx-lm` takes seconds. What is not installed is left "
    "out, and keeps the rows that it had.",
)


@dataclass(frozen=True)
class Handed:
    """A model that an engine is handed, in a folder of its own, in a dtype."""

    folder: Path
    model: Model
    weights: Weights
    dtype: str

    def checkpoint(self) -> Path:
        """It in Hugging Face layout, theta also where older versions of transformers wrote it."""
        out = self.folder / "checkpoint"
        if not out.exists():
            out.mkdir()
            raw = self.model.raw(self.dtype)
            (out / "config.json").write_text(json.dumps({**raw, "rope_theta": raw["rope_parameters"]["rope_theta"]}))
            write_tensors(out / "model.safetensors", self.weights, metadata={"format": "pt"})
        return out


# What an engine is handed -> the file or folder that it runs, its tokens, and by key what it recorded.
Ran = tuple[list[int], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Engine:
    """How an engine is run. `needs` are packages; `kinds` the dtypes it has, or the types of its files."""

    name: str
    group: str  # of engines that run in one process, after each other
    needs: tuple[str, ...]
    kinds: tuple[str, ...]
    run: Callable[[Handed], Ran]
    file: Callable[[Handed], Path] = Handed.checkpoint  # what is audited against, of a right model
    audit: Mapping[str, Any] = field(default_factory=dict)

    def installed(self) -> bool:
        return all(importlib.util.find_spec(name) for name in self.needs)


def _captured(engine: str, model: Path, **options: Any) -> Ran:
    """What `svf capture` records, without a process of its own."""
    with open_model(str(model)) as opened:
        run = attribute(f"{ENGINES[engine]}:run")
        record, _ = run(opened.config, opened.raw_config, opened, str(model), [TOKENS], **options)
        (sequence,) = record.sequences()
    return sequence.tokens, {forward_key(at): array for at, array in sequence.arrays.items()}


def _transformers(**options: Any) -> Callable[[Handed], Ran]:
    return lambda handed: _captured("transformers", handed.checkpoint(), **options)


def _onnx(engine: str, **options: Any) -> Callable[[Handed], Ran]:
    def run(handed: Handed) -> Ran:
        from onnx_files import export

        file = handed.folder / "model.onnx"
        if not file.exists():
            export(handed.checkpoint(), file)
        return _captured(engine, handed.checkpoint(), file=str(file), deep=True, **options)

    return run


def _gguf(handed: Handed) -> Path:
    from quantisers import quantised_file

    out = handed.folder / "model.gguf"
    return out if out.exists() else quantised_file(out, handed.dtype, handed.model, handed.weights)


def _llama(handed: Handed) -> Ran:
    return _captured("llama.cpp", _gguf(handed), attention="eager", cache="float32")


class _Wrapped(dict[Reached, np.ndarray]):
    """What modules of other frameworks have given and been given, as numpy has it, batch first."""

    def keep(self, at: Reached, x: Any, *, heads_first: bool = False) -> None:
        found = np.asarray(x)
        self[at] = found.swapaxes(1, 2) if heads_first else found


def _sequence(checkpoint: Path, run: Callable[[Any, _Wrapped], None]) -> Ran:
    """What `run`, given the open checkpoint, keeps of one call."""
    with open_model(str(checkpoint)) as opened:
        record, seen = Record(opened.config, opened.raw_config, str(checkpoint), opened), _Wrapped()
        run(opened, seen)
        ids = np.asarray([TOKENS])
        record.calls.append(Call(ids, np.ones(ids.shape, bool), 0, seen))
        (sequence,) = record.sequences()
    return sequence.tokens, {forward_key(at): array for at, array in sequence.arrays.items()}


def _mlx(handed: Handed) -> Ran:
    """mlx-lm's modules, each in a wrapper; RoPE is a module there."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    def copied(x: Any) -> np.ndarray:
        if x.dtype == mx.bfloat16:
            return np.array(x.astype(mx.float32)).astype(ml_dtypes.bfloat16)
        return np.array(x)

    class Seen(nn.Module):
        def __init__(self, inner: Any, places: list[Reached], seen: _Wrapped):
            super().__init__()
            self._inner, self._places, self._seen = inner, places, seen

        def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
            out = self._inner(x, *rest, **options)
            for at in self._places:
                self._seen.keep(at, copied(x if at[1].given else out))
            return out

    class Rotated(nn.Module):
        def __init__(self, inner: Any, layer: int, seen: _Wrapped):
            super().__init__()
            self._inner, self._layer, self._seen, self._left = inner, layer, seen, list(ROTATED)

        def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
            out = self._inner(x, *rest, **options)  # of queries, then of keys
            self._seen.keep((self._layer, self._left.pop(0)), copied(out), heads_first=True)
            return out

    def run(opened: Any, seen: _Wrapped) -> None:
        mx.set_default_device(mx.cpu)
        model, _ = load_model(handed.checkpoint())
        named = dict(model.named_modules())
        for name, places in reached(named, forward_pipeline(opened.config)).items():
            parent, _, last = name.rpartition(".")
            wrapped = Seen(named[name], places, seen)
            if last.isdigit():
                named[parent.rpartition(".")[0]].layers[int(last)] = wrapped
            else:
                setattr(named[parent], last, wrapped)
        for n in range(opened.config.num_hidden_layers):
            attention = named[f"model.layers.{n}.self_attn"]
            attention.rope = Rotated(attention.rope, n, seen)
        mx.eval(model(mx.array([TOKENS])))

    return _sequence(handed.checkpoint(), run)


# keras-hub's layers in a decoder layer: where, the stage, its part, and whether it is what the layer is given.
_KERAS = (
    ("_self_attention_layernorm", "attn_norm", 0, False),
    ("_self_attention_layer._query_dense", "qkv", 0, False),
    ("_self_attention_layer._key_dense", "qkv", 1, False),
    ("_self_attention_layer._value_dense", "qkv", 2, False),
    ("_self_attention_layer._query_dense_layer_norm", "q_norm", 0, False),
    ("_self_attention_layer._key_dense_layer_norm", "k_norm", 0, False),
    ("_self_attention_layer._output_dense", "attention", 0, True),
    ("_self_attention_layer._output_dense", "attn_out", 0, False),
    ("_feedforward_layernorm", "post_attn_residual", 0, True),
    ("_feedforward_layernorm", "ffn_norm", 0, False),
    ("_feedforward_gate_dense", "ffn_gate", 0, False),
    ("_feedforward_intermediate_dense", "ffn_up", 0, False),
    ("_feedforward_output_dense", "ffn_swigl", 0, True),
    ("_feedforward_output_dense", "ffn_out", 0, False),
)


def _keras(handed: Handed) -> Ran:
    """keras-hub's layers on JAX, called one after another, the `call` of each wrapped."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras_hub

    def wrap(layer: Any, at: Reached, seen: _Wrapped) -> None:
        call, (_, site) = layer.call, at

        def called(x: Any, *rest: Any, **options: Any) -> Any:
            out = call(x, *rest, **options)
            if options.get("reverse"):  # the embedding as the LM head
                return out
            taken = np.asarray(x if site.given else out[0] if isinstance(out, tuple) else out)
            seen.keep(at, taken if site.stage in ("q_norm", "k_norm") else taken.reshape(*taken.shape[:2], -1))
            return out

        layer.call = called

    def run(opened: Any, seen: _Wrapped) -> None:
        kinds = {"qwen3": keras_hub.models.Qwen3Backbone, "qwen2": keras_hub.models.QwenBackbone}
        model = kinds[handed.model.family].from_preset(str(handed.checkpoint()), dtype=handed.dtype)
        qkv = "qkv_bias" if handed.model.family == "qwen2" else "qkv_matmul"
        for n in range(opened.config.num_hidden_layers):
            block = model.get_layer(f"transformer_layer_{n}")
            for place, stage, part, given in _KERAS:
                layer: Any = block
                for name in place.split("."):
                    layer = getattr(layer, name, None)
                if layer is not None:
                    wrap(layer, (n, Site(place, qkv if stage == "qkv" else stage, True, part=part, given=given)), seen)
            wrap(block, (n, Site("", "post_ffn_residual", of_layer=True)), seen)
        embedding = model.get_layer("token_embedding")
        wrap(embedding, (None, Site("token_embedding", "embedding", of_layer=False)), seen)
        last = model({"token_ids": np.array([TOKENS]), "padding_mask": np.ones((1, len(TOKENS)))})
        seen.keep((None, Site("norm", "final_norm", of_layer=False)), last)
        seen.keep((None, Site("lm_head", "lm_head", of_layer=False)), embedding(last, reverse=True))

    return _sequence(handed.checkpoint(), run)


_BOTH = ("float32", "bfloat16")
_HF: dict[str, Any] = {"group": "transformers", "needs": ("transformers",)}
_ONNX: dict[str, Any] = {"group": "onnx", "kinds": ("float32",)}
_ORT: dict[str, Any] = {**_ONNX, "needs": ("onnxruntime", "onnx", "onnxscript")}
_GGUF: dict[str, Any] = {"needs": ("xllamacpp", "llama_cpp_py_sync"), "file": _gguf, "audit": {"activations": "ggml"}}
RUN = (
    Engine("transformers, eager", kinds=_BOTH, run=_transformers(attention="eager"), **_HF),
    Engine("transformers, sdpa", kinds=_BOTH, run=_transformers(attention="sdpa", deep=True), **_HF),
    Engine("transformers, sdpa, 4 tokens decoded", kinds=_BOTH, run=_transformers(cache="dynamic", generate=4), **_HF),
    Engine("ONNX Runtime, no optimisation", run=_onnx("onnxruntime"), **_ORT),
    Engine("ONNX Runtime, all optimisations", run=_onnx("onnxruntime", compiled=True), **_ORT),
    Engine(
        "OpenVINO, hint f32",
        needs=("openvino", "onnx", "onnxscript"),
        run=_onnx("openvino", dtype="float32"),
        **_ONNX,
    ),
    Engine("keras-hub on JAX", "keras", ("keras_hub", "keras", "optree"), _BOTH, _keras),
    Engine("llama.cpp", "llama.cpp", kinds=("F32", "F16", "Q8_0", "Q4_1", "Q4_K"), run=_llama, **_GGUF),
    Engine("mlx-lm on MLX's CPU device", "mlx", ("mlx", "mlx_lm"), _BOTH, _mlx, audit={"accepted": "usual"}),
    Engine(
        "transformers, sdpa, torch.compile",
        "torch.compile",
        ("transformers",),
        ("float32",),
        _transformers(attention="sdpa", compiled=True),
    ),
)


@dataclass
class Row:
    """What an engine's runs of one family and kind came to; `x` is the largest error of a right run over its bound."""

    engine: str
    family: str
    kind: str
    recorded: int = 0
    stages: list[str] = field(default_factory=list)
    outcome: str = ""
    judged: int = 0
    x: float = 0.0
    found: int = 0
    planted: int = 0
    missed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def handed(folder: Path, family: str, kind: str, fault: Fault) -> Handed:
    """A model with a fault in it, in a new folder."""
    folder.mkdir()
    model, dtype = MODELS[family], kind if kind in _BOTH else "float32"
    weights = fault.weights(random_weights(model.config(dtype)))
    return Handed(folder, replace(model, **fault.model), weights, kind)


def judged(engine: Engine, given: Handed, right: Handed) -> dict[str, Any]:
    """What the audit, which has the right model, says of what an engine computes of the one that it is handed."""
    tokens, arrays = engine.run(given)
    recorded = given.folder / "recorded.safetensors"
    recorded.unlink(missing_ok=True)
    write_tensors(recorded, arrays)
    ids = ",".join(map(str, tokens))
    document: dict[str, Any] = audit(recorded, model=str(engine.file(right)), tokens=ids, **engine.audit)
    return document


def rows(engines: Sequence[Engine], family: str, kind: str, folder: Path) -> Iterator[Row]:
    """One row for each engine, which share the models."""
    right = handed(folder / "right", family, kind, NO_FAULT)
    wrong = [(fault, handed(folder / str(n), family, kind, fault)) for n, fault in enumerate(FAULTS)]
    for engine in engines:
        yield _row(engine, Row(engine.name, family, kind), right, wrong)


def _row(engine: Engine, row: Row, right: Handed, wrong: Sequence[tuple[Fault, Handed]]) -> Row:
    started = time.monotonic()
    clean = judged(engine, right, right)
    row.outcome, row.recorded = clean["outcome"], len(clean["rows"])
    row.stages = list(dict.fromkeys(entry["stage"] for entry in clean["rows"]))
    row.judged = sum(entry["verdict"] in ("exact", "rounding", "accepted") for entry in clean["rows"])
    row.x = max(entry["ratio"] or 0.0 for entry in clean["rows"] if "ratio" in entry)
    if row.outcome != "sound":
        row.missed.append(f"the right run is {row.outcome}: {clean['verdict']}")
    for fault, given in wrong:
        row.planted += 1
        document = judged(engine, given, right)
        named = (document.get("culprit") or {}).get("stage")
        row.found += document["outcome"] == "faulty" and named in fault.stages
        if document["outcome"] != "faulty" or named not in fault.stages:
            row.missed.append(f"{fault.name}: {document['outcome']} at {named}")
    row.seconds = round(time.monotonic() - started, 1)
    return row


def _rows_of(group: str, wanted: Sequence[Engine]) -> Iterator[Row]:
    """The rows of the engines of a group, as each is done."""
    engines = [engine for engine in wanted if engine.group == group]
    for kind in dict.fromkeys(kind for engine in engines for kind in engine.kinds):
        for family in MODELS:
            with tempfile.TemporaryDirectory(prefix="svf-engines-") as scratch:
                yield from rows([engine for engine in engines if kind in engine.kinds], family, kind, Path(scratch))


def _in_a_process(group: str, only: str) -> Iterator[Row]:
    """The rows of a group, whose engines run in a process of their own: one that ends ends no other group."""
    words = [sys.executable, __file__, "--group", group, "--only", only]
    with tempfile.TemporaryFile("w+") as said:  # much that is of no matter
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(_MARK):
                    yield Row(**json.loads(line.removeprefix(_MARK)))
        if child.returncode:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it says nothing"])[-1]
            raise ChildProcessError(f"ended with code {child.returncode}: {last}")


# What a line with a row begins with: engines print too.
_MARK = "row: "


def _record(file: Path, done: Sequence[Row], wanted: Sequence[Engine], started: float) -> None:
    """Write what is done so far into `file`, which keeps the rows of what has not run."""
    before = json.loads(file.read_text()) if file.exists() else {"versions": {}, "rows": []}
    new = {(row.engine, row.family, row.kind): asdict(row) for row in done}
    ran = {engine for engine, _, _ in new}
    packages = {name for engine in wanted if engine.name in ran for name in engine.needs}
    versions = {name: importlib.metadata.version(name.replace("_", "-")) for name in sorted(packages)}
    known = {(row["engine"], row["family"], row["kind"]): row for row in before["rows"]} | new
    order = {engine.name: number for number, engine in enumerate(RUN)}
    placed = sorted(known.values(), key=lambda row: order.get(row["engine"], len(order)))
    all_of = {(row["engine"], row["family"], row["kind"]) for row in placed} == {*new}
    minutes = (time.monotonic() - started) / 60
    how = f"in one run of {minutes:.0f} minutes" if all_of else "not in one run"
    found = {
        "versions": dict(sorted((before["versions"] | versions).items())),
        "notes": NOTES,
        "recorded": f"Recorded on {datetime.date.today()}, {how}.",
        "rows": placed,
    }
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="Engines whose name has this.")
    parser.add_argument("--group", default="", help="Run this group of engines in this process; print its rows.")
    parser.add_argument("--record", type=Path, help="JSON file to write, row by row.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    asked = [engine for engine in RUN if args.only in engine.name]
    wanted = [engine for engine in asked if engine.installed()]
    if args.group:
        for row in _rows_of(args.group, wanted):
            print(_MARK + json.dumps(asdict(row)), flush=True)
        return 0
    for engine in asked:
        if engine not in wanted:
            print(f"left out: {engine.name} needs {', '.join(engine.needs)}", flush=True)
    total, started = sum(len(engine.kinds) * len(MODELS) for engine in wanted), time.monotonic()
    done: list[Row] = []
    failed = 0
    for group in dict.fromkeys(engine.group for engine in wanted):
        try:
            for row in _in_a_process(group, args.only):
                done.append(row)
                said = f"{row.outcome}, {row.found} of {row.planted}, x {row.x:.2f}, {row.seconds:.0f} s"
                print(f"[{len(done)}/{total}] {row.engine}, {row.family}, {row.kind}: {said}", *row.missed, flush=True)
                if args.record:
                    _record(args.record, done, wanted, started)
        except ChildProcessError as error:
            failed += 1
            print(f"{group}: {error}; its rows so far are kept", flush=True)
    right = all(row.outcome == "sound" and row.found == row.planted for row in done)
    return 0 if done and right and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
