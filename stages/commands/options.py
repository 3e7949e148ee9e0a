"""Options that several commands have, each declared once: its choices, its help and its panel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.commands.backends import BACKENDS, ENGINES, PROBES


def _panel(title: str) -> Callable[..., Any]:
    """Options of a panel: `typer.Option` with its title."""
    return functools.partial(typer.Option, rich_help_panel=title)


# Panels of a command's help.
of_run = _panel("Model and tokens")
compute = _panel("What to compute")
comparing = _panel("What to compare")
gate = _panel("Gates")
output = _panel("Output")
limit = _panel("Limits")
original = _panel("As the original tool has it")

BackendName = StrEnum("BackendName", [*BACKENDS, "both"])  # type: ignore[misc]
ON_BOTH = BackendName("both")
OneBackend = StrEnum("OneBackend", [*BACKENDS])  # type: ignore[misc]
ON_TORCH = OneBackend("torch")
CalibrateName = StrEnum("CalibrateName", [*PROBES, "both"])  # type: ignore[misc]
CALIBRATE_BOTH = CalibrateName("both")
EngineName = StrEnum("EngineName", [*ENGINES])  # type: ignore[misc]
ON_TRANSFORMERS = EngineName("transformers")
Attention = StrEnum("Attention", ["eager", "sdpa", "flex_attention", "flash_attention_2", "flash"])
CacheKind = StrEnum("CacheKind", ["dynamic", "static", "none", "float16", "float32"])
# As CHOICES of stages/judge/activations.py, which loads numpy.
TakenTo = StrEnum("TakenTo", "float32 float16 bfloat16 q8_0 q8_1 q8_k q8_1_ds4 q8_1_d4 ggml ggml_mmq ggml_mmvq")
OneLayout = StrEnum("OneLayout", ["declared", "torch_v", "nx", "vh"])
LayoutName = StrEnum("LayoutName", ["declared", "torch_v", "nx", "vh", "all"])
DumpMode = StrEnum("DumpMode", ["full", "hash", "none"])
Preset = StrEnum(
    "Preset",
    {"tiny": "tiny", "llama": "llama", "mistral": "mistral", "qwen3_06b": "qwen3-0.6b", "qwen25_05b": "qwen2.5-0.5b"},
)
Dtype = StrEnum("Dtype", ["bfloat16", "float32", "float16"])
Positions = StrEnum("Positions", ["all", "last"])
RunDtype = StrEnum("RunDtype", ["model", "float32", "bfloat16", "float16"])
Format = StrEnum("Format", ["safetensors", "aprt"])
Precision = StrEnum("Precision", ["native", "reference", "exact"])
Tied = StrEnum("Tied", ["untie", "last"])
Jit = StrEnum("Jit", ["stage", "layer", "none"])
ComponentsFrom = StrEnum("ComponentsFrom", ["given", "native"])
SvdMethod = StrEnum("SvdMethod", ["float64", "torch"])
ModelDtype = StrEnum("ModelDtype", ["auto", "float32", "bfloat16"])
Accept = StrEnum("Accept", ["usual"])
VectorDtype = StrEnum("VectorDtype", ["float32", "float64"])

Html = Annotated[
    Path | None,
    output("--html", help=r"Write a self-contained HTML report here; needs svf\[report]."),
]
Force = Annotated[bool, output("--force", help="Replace the file if it exists.")]
Json = Annotated[bool, output("--json", help="Print one JSON document and nothing else on stdout.")]
Backend = Annotated[BackendName, compute(help="Which backend computes.")]
Device = Annotated[str, compute(help="cpu, or a GPU: cuda, gpu, gpu:1.")]
InPrecision = Annotated[
    Precision,
    compute(
        help="native: the framework's kernels; reference: float64, rounded after each stage; exact: correctly rounded.",
    ),
]
ComputeDtype = Annotated[RunDtype, compute(help="Dtype in which activations and weights are computed.")]
Tokens = Annotated[str | None, of_run(help="Token ids, such as 1,2,3.")]
TokensFile = Annotated[Path | None, of_run(help="File of token ids, as text or a JSON list.")]
Prompt = Annotated[str | None, of_run(help="Text; the checkpoint's own tokenizer makes the tokens.")]
Adapted = Annotated[Path | None, of_run(help="Component bundle whose weights replace the model's.")]
AdaptedLayout = Annotated[OneLayout, of_run(help="How to contract V of --adapted.")]
SelectedLayers = Annotated[
    str | None, compute(help="Layers from which the selection rule takes tensors, such as 26 or 0,3-5.")
]
JudgedLayers = Annotated[str | None, comparing(help="Judge only these layers: 0,3-5.")]
JudgedStages = Annotated[str | None, comparing(help="Judge only these stages: ffn_gate,ffn_swigl.")]
Operands = Annotated[Path | None, comparing(help="Bundle with U, S and V; judging products needs them.")]
Rerun = Annotated[
    bool,
    comparing(
        "--rerun/--no-rerun",
        help="Run suspect stages again, on the backend that wrote the dump.",
    ),
]
Natives = Annotated[
    bool,
    comparing(
        "--natives",
        help="Ask PyTorch, JAX and orders of summation for the last bits, a process each; hidden stages too.",
    ),
]
Plan = Annotated[
    bool,
    compute(
        "--plan",
        help="Record nothing: say what --stages (names, or hooks, engine, seed, hidden, logits) of --model would show.",
    ),
]
Accepted = Annotated[
    Accept | None,
    gate("--accept", help="usual: let fewer bits pass where a popular library computes so by itself."),
]
Activations = Annotated[
    TakenTo | None,
    of_run(
        help="What kernels take the inputs of products to; ggml: as it does on a CPU, by the types of a GGUF file's "
        "weights, ggml_mmq and ggml_mmvq: on CUDA, of many tokens and of up to eight. Where it is not given, the "
        "verdict says what they did."
    ),
]
StrictStages = Annotated[
    bool,
    gate(
        "--strict-stage-tolerances",
        help="Fail unless every required stage is within its tolerance.",
    ),
]
StrictCurrent = Annotated[
    bool,
    gate(
        "--strict-current-python",
        help="Fail unless a final bf16 hash equals the reference side's current one.",
    ),
]
StrictReference = Annotated[
    bool,
    gate("--strict-reference", help="Fail unless both sides reproduce the historical hash."),
]
Timeout = Annotated[
    float | None,
    limit(min=0.1, help="Seconds after which a side of --backend both is stopped."),
]
MaxMemory = Annotated[
    str | None,
    limit(help="Memory that each side may use, such as 2G; a run that needs more ends with exit code 7."),
]
BeginAgain = Annotated[bool, limit("--resume", help="Start again a run that was killed in --out.")]
Resume = Annotated[bool, limit("--resume", help="Finish the run that was cut short in --out.")]
