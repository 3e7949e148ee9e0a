"""The smallest fault that is still seen, per kind of stage, storage dtype and fault: what each sound recipe costs.

python benchmarks/floors.py > floors.json && python docs/generate.py --floors floors.json

A fault of size s = 2^k is written as the prescribed recipe computes it. It is seen where the judge fails it, and that
was given these rows: those of before recipes, none (`former`); the prescribed row alone (`prescribed`); it and one
other sound row (`beside`, by its words); all sound rows (`rows`). `judged`: by the judge as it is, which may also leave
out roundings between stages. Each is k of the least fault such that it and all larger ones are seen, the worst of the
model's two layers; null where 2^6 is not seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from recorded_models import recorded
from replays import factors, make_offsets, task_of, whole

from stages.oracle import bounds
from stages.oracle.components import ReferenceBackend
from stages.oracle.rounding import round_once
from stages.oracle.verdict import OPERANDS, Oracle, consult, judged_part, measure
from stages.recipes.at import At, Unknown
from stages.recipes.catalogue import forms_of, kind_of, right_value
from stages.recipes.fit import fit
from stages.recipes.listing import plain
from stages.recipes.recipe import EVERY, Class, Form
from stages.recipes.side import SideVerdict
from stages.recipes.value import Value
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.stage import Scope

# head_dim 24: a scale that is no power of two.
MODEL, TOKENS, RANK = "qwen3-gqa4", 24, 16
LARGEST, LEAST = 6, -30


@dataclass(frozen=True)
class Fault:
    """`made` gives the emulator's arguments for a size s; None: all values times 1 + s."""

    stage: str
    words: str
    made: Callable[[At, float], dict[str, Any]] | None = None
    model: str = MODEL


# The first of a kind is the one that docs/recipes.md shows beside each row.
FAULTS = (
    Fault("attn_norm", "norm x (1 + s)"),
    Fault("attn_norm", "eps x (1 + s)", lambda at, s: {"eps": at.options["eps"] * (1 + s)}),
    Fault("ffn_gate", "product x (1 + s)"),
    Fault("ffn_out", "product x (1 + s)"),
    Fault("q_post_rope", "rope x (1 + s)"),
    Fault("rope_cos", "table x (1 + s)"),
    Fault("rope_angle", "angle x (1 + s)"),
    Fault("inv_freq", "theta x (1 + s)", lambda at, s: {"theta": at.options["rope_theta"] * (1 + s)}),
    Fault("attn_scores", "scale x (1 + s)", lambda _, s: {"factor": 1 + s}),
    Fault("attn_softmax", "temperature 1 + s", lambda _, s: {"temperature": 1 + s}),
    Fault("attention", "attention x (1 + s)"),
    Fault("ffn_silu", "slope 1 + s", lambda _, s: {"slope": 1 + s}),
    Fault("ffn_silu", "silu x (1 + s)"),
    Fault("ffn_swigl", "product x (1 + s)"),
    Fault("post_attn_residual", "block x (1 + s)", lambda _, s: {"b": 1 + s}),
    *(
        Fault(stage, f"{words} x (1 + s)", model="qwen2-moe")
        for stage, words in (
            ("router_probs", "probabilities"),
            ("router_weights", "weights"),
            ("expert_out", "product"),
            ("moe_out", "sum"),
            ("shared_weight", "gate"),
        )
    ),
)
REPLAYED = (
    Fault("scaled_s", "values x (1 + s)"),
    Fault("normalization", "values x (1 + s)"),
    Fault("matmul_pre_norm", "product x (1 + s)"),
    Fault("u_scaled", "values x (1 + s)"),
    Fault("adapted_source_f32", "values x (1 + s)"),
)


def former_bound(oracle: Oracle) -> np.ndarray:
    """What stood before recipes: the kind's noise, and in 16 bits half an ulp of the value with it."""
    dtype = stored_dtype(oracle.stage.dtype)
    if oracle.stage.noise is Noise.EXACT:
        return bounds.exact_bound(oracle.value, dtype)
    named = OPERANDS.get(oracle.stage.function)
    operands = oracle.arguments if named is None else named(*oracle.arguments, **oracle.options)
    noise = bounds.BOUNDS[oracle.stage.noise][0](oracle.lambdas[oracle.stage.noise], *operands, oracle.value)
    wide = noise if dtype == np.float32 else noise + bounds.exact_bound(np.abs(oracle.value) + noise, dtype)
    return np.maximum(wide, bounds.TINY)


def fails(oracle: Oracle, observed: np.ndarray, rows: Sequence[tuple[Form, Value]] = ()) -> bool:
    """Whether it is seen by a judge that has these rows: an element beyond the bound that no row gives, or the RMS."""
    judged = measure(oracle, observed)
    if judged.verdict.passes:
        limit = bounds.rms_limit(oracle.stage.noise, observed.dtype, oracle.lambdas)
        return bool(judged.count >= bounds.RMS_COUNT and np.sqrt(judged.squares / judged.count) > limit)
    part = judged_part(oracle.stage, observed)
    given = (fit(row.words, Class.EQUIVALENT, value, part, oracle.stage, rms=row.rms) for row, value in rows)
    return not any(found is not None and found.fits for found in given)


def judge(oracle: Oracle, observed: np.ndarray) -> bool:
    side = SideVerdict()
    side.add(oracle, observed)
    return not side.verdict.passes


def lowest(seen: Callable[[int], bool], start: int = LARGEST) -> int | None:
    """The least k such that a fault of every size from `start` down to it is seen."""
    k = start
    while k >= LEAST and seen(k):
        k -= 1
    return None if k == LARGEST else k + 1


def near(seen: Callable[[int], bool], start: int | None) -> int | None:
    """As `lowest`, asking few sizes about `start`: the judge is dear."""
    k = LARGEST if start is None else start
    while k <= LARGEST and not seen(k):
        k += 1
    return None if k > LARGEST else lowest(seen, k)


@dataclass
class Floors:
    """The floors of one fault at one place."""

    former: int | None
    prescribed: int | None
    beside: dict[str, int | None]
    rows: int | None
    judged: int | None


def floors(oracle: Oracle, fault: Fault) -> Floors:
    kind, at = kind_of(oracle.stage), At(oracle, right=right_value)
    assert kind is not None
    dtype, right = oracle.stage.dtype, right_value(At(oracle, right=right_value))
    written: dict[int, np.ndarray] = {}

    def wrong(k: int) -> np.ndarray:
        if k not in written:
            s = 2.0**k
            value = None if fault.made is None else kind.emulator(at, **fault.made(at, s))
            written[k] = round_once(right.mid * (1 + s) if value is None else value.mid, stored_dtype(dtype))
        return written[k]

    alone, *others = sound(oracle, at)

    def together(*some: tuple[Form, Value]) -> int | None:
        return lowest(lambda k: fails(oracle, wrong(k), some))

    rows = together(alone, *others)
    before = replace(oracle, calibrated=lambda: former_bound(oracle))
    return Floors(
        lowest(lambda k: fails(before, wrong(k))),
        together(alone),
        {plain(other[0].words): together(alone, other) for other in others},
        rows,
        near(lambda k: judge(oracle, wrong(k)), rows),
    )


def sound(oracle: Oracle, at: At) -> Iterator[tuple[Form, Value]]:
    """Each sound row with what it gives here, the prescribed one first; not those asked of hidden inputs alone."""
    kind = kind_of(oracle.stage)
    assert kind is not None
    for form in forms_of(kind, oracle.stage.dtype, Class.PRESCRIBED, Class.EQUIVALENT):
        try:
            value = None if form.unseen else kind.emulator(at, **form.args)
        except Unknown:
            continue
        if value is not None:
            yield form, value


def worse(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def worst(found: list[Floors]) -> Floors:
    """The worst of several places, number by number; a row that is not everywhere counts where it is."""
    one = found[0]
    for other in found[1:]:
        words = dict.fromkeys((*one.beside, *other.beside))
        beside = {
            w: worse(one.beside.get(w, other.beside.get(w)), other.beside.get(w, one.beside.get(w))) for w in words
        }
        pairs = ((getattr(one, name), getattr(other, name)) for name in ("former", "prescribed", "rows", "judged"))
        former, prescribed, rows, judged = (worse(a, b) for a, b in pairs)
        one = Floors(former, prescribed, beside, rows, judged)
    return one


def cases(dtypes: Sequence[str] = EVERY) -> Iterator[tuple[str, Fault, list[Oracle]]]:
    """Dtype, fault, and the oracles of the places where it is planted; last the replay's."""
    for dtype in dtypes:
        for fault in FAULTS:
            source = recorded(fault.model, dtype, TOKENS)
            stage = source.path[fault.stage]
            if stage.dtype == dtype:
                layers = (0, 1) if stage.scope is Scope.LAYER else (None,)
                yield dtype, fault, [source.oracle((layer, fault.stage)) for layer in layers]
    u, s, v = factors(24, RANK, 0)
    task = task_of(u, s, v, make_offsets("small", RANK, 0))
    values, params = whole(ReferenceBackend(), task), {"u": u, "s": s, "v": v}
    for fault in REPLAYED:
        stage = REPLAY[fault.stage]
        options = {option: {"layout": "torch_v", "transpose": False}[option] for option in stage.options}
        arguments = (*(values[i] for i in stage.inputs), *(params[p] for p in stage.params))
        yield "float32", fault, [consult(stage, arguments, options)]


def main() -> None:
    rows = []
    with np.errstate(all="ignore"):
        for dtype, fault, oracles in cases():
            kind = kind_of(oracles[0].stage)
            assert kind is not None
            found = worst([floors(oracle, fault) for oracle in oracles])
            rows.append({"kind": kind.name, "stage": fault.stage, "fault": fault.words, "dtype": dtype, **vars(found)})
            for words, k in found.beside.items():
                if k is None or (found.prescribed is not None and k > found.prescribed + 1):
                    said = f"{kind.name} {dtype} {fault.words}: 2^{found.prescribed} alone, 2^{k} beside '{words}'"
                    print(said, file=sys.stderr, flush=True)
    print(json.dumps({"schema": "svf.floors/1", "model": MODEL, "tokens": TOKENS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
