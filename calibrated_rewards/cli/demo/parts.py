"""How much of everything a demo does.

What a demo is made of: the reference policy, the reward model, the judge, and the prompts."""

from dataclasses import dataclass
from pathlib import Path

from calibrated_rewards.cli.demo import assets, miniature, reward_models


@dataclass(frozen=True)
class Scale:
    """Sizes; the same ones give the same numbers."""

    prompts: int
    """To calibrate and to train on."""
    held_out: int
    """To evaluate on."""
    k: int
    """Rollouts of a prompt in the table."""
    tokens: int
    """Of a completion, at most."""
    texts: int
    """That each of the two reward models learns from."""
    steps: int
    """Of training, for each reward."""
    prompts_a_step: int
    completions: int
    """Of a prompt, in a step."""
    lr: float
    lora_rank: int
    lora_layers: int
    """The last ones, that have adapters."""
    m: int
    """Completions of a held-out prompt of each policy."""
    n: int = 4
    """Best of how many the policy will be served with."""
    kl: float = 0.5
    """How far from the reference, in nats, the trained policy shall be."""
    temperature: float = 0.8


FULL = Scale(24, 24, 48, 10, 1_500, 18, 8, 4, 3e-3, 16, 10, 12)
QUICK = Scale(6, 6, 16, 8, 0, 3, 2, 4, 1e-2, 2, 1, 8)


@dataclass(frozen=True)
class Parts:
    """Folders of checkpoints, and texts."""

    what: str
    """In words."""
    policy: Path
    reward_model: Path
    judge: Path
    prompts: list[str]
    held_out: list[str]


def real(cache: Path, scale: Scale) -> Parts:
    """SmolLM2-135M-Instruct, which goes on from first words of movie reviews, and models of how people rate them."""
    texts = reward_models.prompts(cache, scale.prompts + scale.held_out)
    return Parts(
        "SmolLM2-135M-Instruct goes on from the first three words of movie reviews. Reward model and judge are MiniLM "
        f"encoders, each trained on {scale.texts:,} reviews of its own that people have rated.",
        assets.language_model(cache),
        reward_models.reward_model(cache, scale.texts),
        reward_models.judge(cache, scale.texts),
        texts[: scale.prompts],
        texts[scale.prompts :],
    )


def tiny(folder: Path, scale: Scale) -> Parts:
    """Random models that write random letters."""
    texts = miniature.prompts(scale.prompts + scale.held_out)
    policy = assets.made(folder, "policy", miniature.policy)
    both = assets.made(folder, "reward-models", miniature.reward_models)
    return Parts(
        "Random models of two layers that write letters: this shows that the parts fit together, and nothing else.",
        policy,
        both / "reward-model",
        both / "judge",
        texts[: scale.prompts],
        texts[scale.prompts :],
    )
