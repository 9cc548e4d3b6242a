"""Where work may be done: in this process, or by a cluster of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Cluster(Protocol):
    """Other processes that do work: `cluster(function, tasks)` gives the results as they come, in any order."""

    def __call__(self, function: Callable[[Any], Any], tasks: Iterable[Any], /) -> Iterator[Any]:
        """function(task) for each task, once; done again elsewhere if the one who did it dies.

        Tasks are taken as there is somebody to do them: other processes can do those that are not.
        """
