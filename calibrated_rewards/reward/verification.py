"""Hand a scorer prompts and completions in the form that calibration used, whatever form a trainer has them in.

TRL hands over messages where prompts are chats; `calibrate` hands over the texts that a sampler drew. A function that
looks for a word in a text finds nothing in a list of messages, and would score everything 0 in training only.

>>> form = Form("text")
>>> form.read(len, ["Hi"], [[{"role": "assistant", "content": "Hello!"}]])
(['Hi'], ['Hello!'])
>>> form.read(len, ["Hi"], [[]])
Traceback (most recent call last):
ValueError: the table was calibrated with completions that are texts, and completion 0 is not the same as a text: it ...

Is this the reward model that the table was made with? The probes in the table tell, before training starts.

>>> from calibrated_rewards.table.reference_table import ReferenceTable
>>> from calibrated_rewards.testing.suites import NumberScorer
>>> probe = {"prompt": "2+2=", "completion": "4", "score": 4.0}
>>> table = ReferenceTable.build([("2+2=", [1.0, 4.0])], meta={"probes": [probe]})
>>> print(verified(NumberScorer(), table))
1 probe, 0 standard deviations apart (at most 0.001)
>>> verified(lambda prompts, completions: [1.0] * len(prompts), table)
Traceback (most recent call last):
ValueError: the scorer is not the one that the table was made with: 1 of 1 probes are apart, by up to 2 standard ...
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.text import completion_messages, plain_messages
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.differences import differences, tolerance_of
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, reads_messages, score
from calibrated_rewards.table.reference_table import ReferenceTable

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
            return asked, [completion_messages(each) for each in completions]
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
    return completion if isinstance(prompt, str) else completion_messages(completion)


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


Raw = Callable[[Sequence[Any], Sequence[Any]], Float32[np.ndarray, " n"]]
# Rows that the standard deviation is taken from.
MEASURED = 256


@dataclass(frozen=True)
class Verification:
    """What the probes said."""

    probes: int
    worst: float
    """How far the farthest score is from that in the table, in standard deviations of a prompt's references."""
    tolerance: float
    differs: tuple[str, ...] = ()
    """Settings in which the fingerprints differ, though the scores do not."""

    def __str__(self) -> str:
        also = f"; the fingerprints differ in {', '.join(self.differs)}" if self.differs else ""
        many = "" if self.probes == 1 else "s"
        return (
            f"{self.probes} probe{many}, {self.worst:.2g} standard deviations apart (at most {self.tolerance:g}){also}"
        )


def verified(
    scorer: Scorer, table: ReferenceTable, tolerance: float | None = None, raw: Raw | None = None
) -> Verification:
    """Score the table's probes again; ValueError if any is farther from what it was than equal scores are.

    `tolerance` is in standard deviations of a prompt's references; None for 0.001, or 0.5 if both the table and the
    scorer are of 16 bits. `raw` is the path that a training run's completions take to the scorer, `reward.raw`: the
    probes take it too, answers to chats as the messages that TRL makes of them.
    """
    if tolerance is not None and not (isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"verify needs a finite tolerance >= 0, got tolerance={tolerance!r}")
    meta = table.meta
    probes = meta.get("probes") or []
    made_with, is_now = meta.get("scorer"), json.loads(json.dumps(fingerprint(scorer)))
    apart_in = differences(made_with, is_now) if made_with else ()
    differs = tuple(f"{place} ({there!r:.60} then, {here!r:.60} now)" for place, there, here in apart_in)
    if not probes:
        raise ValueError(
            "the table has no probes to verify a scorer with; calibrate() and import_rollouts() put some into it, "
            'ReferenceTable.build(meta={"probes": [{"prompt", "completion", "score"}, ...]}) yours'
        )
    near = tolerance if tolerance is not None else tolerance_of(made_with, is_now)
    prompts = [probe["prompt"] for probe in probes]
    completions = [as_trainers_have_it(probe["prompt"], probe["completion"]) for probe in probes]
    scores = (raw or partial(_raw, scorer, Form.of(meta)))(prompts, completions)
    apart = np.abs(scores - np.array([probe["score"] for probe in probes], np.float64)) / _unit(table)
    if (apart > near).any():
        at = int(apart.argmax())
        raise ValueError(
            f"the scorer is not the one that the table was made with: {int((apart > near).sum())} of {len(probes)} "
            f"probes are apart, by up to {apart[at]:.3g} standard deviations (at most {near:g}): "
            f"{scores[at]} in place of {probes[at]['score']} for prompt {start_of(prompts[at])}{_why(differs)}"
        )
    return Verification(len(probes), float(apart.max()), near, differs)


def _raw(scorer: Scorer, form: Form, prompts: Sequence[Any], completions: Sequence[Any]) -> Float32[np.ndarray, " n"]:
    return score(scorer, *form.read(scorer, prompts, completions))


def _unit(table: ReferenceTable) -> float:
    """The standard deviation of a prompt's references, the median over prompts that have one; or 1."""
    rows = np.unique(np.linspace(0, len(table) - 1, MEASURED).astype(np.int64))
    spreads = np.array([np.std(table.scores(row), dtype=np.float64) for row in rows.tolist()])
    # The median, which no prompt with wild scores can move.
    return float(np.median(spreads[spreads > 0])) if (spreads > 0).any() else 1.0


def _why(differs: tuple[str, ...]) -> str:
    if not differs:
        return "; their fingerprints are alike: look for other weights in the same place, other hardware or versions"
    return f"; their fingerprints differ in {', '.join(differs)}"
