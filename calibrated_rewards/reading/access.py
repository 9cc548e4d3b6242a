"""How scorers get at a model: its lock, the most tokens of an input, and what was found out in earlier calls."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from calibrated_rewards.reading.batches import Budget
from calibrated_rewards.reading.body import body_of, default_budget, lock_of, positions_of, vocabulary
from calibrated_rewards.reading.decoder import Decoder, Head, Sharing
from calibrated_rewards.reading.own_forward import Fewest, OwnForward
from calibrated_rewards.reading.padding import Padding
from calibrated_rewards.reading.text import Text


@dataclass(frozen=True, eq=False)
class Access:
    """A model, and what its readers have in common, which are made anew for each call, of the parts it has now."""

    model: Any
    tokenizer: Any
    text: Text
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; None: by the device."""
    share_prefixes: bool = True
    show_progress: bool = True

    @property
    def lock(self) -> Any:
        """The model's, whoever else scores with it; fast tokenizers do not bear two threads either."""
        return lock_of(self.model)

    @property
    def pad(self) -> int | None:
        """The model's padding id; None if it has none, or one (such as -1) that no input can hold."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if pad is not None and 0 <= pad < vocabulary(self.model) else None

    @cached_property
    def limit(self) -> int:
        """Most tokens of an input."""
        return self.text.limit(self.tokenizer, positions_of(self.model))

    @cached_property
    def budget(self) -> Budget:
        """Of batches; it stays smaller once memory did not suffice."""
        return Budget(self.batch_tokens or default_budget(self.model))

    @cached_property
    def sharing(self) -> Sharing:
        """Whether prefixes are shared, and whether that was checked."""
        return Sharing(self.share_prefixes)

    @cached_property
    def padding(self) -> Padding:
        """Whether rows are padded, and what was compared to find that out."""
        return Padding()

    @cached_property
    def fewest(self) -> Fewest:
        """The fewest tokens that the model reads."""
        return Fewest()

    def decoder(self, head: Head) -> Decoder:
        """Reads with this head behind the model's body."""
        options = {"show_progress": self.show_progress, "lock": self.lock}
        return Decoder(self.model, body_of(self.model), head, self.budget, self.sharing, self.padding, **options)

    def own_forward(self, pad: int | None, **options: Any) -> OwnForward:
        """Reads through the model's own forward; without an id to pad with, one by one."""
        known: dict[str, Any] = {"padding": self.padding, "fewest": self.fewest, "lock": self.lock}
        told = {"show_progress": self.show_progress, **known, **options}
        return OwnForward(self.model, pad or 0, self.budget, one_by_one=pad is None, **told)
