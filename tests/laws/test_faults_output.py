"""Nothing half-written passes for a whole result: kills and full disks at every write, and two runs in one place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, Result, one_line, svf, tree

from stages.errors import InputError, OutputError, ResourceError, SvfError
from stages.files.folders import RUN_FILE, claimed, new_folder
from stages.jobs.forward_one import ForwardCommand
from stages.run.children import ChildResult, document_of, run_child
from stages.run.watch import entering, last_place

pytestmark = [pytest.mark.faults, pytest.mark.slow]
COMMANDS = {
    "replay": ("replay", "COMPONENTS", "--backend", "reference", "--select", "q_proj", "--out", "@"),
    "forward": (
        *("forward", "MODEL", "--tokens", "1,2", "--backend", "reference"),
        *("--layers", "0", "--stages", "attn_norm", "--out", "@"),
    ),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("mode", ["kill", "full"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_write_point(
    command: str, mode: str, made: Path, model: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """A run that is killed leaves no commit and is resumed to the same bytes; a full disk leaves nothing, exit 6."""
    given = {"COMPONENTS": str(made / "components"), "MODEL": str(model)}
    words = [given.get(word, word) for word in COMMANDS[command]]
    support = ROOT / "tests" / "support"
    program = [sys.executable, "-P", str(support / "write_points.py"), mode, str(tmp_path), *words]
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{support}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert points >= 12
    record_property("survived", points)


@pytest.mark.parametrize(
    "words",
    [
        ("decompose", "MODEL", "--vector", "VECTOR", "--layers", "2", "--out", "OUT"),
        ("apply", "COMPONENTS", "MODEL", "--backend", "reference", "--out", "OUT"),
    ],
)
def test_what_was_killed_is_begun_again(
    words: tuple[str, ...], made: Path, model: Path, vector: Path, tmp_path: Path
) -> None:
    """In the folder that a kill left: refused without --resume, and with it the bytes of a run in a new one."""
    given = {"MODEL": model, "VECTOR": vector, "COMPONENTS": made / "components"}
    whole, cut = ([*(given.get(w, tmp_path / name if w == "OUT" else w) for w in words)] for name in ("whole", "cut"))
    assert svf(*whole).code == 0
    with claimed(tmp_path / "cut", {}):
        shutil.copytree(tmp_path / "cut", tmp_path / "killed")
    shutil.rmtree(tmp_path / "cut")
    (tmp_path / "killed" / "half.safetensors").touch()
    (tmp_path / "killed").rename(tmp_path / "cut")
    refused = svf(*cut)
    assert refused.code == 6
    assert "--resume" in refused.error
    assert svf(*cut, "--resume").code == 0
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second is told who holds it, and the first is not disturbed."""
    with claimed(tmp_path / "x", {"of": "a"}):
        for resume in (False, True):
            with pytest.raises(OutputError) as error, claimed(tmp_path / "x", {"of": "a"}, resume=resume):
                pass
            one_line(error.value, f"process {os.getpid()}", "another run is writing here")
        assert (tmp_path / "x" / RUN_FILE).is_file()
    assert list((tmp_path / "x").iterdir()) == []


def cut_short(folder: Path) -> Path:
    """A folder as a killed run of both sides leaves it: one done, the other half written."""
    with claimed(folder, {"of": "words"}) as run:
        for name in ("torch", "jax"):
            (folder / name).mkdir()
            (folder / name / "file").touch()
        run.done["torch"] = {"n": 1}
        run.save()
        kept = (folder / RUN_FILE).read_bytes()
    (folder / RUN_FILE).write_bytes(kept)
    return folder


def test_resume_keeps_what_is_done(tmp_path: Path) -> None:
    folder = cut_short(tmp_path / "x")
    with pytest.raises(OutputError) as error, claimed(folder, {"of": "words"}):
        pass
    one_line(error.value, "--resume")
    with pytest.raises(InputError) as refused, claimed(folder, {"of": "other"}, resume=True):
        pass
    one_line(refused.value, "other options", "words")
    with claimed(folder, {"of": "words"}, resume=True) as run:
        assert run.done == {"torch": {"n": 1}}
        assert {p.name for p in folder.iterdir()} == {RUN_FILE, "torch"}


def twice(folder: Path) -> None:
    """Make a folder, and fail."""
    folder.mkdir()
    folder.mkdir()


def test_a_failure_keeps_finished_sides_alone(tmp_path: Path) -> None:
    folder = cut_short(tmp_path / "x")
    with pytest.raises(FileExistsError), claimed(folder, {"of": "words"}, resume=True):
        twice(folder / "jax")
    assert {p.name for p in folder.iterdir()} == {RUN_FILE, "torch"}
    with pytest.raises(FileExistsError), new_folder(tmp_path / "y") as new:
        twice(new / "file")
    assert not (tmp_path / "y").exists()


def forward_both(model: Path, out: Path, *more: str) -> Result:
    command = ("forward", model, "--tokens", "1,2", "--backend", "both", "--no-production", "--out", out, "--json")
    return svf(*command, *more)


@pytest.mark.long
def test_a_side_that_dies_costs_itself_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX is killed in a stage: the report names the stage, torch's dump stays, --resume runs JAX alone."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'child' in sys.argv and '\"jax\"' in open(sys.argv[-1]).read():\n"
        "    import stages.run.watch as w\n"
        "    real = w.entering\n"
        "    def entering(place):\n"
        "        real(place)\n"
        "        if place == 'layers.1.ffn_gate':\n"
        "            os.kill(os.getpid(), 9)\n"
        "    w.entering = entering\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        done = forward_both(model, tmp_path / "out")
    assert done.code == 7
    assert "jax side was killed in layers.1.ffn_gate" in done.error
    assert "torch is kept" in done.error
    assert {p.name for p in (tmp_path / "out").iterdir()} == {RUN_FILE, "torch"}
    before = (tmp_path / "out" / "torch" / "manifest.json").stat().st_mtime_ns
    again = forward_both(model, tmp_path / "out", "--resume")
    assert again.code == 0, again.err
    assert (tmp_path / "out" / "torch" / "manifest.json").stat().st_mtime_ns == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"torch", "jax"}


def test_a_side_that_hangs_is_stopped(model: Path, tmp_path: Path) -> None:
    done = forward_both(model, tmp_path / "out", "--timeout", "0.1")
    assert done.code == 7
    assert "stopped after 0.1 s (--timeout)" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("child", "kind", "words"),
    [
        (ChildResult(-signal.SIGSEGV, None, "layers.3.q_norm"), SvfError, ("crashed with SIGSEGV", "layers.3.q_norm")),
        (ChildResult(-signal.SIGKILL, None, None), ResourceError, ("was killed", "out of memory")),
        (ChildResult(-signal.SIGKILL, None, "embedding", 3.0), ResourceError, ("after 3 s", "embedding")),
        (ChildResult(3, None), SvfError, ("exit code 3",)),
    ],
)
def test_how_a_side_ended_is_said(child: ChildResult, kind: type[SvfError], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as error:
        document_of("jax", child)
    one_line(error.value, "jax", *words)


def test_the_watch_says_the_last_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w").touch()
    assert last_place(str(tmp_path / "w")) is None
    monkeypatch.setattr("stages.run.watch._Watch.fd", -1)
    monkeypatch.setenv("SVF_WATCH_FILE", str(tmp_path / "w"))
    entering("a longer name")
    entering("b")
    assert last_place(str(tmp_path / "w")) == "b"
    monkeypatch.setattr("stages.run.watch._Watch.fd", -1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Even when the parent is killed: the child would otherwise go on writing into a folder nobody waits for."""
    program = (
        "import os, subprocess, sys\n"
        "env = {**os.environ, 'SVF_WATCH_PARENT': str(os.getpid())}\n"
        "code = 'import time; from stages.run.watch import end_with_parent as e; e(); print(1, flush=True); '\n"
        "code += 'time.sleep(60)'\n"
        "child = subprocess.Popen([sys.executable, '-P', '-c', code], env=env, stdout=subprocess.PIPE)\n"
        "child.stdout.read(1)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=env, capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def start(out: Path, model: Path, watch: Path, **pipes: int) -> subprocess.Popen[bytes]:
    """`svf forward` over 300 tokens, some seconds long, that says where it is in `watch`."""
    watch.touch()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SVF_WATCH_FILE": str(watch)}
    words = ["forward", str(model), "--tokens", ",".join(["1"] * 300), "--backend", "reference", "--json"]
    # A shell's background ignores SIGINT, and so would what is started from there.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import cli; cli.app()"
    command = [sys.executable, "-P", "-c", code, "--no-progress", *words, "--out", str(out)]
    return subprocess.Popen(command, env=env, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half(number: int, code: int, model: Path, tmp_path: Path) -> None:
    """Sent in the middle of the second layer, when the first one's file is written."""
    watch = tmp_path / "watch"
    child = start(tmp_path / "out", model, watch, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not (last_place(str(watch)) or "").startswith("layers.1."):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    error = child.communicate()[1].decode()
    assert (child.returncode, len(error.splitlines())) == (code, 1), error
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_no_error(model: Path, tmp_path: Path) -> None:
    """The reader of stdout left: the dump is there, whole, and nobody is told."""
    child = start(tmp_path / "out", model, tmp_path / "watch", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait() == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.processes
def test_run_child_gives_what_a_child_printed() -> None:
    done = run_child(ForwardCommand(model="/nowhere", tokens="1", backend="reference"))
    assert (done.returncode, done.document, done.timeout) == (4, None, None)
