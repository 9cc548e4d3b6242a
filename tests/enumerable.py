"""A language model that can be enumerated: each completion of a few tokens, its probability, and the exact optimum.

The targets are written in numpy, with nothing of ours but the table: Phi is spelled out again in `PHI`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from calibrated_rewards.table import ReferenceTable
from calibrated_rewards.testing import HashScorer
from calibrated_rewards.transforms import Exponential, Identity, Log, Transform

END, LETTERS = 0, "abcdefg"
VOCABULARY = 1 + len(LETTERS)
PROMPTS = ["a", "bc", "d", "efg"]
REFERENCES = 20_000
# On the unit scale: Exponential's range is [0, 1], as Identity's; Log stays.
PHI: dict[str, tuple[Transform, Callable[[np.ndarray], np.ndarray]]] = {
    "identity": (Identity(), lambda u: u),
    "log": (Log(), np.log),
    "exp:10": (Exponential(10.0), lambda u: np.expm1(10 * u) / np.expm1(10.0)),
}


def tokenizer() -> Any:
    """A token a letter, and the one that ends a completion, which is the padding too."""
    vocabulary = {"</s>": END, **{letter: i for i, letter in enumerate(LETTERS, 1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


class Tabular(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model with its own logits after each prompt and beginning: it can be any law exactly.

    Its hidden state is the unit vector of the context, so that a linear value is exact as well.
    """

    config_class = PretrainedConfig

    def __init__(self, length: int, seed: int = 0, skew: float = 1.5) -> None:
        openings = [tuple(1 + LETTERS.index(letter) for letter in prompt) for prompt in PROMPTS]
        begun = [ids for n in range(length) for ids in itertools.product(range(1, VOCABULARY), repeat=n)]
        codes = sorted({code((*opening, *ids)) for opening in openings for ids in begun})
        sizes = {"hidden_size": len(codes), "vocab_size": VOCABULARY, "num_hidden_layers": 1}
        super().__init__(PretrainedConfig(**sizes, eos_token_id=END))
        self.generation_config.use_cache = False
        self.register_buffer("codes", torch.tensor(codes))
        self.letters = nn.Embedding(VOCABULARY, 1)
        self.table = nn.Embedding(len(codes), VOCABULARY)
        with torch.no_grad():
            self.table.weight.normal_(std=skew, generator=torch.Generator().manual_seed(seed))

    def get_input_embeddings(self) -> nn.Module:
        """What says how many tokens there are."""
        return self.letters

    def get_output_embeddings(self) -> nn.Module:
        """The logits."""
        return self.table

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> CausalLMOutputWithPast:
        """The logits after each token."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = [torch.zeros_like(input_ids[:, 0])]
        for ids, told in zip(input_ids.T, mask.T, strict=True):
            states.append(torch.where(told.bool(), states[-1] * VOCABULARY + ids, states[-1]))
        found = torch.searchsorted(self.codes, torch.stack(states[1:], 1)).clamp(max=len(self.codes) - 1)
        hidden = nn.functional.one_hot(found, len(self.codes)).float()
        return CausalLMOutputWithPast(logits=self.table(found), hidden_states=(hidden,))

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        """All tokens, each time: it has no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def code(ids: tuple[int, ...]) -> int:
    """A context as a number."""
    return sum(token * VOCABULARY**place for place, token in enumerate(reversed(ids)))


def completions(length: int) -> list[tuple[int, ...]]:
    """All completions of at most so many tokens: those that end, and those that are cut."""
    letters = range(1, VOCABULARY)
    ended = [(*own, END) for n in range(length) for own in itertools.product(letters, repeat=n)]
    return ended + list(itertools.product(letters, repeat=length))


def text(ids: tuple[int, ...]) -> str:
    """A completion as text."""
    return "".join(LETTERS[i - 1] for i in ids if i != END)


@dataclass(frozen=True)
class TiedScorer:
    """Scores in steps of a half, so that many are alike."""

    def __call__(self, prompts: Any, completions: Any, /) -> np.ndarray:
        """A score for each pair."""
        return np.round(2 * HashScorer()(prompts, completions)).astype(np.float32) / 2


@torch.no_grad()
def law(policy: Any, prompt: str, length: int) -> np.ndarray:
    """The probability of each completion, by one plain forward for each, without padding."""
    opening = [1 + LETTERS.index(letter) for letter in prompt]
    found = []
    for ids in completions(length):
        logits = policy(torch.tensor([[*opening, *ids]])).logits[0].double().log_softmax(-1)
        found.append(sum(float(logits[len(opening) + t - 1, token]) for t, token in enumerate(ids)))
    return np.exp(found)


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
