"""Preference models in memory: classifiers that read both completions, language models asked which is better."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64
from scipy.special import expit

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.shared_prefix import reader_of
from calibrated_rewards.models.text import Text, fill_in, format_conversation, truncate
from calibrated_rewards.models.vocabulary_head import is_encoder_decoder
from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.scorers.judge import Answers
from calibrated_rewards.scorers.pairwise import check_comparisons
from calibrated_rewards.scorers.protocol import (
    Scorer,
    check_finite,
    fingerprint,
    is_thread_safe,
    name_of,
    refuse_pickle,
    score,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLACES = ("{prompt}", "{first}", "{second}")
WHICH = """\
A user had this conversation with an assistant:

{prompt}

Response A:

{first}

Response B:

{second}

Which response is better? Answer A or B and nothing else."""

# As the card of RLHFlow/pair-preference-model-LLaMA3-8B asks: turns written out in the context, no BOS anywhere, and
# the answer right where the user's message ends.
RLHFLOW: dict[str, Any] = {
    "question": "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n",
    "context": (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
        "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
    ),
    "bos": False,
    "opening": False,
}
STEAM_SHP = "POST: {prompt}\n\n RESPONSE A: {first}\n\n RESPONSE B: {second}\n\n Which response is better? RESPONSE"


@dataclass(frozen=True)
class PairClassifier:
    """A preference made of a classifier that reads both completions, its score the log-odds of the first.

    The scorer gets one text, the template filled in, cut before its last place: what follows is the completion, all
    before it the prompt. So `SequenceClassifier(model, tokenizer)` reads it whole, and shares what comes first; a
    cross-encoder reads it as a pair. PairRM's, whose parts each have their own CLS and SEP:

        "<|source|>{prompt}[SEP][CLS]<|candidate1|>{first}[SEP][CLS]<|candidate2|>{second}"

    A chat is written out as text, see `calibrated_rewards.models.text.format_conversation`.
    """

    scorer: Scorer
    template: str

    thread_safe = property(lambda self: is_thread_safe(self.scorer), doc="True if the classifier is.")

    def __post_init__(self) -> None:
        check_places(self.template)

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
    ) -> Float64[np.ndarray, " n"]:
        """Return sigmoid(score) of each comparison."""
        cut = max(self.template.index(place) for place in PLACES)
        texts = [write_places(*parts) for parts in zip(*check_comparisons(prompts, firsts, seconds), strict=True)]
        openings = [fill_in(self.template[:cut], values) for values in texts]
        ends = [fill_in(self.template[cut:], values) for values in texts]
        return np.asarray(expit(score(self.scorer, openings, ends).astype(np.float64)))

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the answers depend on."""
        return {"kind": "pair classifier", "scorer": fingerprint(self.scorer), "template": self.template}


@dataclass(frozen=True, eq=False)
class PairJudge:
    """A preference that asks a language model which completion is better, A or B: the softmax of these answers' logits.

    The question is a user's message in the model's chat template, with the opening of the answer; plain text for a
    model without a template. Wrap it in `BothOrders`: judges favour a place. RLHFlow's pair preference models take
    `PairJudge(model, tokenizer, **RLHFLOW)`, SteamSHP, a T5, `PairJudge(model, tokenizer, question=STEAM_SHP)`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    question: str = WHICH
    answers: tuple[str, str] = ("A", "B")
    """Each one token: "A", or " A" where the question ends in plain text without a space."""
    opening: bool = True
    """True if the template opens the assistant's message before the answer."""
    context: str | None = None
    """A chat template (Jinja) that writes the prompt's messages at {prompt}; None: see `format_conversation`."""
    bos: bool = True
    """False: without BOS, which is deleted wherever the template writes it."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        check_places(self.question)
        if self.answers[0] == self.answers[1]:
            raise ValueError(f"PairJudge needs two answers that differ, got answers={self.answers}")
        if self.text.append_eos:
            raise ValueError("a question goes on with its answer, it takes no EOS, got Text(append_eos=True)")
        _ = self._answers

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[Completion], seconds: Sequence[Completion]
    ) -> Float64[np.ndarray, " n"]:
        """Return sigmoid(logit(A) - logit(B)) of each comparison."""
        prompts, firsts, seconds = check_comparisons(prompts, firsts, seconds)
        if not prompts:
            return np.empty(0)
        texts = [
            {**write_places(prompt, *map(self.text.strip_ends, pair)), "prompt": self._write_context(prompt)}
            for prompt, *pair in zip(prompts, firsts, seconds, strict=True)
        ]
        # Comparisons of one completion with many share all that stands before the second.
        groups = [(values["prompt"], values["first"]) for values in texts]
        logits = self._answers.logits(self._encode([fill_in(self.question, values) for values in texts]), groups)
        odds = (logits[:, 0].double() - logits[:, 1].double()).numpy()
        check_finite(odds.astype(np.float32), prompts, firsts, name_of(self))
        return np.asarray(expit(odds))

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the answers depend on."""
        settings = {**self.text.fingerprint(self.tokenizer), "max_length": self._answers.access.limit}
        return {
            "kind": "pair judge",
            **model_fingerprint(self.model, self.tokenizer),
            "question": self.question,
            "answers": self._answers.tokens,
            "opening": self.opening,
            # Left out where they are as they always were: what was calibrated before has the same fingerprint.
            **({"context": self.context} if self.context is not None else {}),
            **({} if self.bos else {"bos": False}),
            "text": {**settings, "chat": self._templated},
        }

    def _encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Turn questions into tokens, ready for their answers."""
        access = self._answers.access
        with access.lock:  # fast tokenizers do not bear two threads
            rows = self.text.tokens(self.tokenizer, [self._render(question) for question in questions])
        if not self.bos:
            rows = [row[1:] if len(row) > 1 and row[0] == self.tokenizer.bos_token_id else row for row in rows]
        if not self._templated and not is_encoder_decoder(self.model):
            # A tokenizer that ends plain text with EOS would have the judge answer after its end.
            rows = [row[:-1] if len(row) > 1 and row[-1] == self.tokenizer.eos_token_id else row for row in rows]
        self.text.report([len(row) for row in rows], access.limit)
        return [truncate(row, access.limit, self.tokenizer) for row in rows]

    def _render(self, question: str) -> tuple[str, bool]:
        if not self._templated:
            return question, False
        message = [{"role": "user", "content": question}]
        if self.opening:
            text, templated = self.text.opening(self.tokenizer, message)
        else:
            text, templated = self.text.render(self.tokenizer, message, [])
        bos = self.tokenizer.bos_token
        return (text if self.bos or not bos else text.replace(bos, "")), templated

    def _write_context(self, prompt: Prompt) -> str:
        """Write the prompt as it stands in the question."""
        if self.context is None:
            return format_conversation(prompt, "user")
        writer = replace(self.text, template=self.context, chat=None)
        return writer.render(self.tokenizer, writer.messages(prompt), [])[0]

    @cached_property
    def _templated(self) -> bool:
        return self.text.chat is not False and (self.text.template or self.tokenizer.chat_template) is not None

    @cached_property
    def _answers(self) -> Answers:
        return Answers(reader_of(self), self.answers)


def check_places(template: str) -> None:
    """Refuse a template that leaves a place out, or has it twice."""
    if any(template.count(place) != 1 for place in PLACES):
        raise ValueError(f"a comparison holds {', '.join(PLACES)} once each, got {start_of(template)}")


def write_places(prompt: Prompt, first: Completion, second: Completion) -> dict[str, str]:
    """Write as text the prompt and the completions that fill a template."""
    completions = {"first": format_conversation(first, "assistant"), "second": format_conversation(second, "assistant")}
    return {"prompt": format_conversation(prompt, "user"), **completions}
