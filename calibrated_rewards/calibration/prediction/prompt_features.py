"""PromptFeatures: a reward model's own hidden state for a prompt, as features of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from calibrated_rewards.models.batches import Budget, Padding
from calibrated_rewards.models.own_forward import OwnForward
from calibrated_rewards.models.parts import body_of, default_budget, lock_of, positions_of, unwrap, vocabulary
from calibrated_rewards.models.text import Text, truncate
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.scorers.classifiers import CrossEncoder, write_flat
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.protocol import Loaded, fingerprint, name_of

Pool = Literal["last", "first", "mean"]


@runtime_checkable
class Readable(Protocol):
    """A scorer that is a transformer with its tokenizer and its way to write text."""

    model: Any
    tokenizer: Any
    text: Text


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """The last hidden state of a reward model's body, for prompts alone, in float32.

    Takes what `load_scorer` gives, and every scorer with a model, a tokenizer and a text of its own. A prompt is
    written as the scorer writes it before a completion; one that is too long loses its first tokens, as there.
    """

    scorer: Any
    pool: Pool | None = None
    """The token whose state is read; None is the last one in a causal model, and the mean in all others."""

    def __post_init__(self) -> None:
        if self.pool not in (None, "last", "first", "mean"):
            raise ValueError(f"PromptFeatures needs pool to be 'last', 'first' or 'mean', got pool={self.pool!r}")

    def __call__(self, prompts: Sequence[Prompt]) -> Float32[np.ndarray, "P d"]:
        """Return a row for each prompt: the same alone, in a batch, in any order."""
        prompts = list(prompts)
        with lock_of(self._readable.model):  # fast tokenizers do not bear two threads
            rows = self._tokens(prompts)
        return self._reader(rows).numpy() if rows else np.empty((0, self._width), np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the features depend on: what the scores depend on, and the token that is read."""
        return {"kind": "prompt features", "scorer": fingerprint(self.scorer), "pool": self._pool}

    def __getstate__(self) -> dict[str, Any]:
        return {"scorer": self.scorer, "pool": self.pool}

    @cached_property
    def _readable(self) -> Readable:
        scorer: Any = self.scorer
        while isinstance(scorer, Loaded | Cost):
            scorer = scorer.scorer
        if not isinstance(scorer, Readable):
            raise TypeError(
                f"PromptFeatures reads a scorer that has a model, a tokenizer and a text, got {name_of(scorer)}. Any "
                "function from prompts to an array is a feature function too: an embedding model's, or one of yours"
            )
        return scorer

    @cached_property
    def _body(self) -> nn.Module:
        """The module that gives the states: the body, or the encoder of an encoder-decoder."""
        model = unwrap(self._readable.model)
        return model.get_encoder() if model.config.is_encoder_decoder else body_of(model)

    @property
    def _width(self) -> int:
        return int(unwrap(self._readable.model).config.get_text_config().hidden_size)

    @cached_property
    def _pool(self) -> Pool:
        return self.pool or ("last" if is_causal(self._one_state) else "mean")

    @cached_property
    def _reader(self) -> OwnForward:
        return self._reading(self._pool)

    def _reading(self, pool: Pool) -> OwnForward:
        model = unwrap(self._readable.model)
        pads = getattr(model.config.get_text_config(), "pad_token_id", None), self._readable.tokenizer.pad_token_id
        pad = next((i for i in pads if i is not None and 0 <= i < vocabulary(model)), 0)
        budget = Budget(getattr(self._readable, "batch_tokens", None) or default_budget(model))
        shown = bool(getattr(self._readable, "show_progress", True))
        return OwnForward(
            Pooled(self._body, model.config, pool), pad, budget, "state", padding=Padding(), show_progress=shown,
            lock=lock_of(model),
        )  # fmt: skip

    def _one_state(self, ids: list[int]) -> Tensor:
        few = vocabulary(self._readable.model)
        return self._reading("first")([[i % few for i in ids]])

    def _tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        scorer, tokenizer = self._readable, self._readable.tokenizer
        limit = scorer.text.limit(tokenizer, positions_of(unwrap(scorer.model)))
        # A prompt does not end where a text does.
        text = replace(scorer.text, append_eos=False)
        pair = isinstance(scorer, CrossEncoder)
        alone = [(write_flat(p), False) if pair else text.opening(tokenizer, p) for p in prompts]
        rows = text.tokens(tokenizer, alone)
        text.report([len(row) for row in rows], limit)
        return [truncate(row, limit, tokenizer) for row in rows]


class Pooled(nn.Module):
    """A body that answers with one state for each row of tokens."""

    base_model_prefix = "body"

    def __init__(self, body: nn.Module, config: Any, pool: Pool) -> None:
        super().__init__()
        self.body, self.config, self.pool = body, config, pool

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the pooled states as {"state": (n, hidden size)}; rows are padded on the right."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        lengths = attention_mask.sum(1)
        if self.pool == "mean":
            return {"state": (states * attention_mask[..., None]).sum(1) / lengths[:, None]}
        at = lengths - 1 if self.pool == "last" else torch.zeros_like(lengths)
        return {"state": states[torch.arange(len(states), device=states.device), at.to(states.device)]}

    def get_input_embeddings(self) -> Any:
        """Return the embeddings of the body."""
        return self.body.get_input_embeddings()  # type: ignore[operator]


def is_causal(first_state: Any) -> bool:
    """Return whether the first token's state is the same whatever follows: then only the last has read all tokens."""
    one, other = first_state([5, 6, 7, 8, 9, 10, 11, 12, 13]), first_state([5, 9, 10, 11, 6, 7, 8, 13, 12])
    return bool((one - other).abs().max() <= 1e-3 * one.abs().max())
