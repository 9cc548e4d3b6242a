"""SkyRL's settings, read at a9564572e (2026-08-21): RLOO with a k1 penalty in the reward is exact."""

from calibrated_rewards.training.check_settings.rules import Case, Framework, Is, Off, OneOf, Positive, Rule, Strength

_ALGORITHM = "trainer.algorithm"
_IN_REWARD: tuple[Case, ...] = ((f"{_ALGORITHM}.use_kl_in_reward", Is(True)),)
_IN_LOSS: tuple[Case, ...] = ((f"{_ALGORITHM}.use_kl_loss", Is(True)),)
_GRPO: tuple[Case, ...] = ((f"{_ALGORITHM}.advantage_estimator", Is("grpo")),)

SKYRL = Framework(
    name="skyrl",
    version="a9564572e",
    rules=(
        Rule(
            f"{_ALGORITHM}.advantage_estimator",
            OneOf(("rloo", "grpo")),
            f"{_ALGORITHM}.advantage_estimator=rloo",
            "advantages are divided by the batch's standard deviation",
            "warning",
        ),
        Rule(
            f"{_ALGORITHM}.grpo_norm_by_std",
            Off(),
            f"{_ALGORITHM}.grpo_norm_by_std=false",
            "rewards over the standard deviation of their group have another beta for each prompt",
            only=_GRPO,
        ),
        Rule(
            f"{_ALGORITHM}.use_kl_in_reward",
            Is(True),
            f"{_ALGORITHM}.use_kl_in_reward=true",
            "without a KL the optimum is an argmax",
            only=((f"{_ALGORITHM}.use_kl_loss", Off()),),
        ),
        Rule(
            f"{_ALGORITHM}.use_kl_in_reward",
            Is(True),
            f"{_ALGORITHM}.use_kl_in_reward=true and {_ALGORITHM}.use_kl_loss=false",
            "a KL in the loss has each token's own gradient, not the sequence's; in the reward it is exact",
            "warning",
            only=_IN_LOSS,
        ),
        Rule(
            f"{_ALGORITHM}.kl_estimator_type",
            Is("k1"),
            f"{_ALGORITHM}.kl_estimator_type=k1",
            "in the reward, only log pi - log pi_ref has the gradient of the KL",
            only=_IN_REWARD,
        ),
        Rule(
            f"{_ALGORITHM}.kl_loss_coef",
            Positive(),
            f"{_ALGORITHM}.kl_loss_coef=BETA",
            "without a KL the optimum is an argmax (in the reward it is this setting as well that has beta)",
        ),
        Rule(
            f"{_ALGORITHM}.kl_ctrl.type",
            Is("fixed"),
            f"{_ALGORITHM}.kl_ctrl.type=fixed",
            "beta would change as training goes on",
            only=_IN_REWARD,
        ),
        Rule(
            f"{_ALGORITHM}.loss_reduction",
            OneOf(("token_mean", "token_mean_legacy", "seq_mean_token_sum_norm")),
            f"{_ALGORITHM}.loss_reduction=token_mean",
            "weighs tokens by the length of their completion, or of their group",
        ),
        Rule(
            f"{_ALGORITHM}.advantage_batch_normalize",
            Off(),
            f"{_ALGORITHM}.advantage_batch_normalize=false",
            "dividing by the batch's standard deviation changes the step size with each batch",
            "warning",
        ),
        Rule(
            f"{_ALGORITHM}.use_entropy_loss",
            Off(),
            f"{_ALGORITHM}.use_entropy_loss=false",
            "adds another objective",
        ),
        Rule(
            "generator.zero_reward_on_non_stop",
            Off(),
            "generator.zero_reward_on_non_stop=false",
            "a reward of 0 is the worst quantile there is, and completions that are cut were calibrated",
        ),
        Rule(
            "generator.apply_overlong_filtering",
            Off(),
            "generator.apply_overlong_filtering=false",
            "completions that are cut were calibrated like all others, and would now teach nothing",
        ),
        Rule(
            "trainer.update_ref_every_epoch",
            Off(),
            "trainer.update_ref_every_epoch=false",
            "the reference moves away from the one that the table was drawn from",
        ),
        Rule(
            "trainer.update_epochs_per_batch",
            Is(1),
            "trainer.update_epochs_per_batch=1",
            "later passes are off-policy, and clipped",
            "warning",
        ),
    ),
    defaults={
        f"{_ALGORITHM}.advantage_estimator": "grpo",
        f"{_ALGORITHM}.grpo_norm_by_std": True,
        f"{_ALGORITHM}.use_kl_in_reward": False,
        f"{_ALGORITHM}.use_kl_loss": True,
        f"{_ALGORITHM}.kl_estimator_type": "k3",
        f"{_ALGORITHM}.kl_loss_coef": 0.001,
        f"{_ALGORITHM}.kl_ctrl.type": "fixed",
        f"{_ALGORITHM}.loss_reduction": "token_mean",
        f"{_ALGORITHM}.advantage_batch_normalize": False,
        f"{_ALGORITHM}.use_entropy_loss": False,
        "generator.zero_reward_on_non_stop": False,
        "generator.apply_overlong_filtering": False,
        "generator.n_samples_per_prompt": 5,
        "trainer.update_ref_every_epoch": False,
        "trainer.update_epochs_per_batch": 1,
        **{
            f"generator.sampling_params.{name}": value
            for name, value in {
                "max_generate_length": 1024,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            }.items()
        },
    },
    strengths=(
        Strength(f"{_ALGORITHM}.kl_loss_coef", only=_IN_REWARD),
        Strength(f"{_ALGORITHM}.kl_loss_coef", group="generator.n_samples_per_prompt", only=(*_IN_LOSS, *_GRPO)),
        Strength(f"{_ALGORITHM}.kl_loss_coef", only=_IN_LOSS),
    ),
    sampling={
        "max_tokens": "generator.sampling_params.max_generate_length",
        **{
            name: f"generator.sampling_params.{name}"
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        },
    },
)
