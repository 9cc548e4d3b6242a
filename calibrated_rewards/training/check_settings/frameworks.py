"""Tables of settings for OpenRLHF, verl, ms-swift, SkyRL, slime, AReaL, NeMo-RL and LightRFT.

Each was read from the framework's sources, in the version that its table names: a row has the setting, its default
there, the condition that it must meet, what to write, and the reason. docs/reference/settings.md shows all of them.
"""

from calibrated_rewards.training.check_settings.rules import (
    GIVEN,
    LEAVE_OUT,
    OFF,
    ON,
    POSITIVE,
    Cases,
    Is,
    OneOf,
    Row,
    SameAs,
    Strength,
    build_framework,
)

# Reasons: what happens otherwise.
NO_KL = "without a KL the optimum is an argmax"
OTHER_OBJECTIVE = "adds another objective"
LATER_PASSES = "later passes are off-policy, and clipped"
CUT = "completions that are cut were calibrated like all others, and would now teach nothing"
KL_IN_LOSS = "a KL in the loss has each token's own gradient, not the sequence's; in the reward it is exact"
NEEDS_K1 = "in the reward, only log pi - log pi_ref has the gradient of the KL"
NEEDS_K2 = "in the loss, k1 has no gradient on average, and k3 that of KL(ref || policy); k2 is each token's own"
GROUP_STD = "rewards over the standard deviation of their group have another beta for each prompt"
ANY_STD = "rewards over a standard deviation have a beta that changes with prompt or batch"
STEP_SIZE = "dividing by the batch's standard deviation changes the step size with each batch"
BATCH_STD = "advantages are divided by the batch's standard deviation"
MOVING_REFERENCE = "the reference moves away from the one that the table was drawn from"
MOVING_BETA = "beta would change as training goes on"
LENGTH_WEIGHT = "weighs tokens by the length of their completion"
ELSE_LENGTH_WEIGHT = "else tokens are weighed by the length of their completion"
LENGTH_PENALTY = "a penalty on length is taken off after calibration"
DROPS_PROMPTS = "leaves prompts out by their rewards"
DROPS_TOKENS = "leaves out tokens"
CLIPS_LOSS = "clips the loss from above"
LATER_STEPS = "all but the first step of a generation are off-policy, and clipped"
DISCOUNT = "discounts the reward"
CHANGES_CUT = "changes rewards of completions that are cut, after calibration"
DROPS_BY_SCORE = "leaves prompts out by their mean score, which here is the mean quantile"
RENDERED_TEXT = "prompts arrive as rendered text: an id is what finds them for certain"
OTHER_MANAGERS = "other managers add penalties, or turn errors into a reward of 0, the worst quantile there is"
NO_KL_EITHER = "without a KL the optimum is an argmax (in the reward it is this setting as well that has beta)"
LENGTH_OR_GROUP_WEIGHT = "weighs tokens by the length of their completion, or of their group"
ZERO_IS_WORST = "a reward of 0 is the worst quantile there is, and completions that are cut were calibrated"
OTHER_RATIO = "a sequence's ratio, or one that is cut, next to a KL that has its own"
IDLE_KL_COEF = "--kl-coef does nothing for this estimator, and without a KL the optimum is an argmax"
NO_REFERENCE = "without one the KL is against zeros, which is a bonus for entropy"
OWN_MEAN = "a mean that includes the completion itself makes beta G / (G - 1) times what is written"
OTHER_ESTIMATORS = (
    "the others divide advantages by the batch's standard deviation, and reinforce_plus_plus takes "
    "from each token its own KL only"
)
TRUNCATED = "the reference gives some completions no probability"
RUNNING_STD = "rewards over a running standard deviation have a beta that changes as training goes on"
WEIGHTED_REWARDS = "a weight is a factor of beta"
OFF_POLICY_STEPS = "later steps are off-policy, and clipped"
# What to write where it is more than one setting.
VERL_MOVE_KL = "{}=True and actor_rollout_ref.actor.use_kl_loss=False"
SKYRL_MOVE_KL = "{}=true and trainer.algorithm.use_kl_loss=false"
SWIFT_MOVE_KL = "--advantage_estimator rloo --kl_in_reward true"
SLIME_ADD_KL = "{} --kl-loss-coef BETA --kl-loss-type k2, or --advantage-estimator ppo --kl-coef BETA"
SWIFT_SUM = "the command without {}, and a sum of calibrated rewards as one reward"
AREAL_REF = "a `ref:` engine, with the reference policy's path"
# Conditions with many values.
SUMS = OneOf(("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"))
SKYRL_SUMS = OneOf(("token_mean", "token_mean_legacy", "seq_mean_token_sum_norm"))
UNDIVIDED = OneOf(("rloo", "dr_grpo", "gae", "reinforce", "reinforce_baseline", "flash_reinforce"))
LIGHTRFT_UNDIVIDED = OneOf(("rloo", "gae", "reinforce", "reinforce_baseline"))
VERL_UNWHITENED = OneOf(("rloo", "rloo_vectorized", "grpo", "grpo_vectorized"))
VERL_MANAGERS = OneOf(("naive", "CalibratedRewardManager"))

OPENRLHF_IN_REWARD: Cases = (("algo.kl.init_coef", POSITIVE), ("algo.kl.use_loss", OFF))
OPENRLHF_WHITENED: Cases = (("algo.advantage.estimator", OneOf(("gae", "reinforce", "reinforce_baseline"))),)
OPENRLHF_DR_GRPO: Cases = (("algo.kl.init_coef", POSITIVE), ("algo.advantage.estimator", Is("dr_grpo")))
OPENRLHF_WEIGHED: Cases = (("algo.kl.init_coef", POSITIVE),)
OPENRLHF = build_framework(
    "openrlhf",
    "0.11.2",
    title="OpenRLHF",
    optimum="exact",
    spelling="--a_b",
    write=(
        "`--algo.advantage.estimator rloo --algo.kl.init_coef BETA --algo.kl.estimator k1 --reward.clip_range -1e6 1e6`"
    ),
    rows=(
        Row("algo.kl.init_coef", 0.01, POSITIVE, "{} BETA", NO_KL),
        Row("algo.kl.use_loss", False, OFF, LEAVE_OUT, KL_IN_LOSS, "warning"),
        Row("algo.kl.estimator", "k1", Is("k1"), "{} k1", NEEDS_K1, only=OPENRLHF_IN_REWARD),
        Row("algo.kl.target", None, OFF, LEAVE_OUT, MOVING_BETA),
        Row("algo.advantage.estimator", "gae", UNDIVIDED, "{} rloo", GROUP_STD),
        Row("algo.advantage.no_std_norm", False, ON, "{}", STEP_SIZE, "warning", only=OPENRLHF_WHITENED),
        Row("algo.advantage.gamma", 1, Is(1), "{} 1", "discounts the KL of later tokens"),
        Row("actor.loss_agg_mode", "token-mean", Is("token-mean"), "{} token-mean", LENGTH_WEIGHT),
        Row("actor.entropy_coef", None, OFF, LEAVE_OUT, OTHER_OBJECTIVE),
        Row("reward.overlong_buffer_len", None, OFF, LEAVE_OUT, LENGTH_PENALTY),
        Row("reward.stop_properly_penalty_coef", None, OFF, LEAVE_OUT, CHANGES_CUT),
        Row("algo.dynamic_filtering_enable", False, OFF, LEAVE_OUT, DROPS_BY_SCORE, "warning"),
        Row("train.max_epochs", 1, Is(1), "{} 1", LATER_PASSES, "warning"),
        Row("data.label_key", None, GIVEN, "{} with the column of prompts' ids", RENDERED_TEXT, "note"),
    ),
    others={"reward.clip_range": (-10, 10), "rollout.n_samples_per_prompt": 1},
    strengths=(
        Strength("algo.kl.init_coef", only=OPENRLHF_IN_REWARD),
        Strength("algo.kl.init_coef", group="rollout.n_samples_per_prompt", only=OPENRLHF_DR_GRPO),
        Strength("algo.kl.init_coef", only=OPENRLHF_WEIGHED),
    ),
    sampling={
        "max_tokens": ("rollout.max_new_tokens", None),
        "temperature": ("rollout.temperature", 1.0),
        "top_p": ("rollout.top_p", 1.0),
    },
    clips=("reward.clip_range",),
)

VERL_IN_REWARD: Cases = (("algorithm.use_kl_in_reward", ON),)
VERL_IN_LOSS: Cases = (("actor_rollout_ref.actor.use_kl_loss", ON),)
VERL_GRPO: Cases = (("algorithm.adv_estimator", Is("grpo")),)
VERL = build_framework(
    "verl",
    "0.9.1",
    title="verl",
    optimum="exact",
    write=(
        "`algorithm.adv_estimator=rloo algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=BETA "
        "actor_rollout_ref.actor.use_kl_loss=False`"
    ),
    rows=(
        Row("algorithm.adv_estimator", "gae", VERL_UNWHITENED, "{}=rloo", BATCH_STD, "warning"),
        Row("algorithm.norm_adv_by_std_in_grpo", True, OFF, "{}=False", GROUP_STD, only=VERL_GRPO),
        Row(
            "algorithm.use_kl_in_reward",
            False,
            ON,
            "{}=True",
            NO_KL,
            only=(("actor_rollout_ref.actor.use_kl_loss", OFF),),
        ),
        Row("algorithm.use_kl_in_reward", False, ON, VERL_MOVE_KL, KL_IN_LOSS, "warning", only=VERL_IN_LOSS),
        Row(
            "actor_rollout_ref.actor.use_kl_loss",
            False,
            OFF,
            "{}=False",
            "it would be a second KL",
            only=VERL_IN_REWARD,
        ),
        Row("algorithm.kl_ctrl.kl_coef", 0.001, POSITIVE, "{}=BETA", NO_KL, only=VERL_IN_REWARD),
        Row("algorithm.kl_ctrl.type", "fixed", Is("fixed"), "{}=fixed", MOVING_BETA, only=VERL_IN_REWARD),
        Row("algorithm.kl_penalty", "kl", OneOf(("kl", "k1")), "{}=kl", NEEDS_K1, only=VERL_IN_REWARD),
        Row("algorithm.gamma", 1.0, Is(1), "{}=1.0", DISCOUNT),
        Row("algorithm.use_pf_ppo", False, OFF, "{}=False", "draws completions again by their scores"),
        Row("algorithm.filter_groups.enable", False, OFF, "{}=False", DROPS_PROMPTS, "warning"),
        Row("actor_rollout_ref.actor.loss_agg_mode", "token-mean", SUMS, "{}=seq-mean-token-sum", LENGTH_WEIGHT),
        Row("actor_rollout_ref.actor.entropy_coeff", 0, OFF, "{}=0", OTHER_OBJECTIVE),
        Row("actor_rollout_ref.actor.ppo_epochs", 1, Is(1), "{}=1", "later passes are off-policy", "warning"),
        Row("reward.reward_manager.name", "naive", VERL_MANAGERS, "{}=naive", OTHER_MANAGERS, "warning"),
    ),
    others={"actor_rollout_ref.actor.kl_loss_coef": 0.001, "actor_rollout_ref.rollout.n": 1},
    strengths=(
        Strength("algorithm.kl_ctrl.kl_coef", only=VERL_IN_REWARD),
        Strength(
            "actor_rollout_ref.actor.kl_loss_coef",
            group="actor_rollout_ref.rollout.n",
            only=(*VERL_IN_LOSS, *VERL_GRPO),
        ),
        Strength("actor_rollout_ref.actor.kl_loss_coef", only=VERL_IN_LOSS),
    ),
    sampling={
        "max_tokens": ("data.max_response_length", 512),
        "temperature": ("actor_rollout_ref.rollout.temperature", 1.0),
        "top_p": ("actor_rollout_ref.rollout.top_p", 1),
        "top_k": ("actor_rollout_ref.rollout.top_k", -1),
    },
)

SWIFT_RLOO: Cases = (("advantage_estimator", OneOf(("rloo", "reinforce_plus_plus"))),)
SWIFT_GRPO: Cases = (("advantage_estimator", Is("grpo")),)
SWIFT = build_framework(
    "ms-swift",
    "4.6.0",
    title="ms-swift",
    optimum="exact",
    spelling="--a_b",
    write=(
        "`--advantage_estimator rloo --kl_in_reward true --scale_rewards none --loss_type dr_grpo --beta BETA "
        "--temperature 1`"
    ),
    rows=(
        Row("advantage_estimator", "grpo", OneOf(("rloo", "grpo")), "{} rloo", BATCH_STD, "warning"),
        Row("kl_in_reward", None, ON, "{} true", KL_IN_LOSS, "warning", only=SWIFT_RLOO),
        Row("kl_in_reward", None, ON, SWIFT_MOVE_KL, KL_IN_LOSS, "warning", only=SWIFT_GRPO),
        Row("scale_rewards", None, Is("none"), "{} none", ANY_STD),
        Row("beta", 0.04, POSITIVE, "{} BETA", NO_KL),
        Row("loss_type", "grpo", OneOf(("dr_grpo", "dapo", "bnpo")), "{} dr_grpo", LENGTH_WEIGHT),
        Row("num_iterations", 1, Is(1), "{} 1", LATER_PASSES, "warning"),
        Row(
            "steps_per_generation",
            None,
            SameAs("gradient_accumulation_steps"),
            "{} equal to --gradient_accumulation_steps",
            LATER_STEPS,
            "warning",
        ),
        Row("sync_ref_model", False, OFF, "{} false", "the reference moves away from the calibrated one"),
        Row("overlong_filter", False, OFF, "{} false", CUT),
        Row("dynamic_sample", False, OFF, "{} false", DROPS_PROMPTS, "warning"),
        Row("top_entropy_quantile", 1.0, Is(1.0), "{} 1.0", DROPS_TOKENS),
        Row("delta", None, OFF, LEAVE_OUT, CLIPS_LOSS, "warning"),
        Row("reward_weights", None, OFF, SWIFT_SUM, WEIGHTED_REWARDS, "note"),
    ),
    others={"gradient_accumulation_steps": None, "num_generations": 8},
    strengths=(
        Strength("beta", only=(("beta", POSITIVE), ("kl_in_reward", ON))),
        Strength("beta", only=(("beta", POSITIVE), ("advantage_estimator", Is("rloo")))),
        Strength("beta", group="num_generations", only=(("beta", POSITIVE),)),
    ),
    sampling={
        "max_tokens": ("max_completion_length", 512),
        "temperature": ("temperature", 0.9),
        "top_p": ("top_p", 1.0),
        "top_k": ("top_k", -1),
        "min_p": ("min_p", 0.0),
        "repetition_penalty": ("repetition_penalty", 1.0),
    },
)

SKYRL_IN_REWARD: Cases = (("trainer.algorithm.use_kl_in_reward", ON),)
SKYRL_IN_LOSS: Cases = (("trainer.algorithm.use_kl_loss", ON),)
SKYRL_GRPO: Cases = (("trainer.algorithm.advantage_estimator", Is("grpo")),)
SKYRL = build_framework(
    "skyrl",
    "a9564572e",
    title="SkyRL",
    optimum="exact",
    write=(
        "`trainer.algorithm.advantage_estimator=rloo`, `.use_kl_in_reward=true`, `.use_kl_loss=false`, "
        "`.kl_estimator_type=k1`, `.kl_loss_coef=BETA`, and `generator.zero_reward_on_non_stop=false`"
    ),
    rows=(
        Row("trainer.algorithm.advantage_estimator", "grpo", OneOf(("rloo", "grpo")), "{}=rloo", BATCH_STD, "warning"),
        Row("trainer.algorithm.grpo_norm_by_std", True, OFF, "{}=false", GROUP_STD, only=SKYRL_GRPO),
        Row(
            "trainer.algorithm.use_kl_in_reward",
            False,
            ON,
            "{}=true",
            NO_KL,
            only=(("trainer.algorithm.use_kl_loss", OFF),),
        ),
        Row("trainer.algorithm.use_kl_in_reward", False, ON, SKYRL_MOVE_KL, KL_IN_LOSS, "warning", only=SKYRL_IN_LOSS),
        Row("trainer.algorithm.kl_estimator_type", "k3", Is("k1"), "{}=k1", NEEDS_K1, only=SKYRL_IN_REWARD),
        Row("trainer.algorithm.kl_loss_coef", 0.001, POSITIVE, "{}=BETA", NO_KL_EITHER),
        Row("trainer.algorithm.kl_ctrl.type", "fixed", Is("fixed"), "{}=fixed", MOVING_BETA, only=SKYRL_IN_REWARD),
        Row("trainer.algorithm.loss_reduction", "token_mean", SKYRL_SUMS, "{}=token_mean", LENGTH_OR_GROUP_WEIGHT),
        Row("trainer.algorithm.advantage_batch_normalize", False, OFF, "{}=false", STEP_SIZE, "warning"),
        Row("trainer.algorithm.use_entropy_loss", False, OFF, "{}=false", OTHER_OBJECTIVE),
        Row("generator.zero_reward_on_non_stop", False, OFF, "{}=false", ZERO_IS_WORST),
        Row("generator.apply_overlong_filtering", False, OFF, "{}=false", CUT),
        Row("trainer.update_ref_every_epoch", False, OFF, "{}=false", MOVING_REFERENCE),
        Row("trainer.update_epochs_per_batch", 1, Is(1), "{}=1", LATER_PASSES, "warning"),
    ),
    others={"trainer.algorithm.use_kl_loss": True, "generator.n_samples_per_prompt": 5},
    strengths=(
        Strength("trainer.algorithm.kl_loss_coef", only=SKYRL_IN_REWARD),
        Strength(
            "trainer.algorithm.kl_loss_coef", group="generator.n_samples_per_prompt", only=(*SKYRL_IN_LOSS, *SKYRL_GRPO)
        ),
        Strength("trainer.algorithm.kl_loss_coef", only=SKYRL_IN_LOSS),
    ),
    sampling={
        "max_tokens": ("generator.sampling_params.max_generate_length", 1024),
        "temperature": ("generator.sampling_params.temperature", 1.0),
        "top_p": ("generator.sampling_params.top_p", 1.0),
        "top_k": ("generator.sampling_params.top_k", -1),
        "min_p": ("generator.sampling_params.min_p", 0.0),
        "repetition_penalty": ("generator.sampling_params.repetition_penalty", 1.0),
    },
)

SLIME_STEPWISE: Cases = (("advantage_estimator", OneOf(("ppo", "reinforce_plus_plus"))), ("use_kl_loss", OFF))
SLIME_GROUPED: Cases = (("advantage_estimator", OneOf(("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline"))),)
SLIME_IN_LOSS: Cases = (("use_kl_loss", ON),)
SLIME = build_framework(
    "slime",
    "624b824a8",
    title="slime",
    optimum="as far as its critic is",
    spelling="--a-b",
    write="`--advantage-estimator ppo --kl-coef BETA --kl-loss-type k1 --calculate-per-token-loss`",
    rows=(
        Row(
            "advantage_estimator",
            "grpo",
            OneOf(("ppo", "reinforce_plus_plus", "grpo")),
            "{} ppo",
            OTHER_RATIO,
            "warning",
        ),
        Row("grpo_std_normalization", True, OFF, "--disable-grpo-std-normalization", GROUP_STD, only=SLIME_GROUPED),
        Row("use_kl_loss", False, ON, SLIME_ADD_KL, IDLE_KL_COEF, only=SLIME_GROUPED),
        Row("kl_loss_coef", 0.0, POSITIVE, "{} BETA", NO_KL, only=SLIME_IN_LOSS),
        Row(
            "kl_loss_type",
            "k1",
            Is("k2"),
            "{} k2",
            NEEDS_K2,
            "warning",
            only=(*SLIME_IN_LOSS, ("use_unbiased_kl", OFF)),
        ),
        Row("kl_coef", 0.0, POSITIVE, "{} BETA", NO_KL, only=SLIME_STEPWISE),
        Row("kl_loss_type", "k1", Is("k1"), "{} k1", NEEDS_K1, only=SLIME_STEPWISE),
        Row("gamma", 1.0, Is(1), "{} 1.0", DISCOUNT),
        Row("normalize_advantages", False, OFF, LEAVE_OUT, STEP_SIZE, "warning"),
        Row("calculate_per_token_loss", False, ON, "{}", ELSE_LENGTH_WEIGHT),
        Row("entropy_coef", 0.0, OFF, "{} 0", OTHER_OBJECTIVE),
        Row("ref_update_interval", None, OFF, LEAVE_OUT, MOVING_REFERENCE),
        Row("custom_reward_post_process_path", None, OFF, LEAVE_OUT, "it changes rewards after calibration", "warning"),
        Row("num_steps_per_rollout", None, OneOf((None, 1)), "{} 1", OFF_POLICY_STEPS, "warning"),
    ),
    others={"use_unbiased_kl": False, "n_samples_per_prompt": 1},
    strengths=(
        Strength("kl_loss_coef", group="n_samples_per_prompt", only=(*SLIME_IN_LOSS, *SLIME_GROUPED)),
        Strength("kl_loss_coef", only=SLIME_IN_LOSS),
        Strength(
            "kl_coef", only=(("advantage_estimator", OneOf(("ppo", "reinforce_plus_plus"))), ("kl_coef", POSITIVE))
        ),
    ),
    sampling={
        "max_tokens": ("rollout_max_response_len", None),
        "temperature": ("rollout_temperature", 1.0),
        "top_p": ("rollout_top_p", 1.0),
        "top_k": ("rollout_top_k", -1),
    },
)

AREAL = build_framework(
    "areal",
    "2.0.0",
    title="AReaL",
    optimum="as far as its critic is",
    write=(
        "`actor.kl_ctl=BETA actor.reward_clip=1e6 actor.ppo_n_minibatches=1 actor.reward_norm=null "
        "actor.adv_norm=null actor.kl_estimator=k1 actor.reward_scaling=1.0 actor.reward_bias=0.0`, and a "
        "`ref:` engine"
    ),
    rows=(
        Row("ref", None, GIVEN, AREAL_REF, NO_REFERENCE),
        Row("actor.kl_ctl", 0.1, POSITIVE, "{}=BETA", NO_KL),
        Row("actor.kl_estimator", "k1", Is("k1"), "{}=k1", NEEDS_K1),
        Row("actor.reward_norm.std_level", None, OFF, "{}=null", ANY_STD),
        Row("actor.reward_scaling", 1.0, Is(1.0), "{}=1.0", "a factor of the reward divides beta, silently", "warning"),
        Row("actor.adv_norm.std_level", None, OFF, "actor.adv_norm=null", STEP_SIZE, "warning"),
        Row("actor.mask_no_eos_with_zero", False, OFF, "{}=false", CUT),
        Row("actor.overlong_reward_penalty", False, OFF, "{}=false", LENGTH_PENALTY),
        Row("actor.discount", 1.0, Is(1.0), "{}=1.0", DISCOUNT),
        Row("actor.use_sapo_loss", False, OFF, "{}=false", "weighs tokens by their ratio", "warning"),
        Row("actor.ppo_n_minibatches", 4, Is(1), "{}=1", "later minibatches are off-policy, and clipped", "warning"),
        Row("gconfig.greedy", False, OFF, "{}=false", "a group of equal completions teaches nothing"),
    ),
    others={"actor.reward_clip": 20.0},
    strengths=(Strength("actor.kl_ctl", only=(("actor.kl_ctl", POSITIVE), ("ref", GIVEN))),),
    sampling={
        "max_tokens": ("gconfig.max_new_tokens", 16384),
        "temperature": ("gconfig.temperature", 1.0),
        "top_p": ("gconfig.top_p", 1.0),
        "top_k": ("gconfig.top_k", 100000000),
    },
    clips=("actor.reward_clip",),
)

NEMO_IN_LOSS: Cases = (("loss_fn.use_kl_in_reward", OFF),)
NEMO = build_framework(
    "nemo-rl",
    "0.6.0",
    title="NeMo-RL",
    optimum="close: KL in the loss",
    write=(
        "`grpo.normalize_rewards=false grpo.use_leave_one_out_baseline=true "
        "loss_fn.reference_policy_kl_penalty=BETA loss_fn.reference_policy_kl_type=k2`"
    ),
    rows=(
        Row("grpo.normalize_rewards", True, OFF, "{}=false", GROUP_STD),
        Row("grpo.use_leave_one_out_baseline", True, ON, "{}=true", OWN_MEAN, "note"),
        Row("grpo.adv_estimator.name", "grpo", Is("grpo"), "{}=grpo", OTHER_ESTIMATORS, "warning"),
        Row("loss_fn.reference_policy_kl_penalty", 0.01, POSITIVE, "{}=BETA", NO_KL),
        Row("loss_fn.reference_policy_kl_type", "k3", Is("k2"), "{}=k2", NEEDS_K2, "warning", only=NEMO_IN_LOSS),
        Row("loss_fn.token_level_loss", True, ON, "{}=true", ELSE_LENGTH_WEIGHT),
        Row("grpo.reward_scaling.enabled", False, OFF, "{}=false", "cuts rewards to a range, and maps it onto another"),
        Row("grpo.reward_shaping.enabled", False, OFF, "{}=false", LENGTH_PENALTY),
        Row("grpo.overlong_filtering", False, OFF, "{}=false", CUT),
        Row("grpo.use_dynamic_sampling", False, OFF, "{}=false", DROPS_PROMPTS, "warning"),
        Row("loss_fn.positive_example_nll_weight", 0.0, OFF, "{}=0.0", OTHER_OBJECTIVE),
        Row("policy.generation.top_k", None, OneOf((None, 0, -1)), "{}=null", TRUNCATED, "warning"),
    ),
    others={"grpo.num_generations_per_prompt": 16, "loss_fn.use_kl_in_reward": False},
    strengths=(
        Strength(
            "loss_fn.reference_policy_kl_penalty",
            group="grpo.num_generations_per_prompt",
            only=(*NEMO_IN_LOSS, ("grpo.use_leave_one_out_baseline", OFF)),
        ),
        Strength("loss_fn.reference_policy_kl_penalty", only=(("loss_fn.reference_policy_kl_penalty", POSITIVE),)),
    ),
    sampling={
        "max_tokens": ("policy.generation.max_new_tokens", 512),
        "temperature": ("policy.generation.temperature", 1.0),
        "top_p": ("policy.generation.top_p", 1.0),
        "top_k": ("policy.generation.top_k", None),
    },
)

LIGHTRFT_IN_REWARD: Cases = (("init_kl_coef", POSITIVE), ("use_kl_loss", OFF))
LIGHTRFT = build_framework(
    "lightrft",
    "49e62cb",
    title="LightRFT",
    optimum="exact",
    spelling="--a_b",
    write="`--advantage_estimator rloo --init_kl_coef BETA --loss_agg_mode token-mean --reward_clip 0`",
    rows=(
        Row("init_kl_coef", 0.01, POSITIVE, "{} BETA", NO_KL),
        Row("use_kl_loss", False, OFF, LEAVE_OUT, KL_IN_LOSS, "warning"),
        Row("kl_estimator", "k1", Is("k1"), "{} k1", NEEDS_K1, only=LIGHTRFT_IN_REWARD),
        Row("kl_target", None, OFF, LEAVE_OUT, MOVING_BETA),
        Row("advantage_estimator", "gae", LIGHTRFT_UNDIVIDED, "{} rloo", GROUP_STD),
        Row("reward_running_norm", False, OFF, LEAVE_OUT, RUNNING_STD),
        Row("advantages_norm", False, OFF, LEAVE_OUT, STEP_SIZE, "warning"),
        Row("advantage_clip", 0.0, OFF, "{} 0", "cuts what the transform made"),
        Row("loss_agg_mode", "seq-mean-token-mean", SUMS, "{} token-mean", LENGTH_WEIGHT),
        Row("use_gspo", False, OFF, LEAVE_OUT, "a sequence's ratio, and its own scaling", "warning"),
        Row("overlong_buffer", False, OFF, LEAVE_OUT, LENGTH_PENALTY),
        Row("dynamic_sampling", False, OFF, LEAVE_OUT, DROPS_PROMPTS, "warning"),
        Row("max_epochs", 1, Is(1), "{} 1", LATER_PASSES, "warning"),
    ),
    others={"reward_clip": 0.0, "n_samples_per_prompt": 1},
    strengths=(Strength("init_kl_coef", only=(("init_kl_coef", POSITIVE),)),),
    sampling={"max_tokens": ("generate_max_len", 1024), "temperature": ("temperature", 1.0), "top_p": ("top_p", 1.0)},
    clips=("reward_clip",),
)
