"""Writing the page: checks before anything is computed, then template, style, script and figures in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.errors import InputError, UsageError
from stages.files.folders import prepare_file
from stages.files.jsonio import write_all, write_atomic
from stages.show.html.document import printable, read_document

EXTRA = ("jinja2",)
HOW_TO_GET = "pip install 'svf[report]'"


def missing_libraries() -> list[str]:
    """What of the extra `report` is not installed."""
    return [name for name in EXTRA if find_spec(name) is None]


def check_target(path: Path, *, force: bool = False) -> None:
    """`UsageError` without the extra `report`, `OutputError` as of `prepare_file`."""
    missing = missing_libraries()
    if missing:
        raise UsageError(f"--html needs {' and '.join(missing)}, not installed here: {HOW_TO_GET}")
    prepare_file(path, force=force)


def report(source: Path, target: Path, *, force: bool = False) -> dict[str, Any]:
    """The `svf.report/1` document of writing a saved document's page; nothing is computed again."""
    check_target(target, force=force)
    document = read_document(source)
    write_page(document, target, str(source))
    return {
        "schema": "svf.report/1",
        "source": str(source),
        "of": document["schema"],
        "out": str(target),
        "bytes": target.stat().st_size,
    }


def write_page(document: Mapping[str, Any], target: Path, source: str = "the document") -> None:
    """Write a document's page atomically; `InputError` when its fields are not those of its schema."""
    page = render_page(document, source).encode()
    write_atomic(target, lambda fd: write_all(fd, page))


def render_page(document: Mapping[str, Any], source: str = "the document") -> str:
    """The whole page of a document."""
    from stages.show.html.view import view

    clean = printable(document)
    try:
        shown = view(clean)
        figures = _figures(shown)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InputError(
            f"{source}: is no {clean['schema']} document as --json prints it: {type(error).__name__} {error}"
        ) from None
    return _fill(shown, figures)


def _figures(shown: Any) -> dict[str, Any]:
    """Every figure of the page by its name."""
    from stages.show.html import figures as draw

    found: dict[str, Any] = {}
    if shown.grid is not None:
        found["growth"] = draw.growth(shown.rows, shown.kind)
    if shown.card is not None and shown.card.data is not None:
        found |= {
            "ulp": draw.histogram(shown.card.data),
            "scatter": draw.scatter(shown.card.data),
            "map": draw.residual_map(shown.card.data),
        }
    spread = draw.spread(shown.rows) if shown.one_sided else None
    return found if spread is None else {**found, "spread": spread}


def _fill(shown: Any, figures: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = PackageLoader("stages.show.html", "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (templates.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        view=shown,
        figures=figures,
        details=embedded_json(shown.details),
        style=style,
        script=script,
        style_hash=_sha256(style),
        script_hash=_sha256(script),
    )


def embedded_json(value: Any) -> str:
    """JSON that no HTML parser takes for markup, nor JavaScript for a line's end: only ASCII, no `<`, `>`, `&`."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _sha256(text: str) -> str:
    """A script's or style's hash for the page's content security policy: no other one counts."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
