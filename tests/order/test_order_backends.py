"""Probing the real backends: the order that was revealed, evaluated step by step, gives the backend's own bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from cli import app
from stages.commands.backends import load_backend
from stages.errors import InputError, NotFoundError, UsageError
from stages.files import cache
from stages.jobs import probe as probe_run
from stages.jobs.replay_one import ReplayCommand, ReplayJob
from stages.judge.diff import diff_recorded
from stages.judge.forward_diff import diff_forward
from stages.order import black_boxes as boxes
from stages.order.explain import explain_recorded
from stages.order.infer_recorded import infer_recorded
from stages.order.ordered_backend import BLOCKED, NATIVE, STEPPED, OrderedBackend, with_order
from stages.order.probe import ProductProbe, total
from stages.order.resolve import orders_for, orders_of
from stages.progress import Progress
from stages.run.calibration import cpu_model, facts_of
from stages.show import console as render
from stages.spec.backend import Backend
from stages.sums.evaluate import Sum, evaluate, product
from stages.sums.orders import lower
from stages.sums.text import parse_order

pytestmark = pytest.mark.slow

SHAPES = {
    "matmul_pre_norm (torch_v)": ((32, 48, 400), (20, 24, 40)),
    "matmul_pre_norm (vh, nx)": ((32, 48, 400),),
    "lm_head": ((1, 64, 256), (5, 64, 256)),
    "attn_scores": ((16, 16, 64),),
    "attention": ((16, 32, 16),),
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture(scope="module", params=["torch_backend", "jax_backend"])
def framework(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.getfixturevalue(request.param)
    return backend


def test_every_kind_of_product_is_tried() -> None:
    assert set(SHAPES) == set(boxes.PRODUCTS)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_probed_product_is_reproduced(framework: Backend, name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    box = boxes.PRODUCTS[name](framework)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    got = box(a, b)
    regions = ProductProbe(box, shape).regions()
    assert sum(region.elements for region in regions) == m * n
    if len(regions) == 1:
        np.testing.assert_array_equal(product(regions[0].order, a, b), got)
        return
    for region in regions:
        start, stop = map(int, region.rows.split(":"))
        np.testing.assert_array_equal(product(region.order, a[start:stop], b), got[start:stop])


@pytest.mark.parametrize("size", [64, 100, 300])
def test_a_probed_sum_is_reproduced(framework: Backend, size: int) -> None:
    box = boxes.total(framework)
    order = total(box, size)
    rows = np.random.default_rng(1).standard_normal((20, size), np.float32)
    got = np.float32([box(terms) for terms in rows])
    np.testing.assert_array_equal(evaluate(order, Sum(rows)), got)
    assert (evaluate(parse_order("right"), Sum(rows)) != got).any()


def test_the_original_tools_recorded_bytes_are_explained(golden: Path) -> None:
    document = infer_recorded(golden / "trinity-tiny" / "python_components", rows=32)
    assert document["outcome"] == "complete"
    assert {row["order"] for row in document["rows"] if row["stage"] == "matmul_pre_norm"} == {"fma"}
    (ratio,) = (row for row in document["rows"] if row["stage"] == "normalization")
    assert (ratio["elements"], ratio["also_fit"]) == (9, 0)
    made = lower(parse_order(ratio["order"]), 64).tree()
    assert made == lower(parse_order("lanes(8, lanes(4, left, left), left)"), 64).tree()


def test_a_recorded_replay_with_a_changed_byte_is_not_explained(made: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = made / "components" / "trinity_svf_all_selected_stage_debug.safetensors"
    tensors = load_file(source)
    name = next(key for key in tensors if key.endswith(".matmul_pre_norm"))
    tensors[name][0, 0] = np.nextafter(tensors[name][0, 0], np.float32(9))
    save_file(tensors, tmp_path / "stages.safetensors")
    document = infer_recorded(tmp_path / "stages.safetensors", components=made / "components", rows=16)
    wrong = [row for row in document["rows"] if row["remaining"]]
    assert document["outcome"] == "incomplete"
    assert [(row["stage"], row["remaining"]) for row in wrong] == [("matmul_pre_norm", 1)]


def test_a_dump_has_the_orders_that_were_probed(
    torch_backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVF_CACHE", str(tmp_path))
    assert "accumulation" not in facts_of(torch_backend)
    key = cache.identity("torch", "cpu", cache.threads_available(), cpu_model())
    cache.store(key, {"summary": "products: fma"})
    assert facts_of(torch_backend)["accumulation"] == "products: fma"
    monkeypatch.setenv("XLA_FLAGS", "--other")
    assert "accumulation" not in facts_of(torch_backend)


def test_infer_loads_no_framework(made: Path) -> None:
    code = (
        "import sys, cli\n"
        f"try: cli.app(['--no-progress', 'infer', {str(made / 'components')!r}, '--rows', '16', '--json'])\n"
        "except SystemExit as done: code = done.code\n"
        "assert code == 0, code\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "complete"


def test_the_commands_are_there() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {"probe", "infer"} <= names


def replay(bundle: Path, backend: Backend, order: str, out: Path | None = None) -> dict:
    """A replay of a bundle in an order, checked against its recorded stages."""
    orders = orders_for(order, backend=backend.name, components=bundle, device="cpu", progress=Progress(False))
    options = ReplayCommand(bundle, dump="full" if out else "none", out=out, verdicts=False)
    with ExitStack() as stack:
        job = ReplayJob(options, stack)
        return job.run(with_order(backend, orders, order)).document


@pytest.mark.parametrize("where", ["golden", "made"])
def test_jax_has_torchs_recorded_bytes_in_the_inferred_order(
    where: str, jax_backend: Backend, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(where)
    bundle = folder / "trinity-tiny" / "python_components" if where == "golden" else folder / "components"
    plain, ordered = replay(bundle, jax_backend, "native"), replay(bundle, jax_backend, "inferred")
    assert not all(row["byte_match"] for row in plain["rows"])
    assert all(row["byte_match"] for row in ordered["rows"])
    assert len(ordered["rows"]) == 90
    assert {row["how"] for row in ordered["orders"]} == {"blocks", "sum"}


def test_torch_has_jaxs_bytes_in_the_order_that_was_probed(
    made: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    replay(made / "components", jax_backend, "native", tmp_path / "jax")
    replay(made / "components", torch_backend, "jax", tmp_path / "torch")
    rows = diff_recorded(tmp_path / "jax", tmp_path / "torch")["rows"]
    assert len(rows) == 90
    assert all(row["byte_match"] for row in rows)


def test_an_order_that_no_kernel_keeps_is_taken_step_by_step(framework: Backend) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 300), np.float32), rng.standard_normal((300, 24), np.float32)
    hows = {"blocks(100, fma, right)": BLOCKED, "blocks(100, left, left)": STEPPED, "right": STEPPED}
    for text, how in hows.items():
        order = parse_order(text)
        backend = OrderedBackend(framework, {("matmul_pre_norm", 300): order}, "test")
        got = backend.get(backend.product("matmul_pre_norm", backend.put(a), backend.put(b)))
        np.testing.assert_array_equal(got, product(order, a, b))
        assert backend.how == {("matmul_pre_norm", 300): how}


def test_a_kernel_that_breaks_the_order_is_found_out(framework: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 2000), np.float32), rng.standard_normal((2000, 64), np.float32)
    order = parse_order("fma")
    backend = OrderedBackend(framework, {("matmul_pre_norm", 2000): order}, "test")
    chain = backend._chain  # how many terms the machine's own kernel takes in one chain is its affair
    monkeypatch.setattr(backend, "_chain", lambda a, b: chain(a[:, :1000], b[:1000]) + chain(a[:, 1000:], b[1000:]))
    got = backend.get(backend.product("matmul_pre_norm", backend.put(a), backend.put(b)))
    np.testing.assert_array_equal(got, product(order, a, b))
    assert backend.how == {("matmul_pre_norm", 2000): STEPPED}


def test_a_sum_without_an_order_says_that_it_is_native(made: Path, jax_backend: Backend, tmp_path: Path) -> None:
    file = tmp_path / "orders.json"
    file.write_text(json.dumps({"schema": "svf.orders/1", "rows": []}))
    document = replay(made / "components", jax_backend, str(file))
    assert {row["how"] for row in document["orders"]} == {NATIVE}
    assert all(row["order"] is None for row in document["orders"])
    noted = {row["stage"] for row in document["rows"] if row.get("note") == "computed natively: no order is known"}
    assert noted == {"normalization", "matmul_pre_norm", "zero_source_f32"}


def test_orders_that_contradict_each_other_or_leave_elements_are_not_used() -> None:
    row = {"stage": "matmul_pre_norm", "terms": 64, "order": "fma", "remaining": 0}
    assert orders_of([row], "here") == {("matmul_pre_norm", 64): parse_order("fma")}
    assert orders_of([row, {**row, "order": "left"}], "here") == {}
    assert orders_of([row, {**row, "remaining": 3}], "here") == {}
    with pytest.raises(InputError):
        orders_of([{"stage": 3}], "here")


def test_an_order_is_refused_where_none_applies(made: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        replay(made / "components", load_backend("torch", "cpu"), "no-such-file")
    with pytest.raises(UsageError):
        replay(made / "components", load_backend("reference", "cpu"), "inferred")


def test_the_whole_difference_of_two_replays_is_the_order(
    made: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    for backend in (torch_backend, jax_backend):
        replay(made / "components", backend, "native", tmp_path / backend.name)
    pair = (tmp_path / "torch", tmp_path / "jax")
    document = explain_recorded(diff_recorded(*pair), *pair, progress=lambda _label, _done: None)
    explained = document["explained"]
    assert explained["differing"] == explained["explained"] > 0
    assert "explained by the order of summation" in document["verdict"]
    assert {row["explained"] for row in document["rows"] if row["byte_match"]} == {None}


def test_a_difference_that_no_order_makes_is_not_explained(
    made: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    for backend in (torch_backend, jax_backend):
        replay(made / "components", backend, "native", tmp_path / backend.name)
    # In the stage files of a dump: one product with one bit changed.
    stages = {name: load_file(next((tmp_path / name).glob("layer-*.safetensors"))) for name in ("torch", "jax")}
    key = next(name for name in stages["jax"] if name.endswith(".matmul_pre_norm"))
    stages["jax"][key][0, 0] = np.nextafter(stages["jax"][key][0, 0], np.float32(9))
    pair = (tmp_path / "torch.safetensors", tmp_path / "jax.safetensors")
    for path, tensors in zip(pair, stages.values(), strict=True):
        save_file(tensors, path)
    components = made / "components"
    document = diff_recorded(*pair, components=components)
    document = explain_recorded(document, *pair, components=components, progress=lambda _label, _done: None)
    wrong = next(row for row in document["rows"] if row["key"] == key)
    assert wrong["explained"] is None
    assert document["explained"]["explained"] < document["explained"]["differing"]


@pytest.fixture(scope="module")
def forwards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 forward dumps of both backends, and JAX's in torch's order."""
    out = tmp_path_factory.mktemp("forwards")
    for name, order in (("torch", None), ("jax", "jax"), ("ordered", str(out / "torch")), ("named", "torch")):
        trace(model, name if name == "torch" else "jax", out / name, order)
    return out


def trace(model: Path, backend: str, out: Path, order: str | None, dtype: str = "float32") -> int:
    arguments = ["--no-progress", "forward", str(model), "--backend", backend, "--dtype", dtype, "--layers", "0,3"]
    arguments += ["--no-production", "--tokens", ",".join(map(str, range(1, 20))), "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as done:
        app([*arguments, *(["--order", order] if order else [])])
    return int(done.value.code or 0)


def orders_in(dump: Path) -> dict[str, str]:
    document = infer_recorded(dump)
    assert document["outcome"] == "complete"
    return {row["tensors"][0]: row["order"] for row in document["rows"]}


def test_every_product_of_a_forward_is_explained_and_jax_takes_them_in_torchs_order(forwards: Path) -> None:
    torch, jax, ordered, named = (orders_in(forwards / name) for name in ("torch", "jax", "ordered", "named"))
    assert len(torch) == 2 * 7 + 1
    assert torch == ordered != jax
    assert named == torch


def test_the_difference_of_two_forwards_names_its_product_stages(forwards: Path) -> None:
    pair = (forwards / "torch", forwards / "jax")
    document = explain_recorded(diff_forward(*pair), *pair, progress=lambda _label, _done: None)
    assert document["explained"]["differing"] == document["explained"]["explained"] > 0
    assert "differing product stages are explained" in document["verdict"]
    norms = [row for row in document["rows"] if row["stage"] == "attn_norm"]
    assert norms
    assert all(row["explained"] is None for row in norms)


def test_a_bfloat16_forward_is_refused(model: Path, tmp_path: Path) -> None:
    trace(model, "torch", tmp_path / "dump", None, dtype="bfloat16")
    with pytest.raises(InputError, match="float32"):
        infer_recorded(tmp_path / "dump")


def test_an_order_and_another_precision_are_not_asked_for_together(made: Path) -> None:
    with pytest.raises(SystemExit) as done:
        app(["replay", str(made / "components"), "--backend", "jax", "--order", "inferred", "--precision", "exact"])
    assert done.value.code == 2


def test_the_probes_document_and_its_table(
    framework: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = dict.fromkeys(boxes.PRODUCTS, ((6, 5, 24),))
    for name, value in (("PRODUCT_SHAPES", small), ("SUMS", (20,)), ("SQUARES", (20,)), ("SOFTMAX", (7,))):
        monkeypatch.setattr(probe_run, name, value)
    run = probe_run.probe_backend(framework, Progress(False))
    assert len(run["items"]) == len(boxes.PRODUCTS) + 3
    assert all(f"{what}: " in run["summary"] for what in ("products", "one row", "sums", "mean squares", "softmax"))
    other = {**run, "items": [{**run["items"][0], "note": "no tree"}, *run["items"][1:]]}
    document = probe_run.document([{**run, "device": "cpu", "threads": n} for n in (2, 1)])
    assert document["complete"]
    assert document["threads_change"] == {framework.name: []}
    changed = probe_run.document([{**r, "device": "cpu", "threads": n} for n, r in ((2, run), (1, other))])
    assert not changed["complete"]
    assert changed["threads_change"] == {framework.name: [run["items"][0]["what"]]}
    render.probe_document(changed)
    assert "changes matmul_pre_norm" in capsys.readouterr().out


def test_more_threads_than_processors_are_refused() -> None:
    with pytest.raises(UsageError, match="processors"):
        probe_run.limit_threads(100_000)
