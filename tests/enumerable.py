"""A language model that can be enumerated: each completion of a few tokens, its probability, and the exact optimum.

The targets are written in numpy, with nothing of ours but the table: Phi is spelled out again in `PHI`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.theory.transforms import Exponential, Identity, Log, Transform

END, ALPHABET = 0, "abcdefghijklmnopqrst"
LETTERS, BASE = 7, 1 + len(ALPHABET)
PROMPTS = ["a", "bc", "d", "efg"]
REFERENCES = 20_000
# On the unit scale: Exponential's range is [0, 1], as Identity's; Log stays.
PHI: dict[str, tuple[Transform, Callable[[np.ndarray], np.ndarray]]] = {
    "identity": (Identity(), lambda u: u),
    "log": (Log(), np.log),
    "exp:10": (Exponential(10.0), lambda u: np.expm1(10 * u) / np.expm1(10.0)),
}


def tokenizer(letters: int = LETTERS) -> Any:
    """A token a letter, and the one that ends a completion, which is the padding too."""
    vocabulary = {"</s>": END, **{letter: i for i, letter in enumerate(ALPHABET[:letters], 1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


class Contexts(nn.Module):
    """The body: the hidden state is the unit vector of the context, so that a linear value is exact as well."""

    def __init__(self, codes: list[int]) -> None:
        super().__init__()
        self.letters = nn.Embedding(BASE, 1)  # what says how many tokens there are
        self.register_buffer("codes", torch.tensor(codes))

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> BaseModelOutputWithPast:
        """The context at each token: what is padding is not of it."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = [torch.zeros_like(input_ids[:, 0])]
        for ids, told in zip(input_ids.T, mask.T, strict=True):
            states.append(torch.where(told.bool(), states[-1] * BASE + ids, states[-1]))
        found = torch.searchsorted(self.codes, torch.stack(states[1:], 1)).clamp(max=len(self.codes) - 1)
        hidden = torch.zeros(*found.shape, len(self.codes)).scatter_(2, found[..., None], 1.0)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class TabularConfig(PretrainedConfig):  # type: ignore[misc]
    """What is known by this name can be loaded from its files, as TRL loads its reference."""

    model_type = "enumerable"
    auto_map = ()  # TRL asks for it


class Tabular(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model with its own logits after each prompt and beginning: it can be any law exactly.

    No prompt may begin with another one: they would share contexts.
    """

    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(
        self,
        length: int | PretrainedConfig,
        seed: int = 0,
        skew: float = 1.5,
        prompts: Sequence[str] = tuple(PROMPTS),
        letters: int = LETTERS,
    ) -> None:
        loaded = isinstance(length, PretrainedConfig)
        codes = length.codes if loaded else contexts(prompts, length, letters)
        sizes = {"hidden_size": len(codes), "vocab_size": 1 + letters, "num_hidden_layers": 1, "eos_token_id": END}
        super().__init__(length if loaded else TabularConfig(**sizes, codes=codes))
        self.generation_config.use_cache = False
        self.model = Contexts(codes)
        self.lm_head = nn.Linear(len(codes), self.config.vocab_size, bias=False)
        self.post_init()
        if not loaded:
            drawn = torch.empty(len(codes), 1 + letters)
            drawn.normal_(std=skew, generator=torch.Generator().manual_seed(seed))
            self.lm_head.weight.data.copy_(drawn.T)

    def get_input_embeddings(self) -> nn.Module:
        """What says how many tokens there are."""
        return self.model.letters

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> CausalLMOutputWithPast:
        """The logits after each token."""
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), hidden_states=(hidden,))

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        """All tokens, each time: it has no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModelForCausalLM.register(TabularConfig, Tabular)


def contexts(openings: Sequence[str], length: int, letters: int) -> list[int]:
    """All that a token may follow: a prompt and a beginning, as numbers, in order."""
    begun = [ids for n in range(length) for ids in itertools.product(range(1, 1 + letters), repeat=n)]
    return sorted({code((*opening, *ids)) for opening in map(tokens, openings) for ids in begun})


def tokens(letters: str) -> tuple[int, ...]:
    """Text as tokens."""
    return tuple(1 + ALPHABET.index(letter) for letter in letters)


def code(ids: tuple[int, ...]) -> int:
    """A context as a number."""
    return sum(token * BASE**place for place, token in enumerate(reversed(ids)))


def completions(length: int, letters: int = LETTERS) -> list[tuple[int, ...]]:
    """All completions of at most so many tokens: those that end, and those that are cut."""
    words = [list(itertools.product(range(1, 1 + letters), repeat=n)) for n in range(length + 1)]
    return [(*own, END) for each in words[:-1] for own in each] + words[-1]


def text(ids: tuple[int, ...]) -> str:
    """A completion as text."""
    return "".join(ALPHABET[i - 1] for i in ids if i != END)


@dataclass(frozen=True)
class TiedScorer:
    """Scores in steps of a half, so that many are alike."""

    def __call__(self, prompts: Any, completions: Any, /) -> np.ndarray:
        """A score for each pair."""
        return np.round(2 * HashScorer()(prompts, completions)).astype(np.float32) / 2


@torch.no_grad()
def law(policy: Any, prompt: str, length: int) -> np.ndarray:
    """The probability of each completion, by one plain forward of those of a length together, without padding."""
    opening, found = tokens(prompt), []
    for _, group in itertools.groupby(completions(length, policy.config.vocab_size - 1), len):
        ids = torch.tensor([[*opening, *own] for own in group])
        logits = policy(ids).logits[:, len(opening) - 1 : -1].double().log_softmax(-1)
        found.append(logits.gather(2, ids[:, len(opening) :, None])[..., 0].sum(1).exp())
    return np.asarray(torch.cat(found))


@dataclass(frozen=True)
class Problem:
    """Prompts, the law of the reference for each, the scores, and a beta: what has a known optimum."""

    length: int
    phi: str
    laws: np.ndarray
    scores: np.ndarray
    kl: float = 1.0

    @classmethod
    def of(cls, policy: Any, length: int, phi: str) -> "Problem":
        """The problem whose reference is this model."""
        texts = [text(ids) for ids in completions(length)]
        laws = np.array([law(policy, prompt, length) for prompt in PROMPTS])
        return cls(length, phi, laws, np.array([TiedScorer()([p] * len(texts), texts) for p in PROMPTS]))

    @property
    def transform(self) -> Transform:
        """The library's transform of that name."""
        return PHI[self.phi][0]

    def table(self) -> ReferenceTable:
        """References in exactly the proportions of the law, up to the last one of many."""
        counts = [np.round(own * REFERENCES).astype(int) for own in self.laws]
        return ReferenceTable.build(
            (prompt, np.repeat(scores, n)) for prompt, scores, n in zip(PROMPTS, self.scores, counts, strict=True)
        )

    def quantiles(self) -> np.ndarray:
        """C(x, y): the probability of a lower score, and half that of the same."""
        below = self.scores[:, :, None] > self.scores[:, None, :]
        same = self.scores[:, :, None] == self.scores[:, None, :]
        return np.asarray(((below + same / 2) * self.laws[:, None, :]).sum(2))

    def optimum(self, beta: float) -> np.ndarray:
        """pi_ref(y) e^{Phi(C)/beta} / Z."""
        value = PHI[self.phi][1](self.quantiles()) / beta
        weight = self.laws * np.exp(value - value.max(1, keepdims=True))
        return np.asarray(weight / weight.sum(1, keepdims=True))

    def beta(self) -> float:
        """The beta at which the optimum's mean KL is the one that was asked for, by bisection."""
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.mean_kl(self.optimum(middle)) > self.kl else (low, middle)
        return low

    def mean_kl(self, laws: np.ndarray) -> float:
        """KL(laws || reference), the mean over prompts."""
        kept = np.where(laws > 0, laws, 1.0)
        return float((laws * np.log(kept / self.laws)).sum(1).mean())

    def distances(self, policy: Any, beta: float) -> np.ndarray:
        """The total variation between a model and the optimum, for each prompt."""
        laws = np.array([law(policy, prompt, self.length) for prompt in PROMPTS])
        return np.asarray(np.abs(laws - self.optimum(beta)).sum(1) / 2)
