"""Is this scorer fit for use? A line for each check, on your own model, before GPU hours are spent on its scores."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import Scorer
from calibrated_rewards.testing import (
    check_conversations as conversations,
    check_inputs as edge_inputs,
    check_reading as positions,
    check_same_score as same_score,
    check_side_effects as side_effects,
    check_texts as characters,
    check_texts as odd_inputs,
    check_texts as whole_input,
)
from calibrated_rewards.testing.check_texts import MUST
from calibrated_rewards.testing.probes import Pairs, everyday
from calibrated_rewards.testing.subject import Outcome, Spare, Subject, values_of

# Of more pairs of the user's, so many are taken.
PAIRS = 64
# Words of an input that should be longer than what a scorer reads.
LONG_WORDS = 6_000
# Seconds for more than the least that is asked: more places of long texts, more characters, larger calls.
SPARE_SECONDS = 3.0
# What `may_ignore` may name.
IGNORABLE = (*(kind.name for kind in MUST), "roles")
# A repr that is longer is cut to the name of its class.
SHORT_REPR = 200


@dataclass(frozen=True)
class Check:
    """A question to a scorer, and how it is asked."""

    name: str
    ask: Callable[[Subject], Outcome]
    compares: bool = True
    """Whether it compares with the scores of the pairs, and so needs them."""


CHECKS = (
    Check("one finite number for each completion", edge_inputs.finite, compares=False),
    Check("BOS once, ids that the model has", edge_inputs.one_bos, compares=False),
    Check("different completions, different scores", edge_inputs.distinct),
    Check("inputs and scores left alone", same_score.left_alone),
    Check("the process left alone: seeds, folder, settings", side_effects.process),
    Check("called twice", same_score.called_twice),
    Check("alone = in a mixed batch", same_score.alone),
    Check("with a longer, with a shorter neighbour", same_score.neighbours),
    Check("permuted", same_score.permuted),
    Check("repeated in a batch", same_score.repeated),
    Check("any number of pairs in a call", same_score.any_number),
    Check("several threads at once", side_effects.threads),
    Check("called after other inputs", same_score.after_others),
    Check("called after an error", same_score.after_error),
    Check("completions of one prompt together = alone", same_score.one_prompt),
    Check("prompts that begin alike together = alone", same_score.alike_prompts),
    Check("model in training mode, another seed", same_score.training_mode),
    Check("special tokens in the text", same_score.special_tokens),
    Check("unicode, emoji, very short", same_score.odd_text),
    Check("a finite score for every character", odd_inputs.finite),
    Check("empty or blank completion", edge_inputs.empty_completion),
    Check("empty list", edge_inputs.empty_list, compares=False),
    Check("conversation", edge_inputs.conversation),
    Check("the prompt is read", whole_input.prompt),
    Check("the first and the last word are read", whole_input.words_of_whole_input),
    Check("all turns of a conversation are read", whole_input.turns),
    Check("roles are read", conversations.roles),
    Check("every message of a long conversation is read", conversations.every_message),
    Check("the system message is read", whole_input.system),
    Check("every place of a completion is read", positions.completion),
    Check("every place of a prompt is read", positions.prompt),
    Check("digits, letters, punctuation, order of words are read", characters.differences),
    Check("case, accents, other alphabets are read", whole_input.letters),
    Check("sign", edge_inputs.sign, compares=False),
    Check("truncation", edge_inputs.truncation),
    Check("long inputs before and after short ones", same_score.long_again),
    Check("fingerprint", side_effects.identity),
    Check("pickled", side_effects.pickled),
    Check("called again at the end", same_score.at_the_end),
)


@dataclass(frozen=True)
class Finding:
    """What came of one check."""

    name: str
    status: Literal["ok", "FAIL", "-"]
    detail: str = ""

    def __str__(self) -> str:
        detail = self.detail.replace(" -> ", "\n        -> ")
        return f"  {self.status:<4}  {self.name}{': ' * bool(detail)}{detail}"


@dataclass(frozen=True)
class Inspection:
    """All findings about a scorer, a line each."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Those that failed."""
        return tuple(finding for finding in self.findings if finding.status == "FAIL")

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return not self.failed

    def __str__(self) -> str:
        return "\n".join([self.subject, *map(str, self.findings)])


@dataclass(frozen=True, eq=False)
class Examination:
    """What a scorer is asked: built-in questions, or pairs of yours; iterating runs the checks, one after another."""

    scorer: Scorer
    prompts: Sequence[Prompt] | None = None
    completions: Sequence[Completion] | None = None
    tolerance: float | None = None
    """How far apart equal scores may be, in standard deviations, at most; None: 1e-4. If the fingerprint has 16 bits it
    is the root mean square that may be so large, where None is 0.25, and no pair may be four times as far apart."""
    chat: bool | None = None
    """Whether the built-in prompts are messages; None: if the scorer shows a chat template."""
    sign: bool = True
    """Whether good answers should be above bad ones; a model of other things than quality need not know."""
    discrete: bool = False
    """Whether the scores are grades or rules, which may tie."""
    long_words: int = LONG_WORDS
    """Words of an input that should be too long."""
    reads_prompt: bool = True
    """Whether the prompt should matter; a score of style or of safety may be one of the completion alone."""
    may_ignore: Collection[str] = ()
    """Differences that the scorer is meant not to see: "digits", "the order of words", "roles", ... (`IGNORABLE`)."""
    spare_seconds: float = SPARE_SECONDS
    """Seconds for more than the least that is asked; fast scorers are asked about every place of a text in that time,
    slow ones about the ends, the middle, fractions, and where texts are often cut."""

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
        _ = subject.long_first  # before any check asks for something short
        scored = True
        for check in CHECKS:
            if check.compares and not scored:
                yield Finding(check.name, "-", "there are no scores to compare with")
                continue
            found = Finding(check.name, *answer(check, subject))
            scored = scored and not (check is CHECKS[0] and found.status == "FAIL")
            yield found

    def inspect(self) -> Inspection:
        """All findings, whether or not some failed."""
        return Inspection(self.title, tuple(self))

    @property
    def title(self) -> str:
        """How a verdict names the scorer: by its repr, unless that has a whole model in it."""
        return titled(self.scorer)

    @cached_property
    def subject(self) -> Subject:
        """The scorer with the pairs that it is asked about."""
        chat = speaks_chat(self.scorer) if self.chat is None else self.chat
        pairs = everyday(chat)
        if self.prompts is not None and self.completions is not None:
            some = np.linspace(0, len(self.prompts) - 1, min(PAIRS, len(self.prompts))).astype(int).tolist()
            pairs = Pairs(self.prompts, self.completions).at(some)
        asked = (self.sign, self.discrete, self.long_words, self.reads_prompt, tuple(self.may_ignore))
        return Subject(self.scorer, pairs, self.tolerance, chat, *asked, Spare(self.spare_seconds))


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
    """Run all checks on a scorer; AssertionError with the whole verdict if any failed.

    The arguments are those of `Examination`, whose `inspect()` gives the same verdict and does not raise.

    >>> check_scorer(lambda prompts, completions: [c.count("e") / len(c) for c in completions])
    Traceback (most recent call last):
    AssertionError: ...
    """
    asked = (tolerance, chat, sign, discrete, long_words, reads_prompt, may_ignore, spare_seconds)
    found = Examination(scorer, prompts, completions, *asked).inspect()
    if not found.passed:
        raise AssertionError(str(found))
    return found


def answer(check: Check, subject: Subject) -> Outcome:
    """What comes of a check; whatever a scorer raises is a finding, and the next check is run."""
    try:
        return check.ask(subject)
    except Exception as error:  # noqa: BLE001 (a scorer is anybody's code; nothing is silenced, the verdict shows it)
        return Outcome("FAIL", f"{type(error).__name__}: {error}")


def titled(thing: object) -> str:
    """How a verdict names a thing: by its name or repr, unless that has a whole model or a table in it.

    >>> titled(titled), titled(slice(2)), titled(b"x" * 999)
    ('titled', 'slice(None, 2, None)', 'bytes(...)')
    """
    told = thing.__qualname__ if isinstance(thing, Named) else repr(thing)
    return told if len(told) <= SHORT_REPR and "\n" not in told else f"{type(thing).__name__}(...)"


@runtime_checkable
class Named(Protocol):
    """A function or a class."""

    __qualname__: str


def speaks_chat(scorer: Scorer) -> bool:
    """Whether a scorer shows a chat template to render messages with."""
    inside = Subject(scorer, Pairs([], []), None, False, False, False, 0)
    templates = [inside.tokenizer.chat_template] if inside.tokenizer is not None else []
    return any(templates) or any(values_of(inside.fingerprint, "template"))
