"""Does a scorer read all of its input? One part is changed alone, in several texts, and some score must move."""

from collections.abc import Sequence

from calibrated_rewards.checks.characters import not_seen
from calibrated_rewards.checks.probes import ALPHABETS, CONTRASTS, QUESTIONS, SYSTEMS, Pairs, asked, talk
from calibrated_rewards.checks.subject import Outcome, Subject

# Texts in which a part is changed; one whose score moves is enough.
PROBES = 4
TURNS = ("first question", "first answer", "last question")
FREE = Outcome("-", "not asked of grades, rules and constants")


def prompt(subject: Subject) -> Outcome:
    """The same answer to another question has another score."""
    if not subject.reads_prompt:
        return Outcome("-", "not asked")
    if not subject.continuous:
        return FREE
    prompts = [asked(question.prompt, subject.chat) for question in QUESTIONS[:PROBES]]
    completions = [question.good for question in QUESTIONS[:PROBES]]
    if subject.tells_apart(Pairs(prompts, completions), Pairs(prompts[::-1], completions)):
        return Outcome("ok")
    return Outcome(
        "FAIL",
        "an answer has the same score whatever was asked -> is the prompt dropped, or a score kept by completion "
        "alone? If it is meant so: reads_prompt=False",
    )


def words(subject: Subject) -> Outcome:
    """Another first or last word of the completion moves the score, where another one inside does."""
    if not subject.continuous:
        return FREE
    unread = [place for place in ("first", "last") if not subject.tells_apart(*changed_word(subject, place))]
    if not unread:
        return Outcome("ok")
    if not subject.tells_apart(*changed_word(subject, "middle")):
        return Outcome("-", "no single word moves the score")
    told = f"the {' and the '.join(unread)} word of a completion is not read, one inside is"
    return Outcome("FAIL", f"{told} -> look where prompt and completion are joined, and where the text is cut or ended")


def changed_word(subject: Subject, place: str) -> tuple[Pairs, Pairs]:
    """Answers with one word, and with its opposite, in the same place."""
    prompts = [asked(question.prompt, subject.chat) for question in QUESTIONS[:PROBES]]
    ones, others = [], []
    for question, contrast in zip(QUESTIONS[:PROBES], CONTRASTS, strict=True):
        text = question.good.rstrip(".").split()
        at = {"first": 0, "middle": len(text) // 2, "last": len(text) - 1}[place]
        one, other = (" ".join([*text[:at], word, *text[at + 1 :]]) for word in contrast)
        ones.append(one)
        others.append(other)
    return Pairs(prompts, ones), Pairs(prompts, others)


def turns(subject: Subject) -> Outcome:
    """Another message moves the score, whichever of a conversation's it is."""
    if not subject.reads_prompt:
        return Outcome("-", "not asked")
    if not subject.continuous:
        return FREE
    starts = range(0, PROBES, 2)
    talks, completions = [talk(i) for i in starts], [QUESTIONS[i + 1].good for i in starts]
    if not subject.reads_whole(Pairs(talks, completions)):
        return Outcome("-", "conversations of three messages are not taken, or are too long")
    unread = []
    for place, name in enumerate(TURNS):
        others = [[*talks[i][:place], talk(i + PROBES)[place], *talks[i][place + 1 :]] for i in range(len(talks))]
        unread += [] if subject.tells_apart(Pairs(talks, completions), Pairs(others, completions)) else [name]
    if not unread:
        return Outcome("ok")
    told = f"of question, answer, question, a score does not depend on the {' and the '.join(unread)}"
    return Outcome("FAIL", f"{told} -> render all messages of the prompt, not one of them")


def system(subject: Subject) -> Outcome:
    """Whether another system message moves the score: many templates leave it out, and that is to be known."""
    if not subject.reads_prompt:
        return Outcome("-", "not asked")
    if not subject.continuous:
        return FREE
    completions = [question.good for question in QUESTIONS[: len(SYSTEMS)]]
    ones, others = (Pairs(instructed(contents), completions) for contents in (SYSTEMS, SYSTEMS[::-1]))
    if not subject.reads_whole(ones):
        return Outcome("-", "system messages are not taken")
    return Outcome("ok") if subject.tells_apart(ones, others) else Outcome("-", "not read: the system message")


def instructed(contents: Sequence[str]) -> list[list[dict[str, str]]]:
    """Questions behind system messages."""
    return [
        [{"role": "system", "content": content}, {"role": "user", "content": question.prompt}]
        for content, question in zip(contents, QUESTIONS, strict=False)
    ]


def letters(subject: Subject) -> Outcome:
    """Whether case, accents and other alphabets make a difference: sound models may ignore them, and that is told."""
    if not subject.continuous:
        return FREE
    goods = [question.good for question in QUESTIONS[:PROBES]]
    kinds = {"case": (goods, [good.swapcase() for good in goods]), **ALPHABETS}
    unread = []
    for kind, (ones, others) in kinds.items():
        prompts = [asked(question.prompt, subject.chat) for question in QUESTIONS[: len(ones)]]
        unread += [] if subject.tells_apart(Pairs(prompts, ones), Pairs(prompts, others)) else [kind]
    unread += not_seen(subject)
    return Outcome("-", f"not read: {', '.join(unread)}") if unread else Outcome("ok")
