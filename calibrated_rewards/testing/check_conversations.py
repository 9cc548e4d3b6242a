"""Are conversations read as such? Roles, the order of messages, and every message of a long one."""

from collections.abc import Iterator, Sequence
from typing import Any

from calibrated_rewards.testing.check_reading import passage, reads_letters, replaced
from calibrated_rewards.testing.probes import QUESTIONS, Pairs
from calibrated_rewards.testing.subject import Outcome, Subject, values_of

Talk = list[dict[str, Any]]

JOINED = ("\n", "\n\n", " ", "")
MESSAGES = 9
# Characters of a message; the first length at which the scorer reads the whole conversation is taken.
SIZES = (200, 40, 12)
TOLD = "a conversation of {} messages"


def roles(subject: Subject) -> Outcome:
    """The same words by other speakers, and as one message, have other scores."""
    if (free := _not_asked(subject)) is not None:
        return free
    talks = [_exchange(number) for number in (0, 3)]
    completions = [QUESTIONS[number + 1].good for number in (0, 3)]
    if not subject.reads_whole(Pairs(talks, completions)):
        return Outcome("-", "conversations of three messages are not taken, or are too long")
    for what, others in _other_speakers(talks):
        pairs = Pairs(others, completions)
        if subject.reads_whole(pairs) and not subject.tells_apart(Pairs(talks, completions), pairs):
            told = f"user, assistant, user: it makes no difference if {what}"
            template = _template(subject)
            if template and ("role" not in template or what != MERGED):
                return Outcome("-", f"{told}; its template has no other roles")
            if "roles" in subject.may_ignore:
                return Outcome("-", f"{told}; meant so")
            return Outcome(
                "FAIL",
                f"{told} (both get {float(subject.score(pairs.at([0]))[0]):.6g}) -> what the user said and what the "
                "assistant said is not told apart: write the role of each message, as a chat template does. If it is "
                "meant so: may_ignore=['roles']",
            )
    return Outcome("ok")


MERGED = "all is one message of the user"


def _other_speakers(talks: Sequence[Talk]) -> Iterator[tuple[str, list[Talk]]]:
    """The same contents with other roles; templates refuse some."""
    for join in JOINED:
        yield MERGED, [[_said("user", join.join(turn["content"] for turn in talk))] for talk in talks]
    for who in (("user", "user", "user"), ("assistant", "user", "user"), ("assistant", "assistant", "user")):
        others = [[_said(role, turn["content"]) for role, turn in zip(who, talk, strict=True)] for talk in talks]
        yield f"they are {', '.join(who)}", others


def every_message(subject: Subject) -> Outcome:
    """In a conversation of nine messages each counts, at its start, middle and end; and so does their order."""
    if (free := _not_asked(subject)) is not None:
        return free
    completion = QUESTIONS[1].good
    talks = (_long_talk(size) for size in SIZES)
    talk = next((talk for talk in talks if subject.reads_whole(Pairs([talk], [completion]))), None)
    if talk is None:
        return Outcome("-", "conversations of nine messages are not taken, or are too long")
    size = len(talk[0]["content"])
    own = float(subject.score(Pairs([talk], [completion]))[0])
    for what, other in _other_messages(talk):
        if float(subject.score(Pairs([other], [completion]))[0]) == own:
            return Outcome(
                "FAIL",
                f"in {TOLD.format(MESSAGES)} of {size} characters, {what} changes nothing: the score stays "
                f"{own:.6g} -> render all messages of the prompt, whole and in their order",
            )
    return Outcome("ok", f"{MESSAGES} messages of {size} characters")


def _other_messages(talk: Talk) -> Iterator[tuple[str, Talk]]:
    """The conversation with one change."""
    for number, turn in enumerate(talk):
        text = turn["content"]
        for where, place in (("first", 0), ("middle", len(text) // 2), ("last", len(text) - 1)):
            other = {**turn, "content": replaced(text, place)}
            what = f"another {where} character of message {number + 1} (the {turn['role']}'s)"
            yield what, [*talk[:number], other, *talk[number + 1 :]]
    yield "the order of the first two exchanges", [*talk[2:4], *talk[:2], *talk[4:]]
    yield "the order of the user's messages", [talk[2], talk[1], talk[0], *talk[3:]]
    yield "leaving out the first exchange", talk[2:]
    yield "leaving out an exchange in the middle", [*talk[:4], *talk[6:]]
    yield "repeating the first exchange", [*talk[:2], *talk]


def _not_asked(subject: Subject) -> Outcome | None:
    if not subject.reads_prompt:
        return Outcome("-", "not asked")
    if not subject.continuous:
        return Outcome("-", "not asked of grades, rules and constants")
    if not reads_letters(subject):
        return Outcome("-", "not asked of a scorer that does not read single letters")
    return None


def _template(subject: Subject) -> str:
    """The chat template that the scorer shows, if any."""
    own = subject.tokenizer.chat_template if subject.tokenizer is not None else None
    return str(own or next((x for x in values_of(subject.fingerprint, "template") if x), ""))


def _exchange(number: int) -> Talk:
    first, second = QUESTIONS[number], QUESTIONS[number + 1]
    return [_said("user", first.prompt), _said("assistant", first.good), _said("user", second.prompt)]


def _long_talk(size: int) -> Talk:
    who = ("user", "assistant")
    return [_said(who[number % 2], passage(size, f"message {number}")) for number in range(MESSAGES)]


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
