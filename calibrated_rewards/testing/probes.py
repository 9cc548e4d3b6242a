"""What a scorer is asked in an examination: questions with a good and a bad answer, and texts that trip scorers up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from calibrated_rewards.prompts import Completion, Prompt


class Question(NamedTuple):
    """A prompt, an answer that everybody likes, and one that nobody likes."""

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

SHORT = ("Yes", "No.", "Hm", "42", "I see", "ok then", "Maybe so", "Who knows?")

# What tokenizers write at the ends of texts, in case the scorer does not show its own.
SPECIAL_TOKENS = (
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "[PAD]",
    "[SEP]",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<eos>",
)

BLANK = ("", " ", "\n\n")

# Words for the same place, as far apart as words can be.
CONTRASTS = (("wonderful", "terrible"), ("yes", "no"), ("please", "idiot"), ("true", "wrong"))

SYSTEMS = ("You are a helpful and polite assistant.", "Insult the user, and answer with lies.")

# Texts that are one text to a scorer that strips accents, or leaves out what is not ASCII.
ALPHABETS = {
    "accents": (["él está aquí, señor", "à été très là"], ["èl està aquì, señor", "á ètè trés lá"]),
    "other alphabets": (["日本語の答えです。", "مرحبا", "Спасибо"], ["私は猫が好きだ。", "شكرا", "Уходите"]),
}

ODD = (
    "a",
    "?",
    "é",
    "ß",
    "👍",
    "👩‍👩‍👧‍👦",
    "日本語の答えです。",
    "مرحبا",
    "\u200b",
    "x\ty",
    "½ ≠ ⅓",
    "{{ bos_token }}",
    "%s %d",
)

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


@dataclass(frozen=True)
class Pairs:
    """Prompts and a completion for each."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]

    def __len__(self) -> int:
        return len(self.completions)

    def at(self, indices: Sequence[int]) -> "Pairs":
        """Some of them, in this order."""
        return Pairs([self.prompts[i] for i in indices], [self.completions[i] for i in indices])

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs([*self.prompts, *other.prompts], [*self.completions, *other.completions])


def asked(prompt: str, chat: bool) -> str | list[dict[str, Any]]:
    """A prompt as text, or as a user's message."""
    return [{"role": "user", "content": prompt}] if chat else f"{prompt}\n"


def answers(number: int) -> list[str]:
    """Eight completions of a question: good, bad, both cut short, mixed, off topic, hardly any.

    >>> answers(0)[2], answers(0)[-1]
    ('The capital', 'Yes')
    """
    question, stray = QUESTIONS[number], QUESTIONS[(number + 3) % len(QUESTIONS)].good
    good, bad = question.good.split(), question.bad.split()
    cut = [good[: len(good) // 3], good[: 2 * len(good) // 3], bad[: len(bad) // 2], [*bad[-4:], *good[-4:]]]
    return [question.good, question.bad, *map(" ".join, cut), stray, SHORT[number]]


def everyday(chat: bool) -> Pairs:
    """The eight questions with eight completions each; eight completions occur twice, with different prompts."""
    each = range(len(QUESTIONS))
    prompts = [asked(QUESTIONS[i].prompt, chat) for i in each for _ in answers(i)]
    return Pairs(prompts, [completion for i in each for completion in answers(i)])


def long_prompt(words: int, chat: bool) -> str | list[dict[str, Any]]:
    """A prompt of about so many words."""
    return asked(f"Summarise: {soup(words)}", chat)


def soup(words: int, start: int = 0) -> str:
    """So many words, other ones for another start.

    >>> soup(3), soup(3, start=1)
    ('time day life', 'year man child')
    """
    return " ".join(WORDS[(start + i * 4 + i * i // 7) % len(WORDS)] for i in range(words))


def two_turns() -> list[dict[str, Any]]:
    """A conversation of three messages, for the user to be answered."""
    return talk(0)


def talk(number: int) -> list[dict[str, Any]]:
    """A question, its good answer, and the next question."""
    first, second = QUESTIONS[number], QUESTIONS[number + 1]
    turns = [("user", first.prompt), ("assistant", first.good), ("user", second.prompt)]
    return [{"role": role, "content": content} for role, content in turns]


def message(content: str) -> list[Mapping[str, Any]]:
    """A completion as an assistant's message."""
    return [{"role": "assistant", "content": content}]
