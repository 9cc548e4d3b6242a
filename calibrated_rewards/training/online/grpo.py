"""GRPO in plain PyTorch, with an exact optimum: groups of completions, a baseline, one gradient, the KL in the reward.

    calibrated-rewards train grpo --plain --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

For each prompt a group of completions is drawn and scored, and the calibrated reward turns the raw scores into rewards.
From each reward goes beta times the log-ratio of policy and reference, summed over the completion: the KL is part of
the reward. That, less the mean of the group, says how much more likely the completion shall be. It converges to
pi_ref(y) e^{Phi(C)/beta} / Z.

It differs from GRPO as published in two things, each of which changes the optimum: rewards are not divided by the
group's standard deviation, which would make beta another one for each prompt; and the KL is in the reward, not in the
loss, where beta would be off by G/(G-1) and tokens would get no credit for what comes after them. It differs from the
paper's algorithm (InfAlign-CTRL, algorithm 1), which is PPO, in that it needs no value function.

All weights are trained, or LoRA adapters (--lora-rank 16 --lr 1e-4), below which the reference is. On several GPUs:
`accelerate launch --num_processes 4 -m calibrated_rewards train grpo --plain ...`; each process draws for its own
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
from calibrated_rewards.files import Message, setting
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.training import loop
from calibrated_rewards.training.launch import Launch, check_numbers, option
from calibrated_rewards.training.loop import Episodes, build_reference, list_trainable, prepare_model


@dataclass(frozen=True)
class GRPOSettings:
    """Settings of the run; each is an option of the command."""

    beta: float = option(0.1, "the strength of the KL: small is far from the reference")
    steps: int = option(200, "updates of the policy, of new completions each")
    prompts_a_step: int = option(8, "prompts of a step, of all processes together")
    completions: int = option(8, "completions of a prompt, G: 2 or more")
    lr: float = option(1e-6, "learning rate at the start; it falls to 0. LoRA wants more, such as 1e-4")
    lora_rank: int = option(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_layers: int = option(0, "the last so many layers that get adapters, to compute less; 0: all")
    epochs: int = option(1, "updates with the same completions; more than 1 reuses them, with clipping")
    clip: float = option(0.2, "how far the probability of a completion may go in a step of several epochs")
    baseline: str = option("leave-one-out", "group-mean is (G-1)/G of the other", "leave-one-out", "group-mean")
    max_grad_norm: float = option(1.0, "longer gradients are cut to this length")
    rows: int = option(8, "completions that go through the model at once; memory, not the result")
    seed: int = option(0, "of the prompts' order and the completions")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.completions < 2:
            number = setting("completions", str(self.completions))
            raise ValueError(Message(f"a baseline needs completions >= 2, got {number}"))
        if self.baseline not in ("leave-one-out", "group-mean"):
            raise ValueError(f"a baseline is 'leave-one-out' or 'group-mean', got {self.baseline!r}")

    @property
    def completions_a_step(self) -> int:
        """Completions of a step, of all processes together."""
        return self.prompts_a_step * self.completions


def run(launch: Launch, settings: GRPOSettings) -> None:
    """Train from files to files, as the command does."""
    loop.run_in_folder("grpo_plain", train, launch, settings)


def train(
    policy: Policy,
    reward: CalibratedReward,
    prompts: Sequence[Asked],
    settings: GRPOSettings,
    log: Callable[[Mapping[str, float]], None] = lambda row: None,
    reference: Any = None,
) -> Any:
    """Train the policy's model in place, and return it; with LoRA, the model with its adapters.

    `reference` is the frozen model that the KL is to; None for the policy as it is now.
    """
    processes = loop.find_processes()
    loop.check_shares(settings.prompts_a_step, processes.num_processes)
    torch.manual_seed(settings.seed)
    # No dropout, also in updates: the policy that is trained is then the one that wrote.
    policy = replace(policy, model=prepare_model(policy.model, settings.lora_rank, settings.lora_layers).eval())
    reference = build_reference(policy.model) if reference is None else reference
    optimizer = torch.optim.AdamW(list_trainable(policy.model), lr=settings.lr, weight_decay=0.0)
    batches = loop.iterate_batches(prompts, settings.prompts_a_step, settings.seed)
    loop.seed_process(settings.seed)
    for step in tqdm(range(settings.steps), desc="grpo", unit=" steps", delay=3, disable=None):
        start = time.perf_counter()
        rate = loop.set_learning_rate(optimizer, settings.lr, step, settings.steps)
        share = next(batches)[processes.process_index :: processes.num_processes]
        metrics = loop.average_metrics(take_step(policy, reference, reward, optimizer, share, settings))
        if processes.is_main_process:
            log({"step": step, "lr": rate, **metrics, "seconds": time.perf_counter() - start})
    return policy.model


def take_step(
    policy: Policy,
    reference: Any,
    reward: CalibratedReward,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Asked],
    settings: GRPOSettings,
) -> dict[str, float]:
    """Do one step: draw, score, take off the KL and the baseline, update; return the step's metrics."""
    temperature = policy.decoding.temperature
    episodes = loop.generate(policy, [each.prompt for each in prompts], settings.completions)
    old, ref = (
        loop.compute_logprobs(model, episodes, temperature, settings.rows) for model in (policy.model, reference)
    )
    kl = (old - ref).sum(1)
    start = time.perf_counter()
    raw, rewards, u = score(reward, prompts, episodes, settings.completions)
    seconds = time.perf_counter() - start
    rewards = rewards.to(kl.device)
    penalised = rewards - settings.beta * kl.view_as(rewards)
    advantages = compute_advantages(penalised, settings.baseline).flatten()
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        accumulate_gradients(policy, episodes, old, advantages, settings)
        loop.average_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), settings.max_grad_norm)
        optimizer.step()
    means = {"reward": rewards, "raw": raw, "kl": kl, "objective": penalised, "tokens": episodes.mask.sum(1).float()}
    return {**{name: float(each.mean()) for name, each in means.items()}, "u": u, "seconds_scoring": seconds}


def score(
    reward: CalibratedReward, prompts: Sequence[Asked], episodes: Episodes, completions: int
) -> tuple[Float32[Tensor, "P G"], Float32[Tensor, "P G"], float]:
    """Return the raw scores, the rewards, and the mean quantile over the prompts that the table knows."""
    texts, ids = [each.prompt for each in prompts], [each.id for each in prompts]
    raw = reward.raw([text for text in texts for _ in range(completions)], episodes.texts)
    scores = torch.from_numpy(raw).view(len(prompts), completions)
    rows = reward.rows(texts, ids)
    in_table = rows >= 0
    u = reward.table.cdf(rows[in_table], scores.numpy()[in_table])
    return scores, reward.from_scores(texts, scores, ids).float(), float(u.mean()) if in_table.any() else 0.5


def compute_advantages(rewards: Float32[Tensor, "P G"], baseline: str = "leave-one-out") -> Float32[Tensor, "P G"]:
    """Subtract the mean of the others of a group (leave-one-out), or of all of it, which gives (G-1)/G of that.

    >>> compute_advantages(torch.tensor([[1.0, 0.0, 0.5]]))
    tensor([[ 0.7500, -0.7500,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    size = rewards.shape[1]
    return centred * size / (size - 1) if baseline == "leave-one-out" else centred


def accumulate_gradients(
    policy: Policy,
    episodes: Episodes,
    old: Float32[Tensor, "n L"],
    advantages: Float32[Tensor, " n"],
    settings: GRPOSettings,
) -> None:
    """Add up the gradient of the mean loss, so many completions at once."""
    for rows in loop.split_rows(len(episodes), settings.rows):
        new, _hidden = loop.forward(policy.model, episodes.take(rows), policy.decoding.temperature)
        loss = compute_losses(new, old[rows], advantages[rows], settings.clip).sum() / len(episodes)
        torch.autograd.backward(loss)


def compute_losses(
    new: Float32[Tensor, "n L"], old: Float32[Tensor, "n L"], advantages: Float32[Tensor, " n"], clip: float
) -> Float32[Tensor, " n"]:
    """Compute each completion's loss: its clipped ratio of new to old probability, times the advantage, negative."""
    ratio = (new - old).sum(1).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
