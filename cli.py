"""The command line: parse, call one function, render, exit. No numerics, and no framework until a command needs it."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from stages.commands.skill import skill
from stages.judge.next_steps import next_steps

if TYPE_CHECKING:
    from stages.spec.backend import Backend

# One row per backend: where its class is; and per framework, its probe.
BACKENDS = {
    "torch": "svf_torch.backend:TorchBackend",
    "jax": "svf_jax.backend:JaxBackend",
    "reference": "stages.oracle.components:ReferenceBackend",
}
PROBES = {"torch": "svf_torch.probe:probe", "jax": "svf_jax.probe:probe"}
BOTH = ("torch", "jax")

BackendName = StrEnum("BackendName", [*BACKENDS, "both"])  # type: ignore[misc]
ON_BOTH = BackendName("both")
OneBackend = StrEnum("OneBackend", [*BACKENDS])  # type: ignore[misc]
ON_TORCH = OneBackend("torch")
CalibrateName = StrEnum("CalibrateName", [*BOTH, "both"])  # type: ignore[misc]
CALIBRATE_BOTH = CalibrateName("both")
OneLayout = StrEnum("OneLayout", ["declared", "torch_v", "nx", "vh"])
LayoutName = StrEnum("LayoutName", ["declared", "torch_v", "nx", "vh", "all"])
DumpMode = StrEnum("DumpMode", ["full", "hash", "none"])
Preset = StrEnum("Preset", {"tiny": "tiny", "qwen3_06b": "qwen3-0.6b", "qwen25_05b": "qwen2.5-0.5b"})
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
VectorDtype = StrEnum("VectorDtype", ["float32", "float64"])


class App(typer.Typer):
    """Typer, with every expected error as one line and its documented exit code, and choices in any case."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        decorate = super().command(*args, **kwargs)

        def of(function: Any) -> Any:
            function.__annotations__ = get_type_hints(function, include_extras=True)  # evaluated once and for all
            for hint in function.__annotations__.values():
                for info in getattr(hint, "__metadata__", ()):
                    info.case_sensitive = False
            return decorate(function)

        return of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from stages.commands.settings import asks_json

        STATE.words = list(args[0]) if args else sys.argv[1:]
        STATE.json = asks_json(STATE.words, {}, os.environ)
        signal.signal(signal.SIGTERM, _terminated)
        try:
            defaults = _settings(self)
            STATE.json = asks_json(STATE.words, defaults, os.environ)
            asked = {"prog_name": "svf", "default_map": defaults, **kwargs}
            code = super().__call__(*args, **asked, standalone_mode=False)
            sys.stdout.flush()
        except BrokenPipeError:
            _reader_left()
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # click makes it exit code 1, which here is "diverged"
                _reader_left()
            raise
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(_fail("interrupted", 130))
        except Exception as error:
            sys.exit(_report(error))
        if code == 130:  # typer's answer to Ctrl-C, without a word
            _fail("interrupted", 130)
        sys.exit(code if isinstance(code, int) else 0)


def _settings(program: typer.Typer) -> dict[str, Any]:
    """Defaults from files and the environment, as typer takes them; none while a shell asks for completions."""
    from stages.commands import settings

    if settings.ISOLATED in os.environ or "_SVF_COMPLETE" in os.environ:
        return {}
    commands = {
        c.name or c.callback.__name__: settings.options_of(c.callback)
        for c in program.registered_commands
        if c.callback
    }
    found = settings.find_settings(Path.cwd())
    return settings.default_map(found, os.environ, settings.options_of(main), commands)


def _reader_left() -> None:
    """End well: the reader of a pipe left, and a second complaint at interpreter exit helps nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(0)


def _terminated(_signal: int, _frame: object) -> None:
    sys.exit(_fail("terminated", 143))


def _fail(line: str, code: int) -> int:
    """Say it in one line on stderr, and with --json as a document on stdout; a child leaves saying it to its parent."""
    from stages.errors import error_document, shown
    from stages.run.children import ISOLATED

    line = shown(line, limit=4000)  # a path in it may hold anything
    if ISOLATED not in os.environ:
        print(f"svf: {line}", file=sys.stderr)
    if STATE.json:
        with contextlib.suppress(OSError):  # that nobody reads it is no second error
            emit(_with_next(error_document(line, code, shlex.join(["svf", *STATE.words])), json=True))
            sys.stdout.flush()
    return code


def _report(error: Exception) -> int:
    """One line on stderr; a traceback only when asked for."""
    if STATE.debug:
        traceback.print_exc()
    if hasattr(error, "format_message"):  # a usage error of typer's own
        return _usage(error)
    from stages.errors import SvfError, exhausted

    if isinstance(error, SvfError):
        # A file that could not be opened is not to blame when there were no handles left.
        out = exhausted(error.__context__) if error.exit_code != 7 else None
        return _fail(str(error), error.exit_code) if out is None else _fail(out, 7)
    if (out := exhausted(error)) is not None:
        return _fail(out, 7)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return _fail(f"{error.filename or 'a file'}: cannot be written: {error.strerror}", 6)
    hint = "" if STATE.debug else "; 'svf --debug COMMAND' shows where, please report it"
    return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 70)


def _usage(error: Any) -> int:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if "\n" in message:  # no arguments at all: the whole help
        error.show()
        return int(error.exit_code)
    message = message.replace("Value error, ", "").rstrip(".")  # pydantic's words
    return _fail(f"{message}; try '{context.command_path if context else 'svf'} --help'", error.exit_code)


class State:
    """Global flags, set once by the callback."""

    debug = False
    progress = True
    json = False  # also where the command line itself is wrong
    words: list[str]  # the command line, for a report to say how to make it again


STATE = State()

EXIT_CODES = """Exit codes: 0 agree, 1 diverged or a strict gate failed, 2 usage, 3 input malformed, refused or not
comparable, 4 not found or offline, 5 nothing or not everything compared, 6 output cannot be written, 7 resource
guard, 70 internal error, 130/143 interrupted."""

app = App(
    name="svf",
    help="Replay SVF components in PyTorch and JAX stage by stage, and say where and why they differ.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def examples(*commands: str) -> str:
    """An epilog with one example a line; \\b keeps click from filling them into a paragraph."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


Html = Annotated[
    Path | None, typer.Option("--html", help="Write a self-contained HTML report here; needs svf[report].")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
InPrecision = Annotated[
    Precision,
    typer.Option(
        help="native: the framework's own; reference: float64, rounded at stage boundaries; exact: correctly rounded."
    ),
]
Timeout = Annotated[
    float | None, typer.Option(min=0.1, help="Seconds after which a side of --backend both is stopped.")
]
MaxMemory = Annotated[
    str | None, typer.Option(help="Memory a side may take, such as 2G; more is refused, or ends with exit code 7.")
]
BeginAgain = Annotated[bool, typer.Option("--resume", help="Begin again in --out what was killed there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Finish the run that was cut short in --out.")]
Layers = Annotated[str | None, typer.Option(help="Layers the selection rule takes, such as 26 or 0,3-5.")]
Rerun = Annotated[
    bool,
    typer.Option("--rerun/--no-rerun", help="Run suspect stages again, on the backend that wrote the dump."),
]
StrictStages = Annotated[
    bool, typer.Option("--strict-stage-tolerances", help="Fail unless every required stage is within its tolerance.")
]
StrictCurrent = Annotated[
    bool,
    typer.Option(
        "--strict-current-python", help="Fail unless a final bf16 hash equals the reference side's current one."
    ),
]
StrictReference = Annotated[
    bool, typer.Option("--strict-reference", help="Fail unless both sides reproduce the historical hash.")
]


def _version(asked: bool) -> None:
    if asked:
        from stages.jobs.doctor import version_of

        print(f"svf {version_of('svf') or 'of a source tree that is not installed'}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", "--no-progress", help="Results alone: nothing but errors on stderr.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log on stderr what is read and compiled, and how long it took.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    from stages.run.watch import end_with_parent

    end_with_parent()
    STATE.debug = debug or bool(os.environ.get("SVF_DEBUG"))
    STATE.progress = not quiet
    logging.captureWarnings(True)  # numpy's over a damaged file's values, a library's: part of the log
    if verbose or os.environ.get("SVF_VERBOSE"):
        _log()


def _log() -> None:
    """Send the log to stderr, children's too; JAX, which reads its variable at import, names what it compiles."""

    from stages.errors import shown

    class Shown(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            lines = [text] if record.name == "svf" else text.split("\n")  # what JAX logs may have several
            return "\n".join(shown(line, limit=4000) for line in lines)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Shown("svf: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("svf").setLevel(logging.INFO)
    os.environ.update(SVF_VERBOSE="1", JAX_LOG_COMPILES="1")


def load_backend(name: str, device: str, precision: str = "native", **options: Any) -> Backend:
    """The backend called `name`, its framework imported now, computing in `precision`."""
    from stages.run.precision import with_precision

    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(device=device, **options)
    return with_precision(backend, precision)


def emit(document: Any) -> None:
    """Print a document as JSON."""
    from stages.files.jsonio import to_json

    print(to_json(document))


def answer(document: Any, json: bool, show: Callable[[Any], None]) -> None:
    """Print a document as JSON, or as text with no character in it that a terminal would obey."""
    from stages.errors import all_shown
    from stages.show.console import next_lines

    document = _with_next(document, json)
    if json:
        emit(document)
    else:
        document = all_shown(document)
        show(document)
        next_lines(document)


def _with_next(document: Any, json: bool) -> Any:
    """The document with the commands that would tell more, these as machine-readable as it is."""
    steps = next_steps(document)
    return {**document, "next": [f"{step} --json" if json and "--help" not in step else step for step in steps]}


def _say(text: str) -> None:
    """A line for the person, on stderr; none with --quiet."""
    if STATE.progress:
        print(f"svf: {text}", file=sys.stderr)


def _typed(option: str) -> bool:
    """Whether the option stands on the command line, rather than in a file of settings that other commands read too."""
    return any(word == option or word.startswith(f"{option}=") for word in STATE.words)


def _refuse_idle(why: dict[str, bool]) -> None:
    """Refuse the first option that would do nothing here."""
    from stages.errors import UsageError

    for text, idle in why.items():
        if idle:
            raise UsageError(text)


def _before(force: bool, html: Path | None = None, file: Path | None = None) -> None:
    """Refuse, before anything is computed, a page or a file that cannot be written."""
    if html is not None:
        from stages.show.html.page import check_target

        check_target(html, force=force)
    if file is not None:
        from stages.files.folders import prepare_file

        prepare_file(file, force=force)


def _after(document: Any, json: bool, html: Path | None, show: Callable[[Any], None]) -> None:
    """The document with the command that made it: its report where one is asked for, then as JSON or as text."""
    from stages.errors import shown
    from stages.files.jsonio import made_now

    document["command"] = shlex.join(["svf", *STATE.words])
    document["made"] = made_now()
    if html is not None:
        from stages.show.html.page import write_page

        write_page(document, html)
    answer(document, json, show)
    if html is not None and not json:
        print(f"Report: {shown(html, limit=4000)}")


@app.command(
    epilog=examples(
        "svf synth /tmp/tiny --preset tiny",
        "svf synth /tmp/qwen --preset qwen3-0.6b --dtype float32 --seed 1",
        "svf synth model --vector router.npy --layers 2",
    )
)
def synth(
    out: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    preset: Annotated[Preset, typer.Option(help="Shape of the model.")] = Preset.tiny,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.bfloat16,
    vector: Annotated[Path | None, typer.Option(help="Write a random router vector (.npy) for --layers too.")] = None,
    layers: Layers = None,
    json: Json = False,
) -> None:
    """Write a random, seeded, byte-reproducible Qwen checkpoint with a byte-level tokenizer."""
    from stages.errors import UsageError
    from stages.files.folders import prepare_file
    from stages.files.selection import parse_layers
    from stages.jobs.builtin import router_vector, write_vector
    from stages.jobs.synth import synthesize
    from stages.progress import Progress
    from stages.show import console as render

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


@app.command(
    epilog=examples(
        "svf decompose MODEL --vector router.npy --layers 26 --out components",
        "svf decompose Qwen/Qwen3-0.6B --vector router.npy --manifest reference_manifest.json \\\n"
        "    --all-selected-tensors --decompose-all-selected-if-missing \\\n"
        "    --out components --report reference.json",
    )
)
def decompose(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or hub id org/name[@revision].")],
    vector: Annotated[Path, typer.Option("--vector", "--router-vector", help="Router vector: .npy, or safetensors.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the component bundle; FILE.json is taken as --report.")
    ] = None,
    write_components_dir: Annotated[
        Path | None, typer.Option(help="The same folder, by the original tool's name for it.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", "--reference", help="Reference manifest that names the tensors.")
    ] = None,
    layers: Layers = None,
    report: Annotated[Path | None, typer.Option(help="Write the reference side's report here.")] = None,
    svd: Annotated[
        SvdMethod,
        typer.Option(help="float64: accurate, the same on any thread count; torch: legacy torch.svd."),
    ] = SvdMethod.float64,
    svd_weights: Annotated[
        Path | None, typer.Option(help="Original svd_weights.pt; read weights-only in a process of its own.")
    ] = None,
    all_selected_tensors: Annotated[
        bool, typer.Option("--all-selected-tensors", help="All selected tensors, not the sample alone.")
    ] = False,
    decompose_all_selected_if_missing: Annotated[
        bool,
        typer.Option("--decompose-all-selected-if-missing", help="Allow decomposing them without --svd-weights."),
    ] = False,
    model_torch_dtype: Annotated[
        ModelDtype,
        typer.Option(help="What the model is loaded in before its weights are widened; auto: as its config says."),
    ] = ModelDtype.float32,
    vector_dtype: Annotated[
        VectorDtype, typer.Option(help="Offsets are rounded to float32 either way: float64 changes no bit.")
    ] = VectorDtype.float32,
    readback_components_dir: Annotated[
        Path | None,
        typer.Option(help="Bundle that the report's read-back variants and baseline are of; default the written one."),
    ] = None,
    no_write_stage_tensors: Annotated[
        bool, typer.Option("--no-write-stage-tensors", help="Write U, S, V and offsets alone, no recorded stages.")
    ] = False,
    strict_reference_hash: Annotated[
        bool, typer.Option("--strict-reference-hash", help="Exit code 1 unless a variant reaches the stored hash.")
    ] = False,
    resume: BeginAgain = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Decompose a model's selected weights and record every stage: the reference side of a parity run."""
    from stages.commands import original_flags
    from stages.errors import UsageError
    from stages.files.selection import parse_layers
    from stages.jobs.decompose import exit_code
    from stages.jobs.decompose_options import DecomposeOptions
    from stages.show import console as render

    if (manifest is None) == (layers is None):
        raise UsageError("give either --manifest FILE or --layers N")
    if svd is not SvdMethod.float64 and svd_weights is not None:
        raise UsageError(
            f"--svd {svd.value} is how to decompose, and --svd-weights is decomposed; leave one of them out"
        )
    if all_selected_tensors and svd_weights is None and not decompose_all_selected_if_missing:
        raise UsageError(
            "--all-selected-tensors decomposes embedding and LM head too: give --svd-weights FILE.pt, or allow it with "
            "--decompose-all-selected-if-missing"
        )
    out, report = original_flags.report_place(out, report, _say)
    if vector_dtype is VectorDtype.float64:
        _say(original_flags.SAME_BITS)
    _before(force, file=report)
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
        strict_reference=strict_reference_hash,
    )
    document = _decompose(options, svd.value)
    answer(document, json, render.decompose_document)
    raise typer.Exit(exit_code(document))


def _decompose(options: Any, svd: str) -> Any:
    from stages.jobs import decompose as job
    from stages.progress import Progress

    with Progress(STATE.progress) as progress:
        backend = load_backend("torch", "cpu")
        if options.svd_weights is not None:
            from svf_torch.weights_file import load_svd_weights

            return job.decompose_stored(options, load_svd_weights, backend, progress)
        if svd == "torch":
            from svf_torch.svd import TORCH_SVD

            return job.decompose(options, TORCH_SVD, backend, progress)
        return job.decompose(options, job.FLOAT64, backend, progress)


@app.command(
    epilog=examples(
        "svf replay --backend jax --layout torch_v",
        "svf replay components --backend both --layout all",
        "svf replay components --backend jax --reference-report reference.json --strict-stage-tolerances",
        "svf replay components --components native",
    )
)
def replay(
    components: Annotated[
        Path | None, typer.Argument(help="Component bundle; without it, a built-in tiny one.")
    ] = None,
    backend: Annotated[BackendName, typer.Option(help="Which side computes.")] = ON_BOTH,
    components_from: Annotated[
        ComponentsFrom,
        typer.Option("--components", help="native: each backend decomposes the source itself, to tell basis from bug."),
    ] = ComponentsFrom.given,
    layout: Annotated[LayoutName, typer.Option(help="How V is contracted; declared: as the bundle says.")] = (
        LayoutName.declared
    ),
    model: Annotated[str | None, typer.Option(help="Source weights, for a bundle without source_f32.")] = None,
    reference_report: Annotated[
        Path | None,
        typer.Option("--reference-report", "--python-report", help="Report of the reference side, for the gates."),
    ] = None,
    source_from_stage: Annotated[
        bool,
        typer.Option(
            "--source-from-stage", "--source-from-python-stage", help="Take the source from the recorded source_f32."
        ),
    ] = False,
    components_dir: Annotated[Path | None, typer.Option(help="COMPONENTS, by the original tool's name for it.")] = None,
    semantic_only: Annotated[
        bool, typer.Option("--semantic-only", help="The given U, S, V and no decomposition of its own: the default.")
    ] = False,
    device_semantic_only: Annotated[
        bool, typer.Option("--device-semantic-only", help="XLA alone: --backend jax, unless one backend is named.")
    ] = False,
    preferred_layout_only: Annotated[
        bool, typer.Option("--preferred-layout-only", help="The declared layout and no other: the default.")
    ] = False,
    all_selected_tensors: Annotated[
        bool, typer.Option("--all-selected-tensors", help="Demand every selected tensor's recorded stages.")
    ] = False,
    select: Annotated[
        list[str] | None,
        typer.Option("--select", "--selected-source-filter", help="Only tensors whose name contains this."),
    ] = None,
    chunk_rows: Annotated[int | None, typer.Option(min=1, help="Rows at a time; default from a memory budget.")] = None,
    dump: Annotated[DumpMode | None, typer.Option(help="full with --out, otherwise none.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the dump; FILE.json is taken as --report.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the replaying side's report here.")] = None,
    stage_dir: Annotated[
        Path | None,
        typer.Option(help="New folder for stage files as the original tool writes them, one a tensor, stage.NAME."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, gpu, gpu:1.")] = "cpu",
    precision: InPrecision = Precision.native,
    order: Annotated[
        str,
        typer.Option(
            help="Sum as: native, torch, jax, inferred (as the bundle records), a recorded run, a file of svf infer."
        ),
    ] = "native",
    top: Annotated[int, typer.Option(min=0, help="Largest differences kept per stage.")] = 5,
    strict_stage_tolerances: StrictStages = False,
    strict_current_python: StrictCurrent = False,
    strict_reference: StrictReference = False,
    timeout: Timeout = None,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    html: Html = None,
    force: Force = False,
    json: Json = False,
    verdicts: Annotated[bool, typer.Option(hidden=True)] = True,
) -> None:
    """Replay U, S, V and offsets stage by stage, and check every stage against its bound and the recorded one."""
    from stages.commands.original_flags import ReplayFlags, as_original, report_place
    from stages.errors import UsageError
    from stages.jobs.replay import ReplayCommand
    from stages.judge.document import Gates
    from stages.run.budget import parse_size

    out, report = report_place(out, report, _say)
    _before(force, html, report)
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
        verdicts=verdicts,
        precision=precision.value,
        timeout=timeout,
        resume=resume,
        max_memory=None if max_memory is None else parse_size(max_memory),
        close_up=html is not None,
        native_components=components_from is ComponentsFrom.native,
        order=order,
        stage_dir=stage_dir,
    )
    _refuse_idle(
        {
            "--resume needs --out DIR: it finishes what was cut short there": resume and out is None,
            "--dump none writes nothing to --out; leave one of them out": dump is DumpMode.none and out is not None,
            "--timeout is about the two processes of --backend both": _typed("--timeout") and backend is not ON_BOTH,
        }
    )
    if order != "native" and precision is not Precision.native:
        raise UsageError(f"--order {order} is about native products; --precision {precision.value} has no order")
    flags = ReplayFlags(components_dir, semantic_only, device_semantic_only, preferred_layout_only)
    _finish_diff(_replay(as_original(command, flags, _say)), json, html)


def _replay(command: Any) -> Any:
    from stages.jobs import replay as replay_command
    from stages.progress import Progress

    with Progress(STATE.progress) as progress:
        if command.backend == "both":
            return replay_command.replay_both(command, BOTH, progress)
        load = lambda: load_backend(command.backend, command.device, command.precision)  # noqa: E731
        return replay_command.replay_one(command, load, progress, BOTH)


@app.command(
    epilog=examples(
        "svf forward --backend both",
        "svf forward MODEL --tokens 1,2,3 --backend jax --layers 0,3-5 --stages ffn_gate,ffn_swigl --out dump",
        "svf forward MODEL --prompt 'Hello' --backend torch --generate 8",
        "svf forward MODEL --adapted components --layout vh --backend torch --out wrong",
    )
)
def forward(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub id; without it, a tiny one.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids, such as 1,2,3.")] = None,
    tokens_file: Annotated[Path | None, typer.Option(help="File of token ids, as text or a JSON list.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, through the checkpoint's own tokenizer.")] = None,
    backend: Annotated[BackendName, typer.Option(help="Which side computes.")] = ON_BOTH,
    layers: Annotated[str, typer.Option(help="Layers to record: 0,3-5, or all.")] = "all",
    stages: Annotated[str, typer.Option(help="Stages to record: ffn_gate,ffn_swigl, or all.")] = "all",
    positions: Annotated[Positions, typer.Option(help="Positions to record.")] = Positions.all,
    dtype: Annotated[RunDtype, typer.Option(help="What activations and weights are computed in.")] = RunDtype.model,
    adapted: Annotated[Path | None, typer.Option(help="Component bundle whose weights replace the model's.")] = None,
    layout: Annotated[OneLayout, typer.Option(help="How V of --adapted is contracted.")] = OneLayout.declared,
    repeat: Annotated[int, typer.Option(min=1, help="Runs; all must be byte-identical.")] = 1,
    generate: Annotated[int, typer.Option(min=0, help="Greedy tokens to compare with production's.")] = 0,
    production: Annotated[
        bool | None,
        typer.Option("--production/--no-production", help="Compare with the production model; by default if it fits."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the dump.")] = None,
    format: Annotated[Format, typer.Option(help="Format of the dump.")] = Format.safetensors,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, gpu, gpu:1.")] = "cpu",
    precision: InPrecision = Precision.native,
    order: Annotated[
        str | None,
        typer.Option(
            help="float32 products as torch, jax or a recorded dump takes them, or as a file of svf infer says."
        ),
    ] = None,
    jit: Annotated[Jit, typer.Option(help="What XLA compiles at a time; other than stage shows what fusion does.")] = (
        Jit.stage
    ),
    top: Annotated[int | None, typer.Option(min=0, help="Largest differences kept per stage; default 5.")] = None,
    timeout: Timeout = None,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    html: Html = None,
    force: Force = False,
    json: Json = False,
    with_inputs: Annotated[bool, typer.Option("--with-inputs", hidden=True)] = False,
) -> None:
    """Run a Qwen checkpoint layer by layer, every intermediate named, and compare with the production model."""
    from stages.errors import UsageError
    from stages.jobs.forward_one import ForwardCommand
    from stages.run.budget import parse_size

    _refuse_idle(
        {
            f"--layout {layout.value} is about --adapted COMPONENTS": layout is not OneLayout.declared and not adapted,
            "--resume needs --out DIR: it finishes what was cut short there": resume and out is None,
            "--format aprt needs --out DIR": format is Format.aprt and out is None,
            "--format aprt writes a tree whole or not at all, there is nothing to resume": format is Format.aprt
            and resume,
            "--timeout is about the two processes of --backend both": _typed("--timeout") and backend is not ON_BOTH,
            "--top is about the differences that --backend both compares": top is not None and backend is not ON_BOTH,
        }
    )
    if jit is not Jit.stage and backend not in ("jax", "both"):
        raise UsageError(f"--jit {jit.value} is about JAX; use --backend jax")
    if precision is not Precision.native and jit is Jit.layer:
        raise UsageError(f"--precision {precision.value} rounds at every stage's boundary, --jit layer has none")
    if order is not None and (precision is not Precision.native or jit is Jit.layer or production):
        raise UsageError("--order is for single native stages: not with --precision, --jit layer or --production")
    if precision is not Precision.native and production:
        raise UsageError(f"--production computes natively; --precision {precision.value} cannot be compared with it")
    _before(force, html)
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
        with_inputs=with_inputs,
        top=5 if top is None else top,
        timeout=timeout,
        resume=resume,
        max_memory=None if max_memory is None else parse_size(max_memory),
        close_up=html is not None,
    )
    _forward(command, json, html)


def _forward(command: Any, json: bool, html: Path | None) -> None:
    from stages.jobs.forward import forward_alone, forward_both
    from stages.judge.production import sound
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        if command.backend == "both":
            document = forward_both(command, BOTH, progress)
        else:
            options = {"jit": command.jit != "none"} if command.backend == "jax" else {}
            load = lambda: load_backend(command.backend, command.device, command.precision, **options)  # noqa: E731
            document = forward_alone(command, load, BOTH, progress)
    if command.backend == "both":
        _finish_diff(document, json, html)
    _after(document, json, html, render.forward_document)
    raise typer.Exit(0 if sound(document) else 1)


@app.command(
    epilog=examples(
        "svf diff dumps/torch dumps/jax",
        "svf diff a/stages.safetensors b/stages.safetensors --components bundle",
        "svf diff reference.json replay.json --strict-stage-tolerances",
        "svf diff dumps",
        "svf diff traces/torch recorded.safetensors --stages ffn_gate,ffn_out",
        "svf diff dumps/torch dumps/jax --explain-order",
        "svf diff dumps/torch dumps/jax --std-ratio 0.5:2",
    )
)
def diff(
    a: Annotated[
        Path,
        typer.Argument(help="Reference side: dump, bundle, stage file, APRT, another program's, checkpoint or report."),
    ],
    b: Annotated[Path | None, typer.Argument(help="The other one; without it, the two dumps inside the first.")] = None,
    components: Annotated[
        Path | None, typer.Option(help="Bundle with U, S and V, to judge products or adapted weights.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Weights, to judge forwards; default as recorded.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids of another program's forward, such as 1,2,3.")] = None,
    tokens_file: Annotated[Path | None, typer.Option(help="File of token ids, as text or a JSON list.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, through the checkpoint's own tokenizer.")] = None,
    layers: Annotated[str | None, typer.Option(help="Compare only these layers: 0,3-5.")] = None,
    stages: Annotated[str | None, typer.Option(help="Compare only these stages: ffn_gate,ffn_swigl.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Demand dumps of this precision; exact: any difference is a bug.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=0, help="Print the largest differences of every stage.")] = None,
    explain_order: Annotated[
        bool, typer.Option("--explain-order", help="Say how much of the difference is the order of summation; slow.")
    ] = False,
    strict_stage_tolerances: StrictStages = False,
    strict_current_python: StrictCurrent = False,
    strict_reference: StrictReference = False,
    std_ratio: Annotated[
        str | None,
        typer.Option(help="Fail unless std of b over std of a is within LOW:HIGH in every stage, such as 0.5:2."),
    ] = None,
    rerun: Rerun = True,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare two recorded runs, bundles, checkpoints or reports, stage by stage; loads no framework."""
    from stages.judge.diff import DiffCommand, check_options, diff_any, with_sides
    from stages.judge.document import Gates, parse_std_ratio
    from stages.judge.forward_pair import Named
    from stages.order.explain import explain_recorded
    from stages.progress import Progress

    within = None if std_ratio is None else parse_std_ratio(std_ratio)
    _before(force, html)
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
            gates=Gates(strict_stage_tolerances, strict_current_python, strict_reference, std_ratio=within),
            explain_order=explain_order,
            rerun=rerun,
            html=html is not None,
        )
    )
    check_options(command)
    with Progress(STATE.progress) as progress:
        document = diff_any(command, progress)
        if explain_order:
            document = explain_recorded(
                document, command.a, command.b or command.a, components=components, model=model, progress=progress
            )
    _finish_diff(document, json, html, top=top is not None)


def _finish_diff(document: Any, json: bool, html: Path | None = None, *, top: bool = False) -> None:
    from stages.judge.document import EXIT_CODES as outcomes
    from stages.show import console as render

    show: Callable[[Any], None] = functools.partial(render.diff_document, top=top)
    if document["schema"] == "svf.checkpoints/1":
        show = render.checkpoints_document
    elif document.get("kind") == "reports":
        from stages.show.reports import reports_document

        show = functools.partial(reports_document, top=top)
    _after(document, json, html, show)
    raise typer.Exit(outcomes[document["outcome"]])


@app.command(
    epilog=examples(
        "svf audit dumps/torch",
        "svf audit recorded.safetensors --model MODEL --tokens 1,2,3",
        "svf audit recorded.safetensors --model MODEL --prompt Hello --adapted components --stages ffn_gate,ffn_out",
        "svf audit bundle --json",
    )
)
def audit(
    dump: Annotated[
        Path, typer.Argument(help="Dump, bundle or stage file; or another program's: safetensors, folder, APRT tree.")
    ],
    model: Annotated[str | None, typer.Option(help="Weights; another program's dump does not name them.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids of another program's dump, such as 1,2,3.")] = None,
    tokens_file: Annotated[Path | None, typer.Option(help="File of token ids, as text or a JSON list.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, through the checkpoint's own tokenizer.")] = None,
    adapted: Annotated[
        Path | None, typer.Option(help="Components whose adapted weights another program ran on.")
    ] = None,
    layout: Annotated[OneLayout, typer.Option(help="How V of --adapted is contracted.")] = OneLayout.declared,
    components: Annotated[Path | None, typer.Option(help="Bundle with U, S and V, to judge products.")] = None,
    layers: Annotated[str | None, typer.Option(help="Judge only these layers: 0,3-5.")] = None,
    stages: Annotated[str | None, typer.Option(help="Judge only these stages: ffn_gate,ffn_swigl.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Largest errors kept per stage.")] = 5,
    rerun: Rerun = True,
    html: Html = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Judge one dump by itself: every stage against float64, from the inputs that the dump recorded."""
    from stages.judge import audit as job
    from stages.progress import Progress
    from stages.show import console as render

    _before(force, html)
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
            progress=progress,
        )
    _after(document, json, html, render.audit_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@app.command(
    epilog=examples(
        "svf stats dumps/torch",
        "svf stats recorded.safetensors --json",
    )
)
def stats(
    dump: Annotated[
        Path, typer.Argument(help="Dump, bundle or stage file; APRT; or another program's safetensors or folder.")
    ],
    json: Json = False,
) -> None:
    """Show mean, standard deviation, smallest and largest value of every recorded stage; needs no model."""
    from stages.jobs.stats import stats_of
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = stats_of(dump, progress)
    answer(document, json, render.stats_document)


@app.command(
    epilog=examples(
        "svf layouts",
        "svf layouts components",
        "svf layouts components --model Qwen/Qwen3-0.6B --json",
    )
)
def layouts(
    components: Annotated[
        Path | None, typer.Argument(help="Component bundle; without it, a built-in tiny one.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Source weights; default the recorded source_f32.")] = None,
    json: Json = False,
) -> None:
    """Say which layout of V gives each tensor back, whatever the label says, for square matrices too."""
    from stages.jobs import layouts as job
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = job.diagnose(components, model, progress)
    answer(document, json, render.layouts_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@app.command(hidden=True)
def rerun(
    request: Annotated[Path, typer.Argument(help="What to run again, as stages/judge/rerun.py writes it.")],
) -> None:
    """Run stages of a dump again from their recorded inputs, natively and in reference precision."""
    from stages.judge.rerun import answer

    emit(answer(request, load_backend))


@app.command(
    epilog=examples(
        "svf calibrate",
        "svf calibrate --backend jax --device gpu --json",
    )
)
def calibrate(
    backend: Annotated[CalibrateName, typer.Option(help="Which side is measured.")] = CALIBRATE_BOTH,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, gpu, gpu:1.")] = "cpu",
    json: Json = False,
) -> None:
    """Measure how each kind of stage rounds on this machine; dumps made here afterwards are judged by it."""
    from stages.jobs import calibrate as job
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        if backend == "both":
            document = job.calibrate_both(BOTH, device, progress)
        else:
            document = job.calibrate_one(load_backend(backend.value, device), progress)
    answer(document, json, render.calibrate_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@app.command(
    epilog=examples(
        "svf apply components MODEL --out adapted",
        "svf apply components Qwen/Qwen3-0.6B --out adapted --tied last --json",
        "svf apply components MODEL --out adapted --dtype float32 --precision exact --backend jax",
    )
)
def apply(
    components: Annotated[Path, typer.Argument(help="Component bundle.")],
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id that the components are of.")],
    out: Annotated[Path, typer.Option(help="New folder for the adapted checkpoint.")],
    tied: Annotated[
        Tied,
        typer.Option(
            help="A tied embedding and LM head, adapted apart: store both, untied; or, as copying both into a tied "
            "PyTorch module does, let the last one copied stand for both."
        ),
    ] = Tied.untie,
    dtype: Annotated[
        RunDtype, typer.Option(help="Dtype of the written weights; float32 keeps what final_bf16 rounds.")
    ] = RunDtype.model,
    layout: Annotated[OneLayout, typer.Option(help="How V is contracted.")] = OneLayout.declared,
    backend: Annotated[OneBackend, typer.Option(help="What computes the adapted weights.")] = ON_TORCH,
    precision: InPrecision = Precision.native,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, gpu, gpu:1.")] = "cpu",
    resume: BeginAgain = False,
    json: Json = False,
) -> None:
    """Write the adapted checkpoint in Hugging Face layout, for `transformers` as it is."""
    from stages.jobs import apply as job
    from stages.progress import Progress
    from stages.show import files as render_files

    command = job.ApplyCommand(components, model, out, tied.value, dtype.value, layout.value, resume)
    with Progress(STATE.progress) as progress:
        document = job.apply(command, lambda: load_backend(backend.value, device, precision.value), progress)
    answer(document, json, render_files.apply_document)


@app.command(
    epilog=examples(
        "svf route MODEL --adapted components --head router.npy --prompt 'user: What is 6 times 7?'",
        "svf route adapted --head trinity_router_head.safetensors --tokens 1,2,3 --backend jax",
        "svf route MODEL --head router.npy --layers 26 --tokens 1,2,3 --precision exact",
    )
)
def route(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    head: Annotated[Path, typer.Option(help="Router vector, .npy or safetensors; or trinity_router_head.safetensors.")],
    adapted: Annotated[Path | None, typer.Option(help="Component bundle whose weights replace the model's.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Adapted layers of a router vector, such as 26; by default as --adapted says.")
    ] = None,
    layout: Annotated[OneLayout, typer.Option(help="How V of --adapted is contracted.")] = OneLayout.declared,
    tokens: Annotated[str | None, typer.Option(help="Token ids, such as 1,2,3.")] = None,
    tokens_file: Annotated[Path | None, typer.Option(help="File of token ids, as text or a JSON list.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The transcript, taken as it is; TRINITY's has lines like 'user: ...'.")
    ] = None,
    backend: Annotated[BackendName, typer.Option(help="Which side computes.")] = ON_BOTH,
    dtype: Annotated[RunDtype, typer.Option(help="What the model is computed in.")] = RunDtype.model,
    precision: InPrecision = Precision.native,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, gpu, gpu:1.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="File for one side's hidden state and logits, safetensors.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Route with the TRINITY head: logits of agents and roles from the second-to-last token's hidden state."""
    from stages.jobs.route import RouteCommand, route_both, route_one
    from stages.judge.document import EXIT_CODES as outcomes
    from stages.progress import Progress
    from stages.show import route as render_route

    _before(force, file=out)
    command = RouteCommand(
        model=model,
        head=head,
        adapted=adapted,
        layers=layers,
        layout=layout.value,
        tokens=tokens,
        tokens_file=tokens_file,
        prompt=prompt,
        backend=backend.value,
        dtype=dtype.value,
        device=device,
        precision=precision.value,
        out=out,
    )
    with Progress(STATE.progress) as progress:
        if backend is ON_BOTH:
            document = route_both(command, BOTH, progress)
        else:
            load = lambda: load_backend(backend.value, device, precision.value)  # noqa: E731
            document = route_one(command, load, progress)
    answer(document, json, render_route.route_document)
    raise typer.Exit(outcomes[document["outcome"]])


@app.command(
    epilog=examples(
        "svf export traces/torch aprt",
        "svf export recorded.safetensors aprt --json",
    )
)
def export(
    source: Annotated[Path, typer.Argument(help="Forward dump, or another program's safetensors.")],
    out: Annotated[Path, typer.Argument(help="New folder for the APRT tree.")],
    json: Json = False,
) -> None:
    """Write a forward dump as an APRT tree, and say what that format does not keep."""
    from stages.jobs.export import export_aprt
    from stages.progress import Progress
    from stages.show import files as render_files

    with Progress(STATE.progress) as progress:
        document = export_aprt(source, out, progress)
    answer(document, json, render_files.export_document)


@app.command(
    "import",
    epilog=examples(
        "svf import aprt flat",
        "svf import aprt dump --model MODEL --tokens 1,2,3",
    ),
)
def import_(
    source: Annotated[Path, typer.Argument(help="APRT tree.")],
    out: Annotated[Path, typer.Argument(help="New folder for the safetensors.")],
    model: Annotated[str | None, typer.Option(help="The model that was run: shapes and dtypes follow from it.")] = None,
    tokens: Annotated[str | None, typer.Option(help="The token ids that it was run on, such as 1,2,3.")] = None,
    json: Json = False,
) -> None:
    """Write an APRT tree as safetensors: flat, or a forward dump when the model and its tokens are told."""
    from stages.jobs.export import import_aprt
    from stages.progress import Progress
    from stages.show import files as render_files

    with Progress(STATE.progress) as progress:
        document = import_aprt(source, out, model, tokens, progress)
    answer(document, json, render_files.import_document)


@app.command(
    epilog=examples(
        "svf report result.json --html result.html",
        "svf report result.json --html result.html --json",
    )
)
def report(
    result: Annotated[
        Path, typer.Argument(help="What svf diff, audit, replay or forward printed with --json, in a file.")
    ],
    html: Annotated[Path, typer.Option("--html", help="New file for the report; needs svf[report].")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the HTML report of a saved result; nothing is computed again."""
    from stages.show import console as render
    from stages.show.html.page import report as write

    document = write(result, html, force=force)
    answer(document, json, render.report_document)


@app.command(
    epilog=examples(
        "svf doctor",
        "svf doctor --json",
    )
)
def doctor(
    probe: Annotated[str | None, typer.Option(hidden=True)] = None,
    json: Json = False,
) -> None:
    """Show versions, devices and settings, and what would change results or stop a run (exit code 1), with a remedy."""
    from stages.jobs import doctor as job
    from stages.show import sources as render

    if probe is not None:  # the child that this command starts for each framework
        return emit(_probe(probe))
    document = job.examine(list(PROBES))
    answer(document, json, render.doctor_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


def _probe(name: str) -> dict[str, Any]:
    try:
        module, _, attribute = PROBES[name].partition(":")
        found: dict[str, Any] = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever is broken there is what the doctor is asked for
        return {"error": f"{type(error).__name__}: {error}"}
    return found


@app.command(
    epilog=examples(
        "svf inspect components",
        "svf inspect MODEL --json",
        "svf inspect pytorch_model.bin",
    )
)
def inspect(
    source: Annotated[
        str, typer.Argument(help="Bundle, checkpoint or hub id, dump, APRT, .safetensors, .npy, .pt or JSON result.")
    ],
    json: Json = False,
) -> None:
    """List what a file or folder holds, from its headers; loads no framework and unpickles nothing."""
    from stages.jobs import inspect as job
    from stages.show import sources as render

    document = job.inspect(source)
    answer(document, json, render.inspect_document)


@app.command(
    epilog=examples(
        "svf verify components",
        "svf verify components --model MODEL --json",
        "svf verify dumps/torch",
    )
)
def verify(
    source: Annotated[str, typer.Argument(help="What to verify: the same kinds as svf inspect.")],
    model: Annotated[str | None, typer.Option(help="Weights that a bundle's components are of.")] = None,
    json: Json = False,
) -> None:
    """Check schema, hashes and what must hold of the values: exit code 0 when sound, 3 when malformed."""
    from stages.jobs import verify as job
    from stages.progress import Progress
    from stages.show import sources as render

    with Progress(STATE.progress) as progress:
        document = job.verify(source, model, progress)
    answer(document, json, render.verify_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@app.command(
    epilog=examples(
        "svf convert pytorch_model.bin model.safetensors",
        "svf convert checkpoint.pt weights --entry state_dict",
    )
)
def convert(
    file: Annotated[Path, typer.Argument(help="Pickled torch file: .pt, .pth, .bin.")],
    out: Annotated[Path, typer.Argument(help="New .safetensors file, or new folder for model.safetensors.")],
    entry: Annotated[str | None, typer.Option(help="Dict inside the file that holds the tensors.")] = None,
    json: Json = False,
) -> None:
    """Copy a pickled file's dense tensors to safetensors, bit for bit, in a limited process that runs no code of it."""
    from stages.show import sources as render
    from svf_torch.convert_file import convert as job

    document = job(file, out, entry)
    answer(document, json, render.convert_document)


@app.command(
    epilog=examples(
        "svf probe",
        "svf probe --backend jax --threads 1 --json",
    )
)
def probe(
    backend: Annotated[BackendName, typer.Option(help="Whose sums to probe.")] = ON_BOTH,
    device: Annotated[str, typer.Option(help="cpu, or a GPU: cuda, gpu, gpu:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="On so many; default on all, and on one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Probe again what the cache knows.")] = False,
    json: Json = False,
    in_child: Annotated[bool, typer.Option("--in-child", hidden=True)] = False,
    sizes: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Reveal the order in which each backend sums: products of several shapes, sums, mean squares, softmax."""
    from stages.jobs import probe as probe_run
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        if in_child:
            if threads is not None:
                probe_run.limit_threads(threads)
            loaded = load_backend(backend.value, device)
            asked = [int(size) for size in sizes.split(",")] if sizes else None
            emit(probe_run.probe_sizes(loaded, asked) if asked else probe_run.probe_backend(loaded, progress))
            return
        names = BOTH if backend is ON_BOTH else (backend.value,)
        document = probe_run.probe_all(probe_run.ProbeCommand(names, device, threads, fresh), progress)
    answer(document, json, render.probe_document)
    raise typer.Exit(0 if document["complete"] else 5)


@app.command(
    epilog=examples(
        "svf infer components",
        "svf infer dumps/jax --rows 256 --json",
    )
)
def infer(
    side: Annotated[Path, typer.Argument(help="Dump, component bundle or stage file of a replay; dump of a forward.")],
    components: Annotated[Path | None, typer.Option(help="Bundle with U, S and V, the operands of products.")] = None,
    model: Annotated[str | None, typer.Option(help="Weights of a forward dump; default as recorded.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Of a replay, only so many rows of each tensor.")] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Of a forward, so many columns of each product.")] = None,
    json: Json = False,
) -> None:
    """Find the order in which a recorded run summed, from its bytes alone; loads no framework."""
    from stages.order.infer_recorded import infer_recorded
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = infer_recorded(
            side, components=components, model=model, rows=rows, columns=columns, check=True, progress=progress
        )
    answer(document, json, render.orders_document)
    raise typer.Exit(0 if document["outcome"] == "complete" else 5)


@app.command(
    epilog=examples(
        "svf demo",
        "svf demo --json",
    )
)
def demo(json: Json = False) -> None:
    """The whole chain on a tiny model: decompose, replay in PyTorch and JAX, compare stage by stage."""
    from stages.files.cache import cache_folder
    from stages.jobs import demo as chain
    from stages.progress import Progress
    from stages.show.html.page import HOW_TO_GET, missing_libraries

    with Progress(STATE.progress) as progress:
        document = chain.run(BOTH, progress)
    if not json:
        chain.explain(document, HOW_TO_GET if missing_libraries() else None)
    _finish_diff(document, json, None if missing_libraries() else cache_folder() / "demo.html")


@app.command(
    epilog=examples(
        "svf selftest --quick",
        "svf selftest --clean 300 --json",
        "svf selftest --fault 'no causal mask' --backend jax",
    )
)
def selftest(
    backend: Annotated[BackendName, typer.Option(help="Where faults are planted.")] = ON_BOTH,
    quick: Annotated[bool, typer.Option("--quick", help="Each kind of fault once, and fewer clean runs.")] = False,
    fault: Annotated[list[str] | None, typer.Option(help="Only this kind of fault, see --list.")] = None,
    clean: Annotated[int | None, typer.Option(min=0, help="Clean comparisons; default 40, 8 with --quick.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of places, weights and shapes.")] = 0,
    list_faults: Annotated[bool, typer.Option("--list", help="The kinds of fault; nothing is run.")] = False,
    json: Json = False,
) -> None:
    """Plant known faults and see that each is found and named, and that runs without a fault raise no alarm."""
    from stages.progress import Progress
    from stages.selftest import command
    from stages.selftest.document import exit_code
    from stages.show import selftest as view

    if list_faults:
        document = command.listed(fault)
        answer(document, json, lambda d: view.fault_list(d["faults"]))
        return
    options = command.options(backend.value, fault, quick=quick, clean=clean, seed=seed)
    with Progress(STATE.progress) as progress:
        document = command.selftest(options, progress)
    answer(document, json, view.selftest_document)
    raise typer.Exit(exit_code(document))


app.command(epilog=examples("svf skill", "svf skill --path"))(skill)


@app.command(hidden=True, name="selftest-child", epilog=examples("svf selftest-child job.json"))
def selftest_child(job: Annotated[Path, typer.Argument(help="The runs to do.")]) -> None:
    """One backend's runs of a selftest, each into a dump."""
    from stages.selftest.child import run_job

    emit(run_job(job, lambda name: load_backend(name, "cpu")))


if __name__ == "__main__":
    app()
