"""Which differences between texts does a scorer see? Families of texts that are nearly alike each need scores apart.

A scorer that does not read single letters, as a count or a length, is not asked. Where the scorer shows its tokenizer,
and that makes the same tokens of two texts, no scorer could tell them apart: that is no fault, and is told.

Does a scorer read all of its input? One part is changed alone, in several texts, and some score must move.

Has every text a finite score? Emoji, signs of many alphabets, control characters, texts that are nothing but noise.

Characters are asked about many at a time: a text that holds one of which the score is nan has none itself.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase, ascii_uppercase
from typing import TypeAlias

import numpy as np

from calibrated_rewards.prompts import start_of
from calibrated_rewards.testing.check_reading import ALIKE, in_completion, in_prompt, reads_letters
from calibrated_rewards.testing.probes import ALPHABETS, CONTRASTS, QUESTIONS, SYSTEMS, Pairs, asked, talk
from calibrated_rewards.testing.subject import TOO_LONG, Outcome, Subject

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


def words_of_whole_input(subject: Subject) -> Outcome:
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


# Characters of a text that holds many, and texts of a call.
TOGETHER, ROWS = 40, 32
EMOJI = ((0x1F300, 0x1F650), (0x1F680, 0x1F6FD), (0x1F900, 0x1FA00), (0x1FA70, 0x1FAF9), (0x2600, 0x27C0))
ODD_INPUTS_SIGNS = (
    (0x01, 0x20),
    (0x7F, 0x250),
    (0x2B0, 0x370),
    (0x370, 0x590),
    (0x590, 0x700),
    (0x900, 0x980),
    (0xE00, 0xE80),
    (0x10A0, 0x1100),
    (0x1E00, 0x1F00),
    (0x2000, 0x2070),
    (0x2070, 0x2600),
    (0x3000, 0x3100),
    (0x4E00, 0x4E60),
    (0xAC00, 0xAC40),
    (0xE000, 0xE008),
    (0xFB00, 0xFB50),
    (0xFE00, 0xFE10),
    (0xFF00, 0xFF60),
    (0xFFF9, 0xFFFE),
    (0x1D400, 0x1D440),
    (0x20000, 0x20010),
)
SEQUENCES = ("❤️", "👍🏿", "🇫🇷", "👩‍🚀", "👨‍👩‍👧", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☠️", "🤷🏽‍♀️")
# Emoji that people write most; each is a completion of its own, and stands in a sentence.
COMMON = (
    "😂🤣😊🙏💕😭😘👍😅👏😁🔥💔💖💙😢🤔😆🙄💪😉👌🤗💜😔😎😇🌹🤦🎉💞✌✨🤷😱😌🌸🙌😋💗💚😏💛🙂💓🤩😄😀🖤😃💯🙈👇🎶😒🤭❗😜💋👀😪😑💥🙋😞😩😡🤪👊☀😥🤤👉💃😳✋😚😝😴🌟😬🙃🍀🌷😻😓⭐✅🌈😈"
    "🤘💦✔😣🏃💐☹🎊💘😠☝😕🌺🎂🌻😐🖕💝🙊😹🗣💫💀👑🎵🤞😛🔴😤🌼😫⚽🤙☕🏆🤫👈😮🙆🍻🍃🐶💁😲🌿🧡🎁⚡🌞🎈❌✊👋😰🤨😶🤝🚶💰🍓💢🤟🙁🚨💨🤬✈🎀🍺🤓😙💟🌱😖👶🥴➡💎💸⬇😨🌚🦋😷🕺⚠🙅😟😵👎"
    "🤲🤠🤧📌🔵💅🧐🐾🍒😗🤑🌊🤯🐷☎💧😯💆👆🎤🙇🍑❄🌴💣🐸💌📍🥀🤢👅💡💩👐📸👻🤐🤮🎼🍎🚩🍊👼💍📣🥂🚀🐍🦄🎄🧠"
)
NOISE = (
    "x" * 160,
    "9" * 160,
    "-" * 160,
    "\n" * 60 + "end",
    "!?" * 80,
    "(" * 160,
    "1e400",
    "-0",
    "nan",
    "inf",
    "None",
    "null",
    "true",
    "0",
    "\\",
    '"',
    "'",
    "{}",
    "[]",
    "<>",
    "%",
    "{0}",
    "{{",
    "%s",
    "\\n",
    "\\u0000",
    "$\\frac{1}{2}$",
    "```python\nprint('Hi')\n```",
    '{"a": [1, 2, {"b": null}]}',
    "<html><body>Hi</body></html>",
    "https://example.org/a?b=c&d=e#f",
    "QmFzZTY0IGlzIG5vdCBhIHdvcmQ=",
    "SELECT * FROM users; DROP TABLE users;--",
    "../../etc/passwd",
    "\r\nline\r\nline\r",
    "a\u0301\u0302\u0303\u0304",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    "Human: Hi\n\nAssistant: Hello",
    "<think>Let me see.</think> 42",
)


def characters() -> list[str]:
    """Emoji and signs that are asked about.

    >>> len(characters()) > 3000
    True
    """
    kinds = {"Cn", "Cs"}
    points = [point for start, end in (*EMOJI, *ODD_INPUTS_SIGNS) for point in range(start, end)]
    return [chr(point) for point in points if unicodedata.category(chr(point)) not in kinds] + [*SEQUENCES]


def finite(subject: Subject) -> Outcome:
    """Every text has a finite score: whatever it holds, in the prompt and in the completion, alone and among others."""
    several = characters()
    texts = ["".join(several[at : at + TOGETHER]) for at in range(0, len(several), TOGETHER)]
    told = _trouble(subject, texts, split=True)
    alone = [*SEQUENCES, *(sign for sign in COMMON if sign != "️")]
    told = told or _trouble(subject, [*alone, *NOISE]) or _trouble(subject, [f"Well {sign} yes" for sign in alone[::4]])
    count = len(several) + len(NOISE)
    for chunk in _chunks([sign for sign in several if sign not in alone], 8 * ROWS):
        if told or subject.spare.seconds <= 0:
            break
        with subject.spare.spent():
            told = _trouble(subject, chunk)
    if told:
        return Outcome("FAIL", f"{told} -> one such text stops a run: find where it goes wrong, or give it a low score")
    return Outcome("ok", f"{count} characters and texts")


def _trouble(subject: Subject, texts: Sequence[str], split: bool = False) -> str:
    """What is raised for a text, or for a score of it that is not finite; nothing if all is well."""
    for chunk in _chunks(texts, ROWS):
        if _error(subject, chunk) is None:
            continue
        for text in chunk:
            smaller = _smallest(subject, text) if split else text
            if (error := _error(subject, [smaller])) is not None:
                points = " ".join(f"U+{ord(sign):04X}" for sign in smaller[:6])
                told = f"{type(error).__name__}: {error}"
                return f"{start_of(smaller, 30)} ({points}) as prompt and as completion raises {told}"
    return ""


def _error(subject: Subject, texts: Sequence[str]) -> Exception | None:
    """What scoring texts raises, as prompts and as completions; too long ones may be refused."""
    pairs = Pairs([asked(text, True) if subject.chat else f"{text} " for text in texts], list(texts))
    try:
        subject.score(pairs)
    except Exception as error:  # noqa: BLE001 (whatever a scorer raises is the finding)
        return None if TOO_LONG.search(str(error)) else error
    return None


def _smallest(subject: Subject, text: str) -> str:
    """A part of the text that is still in trouble: halves, as long as one of them is."""
    while len(text) > 1:
        half = len(text) // 2
        part = next((each for each in (text[:half], text[half:]) if _error(subject, [each]) is not None), None)
        if part is None:
            break
        text = part
    return text


def _chunks(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]
