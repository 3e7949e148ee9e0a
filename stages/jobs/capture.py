"""What `svf capture` does: an engine's own model runs in a process of its own, and what hooks see of it is dumped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from stages.errors import NotFoundError, UsageError
from stages.files.folders import check_folder
from stages.files.source import ModelSource, open_model
from stages.files.tokens import check_tokens, parse_tokens, token_ids
from stages.jobs.forward_one import production_bytes
from stages.progress import Progress
from stages.run.budget import check_memory
from stages.run.captured import Record
from stages.run.children import document_of, run_child
from stages.spec.backend import check_device

# Config, its file, weights, their source, and the rows of token ids; then how to run -> the record, the tokens made.
Engine = Callable[..., tuple[Record, list[list[int]]]]
_ONNX, _RUN_ONNX = ".onnx", ("onnxruntime", "openvino")


@dataclass(frozen=True)
class CaptureCommand:
    """What `svf capture` was asked; fields as in its `--help`."""

    job: ClassVar[str] = "capture"

    model: str
    out: Path
    engine: str
    checkpoint: str | None = None  # of what MODEL was made, where it is an ONNX file
    tokens: str | None = None
    tokens_file: Path | None = None
    prompt: str | None = None
    beside: tuple[str, ...] = ()
    attention: str | None = None  # None: the engine's default, of the KV cache too
    kv_cache: str | None = None
    compiled: bool = False
    generate: int = 0
    deep: bool = False
    dtype: str = "model"
    device: str = "cpu"
    max_memory: int | None = None
    timeout: float | None = None


def capture(command: CaptureCommand, progress: Progress) -> dict[str, Any]:
    """Capture as asked, in a process of its own; the `svf.capture/1` document."""
    check_device(command.device)
    check_folder(command.out)
    with open_model(_checkpoint(command)) as checkpoint:
        rows = rows_of(command, checkpoint)
        needed = production_bytes(checkpoint.config, command.dtype)
        check_memory(needed, command.max_memory, "try a smaller model, or --dtype bfloat16")
    asked = [",".join(map(str, row)) for row in rows]
    request = replace(command, tokens=asked[0], tokens_file=None, prompt=None, beside=tuple(asked[1:]), timeout=None)
    progress.say(f"capturing {command.engine}")
    child = run_child(request, timeout=command.timeout, progress=progress)
    document: dict[str, Any] = document_of(command.engine, child)
    return document


def _checkpoint(command: CaptureCommand) -> str:
    """Where config and weights are: of an ONNX file in the folder that was named, or its own; else in MODEL itself."""
    if command.model.endswith(_ONNX):
        if command.engine not in _RUN_ONNX:
            raise UsageError(f"{command.model} is an ONNX file: try --engine {' or '.join(_RUN_ONNX)}")
        if not Path(command.model).is_file():
            raise NotFoundError(f"{command.model} is not there")
        return command.checkpoint or str(Path(command.model).parent)
    if command.checkpoint is not None:
        raise UsageError(f"--model says what an ONNX file was made of, and {command.model} is none")
    return command.model


def rows_of(command: CaptureCommand, checkpoint: ModelSource) -> list[list[int]]:
    """The token ids of each sequence of the batch; `UsageError` for ids or lengths that the model has not."""
    checkpoint.check()
    config = checkpoint.config
    others = [check_tokens(parse_tokens(text, "--beside"), config.vocab_size) for text in command.beside]
    rows = [ids.tolist() for ids in (token_ids(command, checkpoint), *others)]
    config.check_length(max(map(len, rows)) + command.generate)
    return rows


def captured(command: CaptureCommand, engine: Engine) -> dict[str, Any]:
    """Run an engine here and write what was captured; the `svf.capture/1` document."""
    with ExitStack() as stack:
        source = _checkpoint(command)
        checkpoint = stack.enter_context(open_model(source))
        rows = rows_of(command, checkpoint)
        file = command.model if source != command.model else None
        chosen = {"attention": command.attention, "cache": command.kv_cache, "file": file}
        record, generated = engine(
            checkpoint.config,
            checkpoint.raw_config,
            checkpoint,
            source,
            rows,
            **{name: value for name, value in chosen.items() if value is not None},
            compiled=command.compiled,
            generate=command.generate,
            dtype=command.dtype,
            device=command.device,
            deep=command.deep,
        )
    return {
        "schema": "svf.capture/1",
        "engine": command.engine,
        "model": command.model,
        "tokens": rows,
        "generated": generated,
        "facts": record.facts,
        "sequences": _told(record, record.write(command.out)),
        "out": str(command.out),
    }


def _told(record: Record, folders: Sequence[Path]) -> list[dict[str, Any]]:
    return [
        {
            "out": str(folder),
            "tokens": len(sequence.tokens),
            "tensors": len(sequence.arrays),
            "about": dict(sequence.about),
        }
        for folder, sequence in zip(folders, record.sequences(), strict=True)
    ]
