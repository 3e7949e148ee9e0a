"""Clean uses of every command that compares two sides: right, they must agree; the twin of each must not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import SvfError
from stages.files.bundle import COMPONENTS_FILE, component_keys
from stages.files.bundle import MANIFEST_FILE as BUNDLE_MANIFEST
from stages.files.dump import MANIFEST_FILE
from stages.files.jsonio import read_object, write_json
from stages.files.tensorfile import TensorFile, sha256, write_tensors
from stages.jobs.apply import ApplyCommand, apply
from stages.jobs.export import export_aprt
from stages.jobs.forward import forward_both
from stages.jobs.forward_one import ForwardCommand
from stages.jobs.replay import replay_both
from stages.jobs.replay_one import ReplayCommand
from stages.jobs.route import RouteCommand, route_both
from stages.judge.diff import DiffCommand, diff_any
from stages.judge.forward_pair import Named
from stages.oracle.components import ReferenceBackend
from stages.progress import Progress
from stages.selftest.recordings import SPOILED_BY
from stages.selftest.specimens import Specimen
from stages.spec.backend import SIDES
from stages.spec.layouts import LAYOUTS

Document = Mapping[str, Any]
MADE_OF = ("bundle", "bundle-bf16")
# Of a quick selftest one use in so many, others for another seed: each takes two processes, twice.
_QUICK = 4


@dataclass(frozen=True)
class Scene:
    """What a use works on: a checkpoint, its bundle, the router's vector, and a folder to write in."""

    specimen: Specimen
    model: Path
    components: Path
    vector: Path
    work: Path
    progress: Progress

    @property
    def tokens(self) -> str:
        return ",".join(map(str, self.specimen.token_ids()))

    def forward(self, out: str, **changes: Any) -> Document:
        """`svf forward MODEL --backend both --out OUT` with `changes`."""
        fields = {"model": str(self.model), "tokens": self.tokens, "out": self.work / out, "production": True}
        return forward_both(forward_command(**{**fields, **changes}), self.progress)

    def diff(self, a: Path, b: Path, named: Named | None = None) -> Document:
        """`svf diff A B`."""
        return diff_any(DiffCommand(a, b, named=named or Named(), top=None, rerun=False), _silent)

    @property
    def named(self) -> Named:
        """The model and the tokens, as options name them."""
        return Named(str(self.model), self.tokens)

    def bundle(self, layout: str, *, lying: bool = False) -> Path:
        """The bundle with V in `layout`; a lying one says so of V as it was."""
        folder = self.work / f"{'lying' if lying else 'laid'}-{layout}"
        if not folder.exists():
            shutil.copytree(self.components, folder)
            _lay(folder, layout, lying=lying)
        return folder


def forward_command(**given: Any) -> ForwardCommand:
    """A forward of every stage with the defaults of `svf forward`, and no production model."""
    return ForwardCommand(**{"production": False, "top": 0, **given})


def _silent(_label: str, _done: float) -> None:
    """No progress of a part."""


def _lay(folder: Path, layout: str, *, lying: bool) -> None:
    """Store V of every tensor as `layout` has it; or, lying, only say so, where the shape cannot tell."""
    manifest = read_object(folder / BUNDLE_MANIFEST)
    with TensorFile(folder / COMPONENTS_FILE) as file:
        arrays = {key: file.read(key) for key in file.tensors}
    for entry in manifest["selected_tensors"]:
        key = component_keys(entry["source_name"])["v"]
        square = arrays[key].shape[0] == arrays[key].shape[1]
        if lying and not square:
            continue
        if not lying and not LAYOUTS[layout].transposed:
            arrays[key] = np.ascontiguousarray(arrays[key].T)
            entry["v_shape"] = list(arrays[key].shape)
        entry["component_v_layout"] = layout
    write_tensors(folder / COMPONENTS_FILE, arrays)
    write_json(folder / BUNDLE_MANIFEST, manifest)


def spoiled(dump: Path, stage: str) -> Path:
    """The dump with one recorded stage off in its last layer or tensor."""
    manifest = read_object(dump / MANIFEST_FILE)
    key = next(k for k in reversed(manifest["tensors"]) if k.rpartition(".")[2] == stage)
    with TensorFile(dump / manifest["tensors"][key]["file"]) as file:
        array = file.read(key)
    replaced(dump, key, (array.astype(np.float32) * np.float32(SPOILED_BY)).astype(array.dtype))
    return dump


def replaced(dump: Path, key: str, array: np.ndarray) -> None:
    """Put another array in the place of a recorded one, its hash in the manifest following."""
    manifest = read_object(dump / MANIFEST_FILE)
    entry = manifest["tensors"][key]
    path = dump / entry["file"]
    with TensorFile(path) as file:
        arrays = {name: file.read(name) for name in file.tensors}
    arrays[key] = np.ascontiguousarray(array)
    write_tensors(path, arrays)
    entry["sha256"] = sha256(arrays[key])
    write_json(dump / MANIFEST_FILE, manifest)


@dataclass(frozen=True)
class Use:
    """One use: `right` must agree, and `twin`, which follows it, must not."""

    name: str
    doc: str
    right: Callable[[Scene], Document]
    twin: Callable[[Scene], Document]


def _forward_use(name: str, doc: str, stage: str = "attention", **changes: Any) -> Use:
    out = name.replace(" ", "-")

    def twin(scene: Scene) -> Document:
        return scene.diff(scene.work / out / "torch", spoiled(scene.work / out / "jax", stage))

    return Use(name, doc, lambda scene: scene.forward(out, **changes), twin)


def _adapted_use(layout: str) -> Use:
    return Use(
        f"forward, adapted, {layout}",
        f"svf forward --backend both --adapted, the bundle's V in {layout}",
        lambda scene: scene.forward(f"adapted-{layout}", adapted=scene.bundle(layout)),
        lambda scene: scene.forward(f"lying-{layout}", adapted=scene.bundle(_other(layout), lying=True)),
    )


def _other(layout: str) -> str:
    """A layout that V of a bundle as it is made, torch_v, does not have."""
    return "vh" if layout == "torch_v" else layout


def _replay(scene: Scene, components: Path) -> Document:
    return replay_both(ReplayCommand(components=components, model=str(scene.model), top=0), scene.progress)


def _replay_use(layout: str) -> Use:
    return Use(
        f"replay, {layout}",
        f"svf replay --backend both, the bundle's V in {layout}",
        lambda scene: _replay(scene, scene.bundle(layout)),
        lambda scene: _replay(scene, scene.bundle(_other(layout), lying=True)),
    )


def _route(scene: Scene, components: Path) -> Document:
    command = RouteCommand(model=str(scene.model), head=scene.vector, adapted=components, tokens=scene.tokens)
    return route_both(command, scene.progress)


def _applied(scene: Scene, components: Path) -> Document:
    """`svf apply`, then the forward of what it wrote."""
    out = scene.work / f"{components.name}-applied"
    apply(
        ApplyCommand(components, str(scene.model), out, "untie", "model", "declared"), ReferenceBackend, scene.progress
    )
    return scene.forward(f"{components.name}-of-applied", model=str(out))


def _trees(scene: Scene) -> Document:
    """`svf export` of both dumps, the trees compared."""
    scene.forward("for-trees")
    trees = []
    for side in SIDES:
        tree = scene.work / f"tree-{side}"
        export_aprt(scene.work / "for-trees" / side, tree, scene.progress)
        trees.append(tree)
    return scene.diff(trees[0], trees[1], scene.named)


def _spoiled_trees(scene: Scene) -> Document:
    file = scene.work / "tree-jax" / "layer-1" / "ffn_up.bin"
    data = np.frombuffer(file.read_bytes(), "<f4").copy()
    data[3:] *= np.float32(SPOILED_BY)  # past the header of twelve bytes
    file.write_bytes(data.tobytes())
    return scene.diff(scene.work / "tree-torch", scene.work / "tree-jax", scene.named)


USES: Mapping[str, Use] = {
    use.name: use
    for use in (
        _forward_use("forward", "svf forward --backend both, production too"),
        _forward_use("forward, one token", "one token alone", tokens="7"),
        _forward_use(
            "forward, last position",
            "--positions last, the stages that one position tells",
            "ffn_up",
            positions="last",
            stages="attn_norm,qkv_matmul,ffn_norm,ffn_gate,ffn_up,ffn_silu,ffn_swigl,ffn_out,final_norm,lm_head",
            production=False,
        ),
        *(_adapted_use(layout) for layout in LAYOUTS),
        *(_replay_use(layout) for layout in LAYOUTS),
        Use(
            "route, adapted",
            "svf route --backend both --adapted",
            lambda scene: _route(scene, scene.components),
            lambda scene: _route(scene, scene.bundle("vh", lying=True)),
        ),
        Use(
            "apply, then forward",
            "svf apply, and svf forward --backend both of what it wrote",
            lambda scene: _applied(scene, scene.components),
            lambda scene: _applied(scene, scene.bundle("vh", lying=True)),
        ),
        Use("trees", "svf diff of two APRT trees, --model and --tokens given", _trees, _spoiled_trees),
    )
}


def rows_of(
    names: Sequence[str], scenes: Sequence[Scene], *, quick: bool, seed: int, progress: Progress
) -> Iterator[dict[str, Any]]:
    """One row a use, in the scenes in turn: what was said of it and of its twin; with `quick` of few uses."""
    pairs = [(name, scenes[(number + seed) % len(scenes)]) for number, name in enumerate(names)]
    for number, (name, scene) in enumerate(pairs[seed % _QUICK :: _QUICK] if quick else pairs):
        progress(f"using {name}", number / len(pairs))
        use = USES[name]
        right, twin = (_said(part, scene) for part in (use.right, use.twin))
        yield {
            "use": name,
            "doc": use.doc,
            "dtype": scene.specimen.dtype,
            "outcome": right["outcome"],
            "verdict": right["verdict"],
            "twin": {"outcome": twin["outcome"], "verdict": twin["verdict"]},
        }


def _said(use: Callable[[Scene], Document], scene: Scene) -> dict[str, str]:
    try:
        document = use(scene)
    except SvfError as error:
        return {"outcome": "refused", "verdict": str(error)}
    return {"outcome": document["outcome"], "verdict": document["verdict"]}
