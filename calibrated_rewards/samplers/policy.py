"""How a completion ends: by a token of the model's, by a text that was asked for, or cut.

A causal language model as the policy that writes: prompts to tokens, tokens to completions, and what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import check_vocabulary, lock_of, positions_of, unwrap
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.protocol import Decoding, Rollout

# Tokens beyond the bytes of a stop text that are looked at, for those that write nothing.
SLACK = 8


@dataclass
class Draft:
    """A completion that is being written."""

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    end: Literal["token", "text"] | None = None


@dataclass(frozen=True, eq=False)
class Endings:
    """What ends a completion."""

    tokenizer: Any
    ids: frozenset[int]
    stop: tuple[str, ...] = ()

    def mark(self, drafts: Sequence[Draft]) -> None:
        """Say of each draft whether its last token ends it."""
        for draft in drafts:
            if draft.ids[-1] in self.ids:
                draft.end = "token"
        if self.stop:
            self._mark_texts([draft for draft in drafts if draft.end is None])

    def rollouts(self, drafts: Sequence[Draft]) -> list[Rollout]:
        """The drafts as completions: without the token or the text that ended them."""
        # Special tokens are left out anyway; a token that is not special may be set to end a completion too.
        written = [draft.ids[:-1] if draft.end == "token" else draft.ids for draft in drafts]
        rollouts = []
        for draft, text in zip(drafts, self._texts(written), strict=True):
            cut = self._cut(text)
            finish: Literal["stop", "length"] = "length" if draft.end is None and cut == text else "stop"
            rollouts.append(Rollout(cut, len(draft.ids), finish, draft.logprob))
        return rollouts

    def _mark_texts(self, drafts: Sequence[Draft]) -> None:
        """A look at the last tokens is enough to rule a stop text out; whether it is there, the whole text says."""
        last = max(len(text.encode()) for text in self.stop) + SLACK
        tails = self._texts([draft.ids[-last:] for draft in drafts])
        seen = [draft for draft, tail in zip(drafts, tails, strict=True) if self._cut(tail) != tail]
        for draft, text in zip(seen, self._texts([draft.ids for draft in seen]), strict=True):
            if self._cut(text) != text:
                draft.end = "text"

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True)) if rows else []

    def _cut(self, text: str) -> str:
        found = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(found)] if found else text


def end_ids(model: Any, tokenizer: Any, decoding: Decoding) -> frozenset[int]:
    """The tokens at which a trainer would stop: the generation config's, the tokenizer's, and those asked for."""
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own.tolist() if hasattr(own, "tolist") else own  # a tensor, of one or of many
    told = own if isinstance(own, list | tuple) else [own]
    asked = (*decoding.stop_token_ids, *_stop_tokens(tokenizer, decoding.stop))
    return frozenset(int(i) for i in (*told, tokenizer.eos_token_id, *asked) if i is not None)


def _stop_tokens(tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """The stop texts that are tokens of their own: special ones are left out of the text, where none would be found."""
    if not stop:
        return []
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    own = {**tokenizer.get_added_vocab(), **special}
    return [own[text] for text in stop if text in own]


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
        name = type(unwrap(self.model)).__name__
        if self.model.config.is_encoder_decoder:
            raise TypeError(f"a policy is a causal language model, got {name}, which is an encoder-decoder")
        if unwrap(self.model).get_output_embeddings() is None:
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
        known = [n for n in (self.text.max_length, positions_of(unwrap(self.model))) if n is not None]
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
