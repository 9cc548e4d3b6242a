# ruff: noqa: D102 (a fault has its name from its class)
"""check_scorer finds planted faults: each is put into a scorer that is sound without it, and some check has to fail.

The sound scorer is a hash: it has no idea of quality, and reads every character. What is planted in it are faults that
were found in reward models, servers and the code around them, and some that nobody has made yet.
"""

import html
import itertools
import locale
import os
import random
import re
import signal
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from calibrated_rewards.cli.check_scorer import EPILOG
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.ensemble import Cost, Ensemble
from calibrated_rewards.testing.check_reading import LENGTHS
from calibrated_rewards.testing.check_scorer import CHECKS, IGNORABLE, Examination, check_scorer, run_check
from calibrated_rewards.testing.check_side_effects import RANDOM, find_changes, process_state
from calibrated_rewards.testing.probes import list_characters, passage
from calibrated_rewards.testing.suites import HashScorer, NumberScorer

Scorer = Callable[[Sequence[Any], Sequence[Any]], Any]
PROMPTS, COMPLETIONS = "prompts", "completions"


def hashed(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    """The sound scorer: of messages the last one of a completion, all of a prompt."""
    return HashScorer()(prompts, completions)


def each(see: Callable[[str], str], *sides: str) -> Scorer:
    """A scorer that reads of every text what `see` leaves of it: of texts, and of the contents of messages."""

    def of(said: Any) -> Any:
        if isinstance(said, str):
            return see(said)
        return [{**message, "content": see(message["content"])} for message in said]

    def scorer(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        asked = [of(p) for p in prompts] if PROMPTS in (sides or (PROMPTS,)) else prompts
        answered = [of(c) for c in completions] if COMPLETIONS in (sides or (COMPLETIONS,)) else completions
        return hashed(asked, answered)

    return scorer


def chats(see: Callable[[list[Any]], Any]) -> Scorer:
    """A scorer that does something to prompts that are messages."""
    return lambda prompts, completions: hashed([see(p) if isinstance(p, list) else p for p in prompts], completions)


def scores(change: Callable[[list[Any], np.ndarray], Any]) -> Scorer:
    """A scorer of which the completions and the scores are at hand, for scores that go wrong."""
    return lambda prompts, completions: change([text_of(c) for c in completions], hashed(prompts, completions))


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def longer(than: int, see: Callable[[str], str]) -> Callable[[str], str]:
    """Something that is done to long texts alone."""
    return lambda text: see(text) if len(text) > than else text


def without(place: int) -> Callable[[str], str]:
    """A text that loses one character."""
    return lambda text: text[:place] + text[place + 1 :]


def middle_dropped(keep: int) -> Callable[[str], str]:
    return longer(2 * keep, lambda text: text[:keep] + text[-keep:])


def digits_sorted(text: str) -> str:
    return re.sub(r"\d+", lambda number: "".join(sorted(number[0])), text)


# Faults that were missed before: the middle of prompts over 80 characters, the last character, one character of long
# texts, digits, roles, nan for an emoji, threads, seeds.
TEXTS = {
    "the middle of prompts over 80 characters": each(middle_dropped(40), PROMPTS),
    "the last character of a completion": each(lambda text: text[:-1], COMPLETIONS),
    "the last character of a prompt": each(lambda text: text[:-1], PROMPTS),
    "one character of completions over 1000": each(longer(1000, without(500)), COMPLETIONS),
    "some other character of completions over 1000": each(longer(1000, without(733)), COMPLETIONS),
    "one character of prompts over 1000": each(longer(1000, without(611)), PROMPTS),
    "all digits are one": each(lambda text: re.sub(r"\d", "0", text)),
    "12 and 21 are alike": each(digits_sorted),
    "numbers are one token": each(lambda text: re.sub(r"\d+", "N", text), COMPLETIONS),
    # Cuts.
    "the first 512 characters of a completion": each(lambda text: text[:512], COMPLETIONS),
    "the last 512 characters of a prompt": each(lambda text: text[-512:], PROMPTS),
    "the first 100 words": each(lambda text: " ".join(text.split(" ")[:100])),
    "the last 50 words": each(lambda text: " ".join(text.split(" ")[-50:]), COMPLETIONS),
    "the first line": each(lambda text: text.split("\n")[0], COMPLETIONS),
    "the last paragraph": each(lambda text: text.rpartition("\n\n")[2], COMPLETIONS),
    "the first five lines": each(lambda text: "\n".join(text.split("\n")[:5]), COMPLETIONS),
    "the middle of completions over 2000": each(middle_dropped(1000), COMPLETIONS),
    "characters behind 4096": each(lambda text: text[:4096]),
    "a hole at a chunk's end": each(longer(1024, without(1024)), COMPLETIONS),
    "every seventh character": each(lambda text: "".join(c for i, c in enumerate(text) if i % 7 != 3), COMPLETIONS),
    "the first character": each(lambda text: text[1:], COMPLETIONS),
    "the second half of long prompts": each(longer(300, lambda text: text[: len(text) // 2]), PROMPTS),
    "one character of texts over 200": each(longer(200, without(-2)), COMPLETIONS),
    "the last sentence": each(lambda text: re.sub(r"[^.?!]+[.?!]?\s*$", "", text) or text, COMPLETIONS),
    # What is made of the text.
    "vowels are merged": each(lambda text: text.translate(str.maketrans("aeiou", "aaaaa"))),
    "words are sorted": each(lambda text: " ".join(sorted(text.split(" ")))),
    "a set of words": each(lambda text: " ".join(dict.fromkeys(text.split(" "))), COMPLETIONS),
    "letters are sorted within words": each(lambda text: " ".join("".join(sorted(w)) for w in text.split(" "))),
    "no punctuation": each(lambda text: re.sub(r"[.,;:!?]", "", text)),
    "runs of a character are one": each(lambda text: re.sub(r"(.)\1+", r"\1", text)),
    "entities are unescaped": each(html.unescape),
    "tags are stripped": each(lambda text: re.sub(r"<[^>]*>", "", text), COMPLETIONS),
    "markdown is stripped": each(lambda text: re.sub(r"[*_`#]", "", text), COMPLETIONS),
    "stop words are dropped": each(lambda text: re.sub(r"\b(the|not|a|is)\b ?", "", text)),
    "no plural": each(lambda text: re.sub(r"s\b", "", text)),
    "addresses are one": each(lambda text: re.sub(r"https?://\S+", "URL", text)),
    "signs of numbers": each(lambda text: re.sub(r"-(?=\d)", "", text)),
    "decimal points": each(lambda text: re.sub(r"(?<=\d)[.,](?=\d)", "", text)),
    "brackets are dropped": each(lambda text: re.sub(r"[()\[\]{}]", "", text)),
    "quotes are dropped": each(lambda text: re.sub(r"[\"']", "", text)),
    "blocks of code are dropped": each(lambda text: re.sub(r"```.*?```", "", text, flags=re.DOTALL), COMPLETIONS),
    "thoughts are dropped": each(lambda text: re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL), COMPLETIONS),
    "thoughts are one word": each(lambda text: text.rpartition("</think>")[2], COMPLETIONS),
    "what stands behind Human:": each(lambda text: text.split("Human:")[0], COMPLETIONS),
    "what stands behind a line of User:": each(lambda text: text.split("\nUser:")[0]),
    "what stands behind ###": each(lambda text: text.split("###")[0], COMPLETIONS),
    "what stands behind ---": each(lambda text: re.split(r"^-{3,}$", text, flags=re.MULTILINE)[0], COMPLETIONS),
    "what stands behind Answer:": each(lambda text: text.rpartition("Answer:")[2], COMPLETIONS),
    "what stands before [/INST]": each(lambda text: text.rpartition("[/INST]")[2], COMPLETIONS),
    # Chats.
    "roles are not read": chats(lambda talk: [{**m, "role": "user"} for m in talk]),
    "messages are joined": chats(lambda talk: " ".join(m["content"] for m in talk)),
    "five messages are read": chats(lambda talk: talk[-5:]),
    "the first and the last message": chats(lambda talk: [*talk[:1], *talk[-1:]] if len(talk) > 3 else talk),
    "messages are sorted": chats(lambda talk: sorted(talk, key=str)),
    "messages are a set": chats(lambda talk: [dict(m) for m in sorted({(*m.items(),) for m in talk})]),
    "messages are cut": chats(lambda talk: [{**m, "content": m["content"][:100]} for m in talk]),
    "the assistant's messages lose their end": chats(
        lambda talk: [m if m["role"] == "user" else {**m, "content": m["content"][:-1]} for m in talk]
    ),
}

VALUES = {
    "nan for an emoji": scores(lambda texts, x: np.where(["🥶" in t for t in texts], np.nan, x)),
    "nan for an emoji alone": scores(lambda texts, x: np.where([t == "🦄" for t in texts], np.nan, x)),
    "inf for a flag": scores(lambda texts, x: np.where(["🇫🇷" in t for t in texts], np.inf, x)),
    "nan for a control character": scores(lambda texts, x: np.where(["\x1b" in t for t in texts], np.nan, x)),
    "nan from right to left": scores(lambda texts, x: np.where(["\u202e" in t for t in texts], np.nan, x)),
    "nan for Thai": scores(lambda texts, x: np.where([any("ก" <= c <= "๛" for c in t) for t in texts], np.nan, x)),
    "nan beyond the plane": scores(
        lambda texts, x: np.where([max(t, default="") > "\U0001ffff" for t in texts], np.nan, x)
    ),
    "nan in long texts": scores(lambda texts, x: np.where([len(t) > 2000 for t in texts], np.nan, x)),
    "nan for 64 pairs and more": scores(lambda _, x: x * (np.nan if len(x) > 64 else 1)),
    "rounded to whole numbers": scores(lambda _, x: np.round(100 * x)),
    "rounded to two digits": scores(lambda _, x: np.round(x, 2)),
    "rounded to bfloat16": scores(lambda _, x: torch.tensor(x).bfloat16()),
    "clipped": scores(lambda _, x: np.clip(x, -1.5, 1.5)),
    "a relu": scores(lambda _, x: np.maximum(x, 0)),
    "shifted out of float32": scores(lambda _, x: x.astype(np.float64) + 1e9),
    "a scalar for one pair": scores(lambda _, x: x.squeeze()[()] if len(x) == 1 else x),
    "a column": scores(lambda _, x: x[:, None]),
    "the last batch of eight is dropped": scores(lambda _, x: x[: len(x) // 8 * 8] if len(x) > 8 else x),
    "the last batch is padded with zeros": scores(
        lambda _, x: np.where(np.arange(len(x)) < len(x) // 8 * 8, x, 0) if len(x) > 8 else x
    ),
    "normalised over the batch": scores(lambda _, x: x - x.mean()),
    "ranked in the batch": scores(lambda _, x: np.argsort(np.argsort(x)).astype(float)),
    "rows beyond 128 are those before": scores(lambda _, x: x[np.arange(len(x)) % 128]),
    "scaled by the number of pairs": scores(lambda _, x: x / (1 + len(x) // 200)),
}


def sorted_by_length(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    order = sorted(range(len(prompts)), key=lambda i: len(str(completions[i])))
    return hashed([prompts[i] for i in order], [completions[i] for i in order])


def duplicates_lose(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    """Pairs that occur again get the score of the pair before them."""
    seen, found = set(), []
    for key, score in zip(map(str, zip(prompts, completions, strict=True)), hashed(prompts, completions), strict=True):
        found.append(found[-1] if key in seen else score)
        seen.add(key)
    return found


def one_array_for_all(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    BUFFER[: len(prompts)] = hashed(prompts, completions)
    return BUFFER[: len(prompts)]


BUFFER = np.zeros(4096, np.float32)


def strips_its_inputs(prompts: list[Any], completions: list[Any]) -> Any:
    found = hashed(prompts, completions)
    completions[:] = ["" for _ in completions]
    return found


def prefixes_are_shared(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
    """Prompts of a call that begin alike are taken for one prompt."""
    known: dict[str, Any] = {}
    return hashed([known.setdefault(str(prompt)[:200], prompt) for prompt in prompts], completions)


ROWS = {
    "prompts that begin alike": prefixes_are_shared,
    "sorted by length": sorted_by_length,
    "duplicates": duplicates_lose,
    "one array for all answers": one_array_for_all,
    "its inputs are changed": strips_its_inputs,
}


@dataclass
class Cached:
    """Scores kept by something that is not the whole pair."""

    key: Callable[[Any, Any], Any]
    kept: dict[Any, float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        pairs = list(zip(prompts, completions, hashed(prompts, completions), strict=True))
        return [self.kept.setdefault(self.key(str(p), text_of(c)), score) for p, c, score in pairs]


@dataclass
class Counting:
    """Scores that change with the number of the call."""

    change: Callable[[int, Any], Any]
    calls: int = 0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        self.calls += 1
        return self.change(self.calls, hashed(prompts, completions))


@dataclass
class Stuck:
    """Once a call failed, all behind it are wrong."""

    failed: bool = False

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        before, self.failed = self.failed, True
        found = hashed(prompts, completions)
        self.failed = before
        return found * (1 - before)


STATES: dict[str, Callable[[], Any]] = {
    "kept by the completion": lambda: Cached(lambda p, c: c),
    "kept by the start of the pair": lambda: Cached(lambda p, c: (p[:60], c[:60])),
    "kept by the end of the pair": lambda: Cached(lambda p, c: (p[-50:], c[-50:])),
    "kept by lengths": lambda: Cached(lambda p, c: (len(p), len(c))),
    "kept by a small hash": lambda: Cached(lambda p, c: sum(map(ord, p + c)) % 509),
    "kept by lower case": lambda: Cached(lambda p, c: (p, "".join(sorted(c)))),
    "the first call is another": lambda: Counting(lambda n, x: x + (n == 1)),
    "every tenth call is another": lambda: Counting(lambda n, x: x * (1 - 2 * (n % 10 == 0))),
    "drifts": lambda: Counting(lambda n, x: x + 1e-3 * n),
    "drifts slowly": lambda: Counting(lambda n, x: x + 2e-6 * n),
    "turns after a hundred calls": lambda: Counting(lambda n, x: -x if n > 100 else x),
    "stuck after an error": Stuck,
}


@dataclass
class ByAttribute:
    """Keeps what it is asked where other threads write."""

    thread_safe: Any = None
    now: Any = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        self.now = prompts, completions
        return hashed(*self.now)


@dataclass
class SharedBuffer:
    """Writes its scores into one array before it copies them."""

    buffer: Any = field(default_factory=lambda: np.zeros(4096, np.float32))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        self.buffer[: len(prompts)] = hashed(prompts, completions)
        return self.buffer[: len(prompts)].copy()


@dataclass
class SharedCounter:
    """Goes through its pairs by a counter that is not the call's own."""

    at: int = 0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        self.at, found = 0, []
        while self.at < len(prompts):
            found.append(hashed([prompts[self.at]], [completions[self.at]])[0])
            self.at += 1
        return found


@dataclass
class SharedQueue:
    """Collects answers in a list that is emptied by each call."""

    answers: list[float] = field(default_factory=list)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        self.answers.clear()
        for prompt, completion in zip(prompts, completions, strict=True):
            self.answers.append(float(hashed([prompt], [completion])[0]))
        return list(self.answers)


@dataclass
class Exclusive:
    """Refuses a second caller, as a tokenizer that is already borrowed does."""

    busy: bool = False

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        if self.busy:
            raise RuntimeError("Already borrowed")
        self.busy = True
        try:
            time.sleep(0)
            return hashed(prompts, completions)
        finally:
            self.busy = False


THREADED: dict[str, Callable[[], Any]] = {
    "an attribute": ByAttribute,
    "an attribute, and it says that it is safe": lambda: ByAttribute(thread_safe=True),
    "an array": SharedBuffer,
    "a counter": SharedCounter,
    "a list": SharedQueue,
    "already borrowed": Exclusive,
}


def after(change: Callable[[], Any]) -> Scorer:
    """A scorer that does something to the process in each call."""

    def scorer(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        change()
        return hashed(prompts, completions)

    return scorer


PROCESS = {
    "the handler of another signal": after(lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)),
    "random's seed": after(lambda: random.seed(0)),
    "numpy's seed": after(lambda: np.random.seed(1)),  # noqa: NPY002 (the fault)
    "torch's seed": after(lambda: torch.manual_seed(2)),
    "numpy's random numbers are drawn": after(np.random.random),
    "torch's random numbers are drawn": after(lambda: torch.rand(1)),
    "the working directory": after(lambda: os.chdir("/")),
    "the environment": after(lambda: os.environ.update(PLANTED="1")),
    "the locale": after(lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8" if OTHER_LOCALE else "C")),
    "the default dtype": after(lambda: torch.set_default_dtype(torch.float64)),
    "the number of threads": after(lambda: torch.set_num_threads(torch.get_num_threads() % 2 + 1)),
    "gradients": after(lambda: torch.set_grad_enabled(False)),
    "warnings": after(lambda: warnings.simplefilter("ignore", ResourceWarning)),
    "numpy's errors": after(lambda: np.seterr(all="ignore")),
    "sys.path": after(lambda: __import__("sys").path.insert(0, "/planted")),
}
OTHER_LOCALE = locale.setlocale(locale.LC_ALL) == "C"


@dataclass(frozen=True)
class Forgetful:
    """A setting that is left out of the fingerprint, or of the pickle."""

    scale: float = 1.0
    loses: bool = False
    noisy: bool = False

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        return self.scale * hashed(prompts, completions)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "forgetful", "loses": self.loses, **({"at": next(NUMBERS)} if self.noisy else {})}

    def __getstate__(self) -> dict[str, Any]:
        return {"scale": 1.0 if self.loses else self.scale, "loses": self.loses, "noisy": self.noisy}


NUMBERS = itertools.count()
IDENTITIES = {
    "a setting out of the fingerprint": Forgetful(),
    "a setting out of the pickle": Forgetful(2.0, loses=True),
    "a fingerprint that changes": Forgetful(noisy=True),
}

STATELESS = TEXTS | VALUES | ROWS | PROCESS | IDENTITIES

ANSWER, QUESTION = "every place of a completion is read", "every place of a prompt is read"
KINDS, LETTERS = "digits, letters, punctuation, order of words are read", "case, accents, other alphabets are read"
ROLES, TALK, FINITE = (
    "roles are read",
    "every message of a long conversation is read",
    "a finite score for every character",
)
NUMBER, DISTINCT = "one finite number for each completion", "different completions, different scores"
ALONE, REPEATED, COUNT = "alone = in a mixed batch", "repeated in a batch", "any number of pairs in a call"
ALIKE = "prompts that begin alike together = alone"
LEFT, PROCESS_LEFT = "inputs and scores left alone", "the process left alone: seeds, folder, settings"
THREADS, IDENTITY, PICKLED = "several threads at once", "fingerprint", "pickled"
# The checks that are meant for the faults of a table; a whole examination runs all.
MEANT = (
    (TEXTS, (ANSWER, QUESTION, KINDS, ROLES, TALK)),
    (VALUES, (NUMBER, DISTINCT, ALONE, REPEATED, COUNT, FINITE, ANSWER)),
    (ROWS, (LEFT, ALONE, REPEATED, ALIKE)),
    (PROCESS, (PROCESS_LEFT,)),
    (IDENTITIES, (IDENTITY, PICKLED)),
)


def verdict(scorer: Any, names: Sequence[str] | None = None, **options: Any) -> dict[str, str]:
    """The checks that fail, all or those of some names, and what is said of each; a hash has no sign."""
    subject = Examination(scorer, **{"sign": False, **options}).subject
    asked = [check for check in CHECKS if names is None or check.name in names]
    outcomes = {check.name: run_check(check, subject) for check in asked}
    return {name: outcome.detail for name, outcome in outcomes.items() if outcome.status == "FAIL"}


def first(scorer: Any, names: Sequence[str] | None = None, **options: Any) -> str:
    """What the first check that fails says; nothing if none does."""
    subject = Examination(scorer, **{"sign": False, **options}).subject
    asked = (run_check(check, subject) for check in CHECKS if names is None or check.name in names)
    return next((outcome.detail for outcome in asked if outcome.status == "FAIL"), "")


def meant_for(fault: str) -> Sequence[str]:
    """The names of the checks that are meant for a fault."""
    return next(names for table, names in MEANT if fault in table)


def test_the_scorer_that_faults_are_planted_in_is_sound():
    """Without a fault no check fails, with messages or texts as prompts; and there are as many faults as promised."""
    assert verdict(hashed) == verdict(hashed, chat=True, spare_seconds=0.0) == {}
    assert len(STATELESS) + len(STATES) + len(THREADED) >= 8 + 46


@pytest.mark.parametrize("fault", STATELESS)
def test_a_fault_is_found(fault):
    """By a check that is meant for it, whose line says what to do; and the process is as it was."""
    before = process_state()
    # Most are found with the fewest test texts; others need time to spare.
    told = first(STATELESS[fault], meant_for(fault), spare_seconds=0.0) or first(STATELESS[fault], meant_for(fault))

    assert " -> " in told or "Error: " in told
    assert {*find_changes(before, process_state())} <= {"the warnings filters", *RANDOM}


@pytest.mark.parametrize("fault", STATES)
def test_a_fault_that_has_a_memory_is_found(fault):
    """Caches and counters: by the first check that sees what they remember."""
    assert first(STATES[fault]())


@pytest.mark.parametrize("fault", THREADED)
def test_a_scorer_that_mixes_threads_up_is_found(fault):
    """What a call keeps where other threads write, is overwritten while the thread stands aside."""
    assert "8 threads at once" in first(THREADED[fault](), [THREADS])


@pytest.mark.parametrize(
    "fault",
    [
        "the middle of prompts over 80 characters",
        "the last character of a prompt",
        "one character of prompts over 1000",
        "all digits are one",
        "words are sorted",
    ],
)
def test_a_fault_in_texts_is_found_in_messages(fault):
    """Prompts that are messages lose what prompts that are texts lose."""
    assert first(TEXTS[fault], (QUESTION, KINDS), chat=True)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("the middle of prompts over 80 characters", ("prompt of 240 characters", "character 121", "stays", "->")),
        ("the last character of a completion", ("character 60 of 60", "stays", "->")),
        ("12 and 21 are alike", ("digits", "'It costs 12 euros today.'", "both get", "may_ignore=['digits']")),
        ("roles are not read", ("user, assistant, user", "both get", "write the role of each message")),
        ("nan for an emoji", ("'🥶' (U+1F976)", "finite number", "->")),
        ("numpy's seed", ("numpy's random state", "same state", "default_rng(seed)")),
        ("the environment", ("the environment (PLANTED)", "put it back")),
        ("a setting out of the fingerprint", ("another value of scale", "add scale to fingerprint()")),
    ],
)
def test_a_finding_says_what_was_changed_and_what_to_do(fault, words):
    """The change, the score, what it means, what to do."""
    told = " ".join(verdict(STATELESS[fault], meant_for(fault)).values())

    assert all(word in told for word in words), told


def test_a_scorer_that_is_not_thread_safe_may_say_so():
    """thread_safe = False is a word that rewards keep; True is one that is looked at; nothing is looked at as well."""
    assert not first(ByAttribute(thread_safe=False), [THREADS])
    assert "it says thread_safe = True, and is not" in first(ByAttribute(thread_safe=True), [THREADS])
    assert "say thread_safe = False" in first(ByAttribute(), [THREADS])
    assert not first(Locked(), [THREADS])


@dataclass
class Locked:
    """Keeps what it is asked in an attribute, and a second thread waits."""

    lock: Any = field(default_factory=threading.Lock)
    now: Any = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        with self.lock:
            self.now = prompts, completions
            return hashed(*self.now)


# What reads less, and is sound.

NEW = (ROLES, TALK, ANSWER, QUESTION, KINDS, LETTERS, FINITE, THREADS, COUNT, IDENTITY, PICKLED, PROCESS_LEFT)


@pytest.mark.parametrize(
    "scorer",
    [
        lambda p, c: [text_of(x).count("!") + 0.0 for x in c],
        lambda p, c: [-float(len(text_of(x))) for x in c],
        lambda p, c: [float(text_of(x).endswith(".")) for x in c],
        lambda p, c: [float(bool(re.search(r"\b42\b", text_of(x)))) for x in c],
        lambda p, c: [text_of(x).count("e") / (1 + len(text_of(x))) for x in c],
        lambda p, c: [len(text_of(x)) / (1 + len(text_of(x).split())) for x in c],
        lambda p, c: [sum(map(text_of(x).lower().count, ("good", "help", "please"))) - len(text_of(x)) / 99 for x in c],
        lambda p, c: [0.5] * len(c),
        NumberScorer(),
    ],
)
def test_rules_counts_and_lengths_are_not_asked_what_they_do_not_read(scorer):
    """A regular expression, a length, a ratio, a lexicon: no check of what is read fails for one."""
    for discrete in (False, True):
        assert verdict(scorer, NEW, reads_prompt=False, discrete=discrete, spare_seconds=0.0) == {}


def test_grades_that_tie_on_long_texts_are_no_fault():
    """A share of words that come again stays the same in a long text, and a verifier is told what to do."""
    share = lambda p, c: [len({*text_of(x).split()}) / (1 + len(text_of(x).split())) for x in c]  # noqa: E731
    assert verdict(share, reads_prompt=False, discrete=True, spare_seconds=0.0) == {}
    boxed = lambda p, c: [float(bool(re.search(r"\\boxed{\d+}", text_of(x)))) for x in c]  # noqa: E731
    assert [*verdict(boxed, discrete=True, spare_seconds=0.0)] == [DISTINCT]
    assert "prompts and completions of yours" in verdict(boxed, [DISTINCT], discrete=True)[DISTINCT]


@pytest.mark.parametrize(
    ("see", "unread"),
    [
        (str.lower, "case"),
        (lambda text: unicodedata.normalize("NFKC", text), "forms of Unicode"),
        (lambda text: " ".join(text.split()), "white space"),
        (str.strip, "white space at the ends"),
        (lambda text: text.replace("\u200b", "").replace("\ufeff", ""), "invisible characters"),
        (lambda text: re.sub("[\U0001f300-\U0001faff]", "?", text), "emoji"),
        (lambda text: re.sub("[א-ת]", "?", text), "Hebrew and Arabic letters"),
        (lambda text: re.sub("[一-龥]", "?", text), "Chinese and Japanese characters"),
    ],
)
def test_what_tokenizers_leave_out_is_told_and_is_no_fault(see, unread):
    """BERT's lower case, T5's white space, a vocabulary without emoji: a line that says what is not read."""
    letters = next(check for check in CHECKS if check.name == LETTERS)
    outcome = run_check(letters, Examination(each(see), sign=False).subject)

    assert verdict(each(see), (DISTINCT, ANSWER, QUESTION, KINDS, ROLES), spare_seconds=0.0) == {}
    assert outcome.status == "-"
    assert unread in outcome.detail


def test_what_is_meant_so_may_be_said():
    """may_ignore names a kind of difference; other names are refused, with those that there are."""
    meant = ["the order of words", "small words and repetitions", "digits"]
    assert not first(TEXTS["words are sorted"], [KINDS], may_ignore=meant)
    assert not first(TEXTS["roles are not read"], [ROLES], may_ignore=["roles"])
    assert {"roles", "digits"} <= {*IGNORABLE}
    with pytest.raises(ValueError, match=r"may_ignore is a list of names among \['digits'"):
        Examination(hashed, may_ignore=["numbers"])
    with pytest.raises(ValueError, match="got 'digits'"):
        Examination(hashed, may_ignore="digits")
    with pytest.raises(ValueError, match="spare_seconds"):
        check_scorer(hashed, spare_seconds=-1)


@pytest.mark.parametrize(
    "scorer",
    [
        lambda: Ensemble([SequenceClassifier(tiny.classifier(), tiny.tokenizer()), HashScorer()]),
        lambda: Cost(SequenceClassifier(tiny.classifier(dtype=torch.bfloat16), tiny.tokenizer())),
    ],
)
def test_models_pass(scorer):
    """An ensemble with a model, a model of 16 bits: no false alarm."""
    few = ["What is 2 + 2?", "Name a colour."] * 4, [f"answer {i}, and more of it" for i in range(8)]
    assert verdict(scorer(), (ALONE, *NEW), prompts=few[0], completions=few[1], spare_seconds=0.0) == {}


def test_slow_scorers_are_asked_less():
    """Without time to spare, a few thousand short pairs; --help says so, and the last line counts them."""
    slow = Examination(hashed, sign=False, spare_seconds=0.0)
    last = slow.inspect().findings[-1]
    pairs = sum(slow.subject.scored_pairs)

    assert 2_500 < pairs < 3_500
    assert f"{pairs:,} pairs" in last.detail
    assert "about 3,000 short pairs" in EPILOG


def test_the_texts_of_the_checks():
    """As long as they say, without white space at the ends, and others for another seed; emoji among the characters."""
    assert [len(passage(length, "a")) for length in LENGTHS] == [*LENGTHS]
    assert all(passage(length, "a").strip() == passage(length, "a") != passage(length, "b") for length in LENGTHS)
    assert {"🥶", "🦄", "❤️", "é", "中", "\u200b", "\x00"} - {*list_characters()} == {"\x00"}
