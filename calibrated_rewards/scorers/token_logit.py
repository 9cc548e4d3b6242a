"""A language model whose reward is the logit of one token right behind the conversation, such as NVIDIA's Nemotron."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import vocabulary
from calibrated_rewards.models.shared_prefix import ModelReader, Row, group_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.models.vocabulary_head import Logits, logits_of
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired


@dataclass(frozen=True, eq=False)
class TokenLogit:
    """Scores with the logit of a token at the end of the conversation, without the opening of another message.

    Llama-3.1-Nemotron-70B-Reward-HF was trained so, with token 0: its card generates one token and takes that logit.
    """

    model: Any
    tokenizer: Any
    token: int = 0
    """The token's id."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    share_prefixes: bool = True
    show_progress: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.token < vocabulary(self.model):
            raise ValueError(
                f"TokenLogit needs a token among the model's {vocabulary(self.model)}, got token={self.token}"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The logit for each pair."""
        prompts, completions = paired(prompts, completions)
        if not prompts:
            return np.empty(0, np.float32)
        rows = [Row(ids, [len(ids) - 1]) for ids in self._access.encode(prompts, completions)]
        logits = torch.cat(self._access.decoder(self._head)(rows, [group_of(prompt) for prompt in prompts]))
        return finite(logits[:, 0].numpy(), prompts, completions, name_of(self))

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "kind": "token logit",
            **model_fingerprint(self.model, self.tokenizer),
            "token": self.token,
            "text": self._access.text_fingerprint(),
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @cached_property
    def _head(self) -> Logits:
        return logits_of(self.model, self._access.lock, [self.token])

    @cached_property
    def _access(self) -> ModelReader:
        return ModelReader(
            self.model, self.tokenizer, self.text, self.batch_tokens, self.share_prefixes, self.show_progress
        )
