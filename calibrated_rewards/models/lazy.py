"""Attributes that are loaded at their first use, and objects that pickle as how they are loaded, not as weights.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Words:
...     path: str
...     __getstate__ = fields_only
...
...     @Lazy
...     def list(self) -> list[str]:
...         return self.path.split("/")
>>> words = Words("a/b")
>>> words.list, words.list is words.list, words.__getstate__()
(['a', 'b'], True, {'path': 'a/b'})
"""

import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Generic, Protocol, TypeVar, overload, runtime_checkable

T = TypeVar("T")

# One thread at a time: two that ask first would otherwise load the weights twice.
_LOADING = threading.RLock()


@runtime_checkable
class Recipe(Protocol):
    """The description by which an object is loaded: small, and the same in every process."""

    @property
    def name(self) -> str:
        """The folder, repository or server that the object comes from."""

    def load(self) -> Any:
        """Load the object itself, with its weights."""


class Lazy(Generic[T]):
    """An attribute that is computed at its first use, by one thread in the process at a time.

    Its value then hides the descriptor in the instance's `__dict__`, so that later uses cost nothing.
    """

    def __init__(self, load: Callable[[Any], T]) -> None:
        self.load, self.__doc__ = load, load.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "Lazy[T]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> "Lazy[T] | T":
        if instance is None:
            return self
        with _LOADING:
            attributes = vars(instance)
            if self.name not in attributes:
                attributes[self.name] = self.load(instance)
            return attributes[self.name]  # type: ignore[no-any-return]


def fields_only(instance: Any) -> dict[str, Any]:
    """Return the state of a dataclass without what it has loaded or cached: a `__getstate__` for its class."""
    return {each.name: vars(instance)[each.name] for each in fields(instance)}
