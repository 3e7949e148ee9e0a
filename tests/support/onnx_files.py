"""ONNX files of models of `transformers`: exported now, or the small one that is kept here as `torch.onnx` wrote it."""

from __future__ import annotations

import gzip
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from forward_models import Model, write_model

KEPT = Path(__file__).with_name("qwen2-torch-2.13.onnx.gz")
SMALL = Model("qwen2", tied=False, heads=2, kv_heads=1, head_dim=8, hidden=16, intermediate=24, vocab=40)


def export(folder: Path, out: Path, attention: str = "sdpa") -> Path:
    """The model of a checkpoint as `torch.onnx` exports it, of any number of tokens."""
    kind: Any = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    given = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]]), "use_cache": False}
    dynamic = {"input_ids": {0: "batch", 1: "tokens"}, "use_cache": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (), out, kwargs=given, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    return out


def kept(folder: Path) -> tuple[Path, Path]:
    """The small checkpoint in a new folder, and the file that was exported from it, in the folder above."""
    write_model(folder, SMALL, "float32")
    out = folder.with_suffix(".onnx")
    out.write_bytes(gzip.decompress(KEPT.read_bytes()))
    return folder, out


if __name__ == "__main__":  # writes what is kept anew
    scratch = Path(sys.argv[1])
    export(write_model(scratch / "m", SMALL, "float32"), scratch / "m.onnx")
    import onnx

    made = onnx.load(scratch / "m.onnx")
    for part in (*made.graph.node, *made.graph.value_info):  # where our files lay, and 9/10 of the bytes
        scopes = [entry for entry in part.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del part.metadata_props[:]
        part.metadata_props.extend(scopes)
    KEPT.write_bytes(gzip.compress(made.SerializeToString(), mtime=0))
