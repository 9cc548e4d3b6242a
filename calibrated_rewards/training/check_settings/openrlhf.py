"""OpenRLHF's settings, read in 0.11.2: RLOO with a k1 penalty in the reward is exact, once its clipping is opened."""

from calibrated_rewards.training.check_settings.rules import (
    Case,
    Framework,
    Given,
    Is,
    Off,
    OneOf,
    Positive,
    Rule,
    Strength,
)

_IN_REWARD: tuple[Case, ...] = (("algo.kl.init_coef", Positive()), ("algo.kl.use_loss", Off()))
_WHITENED: tuple[Case, ...] = (("algo.advantage.estimator", OneOf(("gae", "reinforce", "reinforce_baseline"))),)

OPENRLHF = Framework(
    name="openrlhf",
    version="0.11.2",
    rules=(
        Rule(
            "algo.kl.init_coef",
            Positive(),
            "--algo.kl.init_coef BETA",
            "without a KL the optimum is an argmax",
        ),
        Rule(
            "algo.kl.use_loss",
            Off(),
            "the command without --algo.kl.use_loss",
            "a KL in the loss has each token's own gradient, not the sequence's; in the reward it is exact",
            "warning",
        ),
        Rule(
            "algo.kl.estimator",
            Is("k1"),
            "--algo.kl.estimator k1",
            "in the reward, only log pi - log pi_ref has the gradient of the KL",
            only=_IN_REWARD,
        ),
        Rule("algo.kl.target", Off(), "the command without --algo.kl.target", "beta would change as training goes on"),
        Rule(
            "algo.advantage.estimator",
            OneOf(("rloo", "dr_grpo", "gae", "reinforce", "reinforce_baseline", "flash_reinforce")),
            "--algo.advantage.estimator rloo",
            "rewards over the standard deviation of their group have another beta for each prompt",
        ),
        Rule(
            "algo.advantage.no_std_norm",
            Is(True),
            "--algo.advantage.no_std_norm",
            "dividing by the batch's standard deviation changes the step size with each batch",
            "warning",
            only=_WHITENED,
        ),
        Rule("algo.advantage.gamma", Is(1), "--algo.advantage.gamma 1", "discounts the KL of later tokens"),
        Rule(
            "actor.loss_agg_mode",
            Is("token-mean"),
            "--actor.loss_agg_mode token-mean",
            "weighs tokens by the length of their completion",
        ),
        Rule("actor.entropy_coef", Off(), "the command without --actor.entropy_coef", "adds another objective"),
        Rule(
            "reward.overlong_buffer_len",
            Off(),
            "the command without --reward.overlong_buffer_len",
            "a penalty on length is taken off after calibration",
        ),
        Rule(
            "reward.stop_properly_penalty_coef",
            Off(),
            "the command without --reward.stop_properly_penalty_coef",
            "changes rewards of completions that are cut, after calibration",
        ),
        Rule(
            "algo.dynamic_filtering_enable",
            Off(),
            "the command without --algo.dynamic_filtering_enable",
            "leaves prompts out by their mean score, which here is the mean quantile",
            "warning",
        ),
        Rule("train.max_epochs", Is(1), "--train.max_epochs 1", "later passes are off-policy, and clipped", "warning"),
        Rule(
            "data.label_key",
            Given(),
            "--data.label_key with the column of prompts' ids",
            "prompts arrive as rendered text: an id is what finds them for certain",
            "note",
        ),
    ),
    defaults={
        "algo.kl.init_coef": 0.01,
        "algo.kl.use_loss": False,
        "algo.kl.estimator": "k1",
        "algo.kl.target": None,
        "algo.advantage.estimator": "gae",
        "algo.advantage.no_std_norm": False,
        "algo.advantage.gamma": 1,
        "algo.dynamic_filtering_enable": False,
        "actor.loss_agg_mode": "token-mean",
        "actor.entropy_coef": None,
        "reward.overlong_buffer_len": None,
        "reward.stop_properly_penalty_coef": None,
        "reward.clip_range": (-10, 10),
        "train.max_epochs": 1,
        "data.label_key": None,
        "rollout.max_new_tokens": None,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.n_samples_per_prompt": 1,
    },
    strengths=(
        Strength("algo.kl.init_coef", only=_IN_REWARD),
        Strength(
            "algo.kl.init_coef",
            group="rollout.n_samples_per_prompt",
            only=(("algo.kl.init_coef", Positive()), ("algo.advantage.estimator", Is("dr_grpo"))),
        ),
        Strength("algo.kl.init_coef", only=(("algo.kl.init_coef", Positive()),)),
    ),
    sampling={
        "max_tokens": "rollout.max_new_tokens",
        "temperature": "rollout.temperature",
        "top_p": "rollout.top_p",
    },
    clips=("reward.clip_range",),
)
