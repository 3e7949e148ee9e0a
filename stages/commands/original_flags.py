"""The original parity tool's own words: flags as its guides have them, in this program's terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stages.errors import UsageError
from stages.jobs.replay_one import ReplayCommand

Say = Callable[[str], None]
# What --vector-dtype may be.
SAME_BITS = (
    "--vector-dtype float64: offsets are rounded to float32 once, now or when they are used; the bundle is the same, "
    "bit for bit"
)


@dataclass(frozen=True)
class ReplayFlags:
    """Flags of the original's replay; see `svf replay --help`."""

    components_dir: Path | None = None
    semantic_only: bool = False
    device_semantic_only: bool = False
    preferred_layout_only: bool = False


def report_place(out: Path | None, report: Path | None, say: Say) -> tuple[Path | None, Path | None]:
    """Folder and report: the original's --out is its report, and no folder is called FILE.json."""
    if out is None or out.suffix != ".json":
        return out, report
    if report is not None:
        raise UsageError(
            f"--out {out} (a report, as in the original tool) and --report {report} both name a report; give one"
        )
    say(f"--out {out}: used as --report, as in the original tool")
    return None, out


def folder_place(out: Path | None, written: Path | None) -> Path:
    """The new bundle's folder, from --out or --write-components-dir."""
    if out is not None and written is not None:
        raise UsageError(f"--out {out} and --write-components-dir {written} both name the bundle's folder; give one")
    chosen = out or written
    if chosen is None:
        raise UsageError("missing --out DIR, the new folder for the component bundle")
    return chosen


def as_original(command: ReplayCommand, flags: ReplayFlags, say: Say) -> ReplayCommand:
    """The command that the original's flags ask for; `UsageError` where they contradict it."""
    if flags.components_dir is not None:
        if command.components not in (None, flags.components_dir):
            raise UsageError(f"COMPONENTS {command.components} and --components-dir {flags.components_dir}: give one")
        command = replace(command, components=flags.components_dir)
    if flags.semantic_only and command.native_components:
        raise UsageError(
            "--semantic-only replays only the given U, S, V, but --components native decomposes again; give one"
        )
    if flags.preferred_layout_only and command.layout != "declared":
        raise UsageError(
            f"--preferred-layout-only uses the declared layout, but --layout {command.layout} is another; give one"
        )
    if flags.device_semantic_only and command.backend == "both":
        say(f"--device-semantic-only: XLA alone, --backend jax, on {command.device} (--device gpu for a GPU)")
        command = replace(command, backend="jax")
    return command
