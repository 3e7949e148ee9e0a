"""Decomposition and replay of the nine selected tensors of a 0.6B Qwen3, beside a plain baseline, in one run.

    python benchmarks/replay.py [--work DIR] [--quick]

The baseline does what the original tool does, plainly: load with transformers, torch.svd of all nine, every stage
in memory, save. Both write the same tensors. Needs about 22 GB of disk and, for the baseline, 19 GB of memory.
`--quick` takes the tiny preset, to try the script. Prints wall seconds, peak memory and bytes written of each process.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages.files.jsonio import write_json
from stages.jobs.replay_one import ReplayCommand
from stages.run.children import asked

BASELINE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model_dir, vector, manifest, out = (Path(p) for p in sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
state, offsets = model.state_dict(), torch.from_numpy(np.load(vector).astype(np.float32))
components, scales, stages = {}, {}, {}
with torch.inference_mode():
    for t in json.loads(manifest.read_text())["selected_tensors"]:
        n, w = t["source_name"], state[t["source_name"]]
        u, s, v = torch.svd(w)
        z = offsets[t["offset_start"]:t["offset_end"]]
        scaled = s * (1 + z); norm = (s.sum() / scaled.sum()).reshape(1); us = u * scaled
        product = us @ v.T; adapted = product * norm; zero = (u * s) @ v.T
        components |= {f"svd.U.{n}": u.contiguous(), f"svd.S.{n}": s, f"svd.V.{n}": v.contiguous()}
        scales[f"svf.scale_offsets.{n}"] = z.clone()
        values = dict(source_f32=w, offsets_f32=z, scaled_s=scaled, normalization=norm, u_scaled=us,
            matmul_pre_norm=product, zero_source_f32=zero, adapted_source_f32=adapted, final_f32=adapted,
            final_bf16=adapted.bfloat16())
        stages |= {f"tensor.{n}.{k}": x.clone().contiguous() for k, x in values.items()}
out.mkdir()
save_file(components, out / "trinity_svf_components.safetensors")
save_file(scales, out / "trinity_svf_scale_offsets.safetensors")
save_file(stages, out / "trinity_svf_all_selected_stage_debug.safetensors")
"""


def measured(label: str, command: list[str], out: Path | None) -> float:
    """Run a command; print its wall time, peak memory and the bytes under `out`; returns the seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    written = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out and out.is_dir() else 0
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"{label:34} {seconds:8.1f} s {peak:7.2f} GB peak {written / 1e9:8.2f} GB written   exit {code}", flush=True)
    if code not in (0, 1, 5) or (code and "svf" not in label):
        sys.exit(f"{label} failed")
    return seconds


def write_manifest(preset: str, layer: int, folder: Path) -> None:
    """The selection rule's manifest and a random vector, so that the benchmark needs no published file."""
    from stages.files.selection import select_by_rule
    from stages.jobs.builtin import router_vector, write_vector
    from stages.jobs.synth import config_json
    from stages.spec.families import parameter_shapes, parse_config

    selection = select_by_rule(parameter_shapes(parse_config(config_json(preset), preset)), (layer,))
    write_vector(folder / "vector.npy", router_vector(preset, (layer,)))
    tensors = [
        {
            "source_name": t.source_name,
            "elixir_name": t.elixir_name,
            "shape": list(t.shape),
            "singular_values": t.singular_values,
            "offset_start": t.offset_start,
            "offset_end": t.offset_end,
        }
        for t in selection.tensors
    ]
    sample = {
        "source_name": selection.sample.source_name,
        "sample_reconstructed_shape": list(selection.sample.target_shape),
    }
    manifest = {"selected_tensors": tensors, "sample_adapted_tensor": sample}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def unjudged(work: Path, backend: str) -> Path:
    """A request for the same replay without verdicts, as a side of --backend both is asked."""
    command = ReplayCommand(components=work / "bundle", backend=backend, all_selected=True, verdicts=False)
    write_json(work / "request.json", {"job": command.job, "asked": asked(command)})
    return work / "request.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    preset, layer = ("tiny", 2) if options.quick else ("qwen3-0.6b", 26)
    with tempfile.TemporaryDirectory(prefix="svf-bench-", dir=options.work) as scratch:
        work = Path(scratch)
        svf = [sys.executable, "-P", "-m", "cli", "--no-progress"]
        vector, manifest = work / "vector.npy", work / "manifest.json"
        write_manifest(preset, layer, work)
        measured("svf synth", [*svf, "synth", str(work / "model"), "--preset", preset], work / "model")
        inputs = [str(work / "model"), str(vector), str(manifest)]
        plain = measured("baseline", [sys.executable, "-c", BASELINE, *inputs, str(work / "plain")], work / "plain")
        shutil.rmtree(work / "plain")
        decompose = [*svf, "decompose", str(work / "model"), "--vector", str(vector), "--manifest", str(manifest)]
        decompose += ["--all-selected-tensors", "--decompose-all-selected-if-missing", "--out", str(work / "bundle")]
        ours = measured("svf decompose", decompose, work / "bundle")
        for backend in ("torch", "jax"):
            replay = [*svf, "replay", str(work / "bundle"), "--backend", backend, "--all-selected-tensors"]
            measured(f"svf replay {backend}, judged", replay, None)
            measured(f"svf replay {backend}, checked only", [*svf, "child", str(unjudged(work, backend))], None)
        print(f"svf decompose / baseline: {ours / plain:.2f}")
        print(f"this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
