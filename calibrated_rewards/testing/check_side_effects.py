"""Checks of what a call does besides scoring: to the process, to other threads, to copies, to what the scorer says."""

import json
import pickle
import random
import sys
import sysconfig
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import Fingerprinted, call, check_scores, fingerprint, name_of, score
from calibrated_rewards.testing.process_state import GROWS, RANDOM, changed, process_state, put_back
from calibrated_rewards.testing.subject import Outcome, Subject

THREADS, EACH, CALLS = 8, 3, 6
# Pairs that a copy, or a scorer with another setting, is asked about.
FEW = 8
# Code that is not the scorer's author's: Python's, that of installed libraries, and ours.
PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
OURS = str(Path(__file__).parents[1])
LIBRARIES = (*{sysconfig.get_paths()[name] for name in PLACES}, OURS, "<frozen", "<string", "<@")
# How long a thread stands aside at an instruction of the scorer's own, ever less often where it comes by again; and at
# how many instructions.
ASIDE, PAUSES = 1e-4, 400
# Seconds after which Python lets another thread go on, in place of 5 ms.
SWITCH = 1e-6


def process(subject: Subject) -> Outcome:
    """A call leaves random states, working directory, environment and settings of numpy and torch as they were."""
    _called(subject)  # what is imported at the first call is behind us
    ours = process_state()
    since = {name for name in changed(subject.before, ours) if name not in (*RANDOM, *GROWS)}
    put_back({name: subject.before[name] for name in GROWS})
    by_call: list[str] = []
    try:
        by_call, after = _changed_by_a_call(subject)
        seeded = [name for name in by_call if name in RANDOM and _same_after_another_seed(subject, name, after)]
    finally:
        put_back(ours | {name: subject.before[name] for name in {*since, *by_call} - {*RANDOM}})
    drawn = [name for name in by_call if name in RANDOM and name != "random's state"]
    others = sorted({*since, *by_call} - {*RANDOM})
    if seeded:
        return Outcome(
            "FAIL",
            f"each call sets {' and '.join(seeded)} to one and the same state: a training run around it draws the same "
            "random numbers again and again -> use a generator of your own: random.Random(seed), "
            "numpy.random.default_rng(seed), torch.Generator().manual_seed(seed)",
        )
    if drawn:
        return Outcome(
            "FAIL",
            f"each call draws from {' and '.join(drawn)}: what a training run samples next depends on how often it "
            "scored -> use a generator of your own; if it is a model's dropout, model.eval()",
        )
    if others:
        told = ", ".join(_shown(name, subject.before.get(name), after[name]) for name in others)
        return Outcome("FAIL", f"a call changes {told} for the whole process -> put it back before the call returns")
    # Type checkers that look at a random item of a list, as beartype, draw from it: no fault of the scorer.
    return Outcome("ok", "it draws from random's state" * ("random's state" in by_call))


def _shown(name: str, before: Any, after: Any) -> str:
    """What was changed; of the environment the names alone, since values may be secrets."""
    if name == "the environment":
        return f"{name} ({', '.join(sorted(key for key, _ in before.items() ^ after.items()))})"
    return name if name in GROWS or before == after else f"{name} ({start_of(before)} becomes {start_of(after)})"


def _called(subject: Subject) -> Any:
    """An answer of the scorer itself, without the lock and the copies of `score`."""
    given = deepcopy(subject.pairs.at(range(min(FEW, len(subject.pairs)))))
    subject.scored_pairs.append(len(given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(subject.scorer, given.prompts, given.completions)


def _changed_by_a_call(subject: Subject) -> tuple[list[str], dict[str, Any]]:
    """What one of two calls changed, of random states both; and the state behind the second."""
    first, second = (_changed_once(subject) for _ in range(2))
    return sorted((first[0] & second[0]) | ((first[0] | second[0]) - {*RANDOM})), second[1]


def _changed_once(subject: Subject) -> tuple[set[str], dict[str, Any]]:
    given = deepcopy(subject.pairs.at(range(min(FEW, len(subject.pairs)))))
    subject.scored_pairs.append(len(given))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _stir()
        before = process_state()
        call(subject.scorer, given.prompts, given.completions)
        after = process_state()
    return {*changed(before, after)}, after


def _same_after_another_seed(subject: Subject, name: str, after: dict[str, Any]) -> bool:
    """Whether the random state behind a call is the same, whatever it was before."""
    _stir()
    _called(subject)
    return bool(process_state().get(name) == after[name])


def _stir() -> None:
    """Draw from all global generators, so that a state that comes back was set."""
    random.random()
    np.random.random()  # noqa: NPY002 (the global one is what is asked about)
    if "torch" in sys.modules:
        sys.modules["torch"].rand(1)


def threads(subject: Subject) -> Outcome:
    """Calls from several threads at once, each of other pairs, give the scores that one thread gets."""
    says = getattr(subject.scorer, "thread_safe", None)
    if says is False:
        return Outcome("-", "thread_safe = False: rewards call it from one thread at a time")
    some = range(min(EACH * THREADS, len(subject.pairs)))
    groups = [list(some[i::THREADS]) or [0] for i in range(THREADS)]
    lone = np.concatenate([subject.score(subject.pairs.at(group)) for group in groups])
    again = np.concatenate([subject.score(subject.pairs.at(group)) for group in groups])
    at = [i for group in groups for i in group]
    if subject.same(subject.pairs.at(at), again, lone, "").status == "FAIL":
        return Outcome("-", "not asked: one thread alone does not get the same scores twice")
    hint = (
        "a call keeps its input or output where other threads write: use local variables, or take a lock. Rewards call "
        "it from one thread at a time, other callers may not; if you know that, say thread_safe = False"
        if says is not True
        else "it says thread_safe = True, and is not: a call keeps its input or output where other threads write"
    )
    for number in range(CALLS):
        answers = _at_once(subject, groups, number)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors:
            told = f"{type(errors[0]).__name__}: {errors[0]}"
            return Outcome("FAIL", f"called from {THREADS} threads at once it raises {told} -> {hint}")
        found = subject.same(subject.pairs.at(at), np.concatenate(answers), lone, hint)
        if found.status == "FAIL":
            return Outcome("FAIL", f"called from {THREADS} threads at once: {found.detail}")
    return Outcome("ok")


def _at_once(subject: Subject, groups: list[list[int]], late: int) -> list[Any]:
    """What each thread is given for its pairs, or the error it got; each begins so much later than the one before."""
    answers: list[Any] = [None] * len(groups)
    start, home = threading.Barrier(len(groups)), _file_of(subject.scorer)

    def answer_one(place: int) -> None:
        given = deepcopy(subject.pairs.at(groups[place]))
        try:
            start.wait(60)
            time.sleep(5 * late * place * ASIDE)
            with _interrupted(home, late * THREADS + place):
                answer = call(subject.scorer, given.prompts, given.completions)
                time.sleep(ASIDE)
            answers[place] = check_scores(answer, given.prompts, given.completions, name_of(subject.scorer))
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
def _interrupted(home: str, seed: int) -> Iterator[None]:
    """This thread stands aside at random instructions of the scorer's own code: what could be mixed up, will be."""
    chance, visits = random.Random(seed), Counter[tuple[Any, int]]()

    def pause(frame: FrameType, _event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        place = (frame.f_code, frame.f_lasti)
        visits[place] += 1
        if chance.random() < PAUSES / (visits[place] * max(PAUSES, len(visits))):
            time.sleep(ASIDE)
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


def _file_of(scorer: object) -> str:
    """The file that a scorer's code is in."""
    named = scorer if isinstance(scorer, FunctionType) else type(scorer)
    return getattr(sys.modules.get(named.__module__), "__file__", None) or ""


def pickled(subject: Subject) -> Outcome:
    """A copy through pickle, as another process gets it, has the same scores and fingerprint."""
    if subject.model is not None:
        return Outcome("-", "the scorer shows a model, which is not copied")
    try:
        data = pickle.dumps(subject.scorer)
    except Exception as error:  # noqa: BLE001 (what cannot be pickled says so in its own way)
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
    return subject.same(some, score(copy, some.prompts, some.completions), subject.mixed[: len(some)], hint)


def identity(subject: Subject) -> Outcome:
    """The fingerprint is JSON, is the same after all calls, and differs where a setting changes the scores."""
    told = fingerprint(subject.scorer)
    try:
        plain = json.loads(json.dumps(told))
    except (TypeError, ValueError) as error:
        return Outcome("FAIL", f"the fingerprint is no JSON, {error} -> give texts, numbers, lists and dicts")
    if " at 0x" in json.dumps(plain):
        return Outcome(
            "FAIL", "the fingerprint holds an address in memory, which each process has anew -> leave it out"
        )
    if fingerprint(subject.scorer) != told or told != subject.fingerprint:
        if not isinstance(subject.scorer, Fingerprinted):
            return Outcome("-", "calls change what the scorer holds: a run knows it by its code, and scores some again")
        return Outcome(
            "FAIL", "the fingerprint differs from call to call -> it says what the scores depend on, no more"
        )
    some = subject.pairs.at(range(min(FEW, len(subject.pairs))))
    for name, other in _other_settings(subject.scorer):
        try:
            apart = score(other, some.prompts, some.completions)
            same = json.loads(json.dumps(fingerprint(other))) == plain
        except Exception:  # noqa: BLE001 (a value of ours may be none of the setting's)
            continue
        subject.scored_pairs.append(len(some))
        if same and subject.same(some, apart, subject.mixed[: len(some)], "").status == "FAIL":
            return Outcome(
                "FAIL",
                f"with another value of {name} a score of {subject.mixed[0]:.6g} becomes {apart[0]:.6g}, and the "
                f"fingerprint is the same -> add {name} to fingerprint(): a run that goes on would mix both scores",
            )
    return Outcome("ok")


def _other_settings(scorer: Any) -> Iterator[tuple[str, Any]]:
    """The same scorer with another number in one of its fields, where it is a dataclass; servers are left in peace."""
    if not is_dataclass(scorer) or isinstance(scorer, type) or hasattr(scorer, "url"):
        return
    for each in fields(scorer):
        value = getattr(scorer, each.name)
        if each.init and isinstance(value, bool | int | float):
            changed_to: Callable[[Any], Any] = (lambda v: not v) if isinstance(value, bool) else (lambda v: v * 2 + 1)
            try:
                yield each.name, replace(scorer, **{each.name: changed_to(value)})
            except (TypeError, ValueError):
                continue
