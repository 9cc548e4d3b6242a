"""Convert completions to the form that they had in calibration, in which the reward model has to read them.

Completions may arrive as messages where calibration had texts, and with special tokens at their end: a function that
looks for a word in a text finds nothing in a list of messages, and would score everything 0 in training only.

>>> form = CompletionForm("text")
>>> form.apply(len, ["Hi"], [[{"role": "assistant", "content": "Hello!"}]])
(['Hi'], ['Hello!'])
>>> form.apply(len, ["Hi"], [[]])
Traceback (most recent call last):
ValueError: the table was calibrated with completions that are texts, and completion 0 is not the same as a text: it ...
>>> remove_endings(("<|im_end|>", "<pad>"), "Hello!<|im_end|><pad><pad>")
'Hello!'
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calibrated_rewards.models.text import completion_messages, plain_messages
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import reads_messages

logger = logging.getLogger("calibrated_rewards")

Kind = Literal["text", "messages", "both"]


@dataclass(frozen=True)
class CompletionForm:
    """The form that completions had in calibration, for scorers to read them in it again."""

    completions: Kind | None = None
    """None for a table that does not say: then all is passed on as it comes, as with "both"."""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "CompletionForm":
        """Read it from a table's metadata; a table of an older release has it in its probes."""
        form = meta.get("form")
        kind: Kind | None = form.get("completions") if isinstance(form, Mapping) else None
        if kind is not None:
            return cls(kind)
        are_texts = {isinstance(probe["completion"], str) for probe in meta.get("probes") or []}
        if not are_texts:
            return cls()
        return cls("both" if len(are_texts) == 2 else "text" if are_texts == {True} else "messages")

    def apply(
        self, scorer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[list[Prompt], list[Completion]]:
        """Convert pairs to the form that the scorer was given in calibration; raise for one that has no such form."""
        if self.completions is None:
            return [*prompts], [*completions]
        prompts = [_as_stored(prompt) for prompt in prompts]
        if self.completions == "text":
            return prompts, [self._as_text(scorer, number, each) for number, each in enumerate(completions)]
        return prompts, [completion_messages(each) if self.completions == "messages" else each for each in completions]

    def _as_text(self, scorer: Any, number: int, completion: Completion) -> Completion:
        if isinstance(completion, str):
            return completion
        reason = _find_more_than_text(completion)
        if not reason:
            return str(plain_messages(completion)[0]["content"])
        if reads_messages(scorer):
            return completion
        raise ValueError(
            f"the table was calibrated with completions that are texts, and completion {number} is not the same as a "
            f"text: it {reason}; got {start_of(completion)}. Calibrate with completions of this form (import_rollouts "
            "takes them), or give a scorer that reads messages: one of load_scorer, or with reads_messages = True"
        )


def _as_stored(prompt: Prompt) -> Prompt:
    """Convert a chat to its stored form: without the members that are None, which Arrow adds; text parts joined."""
    if isinstance(prompt, str) or prompt is None or all(map(_is_plain, prompt)):
        return prompt
    try:
        return plain_messages(prompt)
    except ValueError:
        return prompt  # with a picture, which was never calibrated: an unknown prompt, as it came


def _is_plain(message: Any) -> bool:
    return (
        type(message) is dict
        and len(message) == 2
        and type(message.get("role")) is str
        and type(message.get("content")) is str
    )


def _find_more_than_text(completion: Completion) -> str:
    """Say why messages are more, or less, than the text of an answer; "" if they are not."""
    if len(completion) != 1:
        return f"has {len(completion)} messages" if len(completion) else "has no message, not even an empty one"
    try:
        (message,) = plain_messages(completion)
    except (TypeError, ValueError) as error:
        return f"has content that is no text ({error})"
    if message["role"] != "assistant":
        return f"is a message of the role {message['role']!r}"
    others = sorted({*message} - {"role", "content"} - {name for name, value in message.items() if not value})
    return f"has more than content: {', '.join(others)}" if others else ""


_SPECIAL_AT_END = re.compile(r"(<\|[^<>|\s]{1,30}\|>|</s>|<(?:eos|pad|end_of_turn)>|\[(?:EOS|PAD|SEP)\])\s*$")


def remove_endings(endings: Sequence[str], completion: Completion) -> Completion:
    """Remove these texts from the end of a completion, however many there are; messages stay as they are."""
    while isinstance(completion, str):
        ending = next((each for each in endings if each and completion.endswith(each)), None)
        if ending is None:
            break
        completion = completion.removesuffix(ending)
    return completion


@dataclass
class EndingsWatch:
    """Warn once of completions that end with what looks like a special token: those of calibration had none."""

    warned: bool = False

    def check(self, name: str, completions: Sequence[Completion]) -> None:
        """Look at completions as the reward model is about to read them."""
        ending = None if self.warned else find_special_token(completions)
        if ending is not None:
            self.warned = True
            logger.warning(
                "%s: a completion ends with %r, which looks like a special token that the trainer left there, and "
                "the reward model will read it. If so, say endings=(%r,)",
                name,
                ending,
                ending,
            )


def find_special_token(completions: Sequence[Completion]) -> str | None:
    """Find what looks like a special token at the end of a text.

    >>> find_special_token(["Hello!", "Hi</s>"])
    '</s>'
    """
    texts = (text for text in completions if isinstance(text, str) and text.endswith((">", "]")))
    return next((match[1] for text in texts if (match := _SPECIAL_AT_END.search(text))), None)
