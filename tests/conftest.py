"""What the replay tests share, made once per session: a tiny model, its bundles, the backends, the golden folder."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import hypothesis
import pytest
import shapes  # noqa: F401  (before the stage functions that it checks)
from helpers import GATE, ROOT

from stages.commands.backends import BACKENDS, load_backend
from stages.files.selection import Selection, select_by_rule
from stages.jobs.builtin import LAYER, router_vector, write_vector
from stages.jobs.decompose import FLOAT64, decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.jobs.synth import config_json, synthesize
from stages.spec.backend import Backend
from stages.spec.families import parameter_shapes, parse_config

# Before a library is imported: threads of OpenMP and OpenBLAS that spin while they wait take the processor from the
# other worker of `pytest -n 2` (a loop of small products on two busy cores: 81 s, and 15 s without spinning). They
# change no bit.
for variable, value in (("GOMP_SPINCOUNT", "0"), ("KMP_BLOCKTIME", "0"), ("OPENBLAS_THREAD_TIMEOUT", "4")):
    os.environ.setdefault(variable, value)
# Documents that are compared whole are of one minute, whenever it ends.
os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(time.time())))
# Processes that tests start find our modules compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


MEMORY = Path("/dev/shm")


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files in memory where there is room: no test waits for a disk. What XLA compiles is kept for the
    session, for all workers and the processes that they start."""
    if hasattr(config, "workerinput"):
        return
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 * 2**30:  # the tests need less than 2 GiB
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
        os.environ.setdefault("TMPDIR", str(MEMORY))
    kept = tempfile.TemporaryDirectory(prefix="svf-tests-", dir=os.environ.get("TMPDIR"))
    config.add_cleanup(kept.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = kept.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `cover(n)`, what the cases of `make test` leave out is marked `thorough`.

    Tests marked `long` come first, so that in the end no worker is alone with one.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    marked: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("cover"):
            marked.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in marked.values():
        (strength,) = cases[0].get_closest_marker("cover").args
        kept = covering(
            [{name: repr(value) for name, value in case.callspec.params.items()} for case in cases], strength
        )
        for number, case in enumerate(cases):
            if number not in kept:
                case.add_marker("thorough")


def covering(cases: list[dict[str, str]], strength: int) -> set[int]:
    """A few of the cases in which any `strength` values of different parameters that meet in one meet too."""
    meetings = [set(itertools.combinations(sorted(case.items()), strength)) for case in cases]
    wanted, kept, used = set().union(*meetings), set[int](), Counter[tuple[str, str]]()
    while wanted:
        # The most that is new; of equals that whose values were used least, so that none stands for all.
        best = max(
            range(len(cases)), key=lambda n: (len(meetings[n] & wanted), -sum(used[v] for v in cases[n].items()))
        )
        kept.add(best)
        wanted -= meetings[best]
        used.update(cases[best].items())
    return kept


def pytest_collection_finish() -> None:
    """What is there by now stays: looking through it for garbage took a tenth of the processor time."""
    gc.collect()
    gc.freeze()


# A machine under load is slow, not wrong.
hypothesis.settings.register_profile("svf", deadline=None)
hypothesis.settings.load_profile("svf")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With `-m faults`: how many faults of each test file were survived. A test counts as one unless it says more."""
    if terminalreporter.config.getoption("-m") != "faults":
        return
    counts: dict[str, int] = {}
    for report in terminalreporter.getreports("passed"):
        file = Path(report.nodeid.partition("::")[0]).name
        counts[file] = counts.get(file, 0) + int(dict(report.user_properties).get("survived", 1))
    for file, count in sorted(counts.items()):
        terminalreporter.write_line(f"{count:6} {file}")
    failed = len(terminalreporter.getreports("failed"))
    terminalreporter.write_line(f"{sum(counts.values())} faults tried and survived, {failed} tests failed")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test writes into the user's cache."""
    os.environ["SVF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def _forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    program, servers = forked.start(tmp_path_factory.mktemp("forked"))
    yield program
    for server in servers:
        server.communicate()


@pytest.fixture(autouse=True)
def _quick_children(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands' child processes are forked, but in tests marked `processes`, which are about processes."""
    if request.node.get_closest_marker("processes") is None:
        monkeypatch.setattr(sys, "executable", str(request.getfixturevalue("_forked")))


@pytest.fixture(scope="session", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend of the command line's table, on the CPU."""
    return load_backend(request.param, "cpu")


@pytest.fixture(scope="session")
def torch_backend() -> Backend:
    return load_backend("torch", "cpu")


@pytest.fixture(scope="session")
def jax_backend() -> Backend:
    return load_backend("jax", "cpu")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="session")
def model(workplace: Path) -> Path:
    """The tiny checkpoint."""
    synthesize(workplace / "model", "tiny")
    return workplace / "model"


@pytest.fixture(scope="session")
def selection() -> Selection:
    """What the rule selects of the tiny model at layer 2: nine tensors, 576 offsets."""
    return select_by_rule(parameter_shapes(parse_config(config_json("tiny"), "tiny")), (LAYER,))


@pytest.fixture(scope="session")
def vector(workplace: Path) -> Path:
    """A router vector for that selection."""
    write_vector(workplace / "router.npy", router_vector("tiny", (LAYER,)))
    return workplace / "router.npy"


def manifest_of(selection: Selection) -> dict:
    """The reference manifest that says what `selection` says, with a historical hash nobody reaches."""
    return {
        "selected_tensor_count": len(selection.tensors),
        "selected_tensors": [
            {
                "source_name": t.source_name,
                "elixir_name": t.elixir_name,
                "shape": list(t.shape),
                "singular_values": t.singular_values,
                "offset_start": t.offset_start,
                "offset_end": t.offset_end,
            }
            for t in selection.tensors
        ],
        "sample_adapted_tensor": {
            "source_name": GATE,
            "source_shape": [192, 64],
            "sample_reconstructed_shape": [64, 192],
            "sample_reconstructed_bf16_sha256": "0" * 64,
        },
    }


@pytest.fixture(scope="session")
def manifest(workplace: Path, selection: Selection) -> Path:
    path = workplace / "reference_manifest.json"
    path.write_text(json.dumps(manifest_of(selection)))
    return path


@pytest.fixture(scope="session")
def made(workplace: Path, model: Path, vector: Path, manifest: Path, torch_backend: Backend) -> Path:
    """A folder with `components/` (all selected), `sample/` (the sample alone) and their reference reports."""
    for name, everything in (("components", True), ("sample", False)):
        report = workplace / f"{name}.json"
        options = DecomposeOptions(str(model), vector, manifest, (), workplace / name, report, everything)
        decompose(options, FLOAT64, torch_backend)
    return workplace


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the all-selected bundle, to be damaged."""
    return Path(shutil.copytree(made / "components", tmp_path / "bundle"))


@pytest.fixture
def sample_bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the sample-only bundle, to be damaged."""
    return Path(shutil.copytree(made / "sample", tmp_path / "sample-bundle"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Real files of the original tool, in a folder of the project's machines."""
    for place in (os.environ.get("SVF_GOLDEN"), ROOT.parent / "shared" / "golden"):
        if place and (Path(place) / "trinity-tiny").is_dir():
            return Path(place)
    pytest.skip("no golden files: neither $SVF_GOLDEN nor ../shared/golden is a folder with trinity-tiny")
