"""The run-time type checker of the tests: beartype, with an int accepted where a float is asked for (PEP 484).

Shapes are checked by jaxtyping's decorator, which binds the arguments of every call anew. It is put only on functions
whose annotations have a shape; beartype alone checks the others. That is a third of the time of the tests of models.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
check_shapes = jaxtyping.jaxtyped


def has_shape(annotation: Any) -> bool:
    """True for an annotation with an array's shape anywhere in it, and for one that is not evaluated yet."""
    if isinstance(annotation, str):
        return True
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(has_shape, annotation if isinstance(annotation, list | tuple) else get_args(annotation)))


def check_where_needed(function: Any = None, **options: Any) -> Callable[..., Any]:
    """Decorate as `jaxtyping.jaxtyped` does, but for functions without a shape in their annotations."""
    if function is None:
        return lambda function: check_where_needed(function, **options)
    if inspect.isfunction(function) and not any(map(has_shape, inspect.get_annotations(function).values())):
        typechecker: Callable[..., Any] = options["typechecker"]
        return typechecker(function)
    return check_shapes(function, **options)


jaxtyping.jaxtyped = check_where_needed
