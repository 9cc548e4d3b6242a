"""Hand a scorer prompts and completions in the form that calibration used, whatever form a trainer has them in.

TRL hands over messages where prompts are chats; `calibrate` hands over the texts that a sampler drew. A function that
looks for a word in a text finds nothing in a list of messages, and would score everything 0 in training only.

>>> form = Form("text")
>>> form.read(len, ["Hi"], [[{"role": "assistant", "content": "Hello!"}]])
(['Hi'], ['Hello!'])
>>> form.read(len, ["Hi"], [[]])
Traceback (most recent call last):
ValueError: the table was calibrated with completions that are texts, and completion 0 is not the same as a text: it ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calibrated_rewards.models.text import answer, plain_messages
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.protocol import reads_messages

Kind = Literal["text", "messages", "both"]


@dataclass(frozen=True)
class Form:
    """The form that completions had in calibration."""

    completions: Kind | None = None
    """None for a table that does not say: then all is handed on as it comes, and so it is with "both"."""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "Form":
        """What a table says of it; one of an older release has it in its probes."""
        said = (meta.get("form") or {}).get("completions")
        if said is not None:
            return cls(said)
        probes = meta.get("probes") or []
        kinds: set[Kind] = {"text" if isinstance(probe["completion"], str) else "messages" for probe in probes}
        return cls(kind_of(kinds))

    def read(
        self, scorer: Any, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[list[Prompt], list[Completion]]:
        """Pairs as the scorer was given them in calibration; ValueError for one that has no such form."""
        if self.completions is None:
            return [*prompts], [*completions]
        asked = [_plain(prompt) for prompt in prompts]
        if self.completions == "text":
            return asked, [self._as_text(scorer, number, each) for number, each in enumerate(completions)]
        if self.completions == "messages":
            return asked, [answer(each) for each in completions]
        return asked, [*completions]

    def _as_text(self, scorer: Any, number: int, completion: Completion) -> Completion:
        if isinstance(completion, str):
            return completion
        reason = _more_than_text(completion)
        if not reason:
            return str(plain_messages(completion)[0]["content"])
        if reads_messages(scorer):
            return completion
        raise ValueError(
            f"the table was calibrated with completions that are texts, and completion {number} is not the same as a "
            f"text: it {reason}; got {start_of(completion)}. Calibrate with completions of this form (import_rollouts "
            "takes them), or give a scorer that reads messages: one of load_scorer, or with reads_messages = True"
        )


def kind_of(kinds: set[Kind]) -> Kind | None:
    """One kind for several: that of all, or "both"; None for none."""
    return next(iter(kinds)) if len(kinds) == 1 else "both" if kinds else None


def as_trainers_have_it(prompt: Prompt, completion: Completion) -> Completion:
    """A completion in the form that TRL gives a reward: messages where the prompt is a chat.

    >>> as_trainers_have_it([{"role": "user", "content": "Hi"}], "Hello!")
    [{'role': 'assistant', 'content': 'Hello!'}]
    """
    return completion if isinstance(prompt, str) else answer(completion)


def _plain(prompt: Prompt) -> Prompt:
    """A chat as it is kept: without the members that are None, which Arrow adds, and with its text parts joined."""
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


def _more_than_text(completion: Completion) -> str:
    """Why messages are more, or less, than the text of an answer; "" if they are not."""
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
