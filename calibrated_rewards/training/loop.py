"""What the plain loops share: prompts in turn, completions and their log-probabilities, the learning rate.

Completions are drawn with `model.generate` from the whole distribution at the temperature, as the references of the
table were: a KL to the reference policy is then what the objective says it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting as given
from calibrated_rewards.models.parts import device_of
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.samplers.policy import Draft, Policy

# What settings of a recipe may be at the least; rates are above 0.
LEAST = dict.fromkeys(("completions", "epochs", "minibatches", "prompts_a_step", "rows", "save_steps", "steps"), 1)
LEAST |= dict.fromkeys(("beta", "lora_layers", "lora_rank"), 0)


@dataclass(frozen=True)
class Episodes:
    """Completions: as text, and as tokens whose prompts are padded on the left, so that all begin in one column."""

    texts: list[str]
    ids: Int64[Tensor, "n T"]
    attention: Int64[Tensor, "n T"]
    mask: Bool[Tensor, "n L"]
    """Of the last L columns, which are the completion's: up to the token that ends it, and with it."""

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, rows: Sequence[int]) -> "Episodes":
        """Some of them."""
        return Episodes([self.texts[i] for i in rows], self.ids[rows], self.attention[rows], self.mask[rows])


@torch.no_grad()
def write(policy: Policy, prompts: Sequence[Prompt], each: int = 1) -> Episodes:
    """So many completions of each prompt, prompt after prompt; their text is what calibration would have scored."""
    rows, device, ends = policy.ids(prompts), device_of(policy.model), sorted(policy.endings.ids)
    longest = max(map(len, rows))
    # Any token will do for padding, for no mask is made of it: many models have none, or end with the one they have.
    pad = policy.tokenizer.pad_token_id if policy.tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    known = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    # All are said, because a checkpoint's generation_config may say otherwise.
    whole = {"do_sample": True, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "num_beams": 1}
    asked = {"max_new_tokens": policy.decoding.max_tokens, "temperature": policy.decoding.temperature}
    ids, known = ids.repeat_interleave(each, 0), known.repeat_interleave(each, 0)
    out = policy.model.generate(
        input_ids=ids, attention_mask=known, eos_token_id=ends or None, pad_token_id=pad, **whole, **asked
    )
    written = out[:, longest:]
    ended = torch.isin(written, torch.tensor(ends, dtype=written.dtype, device=device)).long()
    mask = ended.cumsum(1) - ended == 0
    return Episodes(texts(policy, written, mask), out, torch.cat([known, mask.long()], 1), mask)


def texts(policy: Policy, written: Int64[Tensor, "n L"], mask: Bool[Tensor, "n L"]) -> list[str]:
    """Completions as text, without the token that ended them: as a sampler gives them to the scorer."""
    drafts = [Draft(row[own].tolist()) for row, own in zip(written.cpu(), mask.cpu(), strict=True)]
    policy.endings.mark(drafts)
    return [str(rollout.completion) for rollout in policy.endings.rollouts(drafts)]


def read(model: Any, part: Episodes, temperature: float) -> tuple[Float32[Tensor, "n L"], Float32[Tensor, "n L H"]]:
    """The log-probability of each token of the completions, 0 in the padding, and the hidden state it is drawn from."""
    length = part.mask.shape[1]
    out = model(
        input_ids=part.ids,
        attention_mask=part.attention,
        position_ids=(part.attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=length + 1,
    )
    # The token in a column is drawn from what the model says one column before.
    logits = out.logits[:, -length - 1 : -1].float() / temperature
    chosen = part.ids[:, -length:, None]
    logprobs = logits.gather(2, chosen)[..., 0] - logits.logsumexp(2)
    return logprobs.masked_fill(~part.mask, 0.0), out.hidden_states[-1][:, -length - 1 : -1].float()


def parts(n: int, most: int) -> Iterator[list[int]]:
    """The numbers below n, at most so many together: what goes through the model at once.

    >>> [*parts(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    return (list(range(first, min(first + most, n))) for first in range(0, n, most))


@torch.no_grad()
def logprobs_of(model: Any, episodes: Episodes, temperature: float, most: int) -> Float32[Tensor, "n L"]:
    """The log-probability of each token of the completions, without gradients, `most` rows at once."""
    return torch.cat([read(model, episodes.at(at), temperature)[0] for at in parts(len(episodes), most)])


def turns(prompts: Sequence[Asked], n: int, seed: int) -> Iterator[list[Asked]]:
    """n prompts at a time, without end: each comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Asked] = []
    while True:
        while len(waiting) < n:
            waiting += [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
        turn, waiting = waiting[:n], waiting[n:]
        yield turn


def set_rate(optimizer: torch.optim.Optimizer, start: float, step: int, steps: int) -> float:
    """The learning rate of a step, which falls on a line to 0: the noise of the last steps is what stays."""
    rate = start * (1 - step / steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)
    return rate


def check_numbers(settings: Any) -> None:
    """ValueError for a number that no run can be made with, such as a learning rate that is none."""
    for each in fields(settings):
        name, value = each.name, getattr(settings, each.name)
        if name.endswith("lr") and not (isfinite(value) and value > 0):
            raise ValueError(Message(f"a run needs a finite {name} > 0, got {given(name, str(value))}"))
        if name in LEAST and not (isfinite(value) and value >= LEAST[name]):
            raise ValueError(Message(f"a run needs {name} >= {LEAST[name]}, got {given(name, str(value))}"))
        if value != value:
            raise ValueError(Message(f"a run needs {name} to be a number, got {given(name, str(value))}"))


def setting(default: Any, told: str, *choices: str) -> Any:
    """A field of a recipe's settings, what --help says of it, and what it may be, if that can be listed."""
    return field(default=default, metadata={"help": told, "choices": choices or None})
