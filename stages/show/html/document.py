"""The documents a report is made from: which schemas, and their texts made safe to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.errors import InputError, all_shown, shown
from stages.files.jsonio import read_object, to_json
from stages.judge.reports import REFERENCE_SCHEMA, REPLAY_SCHEMA

DIFF, AUDIT, FORWARD = SCHEMAS = ("svf.diff/1", "svf.audit/1", "svf.forward/1")
PARITY_REPORTS = (REFERENCE_SCHEMA, REPLAY_SCHEMA)


def read_document(path: Path) -> dict[str, Any]:
    """A saved document; `InputError` when it is of a schema that has no report."""
    document = read_object(path)
    if document.get("schema") in PARITY_REPORTS:
        raise InputError(
            f"{path}: is a report of one side, as --report writes it; compare it with the other side's, and save that "
            f"page: svf diff REFERENCE.json {path} --html PAGE.html"
        )
    if document.get("schema") not in SCHEMAS:
        raise InputError(
            f"{path}: schema is {shown(document.get('schema'))}, expected {', '.join(SCHEMAS)}; save what --json prints"
        )
    return document


def printable(document: Any) -> Any:
    """A document as it comes back from JSON, every text in it printable: control characters and bidi overrides escaped.

    So a report of a run is, byte for byte, the report of its saved document.
    """
    return all_shown(json.loads(to_json(document)))
