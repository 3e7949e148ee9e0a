"""Comparing two forward dumps: every stage of every layer, judged from its own recorded inputs; needs no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages import diff, stats
from stages.adapted import ADAPTED_FILE, AdaptedWeights
from stages.aprt import is_aprt_tree
from stages.backend import Weights
from stages.checkpoint import Checkpoint, open_checkpoint
from stages.compare import row_verdict, side_fields
from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.forward import ALIASES, RUN_PARAMS, declare, forward_path, parameter_name, producers
from stages.forward_dump import AprtSide, ForwardSide, Place, forward_key
from stages.forward_run import judge_stage
from stages.metrics import Difference
from stages.qwen import QwenConfig, parse_config
from stages.stage import Path as StagePath
from stages.stage import Scope, Stage
from stages.tensorfile import TensorFile
from stages.verdict import SideVerdict, Verdict

Progress = Callable[[str, float], None]
# The chain along which two engines' activations drift apart fastest, in the order of computation.
AMPLIFICATION = ("ffn_gate", "ffn_silu", "ffn_swigl")


@dataclass
class _Run:
    """One side with what judging it needs: its path, weights (None: not to be had) and tokens."""

    side: ForwardSide | AprtSide
    config: QwenConfig | None  # None: an APRT tree, which says nothing of its model
    path: StagePath | None
    tokens: list[int]
    positions: str
    weights: Weights | None
    checkpoint: Checkpoint | None = None  # what `weights` come from, adapted or not
    misshapen: set[Place] = field(default_factory=set)  # nothing can be said of a stage that reads one of these


def diff_forward(
    path_a: Path,
    path_b: Path,
    *,
    model: str | None = None,
    top: int = 5,
    runs: tuple[Any, Any] = (None, None),
    progress: Progress = lambda _label, _done: None,
) -> dict[str, Any]:
    """The `svf.diff/1` document of two forward dumps.

    `model` overrides where the weights are looked for (otherwise where each dump says). `InputError` when the two
    ran another model, other tokens or positions: a ratio of statistics over different samples means nothing.
    """
    with ExitStack() as stack:
        a, b = (_open(path, model, stack) for path in (path_a, path_b))
        check_comparable(a, b)
        places = list(_places(a, b))
        rows: list[dict[str, Any]] = []
        logits: dict[str, Any] | None = None
        for number, place in enumerate(places):
            progress(f"comparing {forward_key(place)}", number / len(places))
            rows.append(_row(place, a, b, top))
            if place[1] == "lm_head" and rows[-1]["verdict"] not in (Verdict.MISSING, Verdict.EXTRA, Verdict.SHAPE):
                x, y = a.side.read(place), b.side.read(place)
                logits = stats.logits(
                    np.atleast_2d(x)[-len(np.atleast_2d(y)) :], np.atleast_2d(y)[-len(np.atleast_2d(x)) :]
                )
        return diff.finish(
            rows,
            diff.side(a.side.label, a.side.facts, runs[0]),
            diff.side(b.side.label, b.side.facts, runs[1]),
            expected=len(places),
            extra={
                "kind": "forward",
                "tokens": len(a.tokens) or len(b.tokens) or None,
                "flat": a.config is None or b.config is None,
                "logits": logits,
                "growth": growth(rows),
                "amplification": amplification(rows),
            },
        )


def _open(folder: Path, model: str | None, stack: ExitStack) -> _Run:
    if is_aprt_tree(folder):
        return _Run(AprtSide(folder), None, None, [], "all", None)
    side = ForwardSide(folder)
    stack.callback(side.close)
    manifest = side.dump.manifest
    recorded = manifest.get("model")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("config"), dict):
        raise InputError(f"{folder}: the manifest names no model")
    config = parse_config(recorded["config"], f"{folder}: model config")
    tokens = manifest.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, int) for t in tokens):
        raise InputError(f"{folder}: the manifest has no token ids")
    path = forward_path(config, str(manifest.get("dtype", "model")))
    checkpoint = _checkpoint(folder, recorded, model, stack)
    weights = _weights(folder, checkpoint, stack)
    return _Run(side, config, path, tokens, str(manifest.get("positions", "all")), weights, checkpoint)


def _checkpoint(folder: Path, recorded: Mapping[str, Any], model: str | None, stack: ExitStack) -> Checkpoint | None:
    """The model a dump was made from: the given one, or the recorded one if it is still the same."""
    source = model or recorded.get("source")
    try:
        checkpoint = stack.enter_context(open_checkpoint(str(source)))
    except (InputError, NotFoundError):
        if model is not None:
            raise
        return None
    if checkpoint.fingerprint() != recorded.get("fingerprint"):
        if model is not None:
            raise InputError(f"{model}: is not the model that {folder} was made from (config or tensor headers differ)")
        return None
    return checkpoint


def _weights(folder: Path, checkpoint: Checkpoint | None, stack: ExitStack) -> Weights | None:
    """The model's weights, adapted ones as the dump keeps them."""
    if checkpoint is None or not (folder / ADAPTED_FILE).is_file():
        return checkpoint
    file = TensorFile(folder / ADAPTED_FILE)
    stack.callback(file.close)
    return AdaptedWeights(checkpoint, file)


def check_comparable(a: _Run, b: _Run) -> None:
    """`InputError` unless both ran the same model on the same tokens, positions and dtype, as far as they tell."""
    if a.path is None or b.path is None:
        return
    assert isinstance(a.side, ForwardSide)
    assert isinstance(b.side, ForwardSide)
    pair = f"{a.side.label} and {b.side.label}"
    if a.tokens != b.tokens:
        raise InputError(
            f"not comparable: {pair} ran different tokens ({len(a.tokens)} and {len(b.tokens)} of them); "
            "statistics over different samples cannot be compared"
        )
    if a.positions != b.positions:
        raise InputError(f"not comparable: {pair} hold positions {a.positions} and {b.positions}")
    one, other = (side.dump.manifest["model"].get("fingerprint") for side in (a.side, b.side))
    if one != other:
        raise InputError(f"not comparable: {pair} ran different models (config or tensor headers differ)")
    if a.path["embedding"].dtype != b.path["embedding"].dtype:
        raise InputError(
            f"not comparable: {pair} computed in {a.path['embedding'].dtype} and {b.path['embedding'].dtype}"
        )
    other = _other_tensor(a.checkpoint, b.checkpoint)
    if other is not None:
        raise InputError(f"not comparable: {pair} ran different models: '{shown(other)}' has other values")


def _other_tensor(a: Checkpoint | None, b: Checkpoint | None) -> str | None:
    """The first tensor whose values differ in two checkpoints of one shape; None where one is not to be had.

    A fingerprint is the same for two fine-tunes: each stage would be right on its own weights, and all would agree.
    """
    if a is None or b is None or a.path.resolve() == b.path.resolve():
        return None
    return next((name for name in a.tensors if a.weights_sha256([name]) != b.weights_sha256([name])), None)


def _places(a: _Run, b: _Run) -> Iterator[Place]:
    """Every stage that either side has, in execution order; `InputError` for one that no Qwen has."""
    have = a.side.places.keys() | b.side.places.keys()
    known = a.path or b.path
    # Of an APRT tree nothing is known: the fullest family's order serves for any.
    stages = list(known.values()) if known else list(declare(qk_norm=True, qkv_bias=True, o_bias=True))
    first = next(i for i, stage in enumerate(stages) if stage.scope is Scope.LAYER)
    order: list[Place] = [(None, s.name) for s in stages[:first]]
    in_layer = [*(s.name for s in stages if s.scope is Scope.LAYER), *ALIASES]
    layers = sorted({layer for layer, _ in have if layer is not None})
    order += [(layer, name) for layer in layers for name in in_layer]
    order += [(None, s.name) for s in stages[first:] if s.scope is Scope.MODEL]
    unknown = sorted(have - set(order), key=str)
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        raise InputError(f"'{forward_key(unknown[0])}' is no stage of a Qwen model; there are {names}")
    yield from (place for place in order if place in have)


def _row(place: Place, a: _Run, b: _Run, top: int) -> dict[str, Any]:
    layer, name = place
    row: dict[str, Any] = {
        "key": forward_key(place),
        "layer": layer,
        "tensor": None,
        "stage": name,
        "required": True,
        "verdict": Verdict.EXACT.value,
        **side_fields(None, None),
        "tolerance_passed": False,
    }
    if place not in b.side.places or place not in a.side.places:
        verdict = Verdict.MISSING if place not in b.side.places else Verdict.EXTRA
        return {**row, "verdict": verdict.value}
    recorded_a, recorded_b = a.side.read(place), b.side.read(place)
    x, y = recorded_a, recorded_b
    if a.path is None or b.path is None:
        x, y = _flat(x, y), _flat(y, x)
    side_a, side_b = (_judge(place, run, array) for run, array in ((a, recorded_a), (b, recorded_b)))
    alike = x.shape == y.shape and x.dtype == y.dtype
    for run, side in ((a, side_a), (b, side_b)):
        if (side is None and not alike) or (side is not None and side.verdict is Verdict.SHAPE):
            run.misshapen.add(place)
    if not alike:
        expected = a.path[name].shape if a.path else "as many elements"
        note = f'a has {x.dtype} {list(x.shape)}, b has {y.dtype} {list(y.shape)}; expected "{expected}"'
        if x.shape[:2] == y.shape[:2][::-1] and x.ndim == y.ndim:
            note += ". Is one dump head-first?"
        return {**row, "verdict": Verdict.SHAPE.value, **side_fields(side_a, side_b), "note": note}
    d = Difference(top)
    d.add(x, y)
    given = name == "embedding" or (name == "inv_freq" and a.path is not None)
    other_weights = _other_weights(place, a, b)
    population_a, population_b = stats.population(x), stats.population(y)
    return {
        **row,
        "verdict": row_verdict(d, side_a, side_b, given=given and side_a is None and a.path is not None).value,
        **side_fields(side_a, side_b),
        "sha256_a": a.side.sha256(place),
        "sha256_b": b.side.sha256(place),
        "stats_a": population_a,
        "stats_b": population_b,
        "std_ratio": stats.std_ratio(population_a, population_b),
        **d.result(),
        **({"verdict": Verdict.BUG.value, "note": other_weights} if other_weights else {}),
    }


def _other_weights(place: Place, a: _Run, b: _Run) -> str | None:
    """A note when the two sides' stage read differently adapted weights: each may be right, they are not one model."""
    if a.path is None or b.path is None or place[1] not in a.path:
        return None
    assert isinstance(a.side, ForwardSide)
    assert isinstance(b.side, ForwardSide)
    adapted_a, adapted_b = (side.dump.manifest.get("adapted_sha256") or {} for side in (a.side, b.side))
    stage = a.path[place[1]]
    names = [parameter_name(stage, param, place[0]) for param in stage.params]
    other = [name for name in names if adapted_a.get(name) != adapted_b.get(name)]
    layouts = [side.dump.manifest.get("layout") or "not adapted" for side in (a.side, b.side)]
    return f"the sides ran on different {', '.join(other)} ({layouts[0]}, {layouts[1]})" if other else None


def _judge(place: Place, run: _Run, observed: np.ndarray) -> SideVerdict | None:
    """The verdict on one side's stage from its own recorded inputs; None where they, or the weights, are not there."""
    layer, name = place
    if run.path is None or run.config is None:
        return None
    stage = run.path[name]
    if run.weights is None and any(param not in RUN_PARAMS for param in stage.params):
        return None
    if run.positions == "last" and _mixes_positions(run.path, stage):
        return None
    sources = producers(run.path, stage, layer, run.config.num_hidden_layers)
    if any(source not in run.side.places or source in run.misshapen for source in sources.values()):
        return None
    inputs = {name: run.side.read(source) for name, source in sources.items()}
    chosen = slice(-1, None) if run.positions == "last" else slice(None)
    tokens, positions = np.asarray(run.tokens, np.int32), np.arange(len(run.tokens), dtype=np.int32)
    inputs |= {"tokens": tokens[chosen], "positions": positions[chosen]}
    weights = run.weights if run.weights is not None else _NoWeights()
    try:
        return judge_stage(run.path, run.config, stage, inputs, weights, observed, layer)
    except (ValueError, IndexError):  # numpy's, for operands whose shapes do not go together
        return SideVerdict(Verdict.SHAPE, np.inf)


def _flat(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`x` as APRT holds it: flat float32; of all tokens' logits, the last one's, if that is what the other side has."""
    if x.ndim == 2 and x.shape[0] > 1 and other.size == x.shape[1]:
        x = x[-1]
    return np.ascontiguousarray(x, np.float32).reshape(-1)


class _NoWeights:
    """Stands for weights in stages that take none."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise UsageError(f"{name}: the weights are not to be had")


def _mixes_positions(path: StagePath, stage: Stage) -> bool:
    """Whether one position's result needs another's: attention, whose axes are queries and keys."""
    return any("keys" in path[name].shape.split() for name in (stage.name, *stage.inputs) if name in path)


def growth(rows: Sequence[Mapping[str, Any]], stage: str = "post_ffn_residual") -> list[dict[str, Any]]:
    """How the difference of the layers' outputs grows with depth: propagated, so inherited error is in it."""
    fields = ("layer", "rel_l2", "max_abs", "cosine", "std_ratio")
    return [{f: row[f] for f in fields} for row in rows if row["stage"] == stage and row.get("rel_l2") is not None]


def amplification(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per layer, the ratio of standard deviations (b over a) and the relative difference along the FFN's chain."""
    by_place = {(row["layer"], row["stage"]): row for row in rows if row.get("rel_l2") is not None}
    layers = sorted({layer for layer, stage in by_place if layer is not None and stage in AMPLIFICATION})
    result = []
    for layer in layers:
        chain = [by_place.get((layer, stage)) for stage in AMPLIFICATION]
        steps = [row for row in chain if row is not None]
        if len(steps) == len(AMPLIFICATION):
            result.append(
                {
                    "layer": layer,
                    "std_ratio": {row["stage"]: row["std_ratio"] for row in steps},
                    "rel_l2": {row["stage"]: row["rel_l2"] for row in steps},
                }
            )
    return result
