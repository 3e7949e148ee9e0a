"""Errors a user can act on, each with the exit code that the command line returns.

Every message is one line: what was expected, what came, where, and what to try.
"""

import errno
import resource
from typing import Any

SCHEMA = "svf.error/1"


class SvfError(Exception):
    """Base of all expected errors; `exit_code` is what the process returns."""

    exit_code = 70


class UsageError(SvfError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class InputError(SvfError):
    """A file or value is malformed, refused, or not comparable with the other side."""

    exit_code = 3


class NotFoundError(SvfError):
    """A file, tensor, model or hub repository is not there, or the hub is out of reach."""

    exit_code = 4


class IncompleteError(SvfError):
    """Nothing, or not everything, was compared."""

    exit_code = 5


class OutputError(SvfError):
    """A result cannot be written where it was asked for."""

    exit_code = 6


class ResourceError(SvfError):
    """The work would not fit the memory or disk it may use."""

    exit_code = 7


# What an exit code says went wrong, in `svf.error/1`; 1 is an answer, "diverged", and no error.
KINDS = {
    UsageError.exit_code: "usage",
    InputError.exit_code: "input",
    NotFoundError.exit_code: "not found",
    IncompleteError.exit_code: "incomplete",
    OutputError.exit_code: "output",
    ResourceError.exit_code: "resource",
    SvfError.exit_code: "internal",
    130: "interrupted",
    143: "terminated",
}


def error_document(message: str, exit_code: int, command: str) -> dict[str, Any]:
    """The `svf.error/1` document: what `--json` prints where a command ends without its own."""
    kind = KINDS.get(exit_code, KINDS[SvfError.exit_code])
    return {"schema": SCHEMA, "exit_code": exit_code, "error": kind, "message": message, "command": command}


def exhausted(error: BaseException | None) -> str | None:
    """What ran out, where `error`, or what it was raised for, says so in words of the system, numpy, torch or XLA."""
    while error is not None:
        text = f"{type(error).__name__} {error}"
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
            return "no file handles left; allow more with 'ulimit -n', or end other programs"
        if getattr(error, "errno", None) == errno.ENOMEM or any(words in text for words in _NO_MEMORY) or _unset(error):
            return "out of memory; try fewer tokens or a smaller --chunk-rows, or allow more (ulimit -v, --max-memory)"
        error = error.__cause__ or error.__context__
    return None


def _unset(error: BaseException) -> bool:
    """Whether C code gave up without a word, which CPython reports as SystemError, under a limit of memory: its
    allocation failed."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    said = ("without exception set", "without setting an exception")
    return limited and isinstance(error, SystemError) and any(words in str(error) for words in said)


_NO_MEMORY = ("MemoryError", "allocate memory", "RESOURCE_EXHAUSTED", "bad_alloc", "failed to map segment")


def shown(text: object, limit: int = 120) -> str:
    """`text` from a file, safe to print: control characters escaped, long text cut."""
    text = str(text)
    start = text[: limit + 1]  # no more is looked at: a text may have 50 MB
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in start)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


# A longer text is no name; a verdict sentence with a hint has some 300 characters.
_LONGEST = 2_000


def all_shown(value: Any) -> Any:
    """`value` with every text in it, keys too, as `shown` has it: no name can reorder a line, end it or colour it."""
    if isinstance(value, str):
        return shown(value, _LONGEST)
    if isinstance(value, dict):
        return {all_shown(key): all_shown(item) for key, item in value.items()}
    return type(value)(map(all_shown, value)) if type(value) in (list, tuple) else value
