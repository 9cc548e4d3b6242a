"""PPO in plain PyTorch: a policy, a value head, GAE, the KL to the reference in the reward of each token, clipping.

    calibrated-rewards train ppo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

This is the paper's algorithm (InfAlign-CTRL, algorithm 1). The reward of a completion is the calibrated reward, paid at
its last token; each token pays beta times its log-ratio of policy and reference. With the defaults it converges to
pi_ref(y) e^{Phi(C)/beta} / Z.

It differs from PPO as usually set (benchmarks/plain_loops.py changes one thing at a time): lambda is 1, for with less
the errors of a value function that lags behind stay in the advantages; tokens are summed, not averaged, so that long
completions count as the objective says; advantages are not whitened, though that only changes the size of the steps,
since the KL is whitened with them. The value head is linear, reads the policy's last hidden state and does not train
it.

All weights are trained, or LoRA adapters (--lora-rank 16 --lr 1e-4), below which the reference is. On several GPUs:
`accelerate launch --num_processes 4 -m calibrated_rewards train ppo ...`; each process draws for its own prompts. --raw
trains on the raw scores, for comparison.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn
from tqdm import tqdm

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.training import loop
from calibrated_rewards.training.launch import Launch, check_numbers, option
from calibrated_rewards.training.loop import Episodes, build_reference, list_trainable, prepare_model


@dataclass(frozen=True)
class PPOSettings:
    """Settings of the run; each is an option of the command."""

    beta: float = option(0.1, "the strength of the KL: small is far from the reference")
    steps: int = option(200, "rounds of new completions")
    completions: int = option(64, "completions of a round, of all processes together")
    prompts_a_step: int = option(32, "their distinct prompts; completions is a multiple of it")
    lr: float = option(1e-6, "learning rate of the policy at the start; it falls to 0. LoRA wants more, such as 1e-4")
    lora_rank: int = option(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_layers: int = option(0, "the last so many layers that get adapters, to compute less; 0: all")
    value_lr: float = option(1e-3, "learning rate of the value head at the start; it falls to 0")
    epochs: int = option(2, "passes over the completions of a round")
    minibatches: int = option(1, "updates in a pass")
    clip: float = option(0.2, "how far a token's probability may go from the one that it was drawn with")
    lam: float = option(1.0, "lambda of GAE; below 1 there is less noise, and the value's errors stay")
    whiten: str = option("no", "what is done to the advantages of a round", "no", "centre", "scale")
    max_grad_norm: float = option(1.0, "longer gradients are cut to this length")
    rows: int = option(8, "completions that go through the model at once; memory, not the result")
    seed: int = option(0, "of the prompts' order and the completions")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.whiten not in ("no", "centre", "scale"):
            raise ValueError(f"advantages are whitened by 'no', 'centre' or 'scale', got {self.whiten!r}")
        if self.completions % self.prompts_a_step:
            raise ValueError(
                Message(
                    "a run needs completions to be a multiple of its prompts a step, got "
                    f"{setting('completions', str(self.completions))} and "
                    f"{setting('prompts_a_step', str(self.prompts_a_step))}"
                )
            )

    @property
    def completions_a_step(self) -> int:
        """Completions of a step, of all processes together."""
        return self.completions


def run(launch: Launch, settings: PPOSettings) -> None:
    """Train from files to files, as the command does."""
    loop.run_in_folder("ppo", train, launch, settings)


def train(
    policy: Policy,
    reward: CalibratedReward,
    prompts: Sequence[Asked],
    settings: PPOSettings,
    log: Callable[[Mapping[str, float]], None] = lambda row: None,
    reference: Any = None,
) -> Any:
    """Train the policy's model in place, and return it; with LoRA, the model with its adapters.

    `reference` is the frozen model that the KL is to; None for the policy as it is now.
    """
    processes = loop.find_processes()
    loop.check_shares(settings.prompts_a_step, processes.num_processes)
    if processes.num_processes > 1 and settings.whiten != "no":
        raise ValueError(f"whitening is over all completions of a round, and of one process, got {settings.whiten!r}")
    torch.manual_seed(settings.seed)
    learner = Learner.of(policy, settings, reference)
    batches = loop.iterate_batches(prompts, settings.prompts_a_step, settings.seed)
    loop.seed_process(settings.seed)
    for step in tqdm(range(settings.steps), desc="ppo", unit=" steps", delay=3, disable=None):
        start = time.perf_counter()
        rate = loop.set_learning_rate(learner.optimizer, settings.lr, step, settings.steps)
        share = next(batches)[processes.process_index :: processes.num_processes]
        metrics = loop.average_metrics(take_step(learner, reward, share, settings))
        if processes.is_main_process:
            log({"step": step, "lr": rate, **metrics, "seconds": time.perf_counter() - start})
    return learner.policy.model


@dataclass(frozen=True, eq=False)
class Learner:
    """The policy and its value head, which are trained by one optimizer, and the reference, which is not."""

    policy: Policy
    reference: Any
    head: nn.Linear
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, policy: Policy, settings: PPOSettings, reference: Any = None) -> "Learner":
        """Make a learner at its start: the reference is the policy if none is given, and the value is 0 everywhere."""
        # No dropout, also in updates: the policy that is trained is then the one that wrote.
        model = prepare_model(policy.model, settings.lora_rank, settings.lora_layers).eval()
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        groups: list[dict[str, Any]] = [
            {"params": list_trainable(model)},
            {"params": list(head.parameters()), "times": settings.value_lr / settings.lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
        reference = build_reference(model) if reference is None else reference
        return cls(replace(policy, model=model), reference, head, optimizer)

    def forward(self, episodes: Episodes) -> tuple[Float32[Tensor, "n L"], Float32[Tensor, "n L"]]:
        """Compute each token's log-probability, and the value of what stands before it; both 0 in the padding."""
        logprobs, hidden = loop.forward(self.policy.model, episodes, self.policy.decoding.temperature)
        # Detached: the value is fitted to the policy, and does not bend it.
        return logprobs, self.head(hidden.detach())[..., 0].masked_fill(~episodes.mask, 0.0)


def take_step(
    learner: Learner, reward: CalibratedReward, prompts: Sequence[Asked], settings: PPOSettings
) -> dict[str, float]:
    """Do one round: draw, score, share the rewards out among the tokens, update; return the round's metrics."""
    each = settings.completions // settings.prompts_a_step
    episodes = loop.generate(learner.policy, [one.prompt for one in prompts], each)
    with torch.no_grad():
        parts = [learner.forward(episodes.take(rows)) for rows in loop.split_rows(len(episodes), settings.rows)]
    old, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    ref = loop.compute_logprobs(learner.reference, episodes, learner.policy.decoding.temperature, settings.rows)
    start = time.perf_counter()
    logged: dict[str, float] = {}
    rewards = score(reward, [one for one in prompts for _ in range(each)], episodes, logged).to(old.device)
    seconds = time.perf_counter() - start
    token_rewards = share_rewards(rewards, old - ref, episodes.mask, settings.beta)
    gains = estimate_advantages(token_rewards, values, episodes.mask, settings.lam)
    advantages = whiten(gains, episodes.mask, settings.whiten)
    value_loss = fit(learner, episodes, old, advantages, gains + values, settings)
    kl = (old - ref).sum(1).mean()
    means = {"reward": rewards.mean(), "kl": kl, "objective": rewards.mean() - settings.beta * kl}
    means["tokens"] = episodes.mask.sum(1).float().mean()
    metrics = {name: float(mean) for name, mean in means.items()}
    metrics |= {name: logged.pop(f"{reward.metric_prefix}/{name}") for name in ("u", "raw")}
    return {**logged, **metrics, "value_loss": value_loss, "seconds_scoring": seconds}


def score(
    reward: CalibratedReward, prompts: Sequence[Asked], episodes: Episodes, metrics: dict[str, float]
) -> Float32[Tensor, " n"]:
    """Compute the reward of each completion by the call that trainers make, which fills in the metrics."""
    columns: dict[str, Any] = {reward.id_column: [one.id for one in prompts]} if reward.id_column else {}
    rewards = reward([one.prompt for one in prompts], episodes.texts, log_metric=metrics.__setitem__, **columns)
    if None in rewards:
        raise ValueError("PPO needs a reward for each completion, got None: on_missing='neutral' gives one, not 'skip'")
    return torch.tensor(rewards, dtype=torch.float32)


def share_rewards(
    rewards: Float32[Tensor, " n"], log_ratio: Float32[Tensor, "n L"], mask: Bool[Tensor, "n L"], beta: float
) -> Float32[Tensor, "n L"]:
    """Give each token minus beta times its log-ratio to the reference, and the last one the completion's reward too.

    >>> share_rewards(torch.tensor([1.0]), torch.tensor([[0.5, -0.5, 0.0]]), torch.tensor([[True, True, False]]), 0.2)
    tensor([[-0.1000,  1.1000,  0.0000]])
    """
    shares = -beta * log_ratio
    last = mask.sum(1) - 1
    shares[torch.arange(len(last), device=last.device), last] += rewards
    return shares.masked_fill(~mask, 0.0)


def estimate_advantages(
    rewards: Float32[Tensor, "n L"], values: Float32[Tensor, "n L"], mask: Bool[Tensor, "n L"], lam: float
) -> Float32[Tensor, "n L"]:
    """Estimate advantages by GAE, undiscounted: sum_k lam^k (r_{t+k} + V_{t+k+1} - V_{t+k}), V = 0 after the end.

    >>> estimate_advantages(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.6]]), torch.tensor([[True, True]]), 1.0)
    tensor([[0.7000, 0.4000]])
    """
    after = nn.functional.pad(values, (0, 1))[:, 1:]
    surprise = (rewards + after - values).masked_fill(~mask, 0.0)
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = surprise[:, t] + lam * running
        advantages[:, t] = running
    return advantages.masked_fill(~mask, 0.0)


def whiten(advantages: Float32[Tensor, "n L"], mask: Bool[Tensor, "n L"], how: str) -> Float32[Tensor, "n L"]:
    """Subtract the mean over all tokens ("centre"), and divide by the deviation too ("scale"), or do neither ("no").

    >>> whiten(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, True, False]]), "centre")
    tensor([[-1.,  1.,  0.]])
    """
    if how == "no":
        return advantages
    tokens = advantages[mask]
    scale = tokens.std(correction=0) + 1e-8 if how == "scale" else 1.0
    return ((advantages - tokens.mean()) / scale).masked_fill(~mask, 0.0)


def fit(
    learner: Learner,
    episodes: Episodes,
    old: Float32[Tensor, "n L"],
    advantages: Float32[Tensor, "n L"],
    returns: Float32[Tensor, "n L"],
    settings: PPOSettings,
) -> float:
    """Update policy and value head, in several passes over shuffled parts; return the last value loss."""
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(episodes)).chunk(settings.minibatches):
            learner.optimizer.zero_grad()
            total = 0.0
            for rows in (batch[part] for part in loop.split_rows(len(batch), settings.rows)):
                part = episodes.take(rows.tolist())
                new, values = learner.forward(part)
                value_loss = ((values - returns[rows]) ** 2)[part.mask].sum() / len(batch)
                policy_loss = compute_losses(new, old[rows], advantages[rows], settings.clip).sum() / len(batch)
                torch.autograd.backward(policy_loss + value_loss)
                total += float(value_loss.detach())
            loop.average_gradients(learner.optimizer)
            nn.utils.clip_grad_norm_(learner.policy.model.parameters(), settings.max_grad_norm)
            learner.optimizer.step()
    return total


def compute_losses(
    new: Float32[Tensor, "n L"], old: Float32[Tensor, "n L"], advantages: Float32[Tensor, "n L"], clip: float
) -> Float32[Tensor, "n L"]:
    """Compute each token's loss: its clipped ratio of new to old probability, times the advantage, negative."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
