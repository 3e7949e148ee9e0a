"""What every command of the program shares: how it is declared, asked, answered and shown."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer


class State:
    """Global flags, set once by the program's own options."""

    debug = False
    progress = True
    json = False  # also where the command line itself is wrong
    words: list[str]  # the command line, for a report to say how to make it again


STATE = State()


@dataclass(frozen=True)
class Command:
    """A command as `cli.py` registers it: its function, its name, the panel of `svf --help` it stands in."""

    function: Callable[..., None]
    name: str
    panel: str | None


# Every command, in the order in which `svf --help` shows them; filled as their modules are imported.
COMMANDS: list[Command] = []


def command(panel: str | None, *examples: str, name: str | None = None) -> Callable[[Any], Any]:
    """Declare a command of `panel`, None for a hidden one; its examples stand first in its help."""

    def declare(function: Any) -> Any:
        # \b keeps lines as they are; [ would begin rich's markup.
        shown = ["\n".join(["\b", "Examples:", *(line.replace("[", r"\[") for line in examples)])] if examples else []
        function.__doc__ = "\n\n".join([inspect.cleandoc(function.__doc__ or ""), *shown])
        COMMANDS.append(Command(function, name or function.__name__.replace("_", "-"), panel))
        return function

    return declare


def emit(document: Any) -> None:
    """Print a document as JSON."""
    from stages.files.jsonio import to_json

    print(to_json(document))


def answer(document: Any, json: bool, show: Callable[[Any], None]) -> None:
    """Print a document as JSON, or as text with no character in it that a terminal would obey."""
    from stages.errors import all_shown
    from stages.show.console import next_lines

    document = with_next(document, json)
    if json:
        emit(document)
    else:
        document = all_shown(document)
        show(document)
        next_lines(document)


def with_next(document: Any, json: bool) -> Any:
    """The document with the commands that would tell more, these as machine-readable as it is."""
    from stages.judge.next_steps import next_steps

    steps = next_steps(document)
    return {**document, "next": [f"{step} --json" if json and "--help" not in step else step for step in steps]}


def say(text: str) -> None:
    """A line for the person, on stderr; none with --quiet."""
    if STATE.progress:
        print(f"svf: {text}", file=sys.stderr)


def typed(option: str) -> bool:
    """Whether the option stands on the command line, rather than in a file of settings that other commands read too."""
    return any(word == option or word.startswith(f"{option}=") for word in STATE.words)


def refuse_idle(why: dict[str, bool]) -> None:
    """Refuse the first option that would do nothing here."""
    from stages.errors import UsageError

    for text, idle in why.items():
        if idle:
            raise UsageError(text)


def before(force: bool, html: Path | None = None, file: Path | None = None) -> None:
    """Refuse, before anything is computed, a page or a file that cannot be written."""
    if html is not None:
        from stages.show.html.page import check_target

        check_target(html, force=force)
    if file is not None:
        from stages.files.folders import prepare_file

        prepare_file(file, force=force)


def judging() -> None:
    """Prepare this process, which is the command's own, for judging: not done to a program that calls the library."""
    from stages.files.memory import reuse_heap

    reuse_heap()


def after(document: Any, json: bool, html: Path | None, show: Callable[[Any], None]) -> None:
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


def finish_diff(document: Any, json: bool, html: Path | None = None, *, top: bool = False) -> None:
    """Show a comparison of any kind, and end with its exit code."""
    from stages.judge.document import EXIT_CODES
    from stages.show import console as render

    show: Callable[[Any], None] = functools.partial(render.diff_document, top=top)
    if document["schema"] == "svf.checkpoints/1":
        show = render.checkpoints_document
    elif document.get("kind") == "reports":
        from stages.show.reports import reports_document

        show = functools.partial(reports_document, top=top)
    after(document, json, html, show)
    raise typer.Exit(EXIT_CODES[document["outcome"]])
