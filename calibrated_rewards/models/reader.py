"""`ModelReader`: a scorer's access to its model, and what earlier calls have found out about that model."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.models.batches import Budget, Padding
from calibrated_rewards.models.own_forward import Fewest, OwnForward
from calibrated_rewards.models.parts import body_of, default_budget, lock_of, positions_of, vocabulary
from calibrated_rewards.models.shared_prefix import Decoder, Head, Row, Sharing
from calibrated_rewards.models.text import Text
from calibrated_rewards.models.unchanged import StateKeeper
from calibrated_rewards.prompts import Completion, Prompt


@dataclass(frozen=True, eq=False)
class ModelReader:
    """Access to a model: encodes pairs, and makes readers of the parts that the model has now, anew for each call."""

    model: Any
    tokenizer: Any
    text: Text
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; None: by the device."""
    share_prefixes: bool = True
    show_progress: bool = True

    @property
    def lock(self) -> Any:
        """The model's lock, which all share that score with it; fast tokenizers do not bear two threads either."""
        return lock_of(self.model)

    @property
    def pad(self) -> int | None:
        """The model's padding id; None if it has none, or one (such as -1) that no input can hold."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if pad is not None and 0 <= pad < vocabulary(self.model) else None

    @cached_property
    def limit(self) -> int:
        """The number of tokens above which an input is truncated."""
        return self.text.limit(self.tokenizer, positions_of(self.model))

    @property
    def reward_token(self) -> int | None:
        """The token at which the score is read, where the config names one (InternLM2's reward models)."""
        token = getattr(self.model.config, "reward_token_id", None)
        return token if isinstance(token, int) and 0 <= token < vocabulary(self.model) else None

    def encode(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Encode each pair, truncated to the limit; it ends in the reward token, where the model has one."""
        end = self.reward_token
        room = self.limit - (end is not None)
        with self.lock:  # fast tokenizers do not bear two threads
            rows = self.text.encode(self.tokenizer, prompts, completions, room)
        # A template may have written it; any other last token would be read in its place, without a word.
        return rows if end is None else [row if row[-1] == end else [*row, end] for row in rows]

    def text_fingerprint(self) -> dict[str, Any]:
        """Describe all that the token ids depend on, but for the tokenizer."""
        end = {} if self.reward_token is None else {"reward_token_id": self.reward_token}
        return {**self.text.fingerprint(self.tokenizer), "max_length": self.limit, **end}

    @cached_property
    def budget(self) -> Budget:
        """The tokens of a batch, which stay fewer once memory did not suffice."""
        return Budget(self.batch_tokens or default_budget(self.model))

    @cached_property
    def sharing(self) -> Sharing:
        """Permission to share prefixes, with what was compared for it."""
        return Sharing(self.share_prefixes)

    @cached_property
    def padding(self) -> Padding:
        """Permission to pad rows, with what was compared for it."""
        return Padding()

    @cached_property
    def state(self) -> StateKeeper:
        """The keeper that puts back what a forward changes in the model."""
        return StateKeeper()

    @cached_property
    def fewest(self) -> Fewest:
        """Fewest tokens that the model reads."""
        return Fewest()

    def decoder(self, head: Head) -> Decoder:
        """Make a reader with this head behind the model's body."""
        options = {"state": self.state, "show_progress": self.show_progress, "lock": self.lock}
        return Decoder(self.model, body_of(self.model), head, self.budget, self.sharing, self.padding, **options)

    def read_last(self, head: Head, rows: Sequence[list[int]], groups: Sequence[Hashable]) -> Tensor:
        """Read each row at its last token, `(rows, numbers)`; rows of one group share their prefix."""
        return torch.cat(self.decoder(head)([Row(row, [len(row) - 1]) for row in rows], groups))

    def own_forward(self, pad: int | None, **options: Any) -> OwnForward:
        """Make a reader through the model's own forward; without an id to pad with, it reads one by one."""
        shared = {"padding": self.padding, "fewest": self.fewest, "state": self.state, "lock": self.lock}
        options = {"show_progress": self.show_progress, **shared, **options}
        return OwnForward(self.model, pad or 0, self.budget, one_by_one=pad is None, **options)


def reader_of(scorer: Any) -> ModelReader:
    """Build the reader of a scorer's model, of the settings that the kinds of scorers have in common."""
    options = (scorer.batch_tokens, getattr(scorer, "share_prefixes", False), scorer.show_progress)
    return ModelReader(scorer.model, scorer.tokenizer, scorer.text, *options)
