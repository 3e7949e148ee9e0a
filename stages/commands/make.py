"""What writes models, bundles and trees: synth, decompose, apply, convert, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.commands.backends import attribute, load_backend
from stages.commands.options import (
    ON_TORCH,
    BeginAgain,
    Device,
    Dtype,
    Force,
    InPrecision,
    Json,
    ModelDtype,
    OneBackend,
    OneLayout,
    Precision,
    Preset,
    RunDtype,
    SelectedLayers,
    SvdMethod,
    Tied,
    Tokens,
    VectorDtype,
    compute,
    gate,
    original,
    output,
)
from stages.commands.program import STATE, answer, before, command, say


@command(
    "Make",
    "svf synth /tmp/tiny --preset tiny",
    "svf synth /tmp/qwen --preset qwen3-0.6b --dtype float32 --seed 1",
    "svf synth model --vector router.npy --layers 2",
)
def synth(
    out: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    preset: Annotated[Preset, compute(help="Shape of the model.")] = Preset.tiny,
    seed: Annotated[int, compute(help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[Dtype, compute(help="Dtype of the weights.")] = Dtype.bfloat16,
    vector: Annotated[Path | None, compute(help="Also write a random router vector (.npy) for --layers here.")] = None,
    layers: SelectedLayers = None,
    json: Json = False,
) -> None:
    """Write a random Qwen, Llama or Mistral checkpoint from a seed.

    The same seed gives the same bytes. It has a byte-level tokenizer.
    """
    from stages.errors import UsageError
    from stages.files.folders import prepare_file
    from stages.jobs.builtin import router_vector, write_vector
    from stages.jobs.synth import synthesize
    from stages.progress import Progress
    from stages.show import console as render
    from stages.spec.selectors import parse_layers

    if (vector is None) != (layers is None):
        raise UsageError("--vector FILE and --layers N go together")
    router = None if vector is None else router_vector(preset.value, parse_layers(layers), seed)
    if vector is not None:
        prepare_file(vector)
    with Progress(STATE.progress) as progress:
        document = synthesize(
            out,
            preset.value,
            seed,
            dtype.value,
            lambda done, total, name: progress(f"writing {name}", done / max(total, 1)),
        )
    if vector is not None and router is not None:
        write_vector(vector, router)
    answer(document, json, render.synth_document)


@command(
    "Make",
    "svf decompose MODEL --vector router.npy --layers 26 --out components",
    "svf decompose Qwen/Qwen3-0.6B --vector router.npy --manifest reference_manifest.json \\\n"
    "    --all-selected-tensors --decompose-all-selected-if-missing \\\n"
    "    --out components --report reference.json",
)
def decompose(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, or hub id org/name[@revision].")],
    vector: Annotated[
        Path,
        compute("--vector", "--router-vector", help="Router vector: .npy, or safetensors."),
    ],
    out: Annotated[
        Path | None,
        output(help="New folder for the component bundle; a name FILE.json is used as --report."),
    ] = None,
    write_components_dir: Annotated[Path | None, original(help="The original tool's name for --out.")] = None,
    manifest: Annotated[
        Path | None,
        compute("--manifest", "--reference", help="Reference manifest that names the tensors."),
    ] = None,
    layers: SelectedLayers = None,
    report: Annotated[Path | None, output(help="Write the report of the reference side to this file.")] = None,
    svd: Annotated[
        SvdMethod,
        compute(help="float64: accurate, and the same for any number of threads; torch: the old torch.svd."),
    ] = SvdMethod.float64,
    svd_weights: Annotated[
        Path | None,
        compute(help="The original svd_weights.pt; read as weights only, in a separate process."),
    ] = None,
    all_selected_tensors: Annotated[
        bool,
        compute("--all-selected-tensors", help="Decompose all selected tensors, not only the sample."),
    ] = False,
    decompose_all_selected_if_missing: Annotated[
        bool,
        compute(
            "--decompose-all-selected-if-missing",
            help="Allow --all-selected-tensors without --svd-weights.",
        ),
    ] = False,
    model_torch_dtype: Annotated[
        ModelDtype,
        compute(
            help="Dtype in which the model is loaded before its weights are widened; auto: as its config says.",
        ),
    ] = ModelDtype.float32,
    vector_dtype: Annotated[
        VectorDtype,
        original(help="Offsets are rounded to float32 either way: float64 changes no bit."),
    ] = VectorDtype.float32,
    readback_components_dir: Annotated[
        Path | None,
        original(
            help="Bundle whose read-back variants and baseline go into the report; default: the written one.",
        ),
    ] = None,
    no_write_stage_tensors: Annotated[
        bool,
        output(
            "--no-write-stage-tensors",
            help="Write only U, S, V and offsets, without recorded stages.",
        ),
    ] = False,
    strict_reference_hash: Annotated[
        bool,
        gate(
            "--strict-reference-hash",
            help="Exit code 1 unless a variant reaches the stored hash.",
        ),
    ] = False,
    resume: BeginAgain = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Decompose weights: the reference side of a parity run.

    Writes U, S, V of the selected weights as a component bundle, and every stage's values.
    """
    from stages.commands import original_flags
    from stages.commands.frameworks import decomposed
    from stages.errors import UsageError
    from stages.jobs.decompose import exit_code
    from stages.jobs.decompose_options import DecomposeOptions
    from stages.progress import Progress
    from stages.show import console as render
    from stages.spec.selectors import parse_layers

    if (manifest is None) == (layers is None):
        raise UsageError("give either --manifest FILE or --layers N")
    if svd is not SvdMethod.float64 and svd_weights is not None:
        raise UsageError(
            f"--svd {svd.value} says how to decompose, but --svd-weights is decomposed already; leave one of them out"
        )
    if all_selected_tensors and svd_weights is None and not decompose_all_selected_if_missing:
        raise UsageError(
            "--all-selected-tensors decomposes embedding and LM head too: give --svd-weights FILE.pt, or allow it with "
            "--decompose-all-selected-if-missing"
        )
    out, report = original_flags.report_place(out, report, say)
    if vector_dtype is VectorDtype.float64:
        say(original_flags.SAME_BITS)
    before(force, file=report)
    options = DecomposeOptions(
        model=model,
        vector=vector,
        manifest=manifest,
        layers=parse_layers(layers),
        out=original_flags.folder_place(out, write_components_dir),
        report=report,
        all_selected=all_selected_tensors,
        svd_weights=svd_weights,
        resume=resume,
        model_dtype=model_torch_dtype.value,
        readback=readback_components_dir,
        write_stages=not no_write_stage_tensors,
        svd=svd.value,
        strict_reference=strict_reference_hash,
    )
    with Progress(STATE.progress) as progress:
        document = decomposed(options, load_backend, progress)
    answer(document, json, render.decompose_document)
    raise typer.Exit(exit_code(document))


@command(
    "Make",
    "svf apply components MODEL --out adapted",
    "svf apply components Qwen/Qwen3-0.6B --out adapted --tied last --json",
    "svf apply components MODEL --out adapted --dtype float32 --precision exact",
)
def apply(
    components: Annotated[Path, typer.Argument(help="Component bundle.")],
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id from which the components were made.")],
    out: Annotated[Path, output(help="New folder for the adapted checkpoint.")],
    tied: Annotated[
        Tied,
        compute(
            help="For a tied embedding and LM head that are adapted differently. untie: store both. last: keep only "
            "the one that is copied last, as a tied PyTorch module does.",
        ),
    ] = Tied.untie,
    dtype: Annotated[
        RunDtype,
        compute(help="Dtype of the written weights; float32 keeps the bits that final_bf16 rounds away."),
    ] = RunDtype.model,
    layout: Annotated[OneLayout, compute(help="How to contract V.")] = OneLayout.declared,
    backend: Annotated[OneBackend, compute(help="Backend that computes the adapted weights.")] = ON_TORCH,
    precision: InPrecision = Precision.native,
    device: Device = "cpu",
    resume: BeginAgain = False,
    json: Json = False,
) -> None:
    """Write the adapted checkpoint; transformers loads it as it is."""
    from stages.jobs import apply as job
    from stages.progress import Progress
    from stages.show import files as render_files

    command = job.ApplyCommand(components, model, out, tied.value, dtype.value, layout.value, resume)
    with Progress(STATE.progress) as progress:
        document = job.apply(command, lambda: load_backend(backend.value, device, precision.value), progress)
    answer(document, json, render_files.apply_document)


@command(
    "Make",
    "svf convert pytorch_model.bin model.safetensors",
    "svf convert checkpoint.pt weights --entry state_dict",
)
def convert(
    file: Annotated[Path, typer.Argument(help="Pickled torch file: .pt, .pth, .bin.")],
    out: Annotated[Path, typer.Argument(help="New .safetensors file, or new folder for model.safetensors.")],
    entry: Annotated[str | None, compute(help="Dict inside the file that holds the tensors.")] = None,
    json: Json = False,
) -> None:
    """Copy a pickled file to safetensors without running it.

    Copies dense tensors bit for bit, in a process with limits.
    """
    from stages.show import sources as render

    job = attribute("svf_torch.convert_file:convert")

    document = job(file, out, entry)
    answer(document, json, render.convert_document)


@command(
    "Make",
    "svf export traces/torch aprt",
    "svf export recorded.safetensors aprt --json",
)
def export(
    source: Annotated[Path, typer.Argument(help="Forward dump, or another program's safetensors.")],
    out: Annotated[Path, typer.Argument(help="New folder for the APRT tree.")],
    json: Json = False,
) -> None:
    """Write a forward dump as an APRT tree.

    Says what the APRT format does not keep.
    """
    from stages.jobs.export import export_aprt
    from stages.progress import Progress
    from stages.show import files as render_files

    with Progress(STATE.progress) as progress:
        document = export_aprt(source, out, progress)
    answer(document, json, render_files.export_document)


@command(
    "Make",
    "svf import aprt flat",
    "svf import aprt dump --model MODEL --tokens 1,2,3",
    name="import",
)
def import_(
    source: Annotated[Path, typer.Argument(help="APRT tree, or what another tool recorded.")],
    out: Annotated[Path, typer.Argument(help="New folder for the safetensors.")],
    model: Annotated[
        str | None,
        compute(help="The model that was run: shapes and dtypes follow from it."),
    ] = None,
    tokens: Tokens = None,
    json: Json = False,
) -> None:
    """Write an APRT tree, or what another tool recorded, as safetensors.

    Writes a forward dump when the model and its tokens are given; else the stages as they were recorded, of APRT flat.
    """
    from stages.jobs.export import import_recording
    from stages.progress import Progress
    from stages.show import files as render_files

    with Progress(STATE.progress) as progress:
        document = import_recording(source, out, model, tokens, progress)
    answer(document, json, render_files.import_document)
