"""Settings from `svf.toml`, or `[tool.svf]` in `pyproject.toml`, of the working directory or its nearest parent.

A key at the top is an option of every command that has it (`device = "cuda"`), a table is one command
(`[forward]`, `layers = "0,3"`). Below flags, `SVF_<COMMAND>_<OPTION>` and `SVF_<OPTION>`, in that order, and above
defaults. Names are the options' long names, with `-` or `_`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from stages.errors import InputError, SvfError, UsageError, shown
from stages.files.jsonio import read_bytes
from stages.run.watch import ISOLATED

FILE, PROJECT_FILE = "svf.toml", "pyproject.toml"
PREFIX = "SVF"
_MAX_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Option:
    """An option as the command line has it: TOML types that may stand for it, and whether it may be given often."""

    types: tuple[type, ...]
    multiple: bool = False


Commands = Mapping[str, Mapping[str, Option]]


@dataclass(frozen=True)
class Settings:
    """What a file says, and which file; `values` is its TOML table."""

    path: Path
    values: Mapping[str, Any]


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a command, from its annotations; not hidden ones, nor those that act and exit."""
    found = {}
    for name, hint in get_type_hints(function, include_extras=True).items():
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        given = next(
            (extra for extra in extras if type(extra).__name__ == "OptionInfo"), None
        )  # typer's; an argument has another
        if given is None or given.hidden or name in _ACTIONS:
            continue
        inner = [t for t in get_args(kind) if t is not NoneType] if get_origin(kind) is UnionType else [kind]
        multiple = get_origin(inner[0]) is list
        value = get_args(inner[0])[0] if multiple else inner[0]
        found[name] = Option(_TYPES.get(value, (str,)), multiple)
    return found


_ACTIONS = ("version",)
_TYPES: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}


def find_settings(folder: Path) -> Settings | None:
    """The settings nearest to `folder`, upwards; `UsageError` for a file that cannot be read as TOML."""
    for place in (folder, *folder.parents):
        if (place / FILE).is_file():
            return Settings(place / FILE, _parse(place / FILE))
        if (place / PROJECT_FILE).is_file() and (table := _project(place / PROJECT_FILE)) is not None:
            return Settings(place / PROJECT_FILE, table)
    return None


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bytes(path, _MAX_BYTES).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: expected TOML, got {shown(error)}") from None
    except InputError as error:
        raise UsageError(str(error)) from None


def _project(path: Path) -> dict[str, Any] | None:
    """`[tool.svf]` of a project's file; None where there is none. A damaged file that never names it is not ours."""
    try:
        found = _parse(path).get("tool", {})
    except SvfError:
        if b"tool.svf" in read_bytes(path, _MAX_BYTES):
            raise
        return None
    table = found.get("svf") if isinstance(found, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{path}: tool.svf is {type(table).__name__}, expected a table")
    return table


def default_map(
    settings: Settings | None, environment: Mapping[str, str], top: Mapping[str, Option], commands: Commands
) -> dict[str, Any]:
    """Defaults as typer takes them: options of the whole program by name, a dictionary per command.

    `top` are the program's own options. `UsageError`, naming file and key, for a key that is no option, or a value
    of another type. `SVF_<COMMAND>_<OPTION>` of `environment` wins over `SVF_<OPTION>`, and that over the file.
    """
    found: dict[str, Any] = {name: {} for name in commands}
    if settings is not None:
        for key, value in _checked(settings, top, commands).items():
            if isinstance(value, dict):
                found[key].update(value)
            elif key in top:
                found[key] = value
            else:
                for name in (n for n, options in commands.items() if key in options):
                    found[name].setdefault(key, value)
    for name, options in commands.items():
        found[name].update(_from_environment(environment, options, (name, "")))
    return found | _from_environment(environment, top, ("",))


def _from_environment(
    environment: Mapping[str, str], options: Mapping[str, Option], commands: Sequence[str]
) -> dict[str, Any]:
    """What the environment says of each option, for the first of `commands` that it says something for."""
    found: dict[str, Any] = {}
    for key, option in options.items():
        names = ("_".join(filter(None, (PREFIX, command, key))).replace("-", "_").upper() for command in commands)
        text = next((environment[name] for name in names if environment.get(name)), None)
        if text is not None:
            found[key] = text.split() if option.multiple else text
    return found


def asks_json(words: Sequence[str], defaults: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether the command line `words` is to be answered in JSON: by its flag, by a setting, or as a child always."""
    asked: Mapping[str, Any] = next((defaults[word] for word in words if isinstance(defaults.get(word), dict)), {})
    given = asked.get("json")
    return "--json" in words or ISOLATED in environment or str(given).lower() in _YES


_YES = ("1", "true", "t", "yes", "y", "on")  # as typer reads a flag's variable


def _checked(settings: Settings, top: Mapping[str, Option], commands: Commands) -> dict[str, Any]:
    """The file's values by option name, tables first, so that a command's own key wins over a shared one."""
    shared = {key: option for options in commands.values() for key, option in options.items()} | dict(top)
    tables: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for raw, value in settings.values.items():
        key, where = raw.replace("-", "_"), f"{settings.path}: {shown(raw)}"
        if isinstance(value, dict) and raw in commands:
            tables[raw] = {
                inner.replace("-", "_"): _value(
                    f"{where}.{shown(inner)}", commands[raw].get(inner.replace("-", "_")), item
                )
                for inner, item in value.items()
            }
        else:
            plain[key] = _value(where, shared.get(key), value)
    return {**tables, **plain}


def _value(where: str, option: Option | None, value: Any) -> Any:
    if option is None:
        raise UsageError(f"{where}: is no option or command; 'svf --help' and 'svf COMMAND --help' list them")
    items = value if option.multiple and isinstance(value, list) else [value]
    # A bool is an int to Python, and no number to anybody else.
    fits = all(
        isinstance(item, option.types) and (bool in option.types or (item is not True and item is not False))
        for item in items
    )
    if not fits:
        names = " or ".join(_TOML_NAMES[t] for t in option.types)
        raise UsageError(f"{where}: is {_TOML_NAMES.get(type(value), type(value).__name__)}, expected {names}")
    return value


_TOML_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number", list: "a list"}
_TOML_NAMES |= {dict: "a table"}
