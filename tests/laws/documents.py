"""What a fixed set of commands answers, kept in a folder, to be compared after a change that should change nothing.

    python tests/laws/documents.py keep FOLDER       # before: one file a command
    python tests/laws/documents.py compare FOLDER    # after: what differs, exit 1

Documents are kept with what changes from run to run masked: folders, times, the machine's facts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "trinity-tiny"
TOKENS = "3,141,59,26,53"
# Fields whose values are another run's own: what took how long, what this machine is, what ran how.
VOLATILE = frozenset({"facts", "seconds", "command", "versions", "time", "available", "free", "machine", "made"})
# In execution order: a name, and the words; {w} is the scratch folder, {g} the golden bundle's.
COMMANDS: tuple[tuple[str, str], ...] = (
    ("synth", "synth {w}/m --preset tiny --dtype float32 --vector {w}/router.npy --layers 2"),
    ("synth bfloat16", "synth {w}/m16 --preset tiny --seed 1"),
    (
        "decompose",
        "decompose {w}/m --vector {w}/router.npy --layers 2 --all-selected-tensors "
        "--decompose-all-selected-if-missing --out {w}/c --report {w}/reference.json",
    ),
    (
        "decompose golden",
        "decompose {g}/model --vector {g}/router_vector.npy --manifest {g}/reference_manifest.json --out {w}/cg",
    ),
    ("replay both", "replay {w}/c --backend both --out {w}/replays"),
    ("replay golden", "replay {g}/python_components --backend jax --model {g}/model"),
    ("replay wrong layout", "replay {w}/c --backend torch --layout vh"),
    ("replay all layouts", "replay {w}/c --backend reference --layout all"),
    ("replay exact", "replay {w}/c --backend both --precision exact --strict-current-python"),
    ("replay report", "replay {w}/c --backend jax --reference-report {w}/reference.json --report {w}/replay.json"),
    ("diff replays", "diff {w}/replays/torch {w}/replays/jax --top 5"),
    ("diff reports", "diff {w}/reference.json {w}/replay.json --strict-stage-tolerances"),
    ("layouts", "layouts {w}/c"),
    ("audit replay", "audit {w}/replays/jax"),
    ("forward both", "forward {w}/m --tokens {t} --backend both --out {w}/traces"),
    ("forward bfloat16", "forward {w}/m16 --tokens {t} --backend both"),
    ("forward reference", "forward {w}/m --tokens {t} --backend reference --out {w}/ref"),
    ("forward adapted", "forward {w}/m --tokens {t} --backend torch --adapted {w}/c --out {w}/adapted"),
    ("forward few", "forward {w}/m --tokens {t} --backend jax --layers 0 --stages ffn_gate,ffn_swigl --out {w}/few"),
    ("diff forwards", "diff {w}/traces/torch {w}/traces/jax"),
    ("diff with a wrong model", "diff {w}/traces/torch {w}/adapted"),
    ("audit forward", "audit {w}/traces/torch"),
    ("audit few", "audit {w}/few"),
    ("export", "export {w}/traces/torch {w}/tree"),
    ("import", "import {w}/tree {w}/flat"),
    ("audit foreign", "audit {w}/tree --model {w}/m --tokens {t}"),
    ("diff checkpoints", "diff {w}/m {g}/model"),
    ("apply", "apply {w}/c {w}/m --out {w}/applied"),
    ("route", "route {w}/m --adapted {w}/c --head {w}/router.npy --tokens {t} --backend both"),
    ("inspect", "inspect {w}/c"),
    ("verify", "verify {w}/c"),
    ("verify dump", "verify {w}/traces/jax"),
    ("selftest list", "selftest --list"),
    ("no such model", "forward {w}/nothing --tokens 1"),
    ("no such stage", "forward {w}/m --tokens 1 --backend torch --stages nonsense"),
    ("two things at once", "forward {w}/m --tokens 1 --prompt x"),
    ("other kinds", "diff {w}/reference.json {w}/traces/jax"),
)


def documents(work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and masked answer of every command: exit code, document, and the error's line."""
    env = {**os.environ, "SVF_CACHE": str(work / "cache"), "NO_COLOR": "1"}
    for name, words in COMMANDS:
        filled = words.format(w=work, g=GOLDEN, t=TOKENS).split()
        done = subprocess.run(
            [sys.executable, "-c", "import cli; cli.app()", "--no-progress", *filled, "--json"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        text = done.stdout.replace(str(work), "{w}").replace(str(GOLDEN), "{g}")
        error = done.stderr.strip().replace(str(work), "{w}").replace(str(GOLDEN), "{g}")
        yield name, {"exit": done.returncode, "error": error, "document": _masked(json.loads(text or "null"))}


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "masked" if key in VOLATILE else _masked(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_masked(v) for v in value]
    return re.sub(r"/tmp/[\w./-]+", "/tmp/...", value) if isinstance(value, str) else value


def differences(kept: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two answers differ, field by field."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*kept, *now]):
            yield from differences(kept.get(key), now.get(key), f"{where}.{key}")
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for number, (one, other) in enumerate(zip(kept, now, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif kept != now:
        yield f"{where}: {str(kept)[:80]} -> {str(now)[:80]}"


def main(what: str, folder: Path) -> int:
    """Keep the answers in `folder`, or compare them with those there; 1 when one differs."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = 0
    with tempfile.TemporaryDirectory(prefix="svf-documents-") as work:
        for name, answer in documents(Path(work)):
            file = folder / f"{name.replace(' ', '-')}.json"
            if what == "keep":
                file.write_text(json.dumps(answer, indent=1))
                print(f"{name}: exit {answer['exit']}", flush=True)
                continue
            found = [*differences(json.loads(file.read_text()), answer)]
            changed += bool(found)
            print(f"{name}: {'the same' if not found else f'{len(found)} differ'}", *found[:5], sep="\n  ", flush=True)
    print(f"{len(COMMANDS)} commands, {changed} changed")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
