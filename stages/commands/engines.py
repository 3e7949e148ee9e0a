"""What runs another engine's model and records it: capture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.commands.options import (
    ON_TRANSFORMERS,
    Attention,
    CacheKind,
    ComputeDtype,
    Device,
    EngineName,
    Json,
    MaxMemory,
    Prompt,
    RunDtype,
    Tokens,
    TokensFile,
    compute,
    limit,
    of_run,
    output,
)
from stages.commands.program import STATE, answer, command


@command(
    "Compare",
    "svf capture MODEL --tokens 1,2,3 --out captured",
    "svf capture MODEL --engine transformers --attention sdpa --compile --generate 8 --out captured",
    "svf capture MODEL --tokens 1,2,3,4,5 --beside 6,7 --kv-cache static --generate 4 --deep --out captured",
    "svf capture MODEL --engine nnx --out captured",
    "svf capture model.gguf --engine llama.cpp --tokens 1,2,3 --generate 4 --out captured",
    "svf capture model.onnx --engine onnxruntime --model CHECKPOINT --deep --out captured",
)
def capture(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, ONNX file or hub id.")],
    out: Annotated[
        Path, output(help="New folder for the dump; of several sequences, each in a folder in it: 0, 1, ...")
    ],
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    prompt: Prompt = None,
    beside: Annotated[
        list[str] | None,
        of_run(help="Token ids of one more sequence in the batch; shorter ones are padded on the left."),
    ] = None,
    engine: Annotated[
        EngineName, compute(help="Whose model runs: transformers', ours in flax.nnx, llama.cpp's, or an ONNX file.")
    ] = (ON_TRANSFORMERS),
    checkpoint: Annotated[
        str | None,
        of_run("--model", help="Checkpoint that an ONNX file was made of; the file's folder if not given."),
    ] = None,
    attention: Annotated[
        Attention | None,
        compute(help="How transformers computes attention, sdpa if not given; llama.cpp: eager, flash."),
    ] = None,
    kv_cache: Annotated[
        CacheKind | None,
        compute(
            help="What a decode keeps keys and values in; dynamic if not given. none: every call runs all tokens. "
            "llama.cpp: float16 if not given, float32."
        ),
    ] = None,
    compile: Annotated[
        bool, compute("--compile", help="Compile: torch.compile, jax.jit; ONNX Runtime: all optimisations.")
    ] = False,
    generate: Annotated[int, compute(min=0, help="Greedy tokens to generate, and capture too.")] = 0,
    deep: Annotated[
        bool,
        compute(
            "--deep", help="Also what no module gives: of transformers queries and keys after RoPE, of ONNX all stages."
        ),
    ] = False,
    dtype: ComputeDtype = RunDtype.model,
    device: Device = "cpu",
    timeout: Annotated[float | None, limit(min=0.1, help="Seconds after which the engine is stopped.")] = None,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Run an engine's own model and record what its modules compute.

    Nothing of the model is changed: hooks on its modules copy what they see. svf audit judges the dump.
    """
    from stages.jobs import capture as job
    from stages.progress import Progress
    from stages.run.budget import parse_size
    from stages.show import files as render_files

    asked = job.CaptureCommand(
        model=model,
        out=out,
        engine=engine.value,
        checkpoint=checkpoint,
        tokens=tokens,
        tokens_file=tokens_file,
        prompt=prompt,
        beside=tuple(beside or ()),
        attention=attention.value if attention else None,
        kv_cache=kv_cache.value if kv_cache else None,
        compiled=compile,
        generate=generate,
        deep=deep,
        dtype=dtype.value,
        device=device,
        max_memory=None if max_memory is None else parse_size(max_memory),
        timeout=timeout,
    )
    with Progress(STATE.progress) as progress:
        document = job.capture(asked, progress)
    answer(document, json, render_files.capture_document)
