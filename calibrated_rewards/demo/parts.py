"""What a demo is made of: the reference policy, the reward model, the judge, and the prompts."""

from dataclasses import dataclass
from pathlib import Path

from calibrated_rewards.demo import assets, miniature, reward_models
from calibrated_rewards.demo.scale import Scale


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
