"""Tables of settings for TRL's trainers, and the settings with which three of them maximise E[reward] - beta KL.

RLOO and A2PO are exact, GRPO comes close with `grpo_settings`; AsyncGRPO and OnlineDPO have other objectives. That was
measured with the trainers themselves: see docs/evidence/results.md and benchmarks/convergence.py.
"""

from typing import Any

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.training.check_settings.frameworks import (
    CLIPS_LOSS,
    CUT,
    DROPS_TOKENS,
    LATER_PASSES,
    LATER_STEPS,
    MOVING_REFERENCE,
    NO_KL,
    OTHER_OBJECTIVE,
)
from calibrated_rewards.training.check_settings.rules import (
    NEVER,
    OFF,
    ON,
    POSITIVE,
    Cases,
    Framework,
    Is,
    OneOf,
    Row,
    SameAs,
    Strength,
    build_framework,
    read_decoding,
)

VERSION = "1.16.0"
# Names of `Decoding` to settings, with their defaults.
SAMPLING: dict[str, tuple[str, Any]] = {
    "max_tokens": ("max_completion_length", 512),
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "top_k": ("top_k", 0),
    "min_p": ("min_p", None),
    "repetition_penalty": ("repetition_penalty", 1.0),
}
WEIGHED: Cases = (("beta", POSITIVE),)
CHOSEN_BETA = "the beta that you chose, such as beta=0.05"
# Reasons: what happens otherwise.
DROPOUT = "where the policy has dropout, its log-probabilities are of another model than the one that wrote"
OVERRIDES = "they override the settings that can be checked"
UNEVEN_STEPS = "only a step size here, as it divides the KL as well, but one that changes with each batch"
OTHER_BETAS = "rewards over their standard deviation, next to a KL that is not, have another beta for each prompt"
DIVIDES = "divides by standard deviations whatever scale_rewards says"
OTHER_WEIGHTS = "weighs tokens by the length of their completion, or clips otherwise than the others do"
REVERSE_KL = "the gradient is that of the KL from the reference, KL(ref || policy), whose optimum is another"
MULTIPLIED_KL = "a sequence's ratio multiplies the KL of each of its tokens"
NO_KL_AT_ALL = (
    "this trainer has no KL, and divides rewards by their standard deviation whatever is set: with "
    "any number of generations its optimum is an argmax"
)
ORDER_ALONE = "only which of two completions scores higher is used, and no calibration of a prompt changes that"
OTHER_VALUE = "the optimal value is that of another beta, which adds noise and leaves the optimum"
LOSS_TEMPERATURE = "the loss has log-probabilities at temperature 1, of another policy than the one that wrote"
TOP_50 = "None is transformers' default, the 50 likeliest tokens, or what the checkpoint says"
DROPS_PROMPTS = "leaves out prompts whose first completions all have the reward 0"
LATE_PENALTY = "is taken off after calibration, in units of the calibrated reward"

SHARED = (
    Row("num_iterations", 1, Is(1), "{}=1", LATER_PASSES, "warning"),
    Row("steps_per_generation", None, SameAs("gradient_accumulation_steps"), "{}=None", LATER_STEPS, "warning"),
    Row("mask_truncated_completions", False, OFF, "{}=False", CUT),
    Row("sync_ref_model", False, OFF, "{}=False", MOVING_REFERENCE),
    Row("disable_dropout", False, ON, "{}=True", DROPOUT, "note"),
    Row("generation_kwargs", None, OFF, None, OVERRIDES, "warning"),
)

RLOO = build_framework(
    "trl-rloo",
    VERSION,
    title="TRL RLOO",
    optimum="exact",
    write="`RLOOConfig(output_dir=..., **rloo_settings(beta=BETA))`",
    rows=(
        Row("beta", 0.05, POSITIVE, CHOSEN_BETA, NO_KL),
        *SHARED,
        Row("normalize_advantages", False, OFF, "{}=False", UNEVEN_STEPS, "warning"),
    ),
    others={
        "remove_unused_columns": False,
        "num_generations": 2,
        "gradient_accumulation_steps": 1,
        "reward_clip_range": None,
    },
    strengths=(Strength("beta", only=WEIGHED),),
    sampling=SAMPLING,
    clips=("reward_clip_range",),
    only_prompts="remove_unused_columns",
)

GRPO = build_framework(
    "trl-grpo",
    VERSION,
    title="TRL GRPO",
    optimum="close: KL in the loss",
    write="`GRPOConfig(output_dir=..., **grpo_settings(beta=BETA))`, which writes beta \u00d7 (G \u2212 1) / G",
    rows=(
        Row("beta", 0.0, POSITIVE, CHOSEN_BETA, NO_KL),
        *SHARED,
        Row("scale_rewards", "group", OneOf(("none", False)), '{}="none"', OTHER_BETAS),
        Row(
            "multi_objective_aggregation",
            "sum_then_normalize",
            Is("sum_then_normalize"),
            '{}="sum_then_normalize"',
            DIVIDES,
        ),
        Row("loss_type", "dapo", OneOf(("dr_grpo", "dapo", "bnpo")), '{}="dr_grpo"', OTHER_WEIGHTS),
        Row("use_bias_correction_kl", True, ON, "{}=True", REVERSE_KL, only=WEIGHED),
        Row("importance_sampling_level", "token", Is("token"), '{}="token"', MULTIPLIED_KL, "warning"),
        Row("top_entropy_quantile", 1.0, Is(1.0), "{}=1.0", DROPS_TOKENS),
        Row("entropy_coef", 0.0, OFF, "{}=0.0", OTHER_OBJECTIVE),
        Row("use_adaptive_entropy", False, OFF, "{}=False", OTHER_OBJECTIVE),
        Row("delta", None, OFF, "{}=None", CLIPS_LOSS, "warning"),
        Row("off_policy_mask_threshold", None, OFF, "{}=None", "leaves out completions", "warning"),
    ),
    others={"remove_unused_columns": False, "num_generations": 8, "gradient_accumulation_steps": 1},
    strengths=(Strength("beta", group="num_generations", only=WEIGHED),),
    sampling=SAMPLING,
    only_prompts="remove_unused_columns",
)

A2PO = build_framework(
    "trl-a2po",
    VERSION,
    title="TRL A2PO",
    optimum="exact",
    write="`A2POConfig(output_dir=..., **a2po_settings(beta=BETA))`, and `_optimal_values` as `train a2po` fills them",
    rows=(
        Row("beta2", 1e-3, POSITIVE, "the beta that you chose, such as beta2=0.05", NO_KL),
        Row("beta1", 0.5, SameAs("beta2"), "{} as beta2", OTHER_VALUE, "warning"),
        Row("temperature", 1.0, Is(1.0), "{}=1.0", LOSS_TEMPERATURE),
        Row("top_k", None, Is(0), "{}=0", TOP_50),
        Row("filter_all_incorrect", True, OFF, "{}=False", DROPS_PROMPTS, "warning"),
    ),
    others={"remove_unused_columns": False, "num_value_samples": 8},
    strengths=(Strength("beta2", only=(("beta2", POSITIVE),)),),
    sampling={
        "max_tokens": ("max_completion_length", 256),
        "temperature": ("temperature", 1.0),
        "top_p": ("top_p", 1.0),
        "top_k": ("top_k", None),
    },
    only_prompts="remove_unused_columns",
)

ASYNC_GRPO = build_framework(
    "trl-async-grpo",
    VERSION,
    title="TRL AsyncGRPO",
    optimum="another one",
    write="`RLOOConfig` in its place",
    rows=(Row("num_generations", 8, NEVER, "an RLOOConfig", NO_KL_AT_ALL),),
    sampling={**SAMPLING, "max_tokens": ("max_completion_length", 2048)},
    others={},
)

ONLINE_DPO = build_framework(
    "trl-online-dpo",
    VERSION,
    title="TRL OnlineDPO",
    optimum="another one",
    write="`RLOOConfig` in its place",
    rows=(
        Row("loss_type", "sigmoid", NEVER, "an RLOOConfig", ORDER_ALONE, "warning"),
        Row("missing_eos_penalty", None, OFF, "{}=None", LATE_PENALTY),
    ),
    others={"remove_unused_columns": False},
    sampling={**SAMPLING, "max_tokens": ("max_new_tokens", 64), "temperature": ("temperature", 0.9)},
    only_prompts="remove_unused_columns",
)


# The same for both trainers: everything on policy, from the whole distribution, against a reference that stays.
COMMON = {
    **{setting: default for name, (setting, default) in SAMPLING.items() if name != "max_tokens"},
    "num_iterations": 1,
    "steps_per_generation": None,
    "mask_truncated_completions": False,
    "sync_ref_model": False,
    "disable_dropout": True,
    "remove_unused_columns": False,
}


def rloo_settings(
    beta: float | None = None, num_generations: int = 8, reward: CalibratedReward | None = None, **more: Any
) -> dict[str, Any]:
    """Choose arguments for `RLOOConfig` under which the optimum is pi_ref e^{R/beta} / Z, exactly.

    With a reward, length and sampling are those that its references were drawn with, and beta, if none is given, the
    one that its transform was chosen for.

    >>> rloo_settings(0.05)["normalize_advantages"]
    False
    """
    exact: dict[str, Any] = {"beta": _choose_beta(beta, num_generations, reward), "num_generations": num_generations}
    exact |= {"normalize_advantages": False, "reward_clip_range": None}
    return {**exact, **COMMON, **_copy_decoding(reward), **more}


def grpo_settings(
    beta: float | None = None, num_generations: int = 8, reward: CalibratedReward | None = None, **more: Any
) -> dict[str, Any]:
    """Choose arguments for `GRPOConfig` that come close to pi_ref e^{R/beta} / Z.

    The smaller beta and the longer the completions, the less close. A reward is used as in `rloo_settings`.

    >>> grpo_settings(0.08, num_generations=4)["beta"]
    0.06
    """
    written = _choose_beta(beta, num_generations, reward) * (num_generations - 1) / num_generations
    close: dict[str, Any] = {"beta": written, "num_generations": num_generations}
    close |= {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize", "loss_type": "dr_grpo"}
    close |= {"use_bias_correction_kl": True, "importance_sampling_level": "token"}
    close |= {"top_entropy_quantile": 1.0, "entropy_coef": 0.0, "delta": None, "off_policy_mask_threshold": None}
    return {**close, **COMMON, **_copy_decoding(reward), **more}


def a2po_settings(beta: float | None = None, reward: CalibratedReward | None = None, **more: Any) -> dict[str, Any]:
    """Choose arguments for `A2POConfig` under which the optimum is pi_ref e^{R/beta} / Z. A reward is used as above.

    >>> a2po_settings(0.05)["beta1"], a2po_settings(0.05)["top_k"]
    (0.05, 0)
    """
    beta = _choose_beta(beta, 2, reward)
    exact = {"beta1": beta, "beta2": beta, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "filter_all_incorrect": False}
    return {**exact, "remove_unused_columns": False, **_copy_decoding(reward, A2PO), **more}


def _choose_beta(beta: float | None, num_generations: int, reward: CalibratedReward | None) -> float:
    """Return the beta that is wanted, which is the reward's if none is given; ValueError where there is none."""
    if num_generations < 2:
        raise ValueError(f"settings need num_generations >= 2, got num_generations={num_generations!r}")
    if beta is None and reward is not None:
        beta = reward.beta
    if beta is None:
        has = "a reward without a beta" if reward is not None else "neither"
        raise ValueError(f"settings need beta=, or a reward= that was made for one, got {has}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"settings need a finite beta > 0, got beta={beta!r}")
    return beta


def _copy_decoding(reward: CalibratedReward | None, framework: Framework = RLOO) -> dict[str, Any]:
    """Copy the settings that the references of the reward's table were drawn with; none where it does not say."""
    decoding = None if reward is None else read_decoding(reward.table.meta)
    if decoding is None:
        return {}
    return {setting: decoding[name] for name, setting in framework.sampling.items() if name in decoding}
