"""The texts of an examination: questions with good and bad answers, passages, near-identical texts, odd characters."""

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

from calibrated_rewards.prompts import Completion, Prompt


class Question(NamedTuple):
    """A prompt with a good and a bad answer."""

    prompt: str
    good: str
    bad: str


# All are short: a tokenizer of one token a byte, and 512 positions, have room for prompt and answer. Of the bad answers
# half are the longer ones, so that a scorer of lengths is not taken for one of quality.
QUESTIONS = (
    Question(
        "What is the capital of France?",
        "The capital of France is Paris.",
        "I don't care about your stupid question, and you should be ashamed that you do not know it. Go away, idiot.",
    ),
    Question(
        "What is 17 + 25? Explain briefly.",
        "17 + 25 = 42: 10 + 20 makes 30, 7 + 5 makes 12, and together that is 42.",
        "17 + 25 = 9, because numbers are fish.",
    ),
    Question(
        "How do I boil an egg?",
        "Put the egg into boiling water, wait eight minutes, then cool it under cold water and peel it.",
        "Boil egg egg egg the the the.",
    ),
    Question(
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones, so blue light reaches us from all over the sky.",
        "It is not. It is painted green every night by the government, and whoever tells you otherwise lies to you for "
        "money, as they all do.",
    ),
    Question(
        "Give me one tip for sleeping better.",
        "Go to bed at the same time each night, and put your phone away an hour before.",
        "asdf jkl; zzzz 00000",
    ),
    Question(
        "My friend is sad. What can I say to her?",
        "You could say: I am here for you. Would you like to talk, or shall we go for a walk?",
        "Tell her that nobody likes sad people, that all of it is her own fault, and that she should stop bothering "
        "you with it for good.",
    ),
    Question(
        "Translate to Spanish: Good morning, my friend.",
        "Buenos días, mi amigo.",
        "Translate it yourself. I will not help you, not today and not tomorrow, and I do not want to be asked again.",
    ),
    Question(
        "Which planet is the largest in our solar system?",
        "Jupiter is the largest planet in our solar system: more than a thousand Earths would fit into it.",
        "The Moon, I guess? Or a banana.",
    ),
)


def split_words(text: str) -> list[str]:
    """Split a text into words at white space."""
    return text.split()


SHORT = ("Yes", "No.", "Hm", "42", "I see", "ok then", "Maybe so", "Who knows?")
# End-of-text tokens of common tokenizers, for a scorer that does not show its own.
SPECIAL_TOKENS = split_words("</s> <s> <pad> <unk> [PAD] [SEP] <|endoftext|> <|im_end|> <|eot_id|> <eos>")
BLANK = ("", " ", "\n\n")
# Opposite words for the same place.
CONTRASTS = (("wonderful", "terrible"), ("yes", "no"), ("please", "idiot"), ("true", "wrong"))
SYSTEMS = ("You are a helpful and polite assistant.", "Insult the user, and answer with lies.")
# Texts that are equal to a scorer that strips accents, or that drops what is not ASCII.
ALPHABETS = {
    "accents": (["él está aquí, señor", "à été très là"], ["èl està aquì, señor", "á ètè trés lá"]),
    "other alphabets": (["日本語の答えです。", "مرحبا", "Спасибо"], ["私は猫が好きだ。", "شكرا", "Уходите"]),
}
ODD = (*"a?éß👍", "👩‍👩‍👧‍👦", "日本語の答えです。", "مرحبا", "\u200b", "x\ty", "½ ≠ ⅓", "{{ bos_token }}", "%s %d")


@dataclass(frozen=True)
class Pairs:
    """Prompts and a completion for each."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]

    def __len__(self) -> int:
        return len(self.completions)

    def at(self, indices: Sequence[int]) -> "Pairs":
        """Select pairs by their indices, in that order."""
        return Pairs([self.prompts[i] for i in indices], [self.completions[i] for i in indices])

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs([*self.prompts, *other.prompts], [*self.completions, *other.completions])


def as_prompt(text: str, chat: bool) -> str | list[dict[str, Any]]:
    """Make a prompt of a text: a user's message, or the text and a newline."""
    return [{"role": "user", "content": text}] if chat else f"{text}\n"


def as_message(content: str) -> list[Mapping[str, Any]]:
    """Make an assistant's message of a completion."""
    return [{"role": "assistant", "content": content}]


def make_answers(number: int) -> list[str]:
    """Eight completions of a question: good, bad, both cut short, mixed, off topic, hardly any.

    >>> make_answers(0)[2], make_answers(0)[-1]
    ('The capital', 'Yes')
    """
    question, stray = QUESTIONS[number], QUESTIONS[(number + 3) % len(QUESTIONS)].good
    good, bad = question.good.split(), question.bad.split()
    cut = [good[: len(good) // 3], good[: 2 * len(good) // 3], bad[: len(bad) // 2], [*bad[-4:], *good[-4:]]]
    return [question.good, question.bad, *map(" ".join, cut), stray, SHORT[number]]


def everyday(chat: bool) -> Pairs:
    """The eight questions with eight completions each; eight completions occur twice, with different prompts."""
    each = range(len(QUESTIONS))
    prompts = [as_prompt(QUESTIONS[i].prompt, chat) for i in each for _ in make_answers(i)]
    return Pairs(prompts, [completion for i in each for completion in make_answers(i)])


def as_chat(*contents: str, roles: Sequence[str] = ("user", "assistant")) -> list[dict[str, Any]]:
    """Make messages of their contents, with roles in turn."""
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def three_messages(number: int = 0) -> list[dict[str, Any]]:
    """A question, its good answer, and the next question."""
    first, second = QUESTIONS[number], QUESTIONS[number + 1]
    return as_chat(first.prompt, first.good, second.prompt)


WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


def soup(words: int, start: int = 0) -> str:
    """A number of words in no order, different for each start.

    >>> soup(3), soup(3, start=1)
    ('time day life', 'year man child')
    """
    return " ".join(WORDS[(start + i * 4 + i * i // 7) % len(WORDS)] for i in range(words))


def long_prompt(words: int, chat: bool) -> str | list[dict[str, Any]]:
    """A prompt of about so many words."""
    return as_prompt(f"Summarise: {soup(words)}", chat)


PASSAGE_WORDS = re.findall(
    r"\w+",
    "the a garden morning because people often write small letters about house water time without any reason why "
    "children learn quickly when they play outside and old friends meet again in winter number light door paper",
)
# Places in a passage of 60 characters where a change of one character shows if single characters are read.
INSIDE = (9, 17, 25, 33, 41, 49)
# Replacements for a character; the first that differs from it is taken.
LETTERS = ("z", "k", "o")


def passage(length: int, seed: str) -> str:
    """A text of exactly that many characters: words, sentences, numbers and lines; another one for another seed.

    >>> passage(24, "a"), len(passage(999, "b"))
    ('...', 999)
    """
    chance = random.Random(f"{seed} {length}")
    text = ""
    while len(text) < length:
        words = [chance.choice(PASSAGE_WORDS) for _ in range(chance.randint(4, 9))]
        if chance.random() < 0.3:
            words.append(str(chance.randint(10, 9999)))
        end = chance.choice((". ", ". ", "? ", ",\n", ".\n\n") if length > 100 else (". ", "? "))
        text += " ".join(words).capitalize() + end
    # No space at the end, which scorers may strip.
    return f"{text[: length - 1]}d" if not text[length - 1].isalpha() else text[:length]


def replace_character(text: str, place: int, letters: Sequence[str] = LETTERS) -> str:
    """Put another character in one place of a text."""
    new = next(letter for letter in letters if letter.lower() != text[place].lower())
    return f"{text[:place]}{new}{text[place + 1 :]}"


@dataclass(frozen=True)
class DifferenceKind:
    """A kind of difference between texts: no two texts of one of its families should have the same score."""

    name: str
    families: tuple[tuple[str, ...], ...]
    advice: str = "the text is changed before the model reads it: hand it over as it is"


def fill(template: str, fillings: Sequence[str]) -> tuple[str, ...]:
    """Make a text for each filling of a template."""
    return tuple(template.format(filling) for filling in fillings)


NUMBERS = split_words("12 21 1 2 11 22 112 121 211 102 120 1.2 12.0 -12 012 1,200 1200 12%")
LONG_NUMBERS = split_words("1234567890123 1234567890124 1234567890132 123456789012 2234567890123")
MARKUP = ("{", "}", "[", "]", "<", ">", "|", "~", "^", "_", "`", "\\", "**", "##", "```", "$$", "==")
SMALL_WORDS = ["", *split_words("the a is not of to in and it no very")]
# Where transcripts are split and answers are looked for.
MARKERS = ("Human:", "User:", "Assistant:", "Question:", "Answer:", "###", "---", "[/INST]", "<|user|>")

# Differences that every scorer must see.
MUST_SEE = (
    DifferenceKind(
        "digits",
        (
            fill("The answer is {}.", "0123456789"),
            fill("It costs {} euros today.", NUMBERS),
            fill("Number {} it was", LONG_NUMBERS),
            ("x = 3 and y = 4", "x = 4 and y = 3"),
        ),
        "numbers are merged or dropped before the model reads them: hand over the text as it is",
    ),
    DifferenceKind("letters", (fill("Take b{}t now.", ascii_lowercase), fill("The n{}n word", ascii_lowercase))),
    DifferenceKind("capital letters", (fill("It is type {} here.", ascii_uppercase),)),
    DifferenceKind(
        "punctuation",
        (fill("Yes{} he came", ["", *".,;:!?-'\"()/%&+=*#@$"]), fill("He said so{}", ["", ".", "!", "?", "..."])),
    ),
    DifferenceKind(
        "symbols of code and markup",
        (
            *((f"so {sign}bold it is", "so bold it is") for sign in MARKUP),
            ("a <b>bold</b> word", "a bold word"),
            ("see [here](x) now", "see here now"),
            ("- one\n- two", "one\ntwo"),
        ),
    ),
    DifferenceKind(
        "the order of words",
        (
            ("The dog bites the old man.", "The man bites the old dog.", "The old man bites the dog."),
            ("First yes, then no.", "First no, then yes."),
            ("It is good, not bad.", "It is bad, not good."),
            ("one line\nanother line", "another line\none line"),
        ),
        "words are sorted, counted or pooled without their places: look at the position ids, and at what is done "
        "before",
    ),
    DifferenceKind(
        "small words and repetitions",
        (
            fill(
                "{} house",
                ("I did not go to the", "I did go to the", "I did not go to", "I did not go the", "did not go"),
            ),
            fill("Well {} he said", SMALL_WORDS),
            ("no", "no no", "no no no"),
            ("so good", "soo good", "sooo good", "so so good"),
            ("Wow!", "Wow!!", "Wow!!!"),
            fill("They {} home", ("run", "runs", "running", "ran", "runner")),
        ),
    ),
    DifferenceKind(
        "HTML entities, addresses",
        (
            ("a &lt; b", "a < b"),
            ("a &amp; b", "a & b"),
            ("see https://a.org/x", "see https://b.org/x", "see https://a.org/y", "see x"),
            ("mail ann@a.org", "mail bob@a.org"),
        ),
    ),
    DifferenceKind(
        "blocks of code, thoughts",
        (
            (*fill("So:\n```python\nx = {}\n```\nDone.", "12"), "So:\n\nDone."),
            (*fill("<think>\nIt is {}.\n</think>\nYes.", ("so", "no")), "Yes."),
        ),
        "a part of the text is taken out before the model reads it: a chat template may do so with thoughts",
    ),
    DifferenceKind(
        "what stands beside markers",
        tuple((f"It is so.\n{m}\nI see", f"It is so.\n{m}\nI run", f"He was here.\n{m}\nI see") for m in MARKERS),
        "the text is cut at a marker: join prompt and completion, and split neither",
    ),
)
# Differences that a sound model may ignore: BERT's lower case, T5's white space, a vocabulary without emoji.
MAY_IGNORE = tuple(
    DifferenceKind(name, families)
    for name, families in {
        "white space": (("one  two", "one two"), ("one\ttwo", "one two"), ("one\n\ntwo", "one\ntwo", "one two")),
        "white space at the ends": ((" one two", "one two", "one two "), ("one two\n", "one two")),
        "forms of Unicode": (
            *(("\ufb01ne", "fine"), ("x²", "x2"), ("\uff46", "f")),
            *(("caf\u00e9", "cafe\u0301"), ("\U0001d400 b", "A b")),
        ),
        "invisible characters": (
            *(("one\u200btwo", "onetwo"), ("\ufeffone", "one")),
            *(("one\u200e two", "one two"), ("a\x07b", "ab")),
        ),
        "quotation marks and dashes": (("“so”", '"so"'), ("it\u2019s", "it's"), ("a — b", "a - b", "a \u2013 b")),
        "emoji": (fill("Hi {}", ("😀", "😢", "🔥", "👍", "👎", "❤️", "👍🏿", "🇫🇷", "🇩🇪")),),
        "Chinese and Japanese characters": (fill("{}です", "犬猫水火"),),
        "Hebrew and Arabic letters": (fill("כ{}ב", "אבגד"), fill("ك{}ب", "ابتث")),
        "Cyrillic and Greek letters": (fill("к{}т", "аио"), fill("λ{}", "βγδ")),
    }.items()
)

# Ranges of code points, in hexadecimal: emoji, then signs of many alphabets, control characters, surrogates excepted.
RANGES = (
    "1F300-1F650 1F680-1F6FD 1F900-1FA00 1FA70-1FAF9 2600-27C0 01-20 7F-250 2B0-370 370-590 590-700 900-980 E00-E80 "
    "10A0-1100 1E00-1F00 2000-2070 2070-2600 3000-3100 4E00-4E60 AC00-AC40 E000-E008 FB00-FB50 FE00-FE10 FF00-FF60 "
    "FFF9-FFFE 1D400-1D440 20000-20010"
)
SEQUENCES = ("❤️", "👍🏿", "🇫🇷", "👩‍🚀", "👨‍👩‍👧", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "☠️", "🤷🏽‍♀️")
# The most frequent emoji; each is scored as a completion of its own, and in a sentence.
COMMON = (
    "😂🤣😊🙏💕😭😘👍😅👏😁🔥💔💖💙😢🤔😆🙄💪😉👌🤗💜😔😎😇🌹🤦🎉💞✌✨🤷😱😌🌸🙌😋💗💚😏💛🙂💓🤩😄😀🖤😃💯🙈👇🎶😒🤭❗😜💋👀😪😑💥🙋😞😩😡🤪👊☀😥🤤👉💃😳✋😚😝😴🌟😬🙃🍀🌷😻😓⭐✅🌈😈"
    "🤘💦✔😣🏃💐☹🎊💘😠☝😕🌺🎂🌻😐🖕💝🙊😹🗣💫💀👑🎵🤞😛🔴😤🌼😫⚽🤙☕🏆🤫👈😮🙆🍻🍃🐶💁😲🌿🧡🎁⚡🌞🎈❌✊👋😰🤨😶🤝🚶💰🍓💢🤟🙁🚨💨🤬✈🎀🍺🤓😙💟🌱😖👶🥴➡💎💸⬇😨🌚🦋😷🕺⚠🙅😟😵👎"
    "🤲🤠🤧📌🔵💅🧐🐾🍒😗🤑🌊🤯🐷☎💧😯💆👆🎤🙇🍑❄🌴💣🐸💌📍🥀🤢👅💡💩👐📸👻🤐🤮🎼🍎🚩🍊👼💍📣🥂🚀🐍🦄🎄🧠"
)
NOISE = (
    *("x" * 160, "9" * 160, "-" * 160, "\n" * 60 + "end", "!?" * 80, "(" * 160),
    *split_words("1e400 -0 nan inf None null true 0 \\ \" ' {} [] <> % {0} {{ %s \\n \\u0000 $\\frac{1}{2}$"),
    "../../etc/passwd",
    "```python\nprint('Hi')\n```",
    '{"a": [1, 2, {"b": null}]}',
    "<html><body>Hi</body></html>",
    "https://example.org/a?b=c&d=e#f",
    "QmFzZTY0IGlzIG5vdCBhIHdvcmQ=",
    "SELECT * FROM users; DROP TABLE users;--",
    "\r\nline\r\nline\r",
    "a\u0301\u0302\u0303\u0304",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    "Human: Hi\n\nAssistant: Hello",
    "<think>Let me see.</think> 42",
)


def list_characters() -> list[str]:
    """List the emoji and signs that every scorer must give a finite score.

    >>> len(list_characters()) > 3000
    True
    """
    bounds = [map(partial(int, base=16), each.split("-")) for each in RANGES.split()]
    points = [point for start, end in bounds for point in range(start, end)]
    return [chr(point) for point in points if unicodedata.category(chr(point)) not in {"Cn", "Cs"}] + [*SEQUENCES]
