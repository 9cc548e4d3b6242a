"""The run-time type checker of the tests: beartype, with an int accepted where a float is asked for (PEP 484).

Sizes of axes are compared within a call. jaxtyping's own decorator binds the arguments of every call anew and has
beartype check them twice, which took half the time of the tests of models. Here a call with shapes is a context of
jaxtyping in which beartype checks once, and a call without is left to beartype. jaxtyping keeps what only it can do:
annotations that cannot be evaluated yet, which it takes for Any, and sizes computed from arguments, as in
" {2*K+1}".
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

checked = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
jaxtyped = jaxtyping.jaxtyped
# Of a function that a test calls more than MOST times, as an integrator calls a slope, one call in EVERY is checked.
MOST, EVERY = 1000, 16
called: list[Callable[[], None]] = []
"""What sets the counts of functions that were called in this test back to 0."""


def count_anew() -> None:
    """Count the calls of every function from 0, as at the start of a test."""
    for forget in called:
        forget()
    called.clear()


def parts(annotation: Any) -> list[Any]:
    """List an annotation and all within it, but for the values of a Literal."""
    if get_origin(annotation) is Literal:
        return [annotation]
    inner = annotation if isinstance(annotation, list | tuple) else get_args(annotation)
    return [annotation, *(part for each in inner for part in parts(each))]


def check(function: Any = None, *, typechecker: Any) -> Any:
    """Decorate a function or a dataclass as `jaxtyping.jaxtyped` does, in less time a call."""
    if function is None:
        return functools.partial(check, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and not hasattr(function.__init__, "__wrapped__"):
            function.__init__ = check(function.__init__, typechecker=typechecker)  # type: ignore[misc]
        return function
    if not inspect.isfunction(function):
        return jaxtyped(function, typechecker=typechecker)
    return check_from_first_call(function, typechecker)


def check_from_first_call(function: Any, typechecker: Any) -> Any:
    """Wrap a function: call it checked, or as it is where checks are off or it was called so often.

    The checker is made at the first call that it is asked for: most tests call few of the thousands of functions.
    """
    typed: Any = None
    count = 0

    def forget() -> None:
        nonlocal count
        count = 0

    # An optimum takes millions of calls: those that are not checked cost no more than a sum and a remainder.
    @functools.wraps(function)
    def run_checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal typed, count
        count += 1
        if count > MOST and count % EVERY:
            return function(*args, **kwargs)
        if count == 1:
            called.append(forget)
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if typed is None:
            typed = make_checked(function, typechecker)
        return typed(*args, **kwargs)

    return run_checked


def make_checked(function: Any, typechecker: Any) -> Any:
    """Return the function with all of its calls checked."""
    try:
        function.__annotations__ = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return jaxtyped(function, typechecker=typechecker)
    annotations = [part for each in function.__annotations__.values() for part in parts(each)]
    shapes = [part.dim_str for part in annotations if isinstance(part, type) and issubclass(part, AbstractArray)]
    if any("{" in shape for shape in shapes):
        return jaxtyped(function, typechecker=typechecker)
    typed = typechecker(function)
    if not shapes:
        return typed

    @functools.wraps(typed)
    def run_in_context(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return typed(*args, **kwargs)

    return run_in_context
