"""The command line: help, exit codes, one line per error, one document per --json, and no framework until needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import typer.main
from helpers import GATE, K_PROJ, MODULES, Result, fresh, svf, with_json, with_tensors

import cli
from stages.files.bundle import ALL_STAGES_FILE, COMPONENTS_FILE, MANIFEST_FILE, component_keys, tensor_stage_key
from stages.jobs import builtin as defaults

GROUP: Any = typer.main.get_command(cli.app)
COMMANDS = sorted(name for name, command in GROUP.commands.items() if not command.hidden)


@pytest.fixture(scope="session", autouse=True)
def _default(made: Path, model: Path, vector: Path) -> None:
    """The built-in default, put together from what the session has already made: the command would do the same."""
    target = defaults.cache_folder() / f"default-{defaults._VERSION}"
    if not target.exists():
        target.mkdir(parents=True)
        shutil.copytree(model, target / "model")
        shutil.copy(vector, target / "router_vector.npy")
        shutil.copytree(made / "components", target / "components")
        shutil.copy(made / "components.json", target / "reference.json")


# Help.


def test_the_commands_of_the_issue_are_there() -> None:
    assert {"synth", "decompose", "replay", "forward", "diff", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_says_what_it_does(command: str) -> None:
    done = svf(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"svf {command}" in done.out.partition("Example")[2]
    assert svf(command, "-h").out == done.out


def test_the_help_tells_the_exit_codes() -> None:
    text = " ".join(svf("--help").out.split())
    for part in ("0 agree", "1 diverged", "2 usage", "3 input", "4 not found", "5 nothing", "6 output", "7 resource"):
        assert part in text


@pytest.mark.parametrize(("command", "flags"), [
    ("synth", "--preset --seed --dtype"),
    ("decompose", "--vector --manifest --layers --out --report --svd --svd-weights --all-selected-tensors "
                  "--decompose-all-selected-if-missing"),
    ("replay", "--backend --layout --model --reference-report --python-report --source-from-stage --select "
               "--all-selected-tensors --selected-source-filter --chunk-rows --dump --out --report --device --json "
               "--components"),
    ("forward", "--tokens --tokens-file --prompt --backend --layers --stages --positions --dtype --adapted --layout "
                "--repeat --generate --production --no-production --out --format --device --jit --json"),
    ("diff", "--model --top --strict-stage-tolerances --strict-current-python --strict-reference --json"),
])  # fmt: skip
def test_the_options_of_the_issue_are_there(command: str, flags: str) -> None:
    params = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    options = {o for p in params for o in (*p.opts, *p.secondary_opts)}
    assert set(flags.split()) <= options


# No framework until a command needs it.

LOADED = """
import runpy, sys
sys.argv = ["svf", *sys.argv[1:]]
code = 0
try:
    {what}
except SystemExit as end:
    code = end.code
heavy = {{"torch", "jax", "jaxlib", "flax", "transformers"}}
print("LOADED", code or 0, *sorted({{name.split(".")[0] for name in sys.modules}} & heavy))
"""


def loaded(what: str, *arguments: object) -> str:
    done = fresh(LOADED.format(what=what), *arguments)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert lines, done.stderr
    return lines[-1]


def test_the_command_line_and_every_stage_module_load_neither_torch_nor_jax() -> None:
    assert loaded("import cli, stages") == "LOADED 0"
    assert len(MODULES) > 150
    assert loaded("import " + ", ".join(MODULES)) == "LOADED 0"


def test_commands_on_files_load_neither(made: Path, tmp_path: Path) -> None:
    run = 'runpy.run_module("cli", run_name="__main__")'
    assert loaded(run, "--help") == "LOADED 0"
    assert loaded(run, "replay", "--help") == "LOADED 0"
    bundle = made / "components"
    assert loaded(run, "--no-progress", "diff", bundle, bundle) == "LOADED 0"
    assert loaded(run, "--no-progress", "synth", tmp_path / "tiny", "--preset", "tiny") == "LOADED 0"


def test_that_test_can_fail() -> None:
    assert loaded("import svf_torch.backend") != "LOADED 0"
    assert "jax" in loaded("import svf_jax.backend").split()


# Exit codes. Each documented one is reached by a command.


@pytest.fixture
def other(bundle: Path) -> Path:
    """The bundle with one recorded value changed."""
    key = tensor_stage_key(GATE, "matmul_pre_norm")
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.update({key: t[key] + np.float32(0.01)}))
    return bundle


def line_of(done: Result, code: int, *words: str) -> None:
    assert done.code == code, (done.code, done.err, done.out[-500:])
    assert done.out == ""
    error = done.error
    for word in words:
        assert word in error, error


def test_0_and_1(made: Path, other: Path) -> None:
    assert svf("diff", made / "components", made / "components").code == 0
    assert svf("diff", made / "components", other).code == 1


@pytest.mark.parametrize("arguments", [
    ["replay", "--layout", "hv"],
    ["replay", "--backend", "tensorflow"],
    ["replay", "--nonsense"],
    ["nonsense"],
    ["replay", "a", "b"],
    ["diff"],
    ["diff", "a", "b", "--top", "-1"],
    ["replay", "--chunk-rows", "x"],
    ["synth", "x", "--preset", "huge"],
], ids=" ".join)  # fmt: skip
def test_2_a_command_that_does_not_exist_in_one_line(arguments: list[str]) -> None:
    line_of(svf(*arguments), 2)


def test_2_names_what_there_is() -> None:
    line_of(svf("replay", "--layout", "hv"), 2, "hv", "torch_v", "vh", "nx")
    line_of(svf("replay", "--backend", "tensorflow"), 2, "tensorflow", "torch", "jax", "reference")


def test_2_a_filter_that_matches_nothing(made: Path) -> None:
    for flag in ("--select", "--selected-source-filter"):
        done = svf("replay", made / "components", "--backend", "reference", flag, "nothing")
        line_of(done, 2, "matches none", GATE)


def test_2_options_that_do_not_fit_together(made: Path, tmp_path: Path) -> None:
    replay = ["replay", made / "components", "--backend", "reference"]
    line_of(svf(*replay, "--dump", "full"), 2, "--out")
    line_of(svf(*replay, "--chunk-rows", 15), 2, "--chunk-rows 15", "16")
    line_of(svf(*replay, "--strict-reference"), 2, "--reference-report")
    line_of(svf(*replay, "--strict-current-python"), 2, "--reference-report")
    line_of(svf(*replay, "--report", tmp_path / "none" / "r.json"), 6, "r.json")
    line_of(svf("replay", made / "components", "--report", tmp_path / "r.json"), 2, "--report")
    line_of(svf("replay", made / "components", "--backend", "torch", "--device", "nowhere"), 2, "nowhere")


def test_3_a_square_v_with_a_contradicted_label(bundle: Path) -> None:
    key = component_keys(K_PROJ)["v"]
    with_tensors(bundle / COMPONENTS_FILE, lambda t: t.update({key: t[key].T}))
    line_of(svf("replay", bundle, "--backend", "reference"), 3, K_PROJ, "component_v_layout")


def test_3_all_selected_without_their_stages(made: Path) -> None:
    done = svf("replay", made / "sample", "--backend", "reference", "--all-selected-tensors")
    line_of(done, 3, "--all-selected-tensors", "svf decompose")


def test_4_and_6(made: Path, tmp_path: Path) -> None:
    line_of(svf("replay", tmp_path / "none"), 4)
    line_of(svf("diff", tmp_path / "none", tmp_path / "none"), 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    done = svf("replay", made / "components", "--backend", "reference", "--out", tmp_path / "full")
    line_of(done, 6, "not empty")
    line_of(svf("synth", tmp_path / "full"), 6, "not empty")
    (tmp_path / "file").write_text("")
    line_of(svf("synth", tmp_path / "file" / "x"), 6, "cannot be written")


def test_5_nothing_to_compare(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "components" / ALL_STAGES_FILE, tmp_path / "a.safetensors")
    shutil.copy(made / "components" / ALL_STAGES_FILE, tmp_path / "b.safetensors")
    key = tensor_stage_key(GATE, "u_scaled")
    with_tensors(tmp_path / "b.safetensors", lambda t: t.update({key: t[key] + np.float32(1e-3)}))
    assert svf("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors").code == 5


def test_7_no_room(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.files import folders as output

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=10))
    done = svf("replay", made / "components", "--backend", "reference", "--out", tmp_path / "out")
    line_of(done, 7, "10 bytes")


def test_7_no_memory_and_70_anything_else(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.judge import diff as diff_job

    sides = (made / "components", made / "components")

    def raising(error: BaseException):
        def diff_any(*args, **kwargs):
            raise error

        return diff_any

    for error, code, word in ((MemoryError(), 7, "out of memory"), (RuntimeError("oops"), 70, "--debug")):
        monkeypatch.setattr(diff_job, "diff_any", raising(error))
        line_of(svf("diff", *sides), code, word)
    assert "Traceback" in svf("--debug", "diff", *sides).err
    monkeypatch.setattr(diff_job, "diff_any", raising(KeyboardInterrupt()))
    interrupted = svf("diff", *sides)
    assert interrupted.code == 130
    assert interrupted.err in ("", "svf: interrupted\n")


def test_a_failed_replay_leaves_no_dump(bundle: Path, tmp_path: Path) -> None:
    key = component_keys(K_PROJ)["u"]

    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[key][40, 3] = np.nan

    with_tensors(bundle / COMPONENTS_FILE, poison)
    line_of(svf("replay", bundle, "--backend", "reference", "--out", tmp_path / "out"), 3, "[40, 3]")
    assert not list(tmp_path.glob("out/*"))


# Results on stdout, one document with --json.


@pytest.mark.parametrize("backend", ["reference", "torch", "jax"])
def test_json_is_one_document_and_a_table_says_the_verdict(made: Path, backend: str) -> None:
    command = ["replay", made / "components", "--backend", backend, "--select", "k_proj"]
    done = svf(*command, "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["schema"], done.json["outcome"]) == ("svf.diff/1", "agree")
    table = svf(*command)
    assert table.code == 0
    assert "AGREE" in table.out
    assert "matmul_pre_norm" in table.out


def test_the_other_documents(made: Path, tmp_path: Path) -> None:
    assert svf("synth", tmp_path / "m", "--json").json["schema"] == "svf.synth/1"
    document = svf("diff", made / "components", made / "components", "--json").json
    assert document["schema"] == "svf.diff/1"
    assert document.keys() >= {"outcome", "culprit", "rows", "coverage", "a", "b", "gates", "verdict"}


# The commands of the issue.


def test_the_default_needs_no_source_and_says_so_on_stderr() -> None:
    done = svf("replay", "--backend", "jax", "--layout", "torch_v", "--json", progress=True)
    assert done.code == 0
    assert "built-in" in done.err
    assert (done.json["outcome"], done.json["coverage"]["compared"]) == ("agree", 90)


@pytest.mark.parametrize("backend", ["torch", "jax", "reference"])
def test_a_wrong_layout_diverges_and_names_its_zero_offset_error(backend: str) -> None:
    done = svf("replay", "--backend", backend, "--layout", "vh", "--select", "k_proj", "--json")
    assert (done.code, done.json["outcome"]) == (1, "diverged")
    (row,) = done.json["layouts"]
    assert (row["layout"], row["fits"]) == ("vh", False)
    assert row["relative"] > 0.1 > row["bound"]
    # A V that is not square does not even fit.
    done = svf("replay", "--backend", backend, "--layout", "vh", "--select", "down_proj", "--json")
    assert done.code == 1
    assert {r["verdict"] for r in done.json["rows"]} == {"shape"}


@pytest.mark.parametrize("layout", ["nx", "vh"])
def test_a_bundle_that_stores_vh_is_replayed_as_vh(bundle: Path, layout: str) -> None:
    with_tensors(bundle / COMPONENTS_FILE, lambda t: [t.update({k: t[k].T}) for k in list(t) if k.startswith("svd.V.")])
    with_json(bundle / MANIFEST_FILE, lambda m: [e.update(component_v_layout=layout) for e in m["selected_tensors"]])
    done = svf("replay", bundle, "--backend", "torch", "--json")
    assert (done.code, done.json["outcome"]) == (0, "agree")
    assert {row["layout"] for row in done.json["layouts"]} == {layout}


def test_both_backends_and_all_layouts_with_no_more_arguments(tmp_path: Path) -> None:
    """In processes of their own, from a folder with a cli.py that must not be what runs."""
    (tmp_path / "cli.py").write_text("raise SystemExit(99)")
    code = 'import os, runpy, sys; os.chdir(sys.argv.pop(1)); runpy.run_module("cli", run_name="__main__")'
    done = fresh(code, tmp_path, "replay", "--backend", "both", "--layout", "all", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["outcome"], document["coverage"]["compared"]) == ("agree", 90)
    for layout, right in (("torch_v", True), ("nx", False), ("vh", False)):
        assert {r["fits"] for r in document["layouts"] if r["layout"] == layout} == {right}
    assert "Traceback" not in done.stderr


def test_both_writes_two_dumps_that_diff_alike(made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--select", "k_proj", "--out", tmp_path / "out", "--json"]
    done = svf(*command, "--strict-current-python")
    assert done.code in (0, 1)
    assert done.json["gates"].keys() == {"strict_current_python"}
    again = svf("diff", tmp_path / "out" / "torch", tmp_path / "out" / "jax", "--json")
    assert again.code == 0
    assert [r["max_abs"] for r in again.json["rows"]] == [r["max_abs"] for r in done.json["rows"]]


def test_a_chunked_replay_reports_its_chunks(made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--backend", "torch", "--select", "embed", "--json"]
    whole = svf(*command, "--out", tmp_path / "whole").json
    done = svf(*command, "--chunk-rows", 100, "--out", tmp_path / "chunks", "--report", tmp_path / "r.json")
    assert done.code == 0
    assert [r["sha256_b"] for r in done.json["rows"]] == [r["sha256_b"] for r in whole["rows"]]
    checks = json.loads((tmp_path / "r.json").read_text())["large_tensor_chunk_checks"]
    # 512 rows: the tail of 12 joins the chunk before it.
    assert [(c["row_start"], c["row_end"]) for c in checks] == [
        (0, 100),
        (100, 200),
        (200, 300),
        (300, 400),
        (400, 512),
    ]
    assert all(c["stage_debug"]["functional_parity_passed"] and len(c["checks"]) >= 7 for c in checks)
    for file in ("model.safetensors", "manifest.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "chunks" / file).read_bytes()


def test_a_forward_on_both_backends_with_no_more_arguments() -> None:
    done = svf("forward", "--backend", "both", "--json", progress=True)
    assert done.code == 0, done.err
    document = done.json
    assert (document["schema"], document["kind"], document["outcome"]) == ("svf.diff/1", "forward", "agree")
    assert (document["coverage"]["compared"], document["tokens"]) == (83, 8)  # 7 of the model, 19 of each of 4 layers
    for letter, name in (("a", "torch"), ("b", "jax")):
        run = document[letter]["run"]
        assert (run["schema"], run["backend"], run["production"]["agrees"]) == ("svf.forward/1", name, True)
        assert document[letter]["source"] == f"{name} forward"
    assert "built-in" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_forward_prints_one_document_or_what_a_person_reads(model: Path, backend: str) -> None:
    command = ["forward", model, "--tokens", "1,2,3", "--backend", backend]
    done = svf(*command, "--json")
    assert (done.code, done.err, done.json["schema"]) == (0, "", "svf.forward/1")
    table = svf(*command)
    assert table.code == 0
    assert f"Next token {done.json['next_token']}" in table.out
    assert "production model" in table.out


def test_synth_overwrites_no_router_vector(tmp_path: Path) -> None:
    (tmp_path / "router.npy").write_bytes(b"mine")
    done = svf("synth", tmp_path / "m", "--vector", tmp_path / "router.npy", "--layers", "2")
    assert done.code == 6
    assert "exists" in done.error
    assert not (tmp_path / "m").exists()
