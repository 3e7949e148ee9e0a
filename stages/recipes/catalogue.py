"""Which recipes each stage has; everything that speaks of rounding or of usual mistakes derives from these rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stages.recipes import attention, elementwise, experts, norm, product, replay, rope
from stages.recipes.at import At, Unknown
from stages.recipes.fewer_bits import NARROW, Lost, ways
from stages.recipes.recipe import EVERY, FIT, Class, Form, Kind, Mod
from stages.recipes.value import Value
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise
from stages.spec.stage import Stage

# Stages of one noise kind share their recipes; of the exact ones each has its own.
BY_NOISE: Mapping[Noise, Kind] = MappingProxyType(
    {
        Noise.RMS_NORM: norm.NORM,
        Noise.PRODUCT: product.LINEAR,
        Noise.SCORES: attention.SCORES,
        Noise.SOFTMAX: attention.SOFTMAX,
        Noise.WEIGHTED: attention.WEIGHTED,
        Noise.SILU: elementwise.SILU,
        Noise.ROPE: rope.ROPE,
        Noise.COS_SIN: rope.TABLE,
        Noise.SUM_RATIO: replay.RATIO,
        Noise.INV_FREQ: rope.INV_FREQ,
        Noise.SIGMOID: experts.SIGMOID,
        Noise.DISTRIBUTION: experts.DISTRIBUTION,
        Noise.CHOICE: experts.CHOICE,
        Noise.SHARES: experts.SHARES,
        Noise.EXPERTS: experts.EXPERTS,
        Noise.COMBINED: experts.COMBINED,
    }
)
BY_NAME: Mapping[str, Kind] = MappingProxyType(
    {
        "rope_angle": rope.ANGLE,
        "embedding": elementwise.EMBEDDING,
        **dict.fromkeys(("ffn_swigl", "expert_swigl", "shared_swigl"), elementwise.SWIGL),
        "shared_gated": elementwise.GATED,
        "moe_and_shared": elementwise.WITH_SHARED,
        "post_attn_residual": elementwise.RESIDUAL,
        "post_ffn_residual": elementwise.RESIDUAL,
        "source_f32": elementwise.COPY,
        "offsets_f32": elementwise.COPY,
        "scaled_s": replay.SCALED_S,
        "u_scaled": replay.U_SCALED,
        "matmul_pre_norm": replay.CONTRACTED,
        "zero_source_f32": replay.CONTRACTED,
        "adapted_source_f32": replay.ADAPTED,
        "adapted_weight": replay.WHOLE,
        "final_f32": replay.FINAL,
        "final_bf16": replay.CAST,
    }
)
KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in (*BY_NOISE.values(), *BY_NAME.values())})


def kind_of(stage: Stage) -> Kind | None:
    """The recipes of a stage; None of one that no row describes."""
    if stage.identity:
        return elementwise.COPY
    return BY_NAME.get(stage.function) or BY_NOISE.get(stage.noise)


def held(dtype: str) -> str:
    """The dtype whose rows hold for a storage dtype: what is stored wider than float32 was computed in that."""
    return dtype if dtype in EVERY else "float32"


def forms_of(kind: Kind, dtype: str, *classes: Class) -> list[Form]:
    """The forms that hold for a dtype, of some classes, in their order."""
    return [form for form in kind.forms if form.of(held(dtype)) in classes]


# What the rows call a step that is not done at all.
LEFT_OUT = ("the norm is missing", "the activation is missing", "not turned by RoPE at all")


def told(row: Form | Mod, at: At, number: float = 0.0) -> str:
    """A row's words of one stage: its dtype, options and the number that was estimated filled in."""
    named = {name: value for name, value in at.options.items() if isinstance(value, float | str)}
    if "layout" in at.options:
        turned = LAYOUTS[at.options["layout"]].transposed
        named["other_layouts"] = ", ".join(name for name, row in LAYOUTS.items() if row.transposed != turned)
    if "transpose" in at.options:
        named["turned"] = "labelled as transposed, the values are not" if at.options["transpose"] else "transposed"
    return row.words.format(**{**named, "dtype": at.stage.dtype, "fit": number})


@dataclass(frozen=True)
class Way:
    """What one row gives in the place of a stage: in words, of its class, the value before its last rounding.

    `own`: a form or a mod of the stage's kind, not a general one of fewer bits. `usual` says who does so by itself.
    """

    words: str
    kind: Class
    value: np.ndarray
    own: bool
    usual: str = ""


def ways_of(
    at: At, *classes: Class, numbers: Mapping[str, float] = MappingProxyType({}), only: str = ""
) -> Iterator[Way]:
    """What each row of some classes gives that holds for the stage's dtype and has what it reads.

    `numbers` are those that a row leaves open, by name; a row that leaves another one open is passed over. `only`
    the row of these words, if any.
    """
    kind = kind_of(at.stage)
    if kind is None:
        return
    for row in _rows(kind, at, classes, numbers, only):
        if only in ("", row.words):
            with suppress(Unknown), np.errstate(all="ignore"):
                value = kind.emulator(row.at, **row.args)
                if value is not None and value.mid.shape == at.oracle.value.shape:
                    yield Way(row.words, row.kind, row.at.result(value).mid, row.own, row.usual)


class _Row(NamedTuple):
    """What a kind's emulator is called with, and what a `Way` says of it."""

    words: str
    kind: Class
    args: Mapping[str, Any]
    at: At
    own: bool
    usual: str = ""


def _rows(kind: Kind, at: At, classes: Sequence[Class], numbers: Mapping[str, float], only: str) -> Iterator[_Row]:
    """The rows that `ways_of` asks, of fewer bits those alone whose words may be `only`."""
    dtype = at.stage.dtype
    for form in kind.forms:
        of = form.of(dtype)
        if of is not None and of in classes:
            usual = form.usual_of(held(dtype)).format(dtype=dtype)
            yield _Row(told(form, at), of, form.args, at, True, usual)
    if Class.NARROWER in classes:
        for words, lost in _fewer_bits(at, only):
            yield _Row(words, Class.NARROWER, {}, at.but(lost=lost), False)
    for mod in kind.mods if Class.OTHER in classes else ():
        left_open = [name for name, value in mod.args.items() if value == FIT]
        if set(left_open) <= set(numbers):
            given = {name: numbers[name] for name in left_open}
            yield _Row(told(mod, at, *given.values()), Class.OTHER, {**mod.args, **given}, at, True)


def _fewer_bits(at: At, only: str) -> Iterator[tuple[str, Lost]]:
    wide: list[np.ndarray | None] | None = None
    for narrow in NARROW:
        if narrow.holds(at.stage, at.stage.dtype) and narrow.words in (only or narrow.words):
            if wide is None:
                wide = [a.astype(np.float64) if a.dtype.kind != "i" else None for a in at.oracle.arguments]
            more = [x is not None and narrow.changes(x) for x in wide]
            yield from ways(at.stage.inputs, more, narrow, at.biases)


def right_value(at: At) -> Value:
    """What the prescribed recipe gives; `Unknown` of a stage that no row describes."""
    kind = kind_of(at.stage)
    if kind is None:
        raise Unknown(at.stage.function)
    value = kind.emulator(at, **forms_of(kind, at.stage.dtype, Class.PRESCRIBED)[0].args)
    if value is None:
        raise Unknown(at.stage.function)
    return value
