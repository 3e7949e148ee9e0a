"""What the commands that write files say, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.errors import shown
from stages.show.console import console


def _line(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)


def apply_document(document: Mapping[str, Any]) -> None:
    """A `svf.apply/1` document."""
    adapted, tensors = document["adapted"], document["tensors"]
    _line(
        f"Wrote {document['model']} with {len(adapted)} adapted tensors of {len(tensors)} ({document['stage']} by "
        f"{document['backend']}, {document['dtype']}) to {document['out']}"
    )
    if document["tied"]["note"]:
        _line(document["tied"]["note"])
    for name, why in document["left_out"].items():
        _line(f"Left out: {shown(name)}, {why}")
    for name in adapted:
        if name in tensors:
            _line(f"  {tensors[name]['sha256'][:16]}  {shown(name)}")


def export_document(document: Mapping[str, Any]) -> None:
    """A `svf.export/1` document."""
    _line(f"Wrote {document['files']} stage files, {document['elements']:,} values, to {document['out']}")
    for what in document["not_kept"]:
        _line(f"APRT does not keep {shown(what)}")


def import_document(document: Mapping[str, Any]) -> None:
    """A `svf.import/1` document."""
    _line(
        f"Wrote {document['tensors']} tensors, {document['elements']:,} values as {document['dtype']}, "
        f"to {document['out']}"
    )
    if document["flat"]:
        _line(
            f"{len(document['flat'])} of them have no shape and stay flat, as in APRT; --model and --tokens give shapes"
        )
    for what in document["not_kept"]:
        _line(f"Left out: {shown(what)}")


def capture_document(document: Mapping[str, Any]) -> None:
    """A `svf.capture/1` document."""
    facts = ", ".join(f"{name} {value}" for name, value in document["facts"].items())
    _line(f"{document['engine']} on {document['model']}: {facts}")
    for row in filter(None, document["generated"]):
        _line(f"Generated: {row}")
    for sequence in document["sequences"]:
        about = "; ".join(f"{name}: {value}" for name, value in sequence["about"].items())
        _line(f"Wrote {sequence['tensors']} tensors of {sequence['tokens']} tokens to {sequence['out']} ({about})")
