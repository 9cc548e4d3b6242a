"""Checks of what a call does besides scoring: to the process, to other threads, to copies and to the fingerprint."""

import json
import pickle
import random
import sys
import sysconfig
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import Fingerprinted, call, check_scores, fingerprint, name_of, score
from calibrated_rewards.testing.process_state import GROWS, RANDOM, find_changes, process_state, restore
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


def check_process(subject: Subject) -> Outcome:
    """A call leaves random states, working directory, environment and settings of numpy and torch as they were."""
    some = subject.pairs.at(range(min(FEW, len(subject.pairs))))
    subject.call(some)  # the first call may import libraries
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
    subject.call(pairs)
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
        workers = [threading.Thread(target=answer_one, args=(place,)) for place in range(len(groups))]
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
        place = (frame.f_code, frame.f_lasti)
        visits[place] += 1
        if chance.random() < PAUSES / (visits[place] * max(PAUSES, len(visits))):
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
