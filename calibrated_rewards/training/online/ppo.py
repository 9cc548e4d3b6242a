"""PPO in plain PyTorch: a policy, a value head, GAE, the KL to the reference in the reward of each token, clipping.

    python -m calibrated_rewards.training.online.ppo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

The algorithm of the paper (InfAlign-CTRL, algorithm 1): the reward of a completion is what `CalibratedReward` gives,
paid at its last token; each token pays beta times its log-ratio of policy and reference. With the defaults that
converges to pi_ref(y) e^{Phi(C)/beta} / Z.

It differs from PPO as usually set (benchmarks/plain_loops.py changes one thing at a time): lambda is 1, for with less
the errors of a value function that lags behind stay in the advantages; tokens are summed, not averaged, so that long
completions count as the objective says; advantages are not whitened, though that only changes the size of the steps,
since the KL is whitened with them. The value head is linear, reads the policy's last hidden state and does not train
it.

All weights are trained, or LoRA adapters (--lora-rank 16 --lr 1e-4), below which the reference is. On several GPUs:
`accelerate launch --num_processes 4 -m calibrated_rewards.training.online.ppo ...`; each process draws for its
own prompts. --raw trains on the raw scores, for comparison.
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
    steps: int = setting(200, "rounds of new completions")
    completions: int = setting(64, "completions of a round, of all processes together")
    prompts_a_step: int = setting(32, "their distinct prompts; completions is a multiple of it")
    lr: float = setting(1e-6, "learning rate of the policy at the start; it falls to 0. LoRA wants more, such as 1e-4")
    lora_rank: int = setting(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_layers: int = setting(0, "the last so many layers that get adapters, to compute less; 0: all")
    value_lr: float = setting(1e-3, "learning rate of the value head at the start; it falls to 0")
    epochs: int = setting(2, "passes over the completions of a round")
    minibatches: int = setting(1, "updates in a pass")
    clip: float = setting(0.2, "how far a token's probability may go from the one that it was drawn with")
    lam: float = setting(1.0, "lambda of GAE; below 1 there is less noise, and the value's errors stay")
    whiten: str = setting("no", "what is done to the advantages of a round", "no", "centre", "scale")
    max_grad_norm: float = setting(1.0, "longer gradients are cut to this length")
    rows: int = setting(8, "completions that go through the model at once; memory, not the result")
    seed: int = setting(0, "of the prompts' order and the completions")

    def __post_init__(self) -> None:
        loop.check_numbers(self)
        if self.whiten not in ("no", "centre", "scale"):
            raise ValueError(f"advantages are whitened by 'no', 'centre' or 'scale', got {self.whiten!r}")
        if self.completions % self.prompts_a_step:
            raise ValueError(
                Message(
                    "a run needs completions to be a multiple of its prompts a step, got "
                    f"{given('completions', str(self.completions))} and "
                    f"{given('prompts_a_step', str(self.prompts_a_step))}"
                )
            )


@dataclass(frozen=True, eq=False)
class Learner:
    """What is trained, and what stays: the policy, its value head, the reference, and the two optimisers in one."""

    policy: Policy
    reference: Any
    head: nn.Linear
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, policy: Policy, settings: Settings) -> "Learner":
        """A learner at its start: the reference is the policy, and the value is 0 everywhere."""
        # No dropout, also in updates: the policy that is trained is then the one that wrote.
        model = trainable(policy.model, settings.lora_rank, settings.lora_layers).eval()
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        groups: list[dict[str, Any]] = [
            {"params": learned(model)},
            {"params": list(head.parameters()), "times": settings.value_lr / settings.lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
        return cls(replace(policy, model=model), reference_of(model), head, optimizer)

    def read(self, part: Episodes) -> tuple[Float32[Tensor, "n L"], Float32[Tensor, "n L"]]:
        """The log-probability of each token, and the value of what stands before it; both 0 in the padding."""
        logprobs, hidden = loop.read(self.policy.model, part, self.policy.decoding.temperature)
        # Detached: the value is fitted to the policy, and does not bend it.
        return logprobs, self.head(hidden.detach())[..., 0].masked_fill(~part.mask, 0.0)

    @torch.no_grad()
    def read_all(self, episodes: Episodes, most: int) -> tuple[Float32[Tensor, "n L"], Float32[Tensor, "n L"]]:
        """The same for many, a part at a time, without gradients."""
        read = [self.read(episodes.at(at)) for at in loop.parts(len(episodes), most)]
        return torch.cat([logprobs for logprobs, _ in read]), torch.cat([values for _, values in read])


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
    if together.size > 1 and settings.whiten != "no":
        raise ValueError(f"whitening is over all completions of a round, and of one process, got {settings.whiten!r}")
    torch.manual_seed(settings.seed)
    learner = Learner.of(policy, settings)
    turns = loop.turns(prompts, settings.prompts_a_step, settings.seed)
    together.seed(settings.seed)
    for step in tqdm(range(settings.steps), desc="ppo", unit=" steps", delay=3, disable=None):
        began = time.perf_counter()
        rate = loop.set_rate(learner.optimizer, settings.lr, step, settings.steps)
        told = together.means(update(learner, reward, together.own(next(turns)), settings))
        if together.first:
            log({"step": step, "lr": rate, **told, "seconds": time.perf_counter() - began})
    return learner.policy.model


def update(
    learner: Learner, reward: CalibratedReward | RawReward, asked: Sequence[Asked], settings: Settings
) -> dict[str, float]:
    """One round: write, score, share the reward out among the tokens, update; what there is to say of it."""
    times = settings.completions // settings.prompts_a_step
    each = [one for one in asked for _ in range(times)]
    episodes = loop.write(learner.policy, [one.prompt for one in asked], times)
    old, values = learner.read_all(episodes, settings.rows)
    ref = loop.logprobs_of(learner.reference, episodes, learner.policy.decoding.temperature, settings.rows)
    began = time.perf_counter()
    metrics: dict[str, float] = {}
    score = scored(reward, each, episodes, metrics).to(old.device)
    scoring = time.perf_counter() - began
    paid = token_rewards(score, old - ref, episodes.mask, settings.beta)
    gained = gae(paid, values, episodes.mask, settings.lam)
    advantage = whitened(gained, episodes.mask, settings.whiten)
    value_loss = fit(learner, episodes, old, advantage, gained + values, settings)
    kl = (old - ref).sum(1).mean()
    objective = score.mean() - settings.beta * kl
    means = {"reward": score.mean(), "kl": kl, "objective": objective, "tokens": episodes.mask.sum(1).float().mean()}
    told = {name: float(mean) for name, mean in means.items()}
    told |= {name: metrics.pop(f"{reward.__name__}/{name}") for name in ("u", "raw")}
    return {**metrics, **told, "value_loss": value_loss, "seconds_scoring": scoring}


def scored(
    reward: CalibratedReward | RawReward, asked: Sequence[Asked], episodes: Episodes, metrics: dict[str, float]
) -> Float32[Tensor, " n"]:
    """The calibrated and transformed reward of each completion, by the call that trainers make."""
    columns: dict[str, Any] = {reward.id_column: [one.id for one in asked]} if reward.id_column else {}
    given = reward([one.prompt for one in asked], episodes.texts, log_metric=metrics.__setitem__, **columns)
    if None in given:
        raise ValueError("PPO needs a reward for each completion, got None: on_missing='neutral' gives one, not 'skip'")
    return torch.tensor(given, dtype=torch.float32)


def token_rewards(
    score: Float32[Tensor, " n"], log_ratio: Float32[Tensor, "n L"], mask: Bool[Tensor, "n L"], beta: float
) -> Float32[Tensor, "n L"]:
    """What each token earns: the score at the last one, and for each minus beta times its log-ratio to the reference.

    >>> token_rewards(torch.tensor([1.0]), torch.tensor([[0.5, -0.5, 0.0]]), torch.tensor([[True, True, False]]), 0.2)
    tensor([[-0.1000,  1.1000,  0.0000]])
    """
    paid = -beta * log_ratio
    last = mask.sum(1) - 1
    paid[torch.arange(len(last), device=last.device), last] += score
    return paid.masked_fill(~mask, 0.0)


def gae(
    rewards: Float32[Tensor, "n L"], values: Float32[Tensor, "n L"], mask: Bool[Tensor, "n L"], lam: float
) -> Float32[Tensor, "n L"]:
    """Generalised advantage estimates, undiscounted: sum_k lam^k (r_{t+k} + V_{t+k+1} - V_{t+k}), V = 0 after the end.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.6]]), torch.tensor([[True, True]]), lam=1.0)
    tensor([[0.7000, 0.4000]])
    """
    after = nn.functional.pad(values, (0, 1))[:, 1:]
    surprise = (rewards + after - values).masked_fill(~mask, 0.0)
    found, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = surprise[:, t] + lam * running
        found[:, t] = running
    return found.masked_fill(~mask, 0.0)


def whitened(advantage: Float32[Tensor, "n L"], mask: Bool[Tensor, "n L"], how: str) -> Float32[Tensor, "n L"]:
    """Advantages less their mean over all tokens ("centre"), divided by their deviation too ("scale"), or as they are.

    >>> whitened(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[True, True, False]]), "centre")
    tensor([[-1.,  1.,  0.]])
    """
    if how == "no":
        return advantage
    tokens = advantage[mask]
    scale = tokens.std(correction=0) + 1e-8 if how == "scale" else 1.0
    return ((advantage - tokens.mean()) / scale).masked_fill(~mask, 0.0)


def fit(
    learner: Learner,
    episodes: Episodes,
    old: Float32[Tensor, "n L"],
    advantage: Float32[Tensor, "n L"],
    returns: Float32[Tensor, "n L"],
    settings: Settings,
) -> float:
    """The updates of a round: in each pass, the completions in so many shuffled parts; the last value loss."""
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(episodes)).chunk(settings.minibatches):
            learner.optimizer.zero_grad()
            total = 0.0
            for at in (batch[own] for own in loop.parts(len(batch), settings.rows)):
                part = episodes.at(at.tolist())
                new, values = learner.read(part)
                value_loss = ((values - returns[at]) ** 2)[part.mask].sum() / len(batch)
                policy_loss = losses(new, old[at], advantage[at], settings.clip).sum() / len(batch)
                torch.autograd.backward(policy_loss + value_loss)
                total += float(value_loss.detach())
            Together.here().average(learner.optimizer)
            nn.utils.clip_grad_norm_(learner.policy.model.parameters(), settings.max_grad_norm)
            learner.optimizer.step()
    return total


def losses(
    new: Float32[Tensor, "n L"], old: Float32[Tensor, "n L"], advantage: Float32[Tensor, "n L"], clip: float
) -> Float32[Tensor, "n L"]:
    """What is minimised, for each token: its clipped ratio of now to then, times the advantage, negative."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main(str(__doc__), Settings, train, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
