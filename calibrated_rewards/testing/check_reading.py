"""Checks that a scorer reads all of its input: every character, word, message, role, and differences between texts."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.testing.probes import (
    ALPHABETS,
    CONTRASTS,
    LETTERS,
    MAY_IGNORE,
    MUST_SEE,
    QUESTIONS,
    SYSTEMS,
    DifferenceKind,
    Pairs,
    as_chat,
    as_prompt,
    passage,
    replace_character,
    three_messages,
)
from calibrated_rewards.testing.subject import Outcome, Subject, find_values

Place: TypeAlias = Callable[..., Pairs]
Chat: TypeAlias = list[dict[str, Any]]
# Characters of the texts, and the fewest places of each that are tried. Of the shortest text every place is.
LENGTHS = {60: 60, 240: 28, 1_200: 32, 4_200: 16}
# More replacements for a character, where the first ones do not move the score.
OTHERS = ("e", "!", "7", "Q")
# Numbers of characters at which texts tend to be cut.
EDGES = (80, 100, 128, 200, 256, 500, 512, 1_000, 1_024, 2_000, 2_048, 4_000, 4_096)
# Texts in a call, and the most of those that score alike which are scored again alone.
ROWS, LOOKS = 32, 24
# Scores of one batch that are this near, in standard deviations, may belong to one input.
ALIKE = 1e-4
# 16-bit arithmetic may lose one character of a long text, but not this many.
STRETCH = 12
# Texts in which a part is changed; one whose score moves is enough.
PROBES = 4
# Messages of a long conversation, and their sizes in characters: the first that the scorer reads whole is taken.
MESSAGES, SIZES = 9, (200, 40, 12)
MERGED = "all is one message of the user"


@dataclass(frozen=True)
class Sweep:
    """A text that is changed in one place after another."""

    subject: Subject
    text: str
    as_pairs: Place

    def find_unread_place(self) -> tuple[int | None, int]:
        """Find a place whose change does not move the score; also return how many places were tried."""
        places = self.places
        least = min(LENGTHS.get(len(self.text), 16), len(places))
        tried = 0
        for start in range(0, least, ROWS):
            chunk = places[start : min(start + ROWS, least)]
            if (unread := self._find_unread_in(chunk)) is not None:
                return unread, tried
            tried += len(chunk)
        for start in range(least, len(places), 8 * ROWS):
            if self.subject.spare.seconds <= 0:
                break
            chunk = places[start : start + 8 * ROWS]
            with self.subject.spare.spend():
                if (unread := self._find_unread_in(chunk)) is not None:
                    return unread, tried
            tried += len(chunk)
        return None, tried

    @cached_property
    def places(self) -> list[int]:
        """Indices of all characters in the order of trial: ends, fractions, where texts are cut, then at random."""
        n = len(self.text)
        ends = [n - 1, 0, n // 2, n - 2, 1, n // 4, 3 * n // 4, n // 3, 2 * n // 3]
        edges = [at for edge in EDGES if edge < n for at in (edge, edge - 1, n - edge, n - 1 - edge)]
        parts = [part * n // 16 for part in range(1, 16)]
        shuffled = random.Random(self.text).sample(range(n), n)
        return list(dict.fromkeys([*ends, *parts[::2], *edges[-12:], *parts[1::2], *shuffled]))

    def _find_unread_in(self, places: Sequence[int]) -> int | None:
        texts = [replace_character(self.text, i) for i in places]
        scores = self.subject.score(self.as_pairs([self.text, *texts])).astype(np.float64)
        apart = np.abs(scores[1:] - scores[0])
        alike = [i for i, gap in zip(places, apart, strict=True) if gap <= ALIKE * self.subject.sd]
        unchanged = self.as_pairs([self.text])
        for i in alike[:LOOKS]:
            gaps = (self.subject.measure_gap(unchanged, self.as_pairs([text])) for text in self._change(i))
            if not any(gap > 0 for gap in gaps):
                return i
        return None

    def _change(self, place: int) -> Iterator[str]:
        for letters in (LETTERS, OTHERS, OTHERS[1:], OTHERS[2:], OTHERS[3:] + LETTERS):
            yield replace_character(self.text, place, letters)
        if self.subject.few_bits:
            yield f"{self.text[:place]}{'ZQXJ' * (STRETCH // 4)}{self.text[place + STRETCH :]}"


def check_completion_places(subject: Subject) -> Outcome:
    """Every character of a completion is read: in texts of 60, 240, 1,200 and 4,200 characters."""
    return check_places(subject, subject.as_completions, "completion")


def check_prompt_places(subject: Subject) -> Outcome:
    """Every character of a prompt is read: in texts of 60, 240, 1,200 and 4,200 characters."""
    return check_places(subject, subject.as_prompts, "prompt")


def check_places(subject: Subject, as_pairs: Place, name: str) -> Outcome:
    """Change one character of short and long texts, place by place: the score must move."""
    if not subject.reads_letters:
        if series := find_length_keys(subject, as_pairs):
            return Outcome(
                "FAIL",
                f"{name}s of one length have one score, whatever they say, and with the length it goes up and down "
                f"({series}) -> is a score kept by the length of the {name}? Keep it by the whole text",
            )
        return Outcome("-", "single characters do not move the score, wherever they stand")
    counts, shorter = [], ""
    for length in LENGTHS:
        text = passage(length, name)
        for separator in find_values(subject.fingerprint, "separator"):
            # Of several steps the worst may be all that counts, which is no fault.
            text = text.replace(separator, " " * len(separator))
        if not subject.reads_whole(as_pairs([text])):
            shorter = f"; a {name} of {length} characters is refused, or is cut with a warning"
            break
        unread, count = Sweep(subject, text, as_pairs).find_unread_place()
        if unread is not None:
            score = float(subject.score(as_pairs([replace_character(text, unread)]))[0])
            near = start_of(text[max(0, unread - 8) : unread + 8], 30)
            return Outcome(
                "FAIL",
                f"in a {name} of {length} characters character {unread + 1} of {length} ({near}) may be any other, and "
                f"the score stays {score:.6g} -> part of the {name} is taken off, cut or merged, or scores are kept by "
                "part of it: hand the whole text to the model, and warn of cuts",
            )
        counts.append(f"{count} of {length}")
    return Outcome("ok", f"places tried: {', '.join(counts)}{shorter}")


def find_length_keys(subject: Subject, as_pairs: Place) -> str:
    """Show the scores by length if the length alone decides them, and not smoothly, as a reward for length would."""
    lengths = range(45, 57)
    scores, again = (
        np.array([subject.score(as_pairs([passage(length, seed)]))[0] for length in lengths])
        for seed in ("one", "another")
    )
    turns = int((np.diff(np.sign(np.diff(scores))) != 0).sum())
    if (scores != again).any() or turns < len(lengths) // 3:
        return ""
    return f"{', '.join(f'{score:.4g}' for score in scores[:5])}, ... from {lengths[0]} characters on"


def check_differences(subject: Subject) -> Outcome:
    """Digits, letters, punctuation, symbols, small words and the order of words make a difference."""
    sides: dict[str, Place] = {"completion": subject.as_completions}
    if subject.reads_prompt:
        sides["prompt"] = subject.as_prompts
    excused: list[str] = []
    for kind in MUST_SEE:
        for side, as_pairs in sides.items():
            for one, other in find_unseen(subject, kind, as_pairs):
                if kind.name in subject.may_ignore or subject.tokenizes_alike(one, other):
                    excused.append(kind.name)  # no scorer could tell apart what its tokenizer does not
                    continue
                score = float(subject.score(as_pairs([one]))[0])
                return Outcome(
                    "FAIL",
                    f"{kind.name}: as a {side}, {start_of(one)} and {start_of(other)} both get {score:.6g} -> "
                    f"{kind.advice}. If it is meant so: may_ignore=[{kind.name!r}]",
                )
    names = ", ".join(dict.fromkeys(excused))
    return Outcome("-", f"not told apart by its tokenizer, or meant so: {names}") if names else Outcome("ok")


def find_unseen(subject: Subject, kind: DifferenceKind, as_pairs: Place) -> Iterator[tuple[str, str]]:
    """Find pairs of texts of one family that have the same score, each in a call of its own, beside two other texts.

    Two scores of one context may be equal by chance: a family of 26 letters has 325 pairs.
    """
    texts = sorted({text for family in kind.families for text in family})
    scores = dict(zip(texts, subject.score(as_pairs(texts)).astype(np.float64), strict=True))
    couples = [couple for family in kind.families for couple in combinations(dict.fromkeys(family), 2)]
    alike = [(one, other) for one, other in couples if abs(scores[one] - scores[other]) <= ALIKE * subject.sd]
    for one, other in alike[:LOOKS]:
        if all(subject.measure_gap(as_pairs([one], number), as_pairs([other], number)) == 0 for number in (0, 2)):
            yield one, other


def check_letters(subject: Subject) -> Outcome:
    """Report whether case, accents, other alphabets make a difference: sound models may ignore them."""
    goods = [question.good for question in QUESTIONS[:PROBES]]
    kinds = {"case": (goods, [good.swapcase() for good in goods]), **ALPHABETS}
    unread = []
    for name, (ones, others) in kinds.items():
        prompts = [as_prompt(question.prompt, subject.chat) for question in QUESTIONS[: len(ones)]]
        if not subject.tells_apart(Pairs(prompts, ones), Pairs(prompts, others)):
            unread.append(name)
    if subject.reads_letters:
        unread += [kind.name for kind in MAY_IGNORE if any(find_unseen(subject, kind, subject.as_completions))]
    return Outcome("-", f"not read: {', '.join(unread)}") if unread else Outcome("ok")


def check_prompt(subject: Subject) -> Outcome:
    """An answer to another question has another score."""
    prompts = [as_prompt(question.prompt, subject.chat) for question in QUESTIONS[:PROBES]]
    completions = [question.good for question in QUESTIONS[:PROBES]]
    if subject.tells_apart(Pairs(prompts, completions), Pairs(prompts[::-1], completions)):
        return Outcome("ok")
    return Outcome(
        "FAIL",
        "an answer has the same score whatever was asked -> is the prompt dropped, or a score kept by completion "
        "alone? If it is meant so: reads_prompt=False",
    )


def check_end_words(subject: Subject) -> Outcome:
    """Another first or last word of the completion moves the score, where another one inside does."""
    prompts = [as_prompt(question.prompt, subject.chat) for question in QUESTIONS[:PROBES]]

    def is_read(place: str) -> bool:
        versions: tuple[list[str], list[str]] = ([], [])
        for question, contrast in zip(QUESTIONS[:PROBES], CONTRASTS, strict=True):
            words = question.good.rstrip(".").split()
            at = {"first": 0, "middle": len(words) // 2, "last": len(words) - 1}[place]
            for version, word in zip(versions, contrast, strict=True):
                version.append(" ".join([*words[:at], word, *words[at + 1 :]]))
        return subject.tells_apart(*(Pairs(prompts, version) for version in versions))

    unread = [name for name in ("first", "last") if not is_read(name)]
    if not unread:
        return Outcome("ok")
    if not is_read("middle"):
        return Outcome("-", "no single word moves the score")
    return Outcome(
        "FAIL",
        f"the {' and the '.join(unread)} word of a completion is not read, one inside is -> look where prompt and "
        "completion are joined, and where the text is cut or ended",
    )


def check_turns(subject: Subject) -> Outcome:
    """Another message moves the score, whichever of a conversation's it is."""
    starts = range(0, PROBES, 2)
    chats, completions = [three_messages(i) for i in starts], [QUESTIONS[i + 1].good for i in starts]
    if not subject.reads_whole(Pairs(chats, completions)):
        return Outcome("-", "conversations of three messages are not taken, or are too long")
    unread = []
    for turn, name in enumerate(("first question", "first answer", "last question")):
        messages = [three_messages(i + PROBES)[turn] for i in range(len(chats))]
        others = [[*chat[:turn], other, *chat[turn + 1 :]] for chat, other in zip(chats, messages, strict=True)]
        if not subject.tells_apart(Pairs(chats, completions), Pairs(others, completions)):
            unread.append(name)
    if not unread:
        return Outcome("ok")
    detail = f"of question, answer, question, a score does not depend on the {' and the '.join(unread)}"
    return Outcome("FAIL", f"{detail} -> render all messages of the prompt, not one of them")


def check_system(subject: Subject) -> Outcome:
    """Report whether another system message moves the score: many templates leave it out."""
    questions = QUESTIONS[: len(SYSTEMS)]
    ones, others = (
        Pairs(
            [as_chat(text, q.prompt, roles=("system", "user")) for text, q in zip(systems, questions, strict=True)],
            [question.good for question in questions],
        )
        for systems in (SYSTEMS, SYSTEMS[::-1])
    )
    if not subject.reads_whole(ones):
        return Outcome("-", "system messages are not taken")
    return Outcome("ok") if subject.tells_apart(ones, others) else Outcome("-", "not read: the system message")


def check_roles(subject: Subject) -> Outcome:
    """Messages by other speakers, or joined into one, have other scores."""
    chats = [three_messages(number) for number in (0, 3)]
    pairs = Pairs(chats, [QUESTIONS[number + 1].good for number in (0, 3)])
    if not subject.reads_whole(pairs):
        return Outcome("-", "conversations of three messages are not taken, or are too long")
    for change, others in _change_roles(chats):
        other_pairs = Pairs(others, pairs.completions)
        if not subject.reads_whole(other_pairs) or subject.tells_apart(pairs, other_pairs):
            continue
        detail = f"user, assistant, user: it makes no difference if {change}"
        template = subject.tokenizer.chat_template if subject.tokenizer is not None else None
        template = str(template or next((x for x in find_values(subject.fingerprint, "template") if x), ""))
        if template and ("role" not in template or change != MERGED):
            return Outcome("-", f"{detail}; its template has no other roles")
        if "roles" in subject.may_ignore:
            return Outcome("-", f"{detail}; meant so")
        return Outcome(
            "FAIL",
            f"{detail} (both get {float(subject.score(other_pairs.at([0]))[0]):.6g}) -> what the user said and what "
            "the assistant said is not told apart: write the role of each message, as a chat template does. If it is "
            "meant so: may_ignore=['roles']",
        )
    return Outcome("ok")


def _change_roles(chats: Sequence[Chat]) -> Iterator[tuple[str, list[Chat]]]:
    """Give the same contents other roles; chat templates refuse some."""
    contents = [[message["content"] for message in chat] for chat in chats]
    for separator in ("\n", "\n\n", " ", ""):
        yield MERGED, [as_chat(separator.join(texts)) for texts in contents]
    for roles in (("user", "user", "user"), ("assistant", "user", "user"), ("assistant", "assistant", "user")):
        yield f"they are {', '.join(roles)}", [as_chat(*texts, roles=roles) for texts in contents]


def check_every_message(subject: Subject) -> Outcome:
    """Each message of a conversation of nine counts, at its start, middle and end; and so does their order."""
    completions = [QUESTIONS[1].good]
    chats = (as_chat(*(passage(size, f"message {number}") for number in range(MESSAGES))) for size in SIZES)
    chat = next((chat for chat in chats if subject.reads_whole(Pairs([chat], completions))), None)
    if chat is None:
        return Outcome("-", "conversations of nine messages are not taken, or are too long")
    size = len(chat[0]["content"])
    score = float(subject.score(Pairs([chat], completions))[0])
    for change, other in _change_messages(chat):
        if float(subject.score(Pairs([other], completions))[0]) == score:
            return Outcome(
                "FAIL",
                f"in a conversation of {MESSAGES} messages of {size} characters, {change} changes nothing: the score "
                f"stays {score:.6g} -> render all messages of the prompt, whole and in their order",
            )
    return Outcome("ok", f"{MESSAGES} messages of {size} characters")


def _change_messages(chat: Chat) -> Iterator[tuple[str, Chat]]:
    """Make one change after another to a conversation."""
    for number, message in enumerate(chat):
        text = message["content"]
        for name, i in (("first", 0), ("middle", len(text) // 2), ("last", len(text) - 1)):
            other = {**message, "content": replace_character(text, i)}
            change = f"another {name} character of message {number + 1} (the {message['role']}'s)"
            yield change, [*chat[:number], other, *chat[number + 1 :]]
    yield "the order of the first two exchanges", [*chat[2:4], *chat[:2], *chat[4:]]
    yield "the order of the user's messages", [chat[2], chat[1], chat[0], *chat[3:]]
    yield "leaving out the first exchange", chat[2:]
    yield "leaving out an exchange in the middle", [*chat[:4], *chat[6:]]
    yield "repeating the first exchange", [*chat[:2], *chat]
