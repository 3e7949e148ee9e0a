"""Every stage function's annotated axes are those of the declaration, on all sides; no command imports `jaxtyping`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import shapes
from forward_models import MODELS, stages_of
from helpers import fresh
from jaxtyping import Float, TypeCheckError

import stages.oracle.components
import stages.oracle.decoder
import stages.oracle.router
import svf_jax.components
import svf_jax.decoder
import svf_jax.experts
import svf_jax.router
import svf_jax.wide
import svf_torch.components
import svf_torch.decoder
import svf_torch.experts
import svf_torch.router
import svf_torch.wide
from stages.spec.experts import is_each, of_expert
from stages.spec.families import FAMILIES
from stages.spec.forward import DECLARED, forward_pipeline, producers
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY
from stages.spec.router import ROUTER
from stages.spec.stage import Stage

SIDES: dict[str, tuple[Mapping[str, Callable[..., Any]], ...]] = {
    room.__name__: (
        room.components.REPLAY_STAGES,
        {**room.decoder.FORWARD_STAGES, **room.experts.EXPERT_STAGES},
        room.router.ROUTER_STAGES,
    )
    for room in (stages.oracle, svf_torch, svf_jax)
} | {f"{room.__name__}.wide": (room.wide.WIDE_STAGES,) * 3 for room in (svf_torch, svf_jax)}
# Axes of what comes with a run, and of the bundle's parts; V's are its layout's, n the columns and k the rank.
RUN = {"tokens": "tokens", "positions": "tokens"}
V = {" ".join({"n": "cols", "k": "rank"}[axis] for axis in layout.axes.split()) for layout in LAYOUTS.values()}
BUNDLE = {"source": {"rows cols"}, "offsets": {"rank"}, "u": {"rows rank"}, "s": {"rank"}, "v": V}
HEAD = {"router_hidden": {"one hidden"}, "router_head": {"outputs hidden"}}
Expected = list[set[str]]  # of each argument, then of the result, the shapes that it may have


def plain(shape: str) -> str:
    """A shape's axes as the declaration has them: `{heads}` is the option of that name, `a_b` of two sizes `a*b`."""
    return shape.replace("{", "").replace("}", "").replace("heads*head_dim", "heads_head_dim")


def fits(annotated: str, declared: str) -> bool:
    """Whether an annotation's axes are the declared ones; the tokens of a score are its queries or its keys."""
    pairs = list(zip(plain(annotated).split(), plain(declared).split(), strict=False))
    same = len(annotated.split()) == len(declared.split())
    return same and all(a == d or (d == "tokens" and a in ("queries", "keys")) for a, d in pairs)


def odd(function: Callable[..., Any], expected: Expected) -> list[str]:
    """What of a function's annotations is not as declared."""
    annotated = {name: shapes.axes(of) for name, of in shapes.annotations(function).items()}
    names = [name for name in annotated if annotated[name]]
    wrong = [] if len(names) >= len(expected) else [f"{len(names)} arrays are annotated, {len(expected)} declared"]
    for name, declared in zip([*names[: len(expected) - 1], "return"], expected, strict=False):
        missing = [shape for shape in declared if not any(fits(a, shape) for a in annotated.get(name, ()))]
        wrong += [f"{name} is {' or '.join(annotated.get(name, ()))}, declared {shape}" for shape in missing]
        undeclared = [a for a in annotated.get(name, ()) if not any(fits(a, shape) for shape in ANY | declared)]
        wrong += [f"{name} may be {a}, which nothing declares" for a in undeclared]
    return wrong


ANY = {stage.shape for stage in (*DECLARED.values(), *REPLAY.values())} | {"cols rows"}


def forward_cases() -> Iterator[tuple[Stage, Expected]]:
    """Every computed stage of every test model, with its inputs' and parameters' axes."""
    for model in MODELS.values():
        config = model.config("float32")
        path, family = forward_pipeline(config), FAMILIES[config.family]
        params = {**family.before.params, **family.after.params, **RUN}
        for block in family.kinds(config).values():
            params |= block.params
        for layer, stage in stages_of(config):
            if not stage.identity:
                sources = producers(path, stage, layer, 2).values()
                own = [f"chosen {params[of_expert(n, 0)]}" if is_each(n) else params[n] for n in stage.params]
                given = [*(path.at(place).shape for place in sources), *own]
                yield stage, [*({shape} for shape in given), {stage.shape}]


def cases() -> Iterator[tuple[int, Stage, Expected]]:
    """Which table, the stage, and the shapes of its arguments and its result."""
    for place, pipeline, params in ((0, REPLAY, BUNDLE), (2, ROUTER, HEAD)):
        for stage in pipeline.values():
            given = [*({pipeline[name].shape} for name in stage.inputs), *(params[name] for name in stage.params)]
            yield place, stage, [*given, {stage.shape}]
    yield from ((1, stage, expected) for stage, expected in forward_cases())


CASES = {(place, stage.function, str(expected)): (place, stage, expected) for place, stage, expected in cases()}


@pytest.mark.parametrize("side", SIDES)
def test_annotations_are_the_declaration_s(side: str) -> None:
    wrong = {}
    for place, stage, expected in CASES.values():
        if found := odd(SIDES[side][place][stage.function], expected):
            wrong[stage.name] = found
    assert wrong == {}
    covered = {stage.function for _, stage, _ in CASES.values()}
    assert covered == {*REPLAY, *ROUTER, *DECLARED}


@pytest.mark.parametrize("side", ["stages.oracle", "svf_torch", "svf_jax"])
def test_two_axes_exchanged_break_the_law(side: str) -> None:
    """In every argument and every result with two axes of different names."""
    seen = 0
    for place, stage, expected in CASES.values():
        function = SIDES[side][place][stage.function]
        held = shapes.annotations(function)
        for name, annotation in held.items():
            for shape in shapes.axes(annotation):
                one, two, *rest = *shape.split(), "", ""
                if not two or (stage.name, name) in (("final_f32", "return"), ("zero_source_f32", "v")) or name == "v":
                    continue  # declared in both orders
                swapped = " ".join([two, one, *rest]).strip()
                mutant: Any = lambda: None  # noqa: E731
                others = [Float[np.ndarray, s] for s in shapes.axes(annotation) if s != shape]
                changed = Float[np.ndarray, swapped]
                for other in others:
                    changed = changed | other
                mutant.__annotations__ = {**held, name: changed}
                assert odd(mutant, expected), (stage.name, name, swapped)
                seen += 1
    assert seen > 60


@pytest.mark.parametrize("side", ["stages.oracle", "svf_torch", "svf_jax"])
def test_a_call_of_the_wrong_shape_is_caught_in_tests(side: str) -> None:
    make = {"stages.oracle": np.zeros, "svf_torch": svf_torch.decoder.torch.zeros, "svf_jax": svf_jax.decoder.jnp.zeros}
    zeros, table = make[side], SIDES[side][1]
    table["ffn_gate"](zeros((3, 4)), zeros((5, 4)))
    for x, w in product(((3, 4), (3, 4, 1)), ((4, 5), (5, 4, 1))):
        with pytest.raises(TypeCheckError, match="ffn_gate"):
            table["ffn_gate"](zeros(x), zeros(w))


def test_no_command_imports_it() -> None:
    modules = "cli, svf, svf_torch.backend, svf_jax.backend, stages.judge.audit"
    code = f"import sys, {modules}; print([m for m in ('jaxtyping', 'beartype') if m in sys.modules])"
    done = fresh(code)
    assert done.stdout.strip() == "[]", done.stderr
