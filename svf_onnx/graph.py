"""Which value of an ONNX graph is which stage, by the modules that its nodes come from.

`torch.onnx` writes a node's module into its metadata (dynamo) or its name (TorchScript). What a module gives is the
last that it computes for others; what it is given is the first that it does not compute itself. Inside of attention
modules do not reach: there the graph is followed from the softmax up.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stages.errors import InputError
from stages.spec.sites import ROTATED, Reached, Site, reached
from stages.spec.stage import Pipeline

_SCOPES = "pkg.torch.onnx.name_scopes"
# Stages inside of a module: the module, the first operation there that gives it, the stage and its part.
_INSIDE = (
    ("rotary_emb", "Concat", "rope_angle", 0),
    ("self_attn.q_proj", "MatMul", "qkv_matmul", 0),
    ("self_attn.k_proj", "MatMul", "qkv_matmul", 1),
    ("self_attn.v_proj", "MatMul", "qkv_matmul", 2),
)
# What a value is only scaled, turned, repeated for groups or joined to a cache by.
_SAME = ("Mul", "Div", "Cast", "Transpose", "Reshape", "Expand", "Unsqueeze", "Concat")
_ROTATED = {site.stage: site for site in ROTATED}
_ATTENTION = "self_attn"


@dataclass(frozen=True)
class Graph:
    """A graph of `onnx`, its nodes in the order of computation."""

    proto: Any

    def values(self, path: Pipeline, deep: bool) -> dict[Reached, str]:
        """The value of each stage that the graph has, by layer and site; `deep`: also those inside of modules.

        `InputError` where no node comes from a module that a stage is known of.
        """
        found = {}
        places = reached(self._modules, path)
        for module, reaches in places.items():
            members = 1 + max(site.member for _, site in reaches)
            for at in reaches:
                site = at[1]
                value = self._given(module) if site.given else self._gives(module, members, site.member)
                if value is not None:
                    found[at] = value
        if deep:
            found |= self._inside(path, places)
        return found

    @cached_property
    def _module(self) -> list[str]:
        """The module of each node; "" for what comes from the model itself."""
        return [_module_of(node) for node in self.proto.node]

    @cached_property
    def _modules(self) -> list[str]:
        """Every module that nodes come from, and those that hold it, each once, in the order of computation."""
        parts = [name.split(".") for name in dict.fromkeys(self._module) if name]
        return list(dict.fromkeys(".".join(name[:n]) for name in parts for n in range(1, len(name) + 1)))

    @cached_property
    def _made(self) -> Mapping[str, Any]:
        return {value: node for node in self.proto.node for value in node.output}

    @cached_property
    def _fixed(self) -> set[str]:
        """Values that no input has a part in."""
        fixed = {"", *(tensor.name for tensor in self.proto.initializer)}
        for node in self.proto.node:
            if fixed.issuperset(node.input):
                fixed.update(node.output)
        return fixed

    def _nodes(self, module: str, own: bool = False) -> Iterator[Any]:
        """The nodes of a module and, unless `own`, of the modules in it."""
        for node, name in zip(self.proto.node, self._module, strict=True):
            if name == module or (not own and name.startswith(f"{module}.")):
                yield node

    def _gives(self, module: str, members: int, member: int) -> str | None:
        inside = list(self._nodes(module))
        made = [value for node in inside for value in node.output if value not in self._fixed]
        read = {id(node) for node in inside}
        wanted = {value for node in self.proto.node if id(node) not in read for value in node.input}
        wanted.update(output.name for output in self.proto.output)
        given = [value for value in made if value in wanted][-members:]
        return given[member] if len(given) == members else None

    def _given(self, module: str) -> str | None:
        inside = list(self._nodes(module))
        own = {value for node in inside for value in node.output} | self._fixed
        return next((value for node in inside for value in node.input if value not in own), None)

    def _inside(self, path: Pipeline, places: Mapping[str, list[Reached]]) -> dict[Reached, str]:
        found: dict[Reached, str] = {}
        for module, reaches in places.items():
            layer, outer = reaches[0]
            for name, op, stage, part in _INSIDE:
                node = next((node for node in self._nodes(module) if node.op_type == op), None)
                if outer.module == name and outer.stage != stage and node is not None and stage in path:
                    found[layer, Site(name, stage, layer is not None, part=part)] = node.output[0]
        for module in self._modules:
            if f"{module}.o_proj" in places:
                layer = places[f"{module}.o_proj"][0][0]
                found |= {(layer, site): value for site, value in self._attention(module)}
        return found

    def _attention(self, module: str) -> Iterator[tuple[Site, str]]:
        """Probabilities, scores before the mask, queries and keys: from the softmax up."""
        softmax = next((node for node in self._nodes(module, own=True) if node.op_type == "Softmax"), None)
        if softmax is None:
            return
        yield Site(_ATTENTION, "attn_softmax", of_layer=True), softmax.output[0]
        masked = self._made.get(softmax.input[0])
        if masked is None or masked.op_type != "Add":
            return
        yield Site(_ATTENTION, "attn_scores", of_layer=True), masked.input[0]
        product = self._up(masked.input[0], "MatMul")
        if product is None:
            return
        for name, value in zip(_ROTATED, product.input, strict=True):
            rotated = self._up(value, "Add")
            if rotated is not None:
                yield _ROTATED[name], rotated.output[0]

    def _up(self, value: str, op: str) -> Any:
        """The node of an operation that a value comes from through what changes no element but its scale."""
        while (node := self._made.get(value)) is not None and node.op_type != op:
            if node.op_type not in _SAME:
                return None
            value = node.input[-1 if node.op_type == "Concat" else 0]
        return node


def _module_of(node: Any) -> str:
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
                return str(scopes[-2]) if len(scopes) > 1 else ""
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
                raise InputError(f"node {node.name}: {_SCOPES} is no list of names: {entry.value[:80]!r}") from error
    return ".".join(node.name.strip("/").split("/")[:-1])
