"""Which module of a model gives which stage, by the names that `transformers` gives its modules.

Most of it follows from the declarations: a stage that reads `self_attn.o_proj.weight` is the output of the
module `self_attn.o_proj`, and the stage that this one reads is its input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stages.errors import InputError, shown
from stages.spec.experts import is_each
from stages.spec.stage import Pipeline, Scope

# Modules without parameters of their own, by their names in a layer ("" is the layer itself) or in the model -> the
# stages that their outputs are.
_PLAIN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "rotary_emb": ("rope_cos", "rope_sin"),
        "mlp.act_fn": ("ffn_silu",),
        "mlp.gate": ("router_logits", "router_weights", "router_topk"),
        "mlp.experts": ("moe_out",),
        "mlp.shared_expert.act_fn": ("shared_silu",),
        "": ("post_ffn_residual",),
    }
)
# What holds the module that gives a stage, and gives it too: for a model that has fused what is inside.
_WHOLE: Mapping[str, str] = MappingProxyType({"self_attn": "attn_out", "mlp": "ffn_out"})
_IN_LAYER = re.compile(r"(?P<before>(?:.*\.)?)layers\.(?P<layer>\d+)(?:\.(?P<inside>.*))?", re.ASCII)


@dataclass(frozen=True)
class Site:
    """A stage where a hook reaches it: the output of a module, its `member` where it gives several, or its input.

    `module` is its name in a layer, or in the model. Stages of several modules are joined on the last axis, each the
    `part` of it.
    """

    module: str
    stage: str
    of_layer: bool
    member: int = 0
    given: bool = False
    part: int = 0


Reached = tuple[int | None, Site]
# What no module gives: what attention is called with.
ROTATED = tuple(Site("self_attn", name, of_layer=True, given=True) for name in ("q_post_rope", "k_post_rope"))


def module_of(param: str) -> str | None:
    """The module that a declared parameter belongs to; None for what is no weight: tokens, a bias."""
    name = param.removeprefix("model.")
    return name.removesuffix(".weight") if name.endswith(".weight") else None


def sites(path: Pipeline) -> tuple[Site, ...]:
    """What hooks may reach of the stages of a path: outputs of modules, then inputs of stages that are no output."""
    outputs: dict[tuple[str, int], Site] = {}
    for stage in path.values():
        own = [param for param in stage.params if not is_each(param)]
        modules = [name for param in own if (name := module_of(param)) is not None]
        for part, module in enumerate(modules):  # of two stages with one module the later is what it really gives
            outputs[module, 0] = Site(module, stage.name, stage.scope is Scope.LAYER, part=part)
    plain = [
        Site(module, name, path[name].scope is Scope.LAYER, member)
        for module, names in _PLAIN.items()
        for member, name in enumerate(names)
        if name in path
    ]
    found = {site.stage for site in (*outputs.values(), *plain)}
    inputs = [
        Site(site.module, name, site.of_layer, given=True)
        for site in outputs.values()
        for name in path[site.stage].inputs[:1]
        if name in path and name not in found and not path[name].identity
    ]
    whole = [Site(module, name, of_layer=True) for module, name in _WHOLE.items()]
    return (*outputs.values(), *plain, *inputs, *whole)


def stage_of_module(name: str, path: Pipeline) -> str | None:
    """The stage that the output of a module is, by the last part of its name."""
    for site in sites(path):
        if not site.given and site.module and site.module.rpartition(".")[2] == name and site.part == site.member == 0:
            return site.stage
    return None


def reached(modules: Iterable[str], path: Pipeline) -> dict[str, list[Reached]]:
    """The modules of a model to put hooks on, by name -> layer and site of each stage that they give.

    `InputError` for a model none of whose layers has such names.
    """
    placed = {name: place for name in modules if (place := _placed(name)) is not None}
    befores = Counter(before for before, layer, _ in placed.values() if layer is not None)
    before = befores.most_common(1)[0][0] if befores else ""
    of = {
        (layer, inside): name
        for name, (where, layer, inside) in placed.items()
        if where == before or inside == "lm_head"
    }
    layers = sorted({layer for layer, _ in of if layer is not None})
    found: dict[str, list[Reached]] = {}
    taken: set[tuple[int | None, str, int]] = set()
    for site in sites(path):
        for layer in layers if site.of_layer else [None]:
            name, stage = of.get((layer, site.module)), (layer, site.stage, site.part)
            if name is not None and stage not in taken:
                found.setdefault(name, []).append((layer, site))
                taken.add(stage)
    if not any(layer is not None for layer, _, _ in taken):
        names = ", ".join(shown(name) for name in list(modules)[:3])
        raise InputError(
            f"no module of this model is one that a stage is known of (it has {names or 'none'}); expected names as "
            "transformers has them, such as model.layers.0.self_attn.q_proj"
        )
    return found


def _placed(name: str) -> tuple[str, int | None, str] | None:
    """What stands before a module's name in a model, its layer, and its name there."""
    match = _IN_LAYER.fullmatch(name)
    if match is not None:
        return match["before"], int(match["layer"]), match["inside"] or ""
    before, dot, last = name.rpartition(".")
    return (before + dot, None, last) if last else None
