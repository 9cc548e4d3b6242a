"""Which differences between texts does a scorer see? Families of texts that are nearly alike each need scores apart.

A scorer that does not read single letters, as a count or a length, is not asked. Where the scorer shows its tokenizer,
and that makes the same tokens of two texts, no scorer could tell them apart: that is no fault, and is told.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase, ascii_uppercase
from typing import TypeAlias

import numpy as np

from calibrated_rewards.checks.positions import ALIKE, in_completion, in_prompt, reads_letters
from calibrated_rewards.checks.probes import Pairs
from calibrated_rewards.checks.subject import Outcome, Subject
from calibrated_rewards.prompts import start_of

Placed: TypeAlias = Callable[[Subject, Sequence[str]], Pairs]
# Of texts that look alike in a batch, so many are scored again alone.
LOOKS = 24


@dataclass(frozen=True)
class Kind:
    """A kind of difference: families of texts, within each of which no two should have one score."""

    name: str
    families: tuple[tuple[str, ...], ...]
    advice: str = "the text is changed before the model reads it: hand it over as it is"


def one_of(template: str, fillings: Sequence[str]) -> tuple[str, ...]:
    """A text for each filling."""
    return tuple(template.format(filling) for filling in fillings)


def words(text: str) -> list[str]:
    """What spaces part."""
    return text.split()


DIGITS = Kind(
    "digits",
    (
        one_of("The answer is {}.", "0123456789"),
        one_of(
            "It costs {} euros today.", words("12 21 1 2 11 22 112 121 211 102 120 1.2 12.0 -12 012 1,200 1200 12%")
        ),
        one_of("Number {} it was", words("1234567890123 1234567890124 1234567890132 123456789012 2234567890123")),
        ("x = 3 and y = 4", "x = 4 and y = 3"),
    ),
    "numbers are merged or dropped before the model reads them: hand over the text as it is",
)
LETTERS = Kind("letters", (one_of("Take b{}t now.", ascii_lowercase), one_of("The n{}n word", ascii_lowercase)))
CAPITALS = Kind("capital letters", (one_of("It is type {} here.", ascii_uppercase),))
SIGNS = list(".,;:!?-'\"()/%&+=*#@$")
PUNCTUATION = Kind(
    "punctuation", (one_of("Yes{} he came", ["", *SIGNS]), one_of("He said so{}", ["", ".", "!", "?", "..."]))
)
MARKUP = ("{", "}", "[", "]", "<", ">", "|", "~", "^", "_", "`", "\\", "**", "##", "```", "$$", "==")
SYMBOLS = Kind(
    "symbols of code and markup",
    (
        *((f"so {sign}bold it is", "so bold it is") for sign in MARKUP),
        ("a <b>bold</b> word", "a bold word"),
        ("see [here](x) now", "see here now"),
        ("- one\n- two", "one\ntwo"),
    ),
)
ORDER = Kind(
    "the order of words",
    (
        ("The dog bites the old man.", "The man bites the old dog.", "The old man bites the dog."),
        ("First yes, then no.", "First no, then yes."),
        ("It is good, not bad.", "It is bad, not good."),
        ("one line\nanother line", "another line\none line"),
    ),
    "words are sorted, counted or pooled without their places: look at the position ids, and at what is done before",
)
SMALL = words("the a is not of to in and it no very")
SMALL_WORDS = Kind(
    "small words and repetitions",
    (
        (
            "I did not go to the house",
            "I did go to the house",
            "I did not go to house",
            "I did not go the house",
            "did not go house",
        ),
        one_of("Well {} he said", ["", *SMALL]),
        ("no", "no no", "no no no"),
        ("so good", "soo good", "sooo good", "so so good"),
        ("Wow!", "Wow!!", "Wow!!!"),
        one_of("They {} home", ("run", "runs", "running", "ran", "runner")),
    ),
)
ENTITIES = Kind(
    "HTML entities, addresses",
    (
        ("a &lt; b", "a < b"),
        ("a &amp; b", "a & b"),
        ("see https://a.org/x", "see https://b.org/x", "see https://a.org/y", "see x"),
        ("mail ann@a.org", "mail bob@a.org"),
    ),
)
BLOCKS = Kind(
    "blocks of code, thoughts",
    (
        (*one_of("So:\n```python\nx = {}\n```\nDone.", "12"), "So:\n\nDone."),
        (*one_of("<think>\nIt is {}.\n</think>\nYes.", ("so", "no")), "Yes."),
    ),
    "a part of the text is taken out before the model reads it: a chat template may do so with thoughts",
)
# Where transcripts are split, and answers are looked for.
MARKERS = ("Human:", "User:", "Assistant:", "Question:", "Answer:", "###", "---", "[/INST]", "<|user|>")
MARKED = Kind(
    "what stands beside markers",
    tuple((f"It is so.\n{m}\nI see", f"It is so.\n{m}\nI run", f"He was here.\n{m}\nI see") for m in MARKERS),
    "the text is cut at a marker: join prompt and completion, and split neither",
)
MUST = (DIGITS, LETTERS, CAPITALS, PUNCTUATION, SYMBOLS, ORDER, SMALL_WORDS, ENTITIES, BLOCKS, MARKED)

# Sound models ignore some of these, each its own: BERT's lower case, T5's white space, a vocabulary without emoji.
MAY = (
    Kind("white space", (("one  two", "one two"), ("one\ttwo", "one two"), ("one\n\ntwo", "one\ntwo", "one two"))),
    Kind("white space at the ends", ((" one two", "one two", "one two "), ("one two\n", "one two"))),
    Kind(
        "forms of Unicode",
        (("\ufb01ne", "fine"), ("x²", "x2"), ("\uff46", "f"), ("caf\u00e9", "cafe\u0301"), ("\U0001d400 b", "A b")),
    ),
    Kind(
        "invisible characters",
        (("one\u200btwo", "onetwo"), ("\ufeffone", "one"), ("one\u200e two", "one two"), ("a\x07b", "ab")),
    ),
    Kind("quotation marks and dashes", (("“so”", '"so"'), ("it\u2019s", "it's"), ("a — b", "a - b", "a \u2013 b"))),
    Kind("emoji", (one_of("Hi {}", ("😀", "😢", "🔥", "👍", "👎", "❤️", "👍🏿", "🇫🇷", "🇩🇪")),)),
    Kind("Chinese and Japanese characters", (one_of("{}です", ("犬", "猫", "水", "火")),)),
    Kind("Hebrew and Arabic letters", (one_of("כ{}ב", "אבגד"), one_of("ك{}ب", "ابتث"))),
    Kind("Cyrillic and Greek letters", (one_of("к{}т", "аио"), one_of("λ{}", "βγδ"))),
)


def differences(subject: Subject) -> Outcome:
    """Digits, letters, punctuation, symbols, small words and the order of words make a difference."""
    if not subject.continuous:
        return Outcome("-", "not asked of grades, rules and constants")
    if not reads_letters(subject):
        return Outcome("-", "not asked of a scorer that does not read single letters")
    sides = {"completion": in_completion, **({"prompt": in_prompt} if subject.reads_prompt else {})}
    alike: list[str] = []
    for kind in MUST:
        for side, pairs in sides.items():
            for one, other in unseen(subject, kind, pairs):
                if subject.reads_alike(one, other) or kind.name in subject.may_ignore:
                    alike.append(kind.name)
                    continue
                score = float(subject.score(pairs(subject, [one]))[0])
                return Outcome(
                    "FAIL",
                    f"{kind.name}: as a {side}, {start_of(one)} and {start_of(other)} both get {score:.6g} -> "
                    f"{kind.advice}. If it is meant so: may_ignore=[{kind.name!r}]",
                )
    told = ", ".join(dict.fromkeys(alike))
    return Outcome("-", f"not told apart by its tokenizer, or meant so: {told}") if told else Outcome("ok")


def not_seen(subject: Subject) -> Iterator[str]:
    """The kinds of differences that a sound scorer may ignore, and that this one does."""
    for kind in MAY if reads_letters(subject) else ():
        if any(unseen(subject, kind, in_completion)):
            yield kind.name


def unseen(subject: Subject, kind: Kind, pairs: Placed) -> Iterator[tuple[str, str]]:
    """The pairs of texts of one family that have one score, each scored in a call of its own."""
    texts = sorted({text for family in kind.families for text in family})
    at = {text: place for place, text in enumerate(texts)}
    scores = subject.score(pairs(subject, texts)).astype(np.float64)
    near = ALIKE * subject.sd
    couples = [(a, b) for family in kind.families for a, b in combinations(dict.fromkeys(family), 2)]
    alike = [(a, b) for a, b in couples if abs(scores[at[a]] - scores[at[b]]) <= near]
    for one, other in alike[:LOOKS]:
        if same_alone(subject, pairs(subject, [one]), pairs(subject, [other])):
            yield one, other


def same_alone(subject: Subject, one: Pairs, other: Pairs) -> bool:
    """Whether two pairs have one score, each in a call of its own."""
    return subject.gap_alone(one, other) == 0
