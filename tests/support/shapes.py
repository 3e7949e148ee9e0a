"""Shapes of stage functions: their annotations, checked at every call of a test that has new shapes, and read for the
law.

Imported before any stage function is defined (conftest.py): what registers one then wraps it. The annotations are
strings, whose names are imported for the type checker alone, so that no command pays for `jaxtyping`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import beartype

from stages.spec.stage import Functions

Function = Callable[..., Any]
_add = Functions.__call__


def annotations(function: Function) -> dict[str, Any]:
    """A stage function's annotations, with the result's as `return`."""
    names = {**vars(jaxtyping), **function.__globals__}  # type: ignore[attr-defined]
    texts = function.__annotations__.items()
    return {name: eval(text, names) if isinstance(text, str) else text for name, text in texts}


def axes(annotation: Any) -> tuple[str, ...]:
    """The axes that an annotation names, one entry for each shape that it allows; none for what is no array."""
    if hasattr(annotation, "dim_str"):
        return (annotation.dim_str,)
    return tuple(shape for part in get_args(annotation) for shape in axes(part))


def _checked(functions: Functions[Function], function: Function) -> Function:
    # A function in float64 has the shapes of the native one, in whose place it is put.
    native = functions.get(function.__name__)
    function.__annotations__ = annotations(function) | (
        {} if native is None else {name: of for name, of in annotations(native).items() if axes(of)}
    )
    return _add(functions, _once(function, jaxtyping.jaxtyped(function, typechecker=beartype)))


def _once(function: Function, checked: Function) -> Function:
    """`checked` where arguments or a result have other types and shapes than before, else `function`.

    A check is most of the time of a small call, and sees nothing else of an array.
    """
    results: dict[Any, Any] = {}

    @functools.wraps(checked)
    def call(*args: Any, **options: Any) -> Any:
        given = (*map(_seen, args), *((name, _seen(value)) for name, value in options.items()))
        if given in results:
            out = function(*args, **options)
            if _seen(out) == results[given]:
                return out
        out = checked(*args, **options)
        results[given] = _seen(out)
        return out

    return call


def _seen(value: Any) -> Any:
    """What a check sees of a value: type, dtype and shape of an array, a number's type, an axis itself."""
    if hasattr(value, "shape"):
        return type(value), value.dtype, tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return type(value), *map(_seen, value)
    return (type(value), value) if isinstance(value, (int, str, type(None))) else type(value)


Functions.__call__ = _checked  # type: ignore[method-assign]
