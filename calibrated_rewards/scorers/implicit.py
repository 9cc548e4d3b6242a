"""The reward that a preference-tuned language model holds: the log-ratio of its own and its reference's probability."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import lock_of, positions_of, vocabulary
from calibrated_rewards.models.shared_prefix import ModelReader, Row, cut, find_completion_starts, group_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.models.vocabulary_head import LogProbability, logits_of
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired

Writer: TypeAlias = tuple[ModelReader, LogProbability]
"""A causal LM, and its head, which is measured once."""


@dataclass(frozen=True, eq=False)
class ImplicitReward:
    """Scores with a causal LM tuned by DPO or KTO: beta * (log pi - log pi_ref), summed over the completion's tokens.

    Those are the tokens behind what the input shares with its prompt alone: the template's end of turn is one of them,
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
        """beta times the sum, or the mean, of each pair's log-ratios; 0 for a completion without tokens."""
        prompts, completions = paired(prompts, completions)
        tokens = self.log_ratios(prompts, completions)
        scores = [self.beta * (x.sum() if self.reduce == "sum" else x.sum() / max(1, len(x))) for x in tokens]
        return finite(np.array(scores, np.float32), prompts, completions, name_of(self))

    def log_ratios(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[np.ndarray]:
        """log pi - log pi_ref of each token of each completion, without beta; log pi where it is reference-free."""
        prompts, completions = paired(prompts, completions)
        with self._lock:  # fast tokenizers do not bear two threads
            rows = self._rows(prompts, completions)
        groups = [group_of(prompt) for prompt in prompts]
        found = self._log_probabilities(self._policy, rows, groups)
        if self.reference_free:
            return found
        with self._as_reference():
            other = self._log_probabilities(self._reference, rows, groups)
        return [own - reference for own, reference in zip(found, other, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on; without an explicit reference, the model's weights are both's."""
        reference = None if self.reference is None else model_fingerprint(self.reference, self.tokenizer)
        return {
            "kind": "implicit reward",
            **model_fingerprint(self.model, self.tokenizer),
            "reference": reference,
            "reference_free": self.reference_free,
            "beta": self.beta,
            "reduce": self.reduce,
            "text": {**self.text.fingerprint(self.tokenizer), "max_length": self._limit},
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    def _rows(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Row]:
        whole = self.text.encode(self.tokenizer, prompts, completions)
        self.text.report([len(row) for row in whole], self._limit)
        rows = []
        for row, start in zip(whole, find_completion_starts(self.text, self.tokenizer, prompts, whole), strict=True):
            ids, out = cut(row, self._limit, self.tokenizer)
            # A token is read where it is predicted: one before it stands.
            rows.append(Row(ids, list(range(max(1, start - out) - 1, len(ids) - 1))))
        return rows

    def _log_probabilities(self, writer: Writer, rows: list[Row], groups: list[Any]) -> list[np.ndarray]:
        """Of each token, in float64, so that sums over many do not round."""
        access, head = writer
        decoder = access.decoder(head)
        read = [i for i, row in enumerate(rows) if row.read]
        found = [np.empty(0)] * len(rows)
        for i, numbers in zip(read, decoder([rows[i] for i in read], [groups[i] for i in read]), strict=True):
            found[i] = numbers[:, 0].double().numpy()
        return found

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """While it runs, the model is without its adapter, where that is the reference; then all as before."""
        if self.reference is not None:
            yield
            return
        with self._lock:
            trained = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
            try:
                with self.model.disable_adapter():
                    yield
            finally:  # PEFT wants gradients of any adapter that it switches on
                for parameter, wanted in trained.items():
                    parameter.requires_grad_(wanted)

    @property
    def _lock(self) -> Any:
        return lock_of(self.model)

    @cached_property
    def _limit(self) -> int:
        models = [self.model] if self.reference is None else [self.model, self.reference]
        known = [positions for positions in map(positions_of, models) if positions]
        return self.text.limit(self.tokenizer, min(known, default=None))

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
