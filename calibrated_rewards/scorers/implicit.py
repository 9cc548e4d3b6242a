"""The implicit reward of a preference-tuned language model: the log-ratio of its and its reference's probability."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import lock_of, positions_of, vocabulary
from calibrated_rewards.models.shared_prefix import ModelReader, Row, cut, find_completion_starts, group_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.models.vocabulary_head import LogProbability, logits_of
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import check_pairs, refuse_pickle, score_with

Writer: TypeAlias = tuple[ModelReader, LogProbability]
"""A causal LM, and its head, which is measured once."""


@dataclass(frozen=True, eq=False)
class ImplicitReward:
    """A scorer made of a causal LM tuned by DPO or KTO: beta * (log pi - log pi_ref), summed over the completion.

    Its tokens are those behind what the input shares with its prompt alone: the template's end of turn is one of them,
    and the first token of an input, which nothing predicts, is none. Of an input that is too long, the tokens that are
    left count.
    """

    model: Any
    tokenizer: Any
    reference: Any = None
    """The model that it was tuned from; None: the same PEFT model without its adapter."""
    beta: float = 0.1
    """As in its training. It sets the scale, never the order."""
    reduce: Literal["sum", "mean"] = "sum"
    """The sum of the tokens, as DPO has it, or their mean, which does not grow with length."""
    reference_free: bool = False
    """Take log pi alone. With a sum that prefers short completions."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"ImplicitReward needs beta > 0, got beta={self.beta}")
        if self.reduce not in ("sum", "mean"):
            raise ValueError(f"ImplicitReward needs reduce to be 'sum' or 'mean', got reduce={self.reduce!r}")
        if self.reference_free and self.reference is not None:
            raise ValueError("ImplicitReward needs a reference or reference_free=True, got both")
        if not self.reference_free and self.reference is None and not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                f"ImplicitReward needs the model that {type(self.model).__name__} was tuned from, got reference=None; "
                "that is for PEFT models, whose adapter is switched off; or say reference_free=True"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each pair with beta times the sum, or mean, of its log-ratios; 0 for a completion without tokens."""
        return score_with(self._scores, self, prompts, completions)

    def _scores(self, prompts: list[Prompt], completions: list[Completion]) -> Float32[np.ndarray, " n"]:
        ratios = self.log_ratios(prompts, completions)
        scores = [self.beta * (x.sum() if self.reduce == "sum" else x.sum() / max(1, len(x))) for x in ratios]
        return np.array(scores, np.float32)

    def log_ratios(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[np.ndarray]:
        """Return log pi - log pi_ref of each token of each completion, without beta; reference-free, log pi."""
        prompts, completions = check_pairs(prompts, completions)
        with lock_of(self.model):  # fast tokenizers do not bear two threads
            whole = self.text.encode(self.tokenizer, prompts, completions)
            self.text.report([len(row) for row in whole], self._limit)
            rows, openings = [], find_completion_starts(self.text, self.tokenizer, prompts, whole)
            for row, start in zip(whole, openings, strict=True):
                ids, out = cut(row, self._limit, self.tokenizer)
                # A token is read where it is predicted: one before it stands.
                rows.append(Row(ids, list(range(max(1, start - out) - 1, len(ids) - 1))))
        groups = [group_of(prompt) for prompt in prompts]
        policy = self._log_probabilities(self._policy, rows, groups)
        if self.reference_free:
            return policy
        with self._as_reference():
            reference = self._log_probabilities(self._reference, rows, groups)
        return [each - other for each, other in zip(policy, reference, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on; without an explicit reference, the model's weights are both's."""
        reference = None if self.reference is None else model_fingerprint(self.reference, self.tokenizer)
        settings = {name: getattr(self, name) for name in ("reference_free", "beta", "reduce")}
        text = {**self.text.fingerprint(self.tokenizer), "max_length": self._limit}
        model = model_fingerprint(self.model, self.tokenizer)
        return {"kind": "implicit reward", **model, "reference": reference, **settings, "text": text}

    def _log_probabilities(self, writer: Writer, rows: list[Row], groups: list[Any]) -> list[np.ndarray]:
        """Read those of each token, in float64, so that sums over many do not round."""
        access, head = writer
        decoder = access.decoder(head)
        nonempty = [i for i, row in enumerate(rows) if row.read]
        values = [np.empty(0)] * len(rows)
        numbers = decoder([rows[i] for i in nonempty], [groups[i] for i in nonempty])
        for i, column in zip(nonempty, numbers, strict=True):
            values[i] = column[:, 0].double().numpy()
        return values

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Take the model's adapter off meanwhile, where the model without it is the reference; then restore all."""
        if self.reference is not None:
            yield
            return
        with lock_of(self.model):
            trained = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
            try:
                with self.model.disable_adapter():
                    yield
            finally:  # PEFT wants gradients of any adapter that it switches on
                for parameter, wanted in trained.items():
                    parameter.requires_grad_(wanted)

    @cached_property
    def _limit(self) -> int:
        models = [self.model] if self.reference is None else [self.model, self.reference]
        positions = [count for count in map(positions_of, models) if count]
        return self.text.limit(self.tokenizer, min(positions, default=None))

    @cached_property
    def _policy(self) -> Writer:
        return self._writer(self.model)

    @cached_property
    def _reference(self) -> Writer:
        return self._writer(self.model if self.reference is None else self.reference)

    def _writer(self, model: Any) -> Writer:
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        access = ModelReader(model, self.tokenizer, self.text, *options)
        return access, LogProbability(logits_of(model, access.lock), vocabulary(model))
