"""Comparing two checkpoints tensor by tensor: which values differ, never which labels say so.

Every tensor that both sides have is read on both sides, in blocks; shapes, metadata and hashes of headers prove
nothing about values. A square matrix may be transposed without its shape telling, so it is compared both ways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np

from stages.errors import InputError, shown
from stages.files.checkpoint import EMBEDDING, LM_HEAD
from stages.files.gguf_model import PAIRED_ROWS, GgufInfo, GgufModel, halves, pairs
from stages.files.selection import layer_of
from stages.files.source import ModelSource
from stages.judge.metrics import Difference, same_bits
from stages.judge.quantised import Found, cause, judged
from stages.judge.stored import Stored, blocks_of, weights_of
from stages.progress import Report
from stages.spec.dtypes import dtype_name
from stages.spec.families import parameter_shapes

SCHEMA = "svf.checkpoints/1"

# Stored bytes of one side read at a time; with both sides' copies under 100 MB (151,936 x 1,024, transposed: 80).
BLOCK_BYTES = 16 * 1024 * 1024

Blocks = Iterator[tuple[int, int, np.ndarray, np.ndarray]]  # first index, its axis in a, and the same slice of a and b

# Config fields that change no number by themselves: the LM head's values judge whether tying matters, positions have
# no end, and a window in use is in `sliding_window`.
_HARMLESS = frozenset({"tie_word_embeddings", "max_position_embeddings", "use_sliding_window"})
_FLOATS = {np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)}


class Status(StrEnum):
    """What a tensor's values are on side b, seen from side a."""

    IDENTICAL = "identical"
    DTYPE = "dtype"  # the same values in another dtype: an exact upcast gives the same bits
    TIED = "tied"  # the LM head is stored on one side, the embedding on the other, and they hold the same values
    QUANTISED = "quantised"  # one side holds what a right quantiser, or a rounding to 16 bits, makes of the other's
    TRANSPOSED = "transposed"
    PERMUTED = "permuted"  # rows of q or k: the halves of a head on one side, pairs on the other
    UNJUDGED = "unjudged"  # of a type of which it is not known what right is
    DIFFERENT = "different"
    SHAPE = "shape"  # shapes that no transposition explains
    MISSING = "missing"
    EXTRA = "extra"

    @property
    def agrees(self) -> bool:
        return self in (Status.IDENTICAL, Status.DTYPE, Status.TIED, Status.QUANTISED)


def diff_checkpoints(
    a: ModelSource, b: ModelSource, *, top: int = 5, progress: Report = lambda _label, _done: None
) -> dict[str, Any]:
    """The `svf.checkpoints/1` document: how each tensor, and each config field, of `b` differs from `a`'s.

    Tensors are matched by name. `outcome` is `agree` when all values and all config fields that change the
    computation are equal (a tied LM head and an equal stored one, or all tensors upcast, make no difference),
    `diverged` when some are not, a transposed, missing or extra tensor included, and `incomplete` when no tensor could
    be compared, or a config is one that this tool refuses. `InputError` when a tied LM head is stored with other values
    than the embedding's, and only one side ties. `top` differences are listed per tensor.
    """
    config = _config_document(a, b)
    tensors = {name: (_stored(a, name), _stored(b, name)) for name in _names(a, b)}
    total, done = sum(map(_nbytes, tensors.values())), 0
    rows: list[dict[str, Any]] = []
    for name, pair in tensors.items():
        progress(f"comparing {shown(name)}", done / max(1, total))
        rows.append(_row(name, *pair, top))
        done += _nbytes(pair)
    compared = sum(row["status"] not in (Status.MISSING, Status.EXTRA) for row in rows)
    outcome, counts = _outcome(rows, config, compared), Counter(row["status"] for row in rows)
    return {
        "schema": SCHEMA,
        "outcome": outcome,
        "verdict": _sentence(rows, config, outcome),
        "rows": rows,
        "counts": {status.value: counts[status.value] for status in Status},
        "config": config,
        "coverage": {"compared": compared, "expected": len(rows)},
        "a": _side(a),
        "b": _side(b),
    }


def _side(checkpoint: ModelSource) -> dict[str, Any]:
    return {
        "source": checkpoint.source,
        "path": str(checkpoint.path),
        "revision": checkpoint.revision,
        "fingerprint": checkpoint.fingerprint(),
    }


def _names(a: ModelSource, b: ModelSource) -> list[str]:
    """Every name to compare: in state-dict order where a's config tells it, then as the files have them."""
    there = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    if _tied(a) != _tied(b) and any(_stored(side, LM_HEAD) for side in (a, b)) and LM_HEAD not in there:
        there.append(LM_HEAD)  # tied on one side, and on the other neither tied nor stored
    try:
        order = {name: place for place, name in enumerate(parameter_shapes(a.config))}
    except InputError:
        return there
    return sorted(there, key=lambda name: order.get(name, len(order)))


def _nbytes(pair: tuple[Stored | None, Stored | None]) -> int:
    return sum(stored.info.nbytes for stored in pair if stored is not None)


def _stored(checkpoint: ModelSource, name: str) -> Stored | None:
    """The tensor called `name`, or the embedding for an LM head that is tied to it; None when it is not there."""
    tied = _tied(checkpoint) and name == LM_HEAD and EMBEDDING in checkpoint.tensors
    if name not in checkpoint.tensors and not tied:
        return None
    return Stored(checkpoint, checkpoint.tensors[name if name in checkpoint.tensors else EMBEDDING])


def _tied(checkpoint: ModelSource) -> bool:
    return checkpoint.raw_config.get("tie_word_embeddings") is True


def _row(name: str, a: Stored | None, b: Stored | None, top: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tensor": name,
        "layer": layer_of(name),
        "status": Status.MISSING.value if b is None else Status.EXTRA.value,
        "dtype_a": dtype_name(a.info.dtype) if a else None,
        "dtype_b": dtype_name(b.info.dtype) if b else None,
        "shape_a": list(a.info.shape) if a else None,
        "shape_b": list(b.info.shape) if b else None,
        "note": None,
    }
    if a is None or b is None:
        return row
    status, found = _compare(a, b, top)
    tied = [side for side, stored in (("a", a), ("b", b)) if stored.info.name != name]
    if tied:
        found["note"] = "; ".join([f"{tied[0]} ties it to {EMBEDDING}", *([found["note"]] if "note" in found else [])])
        status = Status.TIED if status in (Status.IDENTICAL, Status.DTYPE) else status
    elif name == LM_HEAD:
        for stored in (a, b):
            _check_stored_head(stored.checkpoint, _tied(a.checkpoint) != _tied(b.checkpoint))
    return {**row, "status": status.value, **found}


def _check_stored_head(checkpoint: ModelSource, flags_differ: bool) -> None:
    """`InputError` for a stored LM head that a loader would replace by the embedding, where only one side ties."""
    if flags_differ and _tied(checkpoint) and EMBEDDING in checkpoint.tensors:
        head, embedding = Stored(checkpoint, checkpoint.tensors[LM_HEAD]), _stored(checkpoint, EMBEDDING)
        assert embedding is not None
        if _compare(head, embedding, 0)[0] is not Status.IDENTICAL:
            raise InputError(
                f"{checkpoint.path}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}; which one is "
                "used would depend on the loader: set it to false, or drop one"
            )


def _compare(a: Stored, b: Stored, top: int) -> tuple[Status, dict[str, Any]]:
    """What the values of two tensors say, and the row's fields for it."""
    wide = _common(a.info.dtype, b.info.dtype)
    shape_a, shape_b = a.info.shape, b.info.shape
    matrix = len(shape_a) == len(shape_b) == 2
    straight, turned = shape_a == shape_b, matrix and shape_a == shape_b[::-1]
    if not straight and not turned:
        return Status.SHAPE, {"note": f"a is {list(shape_a)}, b is {list(shape_b)}{_relabelled(a, b)}"}
    if wide is None:
        return Status.DIFFERENT, {"note": "no dtype holds the values of both exactly, so they were not compared"}
    if straight and _equal(_straight(a, b), wide):
        return (Status.IDENTICAL if a.info.dtype == b.info.dtype else Status.DTYPE), {}
    if turned and _equal(_turned(a, b), wide):
        how = "shapes swapped" if not straight else "square: the shapes hide it"
        other = "" if a.info.dtype == b.info.dtype else ", in another dtype"
        return Status.TRANSPOSED, {"note": f"b holds a's transpose, value for value{other} ({how})"}
    if not straight and (label := _relabelled(a, b)):
        return Status.SHAPE, {"note": f"a is {list(shape_a)}, b is {list(shape_b)}{label}"}
    heads = _of_heads(a, b) if straight else []
    for note, reordered in heads:
        if _equal(_straight(a, reordered), wide):
            return Status.PERMUTED, {"note": note}
    if (a.kind or b.kind) and len(shape_a) <= 2:
        return _quantised(a, b, wide, top, [h for _, h in heads], straight=straight, turned=turned)
    return Status.DIFFERENT, _metrics(a, b, wide, top, straight=straight, turned=turned)


def _of_heads(a: Stored, b: Stored) -> list[tuple[str, Stored]]:
    """b with the rows of q's or k's heads in another order, and what that says; none of another tensor."""
    if not any(f"{part}." in a.info.name for part in PAIRED_ROWS):
        return []
    try:
        head = a.checkpoint.config.head_dim
    except InputError:
        return []
    if a.info.shape[0] % head:
        return []
    why = ""
    for side in (a, b):
        if isinstance(side.info, GgufInfo):
            why = "; GGUF keeps those of a Llama in pairs, " + (
                "and the file does not" if side.info.pairs else "and of no other family"
            )
    return [
        (f"a has b's rows of each head turned from {text}{why}", replace(b, head=head, order=order))
        for order, text in ((halves, "pairs to halves"), (pairs, "halves to pairs"))
    ]


def _quantised(
    a: Stored, b: Stored, wide: np.dtype, top: int, heads: Sequence[Stored], *, straight: bool, turned: bool
) -> tuple[Status, dict[str, Any]]:
    """Tensors of which one at least has the blocks, or the 16 bits, of a GGUF file, and whose values differ."""
    stored, other = (b, a) if b.kind else (a, b)
    kind = stored.kind
    assert kind is not None
    if not all(judged(side.kind) for side in (a, b) if side.kind):
        found = _metrics(a, b, wide, top, straight=straight, turned=turned)
        return Status.UNJUDGED, {
            **found,
            "note": f"what a right quantiser makes of weights in {kind} is not known here",
        }
    result = blocks_of(stored, other) if straight else None
    if result is not None and (result.right or (result.fitted and not _cause(result, stored, other))):
        return Status.QUANTISED, {"quantised": _told(result), "note": _rightly(result)}
    for b_turned in heads:
        pair = (b_turned, a) if b.kind else (a, b_turned)
        if blocks_of(*pair, whole=False).right:
            return Status.PERMUTED, {"note": f"{kind}, rightly, but for the order of each head's rows, which is turned"}
    if turned and other.kind is None and blocks_of(stored, other, turned=True, whole=False).right:
        return Status.TRANSPOSED, {"note": f"{kind} of the other's transpose"}
    differ = _metrics(a, b, wide, top, straight=straight, turned=turned)
    if result is None:
        return Status.DIFFERENT, differ
    return Status.DIFFERENT, {
        **differ,
        "quantised": _told(result),
        "note": _wrongly(result, _cause(result, stored, other)),
    }


def _cause(found: Found, stored: Stored, other: Stored) -> str:
    if other.kind is not None:
        return ""
    return cause(found, stored.raw, lambda start, stop: weights_of(other, start, stop))


def _told(found: Found) -> dict[str, Any]:
    """What a row says of blocks; `worst` is the largest error over what its code allows."""
    first = None if found.right else found.place()
    return {"type": found.kind, "blocks": found.blocks, "wrong": found.wrong, "worst": found.off, "first": first}


def _rightly(found: Found) -> str:
    if found.right:
        return (
            f"{found.kind}: each of {found.blocks} blocks within what its codes allow, at most {found.worst:.3g} of it"
        )
    return (
        f"{found.kind}: {found.wrong} of {found.blocks} blocks beyond what their codes allow, each as a scale that was "
        "fitted after the codes leaves it (an importance matrix does that): judged by the order of codes alone"
    )


def _wrongly(found: Found, why: str) -> str:
    place = found.place()
    where = f"block {place['block']} of row {place['row']} (columns {place['columns'][0]} to {place['columns'][1]})"
    return (
        f"{found.kind}: {found.wrong} of {found.blocks} blocks hold other weights, the first {where}, "
        f"{found.off:.3g} times what its codes allow{f': {why}' if why else ''}"
    )


def _relabelled(a: Stored, b: Stored) -> str:
    """The rest of a note on two tensors of different shape that hold the same bytes in the same order; "" otherwise."""
    alike = a.info.dtype == b.info.dtype and a.info.nbytes == b.info.nbytes
    if not alike or a.sha256() != b.sha256():
        return ""
    return ": the same bytes in the same order, only the label of the shape differs; nothing was transposed"


def _metrics(a: Stored, b: Stored, wide: np.dtype, top: int, *, straight: bool, turned: bool) -> dict[str, Any]:
    """Metrics of tensors that differ: as stored, or against the transpose where only that has the same shape."""
    transposed = _difference(_turned(a, b), wide, top).result() if turned else None
    if not straight:
        assert transposed is not None
        note = "shapes swapped, and b's transpose differs from a too: metrics are against it"
        return {**transposed, "against_transpose": True, "note": note}
    found = _difference(_straight(a, b), wide, top).result()
    if transposed is not None and transposed["rel_l2"] < found["rel_l2"] / 2:
        near = f"relative difference {transposed['rel_l2']:.3g} instead of {found['rel_l2']:.3g}"
        return {**found, "note": f"b's transpose is much nearer to a: {near}"}
    return found


def _straight(a: Stored, b: Stored) -> Blocks:
    """Both tensors in row blocks; their shapes are equal."""
    for start, stop in _ranges(a, b):
        yield start, 0, a.rows(start, stop), b.rows(start, stop)


def _turned(a: Stored, b: Stored) -> Blocks:
    """a and b's transpose, cut along the longer side: columns are gathered from few long rows, not many short ones."""
    by_rows_of_a = a.info.shape[0] >= a.info.shape[1]
    for start, stop in _ranges(a, b) if by_rows_of_a else _ranges(b, a):
        if by_rows_of_a:
            yield start, 0, a.rows(start, stop), b.columns(start, stop).T
        else:
            yield start, 1, a.columns(start, stop), b.rows(start, stop).T


def _ranges(first: Stored, second: Stored) -> Iterator[tuple[int, int]]:
    """Row ranges of `first` that hold at most `BLOCK_BYTES` on either side, or one row."""
    rows = first.info.shape[0] if first.info.shape else 1
    step = max(1, BLOCK_BYTES * rows // max(1, first.info.nbytes, second.info.nbytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _common(a: np.dtype, b: np.dtype) -> np.dtype | None:
    """The smallest dtype here that holds all values of both; None when there is none."""
    if a == b:
        return a
    if {a, b} <= _FLOATS:
        return np.dtype(np.float64 if np.dtype(np.float64) in (a, b) else np.float32)
    exact = all(dtype.itemsize <= 4 or dtype in _FLOATS for dtype in (a, b))
    return np.dtype(np.float64) if exact else None


def _equal(blocks: Blocks, wide: np.dtype) -> bool:
    """Whether all blocks hold the same values; reading stops at the first that does not."""
    return all(_same_values(x, y, wide) for _, _, x, y in blocks)


def _same_values(x: np.ndarray, y: np.ndarray, wide: np.dtype) -> bool:
    """The same bits; of two dtypes, after an exact upcast, any NaN being like any other: a conversion may change it."""
    if x.dtype == y.dtype:
        return same_bits(x, y)
    with np.errstate(invalid="ignore"):
        p, q = _widened(x, wide), _widened(y, wide)
    return same_bits(p, q) or bool(((_bits(p) == _bits(q)) | (np.isnan(p) & np.isnan(q))).all())


def _widened(x: np.ndarray, wide: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(x).astype(wide, copy=False)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def _difference(blocks: Blocks, wide: np.dtype, top: int) -> Difference:
    whole = Difference(top)
    for start, axis, x, y in blocks:
        part = Difference(top)
        part.add(_widened(x, wide), _widened(y, wide), start, axis)
        whole.merge(part)
    return whole


def _config_document(a: ModelSource, b: ModelSource) -> dict[str, Any]:
    """Fields of the checked configs that differ; `understood` is false, with the `reason`, when one is refused."""
    try:
        both = a.config, b.config
    except InputError as error:
        return {"understood": False, "reason": str(error), "differences": _raw_differences(a.raw_config, b.raw_config)}
    # A dtype that all tensors have is theirs to tell; another one would be cast to, and change the values. GGUF says
    # nothing of what is computed in.
    told = all(
        isinstance(side, GgufModel) or {dtype_name(info.dtype) for info in side.tensors.values()} <= {side.config.dtype}
        for side in (a, b)
    )
    differences = [
        {
            "field": field.name,
            "a": _plain(getattr(both[0], field.name)),
            "b": _plain(getattr(both[1], field.name)),
            "changes_computation": field.name not in (_HARMLESS | {"dtype"} if told else _HARMLESS),
        }
        for field in fields(both[0])
        if getattr(both[0], field.name) != getattr(both[1], field.name)
    ]
    return {"understood": True, "reason": None, "differences": differences}


def _raw_differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Fields as the files have them; what they change is not known (None)."""
    names = sorted(a.keys() | b.keys())
    return [
        {"field": name, "a": a.get(name), "b": b.get(name), "changes_computation": None}
        for name in names
        if a.get(name) != b.get(name) or (name in a) != (name in b)
    ]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) else value


def _outcome(rows: Sequence[dict[str, Any]], config: dict[str, Any], compared: int) -> str:
    changed = any(difference["changes_computation"] for difference in config["differences"])
    statuses = {Status(row["status"]) for row in rows}
    if changed or not all(status.agrees for status in statuses - {Status.UNJUDGED}):
        return "diverged"
    return "agree" if compared and config["understood"] and Status.UNJUDGED not in statuses else "incomplete"


def _sentence(rows: Sequence[dict[str, Any]], config: dict[str, Any], outcome: str) -> str:
    """The outcome as a sentence."""
    if not rows:
        return "Nothing was compared: neither checkpoint has a tensor."
    counts = Counter(Status(row["status"]) for row in rows)
    parts = [f"{counts[status]} {_WORDS[status]}" for status in Status if counts[status]]
    text = f"Of {len(rows)} tensors: {', '.join(parts)}"
    changed = [d["field"] for d in config["differences"] if d["changes_computation"]]
    if changed:
        text += f"; config.json changes the computation: {', '.join(changed)}"
    if not config["understood"]:
        text += f"; the configs could not be compared: {config['reason']}"
    first = next((row for row in rows if not Status(row["status"]).agrees), None)
    if outcome == "diverged" and first is not None:
        why = f" ({first['note']})" if "quantised" in first else ""
        text += f"; the first: {shown(first['tensor'])} is {_WORDS[Status(first['status'])]}{why}"
    return text + "."


_WORDS = {
    Status.IDENTICAL: "identical",
    Status.DTYPE: "equal in another dtype",
    Status.TIED: "tied on one side and equal on the other",
    Status.QUANTISED: "quantised rightly",
    Status.TRANSPOSED: "transposed",
    Status.PERMUTED: "permuted",
    Status.UNJUDGED: "of a type that is not judged",
    Status.DIFFERENT: "different",
    Status.SHAPE: "of another shape",
    Status.MISSING: "missing in b",
    Status.EXTRA: "only in b",
}
