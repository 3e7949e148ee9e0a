"""What a stage would give from what it does not read: other stages, and other weights of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.hints import Wrong
from stages.judge.recorded_run import (
    ForwardRun,
    find,
    fits,
)
from stages.oracle.verdict import STAGES, Oracle
from stages.run.forward import parameters
from stages.spec.config import EMBEDDING, LM_HEAD
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import (
    parameter_name,
)
from stages.spec.stage import Stage

# Parameters of one shape that a loader may mix up.
ALIKE = (
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ("input_layernorm.weight", "post_attention_layernorm.weight"),
)


def of_what_it_does_not_read(place: Place, run: ForwardRun, oracle: Oracle, columns: slice) -> Iterator[Wrong]:
    """What the stage would give from what it does not read: other stages, and other weights of the model."""
    yield from _of_other_stages(place, run, oracle.stage)
    yield from _of_fused_rows(run, oracle)
    yield from _of_other_weights(place, run, oracle, columns)


# A stage -> what it may be instead: words, of which recorded stages, and their function.
_INSTEAD: Mapping[str, tuple[tuple[str, tuple[str, ...], Callable[..., np.ndarray]], ...]] = {
    "ffn_silu": (("silu of ffn_up, not of ffn_gate: on the wrong branch", ("ffn_up",), STAGES["ffn_silu"]),),
    "ffn_swigl": (
        ("ffn_silu times ffn_gate, not times ffn_up", ("ffn_silu", "ffn_gate"), STAGES["ffn_swigl"]),
        (
            "silu of ffn_up, times ffn_gate: on the wrong branch",
            ("ffn_up", "ffn_gate"),
            lambda up, gate: STAGES["ffn_silu"](up) * gate.astype(np.float64),
        ),
        (
            "silu of the product of ffn_gate and ffn_up",
            ("ffn_gate", "ffn_up"),
            lambda gate, up: STAGES["ffn_silu"](gate.astype(np.float64) * up.astype(np.float64)),
        ),
    ),
}


def _of_other_stages(place: Place, run: ForwardRun, stage: Stage) -> Iterator[Wrong]:
    for text, names, function in _INSTEAD.get(stage.name, ()):
        found = [find(run, (place[0], name)) for name in names]
        if all(at is not None and fits(run, at) for at in found):
            yield text, function(*(run.side.read(at) for at in found if at is not None))


def _of_fused_rows(run: ForwardRun, oracle: Oracle) -> Iterator[Wrong]:
    """q, k and v of weights joined as rows, and read in the other order: block by block, or key head by key head."""
    if oracle.stage.name not in ("qkv_matmul", "qkv_bias") or run.config is None:
        return
    d, kv_heads = run.config.head_dim, run.config.num_key_value_heads
    if kv_heads == 1:
        return
    rows = np.arange(oracle.value.shape[-1])
    group = len(rows) // (kv_heads * d)
    blocks = rows.reshape(kv_heads, group, d)
    by_head = np.concatenate([blocks[:, part].reshape(-1) for part in (slice(-2), slice(-2, -1), slice(-1, None))])
    for text, order in (
        ("joined as all of q, k, v and read key head by key head", by_head),
        ("joined key head by key head and read as all of q, k, v", np.argsort(by_head)),
    ):
        yield f"the rows of q, k and v are in another order: {text}", oracle.value[:, order]


def _of_other_weights(place: Place, run: ForwardRun, oracle: Oracle, columns: slice) -> Iterator[Wrong]:
    """What the stage would give with another weight of the model of the same shape: a mix-up while loading."""
    assert run.path is not None
    assert run.config is not None
    layer, stage, weights = place[0], oracle.stage, run.weights
    if weights is None or stage.params[:1] == ("tokens",):
        return
    inputs, dtype = oracle.arguments[: len(stage.inputs)], stored_dtype(run.path.activations)
    for one, other in (*ALIKE, *(pair[::-1] for pair in ALIKE)):
        if stage.params == (one,):
            weight = weights.read(parameter_name(stage, other, layer)).astype(dtype)
            yield f"{other} in the place of {one}", STAGES[stage.function](*inputs, weight, **oracle.options)
    if stage.by_vocab and not run.config.tie_word_embeddings:
        weight = weights.read(EMBEDDING, columns.start or 0, columns.stop).astype(dtype)
        yield f"the embedding in the place of {LM_HEAD}", STAGES[stage.function](*inputs, weight)
    if layer is None or not stage.params:
        return
    for step in (-1, 1):
        if 0 <= layer + step < run.config.num_hidden_layers:
            others = parameters(stage, dict(zip(stage.inputs, inputs, strict=True)), weights, layer + step, dtype)
            value = STAGES[stage.function](*inputs, *others, **oracle.options)
            yield f"the weights of layer {layer + step} in the place of layer {layer}'s", value
