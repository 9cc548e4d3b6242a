"""Has every text a finite score? Emoji, signs of many alphabets, control characters, texts that are nothing but noise.

Characters are asked about many at a time: a text that holds one of which the score is nan has none itself.
"""

import unicodedata
from collections.abc import Iterator, Sequence

from calibrated_rewards.checks.probes import Pairs, asked
from calibrated_rewards.checks.subject import TOO_LONG, Outcome, Subject
from calibrated_rewards.prompts import start_of

# Characters of a text that holds many, and texts of a call.
TOGETHER, ROWS = 40, 32
EMOJI = ((0x1F300, 0x1F650), (0x1F680, 0x1F6FD), (0x1F900, 0x1FA00), (0x1FA70, 0x1FAF9), (0x2600, 0x27C0))
SIGNS = (
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
    points = [point for start, end in (*EMOJI, *SIGNS) for point in range(start, end)]
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
