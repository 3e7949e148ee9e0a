"""Two sides, or one against float64: demo, replay, forward, diff, audit, layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.commands.backends import load_backend
from stages.commands.options import (
    ON_BOTH,
    Accepted,
    Activations,
    Adapted,
    AdaptedLayout,
    Backend,
    ComponentsFrom,
    ComputeDtype,
    Device,
    DumpMode,
    Force,
    Format,
    Html,
    InPrecision,
    Jit,
    Json,
    JudgedLayers,
    JudgedStages,
    LayoutName,
    MaxMemory,
    Natives,
    OneLayout,
    Operands,
    Plan,
    Positions,
    Precision,
    Prompt,
    Rerun,
    Resume,
    RunDtype,
    StrictCurrent,
    StrictReference,
    StrictStages,
    Timeout,
    Tokens,
    TokensFile,
    comparing,
    compute,
    gate,
    of_run,
    original,
    output,
)
from stages.commands.program import (
    STATE,
    after,
    answer,
    before,
    command,
    finish_diff,
    judging,
    refuse_idle,
    say,
    typed,
)


@command(
    "Compare",
    "svf demo",
    "svf demo --json",
)
def demo(json: Json = False) -> None:
    """Run the whole chain on a tiny model: replay twice and compare.

    Decomposes a random tiny model, replays it in PyTorch and in JAX, and compares the two stage by stage.
    """
    from stages.files.cache import cache_folder
    from stages.jobs import demo as chain
    from stages.progress import Progress
    from stages.show.html.page import HOW_TO_GET, missing_libraries

    with Progress(STATE.progress) as progress:
        document = chain.run(progress)
    if not json:
        chain.explain(document, HOW_TO_GET if missing_libraries() else None)
    finish_diff(document, json, None if missing_libraries() else cache_folder() / "demo.html")


@command(
    "Compare",
    "svf replay --backend jax --layout torch_v",
    "svf replay components --backend both --layout all",
    "svf replay components --backend jax --reference-report ref.json --strict-stage-tolerances",
    "svf replay components --components native",
)
def replay(
    components: Annotated[
        Path | None, typer.Argument(help="Component bundle; without it, a built-in tiny one.")
    ] = None,
    backend: Backend = ON_BOTH,
    components_from: Annotated[
        ComponentsFrom,
        compute(
            "--components",
            help="native: each backend decomposes the source itself, to tell a different basis from a bug.",
        ),
    ] = ComponentsFrom.given,
    layout: Annotated[LayoutName, compute(help="How to contract V; declared: as the bundle says.")] = (
        LayoutName.declared
    ),
    model: Annotated[
        str | None, compute(help="Model with the source weights, for a bundle without source_f32.")
    ] = None,
    reference_report: Annotated[
        Path | None,
        comparing(
            "--reference-report",
            "--python-report",
            help="Report of the reference side, for the gates.",
        ),
    ] = None,
    source_from_stage: Annotated[
        bool,
        compute(
            "--source-from-stage",
            "--source-from-python-stage",
            help="Take the source weights from the recorded source_f32.",
        ),
    ] = False,
    components_dir: Annotated[Path | None, original(help="The original tool's name for COMPONENTS.")] = None,
    semantic_only: Annotated[
        bool,
        original(
            "--semantic-only",
            help="Use the given U, S, V and decompose nothing; this is the default.",
        ),
    ] = False,
    device_semantic_only: Annotated[
        bool,
        original(
            "--device-semantic-only",
            help="Run XLA only: --backend jax, unless --backend names another.",
        ),
    ] = False,
    preferred_layout_only: Annotated[
        bool,
        original("--preferred-layout-only", help="Use only the declared layout; this is the default."),
    ] = False,
    all_selected_tensors: Annotated[
        bool,
        compute("--all-selected-tensors", help="Require the recorded stages of every selected tensor."),
    ] = False,
    select: Annotated[
        list[str] | None,
        compute(
            "--select",
            "--selected-source-filter",
            help="Replay only tensors whose name contains this.",
        ),
    ] = None,
    chunk_rows: Annotated[
        int | None, compute(min=1, help="Rows computed at a time; by default as memory allows.")
    ] = None,
    dump: Annotated[
        DumpMode | None, output(help="What the dump keeps: by default full with --out, otherwise none.")
    ] = None,
    out: Annotated[
        Path | None,
        output(help="New folder for the dump; a name FILE.json is used as --report."),
    ] = None,
    report: Annotated[Path | None, output(help="Write the report of the replaying side to this file.")] = None,
    stage_dir: Annotated[
        Path | None,
        output(
            help="New folder for stage files as the original tool writes them: one per tensor, keys stage.NAME.",
        ),
    ] = None,
    device: Device = "cpu",
    precision: InPrecision = Precision.native,
    order: Annotated[
        str,
        compute(
            help="Order of sums: native, torch, jax, inferred (from the bundle), a recorded run, a svf infer file.",
        ),
    ] = "native",
    top: Annotated[int, comparing(min=0, help="Largest differences kept per stage.")] = 5,
    strict_stage_tolerances: StrictStages = False,
    strict_current_python: StrictCurrent = False,
    strict_reference: StrictReference = False,
    timeout: Timeout = None,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Replay U, S, V and offsets, and judge every stage.

    Each stage is checked against its rounding-error bound and against the recorded stage.
    """
    from stages.commands.original_flags import ReplayFlags, as_original, report_place
    from stages.errors import UsageError
    from stages.jobs import replay as job
    from stages.jobs.replay_one import ReplayCommand
    from stages.judge.document import Gates
    from stages.progress import Progress
    from stages.run.budget import parse_size

    out, report = report_place(out, report, say)
    before(force, html, report)
    command = ReplayCommand(
        components=components,
        backend=backend.value,
        layout=layout.value,
        model=model,
        reference_report=reference_report,
        source_from_stage=source_from_stage,
        all_selected=all_selected_tensors,
        select=tuple(select or ()),
        chunk_rows=chunk_rows,
        dump=dump.value if dump else ("full" if out else "none"),
        out=out,
        report=report,
        device=device,
        top=top,
        gates=Gates(strict_stage_tolerances, strict_current_python, strict_reference),
        precision=precision.value,
        timeout=timeout,
        resume=resume,
        max_memory=None if max_memory is None else parse_size(max_memory),
        close_up=html is not None,
        native_components=components_from is ComponentsFrom.native,
        order=order,
        stage_dir=stage_dir,
    )
    refuse_idle(
        {
            "--resume needs --out DIR: it finishes what was cut short there": resume and out is None,
            "--dump none writes nothing to --out; leave one of them out": dump is DumpMode.none and out is not None,
            "--timeout applies to the two processes of --backend both": typed("--timeout") and backend is not ON_BOTH,
        }
    )
    if order != "native" and precision is not Precision.native:
        raise UsageError(f"--order {order} applies only to native products; leave out --precision {precision.value}")
    flags = ReplayFlags(components_dir, semantic_only, device_semantic_only, preferred_layout_only)
    if backend is ON_BOTH:  # the sides compute in processes of their own
        judging()
    with Progress(STATE.progress) as progress:
        document = job.replay(as_original(command, flags, say), load_backend, progress)
    finish_diff(document, json, html)


@command(
    "Compare",
    "svf forward --backend both",
    "svf forward MODEL --tokens 1,2,3 --backend jax --layers 0,3-5 --out dump",
    "svf forward MODEL --prompt 'Hello' --backend torch --generate 8",
    "svf forward MODEL --adapted components --layout vh --backend torch",
    "svf forward model.gguf --tokens 1,2,3",
)
def forward(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, GGUF or hub id; without it, a tiny one.")
    ] = None,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    prompt: Prompt = None,
    backend: Backend = ON_BOTH,
    layers: Annotated[str, compute(help="Layers to record: 0,3-5, or all.")] = "all",
    stages: Annotated[str, compute(help="Stages to record: ffn_gate,ffn_swigl, or all.")] = "all",
    positions: Annotated[Positions, compute(help="Positions to record.")] = Positions.all,
    dtype: ComputeDtype = RunDtype.model,
    adapted: Adapted = None,
    layout: AdaptedLayout = OneLayout.declared,
    repeat: Annotated[int, compute(min=1, help="Number of runs; all must give the same bytes.")] = 1,
    generate: Annotated[
        int, compute(min=0, help="Greedy tokens to generate and compare with the production model's.")
    ] = 0,
    production: Annotated[
        bool | None,
        comparing(
            "--production/--no-production",
            help="Compare with the production model; by default if it fits.",
        ),
    ] = None,
    out: Annotated[Path | None, output(help="New folder for the dump.")] = None,
    format: Annotated[Format, output(help="Format of the dump.")] = Format.safetensors,
    device: Device = "cpu",
    precision: InPrecision = Precision.native,
    order: Annotated[
        str | None,
        compute(
            help="Sum float32 in the order of torch, jax, a recorded dump, or a file that svf infer wrote.",
        ),
    ] = None,
    jit: Annotated[
        Jit,
        compute(help="How much XLA compiles at a time; layer and none show what fusion changes."),
    ] = (Jit.stage),
    top: Annotated[int | None, comparing(min=0, help="Largest differences kept per stage; default 5.")] = None,
    timeout: Timeout = None,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Run a checkpoint layer by layer and judge every stage.

    Every intermediate value has a name and is kept with --out. The logits are compared with the production model's.
    """
    from stages.errors import UsageError
    from stages.jobs import forward as job
    from stages.jobs.forward_one import ForwardCommand
    from stages.judge.production import sound
    from stages.progress import Progress
    from stages.run.budget import parse_size
    from stages.show import console as render

    refuse_idle(
        {
            f"--layout {layout.value} needs --adapted COMPONENTS": layout is not OneLayout.declared and not adapted,
            "--resume needs --out DIR: it finishes what was cut short there": resume and out is None,
            "--format aprt needs --out DIR": format is Format.aprt and out is None,
            "--format aprt writes a whole tree or nothing, so there is nothing to resume": format is Format.aprt
            and resume,
            "--timeout applies to the two processes of --backend both": typed("--timeout") and backend is not ON_BOTH,
            "--top applies to the differences that --backend both compares": top is not None and backend is not ON_BOTH,
        }
    )
    if jit is not Jit.stage and backend not in ("jax", "both"):
        raise UsageError(f"--jit {jit.value} applies to JAX; use --backend jax")
    if precision is not Precision.native and jit is Jit.layer:
        raise UsageError(f"--precision {precision.value} rounds after every stage, but --jit layer joins the stages")
    if order is not None and (precision is not Precision.native or jit is Jit.layer or production):
        raise UsageError("--order applies to single native stages; leave out --precision, --jit layer and --production")
    if precision is not Precision.native and production:
        raise UsageError(f"--production computes natively; --precision {precision.value} cannot be compared with it")
    before(force, html)
    command = ForwardCommand(
        model=model,
        tokens=tokens,
        tokens_file=tokens_file,
        prompt=prompt,
        backend=backend.value,
        layers=layers,
        stages=stages,
        positions=positions.value,
        dtype=dtype.value,
        adapted=adapted,
        layout=layout.value,
        repeat=repeat,
        out=out,
        format=format.value,
        device=device,
        precision=precision.value,
        order=order,
        jit=jit.value,
        production=production,
        generate=generate,
        top=5 if top is None else top,
        timeout=timeout,
        resume=resume,
        max_memory=None if max_memory is None else parse_size(max_memory),
        close_up=html is not None,
    )
    if backend is ON_BOTH:  # the sides compute in processes of their own
        judging()
    with Progress(STATE.progress) as progress:
        document = job.forward(command, load_backend, progress)
    if command.backend == "both":
        finish_diff(document, json, html)
    after(document, json, html, render.forward_document)
    raise typer.Exit(0 if sound(document) else 1)


@command(
    "Compare",
    "svf diff dumps/torch dumps/jax",
    "svf diff a/stages.safetensors b/stages.safetensors --components bundle",
    "svf diff reference.json replay.json --strict-stage-tolerances",
    "svf diff dumps",
    "svf diff model.gguf MODEL",
    "svf diff traces/torch recorded.safetensors --stages ffn_gate,ffn_out",
    "svf diff dumps/torch dumps/jax --explain-order",
    "svf diff dumps/torch dumps/jax --std-ratio 0.5:2",
)
def diff(
    a: Annotated[
        Path,
        typer.Argument(
            help="Reference side: dump, bundle, stage file, APRT, another program's file, checkpoint or report."
        ),
    ],
    b: Annotated[
        Path | None, typer.Argument(help="Other side; without it, the two dumps inside the first are compared.")
    ] = None,
    components: Operands = None,
    model: Annotated[
        str | None, of_run(help="Weights to judge forward dumps with; by default those that were recorded.")
    ] = None,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    prompt: Prompt = None,
    layers: JudgedLayers = None,
    stages: JudgedStages = None,
    precision: Annotated[
        Precision | None,
        comparing(help="Require dumps of this precision; exact: any difference is a bug."),
    ] = None,
    top: Annotated[
        int | None, comparing(min=0, help="Print this many of the largest differences of each stage.")
    ] = None,
    explain_order: Annotated[
        bool,
        comparing(
            "--explain-order",
            help="Say how much of the difference the order of summation explains; slow.",
        ),
    ] = False,
    strict_stage_tolerances: StrictStages = False,
    strict_current_python: StrictCurrent = False,
    strict_reference: StrictReference = False,
    std_ratio: Annotated[
        str | None,
        gate(
            help="Fail unless std of b / std of a is within LOW:HIGH in every stage, such as 0.5:2.",
        ),
    ] = None,
    accept: Accepted = None,
    rerun: Rerun = True,
    verdicts: Annotated[
        bool,
        comparing(
            "--verdicts/--no-verdicts",
            help="--no-verdicts: the metrics of two forwards alone, at the speed of reading; nothing is judged.",
        ),
    ] = True,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare two recorded runs, checkpoints or reports.

    Compares stage by stage, and says which side is wrong. Loads no framework.
    """
    from stages.judge.diff import DiffCommand, check_options, diff_any, with_sides
    from stages.judge.document import Gates, parse_std_ratio
    from stages.judge.forward_pair import Named
    from stages.order.explain import explain_recorded
    from stages.progress import Progress

    within = None if std_ratio is None else parse_std_ratio(std_ratio)
    before(force, html)
    command = with_sides(
        DiffCommand(
            a=a,
            b=b,
            components=components,
            named=Named(model, tokens, tokens_file, prompt),
            layers=layers,
            stages=stages,
            precision=precision.value if precision else None,
            top=top,
            gates=Gates(
                strict_stage_tolerances, strict_current_python, strict_reference, std_ratio=within, accept=accept
            ),
            explain_order=explain_order,
            rerun=rerun,
            verdicts=verdicts,
            html=html is not None,
        )
    )
    check_options(command)
    judging()
    with Progress(STATE.progress) as progress:
        document = diff_any(command, progress)
        if explain_order:
            document = explain_recorded(
                document, command.a, command.b or command.a, components=components, model=model, progress=progress
            )
    finish_diff(document, json, html, top=top is not None)


@command(
    "Compare",
    "svf audit dumps/torch",
    "svf audit recorded.safetensors --model MODEL --tokens 1,2,3",
    "svf audit tree --model MODEL --prompt Hello --stages ffn_gate,ffn_out",
    "svf audit bundle --json",
    "svf audit recorded.safetensors --model MODEL --tokens 1,2,3 --accept usual",
    "svf audit dumps/torch --natives",
    "svf audit --plan --model MODEL --stages attention,post_ffn_residual",
)
def audit(
    dump: Annotated[
        Path | None,
        typer.Argument(
            help="Dump, bundle or stage file; or what another program wrote: safetensors, folder, APRT tree."
        ),
    ] = None,
    model: Annotated[
        str | None, of_run(help="Weights; another program's dump needs this, since it does not name them.")
    ] = None,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    prompt: Prompt = None,
    adapted: Annotated[
        Path | None,
        of_run(help="Components, if the other program ran on weights adapted by them."),
    ] = None,
    layout: AdaptedLayout = OneLayout.declared,
    components: Operands = None,
    layers: JudgedLayers = None,
    stages: JudgedStages = None,
    top: Annotated[int, comparing(min=0, help="Largest errors kept per stage.")] = 5,
    accept: Accepted = None,
    activations: Activations = None,
    natives: Natives = False,
    plan: Plan = False,
    dtype: Annotated[RunDtype | None, compute(help="With --plan: what would run in; by default the model's.")] = None,
    rerun: Rerun = True,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Judge one recorded run, every stage against float64.

    Each stage is judged from the nearest that the run recorded. Loads no framework, but for --natives. With --plan, say
    what would be seen of a run before it is recorded.
    """
    from stages.errors import UsageError
    from stages.judge import audit as job
    from stages.progress import Progress
    from stages.show import console as render

    if plan:
        named = (model, tokens, tokens_file, prompt)
        others = {"DUMP": dump, "--adapted": adapted, "--components": components, "--html": html, "--accept": accept}
        _plan(named, stages, layers, dtype or RunDtype.model, [name for name, given in others.items() if given], json)
        return
    if dump is None:
        raise UsageError("name what was recorded: svf audit DUMP; or ask --plan what to record")
    if dtype is not None:
        raise UsageError("--dtype applies to --plan; a recording says itself what it was computed in")
    before(force, html)
    judging()
    with Progress(STATE.progress) as progress:
        document = job.audit(
            dump,
            model=model,
            tokens=tokens,
            tokens_file=tokens_file,
            prompt=prompt,
            components=components,
            adapted=adapted,
            layout=layout.value,
            layers=layers,
            stages=stages,
            top=top,
            rerun=rerun,
            accepted=accept,
            natives=natives,
            activations=activations and activations.value,
            progress=progress,
        )
    after(document, json, html, render.audit_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@command(
    "Compare",
    "svf logprobs trainer.jsonl rollout.jsonl --model MODEL",
    "svf logprobs trainer.jsonl rollout.jsonl --model MODEL --a-dtype float32 --b-dtype bfloat16",
    "svf logprobs rollout.jsonl --model MODEL --other-model checkpoints/step-90",
    "svf logprobs trainer.jsonl rollout.jsonl --model MODEL --json",
)
def logprobs(
    a: Annotated[
        Path, typer.Argument(help="JSON lines: prompt, completion and logprobs of a sequence each; the trainer's.")
    ],
    b: Annotated[
        Path | None, typer.Argument(help="The same of the other system, the rollout; without it, a is judged alone.")
    ] = None,
    model: Annotated[str | None, of_run(help="The weights whose logprobs they should be.")] = None,
    other_model: Annotated[
        str | None, of_run(help="Weights that a side may have had instead: those of the step before.")
    ] = None,
    dtype: Annotated[RunDtype, compute(help="Dtype in which both sides computed.")] = RunDtype.model,
    a_dtype: Annotated[RunDtype | None, compute(help="Dtype in which a computed, if not --dtype.")] = None,
    b_dtype: Annotated[RunDtype | None, compute(help="Dtype in which b computed, if not --dtype.")] = None,
    top: Annotated[int, comparing(min=0, help="Tokens shown that differ most.")] = 5,
    json: Json = False,
) -> None:
    """Judge a trainer's and a rollout's logprobs of sampled tokens.

    Computes them in float64 and splits each difference into rounding, temperature, top-k, top-p or another mistake
    that is named, and the rest. Loads no framework.
    """
    from stages.errors import UsageError
    from stages.judge import logprobs as job
    from stages.progress import Progress
    from stages.show.logprobs import logprobs_document

    if model is None:
        raise UsageError("--model MODEL is needed: the weights whose logprobs these should be")
    if b is None and b_dtype is not None:
        raise UsageError("--b-dtype applies to two files; name the second one, or use --dtype")
    asked = job.LogprobsCommand(
        a, b, model, (a_dtype or dtype).value, (b_dtype or dtype).value, other_model=other_model, top=top
    )
    with Progress(STATE.progress) as progress:
        document = job.judge(asked, progress)
    after(document, json, None, logprobs_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


def _plan(
    named: tuple[str | None, str | None, Path | None, str | None],
    stages: str | None,
    layers: str | None,
    dtype: RunDtype,
    others: list[str],
    json: bool,
) -> None:
    """What a recording would show; `others` are options that were given and do not apply."""
    from stages.errors import UsageError
    from stages.judge.forward_pair import Named
    from stages.judge.plan import plan
    from stages.progress import Progress
    from stages.show.plan import plan_document

    if others:
        raise UsageError(f"{others[0]} does not apply to --plan, which reads a model alone")
    with Progress(STATE.progress) as progress:
        document = plan(Named(*named), stages, layers, dtype=dtype.value, progress=progress)
    after(document, json, None, plan_document)


@command(
    "Compare",
    "svf layouts",
    "svf layouts components",
    "svf layouts components --model Qwen/Qwen3-0.6B --json",
)
def layouts(
    components: Annotated[
        Path | None, typer.Argument(help="Component bundle; without it, a built-in tiny one.")
    ] = None,
    model: Annotated[str | None, compute(help="Source weights; by default the recorded source_f32.")] = None,
    json: Json = False,
) -> None:
    """Find the layout of V that gives each source weight back.

    Does not trust the label, and works for square matrices too.
    """
    from stages.jobs import layouts as job
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = job.diagnose(components, model, progress)
    answer(document, json, render.layouts_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])
