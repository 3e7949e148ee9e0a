"""Variables and flags that change bits: each tried by its effect, and a fact of every dump."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fresh

from stages.files import cache
from stages.spec import environment
from stages.spec.environment import VARIABLES, xla_flag, xla_flags
from svf_torch.backend import TorchBackend
from svf_torch.probe import flags, set_flag

pytestmark = pytest.mark.slow

# What stages compute on one backend, as digests, and what the run says of its environment.
RUN = """
import hashlib, json, sys
import numpy as np
from stages.commands.backends import load_backend
backend = load_backend(sys.argv[1], "cpu")
draw = np.random.default_rng(0)
x, w = (draw.standard_normal(shape, np.float32) for shape in ((64, 512), (384, 512)))
run = lambda name, *a: backend.get(backend.compile(backend.forward[name])(*map(backend.put, a)))
values = {"ffn_gate": run("ffn_gate", x, w), "ffn_silu": run("ffn_silu", x), "svd": backend.svd(w)[1]}
digests = {name: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for name, v in values.items()}
print(json.dumps({"digests": digests, "facts": backend.facts()}))
"""


def run(backend: str, **variables: str) -> tuple[dict[str, str], dict[str, str]]:
    """Digests and facts of one run; what else of the table is set here is unset."""
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        done = fresh(RUN, backend, **variables)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    return document["digests"], document["facts"]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, str]]:
    found = {}
    for name in ("torch", "jax"):
        found[name], facts = run(name)
        assert facts["environment"] == ""
        assert run(name)[0] == found[name]  # otherwise a difference would say nothing
    return found


# Backend, variable, value, and which stages it was seen to change here (an x86 CPU, torch with MKL).
SEEN = [
    ("torch", "MKL_CBWR", "COMPATIBLE", {"ffn_gate", "svd"}),
    ("torch", "ATEN_CPU_CAPABILITY", "default", {"ffn_silu"}),
    ("torch", "OMP_NUM_THREADS", "1", {"svd"}),
    ("torch", "ONEDNN_DEFAULT_FPMATH_MODE", "BF16", set()),
    ("torch", "MKL_ENABLE_INSTRUCTIONS", "SSE4_2", set()),
    ("jax", "XLA_FLAGS", "--xla_cpu_enable_fast_math=true", {"ffn_silu"}),
    ("jax", "XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2", {"ffn_silu"}),
    ("jax", "JAX_DISABLE_JIT", "1", set()),
    ("jax", "JAX_ENABLE_X64", "1", set()),
    ("jax", "JAX_DEFAULT_MATMUL_PRECISION", "bfloat16", set()),
]


# In `make test`, those that were seen to change most; each is a process of its own.
@pytest.mark.parametrize(
    ("backend", "name", "value", "seen"),
    [
        pytest.param(
            *case,
            marks=()
            if case[1:3] in (("MKL_CBWR", "COMPATIBLE"), ("OMP_NUM_THREADS", "1")) or "math" in case[2]
            else pytest.mark.thorough,
        )
        for case in SEEN
    ],
)
def test_what_changes_bytes_is_a_fact(
    plain: dict[str, dict[str, str]], backend: str, name: str, value: str, seen: set[str]
) -> None:
    digests, facts = run(backend, **{name: value})
    changed = {stage for stage in digests if digests[stage] != plain[backend][stage]}
    assert facts["environment"] == f"{name}={value}"
    if torch.backends.mkl.is_available():
        assert seen <= changed
    # Whatever else it changed on this machine, the fact above tells of it.


def test_every_variable_that_may_change_bits_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = cache.identity("torch", "cpu", 2, "x")
    for name, variable in VARIABLES.items():
        monkeypatch.setenv(name, "--other=1" if name == "XLA_FLAGS" else "other")
        assert (f"{name}=" in environment.facts()["environment"]) is variable.bits
        # Orders of summation are kept apart by the same; how many threads there are is told by their number.
        apart = variable.bits and name not in cache.THREAD_VARIABLES
        assert (cache.identity("torch", "cpu", 2, "x") != before) is apart
        for value in variable.harmless:
            monkeypatch.setenv(name, value.upper())
            assert environment.facts() == {"environment": ""}
        monkeypatch.delenv(name)


def test_flags_of_xla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"XLA_FLAGS": "--xla_a=1 --xla_gpu_autotune_level=4 --xla_dump_to=/home --xla_gpu_autotune_level=0"}
    assert xla_flag("xla_gpu_autotune_level", said) == "0"
    assert xla_flag("xla_allow_excess_precision", said) == "default"
    assert "/home" not in environment.set_here(said)["XLA_FLAGS"]
    file = tmp_path / "flags"
    file.write_text("--xla_a=2\n--xla_b=3\n")
    assert xla_flags(str(file)) == ["--xla_a=2", "--xla_b=3"]
    assert environment.set_here({"XLA_FLAGS": str(tmp_path / "none")}) == {"XLA_FLAGS": str(tmp_path / "none")}


# torch's flags. There is no GPU here: the device's name is one, the arrays are on the CPU.


@pytest.fixture
def _flags_back() -> Iterator[None]:
    before = flags()
    yield
    for name, value in before.items():
        set_flag(name, value)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device="cpu", **k: real(*a, **k))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200")
    return lambda **fields: TorchBackend(device="cuda", **fields)


@pytest.mark.usefixtures("_flags_back")
def test_tracing_on_a_gpu_refuses_what_loses_bits_unless_asked(on_gpu: Any) -> None:
    for name in flags():
        set_flag(name, True)
    everything = flags()
    assert set(everything.values()) == {True}
    inside = on_gpu().compile(lambda: flags())()
    assert set(inside.values()) == {False}
    assert flags() == everything  # production, and the process, keep the user's
    facts = on_gpu().facts()
    assert {facts[name] for name in everything} == {"False"}
    assert facts["device"] == "cuda: NVIDIA H200"
    asked = on_gpu(reduced_products=True)
    assert asked.compile(lambda: flags())() == everything
    assert {asked.facts()[name] for name in everything} == {"True"}


@pytest.mark.usefixtures("_flags_back")
def test_the_flags_are_back_after_an_error_and_untouched_on_a_cpu(on_gpu: Any) -> None:
    set_flag("tf32_matmul", True)
    set_flag("fp16_reduced_precision_reduction", False)
    before = flags()
    with pytest.raises(ZeroDivisionError):
        on_gpu().compile(lambda: 1 / 0)()
    assert flags() == before
    assert TorchBackend().compile(lambda: flags())() == before
    assert TorchBackend().facts()["tf32_matmul"] == "True"
    assert np.array_equal(TorchBackend().get(torch.ones(2)), np.ones(2, np.float32))
