"""What right systems' logprobs err by, and how small a mistake `svf logprobs` sees and names, on tiny random models.

python benchmarks/logprobs.py [SEEDS]

Right: transformers eager, sdpa and token by token, a padded batch, JAX, and three ways to take a logprob; per dtype the
largest error in deviations, its RMS per file, and the smallest median. Floors: a temperature 1 + 2^k on 64 and on 1024
tokens, seen where it and all larger ones fail, and the k from which its value is named.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from logprob_files import clean, engine, prefill, sampled, taken, write, write_sharp

from stages.judge.logprobs import LogprobsCommand, judge
from stages.oracle.span import BEYOND_LAYER

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3-gqa4")
DTYPES = ("float32", "bfloat16", "float16")
SHARP = (1.0, 8.0)
EXPONENTS = range(-20, 1)


def judged(path: Path, model: Path) -> dict[str, Any]:
    return judge(LogprobsCommand(path, None, str(model)), lambda _label, _done: None)


def right(folder: Path, seeds: range) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        worst = {"files": 0, "sequences": 0, "alarms": 0, "deviations": 0.0, "rms": 0.0, "least_rms": 9.0}
        for seed in seeds:
            for family in FAMILIES:
                for sharp in SHARP:
                    model = write_sharp(folder / f"{family}{dtype}{sharp}{seed}", family, dtype, sharp=sharp, seed=seed)
                    for rows in clean(model, dtype, sampled(engine(model, dtype), 3)).values():
                        document = judged(write(folder / "right.jsonl", rows), model)
                        side = document["a"]
                        worst["files"] += 1
                        worst["sequences"] += side["sequences"]
                        worst["alarms"] += document["outcome"] != "sound"
                        worst["deviations"] = max(worst["deviations"], BEYOND_LAYER * side["ratio"])
                        worst["rms"] = max(worst["rms"], side["rms"])
                        worst["least_rms"] = min(worst["least_rms"], side["rms"])
        found[dtype] = worst
    return found


def floors(folder: Path) -> list[dict[str, Any]]:
    found = []
    for dtype in DTYPES:
        for sharp in SHARP:
            model = write_sharp(folder / f"floor{dtype}{sharp}", "qwen3", dtype, sharp=sharp)
            for count in (64, 1024):
                sequences = sampled(engine(model, dtype), count // 32, 32)
                seen = named = None
                for k in reversed(EXPONENTS):
                    rows = [
                        one.row(taken(prefill(engine(model, dtype), one).float(), one, temperature=1 + 2.0**k))
                        for one in sequences
                    ]
                    document = judged(write(folder / "floor.jsonl", rows), model)
                    if document["outcome"] != "faulty":
                        break
                    seen = k
                    told = document["a"]["found"]
                    if told and abs(told["temperature"] - 1 - 2.0**k) < 2.0**k / 8:
                        named = k
                floor = judged(write(folder / "floor.jsonl", rows), model)["a"]["floor"]
                row = {"dtype": dtype, "sharp": sharp, "tokens": count, "seen": seen, "named": named, "floor": floor}
                found.append(row)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
        print(json.dumps({"right": right(Path(name), seeds), "floors": floors(Path(name))}, indent=1))
