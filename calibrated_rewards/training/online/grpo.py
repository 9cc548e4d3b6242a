"""GRPO in plain PyTorch, without what makes its optimum another one: groups of completions, a baseline, a gradient.

    python -m calibrated_rewards.training.online.grpo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

For each prompt a group of completions is drawn and scored; `CalibratedReward.from_scores` makes of the raw scores, a
row a prompt, what is to be maximised. From it goes beta times the log-ratio of policy and reference, summed over the
completion: the KL is part of the reward. What is left, less the mean of the group, says how much more likely a
completion shall be. That converges to pi_ref(y) e^{Phi(C)/beta} / Z.

It differs from GRPO as published in two things, and each of them changes what it converges to:
rewards are not divided by the group's standard deviation, which makes of beta another one for each prompt; and the KL
is in the reward, not a term of the loss, where beta would be off by G/(G-1) and tokens would have no credit for what
comes after them. From the paper (InfAlign-CTRL, algorithm 1), which uses PPO, it differs in that it needs no value
function.

All weights are trained, or LoRA adapters (--lora-rank 16 --lr 1e-4), below which the reference is. On several GPUs:
`accelerate launch --num_processes 4 -m calibrated_rewards.training.online.grpo ...`; each process draws for its own
prompts. --raw trains on the raw scores, for comparison.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting as given
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.training import launch as command, loop
from calibrated_rewards.training.loop import Episodes, setting
from calibrated_rewards.training.policy_model import reference_of, trainable
from calibrated_rewards.training.raw import RawReward
from calibrated_rewards.training.together import Together, learned


@dataclass(frozen=True)
class Settings:
    """What can be set; each is an option of the command."""

    beta: float = setting(0.1, "the strength of the KL: small is far from the reference")
    steps: int = setting(200, "updates of the policy, of new completions each")
    prompts_a_step: int = setting(8, "prompts of a step, of all processes together")
    completions: int = setting(8, "completions of a prompt, G: 2 or more")
    lr: float = setting(1e-6, "learning rate at the start; it falls to 0. LoRA wants more, such as 1e-4")
    lora_rank: int = setting(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_layers: int = setting(0, "the last so many layers that get adapters, to compute less; 0: all")
    epochs: int = setting(1, "updates with the same completions; more than 1 reuses them, with clipping")
    clip: float = setting(0.2, "how far the probability of a completion may go in a step of several epochs")
    baseline: str = setting("leave-one-out", "group-mean is (G-1)/G of the other", "leave-one-out", "group-mean")
    max_grad_norm: float = setting(1.0, "longer gradients are cut to this length")
    rows: int = setting(8, "completions that go through the model at once; memory, not the result")
    seed: int = setting(0, "of the prompts' order and the completions")

    def __post_init__(self) -> None:
        loop.check_numbers(self)
        if self.completions < 2:
            few = given("completions", str(self.completions))
            raise ValueError(Message(f"a baseline needs completions >= 2, got {few}"))
        if self.baseline not in ("leave-one-out", "group-mean"):
            raise ValueError(f"a baseline is 'leave-one-out' or 'group-mean', got {self.baseline!r}")


def train(
    policy: Policy,
    reward: CalibratedReward | RawReward,
    prompts: Sequence[Asked],
    settings: Settings,
    log: Callable[[Mapping[str, float]], None] = lambda row: None,
) -> Any:
    """Train the policy's model, in place; what it is now: itself, or with LoRA what has it and the adapters."""
    together = Together.here()
    together.check(settings.prompts_a_step)
    torch.manual_seed(settings.seed)
    # No dropout, also in updates: the policy that is trained is then the one that wrote.
    policy = replace(policy, model=trainable(policy.model, settings.lora_rank, settings.lora_layers).eval())
    reference = reference_of(policy.model)
    optimizer = torch.optim.AdamW(learned(policy.model), lr=settings.lr, weight_decay=0.0)
    turns = loop.turns(prompts, settings.prompts_a_step, settings.seed)
    together.seed(settings.seed)
    for step in tqdm(range(settings.steps), desc="grpo", unit=" steps", delay=3, disable=None):
        began = time.perf_counter()
        rate = loop.set_rate(optimizer, settings.lr, step, settings.steps)
        told = together.means(update(policy, reference, reward, optimizer, together.own(next(turns)), settings))
        if together.first:
            log({"step": step, "lr": rate, **told, "seconds": time.perf_counter() - began})
    return policy.model


def update(
    policy: Policy,
    reference: Any,
    reward: CalibratedReward | RawReward,
    optimizer: torch.optim.Optimizer,
    asked: Sequence[Asked],
    settings: Settings,
) -> dict[str, float]:
    """One step: write, score, take off the KL and the baseline, update; what there is to say of it."""
    temperature = policy.decoding.temperature
    episodes = loop.write(policy, [each.prompt for each in asked], settings.completions)
    old, ref = (loop.logprobs_of(m, episodes, temperature, settings.rows) for m in (policy.model, reference))
    kl = (old - ref).sum(1)
    began = time.perf_counter()
    raw, value, u = scored(reward, asked, episodes, settings.completions)
    scoring = time.perf_counter() - began
    value = value.to(kl.device)
    penalised = value - settings.beta * kl.view_as(value)
    advantage = advantages(penalised, settings.baseline).flatten()
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        accumulate(policy, episodes, old, advantage, settings)
        Together.here().average(optimizer)
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), settings.max_grad_norm)
        optimizer.step()
    means = {"reward": value, "raw": raw, "kl": kl, "objective": penalised, "tokens": episodes.mask.sum(1).float()}
    return {**{name: float(each.mean()) for name, each in means.items()}, "u": u, "seconds_scoring": scoring}


def accumulate(
    policy: Policy,
    episodes: Episodes,
    old: Float32[Tensor, "n L"],
    advantage: Float32[Tensor, " n"],
    settings: Settings,
) -> None:
    """Add up the gradient of the mean loss, so many completions at once."""
    for at in loop.parts(len(episodes), settings.rows):
        new, _hidden = loop.read(policy.model, episodes.at(at), policy.decoding.temperature)
        loss = losses(new, old[at], advantage[at], settings.clip).sum() / len(episodes)
        torch.autograd.backward(loss)


def scored(
    reward: CalibratedReward | RawReward, asked: Sequence[Asked], episodes: Episodes, completions: int
) -> tuple[Float32[Tensor, "P G"], Float32[Tensor, "P G"], float]:
    """The raw scores, what the calibrated reward makes of them, and the mean quantile, of what the table knows."""
    prompts, ids = [each.prompt for each in asked], [each.id for each in asked]
    raw = reward.raw([prompt for prompt in prompts for _ in range(completions)], episodes.texts)
    table = torch.from_numpy(raw).view(len(asked), completions)
    rows = reward.rows(prompts, ids)
    known = rows >= 0
    u = reward.table.cdf(rows[known], table.numpy()[known])
    return table, reward.from_scores(prompts, table, ids).float(), float(u.mean()) if known.any() else 0.5


def advantages(rewards: Float32[Tensor, "P G"], baseline: str = "leave-one-out") -> Float32[Tensor, "P G"]:
    """Rewards less the mean of the others of their group (leave-one-out), or of all of it, which is (G-1)/G of that.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.5]]))
    tensor([[ 0.7500, -0.7500,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    size = rewards.shape[1]
    return centred * size / (size - 1) if baseline == "leave-one-out" else centred


def losses(
    new: Float32[Tensor, "n L"], old: Float32[Tensor, "n L"], advantage: Float32[Tensor, " n"], clip: float
) -> Float32[Tensor, " n"]:
    """What is minimised, for each completion: its clipped ratio of now to then, times the advantage, negative."""
    ratio = (new - old).sum(1).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main(str(__doc__), Settings, train, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
