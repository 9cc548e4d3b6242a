"""Checks of what a call does besides scoring: to the process, to other threads, to copies and to the fingerprint."""

import decimal
import gc
import json
import locale
import logging
import os
import pickle
import random
import signal
import sys
import sysconfig
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import Fingerprinted, call, check_scores, fingerprint, name_of, score
from calibrated_rewards.testing.subject import Outcome, Subject

THREADS, EACH, CALLS = 8, 3, 6
# Pairs for the process, a copy, or a scorer with another setting.
FEW = 8
# Code that is not the scorer's author's: Python's, that of installed libraries, and ours.
PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
OURS = str(Path(__file__).parents[1])
LIBRARIES = (*{sysconfig.get_paths()[name] for name in PLACES}, OURS, "<frozen", "<string", "<@")
# Seconds for which a thread pauses at an instruction of the scorer's own code, and the number of such instructions;
# less often at an instruction that comes round again.
PAUSE, PAUSES = 1e-4, 400
# Seconds after which Python switches to another thread, in place of 5 ms.
SWITCH = 1e-6
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


def check_process(subject: Subject) -> Outcome:
    """A call leaves random states, working directory, environment and settings of numpy and torch as they were."""
    some = subject.pairs.at(range(min(FEW, len(subject.pairs))))
    subject.call_scorer(some)  # the first call may import libraries
    ours = process_state()
    since = {name for name in find_changes(subject.before, ours) if name not in (*RANDOM, *GROWS)}
    restore({name: subject.before[name] for name in GROWS})
    by_call: set[str] = set()
    try:
        (first, _), (second, after) = (_changes_of_a_call(subject, some) for _ in range(2))
        # Random states have to change in both calls; another part in one of them.
        by_call = (first & second) | ((first | second) - {*RANDOM})
        seeded = [name for name in RANDOM if name in by_call and _is_seeded(subject, some, name, after)]
    finally:
        restore(ours | {name: subject.before[name] for name in (since | by_call) - {*RANDOM}})
    drawn = [name for name in sorted(by_call) if name in RANDOM and name != "random's state"]
    others = sorted((since | by_call) - {*RANDOM})
    if seeded:
        return Outcome(
            "FAIL",
            f"each call sets {' and '.join(sorted(seeded))} to one and the same state: a training run around it draws "
            "the same random numbers again and again -> use a generator of your own: random.Random(seed), "
            "numpy.random.default_rng(seed), torch.Generator().manual_seed(seed)",
        )
    if drawn:
        return Outcome(
            "FAIL",
            f"each call draws from {' and '.join(drawn)}: what a training run samples next depends on how often it "
            "scored -> use a generator of your own; if it is a model's dropout, model.eval()",
        )
    if others:
        changes = ", ".join(_describe_change(name, subject.before.get(name), after[name]) for name in others)
        return Outcome("FAIL", f"a call changes {changes} for the whole process -> put it back before the call returns")
    # Type checkers that look at a random item of a list, as beartype, draw from it: no fault of the scorer.
    return Outcome("ok", "it draws from random's state" * ("random's state" in by_call))


def _changes_of_a_call(subject: Subject, pairs: Any) -> tuple[set[str], dict[str, Any]]:
    copy = deepcopy(pairs)
    subject.scored_pairs.append(len(copy))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _draw_random_numbers()
        before = process_state()
        call(subject.scorer, copy.prompts, copy.completions)
        after = process_state()
    return {*find_changes(before, after)}, after


def _is_seeded(subject: Subject, pairs: Any, name: str, after: dict[str, Any]) -> bool:
    """Return True if the random state after a call is the same whatever it was before."""
    _draw_random_numbers()
    subject.call_scorer(pairs)
    return bool(process_state().get(name) == after[name])


def _draw_random_numbers() -> None:
    """Draw from all global generators, so that a state that comes back was set by the scorer."""
    random.random()
    np.random.random()  # noqa: NPY002 (the global generator is the subject)
    if sys.modules.get("torch") is not None:
        sys.modules["torch"].rand(1)


def _describe_change(name: str, before: Any, after: Any) -> str:
    """Name what was changed; of the environment only the names, since values may be secrets."""
    if name == "the environment":
        return f"{name} ({', '.join(sorted(key for key, _ in before.items() ^ after.items()))})"
    return name if name in GROWS or before == after else f"{name} ({start_of(before)} becomes {start_of(after)})"


def check_threads(subject: Subject) -> Outcome:
    """Calls from several threads at once, each with other pairs, give the scores that one thread gets."""
    claim = getattr(subject.scorer, "thread_safe", None)
    if claim is False:
        return Outcome("-", "thread_safe = False: rewards call it from one thread at a time")
    some = range(min(EACH * THREADS, len(subject.pairs)))
    groups = [list(some[i::THREADS]) or [0] for i in range(THREADS)]
    pairs = subject.pairs.at([i for group in groups for i in group])
    alone, again = (np.concatenate([subject.score(subject.pairs.at(group)) for group in groups]) for _ in range(2))
    if subject.compare(pairs, again, alone, "").status == "FAIL":
        return Outcome("-", "not asked: one thread alone does not get the same scores twice")
    hint = (
        "a call keeps its input or output where other threads write: use local variables, or take a lock. Rewards call "
        "it from one thread at a time, other callers may not; if you know that, say thread_safe = False"
        if claim is not True
        else "it says thread_safe = True, and is not: a call keeps its input or output where other threads write"
    )
    for number in range(CALLS):
        answers = _call_at_once(subject, groups, number)
        error = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if error is not None:
            message = f"{type(error).__name__}: {error}"
            return Outcome("FAIL", f"called from {THREADS} threads at once it raises {message} -> {hint}")
        outcome = subject.compare(pairs, np.concatenate(answers), alone, hint)
        if outcome.status == "FAIL":
            return Outcome("FAIL", f"called from {THREADS} threads at once: {outcome.detail}")
    return Outcome("ok")


def _call_at_once(subject: Subject, groups: list[list[int]], number: int) -> list[Any]:
    """Score each group in a thread of its own, and return scores or errors; later rounds start them farther apart."""
    answers: list[Any] = [None] * len(groups)
    start, home = threading.Barrier(len(groups)), _find_file(subject.scorer)

    def answer_one(place: int) -> None:
        copy = deepcopy(subject.pairs.at(groups[place]))
        try:
            start.wait(60)
            time.sleep(5 * number * place * PAUSE)
            with _random_pauses(home, number * THREADS + place):
                answer = call(subject.scorer, copy.prompts, copy.completions)
                time.sleep(PAUSE)
            answers[place] = check_scores(answer, copy.prompts, copy.completions, name_of(subject.scorer))
        except Exception as error:  # noqa: BLE001 (whatever another thread causes here is the finding)
            answers[place] = error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workers = [threading.Thread(target=answer_one, args=(i,)) for i in range(len(groups))]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(interval)
    subject.scored_pairs.append(sum(map(len, groups)))
    return answers


@contextmanager
def _random_pauses(home: str, seed: int) -> Iterator[None]:
    """Pause this thread at random instructions of the scorer's own code, so that races happen."""
    chance, visits = random.Random(seed), Counter[tuple[Any, int]]()

    def pause(frame: FrameType, _event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        instruction = (frame.f_code, frame.f_lasti)
        visits[instruction] += 1
        if chance.random() < PAUSES / (visits[instruction] * max(PAUSES, len(visits))):
            time.sleep(PAUSE)
        return pause

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        installed = file.startswith(LIBRARIES) or "site-packages" in file or file == call.__code__.co_filename
        return pause(frame, event, arg) if file == home or not installed else None

    before = sys.gettrace()
    if not home.startswith(OURS):
        sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _find_file(scorer: object) -> str:
    """Find the file of a scorer's code."""
    owner = scorer if isinstance(scorer, FunctionType) else type(scorer)
    return getattr(sys.modules.get(owner.__module__), "__file__", None) or ""


def check_pickled(subject: Subject) -> Outcome:
    """A pickled copy, as another process gets it, has the same scores and fingerprint."""
    if subject.model is not None:
        return Outcome("-", "the scorer shows a model, which is not copied")
    try:
        data = pickle.dumps(subject.scorer)
    except Exception as error:  # noqa: BLE001 (each class refuses pickling with an error of its own)
        return Outcome("-", f"it is not pickled: {type(error).__name__}: {error}")
    copy = pickle.loads(data)
    some = subject.pairs.at(range(min(FEW, len(subject.pairs))))
    subject.scored_pairs.append(len(some))
    if fingerprint(copy) != fingerprint(subject.scorer):
        return Outcome(
            "FAIL", "a pickled copy has another fingerprint -> pickle all settings that the scores depend on"
        )
    hint = (
        "a copy in another process scores otherwise -> pickle all that the scores depend on (__getstate__, __reduce__)"
    )
    return subject.compare(some, score(copy, some.prompts, some.completions), subject.mixed[: len(some)], hint)


def check_fingerprint(subject: Subject) -> Outcome:
    """The fingerprint is JSON, is the same after all calls, and differs where a setting changes the scores."""
    now = fingerprint(subject.scorer)
    try:
        plain = json.loads(json.dumps(now))
    except (TypeError, ValueError) as error:
        return Outcome("FAIL", f"the fingerprint is no JSON, {error} -> give texts, numbers, lists and dicts")
    if " at 0x" in json.dumps(plain):
        return Outcome(
            "FAIL", "the fingerprint holds an address in memory, which each process has anew -> leave it out"
        )
    if fingerprint(subject.scorer) != now or now != subject.fingerprint:
        if not isinstance(subject.scorer, Fingerprinted):
            return Outcome("-", "calls change what the scorer holds: a run knows it by its code, and scores some again")
        return Outcome(
            "FAIL", "the fingerprint differs from call to call -> it says what the scores depend on, no more"
        )
    some = subject.pairs.at(range(min(FEW, len(subject.pairs))))
    for name, other in _change_settings(subject.scorer):
        try:
            scores = score(other, some.prompts, some.completions)
            same = json.loads(json.dumps(fingerprint(other))) == plain
        except Exception:  # noqa: BLE001 (our value may be invalid for the setting)
            continue
        subject.scored_pairs.append(len(some))
        if same and subject.compare(some, scores, subject.mixed[: len(some)], "").status == "FAIL":
            return Outcome(
                "FAIL",
                f"with another value of {name} a score of {subject.mixed[0]:.6g} becomes {scores[0]:.6g}, and the "
                f"fingerprint is the same -> add {name} to fingerprint(): a run that goes on would mix both scores",
            )
    return Outcome("ok")


def _change_settings(scorer: Any) -> Iterator[tuple[str, Any]]:
    """Change one number of a scorer that is a dataclass, field by field; a scorer that asks a server is left alone."""
    if not is_dataclass(scorer) or isinstance(scorer, type) or hasattr(scorer, "url"):
        return
    for each in fields(scorer):
        value = getattr(scorer, each.name)
        if each.init and isinstance(value, bool | int | float):
            try:
                yield each.name, replace(scorer, **{each.name: not value if isinstance(value, bool) else 2 * value + 1})
            except (TypeError, ValueError):
                continue
