"""Whether completions are what the model would write: their log-probabilities again, by a plain forward of each."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import torch
from torch import Tensor

from calibrated_rewards.models.parts import device_of, dtype_of, vocabulary
from calibrated_rewards.models.unread import reading_errors
from calibrated_rewards.samplers.drawing import ADVICE
from calibrated_rewards.samplers.rows import Reader, contiguous_input

logger = logging.getLogger(__name__)

# How many rows are compared, and how many of their tokens.
CHECKED_ROWS, CHECKED_TOKENS = 4, 8
# How far log-probabilities may be apart, in nats a token: small models are within 5e-6. 16 bits round by the shape of
# a batch: on a 135M Llama in bfloat16 that is 0.02, and after another prompt 3.
AGREEMENT, AGREEMENT_16_BIT = 1e-3, 0.2


@dataclass
class Route:
    """How rows go through the model: what comparisons with plain forwards have shown, once for each way."""

    shares: bool
    pads: bool = True
    caches: bool = True
    """Each token is read behind a cache; without one, it takes a reading of the whole row."""
    checked: set[tuple[bool, bool]] = field(default_factory=set)
    """(sharing, padded) that were compared."""

    def agrees(
        self, reader: Reader, prompts: Sequence[list[int]], of: Sequence[int], completions: Sequence[list[int]]
    ) -> bool:
        """Whether completions may stay, of which i follows prompts[of[i]]; if not, that way is not gone again."""
        padded = len({*map(len, prompts)}) > 1
        way = (self.shares, padded)
        # A completion of one token says nothing of what follows a token.
        chosen = sorted(range(len(of)), key=lambda i: -len(completions[i]))[:CHECKED_ROWS]
        chosen = [i for i in chosen if len(completions[i]) > 1]
        if way in self.checked or not chosen:
            return True
        # All of the prompts, for it is their padding that may disturb.
        gap = apart(reader, prompts, [of[i] for i in chosen], [completions[i][:CHECKED_TOKENS] for i in chosen])
        self.checked.add(way)
        return self.judged(gap, reader, padded)

    def judged(self, gap: float, reader: Reader, padded: bool) -> bool:
        """Whether a gap may be; if not, what may be its cause is not done again, and an error if nothing is left."""
        if gap <= _allowed(reader.model):  # nan agrees with nothing
            return True
        if self.fall_back(reader.model, f"gives log-probabilities {gap:.1e} apart", padded):
            return False
        name = type(reader.model).__name__
        if isnan(gap):
            raise FloatingPointError(
                f"the policy gives nan or no probabilities, {name} in {dtype_of(reader.model)}: {ADVICE}"
            )
        raise ValueError(_not_causal(name, gap))

    def fall_back(self, model: Any, trouble: str, padded: bool) -> bool:
        """Give up padding, then sharing, then the cache, and log it; False where there is nothing left to give up."""
        name = type(model).__name__
        if padded:
            logger.warning("%s %s in a padded batch: not padding", name, trouble)
            self.pads = False
        elif self.shares:
            logger.warning("%s %s behind a shared prompt: not sharing", name, trouble)
            self.shares = False
        elif self.caches:
            logger.warning("%s %s behind its cache: reading whole rows for each token, which is slow", name, trouble)
            self.caches = False
            self.checked.clear()
        else:
            return False
        return True


def check_causal(model: Any) -> None:
    """Refuse a model that does not read token ids alone, or is no causal language model, by a few made-up tokens."""
    few = min(32, vocabulary(model))
    ids = [i % few for i in range(3, 10)]
    gap = apart(Reader(model, share=False, caches=False), [ids[:4]], [0], [ids[4:]])
    if gap > _allowed(model):  # nan is for the first batch, which names its prompt
        raise ValueError(_not_causal(type(model).__name__, gap))


def _not_causal(name: str, gap: float) -> str:
    return (
        "a policy is a causal language model, whose probabilities depend on the tokens before and on nothing else; "
        f"those of {name} are {gap:.1e} nats a token apart when the same tokens are read one by one and as a whole: "
        "it reads in both directions, or draws random numbers. Give a model that was trained to continue text, or "
        "sample with a callable of yours that runs its generate"
    )


def _allowed(model: Any) -> float:
    # GPUs may be told to multiply float32 as if it had fewer bits.
    exact = torch.get_float32_matmul_precision() == "highest" and dtype_of(model) in (torch.float32, torch.float64)
    return AGREEMENT if exact else AGREEMENT_16_BIT


def apart(reader: Reader, prompts: Sequence[list[int]], of: Sequence[int], completions: Sequence[list[int]]) -> float:
    """The mean difference in nats a token, between rows read as the reader does and each row read alone and whole.

    Completion i follows prompts[of[i]]; halfway, half of the rows leave.
    """
    length = min(map(len, completions))
    tokens = torch.tensor([ids[:length] for ids in completions], device=device_of(reader.model))
    plain = [_plain(reader, prompts[at], ids[:length]) for at, ids in zip(of, completions, strict=True)]
    rows, members, gaps = reader.open(prompts, of), list(range(len(completions))), []
    for step in range(length):
        fed = tokens[members, step]
        found = _chosen(rows.logits, fed)
        gaps += [abs(float(found[at]) - float(plain[i][step])) for at, i in enumerate(members)]
        if reader.parts(rows) and step == length // 2 and len(members) > 1:
            keep = list(range(0, len(members), 2))
            rows, fed, members = reader.choose(rows, keep), fed[keep], members[::2]
        if step + 1 < length:
            rows = reader.next(rows, fed)
    return sum(gaps) / len(gaps)


def _plain(reader: Reader, prompt: list[int], completion: list[int]) -> Tensor:
    """The log-probability of each token of a completion, by forwards without a cache."""
    if not reader.pads:  # how it reads a token depends on the length of the whole
        parts = range(len(completion))
        return torch.cat([_forward(reader, prompt + completion[:i], completion[i : i + 1]) for i in parts])
    return _forward(reader, prompt, completion)


def _forward(reader: Reader, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion], device=device_of(reader.model))
    with contiguous_input(reader.model), reading_errors(reader.model, ids.shape[1] - 1):
        # The last token is not read: nothing is asked of what follows it.
        logits = reader.model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    return _chosen(logits, ids[0, len(prompt) :])


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, tokens.to(logits.device)[:, None])[:, 0]
