"""What llama.cpp computes on a CPU, by the callback that it calls after each node of its graph.

Nodes are known by the names that its own graphs give them (`src/llama-graph.cpp`, `src/models/`). Where one is asked
for, the graph is computed up to it, so that nothing is fused across it; its values are copied before the next runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from stages.errors import InputError, UsageError
from stages.files.forward_dump import forward_key
from stages.files.gguf_model import PAIRED_FAMILIES, GgufModel, halves
from stages.run.captured import Call, Record
from stages.run.production import greedy
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig, RawConfig
from stages.spec.sites import Reached, Site
from stages.spec.stage import Scope
from svf_llama.library import Library, Node, load

ENGINE = "llama.cpp"
FLASH = {"eager": 0, "flash": 1}  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
CACHES = {"float32": 0, "float16": 1}  # GGML_TYPE_F32, _F16
_UBATCH = 512  # llama.cpp's own default
# A node's name without its layer, and its operation (any where None) -> the stage; `part` of what is joined.
_NODES: dict[tuple[str, str | None], tuple[str, int]] = {
    ("embd", "GET_ROWS"): ("embedding", 0),
    ("attn_norm", None): ("attn_norm", 0),
    ("Qcur_normed", None): ("q_norm", 0),
    ("Kcur_normed", None): ("k_norm", 0),
    ("Qcur", "ROPE"): ("q_post_rope", 0),
    ("Kcur", "ROPE"): ("k_post_rope", 0),
    ("kqv_out", None): ("attention", 0),
    ("attn_out", None): ("attn_out", 0),
    ("ffn_inp", None): ("post_attn_residual", 0),
    ("ffn_norm", None): ("ffn_norm", 0),
    ("ffn_gate", None): ("ffn_gate", 0),
    ("ffn_up", None): ("ffn_up", 0),
    ("ffn_swiglu", None): ("ffn_swigl", 0),
    ("ffn_out", None): ("ffn_out", 0),
    ("l_out", None): ("post_ffn_residual", 0),
    ("result_norm", None): ("final_norm", 0),
    ("result_output", None): ("lm_head", 0),
    **{
        (f"{which}cur", op): (stage, part)
        for part, which in enumerate("QKV")
        for op, stage in (("MUL_MAT", "qkv_matmul"), ("ADD", "qkv_bias"))
    },
}
_NAME = re.compile(r"(?P<name>[A-Za-z_]+)(?:-(?P<layer>\d+))?", re.ASCII)
# o_proj's product has a name in some graphs; in the others it is the product after this node.
_BEFORE_OUT, _UNNAMED = "kqv_out", re.compile(r"node_\d+", re.ASCII)
# Where heads may be in pairs of rows.
_TURNED = {
    ("q_post_rope", 0),
    ("k_post_rope", 0),
    ("qkv_matmul", 0),
    ("qkv_matmul", 1),
    ("qkv_bias", 0),
    ("qkv_bias", 1),
}


def run(
    config: ModelConfig,
    raw_config: RawConfig,
    weights: Weights,
    source: str,
    rows: Sequence[Sequence[int]],
    *,
    attention: str | None = None,
    compiled: bool = False,
    cache: str = "float16",
    generate: int = 0,
    dtype: str = "model",
    device: str = "cpu",
    deep: bool = False,
) -> tuple[Record, list[list[int]]]:
    """Have llama.cpp run each of the token ids `rows` by itself from a GGUF file, and decode.

    The record, and for each row the `generate` greedy tokens that followed, all of them run through the model too.
    `attention`: flash attention on (`flash`) or off (`eager`), by default as llama.cpp chooses. `UsageError` for what
    it has not; `InputError` for a file that it does not load, and for a graph that lacks what should be recorded.
    """
    if not isinstance(weights, GgufModel):
        raise UsageError(f"{ENGINE} runs GGUF files, and {source} is none")
    if compiled or deep or device != "cpu" or dtype not in ("model", "float32"):
        raise UsageError(
            f"{ENGINE} runs its own kernels, here on the CPU; leave --compile, --deep, --device and --dtype out"
        )
    if attention not in (None, *FLASH) or cache not in CACHES:
        raise UsageError(f"{ENGINE} has --attention {' or '.join(FLASH)}, and --kv-cache {' or '.join(CACHES)}")
    library = load()
    record = Record(config, raw_config, source, weights)
    taking = _Taking(record, library)
    found = []
    with _model(library, weights) as model:
        for row in rows:
            with _context(library, model, taking, len(row) + generate, attention, cache) as context:
                found.append(_decode(taking, context, row, generate))
    return record, found


class _Taking:
    """Nodes whose values are kept, and the calls that they belong to."""

    def __init__(self, record: Record, library: Library):
        self.record, self.library = record, library
        self.seen: dict[Reached, np.ndarray] = {}
        self.failed: list[BaseException] = []
        self._attended: int | None = None
        self._pairs = record.config.head_dim if record.config.family in PAIRED_FAMILIES else 0
        path = record.path
        self._whole = {name for name, stage in path.items() if stage.scope is not Scope.LAYER}
        self._heads = {name for name, stage in path.items() if len(stage.shape.split()) == 3}
        self._expected = self._all_sites()

    def wanted(self, node: Node) -> bool:
        """Whether a node is a stage's; asked of each in the order of the graph, as they are computed."""
        return self._place(node) is not None

    def take(self, node: Node) -> None:
        at = self._place(node)
        assert at is not None
        array = node.array()
        _, site = at
        heads = array.shape[-2:] if site.stage in self._heads else array.shape[-1:]
        rows = array.reshape(-1, *heads)
        if self._pairs and (site.stage, site.part) in _TURNED:
            rows = halves(rows.reshape(len(rows), -1).T, self._pairs).T.reshape(rows.shape)
        self.seen[at] = np.ascontiguousarray(rows)[None]

    def end(self, tokens: Sequence[int], before: int) -> None:
        """A call is over: `InputError` where what it should have given is not there, or of other lengths."""
        for layer, site in self._expected:
            array = self.seen.get((layer, site))
            if array is None or array.shape[1] != len(tokens):
                what = "lacks" if array is None else f"has {array.shape[1]} rows of {len(tokens)} of"
                key = forward_key((layer, site.stage))
                raise InputError(f"{ENGINE}'s graph {what} {key} (node {site.module}); another build may name it so")
        ids = np.asarray([tokens], np.int64)
        self.record.calls.append(Call(ids, np.ones(ids.shape, bool), before, dict(self.seen)))
        self.seen.clear()

    def _all_sites(self) -> list[Reached]:
        """Every place that a graph of this model must have."""
        path, found = self.record.path, []
        for (name, op), (stage, part) in _NODES.items():
            declared = path.get(stage)
            if declared is None or (op == "ADD" and declared.identity):
                continue
            of_layer = stage not in self._whole
            site = Site(name, stage, of_layer, part=part)
            found += [(layer, site) for layer in (range(self.record.config.num_hidden_layers) if of_layer else [None])]
        return found

    def _place(self, node: Node) -> Reached | None:
        name, op = node.name, node.op
        if self._attended is not None and op == "MUL_MAT" and _UNNAMED.fullmatch(name):
            return self._attended, Site("attn_out", "attn_out", of_layer=True)
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        plain, layer = match["name"], None if match["layer"] is None else int(match["layer"])
        if layer is not None and plain in (_BEFORE_OUT, "ffn_inp"):
            self._attended = layer if plain == _BEFORE_OUT else None
        found = _NODES.get((plain, op)) or _NODES.get((plain, None))
        if found is None or (found[0] in self._whole) != (layer is None):
            return None
        stage, part = found
        return layer, Site(plain, stage, layer is not None, part=part)


@contextmanager
def _model(library: Library, weights: GgufModel) -> Iterator[Any]:
    params = library.c.llama_model_default_params()
    params.n_gpu_layers = 0
    model = library.c.llama_model_load_from_file(os.fsencode(weights.path), params)
    if model == library.ffi.NULL:
        raise library.refused(f"does not load {weights.path}")
    try:
        yield model
    finally:
        library.c.llama_model_free(model)


@contextmanager
def _context(
    library: Library, model: Any, taking: _Taking, length: int, attention: str | None, cache: str
) -> Iterator[Any]:
    """A context of its own for one sequence of `length` tokens, whose nodes `taking` sees."""
    params, threads = library.c.llama_context_default_params(), len(os.sched_getaffinity(0))
    params.n_ctx, params.n_batch, params.n_ubatch = length, max(length, _UBATCH), max(length, _UBATCH)
    params.n_threads = params.n_threads_batch = threads
    if attention is not None:
        params.flash_attn_type = FLASH[attention]
    params.type_k = params.type_v = CACHES[cache]
    params.cb_eval = library.watch(taking.wanted, taking.take, taking.failed)
    context = library.c.llama_init_from_model(model, params)
    if context == library.ffi.NULL:
        raise library.refused(f"makes no context with --attention {attention or 'its own'} and --kv-cache {cache}")
    taking.record.facts |= {
        "engine": ENGINE,
        "xllamacpp": library.version,
        "system": library.text(library.c.llama_print_system_info()),
        "attention": attention or "flash where it can",
        "cache": cache,
        "batch": str(params.n_ubatch),
        "device": "cpu",
        "threads": str(threads),
    }
    try:
        yield context
    finally:
        library.c.llama_free(context)


def _decode(taking: _Taking, context: Any, row: Sequence[int], generate: int) -> list[int]:
    """Greedy tokens of one sequence, each from a call on the last one."""
    found: list[int] = []
    given, before = list(row), 0
    for step in range(generate + 1):
        logits = _call(taking, context, given, before)
        before += len(given)
        if step < generate:
            found.append(greedy(logits))
            given = found[-1:]
    return found


def _call(taking: _Taking, context: Any, tokens: Sequence[int], before: int) -> np.ndarray:
    """Run tokens that stand at `before` and after; the logits of all `[tokens, vocab]`."""
    library = taking.library
    batch = library.c.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, before + i, 1, 1
            batch.seq_id[i][0] = 0
        taking.seen.clear()
        code = library.c.llama_decode(context, batch)
    finally:
        library.c.llama_batch_free(batch)
    if taking.failed:
        raise taking.failed[0]
    if code:
        raise library.refused(f"ends with code {code}")
    taking.end(tokens, before)
    logits: np.ndarray = taking.record.calls[-1].arrays[None, Site("result_output", "lm_head", of_layer=False)][0]
    return logits
