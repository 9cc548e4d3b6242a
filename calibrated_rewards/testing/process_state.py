"""The state that a process has only once and a scorer must leave alone: random states, folder, settings of torch."""

import decimal
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

RANDOM = ("random's state", "numpy's random state", "torch's random state")
# Importing a library in the first call may add to these.
GROWS = ("the environment", "the warnings filters", "the signal handlers", "the level of the root logger", "sys.path")


class Part(NamedTuple):
    """A part of the state: how it is read, and how it is restored if leaving it changed would disturb the caller."""

    read: Callable[[], Any]
    write: Callable[[Any], Any] | None = None


def process_state() -> dict[str, Any]:
    """Read all parts of the state by name; those of torch only if it is imported.

    >>> "the working directory" in process_state()
    True
    """
    has_torch = sys.modules.get("torch") is not None
    return {name: part.read() for name, part in PARTS.items() if has_torch or not name.startswith("torch")}


def find_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Name the parts that are in both states and differ."""
    return [name for name in before if name in after and before[name] != after[name]]


def restore(state: Mapping[str, Any]) -> None:
    """Restore what would disturb the caller: random states, folder, environment, settings of torch."""
    for name in find_changes(state, process_state()):
        if (write := PARTS[name].write) is not None:
            write(state[name])


def _write_environment(values: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _read_numpy_random() -> Any:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global generator is the subject)
    return (kind, np.asarray(keys).tobytes(), *rest)


def _write_numpy_random(state: Any) -> None:
    kind, keys, *rest = state
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002 (see above)


def _read_torch_random() -> list[list[int]]:
    torch: Any = sys.modules["torch"]
    states = [torch.random.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.tolist() for state in states]


def _write_torch_random(states: list[list[int]]) -> None:
    torch: Any = sys.modules["torch"]
    first, *others = (torch.tensor(state, dtype=torch.uint8) for state in states)
    torch.random.set_rng_state(first)
    if others:
        torch.cuda.set_rng_state_all(others)


def _write_log_level(levels: tuple[int, int]) -> None:
    logging.root.setLevel(levels[0])
    logging.disable(levels[1])


def _read_handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _write_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _call_torch(name: str, *arguments: Any) -> Any:
    """Call a function of torch, which is not imported for this."""
    return getattr(sys.modules["torch"], name)(*arguments)


def _read_cudnn() -> tuple[bool, ...]:
    cudnn: Any = sys.modules["torch"].backends.cudnn
    return (cudnn.benchmark, cudnn.deterministic, cudnn.enabled)


def _torch_parts() -> Iterator[tuple[str, Part]]:
    for name, reader, writer in (
        ("default dtype", "get_default_dtype", "set_default_dtype"),
        ("number of threads", "get_num_threads", "set_num_threads"),
        ("gradient mode", "is_grad_enabled", "set_grad_enabled"),
        ("deterministic algorithms", "are_deterministic_algorithms_enabled", "use_deterministic_algorithms"),
        ("matmul precision", "get_float32_matmul_precision", "set_float32_matmul_precision"),
    ):
        yield f"torch's {name}", Part(partial(_call_torch, reader), partial(_call_torch, writer))
    device = partial(_call_torch, "set_default_device")
    yield "torch's default device", Part(lambda: str(_call_torch("tensor", 0).device), device)
    yield "torch's inference mode", Part(partial(_call_torch, "is_inference_mode_enabled"))
    yield "torch's autocast", Part(lambda: [_call_torch("is_autocast_enabled", kind) for kind in ("cpu", "cuda")])
    yield "torch's cudnn settings", Part(_read_cudnn)
    yield "torch's random state", Part(_read_torch_random, _write_torch_random)


PARTS: dict[str, Part] = {
    "random's state": Part(random.getstate, random.setstate),
    "numpy's random state": Part(_read_numpy_random, _write_numpy_random),
    "the working directory": Part(os.getcwd, os.chdir),
    "the environment": Part(lambda: dict(os.environ), _write_environment),
    "the locale": Part(lambda: locale.setlocale(locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL)),
    "the warnings filters": Part(lambda: tuple(warnings.filters)),
    "numpy's handling of errors": Part(np.geterr, lambda value: np.seterr(**value)),
    "numpy's print options": Part(lambda: repr(sorted(np.get_printoptions().items(), key=str))),
    "the level of the root logger": Part(lambda: (logging.root.level, logging.root.manager.disable), _write_log_level),
    "sys.path": Part(lambda: list(sys.path), partial(sys.path.__setitem__, slice(None))),
    "the recursion limit": Part(sys.getrecursionlimit, sys.setrecursionlimit),
    "the switch interval of threads": Part(sys.getswitchinterval, sys.setswitchinterval),
    "the signal handlers": Part(_read_handlers, _write_handlers),
    "sys.stdout and sys.stderr": Part(lambda: (sys.stdout, sys.stderr)),
    "the garbage collector": Part(gc.isenabled),
    "the precision of decimals": Part(lambda: repr(decimal.getcontext())),
    **dict(_torch_parts()),
}
