"""A causal language model as the policy that writes: prompts to tokens, tokens to completions, and what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import check_vocabulary, lock_of, positions_of, unwrapped
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.decoding import Decoding
from calibrated_rewards.samplers.endings import Endings, end_ids


@dataclass(frozen=True, eq=False)
class Policy:
    """A model, its tokenizer, and how it is used: what its samplers have in common, whatever the engine.

    A prompt of messages is rendered by the chat template, ready for the answer, and gets no special tokens beside the
    template's; a prompt that is text gets those that the tokenizer adds. So it is in TRL's trainers.
    """

    model: Any
    tokenizer: Any
    decoding: Decoding
    text: Text

    def __post_init__(self) -> None:
        name = type(unwrapped(self.model)).__name__
        if self.model.config.is_encoder_decoder:
            raise TypeError(f"a policy is a causal language model, got {name}, which is an encoder-decoder")
        if unwrapped(self.model).get_output_embeddings() is None:
            raise TypeError(
                f"a policy is a causal language model, got {name}, which has no output layer over the vocabulary: "
                "a reward model scores completions and cannot write them"
            )

    def ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of the prompts, whole."""
        # What ends an input of a scorer would end the answer before it begins.
        text = replace(self.text, append_eos=False)
        with lock_of(self.model):  # fast tokenizers do not bear two threads
            return text.tokens(self.tokenizer, [text.opening(self.tokenizer, prompt) for prompt in prompts])

    def rendered(self, prompt: Prompt) -> str:
        """The text that is tokenised."""
        return self.text.opening(self.tokenizer, prompt)[0]

    def check(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of the prompts; ValueError for one that has none, or leaves no room for its completion."""
        rows = self.ids(prompts)
        check_vocabulary(rows, self.model)
        for prompt, row in zip(prompts, rows, strict=True):
            if self.limit is not None and len(row) + self.decoding.max_tokens > self.limit:
                raise ValueError(
                    f"a prompt and its completion have at most {self.limit} tokens, got {len(row)} and "
                    f"max_tokens={self.decoding.max_tokens} for {start_of(prompt)}: leave it out, or lower max_tokens"
                )
        return rows

    @cached_property
    def limit(self) -> int | None:
        """How many tokens the model has positions for."""
        known = [n for n in (self.text.max_length, positions_of(unwrapped(self.model))) if n is not None]
        return min(known, default=None)

    @cached_property
    def endings(self) -> Endings:
        """What ends its completions."""
        return Endings(self.tokenizer, end_ids(self.model, self.tokenizer, self.decoding), self.decoding.stop)

    def fingerprint(self) -> dict[str, Any]:
        """What its completions depend on, but for the seeds."""
        text = self.text.fingerprint(self.tokenizer)
        return {
            **model_fingerprint(self.model, self.tokenizer),
            "text": {name: text[name] for name in ("chat", "template", "template_options", "special_tokens", "today")},
            "decoding": self.decoding.fingerprint(),
            "end_tokens": sorted(self.endings.ids),
        }
