"""The traced forward of a 0.6B Qwen3 beside plain transformers, in one run.

    python benchmarks/forward.py [--model DIR] [--quick]

64 tokens, float32. Whole processes: a plain transformers script (load, one forward), the same under transformers' own
model_addition_debugger_context, and `svf forward --no-production` with a full dump, on torch and on JAX. Then once
loaded: plain forward, traced forward, production forward; the best of three, after one to warm up (and compile).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS = list(range(3, 67))

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
tokens = torch.tensor([[int(t) for t in sys.argv[2].split(",")]])
if len(sys.argv) > 3:
    from transformers.model_debugging_utils import model_addition_debugger_context
    context = model_addition_debugger_context(model, debug_path=sys.argv[3], do_prune_layers=False)
else:
    from contextlib import nullcontext as context
    context = context()
with torch.inference_mode(), context:
    model(tokens)
"""

LOADED = """
import json, sys, time
from stages.files.checkpoint import open_checkpoint
from stages.run.forward import Forwarder, LoadedWeights
side, model, tokens = sys.argv[1], sys.argv[2], [int(t) for t in sys.argv[3].split(",")]
if side == "torch":
    from svf_torch.backend import TorchBackend as Backend
else:
    from svf_jax.backend import JaxBackend as Backend
backend = Backend()
def best(run):
    began = time.perf_counter(); run(); first = time.perf_counter() - began
    times = []
    for _ in range(3):
        began = time.perf_counter(); run(); times.append(time.perf_counter() - began)
    return first, min(times)
with open_checkpoint(model) as checkpoint:
    config = checkpoint.config
    production = backend.production(config, checkpoint, dtype="float32", raw_config=checkpoint.raw_config)
    plain = best(lambda: production(tokens))
    del production
    forwarder = Forwarder(backend, config, LoadedWeights(checkpoint, config, "float32"), dtype="float32")
    traced = best(lambda: [None for _ in forwarder.run(tokens)])
names = ("production_first", "production", "traced_first", "traced")
print(json.dumps(dict(zip(names, (*plain, *traced)))))
"""


def measured(label: str, command: list[str]) -> float:
    """Run a command; print its wall time and peak memory; returns the seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    print(f"{label:44} {seconds:7.2f} s {usage.ru_maxrss * 1024 / 1e9:6.2f} GB peak   exit {code}", flush=True)
    if code:
        sys.exit(f"{label} failed")
    return seconds


def loaded(side: str, model: str, tokens: str) -> dict[str, float]:
    """Seconds of one forward with everything loaded: production's and the traced one's, first and best."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, side, model, tokens],
        stdout=subprocess.PIPE,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{side + ', loaded':44} production {times['production']:.2f} s (first {times['production_first']:.2f}), "
        f"traced {times['traced']:.2f} s (first {times['traced_first']:.2f})",
        flush=True,
    )
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--quick", action="store_true", help="the tiny preset, to try the script")
    options = parser.parse_args()
    tokens = ",".join(map(str, TOKENS))
    with tempfile.TemporaryDirectory(prefix="svf-bench-") as scratch:
        work = Path(scratch)
        svf = [sys.executable, "-P", "-m", "cli", "--no-progress"]
        model = options.model or str(work / "model")
        if options.model is None:
            preset = "tiny" if options.quick else "qwen3-0.6b"
            measured("svf synth", [*svf, "synth", model, "--preset", preset])
        script = [sys.executable, "-c", PLAIN, model, tokens]
        plain = measured("transformers, load and one forward", script)
        measured("the same under its debugger context", [*script, str(work / "debug")])
        whole = {}
        for side in ("torch", "jax"):
            run = [*svf, "forward", model, "--backend", side, "--tokens", tokens, "--dtype", "float32"]
            run += ["--no-production", "--out", str(work / side)]
            whole[side] = measured(f"svf forward, {side}, all dumped and hashed", run)
        torch, jax = loaded("torch", model, tokens), loaded("jax", model, tokens)
        print(f"whole process, svf torch / transformers:     {whole['torch'] / plain:.2f}")
        print(f"whole process, svf jax / transformers:       {whole['jax'] / plain:.2f}")
        print(f"loaded, traced torch / plain torch:          {torch['traced'] / torch['production']:.2f}")
        print(f"loaded, traced jax / its production forward: {jax['traced'] / jax['production']:.2f}")


if __name__ == "__main__":
    main()
