"""NeMo-RL's settings, read in 0.6.0 (7ea279abf): no exact setting; GRPO without division and a k2 KL comes close."""

from calibrated_rewards.training.check_settings.rules import Case, Framework, Is, Off, OneOf, Positive, Rule, Strength

_IN_LOSS: tuple[Case, ...] = (("loss_fn.use_kl_in_reward", Off()),)

NEMO = Framework(
    name="nemo-rl",
    version="0.6.0",
    rules=(
        Rule(
            "grpo.normalize_rewards",
            Off(),
            "grpo.normalize_rewards=false",
            "rewards over the standard deviation of their group have another beta for each prompt",
        ),
        Rule(
            "grpo.use_leave_one_out_baseline",
            Is(True),
            "grpo.use_leave_one_out_baseline=true",
            "a mean that includes the completion itself makes beta G / (G - 1) times what is written",
            "note",
        ),
        Rule(
            "grpo.adv_estimator.name",
            Is("grpo"),
            "grpo.adv_estimator.name=grpo",
            "the others divide advantages by the batch's standard deviation, and reinforce_plus_plus takes from each "
            "token its own KL only",
            "warning",
        ),
        Rule(
            "loss_fn.reference_policy_kl_penalty",
            Positive(),
            "loss_fn.reference_policy_kl_penalty=BETA",
            "without a KL the optimum is an argmax",
        ),
        Rule(
            "loss_fn.reference_policy_kl_type",
            Is("k2"),
            "loss_fn.reference_policy_kl_type=k2",
            "in the loss, k1 has no gradient on average, and k3 that of KL(ref || policy); k2 is each token's own",
            "warning",
            only=_IN_LOSS,
        ),
        Rule(
            "loss_fn.token_level_loss",
            Is(True),
            "loss_fn.token_level_loss=true",
            "else tokens are weighed by the length of their completion",
        ),
        Rule(
            "grpo.reward_scaling.enabled",
            Off(),
            "grpo.reward_scaling.enabled=false",
            "cuts rewards to a range, and maps it onto another",
        ),
        Rule(
            "grpo.reward_shaping.enabled",
            Off(),
            "grpo.reward_shaping.enabled=false",
            "a penalty on length is taken off after calibration",
        ),
        Rule(
            "grpo.overlong_filtering",
            Off(),
            "grpo.overlong_filtering=false",
            "completions that are cut were calibrated like all others, and would now teach nothing",
        ),
        Rule(
            "grpo.use_dynamic_sampling",
            Off(),
            "grpo.use_dynamic_sampling=false",
            "leaves prompts out by their rewards",
            "warning",
        ),
        Rule(
            "loss_fn.positive_example_nll_weight",
            Off(),
            "loss_fn.positive_example_nll_weight=0.0",
            "adds another objective",
        ),
        Rule(
            "policy.generation.top_k",
            OneOf((None, 0, -1)),
            "policy.generation.top_k=null",
            "the reference gives some completions no probability",
            "warning",
        ),
    ),
    defaults={
        "grpo.normalize_rewards": True,
        "grpo.use_leave_one_out_baseline": True,
        "grpo.num_generations_per_prompt": 16,
        "grpo.adv_estimator.name": "grpo",
        "grpo.reward_scaling.enabled": False,
        "grpo.reward_shaping.enabled": False,
        "grpo.overlong_filtering": False,
        "grpo.use_dynamic_sampling": False,
        "loss_fn.reference_policy_kl_penalty": 0.01,
        "loss_fn.reference_policy_kl_type": "k3",
        "loss_fn.use_kl_in_reward": False,
        "loss_fn.token_level_loss": True,
        "loss_fn.positive_example_nll_weight": 0.0,
        "policy.generation.max_new_tokens": 512,
        "policy.generation.temperature": 1.0,
        "policy.generation.top_p": 1.0,
        "policy.generation.top_k": None,
    },
    strengths=(
        Strength(
            "loss_fn.reference_policy_kl_penalty",
            group="grpo.num_generations_per_prompt",
            only=(*_IN_LOSS, ("grpo.use_leave_one_out_baseline", Off())),
        ),
        Strength("loss_fn.reference_policy_kl_penalty", only=(("loss_fn.reference_policy_kl_penalty", Positive()),)),
    ),
    sampling={
        name: f"policy.generation.{setting}"
        for name, setting in {
            "max_tokens": "max_new_tokens",
            "temperature": "temperature",
            "top_p": "top_p",
            "top_k": "top_k",
        }.items()
    },
)
