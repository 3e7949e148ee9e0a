"""`import svf`: the judge without the command line."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import ROOT, fresh

import svf
from stages.oracle import verdict

GUIDE = ROOT / "docs" / "guides" / "library.md"
RNG = np.random.default_rng(5)
X, W = RNG.standard_normal((6, 64)).astype(np.float32), RNG.standard_normal(64).astype(np.float32)


def torch_norm(x: Any, weight: Any, *, eps: float) -> Any:
    x = torch.tensor(x)
    return torch.tensor(weight) * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))


def jax_norm(x: Any, weight: Any, *, eps: float) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def jax_norm_with_a_bug(x: Any, weight: Any, *, eps: float) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * weight + eps


def test_the_guide_says_what_happens() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), space)


def test_two_right_implementations_differ_by_rounding_only() -> None:
    svf.assert_rounding_only("attn_norm", torch_norm, jax_norm, X, W, eps=1e-6)


def test_a_bug_in_one_of_them_is_told_with_stage_index_and_values() -> None:
    with pytest.raises(AssertionError) as caught:
        svf.assert_rounding_only("attn_norm", torch_norm, jax_norm_with_a_bug, X, W, eps=1e-3)
    said = str(caught.value)
    assert said.startswith("jax_norm_with_a_bug: attn_norm: bug")
    assert re.search(r"at \[\d+, \d+\]: expected -?\d\S+, got -?\d", said)
    assert "torch_norm" not in said


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray, torch.tensor], ids=["numpy", "jax", "torch"])
def test_arrays_of_every_framework_are_taken(wrap: Any) -> None:
    found = svf.judge("ffn_swigl", wrap(X * X), wrap(X), wrap(X))
    assert (found.verdict, found.index) == ("exact", None)
    assert svf.judge("ffn_swigl", wrap(X * X * np.float32(1.01)), wrap(X), wrap(X)).verdict == "bug"


def test_bfloat16_of_torch_is_judged_as_bfloat16() -> None:
    gate = torch.tensor(X).bfloat16()
    assert svf.judge("ffn_silu", torch.nn.functional.silu(gate), gate)
    assert not svf.judge("ffn_silu", torch.nn.functional.silu(gate) * 1.02, gate)
    narrow = X.astype(ml_dtypes.bfloat16)
    assert svf.judge("ffn_swigl", (X.astype(ml_dtypes.bfloat16) * narrow), narrow, narrow)


def test_another_shape_is_told() -> None:
    found = svf.judge("attn_norm", X[:3], X, W, eps=1e-6)
    assert found.verdict == "shape"
    assert "[6, 64]" in str(found.hint)
    assert not found


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: svf.judge("my_layer", X, X), ValueError, "no declared stage"),
        (lambda: svf.judge("attn_norm", X, X, eps=1e-6), TypeError, "expected 2 arrays"),
        (lambda: svf.judge("attn_norm", X, X, W), TypeError, "options eps"),
        (lambda: svf.judge("attn_norm", X, X, W[:3], eps=1e-6), ValueError, "do not fit"),
        (lambda: svf.judge("attn_norm", X.astype(np.int32), X, W, eps=1e-6), ValueError, "int32"),
    ],
)
def test_what_has_no_bound_is_refused(
    call: Any, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As users have it, whose stage functions are not checked by annotation.
    monkeypatch.setitem(verdict.STAGES, "attn_norm", inspect.unwrap(verdict.STAGES["attn_norm"]))
    with pytest.raises(error, match=said):
        call()


def test_every_declared_stage_is_listed() -> None:
    assert {"attn_norm", "lm_head", "normalization", "router_logits"} <= set(svf.stages())


def test_no_framework_is_loaded() -> None:
    code = "import svf, sys, numpy as np\nx = np.ones((2, 4), np.float32)\nassert svf.judge('ffn_swigl', x, x, x)\n"
    done = fresh(code + "assert not {'torch', 'jax', 'typer'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_a_result_is_true_when_sound_and_shows_itself(tmp_path: Path) -> None:
    document = {"outcome": "diverged", "verdict": "Bug at <b>", "culprit": None}
    rows = [{"key": "layers.0.<x>", "verdict": "bug"}, {"key": "embedding", "verdict": "exact"}]
    result = svf.Result({**document, "rows": rows})
    assert not result
    shown = result._repr_html_()
    assert "&lt;x&gt;" in shown
    assert "<b>diverged</b>" in shown
    assert "embedding" not in shown
