"""The program: its own options, the commands of stages/commands/, every error as one line and its exit code."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from stages.commands import child, compare, engines, look, make, prove, route, skill
from stages.commands.program import COMMANDS, STATE, emit, with_next

# These show the commands' names and first lines: no options of theirs are read, nor settings.
NAMES_ALONE = (["--help"], ["-h"])


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
        if "--help" not in STATE.words:
            import stages.judge.next_steps  # noqa: F401  (beforehand: an error may be that memory ran out)
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
    if STATE.words in NAMES_ALONE:
        return {}
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
    from stages.run.watch import ISOLATED

    line = shown(line, limit=4000)  # a path in it may hold anything
    if ISOLATED not in os.environ:
        print(f"svf: {line}", file=sys.stderr)
    if STATE.json:
        with contextlib.suppress(OSError):  # that nobody reads it is no second error
            emit(with_next(error_document(line, code, shlex.join(["svf", *STATE.words])), json=True))
            sys.stdout.flush()
    return code


def _report(error: Exception) -> int:
    """One line on stderr; a traceback only when asked for."""
    if STATE.debug:
        import traceback

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


EXIT_CODES = (
    "Exit codes: 0 agree, 1 diverged or a strict gate failed, 2 usage, 3 input malformed, refused or not comparable, "
    "4 not found or offline, 5 nothing or not everything compared, 6 output cannot be written, 7 resource guard, "
    "70 internal error, 130 and 143 interrupted."
)

app = App(
    name="svf",
    help="Compute a model in PyTorch and in JAX, or read what another engine recorded: see where they differ, and why.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
# Modules of commands, each panel of --help in its turn.
PANELS = (compare, engines, make, look, skill, prove, route, child)


def _named(function: Callable[..., Any]) -> Callable[[], None]:
    """A command without its options."""

    def command() -> None:
        pass

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


for declared in (one for panel in PANELS for one in COMMANDS if one.function.__module__ == panel.__name__):
    shown = _named(declared.function) if sys.argv[1:] in NAMES_ALONE else declared.function
    app.command(declared.name, hidden=declared.panel is None, rich_help_panel=declared.panel)(shown)


def _version(asked: bool) -> None:
    if asked:
        from stages.files.jsonio import version_of

        print(f"svf {version_of('svf') or 'of a source tree that is not installed'}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", "--no-progress", help="Print only results; only errors go to stderr.")
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


if __name__ == "__main__":
    app()
