"""Is it rounding, or a bug? The judge of `svf` as a library: arrays in, a verdict out; imports no framework.

    import svf

    svf.judge("attn_softmax", y, scores)                        # one output against float64 and a rounding-error bound
    svf.assert_rounding_only("attn_norm", torch_fn, jax_fn, x, weight, eps=1e-6)            # for pytest
    svf.diff("dumps/torch", "dumps/jax")                        # what `svf diff` prints, as an object
    svf.audit("recorded.safetensors", model="MODEL", tokens=[1, 2, 3])
    with svf.capture(model) as recorded:                        # a model of transformers, or of flax.nnx
        model(ids)
    recorded.audit()

Arrays are numpy's, torch's, JAX's, or anything that speaks DLPack. A stage must be one that is declared
(docs/stages.md): a function that nobody declared has no bound, and gets an error instead of an invented tolerance.
"""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from stages.oracle.verdict import Oracle
    from stages.run.captured import Record
    from stages.spec.stage import Stage

__all__ = ["Captured", "Judgement", "Result", "assert_rounding_only", "audit", "capture", "diff", "judge", "stages"]


@dataclass(frozen=True)
class Judgement:
    """What is said of one output.

    `verdict` is `exact`, `rounding`, `suspect`, `precision`, `bug`, `nonfinite` or `shape`; `ratio` is the largest
    error over its bound; `index`, `expected` (correctly rounded) and `got` are of the element where it is, None where
    every element is correctly rounded; `hint` says why, where the error's shape tells.
    """

    stage: str
    verdict: str
    ratio: float
    index: tuple[int, ...] | None
    expected: float | None
    got: float | None
    hint: str | None

    def __bool__(self) -> bool:
        """Whether nothing but rounding separates the output from float64."""
        return self.verdict in ("exact", "rounding")

    def __str__(self) -> str:
        where = "" if self.index is None else f" at {list(self.index)}: expected {self.expected!r}, got {self.got!r}"
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.stage}: {self.verdict}, {self.ratio:.3g} times the bound{where}{hint}"


class Result:
    """A document of `svf diff` or `svf audit`: `outcome`, `culprit`, `rows`, and everything else by its field."""

    def __init__(self, document: Mapping[str, Any]):
        self.document = dict(document)

    @property
    def outcome(self) -> str:
        """`agree`, `diverged` or `incomplete` of a diff; `sound`, `faulty` or `incomplete` of an audit."""
        return str(self.document["outcome"])

    @property
    def verdict(self) -> str:
        """The outcome as a sentence."""
        return str(self.document["verdict"])

    @property
    def culprit(self) -> Mapping[str, Any] | None:
        """The first stage that is wrong by itself: side, layer, tensor, stage, verdict, ratio, hint; or None."""
        return self.document["culprit"]

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """One row a stage, in execution order."""
        return self.document["rows"]

    def __bool__(self) -> bool:
        """Whether everything asked for was compared, and nothing but rounding was found."""
        return self.outcome in ("agree", "sound")

    def __repr__(self) -> str:
        return f"<{self.outcome}: {self.verdict}>"

    def _repr_html_(self) -> str:
        """As a notebook shows it: the sentence, and the rows that need a look."""
        look = [row for row in self.rows if row["verdict"] not in ("exact", "rounding")][:20]
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(row.get(name) or ''))}</td>" for name in _COLUMNS) + "</tr>"
            for row in look
        )
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        table = f"<table><tr>{head}</tr>{cells}</table>" if look else ""
        return f"<p><b>{html.escape(self.outcome)}</b> {html.escape(self.verdict)}</p>{table}"


_COLUMNS = ("key", "verdict", "verdict_a", "verdict_b", "hint", "note")


def stages() -> dict[str, str]:
    """Every stage that can be judged: name -> its inputs and parameters, its options, and what it is."""
    found = {}
    for stage in _declared().values():
        given = ", ".join((*stage.inputs, *stage.params))
        found[stage.name] = f"({given}; {', '.join(stage.options)}) {stage.doc}"
    return found


def judge(stage: str, output: Any, *arguments: Any, **options: Any) -> Judgement:
    """Whether `output` is what `stage` gives of `arguments` (inputs, then parameters, as declared), up to rounding.

    The shapes are the declaration's, and so are the options, such as `eps`; the dtype is the output's: float32,
    bfloat16 or float16. `TypeError` for another number of arguments or other options, `ValueError` for a stage that
    is not declared, a dtype that has no bound, or operands that do not fit each other.
    """
    declared = _stage(stage, arguments, options)
    observed, operands = _numpy(output), tuple(_numpy(a) for a in arguments)
    return _judged(_oracle(declared, observed.dtype, operands, options), observed)


def assert_rounding_only(
    stage: str, one: Callable[..., Any], other: Callable[..., Any], *arguments: Any, **options: Any
) -> None:
    """Call two implementations of `stage` on the same operands, and judge each; `AssertionError` if one is wrong.

    `one` and `other` take `arguments` as given here, numpy arrays, and `options` by name, and return an array. Each is
    judged against float64, so the message says which of them is wrong: stage, index, expected, got, hint.
    """
    declared = _stage(stage, arguments, options)
    operands = tuple(_numpy(a) for a in arguments)
    wrong = []
    for function in (one, other):
        observed = _numpy(function(*operands, **options))
        found = _judged(_oracle(declared, observed.dtype, operands, options), observed)
        if not found:
            wrong.append(f"{getattr(function, '__qualname__', repr(function))}: {found}")
    if wrong:
        raise AssertionError("\n".join(wrong))


def diff(
    a: str | Path,
    b: str | Path,
    *,
    model: str | Path | None = None,
    tokens: Sequence[int] | None = None,
    top: int | None = None,
    accept: str | None = None,
) -> Result:
    """`svf diff A B`: two dumps, bundles, trees, checkpoints or reports; errors as the command's.

    `accept="usual"` lets fewer bits pass where a popular library computes so by itself.
    """
    from stages.judge.diff import DiffCommand, diff_any
    from stages.judge.document import Gates
    from stages.judge.forward_pair import Named

    named = Named(None if model is None else str(model), _text(tokens))
    gates = Gates(accept=accept)
    return Result(diff_any(DiffCommand(Path(a), Path(b), named=named, top=top, gates=gates), _silent))


def audit(
    path: str | Path,
    *,
    model: str | Path | None = None,
    tokens: Sequence[int] | None = None,
    top: int = 5,
    accept: str | None = None,
    activations: str | None = None,
    natives: bool = False,
) -> Result:
    """`svf audit PATH`: one recorded run against float64, each stage from its own recorded inputs.

    `accept` is `diff`'s. `activations`: what kernels take the inputs of products to, as of `--activations`. With
    `natives`, PyTorch's and JAX's own functions are asked for the last bits, in processes of their own.
    """
    from stages.judge.audit import audit as judged

    named = None if model is None else str(model)
    words = _text(tokens)
    how: dict[str, Any] = {"accepted": accept, "activations": activations, "natives": natives}
    return Result(judged(Path(path), model=named, tokens=words, top=top, **how))


class Captured:
    """What a model computed while it was captured: to be written, or judged at once."""

    def __init__(self, record: Record):
        self._record = record

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of every sequence that was run, padding left out."""
        return [sequence.tokens for sequence in self._record.sequences()]

    @property
    def facts(self) -> dict[str, str]:
        """How the model was run: engine, versions, attention, compiled, cache, dtype of weights, autocast, device."""
        return dict(self._record.facts)

    def write(self, folder: str | Path) -> list[Path]:
        """Write a forward dump of each sequence: in the new `folder`, or of several in `0`, `1`, ... in it.

        A model that was made in memory is written beside each, so that it can be judged. `OutputError` for a folder
        that cannot be written, `InputError` where nothing was captured.
        """
        return self._record.write(Path(folder))

    def audit(self, sequence: int | None = None, *, top: int = 5, accept: str | None = None) -> Result:
        """`svf audit` of one sequence, by its number; without one, of the first that is not sound, or of the first."""
        with tempfile.TemporaryDirectory(prefix="svf-captured-") as scratch:
            folders = self.write(Path(scratch) / "dump")
            chosen = folders if sequence is None else [folders[sequence]]
            first: Result | None = None
            for folder in chosen:
                result = audit(folder, top=top, accept=accept)
                if not result:
                    return result
                first = first or result
            assert first is not None
            return first


@contextmanager
def capture(model: Any, *, source: str | Path | None = None, deep: bool = False) -> Iterator[Captured]:
    """Record what the modules of `model` compute, in every call of it in the block.

    `model` is one of `transformers`, compiled or not, or a module of `flax.nnx` whose modules have the same names.
    `source` is the checkpoint that its weights are of, by default where the model says that it came from. With `deep`,
    queries and keys after RoPE too. `TypeError` for a model of another kind, `InputError` where its config or names
    are not known, or where a call names no tokens or begins in the middle of a sequence.
    """
    from stages.commands.backends import ENGINES, attribute

    frameworks = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    engine = next((name for of, name in {"torch": "transformers", "flax": "nnx"}.items() if of in frameworks), None)
    if engine is None:
        raise TypeError(f"capture takes a model of transformers or flax.nnx, got {type(model).__name__}")
    named = None if source is None else str(source)
    with attribute(f"{ENGINES[engine]}:capture")(model, source=named, deep=deep) as record:
        yield Captured(record)


def _text(tokens: Sequence[int] | None) -> str | None:
    return None if tokens is None else ",".join(map(str, tokens))


def _silent(_label: str, _done: float) -> None:
    """No progress is shown."""


# -- one stage ----------------------------------------------------------------------------------------------------


def _declared() -> dict[str, Stage]:
    """Every stage by name, each in the fullest family that has it."""
    from stages.spec.forward import DECLARED
    from stages.spec.replay import REPLAY
    from stages.spec.router import ROUTER

    return {**DECLARED, **REPLAY, **ROUTER}


def _stage(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Stage:
    declared = _declared()
    if name not in declared:
        raise ValueError(f"{name!r} is no declared stage, so it has no bound; there are {', '.join(declared)}")
    stage = declared[name]
    names = (*stage.inputs, *stage.params)
    optional = sum(param.endswith(".bias") for param in stage.params)
    if not len(names) - optional <= len(arguments) <= len(names):
        raise TypeError(f"{name}: expected {len(names)} arrays ({', '.join(names)}), got {len(arguments)}")
    wanted = {option for option in stage.options if option not in ("dtype", "window")}  # a window is not needed
    if wanted != set(options) - {"window"} or not set(options) <= set(stage.options):
        raise TypeError(f"{name}: expected the options {', '.join(sorted(wanted)) or 'none'}, got {sorted(options)}")
    return stage


def _oracle(stage: Stage, dtype: np.dtype, operands: tuple[np.ndarray, ...], options: Mapping[str, Any]) -> Oracle:
    from stages.oracle.verdict import consult

    if dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{stage.name}: the output is {dtype.name}; bounds are for float32, bfloat16 and float16")
    given = {**options, **({"dtype": dtype.name} if "dtype" in stage.options else {})}
    typed = replace(stage, dtype=dtype.name, identity=False, absent=False)
    try:
        return consult(typed, operands, given)
    except (ValueError, IndexError) as error:
        shapes = ", ".join(str(list(a.shape)) for a in operands)
        raise ValueError(f"{stage.name}: operands of shapes {shapes} do not fit each other: {error}") from error


def _judged(oracle: Oracle, observed: np.ndarray) -> Judgement:
    import numpy as np

    from stages.judge.hints import Case, explain
    from stages.recipes.side import SideVerdict

    name, side = oracle.stage.name, SideVerdict()
    hint: str | None
    if observed.shape != oracle.value.shape:
        hint = f"expected {list(oracle.value.shape)} ({oracle.stage.shape}), got {list(observed.shape)}"
        return Judgement(name, "shape", float("inf"), None, None, None, hint)
    side.add(oracle, observed)
    if str(side.verdict) == "exact":
        return Judgement(name, "exact", side.ratio, None, None, None, side.hint)
    error = np.abs(observed.astype(np.float64) - oracle.value)
    worst = np.where(np.isfinite(error), error / np.maximum(oracle.bound, np.finfo(np.float64).tiny), np.inf)
    index = tuple(int(i) for i in np.unravel_index(int(worst.argmax()), worst.shape))
    hint = side.hint or (explain(Case(oracle, observed, asked=True)) if side.verdict.fails else None)
    expected, got = (float(a[index]) for a in (oracle.rounded, observed))
    return Judgement(name, str(side.verdict), side.ratio, index, expected, got, hint)


def _numpy(array: Any) -> np.ndarray:
    """Any framework's array as numpy's, bit for bit; bfloat16 as ml_dtypes has it."""
    import ml_dtypes
    import numpy as np

    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "detach"):  # torch: numpy has no bfloat16 of its own, so its bytes go as int16
        array = array.detach().cpu().contiguous()
        if str(array.dtype) == "torch.bfloat16":
            import sys

            return np.asarray(array.view(sys.modules["torch"].int16)).view(ml_dtypes.bfloat16)
    if not hasattr(array, "__array__") and hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    return np.asarray(array)
