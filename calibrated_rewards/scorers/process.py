"""Process reward models, which score each step of a completion; the score of all steps is made of those."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.label_names import find_side, find_values, is_unnamed
from calibrated_rewards.models.labels import order_names
from calibrated_rewards.models.parts import heads_of
from calibrated_rewards.models.shared_prefix import (
    Head,
    ModuleHead,
    Row,
    cut,
    find_completion_starts,
    group_of,
    reader_of,
)
from calibrated_rewards.models.text import Text, fill_in, find_token
from calibrated_rewards.models.vocabulary_head import check_head, logits_of
from calibrated_rewards.prompts import Completion, Prompt, canonical_chat, start_of
from calibrated_rewards.scorers.protocol import check_finite, check_pairs, name_of, refuse_pickle, score_with


@dataclass(frozen=True, eq=False)
class ProcessReward:
    """A scorer that reads a model at a mark behind each step: p, the probability that the step is good.

    With a token classification head (Qwen2.5-Math-PRM) that is a label's; with a causal LM (Math-Shepherd) that of the
    first of two answers. "min" and "last" are log-odds, log p/(1 - p), and "product" is its logarithm: in the order of
    the probabilities, where these near 0 and 1 would round to ties. "mean" is the mean of p itself.
    """

    model: Any
    tokenizer: Any
    mark: str = "<extra_0>"
    """The token behind each step, at which the model is read."""
    answers: tuple[str, str] | None = None
    """The good and the bad answer of a causal LM, each one token: ("+", "-"); None for a model with a head."""
    label: int | None = None
    """The good label of a head with several; None: the one whose name says so, or the second of two without names. A
    head with one gives the log-odds."""
    reduce: Literal["min", "product", "last", "mean"] = "min"
    separator: str = "\n\n"
    """The text between the steps of a completion."""
    layout: str = "{step}{mark}"
    """The form in which a step and its mark are written: "{step} {mark}\\n" for Math-Shepherd."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle
    _access = cached_property(reader_of)

    def __post_init__(self) -> None:
        if self.reduce not in ("min", "product", "last", "mean"):
            raise ValueError(f"ProcessReward reduces by min, product, last or mean, got reduce={self.reduce!r}")
        if not self.separator:
            raise ValueError("ProcessReward needs a separator of steps, got separator=''")
        if "{step}" not in self.layout or "{mark}" not in self.layout:
            raise ValueError(f"ProcessReward needs {{step}} and {{mark}} in its layout, got layout={self.layout!r}")
        _ = self._mark, self._answers

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each pair with one number for all of its steps."""
        return score_with(
            lambda *pairs: np.array([reduce_steps(odds, self.reduce) for odds in self.steps(*pairs)], np.float32),
            self,
            prompts,
            completions,
        )

    def steps(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Float32[np.ndarray, " s"]]:
        """Return the log-odds of each step of each pair; 1 / (1 + exp(-x)) is the probability that it is good."""
        prompts, completions = check_pairs(prompts, completions)
        with self._access.lock:  # fast tokenizers do not bear two threads
            rows = self._rows(prompts, completions)
        label = self._label if self.answers is None else 0
        logits = self._access.decoder(self._head)(rows, [group_of(prompt) for prompt in prompts])
        check_finite(np.array([float(x.sum()) for x in logits], np.float32), prompts, completions, name_of(self))
        return [compute_log_odds(numbers, label) for numbers in logits]

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        settings = {name: getattr(self, name) for name in ("mark", "reduce", "separator", "layout")}
        answers = self.answers if self.answers is None else list(self.answers)
        text = {**self.text.fingerprint(self.tokenizer), "max_length": self._access.limit}
        model = model_fingerprint(self.model, self.tokenizer)
        return {"kind": "process reward", **model, **settings, "answers": answers, "label": self._label, "text": text}

    def _rows(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Row]:
        """The tokens of each pair, cut to the limit, with the marks of its steps as the places to read."""
        limit, pairs = self._access.limit, [self._write_marks(completion) for completion in completions]
        whole = self.text.encode(self.tokenizer, prompts, [marked for marked, _ in pairs])
        self.text.report([len(row) for row in whole], limit)
        openings = find_completion_starts(self.text, self.tokenizer, prompts, whole)
        rows = []
        for row, start, (completion, steps) in zip(whole, openings, pairs, strict=True):
            # What the template writes behind the completion may hold more of them.
            marks = [i for i in range(start, len(row)) if row[i] == self._mark][:steps]
            if len(marks) < steps:
                raise ValueError(
                    f"the mark {self.mark!r} is a token of its own behind each of {steps} steps, got {len(marks)} of "
                    f"them in {start_of(completion)}: change layout={self.layout!r}, so that it does not merge with "
                    "its neighbours"
                )
            ids, out = cut(row, limit, self.tokenizer)
            # Where the input is cut behind its BOS, that stands at 0, and not what stood at `out`.
            read = [i - out for i in marks if i >= out and ids[i - out] == self._mark]
            if not read:
                raise ValueError(
                    f"a completion has the mark of a step among the last max_length={limit} tokens of its input, got "
                    f"none of {len(marks)} in {start_of(completion)}: allow a longer max_length"
                )
            rows.append(Row(ids, read))
        return rows

    def _write_marks(self, completion: Completion) -> tuple[Completion, int]:
        """Write a mark behind each step of a completion, of messages the assistant's, and count the steps."""
        if isinstance(completion, str):
            parts = self._split(str(self.text.strip_ends(completion)))
            marked: Completion = self._join(parts)
            steps = len(parts)
        else:
            turns = json.loads(canonical_chat(completion)) if len(completion) else []
            split = [self._split(turn.get("content") or "") if turn["role"] == "assistant" else [] for turn in turns]
            marked = [{**turn, "content": self._join(x)} if x else turn for turn, x in zip(turns, split, strict=True)]
            steps = sum(map(len, split))
        if not steps:
            raise ValueError(f"a completion has at least one step that is not blank, got {start_of(completion)}")
        return marked, steps

    def _join(self, parts: list[str]) -> str:
        return "".join(fill_in(self.layout, {"step": part, "mark": self.mark}) for part in parts)

    def _split(self, text: str) -> list[str]:
        """Split a text into steps. A mark in one would be read as the end of a step: a special token is taken out."""
        if self.mark in self.tokenizer.get_added_vocab():
            text = text.replace(self.mark, "")
        steps = [step for step in text.split(self.separator) if step.strip()]
        for step in steps:
            if self.mark in step and self._mark in self.tokenizer(step, add_special_tokens=False)["input_ids"]:
                raise ValueError(f"a step does not hold the mark {self.mark!r} itself, got {start_of(step)}")
        return steps

    @cached_property
    def _label(self) -> int:
        return 1 if self.label is None and self.answers is not None else find_good_label(self.label, self.model.config)

    @cached_property
    def _mark(self) -> int:
        return find_token(self.tokenizer, self.mark, "the mark of a step")

    @cached_property
    def _answers(self) -> list[int] | None:
        return self.answers and [find_token(self.tokenizer, answer, "an answer") for answer in self.answers]

    @property
    def _head(self) -> Head:
        """The head as it is now; it is compared with the model's own forward when first read."""
        return self._compared_head if self._answers is not None else self._compared_head and self._only_head

    @cached_property
    def _compared_head(self) -> Head:
        if self._answers is not None:
            return logits_of(self.model, self._access.lock, self._answers)
        head = self._only_head
        check_head(self.model, head, self._access.lock)
        return head

    @property
    def _only_head(self) -> ModuleHead:
        heads = heads_of(self.model)
        if len(heads) != 1 or self.model.get_output_embeddings() is not None:
            raise TypeError(
                f"a process reward model has one head over labels, {type(self.model).__name__} has {list(heads)}; of a "
                'causal LM say the answers it gives to a step, answers=("+", "-")'
            )
        return ModuleHead(*heads.values())


def find_good_label(label: int | None, config: Any) -> int:
    """Return the label that is given, or the one whose name says good; of two unnamed ones the second."""
    names = order_names(config.id2label)
    if label is not None or len(names) == 1:
        return 1 if label is None else label
    good = [i for i, name in enumerate(names) if find_side(name) == 1]
    if len(good) == 1:
        return good[0]
    values = find_values(names)
    if values is not None:
        return int(np.argmax(values))
    if len(names) == 2 and all(map(is_unnamed, names)):
        return 1
    raise ValueError(
        Message(
            f"a process reward model has one good label, and its names do not say which: {', '.join(names)}. Say its "
            f"number, counted from 0, such as {setting('label', '1')}"
        )
    )


def compute_log_odds(logits: Tensor, label: int) -> Float32[np.ndarray, " s"]:
    """Compute the label's logit less the log-sum-exp of all others; of a single logit, itself."""
    numbers = logits.double().numpy()
    if numbers.shape[1] == 1:
        return numbers[:, 0].astype(np.float32)
    if not 0 <= label < numbers.shape[1]:
        raise IndexError(f"the good label is one that the model has, it has {numbers.shape[1]}, got label={label}")
    others = np.logaddexp.reduce(np.delete(numbers, label, 1), 1)
    odds: Float32[np.ndarray, " s"] = (numbers[:, label] - others).astype(np.float32)
    return odds


def reduce_steps(odds: Float32[np.ndarray, " s"], how: Literal["min", "product", "last", "mean"]) -> float:
    """Reduce log-odds of steps to a number that rises with the minimum, product, last or mean of their probabilities.

    >>> round(reduce_steps(np.zeros(3, np.float32), "product"), 4)
    -2.0794
    """
    if how == "min":
        return float(odds.min())
    if how == "last":
        return float(odds[-1])
    log_p = -np.logaddexp(0, -odds.astype(np.float64))
    return float(log_p.sum() if how == "product" else np.exp(log_p).mean())
