"""Synthetic checkpoints: reproducible bytes, loadable by transformers, sane to run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import OutputError, ResourceError, UsageError
from stages.files.checkpoint import open_checkpoint
from stages.jobs import synth
from stages.jobs.synth import PRESETS, Preset, config_json, synthesize
from stages.spec.families import parameter_shapes, parse_config

# A Qwen2 as small as `tiny`; the table's own is a gigabyte.
SMALL_QWEN2 = Preset("qwen2", 64, 2, 4, 2, 16, 192, 512, 512)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "tiny"
    synthesize(out, "tiny")
    return out


@pytest.fixture(scope="module")
def small_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "qwen2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small-qwen2", SMALL_QWEN2)
        synthesize(out, "small-qwen2", seed=3)
    return out


@pytest.fixture(params=["tiny", "small_qwen2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", "6dc985f66e96fca1542770b025d95dfa9ef32827685f69e97c38e30f38692955"),
        ("float32", "635cf54e6d4cf78c2c90b6013c93e8cd1987b9ee9ff0fb4e2186f25dc901a764"),
        ("float16", "63329d13b195d35a4e739e29ad3b68c55a1de13ee9ae461025695ad9b59d7634"),
    ],
)
def test_the_bytes_of_tiny_are_pinned(tmp_path: Path, dtype: str, expected: str) -> None:
    synthesize(tmp_path / "out", "tiny", seed=0, dtype=dtype)
    assert _sha256(tmp_path / "out/model.safetensors") == expected


def test_the_same_call_gives_the_same_files_and_another_seed_other_weights(tiny: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "same", "tiny")
    synthesize(tmp_path / "other", "tiny", seed=1)
    names = sorted(path.name for path in tiny.iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert _sha256(tmp_path / "same" / name) == _sha256(tiny / name)
        assert (_sha256(tmp_path / "other" / name) == _sha256(tiny / name)) == (name != "model.safetensors")


@pytest.mark.parametrize("elements", [64, 1000, 5000])
def test_the_cut_into_chunks_changes_no_byte(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(synth, "CHUNK_ELEMENTS", elements)
    synthesize(tmp_path / "out", "tiny")
    assert _sha256(tmp_path / "out/model.safetensors") == _sha256(tiny / "model.safetensors")


def test_bfloat16_weights_are_the_float32_weights_rounded(tiny: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "f32", "tiny", dtype="float32")
    with open_checkpoint(tiny) as half, open_checkpoint(tmp_path / "f32") as full:
        for name in half.tensors:
            np.testing.assert_array_equal(full.read(name).astype(half.info(name).dtype), half.read(name))


def test_the_checkpoint_is_what_its_config_says(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert "lm_head.weight" not in checkpoint.tensors


def test_safetensors_reads_it_as_a_torch_file(tiny: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_summary_and_progress_tell_the_size(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    summary = synthesize(tmp_path / "out", "tiny", progress=lambda *call: calls.append(call))
    assert summary["out"] == str(tmp_path / "out")
    assert (summary["preset"], summary["seed"], summary["dtype"]) == ("tiny", 0, "bfloat16")
    assert summary["bytes"] == 2 * summary["parameters"] == calls[-1][0]
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})
    assert {total for _, total, _ in calls} == {summary["bytes"]}
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert {name for _, _, name in calls} == set(checkpoint.tensors)
        assert summary["tensors"] == len(checkpoint.tensors)


# -- weights ---------------------------------------------------------------------------------------------------


def test_matrices_have_a_falling_spectrum_and_outliers(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        weight = checkpoint.read("model.layers.1.mlp.gate_proj.weight").astype(np.float64)
    values = np.linalg.svd(weight, compute_uv=False)
    # 1/sqrt(j) over 64 columns falls 8 times; a normal matrix of this shape falls 3.7 times
    assert values[0] / values[-1] > 8
    rows = np.linalg.norm(weight, axis=1)
    assert rows.max() > 2 * np.median(rows)
    assert np.sqrt((weight**2).mean()) == pytest.approx(1 / 8, rel=0.3)  # 1/sqrt(64) and one outlier


def test_norms_scatter_around_one_and_biases_are_not_zero(small_qwen2: Path) -> None:
    with open_checkpoint(small_qwen2) as checkpoint:
        norms = np.concatenate([checkpoint.read(n) for n in checkpoint.tensors if "norm" in n]).astype(np.float64)
        biases = [n for n in checkpoint.tensors if n.endswith(".bias")]
        assert len(biases) == 2 * 3
        assert all(np.count_nonzero(checkpoint.read(name)) > 0.9 * checkpoint.info(name).shape[0] for name in biases)
    assert norms.min() > 0.2
    assert norms.max() < 5
    assert np.median(norms) == pytest.approx(1, abs=0.15)


# -- transformers ----------------------------------------------------------------------------------------------


def test_transformers_loads_it_whole_and_the_forward_is_sane(folder: Path) -> None:
    import torch
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    logits = out.logits[0]
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 5
    assert logits.argmax(-1).unique().numel() > 10
    attention = torch.stack(out.attentions)[:, 0, :, 16:]
    assert 0.05 < attention.max(-1).values.mean() < 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_shapes_of_transformers(preset: str) -> None:
    import torch
    import transformers

    raw = json.loads(json.dumps(config_json(preset)))
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    assert parameter_shapes(parse_config(raw, preset)) == {name: tuple(t.shape) for name, t in state.items()}


PUBLISHED = {  # from the config.json of Qwen/Qwen3-0.6B and Qwen/Qwen2.5-0.5B
    "qwen3-0.6b": {"hidden_size": 1024, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960},
    "qwen2.5-0.5b": {"hidden_size": 896, "num_key_value_heads": 2, "vocab_size": 151936, "num_hidden_layers": 24},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_published_sizes(preset: str) -> None:
    raw = config_json(preset)
    assert {field: raw[field] for field in PUBLISHED[preset]} == PUBLISHED[preset]


def test_transformers_loads_the_tokenizer_as_a_fast_one(folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    assert tokenizer("Aé")["input_ids"] == [0x41, 0xC3, 0xA9]
    assert tokenizer.eos_token_id == 256
    text = "  The dög.\r\n日本 🎉\t\0 ' s <|endoftext|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_a_token_is_a_byte(text: str) -> None:
    tokenizer = _tokenizer()
    if "<|endoftext|>" not in text:
        assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


_CACHE: list[Any] = []


def _tokenizer() -> Any:
    if not _CACHE:
        import tempfile

        from tokenizers import Tokenizer

        with tempfile.TemporaryDirectory() as folder:
            synthesize(Path(folder) / "out", "tiny")
            _CACHE.append(Tokenizer.from_file(f"{folder}/out/tokenizer.json"))
    return _CACHE[0]


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "dtype", "there"), [("huge", "bfloat16", "qwen3-0.6b"), ("tiny", "int8", "float32")]
)
def test_an_unknown_preset_or_dtype_is_a_usage_error_that_lists_what_exists(
    tmp_path: Path, preset: str, dtype: str, there: str
) -> None:
    with pytest.raises(UsageError, match=there):
        synthesize(tmp_path / "out", preset, dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: object) -> None:
        pytest.fail("computed before refusing")

    monkeypatch.setattr(synth, "_write_weights", computed)


@pytest.mark.usefixtures("no_work")
def test_a_folder_that_cannot_take_it_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").touch()
    for out in (tmp_path / "file", tmp_path / "full", Path("/proc/svf")):
        with pytest.raises(OutputError):
            synthesize(out, "tiny")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.usefixtures("no_work")
def test_a_full_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1_192_099_840})()  # the weights of qwen3-0.6b, and no room for the rest
    monkeypatch.setattr("stages.files.folders.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ResourceError):
        synthesize(tmp_path / "out", "qwen3-0.6b")


@pytest.mark.parametrize("step", ["_write_tokenizer", "_vector"])
def test_an_interrupted_run_leaves_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", "tiny")
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == (["model.safetensors"] if step == "_write_tokenizer" else [])
