"""What right systems' logprobs err by, and how small a mistake `svf logprobs` sees and names, on tiny random models.

python benchmarks/logprobs.py [SEEDS]

Right: transformers eager, sdpa and token by token, a padded batch, JAX, and three ways to take a logprob; per dtype the
largest error in deviations, and the least and most RMS of a file. Floors: a temperature of 1 + 2^k on 64 and on 512
tokens; the least k such that it and all larger ones are seen, and from which they are named.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from logprob_files import clean, engine, prefill, sampled, taken, write, write_sharp

from stages.judge.logprobs import LogprobsCommand, judge
from stages.oracle.span import BEYOND_LAYER

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3-gqa4")
DTYPES = ("float32", "bfloat16", "float16")
SHARP = (1.0, 8.0)
EXPONENTS = range(-20, 1, 2)
TOKENS = (64, 512)


def judged(path: Path, model: Path) -> dict[str, Any]:
    return judge(LogprobsCommand(path, None, str(model)), lambda _label, _done: None)


def right(folder: Path, seeds: range) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        sides = []
        for seed, family, sharp in itertools.product(seeds, FAMILIES, SHARP):
            model = write_sharp(folder / f"{family}{dtype}{sharp}{seed}", family, dtype, sharp=sharp, seed=seed)
            for rows in clean(model, dtype, sampled(engine(model, dtype), 3)).values():
                document = judged(write(folder / "right.jsonl", rows), model)
                sides.append({**document["a"], "alarm": document["outcome"] != "sound"})
        yield {
            "dtype": dtype,
            "files": len(sides),
            "sequences": sum(side["sequences"] for side in sides),
            "alarms": sum(side["alarm"] for side in sides),
            "deviations": max(BEYOND_LAYER * side["ratio"] for side in sides),
            "rms": [min(side["rms"] for side in sides), max(side["rms"] for side in sides)],
        }


def floors(folder: Path) -> Iterator[dict[str, Any]]:
    for dtype, sharp, count in itertools.product(DTYPES, SHARP, TOKENS):
        model = write_sharp(folder / f"floor{dtype}{sharp}", "qwen3", dtype, sharp=sharp)
        running = engine(model, dtype)
        sequences = [(one, prefill(running, one).float()) for one in sampled(running, count // 32, 32)]
        seen = named = None
        floor = 0.0
        for k in reversed(EXPONENTS):
            rows = [one.row(taken(logits, one, temperature=1 + 2.0**k)) for one, logits in sequences]
            side = judged(write(folder / "floor.jsonl", rows), model)["a"]
            floor = side["floor"]
            if side["verdict"] == "rounding":
                break
            seen = k
            if side["found"] and abs(side["found"]["temperature"] - 1 - 2.0**k) < 2.0**k / 8:
                named = k
        yield {"dtype": dtype, "sharp": sharp, "tokens": count, "seen": seen, "named": named, "floor": floor}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        asked = range(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
        for row in itertools.chain(right(Path(name), asked), floors(Path(name))):
            print(json.dumps(row), flush=True)
