"""Run a forward so that it changes nothing: random generators, attributes, settings and buffers are put back.

`steady_draws` gives each forward the same random numbers, and none of those of the loop around it. `StateKeeper` puts
back what a forward changes in its model, so that no score depends on what was scored before.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

SEED = 0


@contextmanager
def steady_draws(device: torch.device) -> Iterator[None]:
    """Give a forward one seed for what it draws (Reformer hashes by random directions, BigBird picks random blocks).

    The generators of torch and numpy are as they were afterwards: some models seed them in each forward.
    """
    gpu = device.type == "cuda"
    before = np.random.get_state()  # noqa: NPY002  # the generator that BigBird seeds
    try:
        with torch.random.fork_rng([device] if gpu else []):
            torch.default_generator.manual_seed(SEED)
            if gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(SEED)
            np.random.seed(SEED)  # noqa: NPY002
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


T = TypeVar("T")

logger = logging.getLogger(__name__)

# A tensor that is no weight is copied up to this size; a larger one, and every weight, may not be changed in place.
COPIED_BYTES = 2**20
# What every module has: tables of hooks, which are left alone, and of its parts, which are looked at one by one.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
CONTAINERS = (dict, list, set, deque)
# Objects of these packages move weights about, or hold locks and streams: what they keep is their own affair.
LEFT_ALONE = ("torch", "accelerate", "deepspeed", "peft", "bitsandbytes", "builtins", "threading", "logging", "_thread")
# Packages whose modules gather and release weights within a forward.
SHARDING = ("torch.distributed", "deepspeed")
ABSENT = object()
VERSION = attrgetter("_version")


@dataclass(eq=False)
class StateKeeper:
    """A runner of forwards that puts back what they change in the model.

    It remembers the model's state from one forward to the next, as looking it up costs more than comparing it: most
    forwards change nothing, and nobody changes the model between them.
    """

    state: "State | None" = None

    def run(self, model: nn.Module, forward: Callable[[], T]) -> T:
        """Run a forward, and put back what it changed in the model, so that no score depends on earlier inputs.

        Weights cannot be put back, for no copy is held. A model that prepares them at its first forward, as RWKV does,
        is read again; one that changes them each time is refused.
        """
        for _ in range(2):
            if self.state is None or not self.state.is_of(model) or not self.state.is_now():
                self.state = None
                parts = list(model.modules())
                if any(map(is_sharded, set(map(type, parts)))):
                    return forward()
                self.state = State(parts)
            try:
                answer = forward()
            finally:
                weights = self.state.put_back()
            if not weights:
                return answer
        raise ValueError(
            f"a scorer needs a model whose forward leaves its weights alone, {type(model).__name__} changes "
            f"{', '.join(weights[:4])} in each forward: a score would depend on what was scored before"
        )


class Contents(NamedTuple):
    """A dict, list, set or deque of a model, and a copy of it."""

    name: str
    held: Any
    before: Any

    def put_back(self) -> list[str]:
        """Restore the contents; return the names of what was replaced, added or removed."""
        held, before = self.held, self.before
        if are_identical(held, before):
            return []
        if not isinstance(held, dict):
            held.clear()
            (held.update if isinstance(held, set) else held.extend)(before)
            return [self.name]
        changed = [key for key in {**held, **before} if held.get(key, ABSENT) is not before.get(key, ABSENT)]
        for key in changed:
            if key in before:
                held[key] = before[key]
            else:
                del held[key]
        return [f"{self.name}.{key}" for key in changed]


class Numbers(NamedTuple):
    """A small tensor of a model that is no weight, and a copy of it."""

    name: str
    tensor: Tensor
    before: Tensor

    def put_back(self) -> list[str]:
        """Restore the numbers; return the tensor's name if they had changed."""
        if torch.equal(self.tensor, self.before):
            return []
        self.tensor.detach().copy_(self.before)
        return [self.name]


class State:
    """A model's attributes, settings, buffers and weights as they are now: all that a forward may change."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = parts
        self.tables = [[table.copy() for table in tables_of(part)] for part in parts]
        self.contents: list[Contents] = []
        self.numbers: list[Numbers] = []
        self.versions: list[tuple[str, Tensor, int]] = []
        """Weights, and other tensors that are not copied, and how often each had been written to."""
        self._attributes = [*chain.from_iterable(map(dict.values, map(vars, parts)))]
        """The attributes of all modules in one list, which is compared in one go."""
        self._inside = [each for part in parts for each in tables_of(part)[1:]]
        self._filled = [(each, each.copy()) for each in self._inside if each]
        self._sizes = [*map(len, self._inside)]
        self._seen: set[int] = set()
        for part in parts:
            name, inside = type(part).__name__, vars(part)
            self.versions += [
                (name, weight, version(weight)) for weight in part._parameters.values() if weight is not None
            ]
            self._note(name, {key: inside[key] for key in inside.keys() - OF_EVERY_MODULE})
            if part._buffers:
                self._note(name, part._buffers)
        self._written = [tensor for _, tensor, _ in self.versions if not tensor.is_inference()]
        self._written_before = [*map(VERSION, self._written)]

    def is_of(self, model: nn.Module) -> bool:
        """Tell if this is the state of a model."""
        return self.parts[0] is model

    def is_now(self) -> bool:
        """Tell if all is as it was: the very same things, or equal ones."""
        if [*map(VERSION, self._written)] != self._written_before:
            return False
        try:
            return (
                [*chain.from_iterable(map(dict.values, map(vars, self.parts)))] == self._attributes
                and [*map(len, self._inside)] == self._sizes
                and all(now == before for now, before in self._filled)
                and all(each.held == each.before for each in self.contents)
                and all(torch.equal(each.tensor, each.before) for each in self.numbers)
            )
        except Exception:  # noqa: BLE001 (equality of arrays and of anybody's objects raises; they are others then)
            return False

    def put_back(self) -> list[str]:
        """Put back what was changed; return the names of changed weights, of which there is no copy.

        If there are any, all stays as it is: the rest may say that those were changed.
        """
        if self.is_now():
            return []
        if lost := [name for name, tensor, before in self.versions if version(tensor) != before]:
            return sorted({f"the weights of its {name}" for name in lost})
        contents = [
            Contents(type(part).__name__, now, before)
            for part, tables in zip(self.parts, self.tables, strict=True)
            for now, before in zip(tables_of(part), tables, strict=True)
            if not are_identical(now, before)
        ]
        changed = {name for each in (*contents, *self.contents) for name in each.put_back()}
        changed |= {name for each in self.numbers for name in each.put_back()}
        if changed:
            logger.info("a forward changes %s: put back", ", ".join(sorted(changed)[:8]))
        return []

    def _note(self, name: str, values: Mapping[str, Any]) -> None:
        """Note the things that a module holds, and whatever those hold in turn."""
        waiting = [(f"{name}.{key}", value) for key, value in values.items() if may_change(value)]
        while waiting:
            where, value = waiting.pop()
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                if isinstance(value, nn.Parameter) or not is_small(value):
                    self.versions.append((where, value, version(value)))
                else:
                    self.numbers.append(Numbers(where, value, value.detach().clone()))
                continue
            held = value if isinstance(value, (tuple, *CONTAINERS)) else vars(value)
            if not isinstance(held, tuple):
                self.contents.append(Contents(where, held, held.copy()))
            items = held.items() if isinstance(held, dict) else enumerate(held)
            waiting += [(f"{where}.{key}", each) for key, each in items if may_change(each)]


def tables_of(part: nn.Module) -> list[dict[str, Any]]:
    """Return a module's tables: attributes, buffers, parts, and weights unless accelerate moves those in and out."""
    tables: list[dict[str, Any]] = [vars(part), part._buffers, part._modules]
    return tables if "_hf_hook" in tables[0] else [*tables, part._parameters]


def are_identical(now: Any, before: Any) -> bool:
    """Tell if two containers hold the very same things, in the same order."""
    both = (now.values(), before.values()) if isinstance(now, dict) else (now, before)
    return len(now) == len(before) and all(map(is_, *both))


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; those that were made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def is_small(tensor: Tensor) -> bool:
    """Tell if a copy of a tensor is cheap, and possible."""
    return tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.nbytes <= COPIED_BYTES


def may_change(value: object) -> bool:
    """Tell if a thing holds something that a forward may change: not numbers, texts, functions or modules."""
    kind: Any = type(value)
    return holds_things(kind)


@cache
def holds_things(kind: type) -> bool:
    """Tell if things of a type are tensors, containers, settings, or objects of somebody's own class."""
    if issubclass(kind, (Tensor, tuple, *CONTAINERS, PretrainedConfig)):
        return True
    if issubclass(kind, nn.Module | type) or "__dict__" not in dir(kind):
        return False
    return not any(base.__module__.split(".")[0] in LEFT_ALONE for base in kind.__mro__ if base is not object)


@cache
def is_sharded(kind: type) -> bool:
    """Tell if modules of a type gather their weights for a forward, and release them."""
    return any(base.__module__.startswith(SHARDING) for base in kind.__mro__)
