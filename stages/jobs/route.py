"""`svf route`: the TRINITY router head on a model, on one backend or on both and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.errors import UsageError
from stages.files.bundle import Bundle
from stages.files.router_head import RouterHead, load_head
from stages.files.scratch import scratch_folder
from stages.files.selection import select_by_rule
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import TensorFile, write_tensors
from stages.files.tokens import token_ids
from stages.judge.metrics import Difference
from stages.oracle.bounds import U32, rounding_unit
from stages.oracle.verdict import Oracle, consult
from stages.progress import Progress
from stages.recipes.side import SideVerdict
from stages.run.adapted import adapt
from stages.run.children import run_sides
from stages.run.forward import Forwarder
from stages.run.precision import precision_fields
from stages.spec.backend import BOTH, SIDES, Backend, Loader, Weights
from stages.spec.config import ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.families import parameter_shapes
from stages.spec.router import HIDDEN_POSITION, ROUTER
from stages.spec.selectors import parse_layers

SCHEMA = "svf.route/1"
LOGITS = ROUTER["router_logits"]
# What two right sides' logits may differ by, in units of `hidden_noise` along their row. Seen: 2.2 between torch and
# JAX, 5.8 between one of them and reference precision, so twice that between two (docs/findings/route.md).
HIDDEN_LAMBDA = 12.0


@dataclass(frozen=True)
class RouteCommand:
    """What `svf route` was asked; fields as in its `--help`."""

    job: ClassVar[str] = "route"

    model: str
    head: Path
    adapted: Path | None = None
    layers: str | None = None
    layout: str = "declared"
    tokens: str | None = None
    tokens_file: Path | None = None
    prompt: str | None = None
    backend: str = BOTH
    dtype: str = "model"
    device: str = "cpu"
    precision: str = "native"
    out: Path | None = None


def route(command: RouteCommand, load: Loader, progress: Progress) -> dict[str, Any]:
    """Route as asked, on one backend or on both; the `svf.route/1` document."""
    if command.backend == BOTH:
        return route_both(command, progress)
    return route_one(command, lambda: load(command.backend, command.device, command.precision), progress)


@dataclass(frozen=True)
class _Given:
    """What a route starts from, whichever backend computes it."""

    checkpoint: ModelSource
    tokens: list[int]
    head: RouterHead

    def document(self, command: RouteCommand) -> dict[str, Any]:
        return {
            "model": command.model,
            "adapted": str(command.adapted) if command.adapted else None,
            "tokens": self.tokens,
            "position": len(self.tokens) + HIDDEN_POSITION,
            "head": {"source": str(command.head), "sha256": self.head.sha256, "agents": self.head.agents},
            "precision": command.precision,
        }


def _given(command: RouteCommand, stack: ExitStack) -> _Given:
    checkpoint = stack.enter_context(open_model(command.model))
    checkpoint.check()
    tokens = token_ids(command, checkpoint)
    checkpoint.config.check_length(len(tokens))
    if len(tokens) < -HIDDEN_POSITION:
        raise UsageError("the head reads the second-to-last token's hidden state: give at least two tokens")
    if command.layout != "declared" and command.adapted is None:
        raise UsageError(f"--layout {command.layout} needs --adapted COMPONENTS")
    layers = parse_layers(command.layers)
    selection = None if command.layers is None else select_by_rule(parameter_shapes(checkpoint.config), layers)
    bundle = None if command.adapted is None else stack.enter_context(Bundle(command.adapted))
    head = load_head(command.head, checkpoint.config.hidden_size, selection, bundle)
    return _Given(checkpoint, tokens.tolist(), head)


# -- one side -----------------------------------------------------------------------------------------------------


def route_one(command: RouteCommand, load: Callable[[], Backend], progress: Progress) -> dict[str, Any]:
    """Route on one backend, the head's product judged by its bound; the `svf.route/1` document."""
    with ExitStack() as stack:
        given = _given(command, stack)
        backend = load()
        weights = _weights(command, given.checkpoint, backend, stack, progress)
        hidden = _hidden(command, given, backend, weights, progress)
        function = backend.compile(backend.router[LOGITS.name])
        logits = backend.get(function(backend.put(hidden), backend.put(given.head.weight)))
        oracle = consult(LOGITS, (hidden, given.head.weight), {})
        judged = SideVerdict()
        judged.add(oracle, logits)
        if command.out is not None:
            write_tensors(command.out, {"router_hidden": hidden, LOGITS.name: logits})
        choices = _choices(given.head, logits[0], oracle.bound[0])
        outcome = "agree" if judged.verdict.passes else "diverged"
        return {
            "schema": SCHEMA,
            "outcome": outcome,
            "verdict": _sentence(backend.name, choices) if outcome == "agree" else _wrong(backend.name, judged),
            **given.document(command),
            **choices,
            "rows": [
                {"output": name, "logit": float(logit), "bound": float(bound)}
                for name, logit, bound in zip(given.head.outputs, logits[0], oracle.bound[0], strict=True)
            ],
            "stage": {"stage": LOGITS.name, "verdict": str(judged.verdict), "ratio": judged.ratio, "hint": judged.hint},
            "backend": backend.name,
            "facts": backend.facts(),
            **precision_fields(backend),
            "out": str(command.out) if command.out else None,
        }


def _weights(
    command: RouteCommand, checkpoint: ModelSource, backend: Backend, stack: ExitStack, progress: Progress
) -> Weights:
    if command.adapted is None:
        return checkpoint
    scratch = stack.enter_context(scratch_folder("route"))
    return adapt(command.adapted, command.layout, checkpoint, backend, scratch, stack, progress).weights


def _hidden(command: RouteCommand, given: _Given, backend: Backend, weights: Weights, progress: Progress) -> np.ndarray:
    """The second-to-last token's hidden state after the final norm, float32 `[1, hidden]`."""
    progress(f"{backend.name} forward", 0.0)
    forwarder = Forwarder(backend, given.checkpoint.config, weights, dtype=command.dtype)
    (last,) = forwarder.run(given.tokens, layers=(), stages=("final_norm",))
    return np.ascontiguousarray(last.array[HIDDEN_POSITION][None], np.float32)


def _choices(head: RouterHead, logits: np.ndarray, bound: np.ndarray) -> dict[str, Any]:
    """Agent and role: the largest logit of each part, and whether rounding could make the second one larger."""
    names, n = head.outputs, head.agents
    return {
        "agent": _choice(names[:n], logits[:n], bound[:n]),
        "role": _choice(names[n:], logits[n:], bound[n:]),
    }


def _choice(names: Sequence[str], logits: np.ndarray, bound: np.ndarray) -> dict[str, Any]:
    """`index` of the largest logit, the first of several; `decided` when no other comes within both bounds."""
    best = int(np.argmax(logits))
    found = {"index": best, "name": names[best], "runner_up": None, "margin": None, "bound": None, "decided": True}
    wide = logits.astype(np.float64)
    slack = wide[best] - wide - bound[best] - bound
    slack[best] = np.inf
    if len(names) == 1:
        return found
    closest = int(np.argmin(slack))
    return found | {
        "runner_up": names[closest],
        "margin": float(wide[best] - wide[closest]),
        "bound": float(bound[best] + bound[closest]),
        "decided": bool(slack[closest] > 0),
    }


def _sentence(who: str, choices: dict[str, Any]) -> str:
    open_ones = [_undecided(part, choices[part]) for part in choices if not choices[part]["decided"]]
    chosen = f"{who} routes to {choices['agent']['name']} as {choices['role']['name']}"
    return "; ".join([chosen, *open_ones]) + "."


def _undecided(part: str, choice: dict[str, Any]) -> str:
    return (
        f"the {part} is undecided by rounding: {choice['runner_up']} is {choice['margin']:.3g} behind, rounding may "
        f"make {choice['bound']:.3g}"
    )


def _wrong(who: str, judged: SideVerdict) -> str:
    hint = f" ({judged.hint})" if judged.hint else ""
    return f"{str(judged.verdict).capitalize()} at {LOGITS.name}: {who}, {judged.ratio:.3g} times the bound{hint}."


# -- both sides ---------------------------------------------------------------------------------------------------


def route_both(command: RouteCommand, progress: Progress) -> dict[str, Any]:
    """Route on each backend in a process of its own and compare: a is the first, b the second."""
    if command.out is not None:
        raise UsageError("--out is for one side alone: use --backend torch or --backend jax")
    with ExitStack() as stack:
        given = _given(command, stack)
        folder = stack.enter_context(scratch_folder("route"))
        tokens = ",".join(map(str, given.tokens))
        one = replace(command, tokens=tokens, tokens_file=None, prompt=None)
        files = {name: folder / f"{name}.safetensors" for name in SIDES}
        runs = run_sides({name: replace(one, backend=name, out=file) for name, file in files.items()}, progress)
        sides = [_Side(name, run, *_recorded(files[name])) for name, run in zip(SIDES, runs, strict=True)]
        return {"schema": SCHEMA, **given.document(command), **compare(sides[0], sides[1], given, command.dtype)}


@dataclass(frozen=True)
class _Side:
    """One side's run and what it recorded: hidden state and logits, `[1, ...]` float32."""

    name: str
    run: dict[str, Any]
    hidden: np.ndarray
    logits: np.ndarray


def _recorded(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with TensorFile(file) as tensors:
        return tensors.read("router_hidden"), tensors.read(LOGITS.name)


def compare(a: _Side, b: _Side, given: _Given, dtype: str) -> dict[str, Any]:
    """Whether two sides route alike: the head's product by its bound on each side, logits within the noise of both.

    The noise of a logit is what the two products may err, and what rounding in the layers before may move the hidden
    state along that logit's row: calibrated, not rigorous.
    """
    config = given.checkpoint.config
    activations = stored_dtype(config.dtype if dtype == "model" else dtype)
    drift = HIDDEN_LAMBDA * hidden_noise(a.hidden, config, activations)
    bounds = [_oracle(side, given).bound[0] for side in (a, b)]
    bound = bounds[0] + bounds[1] + drift * np.linalg.norm(given.head.weight.astype(np.float64), axis=1)
    difference = np.abs(a.logits[0].astype(np.float64) - b.logits[0])
    choices = [_choices(given.head, side.logits[0], bound) for side in (a, b)]
    hidden = Difference(0)
    hidden.add(a.hidden, b.hidden)
    rows = [
        {"output": name, "a": float(x), "b": float(y), "difference": float(d), "bound": float(limit)}
        for name, x, y, d, limit in zip(given.head.outputs, a.logits[0], b.logits[0], difference, bound, strict=True)
    ]
    return {
        **_verdict(a, b, choices, rows),
        **{part: _pair(choices[0][part], choices[1][part]) for part in choices[0]},
        "rows": rows,
        "hidden": {**hidden.result(), "noise": drift},
        "a": {"source": f"{a.name} route", "facts": a.run["facts"], "run": a.run},
        "b": {"source": f"{b.name} route", "facts": b.run["facts"], "run": b.run},
    }


def hidden_noise(hidden: np.ndarray, config: ModelConfig, dtype: np.dtype) -> float:
    """RMS error that rounding alone leaves in an element of a hidden state, `[1, hidden]`, computed in `dtype`.

    Two additions per layer to the residual stream, the embedding and the final norm, each with one rounding to `dtype`
    and the random walk of a float32 sum over the longest product: independent, of the hidden state's own size.
    """
    each = rounding_unit(dtype) + U32 * np.sqrt(max(config.hidden_size, config.intermediate_size))
    size = np.sqrt(np.mean(np.square(hidden.astype(np.float64))))
    return float(each * np.sqrt(2 * config.num_hidden_layers + 2) * size)


def _oracle(side: _Side, given: _Given) -> Oracle:
    return consult(LOGITS, (side.hidden, given.head.weight), {})


def _pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {"a": a, "b": b, "agrees": a["index"] == b["index"], "decided": a["decided"] and b["decided"]}


def _verdict(a: _Side, b: _Side, choices: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, str]:
    """Outcome and sentence: a wrong product first, then logits beyond the noise, then the choices themselves."""
    for side in (a, b):
        if side.run["outcome"] != "agree":
            return {"outcome": "diverged", "verdict": side.run["verdict"]}
    beyond = max(rows, key=lambda row: row["difference"] / row["bound"])
    if not beyond["difference"] <= beyond["bound"]:
        return {
            "outcome": "diverged",
            "verdict": f"The hidden states differ beyond rounding: the logits of {beyond['output']} by "
            f"{beyond['difference']:.3g}, rounding may make {beyond['bound']:.3g}; 'svf forward --backend both' finds "
            "the stage.",
        }
    apart = [part for part in choices[0] if choices[0][part]["index"] != choices[1][part]["index"]]
    if not apart:
        return {"outcome": "agree", "verdict": _sentence("Each side", choices[0])}
    both = f"{_sentence(a.name, choices[0])} {_sentence(b.name, choices[1])}"
    return {"outcome": "diverged", "verdict": f"The sides choose another {' and '.join(apart)}. {both}"}
