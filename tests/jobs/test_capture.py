"""`svf.capture` and `svf capture`: what hooks see of a right run is right, in every way of running it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from forward_models import MODELS, dumped, tokens_of, write_model
from helpers import ROOT
from helpers import svf as command

import svf
import svf_jax.production
from stages.errors import InputError, UsageError
from stages.files.source import open_model

pytestmark = pytest.mark.slow

GUIDE = ROOT / "docs" / "guides" / "capture.md"
FAMILIES = ("qwen3", "qwen2")
TOKENS = tokens_of(9)
RIGHT = {"exact", "rounding", "given"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("captured")
    return {name: write_model(folder / name, MODELS[name], "float32") for name in (*FAMILIES, "qwen3-untied")}


def loaded(checkpoint: Path, attention: str = "sdpa", dtype: str = "float32") -> Any:
    """`transformers`' own model, as its users load it."""
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(checkpoint, dtype=getattr(torch, dtype), attn_implementation=attention).eval()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def right(result: svf.Result) -> bool:
    """Whether no row fails."""
    verdicts = {row["verdict"] for row in result.rows}
    return result.outcome == "sound" and verdicts <= RIGHT and len(result.rows) > 15


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_run_is_sound(family: str, dtype: str, attention: str, checkpoints: dict[str, Path]) -> None:
    model = loaded(checkpoints[family], attention, dtype)
    with svf.capture(model) as recorded:
        model(torch.tensor([TOKENS]))
    assert recorded.tokens == [TOKENS]
    assert recorded.facts["attention"] == attention
    assert recorded.facts["weights"] == dtype
    assert right(recorded.audit())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_decode_of_a_padded_batch_is_joined_and_stripped(
    cache: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Through `generate`, as users call it: of each row the tokens that it ran, and all of them judged."""
    model = loaded(checkpoints["qwen3"])
    ids = torch.tensor([[0, 0, 0, *TOKENS[:6]], TOKENS])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = {"cache_implementation": "static"} if cache == "static" else {}
    with svf.capture(model, deep=True) as recorded:
        out = model.generate(ids, attention_mask=(ids > 0).long(), **options, **made)
    assert recorded.facts["cache"] == ("StaticCache" if cache == "static" else "DynamicCache")
    assert recorded.tokens == [out[0, 3:-1].tolist(), out[1, :-1].tolist()]
    folders = recorded.write(tmp_path / "batch")
    assert [folder.name for folder in folders] == ["0", "1"]
    for folder, tokens in zip(folders, recorded.tokens, strict=True):
        arrays = dumped(folder)
        assert len(arrays["layers.1.k_post_rope"]) == len(tokens)
        assert len(arrays["lm_head"]) == 4  # of the prompt `generate` asks for the last token's logits alone
        assert right(svf.audit(folder))


def test_a_decode_and_a_prefill_of_the_same_tokens_compare(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = [checkpoints["qwen2"], "--tokens", ",".join(map(str, TOKENS))]
    done = command("capture", *words, "--generate", 3, "--deep", "--out", tmp_path / "decode", "--json")
    assert done.code == 0, done.err
    tokens = ",".join(map(str, [*TOKENS, *done.json["generated"][0]]))
    both = ("--beside", "1,2,3", "--deep", "--attention", "eager")
    assert command("capture", words[0], "--tokens", tokens, *both, "--out", tmp_path / "prefill").code == 0
    diff = command("diff", tmp_path / "decode", tmp_path / "prefill" / "0", "--json")
    assert (diff.code, diff.json["outcome"]) == (0, "agree")
    assert not any(diff.json["lacks"].values())
    found = {row["key"]: row for row in diff.json["rows"]}
    assert {row["first_position"] for row in found.values()} == {None}
    assert found["embedding"]["first_difference"] is None
    assert "first position" not in diff.json["verdict"]


def test_the_first_position_that_differs_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A decode whose positions are 3 too many from token 6 on, against a prefill of the same tokens."""
    model = loaded(checkpoints["qwen3"])
    with svf.capture(model, deep=True) as recorded:
        model(torch.tensor([TOKENS]), use_cache=False)
    recorded.write(tmp_path / "prefill")
    cache = transformers.DynamicCache(config=model.config)
    with svf.capture(model, deep=True) as recorded:
        model(torch.tensor([TOKENS[:4]]), past_key_values=cache)
        for n in range(4, len(TOKENS)):
            position = torch.tensor([[n + 3 * (n >= 6)]])
            model(torch.tensor([TOKENS[n : n + 1]]), past_key_values=cache, position_ids=position)
    recorded.write(tmp_path / "decode")
    found = svf.diff(tmp_path / "prefill", tmp_path / "decode")
    assert found.outcome == "diverged"
    assert "The first position that differs by more than rounding is 6" in found.verdict
    assert {row["first_position"] for row in found.rows} == {None, 6}


def test_padding_on_the_right_is_left_out(checkpoints: dict[str, Path]) -> None:
    model = loaded(checkpoints["qwen2"])
    ids = torch.tensor([[*TOKENS[:5], 0, 0, 0, 0], TOKENS])
    with svf.capture(model) as recorded:
        model(ids, attention_mask=(ids > 0).long())
    assert recorded.tokens == [TOKENS[:5], TOKENS]
    assert right(recorded.audit(0))
    assert right(recorded.audit(1))


def test_a_compiled_model_is_recorded_inside_its_one_graph(checkpoints: dict[str, Path]) -> None:
    """`fullgraph`: a hook that broke the graph would be an error. What was compiled before is compiled again."""
    model = loaded(checkpoints["qwen3"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids=torch.tensor([TOKENS]), use_cache=False)
    with svf.capture(compiled, deep=True) as recorded:
        compiled(input_ids=torch.tensor([TOKENS]), use_cache=False)
    assert recorded.facts["compiled"] == "True"
    assert right(recorded.audit())


def test_a_model_made_in_memory_is_written_beside_its_dump(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**{**MODELS["qwen3"].raw("float32"), "num_hidden_layers": 1})
    model = transformers.Qwen3ForCausalLM(config).eval()
    with svf.capture(model) as recorded:
        model(torch.tensor([TOKENS]))
    (folder,) = recorded.write(tmp_path / "dump")
    assert (folder / "model" / "model.safetensors").is_file()
    assert right(svf.audit(folder))
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    with svf.capture(model) as recorded:
        model(torch.tensor([TOKENS]))
    found = recorded.audit()
    assert found.outcome == "faulty"
    assert found.culprit is not None
    assert found.culprit["stage"] == "ffn_silu"


def test_what_a_later_operation_overwrites_is_kept_as_it_was(checkpoints: dict[str, Path]) -> None:
    model = loaded(checkpoints["qwen3"])

    def overwrite(_module: Any, args: Any, _out: Any) -> None:
        args[0].zero_()

    model.model.layers[0].mlp.down_proj.register_forward_hook(overwrite)
    with svf.capture(model) as recorded:
        model(torch.tensor([TOKENS]))
    (sequence,) = recorded._record.sequences()
    assert np.any(sequence.arrays[0, "ffn_swigl"])
    assert right(recorded.audit())


@pytest.mark.cover(1)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3-untied"])
def test_our_nnx_model_is_sound(family: str, compiled: bool, checkpoints: dict[str, Path]) -> None:
    with open_model(checkpoints[family]) as checkpoint:
        model = svf_jax.production.load_model(checkpoint.config, checkpoint)
    with svf.capture(model, source=checkpoints[family]) as recorded:
        called = nnx.jit(lambda model, tokens: model(tokens)) if compiled else lambda model, tokens: model(tokens)
        for tokens in (TOKENS, TOKENS[:4]):
            called(model, np.array(tokens, np.int32))
    assert recorded.facts["compiled"] == str(compiled)
    assert recorded.tokens == [TOKENS, TOKENS[:4]]
    assert right(recorded.audit(0))
    assert right(recorded.audit(1))


def test_nothing_stays_on_the_model(checkpoints: dict[str, Path]) -> None:
    model = loaded(checkpoints["qwen3"])
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(interface._local_mapping)
    with svf.capture(model, deep=True):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert interface._local_mapping == before
    with open_model(checkpoints["qwen3"]) as checkpoint:
        ours = svf_jax.production.load_model(checkpoint.config, checkpoint)
    call = type(ours).__call__
    with svf.capture(ours, source=checkpoints["qwen3"]):
        assert type(ours).__call__ is not call
    assert type(ours).__call__ is call
    assert "svf_captured_as" not in vars(ours)


def test_what_cannot_be_captured_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(checkpoints["qwen3"])
    with pytest.raises(TypeError, match="got list"), svf.capture([]):
        pass
    with svf.capture(model) as recorded:
        pass
    with pytest.raises(InputError, match="nothing was captured"):
        recorded.audit()
    with pytest.raises(InputError, match="without input_ids"), svf.capture(model):
        model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
    narrow = torch.autocast("cpu", dtype=torch.bfloat16)
    with pytest.raises(InputError, match="autocast computes products in bfloat16"), narrow, svf.capture(model):
        model(torch.tensor([TOKENS]))
    cache = model(torch.tensor([TOKENS])).past_key_values
    with pytest.raises(InputError, match="begin the capture before the prefill"), svf.capture(model):
        model(torch.tensor([TOKENS[:1]]), past_key_values=cache)
    with pytest.raises(InputError, match="no module of this model"), svf.capture(_Odd()):
        pass
    with open_model(checkpoints["qwen3"]) as checkpoint:
        ours = svf_jax.production.load_model(checkpoint.config, checkpoint)
    with pytest.raises(UsageError, match="deep"), svf.capture(ours, source=checkpoints["qwen3"], deep=True):
        pass
    folder = checkpoints["qwen3"]
    for words, code in (
        ((folder, "--out", folder), 6),
        ((folder, "--tokens", "1,999", "--out", tmp_path / "x"), 2),
        ((folder, "--engine", "nnx", "--kv-cache", "static", "--out", tmp_path / "x"), 2),
        ((folder, "--attention", "flash_attention_2", "--out", tmp_path / "x"), 4),
        ((tmp_path / "none", "--out", tmp_path / "x"), 4),
    ):
        assert command("capture", *words).code == code, words


class _Odd(torch.nn.Module):
    """A model with the config of a Qwen3, and modules of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.Qwen3Config(**MODELS["qwen3"].raw("float32"))
        self.blocks = torch.nn.Linear(2, 2)


def test_the_guide_says_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    write_model(tmp_path / "MODEL", MODELS["qwen3"], "float32")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), space)
    assert command("audit", "captured").code == 0
