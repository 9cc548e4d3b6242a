"""What a process has only one of, and a call of a scorer leaves as it was: random states, folder, settings of torch."""

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
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

RANDOM = ("random's state", "numpy's random state", "torch's random state")
# Importing a library on the first call may add to these.
GROWS = ("the environment", "the warnings filters", "the signal handlers", "the level of the root logger", "sys.path")


def process_state() -> dict[str, Any]:
    """Everything that is compared, by its name; of torch only if it is imported.

    >>> "the working directory" in process_state()
    True
    """
    torch = sys.modules.get("torch")
    of_torch = {} if torch is None else {name: read(torch) for name, read in OF_TORCH.items()}
    return {name: read() for name, read in OF_PYTHON.items()} | of_torch


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what is in both and differs."""
    return [name for name in before if name in after and before[name] != after[name]]


def put_back(state: Mapping[str, Any]) -> None:
    """Restore what would disturb the caller: random states, folder, environment, settings of torch."""
    for name in changed(state, process_state()):
        if name in WRITERS:
            WRITERS[name](state[name])


def _environment(values: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _numpy_state() -> Any:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global one is what is asked about)
    return (kind, np.asarray(keys).tobytes(), *rest)


def _put_numpy_state(state: Any) -> None:
    kind, keys, *rest = state
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002 (see above)


def _torch_random(torch: Any) -> list[list[int]]:
    states = [torch.random.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.tolist() for state in states]


def _put_torch_random(states: list[list[int]]) -> None:
    torch = sys.modules["torch"]
    first, *others = (torch.tensor(state, dtype=torch.uint8) for state in states)
    torch.random.set_rng_state(first)
    if others:
        torch.cuda.set_rng_state_all(others)


def _put_log_level(levels: tuple[int, int]) -> None:
    logging.root.setLevel(levels[0])
    logging.disable(levels[1])


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _put_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


OF_PYTHON: dict[str, Callable[[], Any]] = {
    "random's state": random.getstate,
    "numpy's random state": _numpy_state,
    "the working directory": os.getcwd,
    "the environment": lambda: dict(os.environ),
    "the locale": lambda: locale.setlocale(locale.LC_ALL),
    "the warnings filters": lambda: tuple(warnings.filters),
    "numpy's handling of errors": np.geterr,
    "numpy's print options": lambda: repr(sorted(np.get_printoptions().items(), key=str)),
    "the level of the root logger": lambda: (logging.root.level, logging.root.manager.disable),
    "sys.path": lambda: list(sys.path),
    "the recursion limit": sys.getrecursionlimit,
    "the switch interval of threads": sys.getswitchinterval,
    "the signal handlers": _handlers,
    "sys.stdout and sys.stderr": lambda: (sys.stdout, sys.stderr),
    "the garbage collector": gc.isenabled,
    "the precision of decimals": lambda: repr(decimal.getcontext()),
}

OF_TORCH: dict[str, Callable[[Any], Any]] = {
    "torch's random state": _torch_random,
    "torch's default dtype": lambda torch: torch.get_default_dtype(),
    "torch's default device": lambda torch: str(torch.tensor(0).device),
    "torch's number of threads": lambda torch: torch.get_num_threads(),
    "torch's gradient mode": lambda torch: torch.is_grad_enabled(),
    "torch's inference mode": lambda torch: torch.is_inference_mode_enabled(),
    "torch's autocast": lambda torch: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    "torch's deterministic algorithms": lambda torch: torch.are_deterministic_algorithms_enabled(),
    "torch's matmul precision": lambda torch: torch.get_float32_matmul_precision(),
    "torch's cudnn settings": lambda torch: (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.enabled,
    ),
}


def _torch_writer(name: str) -> Callable[[Any], Any]:
    """One of torch's functions, which is imported when it is called."""

    def write(value: Any) -> None:
        getattr(sys.modules["torch"], name)(value)

    return write


WRITERS: dict[str, Callable[[Any], Any]] = {
    "random's state": random.setstate,
    "numpy's random state": _put_numpy_state,
    "the working directory": os.chdir,
    "the environment": _environment,
    "the locale": partial(locale.setlocale, locale.LC_ALL),
    "numpy's handling of errors": lambda value: np.seterr(**value),
    "the level of the root logger": _put_log_level,
    "the signal handlers": _put_handlers,
    "sys.path": partial(sys.path.__setitem__, slice(None)),
    "the recursion limit": sys.setrecursionlimit,
    "the switch interval of threads": sys.setswitchinterval,
    "torch's random state": _put_torch_random,
    "torch's default dtype": _torch_writer("set_default_dtype"),
    "torch's default device": _torch_writer("set_default_device"),
    "torch's number of threads": _torch_writer("set_num_threads"),
    "torch's gradient mode": _torch_writer("set_grad_enabled"),
    "torch's deterministic algorithms": _torch_writer("use_deterministic_algorithms"),
    "torch's matmul precision": _torch_writer("set_float32_matmul_precision"),
}
