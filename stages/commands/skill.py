"""`svf skill`: the page for coding agents, which comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from stages.commands.options import Json, output
from stages.commands.program import command

FOLDER = Path(__file__).resolve().parents[1] / "show" / "skill"
PAGE = FOLDER / "SKILL.md"


@command("Look", "svf skill", "svf skill --path")
def skill(
    path: Annotated[bool, output("--path", help="Print where the page is, with the files it refers to.")] = False,
    json: Json = False,
) -> None:
    """Print the page that tells a coding agent how to use svf."""
    from stages.files.jsonio import to_json

    text = PAGE.read_text()
    if json:
        print(to_json({"schema": "svf.skill/1", "path": str(PAGE), "text": text, "next": []}))
    else:
        print(PAGE if path else text, end="\n" if path else "")
