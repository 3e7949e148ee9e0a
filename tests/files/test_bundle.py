"""Component bundles: what `svf replay` refuses about one, in one line, with its exit code, writing nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    DOWN,
    EMBED,
    GATE,
    HEAD,
    K_PROJ,
    Result,
    one_line,
    rehash_offsets,
    svf,
    tensors_of,
    tree,
    with_json,
    with_tensors,
)

from stages.errors import InputError
from stages.files.bundle import (
    ALL_STAGES_FILE,
    COMPONENTS_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    SAMPLE_STAGES_FILE,
    Bundle,
    component_keys,
    offsets_key,
    stages_in,
    tensor_stage_key,
)
from stages.files.tensorfile import TensorFile
from stages.spec.replay import REPLAY

Change = Callable[[Path], object]


def tensor(file: str, key: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    """A change of one tensor of one file; None removes it."""

    def apply(tensors: dict[str, np.ndarray]) -> None:
        new = change(tensors.pop(key))
        if new is not None:
            tensors[key] = new

    return lambda bundle: with_tensors(bundle / file, apply)


def put(value: float, index: Any = 0) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def told(change: Change) -> Change:
    """A change of the offsets that the manifest tells of: its hashes follow."""

    def apply(bundle: Path) -> None:
        change(bundle)
        rehash_offsets(bundle)

    return apply


def entry_of(name: str, **changes: Any) -> Change:
    """A change of one entry of the manifest."""

    def apply(manifest: dict[str, Any]) -> None:
        next(e for e in manifest["selected_tensors"] if e["source_name"] == name).update(changes)

    return lambda bundle: with_json(bundle / MANIFEST_FILE, apply)


def manifest(**changes: Any) -> Change:
    return lambda bundle: with_json(bundle / MANIFEST_FILE, lambda m: m.update(changes))


def cut(file: str, count: int) -> Change:
    return lambda bundle: (bundle / file).write_bytes((bundle / file).read_bytes()[:count])


def cut_end(file: str) -> Change:
    return lambda bundle: (bundle / file).write_bytes((bundle / file).read_bytes()[:-1])


K, G = component_keys(K_PROJ), component_keys(GATE)
OFFSETS, SOURCE = offsets_key(GATE), tensor_stage_key(GATE, "source_f32")

# What is done to a good bundle, the exit code, and words of the one line.
BAD: dict[str, tuple[Change, int, tuple[str, ...]]] = {
    "U is missing": (tensor(COMPONENTS_FILE, G["u"], lambda a: None), 3, (G["u"], "svd.S.")),
    "S is missing": (tensor(COMPONENTS_FILE, G["s"], lambda a: None), 3, (G["s"],)),
    "V is missing": (tensor(COMPONENTS_FILE, G["v"], lambda a: None), 3, (G["v"],)),
    "offsets are missing": (tensor(OFFSETS_FILE, OFFSETS, lambda a: None), 3, (OFFSETS, "svf.scale_offsets.")),
    "an offset too many": (
        tensor(OFFSETS_FILE, OFFSETS, lambda a: np.r_[a, a[:1]]),
        3,
        ("65 offsets and 64 singular values", f"{EMBED}: 64", f"{HEAD}: 64"),
    ),
    "no offsets at all": (tensor(OFFSETS_FILE, OFFSETS, lambda a: a[:0]), 3, ("0 offsets", f"{DOWN}: 64")),
    "offsets with two axes": (tensor(OFFSETS_FILE, OFFSETS, lambda a: a[:, None]), 3, ("offsets", GATE)),
    "a sum of zero": (told(tensor(OFFSETS_FILE, OFFSETS, lambda a: a * 0 - 1)), 3, ("sum to 0", "normalization", GATE)),
    "a sum that overflows": (tensor(COMPONENTS_FILE, G["s"], lambda a: a * 0 + np.float32(3e38)), 3, (GATE, "sum")),
    "a product that overflows": (
        lambda b: (
            tensor(COMPONENTS_FILE, G["s"], put(3e38))(b),
            told(tensor(OFFSETS_FILE, OFFSETS, put(5.0)))(b),
        ),
        3,
        (GATE, "sum"),
    ),
    "a negative singular value": (tensor(COMPONENTS_FILE, G["s"], put(-1e-9, 7)), 3, ("negative", "index 7", GATE)),
    "S one short": (tensor(COMPONENTS_FILE, G["s"], lambda a: a[:-1]), 3, ("S [63]", "expected", GATE)),
    "S with two axes": (tensor(COMPONENTS_FILE, G["s"], lambda a: np.diag(a)), 3, ("S [64, 64]", GATE)),
    "U one row short": (tensor(COMPONENTS_FILE, G["u"], lambda a: a[:-1]), 3, ("U [191, 64]", "U [192, 64]")),
    "U transposed": (tensor(COMPONENTS_FILE, G["u"], lambda a: a.T), 3, ("U [64, 192]", "U [192, 64]")),
    "V one column short": (tensor(COMPONENTS_FILE, G["v"], lambda a: a[:, :-1]), 3, ("V [64, 63]", GATE)),
    "all of a smaller rank": (
        lambda b: (
            tensor(COMPONENTS_FILE, G["u"], lambda a: a[:, :-1])(b),
            tensor(COMPONENTS_FILE, G["s"], lambda a: a[:-1])(b),
            tensor(COMPONENTS_FILE, G["v"], lambda a: a[:, :-1])(b),
        ),
        3,
        ("U [192, 63]", GATE),
    ),
    "NaN in U": (tensor(COMPONENTS_FILE, G["u"], put(np.nan, (3, 2))), 3, ("NaN or infinity at index [3, 2]", G["u"])),
    "NaN in S": (tensor(COMPONENTS_FILE, G["s"], put(np.nan, 5)), 3, ("index [5]", G["s"])),
    "infinity in V": (tensor(COMPONENTS_FILE, G["v"], put(np.inf, (63, 0))), 3, ("index [63, 0]", G["v"])),
    "NaN in the offsets": (tensor(OFFSETS_FILE, OFFSETS, put(np.nan, 1)), 3, ("index [1]", OFFSETS)),
    "NaN in the source": (tensor(ALL_STAGES_FILE, SOURCE, put(np.nan, (1, 1))), 3, ("NaN or infinity", GATE)),
    "float64 components": (
        tensor(COMPONENTS_FILE, G["s"], lambda a: a.astype(np.float64)),
        3,
        ("expected float32, got float64",),
    ),
    "a square V of the other layout": (
        tensor(COMPONENTS_FILE, K["v"], lambda a: a.T),
        3,
        (K_PROJ, "declared layout torch_v", "vh", "component_v_layout"),
    ),
    "a square V labelled wrongly": (
        entry_of(K_PROJ, component_v_layout="vh"),
        3,
        (K_PROJ, "declared layout vh", "torch_v", "component_v_layout"),
    ),
    "a wide V labelled wrongly": (entry_of(DOWN, component_v_layout="nx"), 3, (DOWN, "nx", "[64, 192]", "[192, 64]")),
    "a layout that does not exist": (entry_of(DOWN, component_v_layout="hv"), 3, ("'hv'", "torch_v, nx, vh")),
    "a layout that is a list": (entry_of(DOWN, component_v_layout=["vh"]), 3, ("component_v_layout",)),
    "a source shape that U has not": (entry_of(DOWN, source_shape=[64, 193]), 3, (DOWN, "do not fit")),
    "a source shape of three sizes": (entry_of(DOWN, source_shape=[1, 64, 192]), 3, ("[1, 64, 192]", DOWN)),
    "the source recorded with other rows": (tensor(ALL_STAGES_FILE, SOURCE, lambda a: a[:100]), 3, (GATE, "100, 64")),
    "the source recorded with other columns": (
        tensor(ALL_STAGES_FILE, SOURCE, lambda a: a[:, :32]),
        3,
        (GATE, "192, 32"),
    ),
    "the source recorded transposed": (tensor(ALL_STAGES_FILE, SOURCE, lambda a: a.T), 3, (GATE, "64, 192")),
    "the manifest names another tensor": (
        entry_of(GATE, source_name="model.layers.3.mlp.gate_proj.weight"),
        3,
        ("model.layers.3.mlp.gate_proj.weight", "no tensor"),
    ),
    "an entry without a name": (entry_of(GATE, source_name=None), 3, ("selected_tensors[5]", "source_name")),
    "no entries": (manifest(selected_tensors=[]), 3, ("selected_tensors",)),
    "entries that are no list": (manifest(selected_tensors={"a": 1}), 3, ("selected_tensors",)),
    "another schema": (manifest(schema="other.v1"), 3, ("other.v1", "trinity_sakana_selected_component_debug.v1")),
    "a hostile schema": (manifest(schema="\x1b[31m\x00\n"), 3, ("\\x1b[31m\\x00\\n",)),
    "a manifest that is no JSON": (cut(MANIFEST_FILE, 100), 3, (MANIFEST_FILE, "JSON")),
    "a manifest with a key twice": (
        lambda b: (b / MANIFEST_FILE).write_text('{"schema": 1, "schema": 2}'),
        3,
        ("duplicate key 'schema'",),
    ),
    "no manifest": (lambda b: (b / MANIFEST_FILE).unlink(), 3, (MANIFEST_FILE, "not a component bundle")),
    "no components file": (lambda b: (b / COMPONENTS_FILE).unlink(), 4, (COMPONENTS_FILE, "does not exist")),
    "no offsets file": (lambda b: (b / OFFSETS_FILE).unlink(), 4, (OFFSETS_FILE, "does not exist")),
    "truncated components": (cut_end(COMPONENTS_FILE), 3, (COMPONENTS_FILE, "truncated")),
    "truncated stages": (cut_end(ALL_STAGES_FILE), 3, (ALL_STAGES_FILE, "truncated")),
    "an empty components file": (cut(COMPONENTS_FILE, 0), 3, (COMPONENTS_FILE, "too short")),
    "a git LFS pointer": (
        lambda b: (b / OFFSETS_FILE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        3,
        ("git lfs pull",),
    ),
    "no recorded stages": (
        lambda b: [(b / f).unlink() for f in (ALL_STAGES_FILE, SAMPLE_STAGES_FILE)],
        2,
        ("source_f32", "--model"),
    ),
}


def replay(bundle: Path, *more: object) -> Result:
    return svf("replay", bundle, "--backend", "reference", *more)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_bundle_is_one_line_and_nothing_is_written(bundle: Path, tmp_path: Path, kind: str) -> None:
    change, code, words = BAD[kind]
    change(bundle)
    before = tree(bundle)
    done = replay(bundle, "--out", tmp_path / "out", "--report", tmp_path / "report.json")
    assert done.code == code, (done.err, done.out)
    for word in words:
        assert word in done.error
    assert done.out == ""
    assert tree(bundle) == before
    assert not (tmp_path / "report.json").exists()
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_the_bad_ones_start_from_a_good_one(bundle: Path, tmp_path: Path) -> None:
    done = replay(bundle, "--out", tmp_path / "out", "--report", tmp_path / "report.json")
    assert (done.code, done.err) == (0, "")


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    done = replay(tmp_path / "none")
    assert done.code == 4
    assert "svf decompose" in done.error


def test_all_selected_tensors_needs_their_recorded_stages(bundle: Path, sample_bundle: Path) -> None:
    (bundle / ALL_STAGES_FILE).unlink()
    for folder in (bundle, sample_bundle):
        done = replay(folder, "--all-selected-tensors")
        assert done.code == 3
        assert "all-selected stage file" in done.error


def test_without_the_source_stage_the_model_gives_the_weights(bundle: Path, model: Path) -> None:
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: [t.pop(k) for k in list(t) if k.endswith("source_f32")])
    assert replay(bundle).code == 2
    done = replay(bundle, "--source-from-stage")
    assert done.code == 3
    assert "--source-from-stage" in done.error
    document = replay(bundle, "--model", model, "--json").json
    assert document["outcome"] == "agree"  # what was not recorded on both sides is judged by itself
    assert "extra" not in {r["verdict"] for r in document["rows"]}
    assert document["culprit"] is None


def test_a_model_of_other_shapes_is_refused(bundle: Path, tmp_path: Path, model: Path) -> None:
    with_json(bundle / MANIFEST_FILE, lambda m: m["selected_tensors"].pop())
    done = replay(bundle, "--model", tmp_path / "no-model")
    assert done.code == 4
    assert replay(bundle, "--model", model).code == 0


# What a good bundle says.


def test_entries_and_components(made: Path) -> None:
    with Bundle(made / "components") as bundle:
        assert len(bundle.entries) == 9
        assert bundle.sample_name == GATE
        entry = next(e for e in bundle.entries if e.source_name == DOWN)
        assert (entry.shape, entry.layout) == ((64, 192), "torch_v")
        components = bundle.load(entry)
        stored = tensors_of(made / "components" / COMPONENTS_FILE)
        assert np.array_equal(components.u(3, 9), stored[component_keys(DOWN)["u"]][3:9])
        assert np.array_equal(components.v, stored[component_keys(DOWN)["v"]])


def test_a_sample_manifest_without_a_list_is_one_entry(sample_bundle: Path) -> None:
    """As the original wrote a sample-only bundle: no `selected_tensors`, the shape told by U and V."""
    raw = json.loads((sample_bundle / MANIFEST_FILE).read_text())
    raw.pop("selected_tensors")
    (sample_bundle / MANIFEST_FILE).write_text(json.dumps(raw))
    with Bundle(sample_bundle) as bundle:
        assert [(e.source_name, e.shape) for e in bundle.entries] == [(GATE, (192, 64))]


def test_stages_of_a_file_by_tensor(made: Path) -> None:
    with TensorFile(made / "components" / ALL_STAGES_FILE) as file:
        found = stages_in(file)
    assert len(found) == 9
    assert all(set(stages) == set(REPLAY) for stages in found.values())
    with TensorFile(made / "sample" / SAMPLE_STAGES_FILE) as file:
        assert {key: set(stages) for key, stages in stages_in(file).items()} == {"": set(REPLAY)}


def test_errors_of_a_bundle_are_input_errors_for_a_caller_too(bundle: Path) -> None:
    tensor(COMPONENTS_FILE, G["s"], put(-1.0))(bundle)
    with Bundle(bundle) as opened:
        entry = next(e for e in opened.entries if e.source_name == GATE)
        with pytest.raises(InputError) as error:
            opened.load(entry)
    one_line(error.value, GATE)
