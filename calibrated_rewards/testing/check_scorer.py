"""Examine a scorer before GPU hours are spent on its scores: a table of checks, and a verdict with a line for each."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import Scorer
from calibrated_rewards.testing import (
    check_inputs as inputs,
    check_reading as reading,
    check_same_score as same_score,
    check_side_effects as side_effects,
)
from calibrated_rewards.testing.probes import MUST_SEE, Pairs, everyday
from calibrated_rewards.testing.subject import Outcome, Spare, Subject, describe, find_values

# The most pairs of the user's that are taken.
PAIRS = 64
# Words of an input that should be longer than what a scorer reads.
LONG_WORDS = 6_000
# Seconds for more than the minimum: more places of long texts, more characters, larger calls.
SPARE_SECONDS = 3.0
# The names that `may_ignore` accepts.
IGNORABLE = (*(kind.name for kind in MUST_SEE), "roles")


@dataclass(frozen=True)
class Requirement:
    """A condition of a check, and the detail of its outcome where a scorer does not meet it."""

    met: Callable[[Subject], bool]
    otherwise: str


WANTED_SIGN = Requirement(lambda subject: subject.sign, "not asked")
WANTED_PROMPT = Requirement(lambda subject: subject.reads_prompt, "not asked")
CONTINUOUS = Requirement(lambda subject: subject.continuous, "not asked of grades, rules and constants")
BY_LETTERS = Requirement(
    lambda subject: subject.reads_letters, "not asked of a scorer that does not read single letters"
)


@dataclass(frozen=True)
class Check:
    """A check of a scorer: its name, the function that makes it, and what it requires of the scorer."""

    name: str
    run: Callable[[Subject], Outcome]
    requirements: tuple[Requirement, ...] = ()
    compares: bool = True
    """Whether it compares with the scores of the pairs, and so needs them."""


CHECKS = (
    Check("one finite number for each completion", inputs.check_finite, compares=False),
    Check("BOS once, ids that the model has", inputs.check_bos, compares=False),
    Check("different completions, different scores", inputs.check_distinct),
    Check("inputs and scores left alone", same_score.check_left_alone),
    Check("the process left alone: seeds, folder, settings", side_effects.check_process),
    Check("called twice", same_score.check_called_twice),
    Check("alone = in a mixed batch", same_score.check_alone),
    Check("with a longer, with a shorter neighbour", same_score.check_neighbours),
    Check("permuted", same_score.check_permuted),
    Check("repeated in a batch", same_score.check_repeated),
    Check("any number of pairs in a call", same_score.check_counts),
    Check("several threads at once", side_effects.check_threads),
    Check("called after other inputs", same_score.check_after_others),
    Check("called after an error", same_score.check_after_error),
    Check("completions of one prompt together = alone", same_score.check_one_prompt),
    Check("prompts that begin alike together = alone", same_score.check_alike_prompts),
    Check("model in training mode, another seed", same_score.check_training_mode),
    Check("special tokens in the text", same_score.check_special_tokens),
    Check("unicode, emoji, very short", same_score.check_odd_texts),
    Check("a finite score for every character", inputs.check_characters),
    Check("empty or blank completion", inputs.check_blank_completions),
    Check("empty list", inputs.check_empty_list, compares=False),
    Check("conversation", inputs.check_conversation),
    Check("the prompt is read", reading.check_prompt, (WANTED_PROMPT, CONTINUOUS)),
    Check("the first and the last word are read", reading.check_end_words, (CONTINUOUS,)),
    Check("all turns of a conversation are read", reading.check_turns, (WANTED_PROMPT, CONTINUOUS)),
    Check("roles are read", reading.check_roles, (WANTED_PROMPT, CONTINUOUS, BY_LETTERS)),
    Check(
        "every message of a long conversation is read",
        reading.check_every_message,
        (WANTED_PROMPT, CONTINUOUS, BY_LETTERS),
    ),
    Check("the system message is read", reading.check_system, (WANTED_PROMPT, CONTINUOUS)),
    Check("every place of a completion is read", reading.check_completion_places, (CONTINUOUS,)),
    Check("every place of a prompt is read", reading.check_prompt_places, (WANTED_PROMPT, CONTINUOUS)),
    Check("digits, letters, punctuation, order of words are read", reading.check_differences, (CONTINUOUS, BY_LETTERS)),
    Check("case, accents, other alphabets are read", reading.check_letters, (CONTINUOUS,)),
    Check("sign", inputs.check_sign, (WANTED_SIGN,), compares=False),
    Check("truncation", inputs.check_truncation),
    Check("long inputs before and after short ones", same_score.check_long_again),
    Check("fingerprint", side_effects.check_fingerprint),
    Check("pickled", side_effects.check_pickled),
    Check("called again at the end", same_score.check_at_the_end),
)


def run_check(check: Check, subject: Subject) -> Outcome:
    """Run a check; whatever the scorer raises is a finding."""
    try:
        for requirement in check.requirements:
            if not requirement.met(subject):
                return Outcome("-", requirement.otherwise)
        return check.run(subject)
    except Exception as error:  # noqa: BLE001 (any code may be a scorer; the verdict shows its error)
        return Outcome("FAIL", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Finding:
    """The line of a verdict about one check."""

    name: str
    status: Literal["ok", "FAIL", "-"]
    detail: str = ""

    def __str__(self) -> str:
        detail = self.detail.replace(" -> ", "\n        -> ")
        return f"  {self.status:<4}  {self.name}{': ' * bool(detail)}{detail}"


@dataclass(frozen=True)
class Inspection:
    """The verdict on a scorer: a finding for each check."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings of checks that failed."""
        return tuple(finding for finding in self.findings if finding.status == "FAIL")

    @property
    def passed(self) -> bool:
        """True if none of the checks failed."""
        return not self.failed

    def __str__(self) -> str:
        return "\n".join([self.subject, *map(str, self.findings)])


@dataclass(frozen=True, eq=False)
class Examination:
    """A scorer with the settings of its checks; iterating over it runs one check after another."""

    scorer: Scorer
    prompts: Sequence[Prompt] | None = None
    completions: Sequence[Completion] | None = None
    """Pairs of the user's, with `prompts`, in place of the built-in ones."""
    tolerance: float | None = None
    """The largest difference between equal scores, in standard deviations; None: 1e-4. If the fingerprint names a
    16-bit dtype, it limits the root mean square, None is 0.25, and no pair may be four times as far apart."""
    chat: bool | None = None
    """Whether the built-in prompts are messages; None: if the scorer shows a chat template."""
    sign: bool = True
    """Whether good answers should score above bad ones; False for a model of other things than quality."""
    discrete: bool = False
    """Whether the scores are grades or rules, which may tie."""
    long_words: int = LONG_WORDS
    """Words of an input that should be too long."""
    reads_prompt: bool = True
    """Whether the prompt should matter; False for a score of style or safety that reads only the completion."""
    may_ignore: Collection[str] = ()
    """Differences that the scorer is meant to ignore: "digits", "the order of words", "roles", ... (`IGNORABLE`)."""
    spare_seconds: float = SPARE_SECONDS
    """Seconds for more than the minimum. A fast scorer is asked about every place of a text in that time, a slow one
    about the ends, the middle, fractions, and where texts are often cut."""

    def __post_init__(self) -> None:
        if isinstance(self.may_ignore, str) or not {*self.may_ignore} <= {*IGNORABLE}:
            raise ValueError(f"may_ignore is a list of names among {list(IGNORABLE)}, got {self.may_ignore!r}")
        if not 0 <= self.spare_seconds < float("inf"):
            raise ValueError(f"an examination needs finite spare_seconds >= 0, got {self.spare_seconds}")
        if (self.prompts is None) != (self.completions is None):
            raise ValueError("an examination needs prompts and completions, got only one of them")
        prompts, completions = len(self.prompts or ()), len(self.completions or ())
        if self.prompts is not None and (prompts != completions or prompts < 2):
            raise ValueError(
                "an examination needs as many prompts as completions, 2 or more, "
                f"got {prompts} prompts and {completions} completions"
            )
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"an examination needs tolerance >= 0, got tolerance={self.tolerance}")

    def __iter__(self) -> Iterator[Finding]:
        subject = self.subject
        _ = subject.long_first  # before any check scores something short
        scored = True
        for check in CHECKS:
            if check.compares and not scored:
                yield Finding(check.name, "-", "there are no scores to compare with")
                continue
            finding = Finding(check.name, *run_check(check, subject))
            scored = scored and not (check is CHECKS[0] and finding.status == "FAIL")
            yield finding

    def inspect(self) -> Inspection:
        """Run all checks, whether or not some fail."""
        return Inspection(self.title, tuple(self))

    @property
    def title(self) -> str:
        """The scorer's name in a verdict."""
        return describe(self.scorer)

    @cached_property
    def subject(self) -> Subject:
        """The scorer with its pairs and settings, as the checks take it."""
        chat = has_chat_template(self.scorer) if self.chat is None else self.chat
        pairs = everyday(chat)
        if self.prompts is not None and self.completions is not None:
            some = np.linspace(0, len(self.prompts) - 1, min(PAIRS, len(self.prompts))).astype(int).tolist()
            pairs = Pairs(self.prompts, self.completions).at(some)
        settings = (self.sign, self.discrete, self.long_words, self.reads_prompt, tuple(self.may_ignore))
        spare, before = Spare(self.spare_seconds), side_effects.process_state()
        return Subject(self.scorer, pairs, self.tolerance, chat, *settings, spare, before)


def check_scorer(
    scorer: Scorer,
    prompts: Sequence[Prompt] | None = None,
    completions: Sequence[Completion] | None = None,
    *,
    tolerance: float | None = None,
    chat: bool | None = None,
    sign: bool = True,
    discrete: bool = False,
    long_words: int = LONG_WORDS,
    reads_prompt: bool = True,
    may_ignore: Collection[str] = (),
    spare_seconds: float = SPARE_SECONDS,
) -> Inspection:
    """Run all checks on a scorer; AssertionError with the whole verdict if any fails.

    The arguments are those of `Examination`, whose `inspect()` gives the same verdict and does not raise.

    >>> check_scorer(lambda prompts, completions: [c.count("e") / len(c) for c in completions])
    Traceback (most recent call last):
    AssertionError: ...
    """
    settings = (tolerance, chat, sign, discrete, long_words, reads_prompt, may_ignore, spare_seconds)
    verdict = Examination(scorer, prompts, completions, *settings).inspect()
    if not verdict.passed:
        raise AssertionError(str(verdict))
    return verdict


def has_chat_template(scorer: Scorer) -> bool:
    """Return True if the scorer shows a chat template to render messages with."""
    subject = Subject(scorer, Pairs([], []))
    template = subject.tokenizer.chat_template if subject.tokenizer is not None else None
    return bool(template) or any(find_values(subject.fingerprint, "template"))
