"""What the plain loops share: prompts in turn, completions and their log-probabilities, options, the log.

Completions are drawn with `model.generate` from the whole distribution at the temperature, as the references of the
table were: a KL to the reference policy is then what the objective says it is.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reading.body import device_of
from calibrated_rewards.reading.text import Text
from calibrated_rewards.reward import CalibratedReward
from calibrated_rewards.rollouts.sources import Asked, prompts_from
from calibrated_rewards.samplers.decoding import Decoding
from calibrated_rewards.samplers.endings import Draft
from calibrated_rewards.samplers.policy import Policy

S = TypeVar("S")
# What draws from another distribution than softmax(logits / temperature), where the KL would mean something else.
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": []}


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


def setting(default: Any, told: str) -> Any:
    """A field of a recipe's settings, and what --help says of it."""
    return field(default=default, metadata={"help": told})


def add_arguments(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """The options of a recipe: what it is made of, and a line for each of its settings."""
    parser.add_argument("--policy", required=True, metavar="PATH|ID", help="the policy that the table is of")
    parser.add_argument("--reward", required=True, metavar="DIR|ID", help="a CalibratedReward that was saved")
    parser.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help="JSONL or what else calibrate reads")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for model/ and log.jsonl")
    parser.add_argument("--column", help="the column of the prompts, where it is not what TRL would read")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a completion; the table's, if nothing is said")
    parser.add_argument("--temperature", type=float, metavar="T", help="the table's, if nothing is said")
    parser.add_argument("--dtype", default="float32", help="(%(default)s) in bfloat16 small steps are rounded away")
    parser.add_argument("--device", help="a GPU if there is one")
    for each in fields(settings):
        if each.default is MISSING:
            raise TypeError(f"settings of a recipe have defaults, got {each.name} without one")
        name, told = f"--{each.name.replace('_', '-')}", f"{each.metadata['help']} (%(default)s)"
        parser.add_argument(name, type=type(each.default), default=each.default, help=told, **_choice(each.metadata))


def _choice(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"choices": metadata["choices"]} if "choices" in metadata else {"metavar": "X"}


def settings_of(options: argparse.Namespace, settings: type[S]) -> S:
    """The settings that were given."""
    names = [each.name for each in fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(options, name) for name in names})


def decoding_of(meta: Mapping[str, Any], max_tokens: int | None, temperature: float | None) -> Decoding:
    """How the references of a table were drawn, with what was said here instead; ValueError if it cannot be done so.

    >>> decoding_of({"sampler": {"decoding": {"max_tokens": 64, "temperature": 0.8, "top_p": 1.0}}}, None, None)
    Decoding(max_tokens=64, temperature=0.8, top_p=1.0, ...)
    """
    drawn = dict((meta.get("sampler") or {}).get("decoding") or {})
    bent = {name: drawn[name] for name, off in PLAIN.items() if name in drawn and drawn[name] != off}
    if bent:
        raise ValueError(
            f"the plain loops draw from the whole distribution, the table's references were drawn with {bent}: "
            "calibrate again without, or KL and quantiles are of another policy than the one that is trained"
        )
    length = max_tokens or drawn.get("max_tokens")
    if length is None:
        raise ValueError("the table does not say how its references were drawn: say --max-tokens")
    return Decoding(length, drawn.get("temperature", 1.0) if temperature is None else temperature)


def opened(options: argparse.Namespace) -> tuple[Policy, CalibratedReward, list[Asked]]:
    """What a recipe is made of: the policy, the reward, which is verified first, and the prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reward = CalibratedReward.from_pretrained(options.reward)
    reward.verify()
    decoding = decoding_of(reward.table.meta, options.max_tokens, options.temperature)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(options.policy, dtype=options.dtype)
    policy = Policy(model.to(device), AutoTokenizer.from_pretrained(options.policy), decoding, Text())
    asked = list(prompts_from(options.prompts, column=options.column, id_column=reward.id_column))
    policy.check([each.prompt for each in asked])
    return policy, reward, asked


def run(options: argparse.Namespace, settings: type[S], train: Callable[..., None]) -> None:
    """Open, train, save: the model that came out, its tokenizer, and a line of log for each step."""
    policy, reward, asked = opened(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "log.jsonl").open("w") as file:

        def log(row: Mapping[str, float]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        train(policy, reward, asked, settings_of(options, settings), log)
    policy.model.save_pretrained(options.out / "model")
    policy.tokenizer.save_pretrained(options.out / "model")
