"""One recorded forward, opened as it is judged alone: by itself, or with what its options tell of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from stages.errors import InputError, UsageError
from stages.files.kinds import Recording, recording_at
from stages.files.source import open_model
from stages.files.tokens import token_ids
from stages.judge.adapted_right import right_weights
from stages.judge.foreign import open_foreign
from stages.judge.forward_pair import NEEDS, Named
from stages.judge.recorded_run import ForwardRun, open_run
from stages.oracle.bounds import LAMBDA
from stages.progress import Progress
from stages.run.production import with_stored_head


def open_forward(
    path: Path, named: Named, adapted: Path | None, layout: str, stack: ExitStack, progress: Progress
) -> ForwardRun:
    """One recorded forward: a dump of ours, or another program's, which `named` tells the model and tokens of.

    `adapted` and `layout`: what another program's weights were adapted with. `UsageError` for what does not apply.
    """
    if layout != "declared" and adapted is None:
        raise UsageError(f"--layout {layout} needs --adapted COMPONENTS")
    if recording_at(path) is Recording.FORWARD:
        if adapted is not None:
            raise UsageError(f"--adapted applies to another program's dump; {path} keeps the weights that it ran on")
        run = open_run(path, named.model, stack)
        if named.ids and run.checkpoint is None:
            raise UsageError(f"{path}: this dump names its tokens; leave --tokens, --tokens-file and --prompt out")
        if named.ids and run.checkpoint is not None and token_ids(named, run.checkpoint).tolist() != run.tokens:
            raise InputError(
                f"{path}: ran {len(run.tokens)} tokens, which are not those of --tokens; leave the option out"
            )
        return run
    if named.model is None or not named.ids:
        raise UsageError(f"{path}: {NEEDS}")
    checkpoint = stack.enter_context(open_model(named.model))
    checkpoint.check()
    tokens = token_ids(named, checkpoint).tolist()
    if adapted is None:
        return open_foreign(path, checkpoint.config, checkpoint, tokens, stack)
    weights, found = right_weights(adapted, layout, checkpoint, LAMBDA, stack, progress)
    run = open_foreign(path, with_stored_head(checkpoint.config, weights), weights, tokens, stack)
    run.doubts = (weights.doubt(rigorous=False), weights.doubt(rigorous=True))
    layouts = ", ".join(dict.fromkeys(found.layouts.values()))
    run.side.facts["adapted"] = "; ".join(
        (f"{len(found.layouts)} weights by {adapted}, layout {layouts}", *found.notes)
    )
    return run
