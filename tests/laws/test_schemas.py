"""docs/schemas.md names what the documents hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT, svf

PAGE = (ROOT / "docs" / "schemas.md").read_text()


def fields(heading: str) -> set[str]:
    """The fields that the page lists under a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` ", section, re.MULTILINE))


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "{c}"),
        ("audit", "--plan", "--model", "{c}/../model", "--layers", "0"),
        ("logprobs", "{c}/../one.jsonl", "{c}/../one.jsonl", "--model", "{c}/../model", "--dtype", "float32"),
        ("layouts", "{c}"),
        ("diff", "{c}", "{c}"),
        ("verify", "{c}"),
        ("inspect", "{c}"),
        ("stats", "{c}"),
        ("stages",),
        ("stages", "ffn_silu"),
        ("selftest", "--list"),
        ("skill",),
        ("audit", "nowhere"),
    ],
    ids=" ".join,
)
def test_every_field_of_a_document_is_on_the_page(words: tuple[str, ...], made: Path) -> None:
    (made / "one.jsonl").write_text('{"prompt": [1], "completion": [2], "logprobs": [-1]}')
    document = svf(*(word.format(c=made / "components") for word in words), "--json").json
    listed = fields(document["schema"])
    assert listed
    everywhere = fields("Every document")
    assert everywhere == {"schema", "next"}
    assert everywhere <= set(document)
    assert set(document) - everywhere - listed == set()


def test_every_schema_is_named() -> None:
    sources = "".join(p.read_text() for p in (ROOT / "stages").rglob("*.py")) + (ROOT / "cli.py").read_text()
    found = set(re.findall(r"\"(svf\.[a-z]+/1)\"", sources))
    assert len(found) > 15
    between_processes = {"svf.rerun/1", "svf.natives/1"}
    assert [schema for schema in sorted(found - between_processes) if schema not in PAGE] == []
