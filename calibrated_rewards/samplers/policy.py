"""A causal language model as a policy: prompts to tokens, tokens to completions, end tokens and fingerprint."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from calibrated_rewards.models.fingerprint import model_fingerprint
from calibrated_rewards.models.parts import check_vocabulary, lock_of, positions_of, unwrap
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.protocol import Decoding, Rollout, fingerprint_of_prompts, tokenize_prompts

# Tokens beyond the bytes of a stop text that are searched, for those that write nothing.
SLACK = 8


@dataclass
class Turn:
    """How a preference head reads a completion: the whole row of tokens, up to the end of the turn."""

    row: list[int]
    as_drawn: bool
    """The tokens are those that were drawn: other tokens may make the same text."""
    state: Any = None
    """The hidden states at the last token, a tensor of one axis; None if they were not read."""


@dataclass
class Draft:
    """A completion that is being written."""

    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    end: Literal["token", "text"] | None = None
    turn: Turn | None = None


@dataclass(frozen=True, eq=False)
class Endings:
    """The tokens and texts that end a completion."""

    tokenizer: Any
    ids: frozenset[int]
    stop: tuple[str, ...] = ()

    def mark(self, drafts: Sequence[Draft]) -> None:
        """Mark the drafts that their last token ends."""
        for draft in drafts:
            if draft.ids[-1] in self.ids:
                draft.end = "token"
        if not self.stop:
            return
        drafts = [draft for draft in drafts if draft.end is None]
        # The last tokens are enough to rule a stop text out; to find one, the whole text is searched.
        last = max(len(text.encode()) for text in self.stop) + SLACK
        tails = self._decode([draft.ids[-last:] for draft in drafts])
        drafts = [draft for draft, tail in zip(drafts, tails, strict=True) if self._cut(tail) != tail]
        for draft, text in zip(drafts, self._decode([draft.ids for draft in drafts]), strict=True):
            if self._cut(text) != text:
                draft.end = "text"

    def rollouts(self, drafts: Sequence[Draft]) -> list[Rollout]:
        """Convert drafts to rollouts, without the token or the text that ended them."""
        # Special tokens are left out anyway; a token that is not special may be set to end a completion too.
        rows = [draft.ids[:-1] if draft.end == "token" else draft.ids for draft in drafts]
        rollouts = []
        for draft, text in zip(drafts, self._decode(rows), strict=True):
            cut = self._cut(text)
            finish: Literal["stop", "length"] = "length" if draft.end is None and cut == text else "stop"
            rollouts.append(Rollout(cut, len(draft.ids), finish, draft.logprob))
        return rollouts

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return list(self.tokenizer.batch_decode(rows, skip_special_tokens=True)) if rows else []

    def _cut(self, text: str) -> str:
        places = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(places)] if places else text


def end_ids(model: Any, tokenizer: Any, decoding: Decoding) -> frozenset[int]:
    """Collect the tokens at which a trainer stops: the generation config's, the tokenizer's, and the decoding's.

    A stop text that is a token of its own is one of them: special tokens are left out of the text that is searched.
    """
    ids: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # a tensor, of one or of many
    ids = [*(ids if isinstance(ids, list | tuple) else [ids]), tokenizer.eos_token_id, *decoding.stop_token_ids]
    if decoding.stop:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        tokens = {**tokenizer.get_added_vocab(), **special}
        ids += [tokens[text] for text in decoding.stop if text in tokens]
    return frozenset(int(i) for i in ids if i is not None)


@dataclass(frozen=True, eq=False)
class Policy:
    """A model with its tokenizer and settings: the part that its samplers have in common, whatever the engine.

    A prompt of messages is rendered by the chat template, ready for the answer, and gets no special tokens beside the
    template's; a prompt that is text gets those that the tokenizer adds, as in TRL's trainers.
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
        """Make the prompts into tokens, whole."""
        with lock_of(self.model):  # two threads cannot use a fast tokenizer at once
            return tokenize_prompts(self.text, self.tokenizer, prompts)

    def text_ids(self, text: str) -> list[int]:
        """Make a text that follows a prompt into tokens, without special tokens of the tokenizer's."""
        with lock_of(self.model):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that is tokenised."""
        return self.text.opening(self.tokenizer, prompt)[0]

    def check(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Make the prompts into tokens; refuse one that has none, or leaves no room for its completion."""
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
        """The number of tokens that the model has positions for."""
        limits = [n for n in (self.text.max_length, positions_of(unwrap(self.model))) if n is not None]
        return min(limits, default=None)

    @cached_property
    def endings(self) -> Endings:
        """The tokens and texts that end its completions."""
        return Endings(self.tokenizer, end_ids(self.model, self.tokenizer, self.decoding), self.decoding.stop)

    def fingerprint(self) -> dict[str, Any]:
        """Describe all that its completions depend on, but for the seeds."""
        return {
            **model_fingerprint(self.model, self.tokenizer),
            "text": fingerprint_of_prompts(self.text.fingerprint(self.tokenizer)),
            "decoding": self.decoding.fingerprint(),
            "end_tokens": sorted(self.endings.ids),
        }


def tokenize_completion(policy: Policy, rollout: Any, prompt: Any = "") -> tuple[list[int], bool]:
    """Make a rollout's completion into tokens, with the token that ended it; tell if as many were drawn.

    Rollouts are stored as text. Where several tokens end a completion, the tokenizer's own is taken.
    """
    text = rollout.completion
    if not isinstance(text, str):
        raise TypeError(f"tokens are those of completions that are text, got messages for {start_of(prompt)}")
    ids = policy.text_ids(text)
    most, ends = policy.decoding.max_tokens, policy.endings.ids
    if rollout.finish == "length" or (rollout.finish is None and len(ids) >= most) or not (ends or rollout.finish):
        return ids[:most], rollout.tokens in (None, len(ids))
    end = policy.tokenizer.eos_token_id if policy.tokenizer.eos_token_id in ends else min(ends, default=None)
    whole = ids if end is None else [*ids, end]
    if rollout.tokens in (None, len(whole)):
        return whole, True
    # It may have been ended by a stop string, which was drawn and is not stored.
    for stop in policy.decoding.stop:
        ids = policy.text_ids(text + stop)
        if len(ids) == rollout.tokens:
            return ids, True
    return whole[:most], False
