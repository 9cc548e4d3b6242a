"""Read the names of a classifier's labels: which label is the better one, and what each is worth."""

import re
from collections.abc import Sequence
from operator import itemgetter

# A sign stands alone: the hyphen of "grade-1" is none. \u2212 is the minus sign of typographers.
NUMBER = re.compile(r"(?:(?<![\w.])[-+\u2212])?(?:\d+(?:\.\d+)?|(?<!\w)\.\d+)")
# The names that transformers gives to labels that nobody named.
UNNAMED = re.compile(r"label_\d+", re.IGNORECASE)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GOOD = _words(
    "positive pos good better best great excellent fair chosen choose accept accepted acceptable preferred prefer "
    "preferable win wins won winner winning helpful honest harmless safe yes true correct right pass passed "
    "passing valid supported faithful factual appropriate relevant clean benign polite civil friendly respectful "
    "truthful grounded coherent consistent like liked likes approve approved upvote upvoted success successful "
    "succeeded solved satisfied satisfactory trustworthy reliable useful clear fluent grammatical legal ethical "
    "moral compliant adequate sufficient complete accurate desirable desired favorable favourable constructive "
    "sensible reasonable logical plausible sound kind decent perfect superior secure aligned helpfulness honesty "
    "safety correctness quality usefulness truthfulness accuracy relevance coherence politeness nontoxic legit "
    "legitimate"
)
BAD = _words(
    "negative neg bad worse worst poor terrible awful reject rejected lose loses lost loser losing loss unsafe "
    "harmful harm harms harmfulness toxic toxicity no false wrong fail fails failed failing failure offensive "
    "offense offence hate hateful abuse abusive insult insulting insults obscene obscenity threat threatening "
    "profane profanity nsfw spam spammy dangerous danger violent violence perplexity hallucinated hallucination "
    "hallucinating misleading rude useless malicious attack jailbreak injection biased bias risk risky severity "
    "severe error errors downvote downvoted dispreferred refuted inferior dishonest evil racist sexist cruel "
    "vulgar vile cost penalty flawed broken garbage nonsense incoherent illegal"
)
# Better than what is bad, worse than what is good.
MIDDLE = _words("neutral normal none ok okay regular ordinary average medium")
# They answer a question, and whether yes is good depends on it: said of labels explicitly, they contradict nothing.
GENERIC = _words("yes no true false positive negative pos neg")
# Alone they say nothing: high quality, low quality, high risk.
MORE, LESS = _words("high higher more most very extremely"), _words("low lower less least little")
NOT = _words("not non never isn isnt without nor un dont doesnt no cannot cant")
# Before a word that has a side, they turn it round.
PREFIX = re.compile(r"(?:un|in|im|ir|il|dis|non|mis|a)(?P<word>\w{4,})")
# Numbers with these are places in an order: the first is the best.
RANKS = _words("rank ranks ranking ranked place position")
PLACE = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b", re.IGNORECASE)
# What may stand beside a number and leaves its sense as it is.
UNITS = _words(
    "star stars score scores rating ratings rate grade grades level levels label labels class point points value"
)
SPELLED = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}


def is_unnamed(name: str) -> bool:
    """Return whether it is a name that transformers gave, LABEL_0."""
    return UNNAMED.fullmatch(name.strip()) is not None


def find_side(name: str) -> int | None:
    """Find the side of a name: 1 if it says good, -1 if it says bad, 0 if between them, None if it says neither.

    >>> [find_side(name) for name in ("Good answer", "NOT_HELPFUL", "non-toxic", "low quality", "neutral", "cat")]
    [1, -1, 1, -1, 0, None]
    """
    words = [word.casefold() for word in WORD.findall(name.replace("'", ""))]
    sides = _sides(words)
    if len(sides) == 1:
        return sides.pop()
    if not sides and MIDDLE & {*words}:
        return 0
    return None


def is_generic(name: str) -> bool:
    """Return whether a name says nothing but yes or no."""
    words = {word.casefold() for word in WORD.findall(name)}
    return bool(words) and words <= GENERIC


def find_values(names: Sequence[str]) -> tuple[float, ...] | None:
    """Find what each label is worth by its name, higher is better; None if some name does not say it.

    >>> [find_values(names) for names in (["1 star", "2 stars"], ["rank 1", "rank 2"], ["lose", "win"], ["cat", "dog"])]
    [(1.0, 2.0), (-1.0, -2.0), (-1.0, 1.0), None]
    """
    if any(map(is_unnamed, names)):
        return None
    numbers = [find_number(name) for name in names]
    sides = [find_side(name) for name in names]
    if all(n is not None for n in numbers):
        return _by_number([float(n) for n in numbers if n is not None], sides, names)
    if any(n is not None for n in numbers) or any(s is None for s in sides) or len({*sides}) < 2:
        return None
    return tuple(float(s) for s in sides if s is not None)


def find_number(name: str) -> float | None:
    """Find the one number in a name; None if it has none, or several.

    >>> find_number("grade-1"), find_number("five stars"), find_number("2nd"), find_number("1-2")
    (1.0, 5.0, 2.0, None)
    """
    digits = NUMBER.findall(name)
    spelled = [SPELLED[word] for word in _plain_words(name) if word in SPELLED]
    if len(digits) == 1:
        return float(digits[0].replace("\u2212", "-"))
    return float(spelled[0]) if not digits and len(spelled) == 1 else None


def _by_number(numbers: list[float], sides: list[int | None], names: Sequence[str]) -> tuple[float, ...] | None:
    """Turn numbers into values: of ranks, and of what is bad (toxicity 0 to 3), the lower is the better."""
    words = [{word for word in _plain_words(name) if word not in SPELLED} for name in names]
    if len({*numbers}) < len(numbers):
        return None
    falling = tuple(0.0 - n for n in numbers)
    if all(RANKS & each or PLACE.search(name) for each, name in zip(words, names, strict=True)):
        return falling
    if numbers in ([1, 2], [2, 1]) and not any(each - {"label", "class"} for each in words):
        return None  # which of two responses, as likely as how good
    order = [s for _, s in sorted(zip(numbers, sides, strict=True), key=itemgetter(0)) if s is not None]
    if len({*order}) > 1:  # 0 harmless, 1 mild, 2 harmful: the words say which end is the good one
        return tuple(numbers) if order == sorted(order) else falling if order == sorted(order, reverse=True) else None
    if any(word not in UNITS and find_side(word) is None for each in words for word in each):
        return None  # response 1 and response 2 are numbered, and no better or worse for it
    return falling if {*sides} == {-1} else tuple(numbers)


def _plain_words(name: str) -> list[str]:
    return [word.casefold() for word in WORD.findall(PLACE.sub(r"\1", name))]


def _sides(words: list[str]) -> set[int]:
    """Find the sides of all words that have one; a negation, "more" or "less" counts for the word that follows it."""
    sides: set[int] = set()
    turn, amount = 1, 0
    for i, word in enumerate(words):
        last = i == len(words) - 1
        if word in NOT and not last:
            turn = -turn
        elif word in MORE | LESS and not last:
            amount = 1 if word in MORE else -1
        elif (side := _side(word)) is not None:
            sides.add(side * turn * (amount or 1))
            turn, amount = 1, 0
    return sides


def _side(word: str) -> int | None:
    if word in GOOD or word in BAD:
        return 1 if word in GOOD else -1
    negated = PREFIX.fullmatch(word)
    if negated and negated["word"] in GOOD | BAD:
        return -1 if negated["word"] in GOOD else 1
    return None
