"""Two recorded forwards as one comparison takes them: opened, one judged like the other, and of one model and run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stages.errors import InputError, UsageError
from stages.files.aprt import is_aprt_tree
from stages.files.dump import MANIFEST_FILE
from stages.files.forward_dump import ForwardSide
from stages.files.kinds import Recording, recording_at
from stages.files.source import open_model
from stages.files.tokens import token_ids
from stages.judge.foreign import open_foreign
from stages.judge.recorded_run import ForwardRun, open_run
from stages.judge.same_model import other_model

NEEDS = "is another program's, so it names neither model nor tokens; give --model and --tokens"


@dataclass(frozen=True)
class Named:
    """The model and the tokens of a forward, as the options of a command name them; all None: as recorded."""

    model: str | None = None
    tokens: str | None = None
    tokens_file: Path | None = None
    prompt: str | None = None

    @property
    def given(self) -> bool:
        """Whether anything is named."""
        return self.model is not None or self.ids

    @property
    def ids(self) -> bool:
        """Whether one of the options gives tokens."""
        return any(x is not None for x in (self.tokens, self.tokens_file, self.prompt))


def open_pair(path_a: Path, path_b: Path, named: Named, stack: ExitStack) -> tuple[ForwardRun, ForwardRun]:
    """Both sides. One that does not name its model and tokens has them from `named`, otherwise from the other side.

    An APRT tree of which neither is told stays flat; `UsageError` for another program's safetensors.
    """
    paths = (path_a, path_b)
    ours = {
        i: open_run(path, named.model, stack) for i, path in enumerate(paths) if recording_at(path) is Recording.FORWARD
    }
    known = next((run for run in ours.values() if run.checkpoint is not None), None)
    if len(ours) == 2 and named.ids:
        raise UsageError(
            "--tokens, --tokens-file and --prompt apply to another program's dump; both dumps here name their tokens"
        )
    others = {i: _other(path, named, known, stack) for i, path in enumerate(paths) if i not in ours}
    return ({**ours, **others}[0], {**ours, **others}[1])


def _other(path: Path, named: Named, known: ForwardRun | None, stack: ExitStack) -> ForwardRun:
    """The run at a path that does not name its own."""
    if path.is_dir() and not is_aprt_tree(path) and not (named.model is not None and named.ids):
        # A folder of safetensors may be ours, cut short: only who names model and tokens says that it is not.
        raise InputError(
            f"{path}: no {MANIFEST_FILE}: a dump of svf without it was not written to its end, run it again; another "
            "program's dump needs --model and --tokens"
        )
    if named.model is not None and (named.ids or known is not None):
        checkpoint = stack.enter_context(open_model(named.model))
        checkpoint.check()
        tokens = token_ids(named, checkpoint) if named.ids else None
        ids = tokens.tolist() if tokens is not None else known.tokens if known is not None else []
        return open_foreign(path, checkpoint.config, checkpoint, ids, stack)
    if known is not None and known.config is not None and known.weights is not None:
        tokens = token_ids(named, known.checkpoint) if named.ids and known.checkpoint is not None else None
        ids = known.tokens if tokens is None else tokens.tolist()
        return open_foreign(path, known.config, known.weights, ids, stack)
    if is_aprt_tree(path) and named.model is None and not named.ids:
        return open_run(path, None, stack)
    raise UsageError(f"{path}: {NEEDS}")


def check_comparable(a: ForwardRun, b: ForwardRun) -> None:
    """`InputError` unless both ran the same model on the same tokens and positions, as far as they tell."""
    if a.path is None or b.path is None:
        return
    pair = f"not comparable: {a.side.label} and {b.side.label}"
    if a.tokens != b.tokens:
        raise InputError(
            f"{pair} ran different tokens ({len(a.tokens)} and {len(b.tokens)} of them); statistics over different "
            "samples cannot be compared"
        )
    if a.positions != b.positions:
        raise InputError(f"{pair} hold positions {a.positions} and {b.positions}")
    if not (isinstance(a.side, ForwardSide) and isinstance(b.side, ForwardSide)):
        return
    one, other = (side.dump.manifest["model"] for side in (a.side, b.side))
    what = other_model(one, other, a.checkpoint, b.checkpoint)
    if what is not None:
        raise InputError(f"{pair} ran different models: {what}")
