"""The law: each row of the catalogue writes a record, and the matcher reads its class back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers import some
from recorded_models import recorded
from replays import factors, make_offsets, task_of, whole

from stages.oracle.components import ReferenceBackend
from stages.oracle.verdict import Oracle, consult
from stages.recipes.match import explain
from stages.recipes.recipe import EVERY
from stages.recipes.side import SideVerdict
from stages.selftest.rows import written
from stages.spec.replay import REPLAY
from stages.spec.stage import Scope

pytestmark = pytest.mark.slow

MODEL = "qwen3-gqa4"
# One stage of each kind that has rows of its own.
STAGES = (
    "embedding",
    "rope_angle",
    "rope_cos",
    "attn_norm",
    "q_norm",
    "q_post_rope",
    "attn_scores",
    "attn_softmax",
    "attention",
    "attn_out",
    "post_attn_residual",
    "ffn_silu",
    "ffn_swigl",
)


def read_back(oracle: Oracle) -> Counter[tuple[str, str]]:
    """How often each class was read as which; a row that is not read back must be within the right one's bound."""
    counts: Counter[tuple[str, str]] = Counter()
    rows = list(written(oracle))
    writes = {row.words: row.array for row in rows}
    for row in rows:
        words, cls, wrote = row.words, row.kind, row.array
        side = SideVerdict()
        side.add(oracle, wrote)
        where = (oracle.stage.name, words, side.verdict, side.recipe)
        assert side.kind is not None, where
        if cls.sound or side.kind.sound:  # what fits what the prescribed one fits is no fault in this dtype
            assert side.verdict.passes or side.systematic, where
            assert side.kind.sound, where
        elif words in (side.recipe or ""):
            assert side.kind is cls, where
        else:  # told in other words: several that begin alike, or a row that writes one and the same
            found = explain(oracle, wrote)
            assert found is not None, where
            same = any(way in writes and np.array_equal(writes[way], wrote) for way in found.ways)
            assert same or (side.kind is cls and any(words in way for way in found.ways)), where
        counts[cls.value, side.kind.value] += 1
    return counts


@pytest.mark.long
@pytest.mark.parametrize("dtype", some(EVERY, ("bfloat16",)))
def test_each_row_is_read_back(dtype: str) -> None:
    source, counts = recorded(MODEL, dtype), Counter[tuple[str, str]]()
    for stage in STAGES:
        layer = 1 if source.path[stage].scope is Scope.LAYER else None
        counts += read_back(source.oracle((layer, stage)))
    told_apart = sum(n for (written, read), n in counts.items() if written == read)
    assert counts["narrower", "narrower"] >= 60
    assert counts["other", "other"] >= 40
    assert counts["equivalent", "equivalent"] >= (20 if dtype != "float32" else 0)
    assert told_apart >= 0.8 * sum(counts.values())


def test_each_row_of_the_replay_is_read_back() -> None:
    u, s, v = factors(24, 16, 0)
    task = task_of(u, s, v, make_offsets("small", 16, 0))
    values, params = whole(ReferenceBackend(), task), {"u": u, "s": s, "v": v}
    counts = Counter[tuple[str, str]]()
    for name in ("scaled_s", "normalization", "u_scaled", "matmul_pre_norm", "zero_source_f32", "adapted_source_f32"):
        stage = REPLAY[name]
        options = {option: {"layout": "torch_v", "transpose": False}[option] for option in stage.options}
        arguments = (*(values[i] for i in stage.inputs), *(params[p] for p in stage.params))
        counts += read_back(consult(stage, arguments, options))
    assert counts["other", "other"] >= 8
    assert counts["narrower", "narrower"] >= 20
