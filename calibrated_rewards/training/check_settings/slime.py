"""slime's settings, read at 624b824a8 (2026-08-21): PPO has the KL in its rewards, GRPO in its loss at best."""

from calibrated_rewards.training.check_settings.rules import Case, Framework, Is, Off, OneOf, Positive, Rule, Strength

_GROUPED: tuple[Case, ...] = (
    ("advantage_estimator", OneOf(("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline"))),
)
_STEPWISE: tuple[Case, ...] = (("advantage_estimator", OneOf(("ppo", "reinforce_plus_plus"))),)
_IN_LOSS: tuple[Case, ...] = (("use_kl_loss", Is(True)),)

SLIME = Framework(
    name="slime",
    version="624b824a8",
    rules=(
        Rule(
            "advantage_estimator",
            OneOf(("ppo", "reinforce_plus_plus", "grpo")),
            "--advantage-estimator ppo",
            "a sequence's ratio, or one that is cut, next to a KL that has its own",
            "warning",
        ),
        Rule(
            "grpo_std_normalization",
            Off(),
            "--disable-grpo-std-normalization",
            "rewards over the standard deviation of their group have another beta for each prompt",
            only=_GROUPED,
        ),
        Rule(
            "use_kl_loss",
            Is(True),
            "--use-kl-loss --kl-loss-coef BETA --kl-loss-type k2, or --advantage-estimator ppo --kl-coef BETA",
            "--kl-coef does nothing for this estimator, and without a KL the optimum is an argmax",
            only=_GROUPED,
        ),
        Rule(
            "kl_loss_coef",
            Positive(),
            "--kl-loss-coef BETA",
            "without a KL the optimum is an argmax",
            only=_IN_LOSS,
        ),
        Rule(
            "kl_loss_type",
            Is("k2"),
            "--kl-loss-type k2",
            "in the loss, k1 has no gradient on average, and k3 that of KL(ref || policy); k2 is each token's own",
            "warning",
            only=(*_IN_LOSS, ("use_unbiased_kl", Off())),
        ),
        Rule(
            "kl_coef",
            Positive(),
            "--kl-coef BETA",
            "without a KL the optimum is an argmax",
            only=(*_STEPWISE, ("use_kl_loss", Off())),
        ),
        Rule(
            "kl_loss_type",
            Is("k1"),
            "--kl-loss-type k1",
            "in the reward, only log pi - log pi_ref has the gradient of the KL",
            only=(*_STEPWISE, ("use_kl_loss", Off())),
        ),
        Rule("gamma", Is(1), "--gamma 1.0", "discounts the reward"),
        Rule(
            "normalize_advantages",
            Off(),
            "the command without --normalize-advantages",
            "dividing by the batch's standard deviation changes the step size with each batch",
            "warning",
        ),
        Rule(
            "calculate_per_token_loss",
            Is(True),
            "--calculate-per-token-loss",
            "else tokens are weighed by the length of their completion",
        ),
        Rule("entropy_coef", Off(), "--entropy-coef 0", "adds another objective"),
        Rule(
            "ref_update_interval",
            Off(),
            "the command without --ref-update-interval",
            "the reference moves away from the one that the table was drawn from",
        ),
        Rule(
            "custom_reward_post_process_path",
            Off(),
            "the command without --custom-reward-post-process-path",
            "it changes rewards after calibration",
            "warning",
        ),
        Rule(
            "num_steps_per_rollout",
            OneOf((None, 1)),
            "--num-steps-per-rollout 1",
            "later steps are off-policy, and clipped",
            "warning",
        ),
    ),
    defaults={
        "advantage_estimator": "grpo",
        "grpo_std_normalization": True,
        "use_kl_loss": False,
        "use_unbiased_kl": False,
        "kl_loss_coef": 0.0,
        "kl_loss_type": "k1",
        "kl_coef": 0.0,
        "gamma": 1.0,
        "normalize_advantages": False,
        "calculate_per_token_loss": False,
        "entropy_coef": 0.0,
        "ref_update_interval": None,
        "custom_reward_post_process_path": None,
        "num_steps_per_rollout": None,
        "n_samples_per_prompt": 1,
        "rollout_max_response_len": None,
        "rollout_temperature": 1.0,
        "rollout_top_p": 1.0,
        "rollout_top_k": -1,
    },
    strengths=(
        Strength("kl_loss_coef", group="n_samples_per_prompt", only=(*_IN_LOSS, *_GROUPED)),
        Strength("kl_loss_coef", only=_IN_LOSS),
        Strength("kl_coef", only=(*_STEPWISE, ("kl_coef", Positive()))),
    ),
    sampling={
        "max_tokens": "rollout_max_response_len",
        "temperature": "rollout_temperature",
        "top_p": "rollout_top_p",
        "top_k": "rollout_top_k",
    },
)
