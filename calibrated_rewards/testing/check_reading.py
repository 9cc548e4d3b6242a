"""Is every place of a text read? One character is changed alone, in short and long texts, and the score must move.

Whether single characters move the score at all is asked first, of short texts: a reward that counts something, or goes
by length, is not asked for more.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.testing.probes import QUESTIONS, Pairs, asked
from calibrated_rewards.testing.subject import Outcome, Subject, values_of

# Characters of the texts, and how many places of each are tried at least. Of the shortest every one is.
LENGTHS = {60: 60, 240: 28, 1_200: 32, 4_200: 16}
# Within the shortest text: where a change of one character shows whether it reads characters at all.
INSIDE = (9, 17, 25, 33, 41, 49)
# What is put in the place of a character; the first that is another one.
LETTERS = ("z", "k", "o")
OTHERS = ("e", "!", "7", "Q")
# Where texts tend to be cut, by number of characters.
EDGES = (80, 100, 128, 200, 256, 500, 512, 1_000, 1_024, 2_000, 2_048, 4_000, 4_096)
# Texts that go into one call, and how many of those that look alike are scored again alone.
ROWS, LOOKS = 32, 24
# So near two scores of one batch may be those of one input, in standard deviations.
ALIKE = 1e-4
# Of arithmetic of 16 bits one character of a long text may be lost; so many are not.
STRETCH = 12
WORDS = re.findall(
    r"\w+",
    "the a garden morning because people often write small letters about house water time without any reason why "
    "children learn quickly when they play outside and old friends meet again in winter number light door paper",
)


def passage(length: int, seed: str) -> str:
    """A text of that many characters: words, sentences, numbers and lines; another one for another seed.

    >>> passage(24, "a"), len(passage(999, "b"))
    ('...', 999)
    """
    chance = random.Random(f"{seed} {length}")
    text = ""
    while len(text) < length:
        words = [chance.choice(WORDS) for _ in range(chance.randint(4, 9))]
        if chance.random() < 0.3:
            words.append(str(chance.randint(10, 9999)))
        end = chance.choice((". ", ". ", "? ", ",\n", ".\n\n") if length > 100 else (". ", "? "))
        text += " ".join(words).capitalize() + end
    # No space at the end, which scorers may take off.
    return f"{text[: length - 1]}d" if not text[length - 1].isalpha() else text[:length]


def replaced(text: str, place: int, letters: Sequence[str] = LETTERS) -> str:
    """The text with another character in one place."""
    new = next(letter for letter in letters if letter.lower() != text[place].lower())
    return f"{text[:place]}{new}{text[place + 1 :]}"


def in_one_step(subject: Subject, text: str) -> str:
    """The text without what parts steps: of several the worst may be all that counts, which is no fault."""
    for separator in values_of(subject.fingerprint, "separator"):
        text = text.replace(separator, " " * len(separator))
    return text


def in_completion(subject: Subject, texts: Sequence[str]) -> Pairs:
    """Texts as completions of a short prompt."""
    return Pairs([asked(QUESTIONS[0].prompt, subject.chat)] * len(texts), list(texts))


def in_prompt(subject: Subject, texts: Sequence[str]) -> Pairs:
    """Texts as prompts of a short completion, with nothing behind them."""
    prompts = [asked(text, True) if subject.chat else text for text in texts]
    return Pairs(prompts, [QUESTIONS[0].good] * len(texts))


def reads_letters(subject: Subject) -> bool:
    """Whether each of three letters in a place inside a short completion has a score of its own, in most places.

    A model and a hash do; a count, a length, a search for words does not.
    """
    text = passage(60, "completion")
    own = 0
    for place in INSIDE:
        variants = {text, *(f"{text[:place]}{letter}{text[place + 1 :]}" for letter in LETTERS)}
        scores = subject.score(in_completion(subject, sorted(variants)))
        own += len(np.unique(scores)) == len(variants)
    return own >= len(INSIDE) - 2


def kept_by_length(subject: Subject, pairs: Callable[[Subject, Sequence[str]], Pairs]) -> str:
    """Why scores go by the length of a text alone, and not smoothly, as a reward for length would; or nothing."""
    lengths = range(45, 57)
    ones, others = ([passage(length, seed) for length in lengths] for seed in ("one", "another"))
    scores, again = (np.array([subject.score(pairs(subject, [x]))[0] for x in texts]) for texts in (ones, others))
    turns = int((np.diff(np.sign(np.diff(scores))) != 0).sum())
    if (scores != again).any() or turns < len(lengths) // 3:
        return ""
    some = ", ".join(f"{score:.4g}" for score in scores[:5])
    return (
        "{0}s of one length have one score, whatever they say, and with the length it goes up and down "
        f"({some}, ... from {lengths[0]} characters on) -> is a score kept by the length of the "
        "{0}? Keep it by the whole text"
    )


@dataclass(frozen=True)
class Sweep:
    """One text, of which one place after the other is changed."""

    subject: Subject
    text: str
    pairs: Callable[[Subject, Sequence[str]], Pairs]

    def unread(self) -> tuple[int | None, int]:
        """The first place that does not move the score, if there is one; and how many places were tried."""
        places, least = self.places, LENGTHS.get(len(self.text), 16)
        tried = 0
        for chunk in _chunks(places[:least], ROWS):
            if (place := self._unread_of(chunk)) is not None:
                return place, tried
            tried += len(chunk)
        for chunk in _chunks(places[least:], 8 * ROWS):
            if self.subject.spare.seconds <= 0:
                break
            with self.subject.spare.spent():
                if (place := self._unread_of(chunk)) is not None:
                    return place, tried
            tried += len(chunk)
        return None, tried

    @cached_property
    def places(self) -> list[int]:
        """All places, in the order in which they are tried: ends, fractions, where texts are cut, then at random."""
        n = len(self.text)
        ends = [n - 1, 0, n // 2, n - 2, 1, n // 4, 3 * n // 4, n // 3, 2 * n // 3]
        edges = [at for edge in EDGES if edge < n for at in (edge, edge - 1, n - edge, n - 1 - edge)]
        parts = [part * n // 16 for part in range(1, 16)]
        chance = random.Random(self.text)
        shuffled = chance.sample(range(n), n)
        return list(dict.fromkeys([*ends, *parts[::2], *edges[-12:], *parts[1::2], *shuffled]))

    def _unread_of(self, places: Sequence[int]) -> int | None:
        """The first of these places whose change leaves the score as it is, however it is changed."""
        texts = [replaced(self.text, place) for place in places]
        scores = self.subject.score(self.pairs(self.subject, [self.text, *texts])).astype(np.float64)
        apart = np.abs(scores[1:] - scores[0])
        alike = [place for place, gap in zip(places, apart, strict=True) if gap <= ALIKE * self.subject.sd]
        return next((place for place in alike[:LOOKS] if not self._moves(place)), None)

    def _moves(self, place: int) -> bool:
        """Whether any other character there moves the score, each text in a call of its own."""
        return any(self._gap(text) > 0 for text in self._variants(place))

    def _variants(self, place: int) -> Iterator[str]:
        for letters in (LETTERS, OTHERS, OTHERS[1:], OTHERS[2:], OTHERS[3:] + LETTERS):
            yield replaced(self.text, place, letters)
        if self.subject.few_bits:
            yield f"{self.text[:place]}{'ZQXJ' * (STRETCH // 4)}{self.text[place + STRETCH :]}"

    def _gap(self, text: str) -> float:
        one, other = (self.pairs(self.subject, [each]) for each in (self.text, text))
        return self.subject.gap_alone(one, other)

    def told(self, place: int) -> str:
        """What was changed, and that it made no difference."""
        n, text = len(self.text), replaced(self.text, place)
        score = float(self.subject.score(self.pairs(self.subject, [text]))[0])
        near = self.text[max(0, place - 8) : place + 8]
        return f"character {place + 1} of {n} ({start_of(near, 30)}) may be any other, and the score stays {score:.6g}"


def completion(subject: Subject) -> Outcome:
    """Every character of a completion is read: in texts of 60, 240, 1,200 and 4,200 characters."""
    return _every_place(subject, in_completion, "completion")


def prompt(subject: Subject) -> Outcome:
    """Every character of a prompt is read: in texts of 60, 240, 1,200 and 4,200 characters."""
    if not subject.reads_prompt:
        return Outcome("-", "not asked")
    return _every_place(subject, in_prompt, "prompt")


def _every_place(subject: Subject, pairs: Callable[[Subject, Sequence[str]], Pairs], name: str) -> Outcome:
    if not subject.continuous:
        return Outcome("-", "not asked of grades, rules and constants")
    if not reads_letters(subject):
        if told := kept_by_length(subject, pairs):
            return Outcome("FAIL", told.format(name))
        return Outcome("-", "single characters do not move the score, wherever they stand")
    tried, shorter = [], ""
    for length in LENGTHS:
        sweep = Sweep(subject, in_one_step(subject, passage(length, name)), pairs)
        if not subject.reads_whole(pairs(subject, [sweep.text])):
            shorter = f"; a {name} of {length} characters is refused, or is cut with a warning"
            break
        place, count = sweep.unread()
        if place is not None:
            return Outcome(
                "FAIL",
                f"in a {name} of {length} characters {sweep.told(place)} -> part of the {name} is taken off, cut or "
                "merged, or scores are kept by part of it: hand the whole text to the model, and warn of cuts",
            )
        tried.append(f"{count} of {length}")
    return Outcome("ok", f"places tried: {', '.join(tried)}{shorter}")


def _chunks(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]
