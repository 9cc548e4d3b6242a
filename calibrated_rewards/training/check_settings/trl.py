"""TRL's settings, read in 1.16: RLOO is exact, GRPO close if told to be; AsyncGRPO and OnlineDPO have other objectives.

Measured with the trainers themselves, see docs/evidence/results.md and benchmarks/convergence.py.
"""

from typing import Any

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.training.check_settings.rules import (
    Case,
    Framework,
    Is,
    Never,
    Off,
    OneOf,
    Positive,
    Rule,
    SameAs,
    Strength,
)
from calibrated_rewards.training.check_settings.sampling import decoding_of

VERSION = "1.16.0"
SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
_ON_POLICY = {"num_iterations": 1, "steps_per_generation": None, "mask_truncated_completions": False}
_STILL = {"sync_ref_model": False, "disable_dropout": True, "remove_unused_columns": False}
COMMON = {"temperature": 1.0, **SAMPLING, **_ON_POLICY, **_STILL}


_WEIGHED: tuple[Case, ...] = (("beta", Positive()),)
_SHARED = (
    Rule("beta", Positive(), "the beta that you chose, such as beta=0.05", "without a KL the optimum is an argmax"),
    Rule("num_iterations", Is(1), "num_iterations=1", "later passes are off-policy, and clipped", "warning"),
    Rule(
        "steps_per_generation",
        SameAs("gradient_accumulation_steps"),
        "steps_per_generation=None",
        "all but the first step of a generation are off-policy, and clipped",
        "warning",
    ),
    Rule(
        "mask_truncated_completions",
        Off(),
        "mask_truncated_completions=False",
        "completions that are cut were calibrated like all others, and would now teach nothing",
    ),
    Rule(
        "sync_ref_model",
        Off(),
        "sync_ref_model=False",
        "the reference moves away from the one that the table was drawn from",
    ),
    Rule(
        "disable_dropout",
        Is(True),
        "disable_dropout=True",
        "where the policy has dropout, its log-probabilities are of another model than the one that wrote",
        "note",
    ),
    Rule("generation_kwargs", Off(), None, "they override the settings that can be checked", "warning"),
)

RLOO = Framework(
    name="trl-rloo",
    version=VERSION,
    rules=(
        *_SHARED,
        Rule(
            "normalize_advantages",
            Off(),
            "normalize_advantages=False",
            "only a step size here, as it divides the KL as well, but one that changes with each batch",
            "warning",
        ),
    ),
    defaults={
        **COMMON,
        "beta": 0.05,
        "disable_dropout": False,
        "num_generations": 2,
        "max_completion_length": 512,
        "gradient_accumulation_steps": 1,
        "generation_kwargs": None,
        "normalize_advantages": False,
        "reward_clip_range": None,
    },
    strengths=(Strength("beta", only=_WEIGHED),),
    sampling={
        "max_tokens": "max_completion_length",
        "temperature": "temperature",
        **{name: name for name in SAMPLING},
    },
    clips=("reward_clip_range",),
    only_prompts="remove_unused_columns",
)

GRPO = Framework(
    name="trl-grpo",
    version=VERSION,
    rules=(
        *_SHARED,
        Rule(
            "scale_rewards",
            OneOf(("none", False)),
            'scale_rewards="none"',
            "rewards over their standard deviation, next to a KL that is not, have another beta for each prompt",
        ),
        Rule(
            "multi_objective_aggregation",
            Is("sum_then_normalize"),
            'multi_objective_aggregation="sum_then_normalize"',
            "divides by standard deviations whatever scale_rewards says",
        ),
        Rule(
            "loss_type",
            OneOf(("dr_grpo", "dapo", "bnpo")),
            'loss_type="dr_grpo"',
            "weighs tokens by the length of their completion, or clips otherwise than the others do",
        ),
        Rule(
            "use_bias_correction_kl",
            Is(True),
            "use_bias_correction_kl=True",
            "the gradient is that of the KL from the reference, KL(ref || policy), whose optimum is another",
            only=_WEIGHED,
        ),
        Rule(
            "importance_sampling_level",
            Is("token"),
            'importance_sampling_level="token"',
            "a sequence's ratio multiplies the KL of each of its tokens",
            "warning",
        ),
        Rule("top_entropy_quantile", Is(1.0), "top_entropy_quantile=1.0", "leaves out tokens"),
        Rule("entropy_coef", Off(), "entropy_coef=0.0", "adds another objective"),
        Rule("use_adaptive_entropy", Off(), "use_adaptive_entropy=False", "adds another objective"),
        Rule("delta", Off(), "delta=None", "clips the loss from above", "warning"),
        Rule("off_policy_mask_threshold", Off(), "off_policy_mask_threshold=None", "leaves out completions", "warning"),
    ),
    defaults={
        **COMMON,
        "beta": 0.0,
        "disable_dropout": False,
        "num_generations": 8,
        "max_completion_length": 512,
        "gradient_accumulation_steps": 1,
        "generation_kwargs": None,
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
        "loss_type": "dapo",
        "use_bias_correction_kl": True,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "delta": None,
        "off_policy_mask_threshold": None,
    },
    strengths=(Strength("beta", group="num_generations", only=_WEIGHED),),
    sampling=RLOO.sampling,
    only_prompts="remove_unused_columns",
)

ASYNC_GRPO = Framework(
    name="trl-async-grpo",
    version=VERSION,
    rules=(
        Rule(
            "num_generations",
            Never(),
            "an RLOOConfig",
            "this trainer has no KL, and divides rewards by their standard deviation whatever is set: with any number "
            "of generations its optimum is an argmax",
        ),
    ),
    defaults={
        "num_generations": 8,
        "max_completion_length": 2048,
        "temperature": 1.0,
        **SAMPLING,
    },
    sampling=RLOO.sampling,
)

ONLINE_DPO = Framework(
    name="trl-online-dpo",
    version=VERSION,
    rules=(
        Rule(
            "loss_type",
            Never(),
            "an RLOOConfig",
            "only which of two completions scores higher is used, and no calibration of a prompt changes that",
            "warning",
        ),
        Rule(
            "missing_eos_penalty",
            Off(),
            "missing_eos_penalty=None",
            "is taken off after calibration, in units of the calibrated reward",
        ),
    ),
    defaults={
        "loss_type": "sigmoid",
        "missing_eos_penalty": None,
        "max_new_tokens": 64,
        "temperature": 0.9,
        **SAMPLING,
        "remove_unused_columns": False,
    },
    sampling={**RLOO.sampling, "max_tokens": "max_new_tokens"},
    only_prompts="remove_unused_columns",
)


def rloo_settings(
    beta: float | None = None, num_generations: int = 8, reward: CalibratedReward | None = None, **more: Any
) -> dict[str, Any]:
    """Arguments for `RLOOConfig` under which the optimum is pi_ref e^{R/beta} / Z, exactly.

    With a reward, length and sampling are those that its references were drawn with, and beta, if none is given, the
    one that its transform was chosen for.

    >>> rloo_settings(0.05)["normalize_advantages"]
    False
    """
    beta = _beta(beta, num_generations, reward)
    exact = {"normalize_advantages": False, "reward_clip_range": None}
    return {"beta": beta, "num_generations": num_generations, **exact, **COMMON, **_drawn(reward), **more}


def grpo_settings(
    beta: float | None = None, num_generations: int = 8, reward: CalibratedReward | None = None, **more: Any
) -> dict[str, Any]:
    """Arguments for `GRPOConfig` that come close to pi_ref e^{R/beta} / Z; the smaller beta and the longer the less so.

    With a reward, as `rloo_settings`.

    >>> grpo_settings(0.08, num_generations=4)["beta"]
    0.06
    """
    written = _beta(beta, num_generations, reward) * (num_generations - 1) / num_generations
    scores = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize", "loss_type": "dr_grpo"}
    kl = {"use_bias_correction_kl": True, "importance_sampling_level": "token"}
    extras = {"top_entropy_quantile": 1.0, "entropy_coef": 0.0, "delta": None, "off_policy_mask_threshold": None}
    own = {"beta": written, "num_generations": num_generations, **scores, **kl, **extras}
    return {**own, **COMMON, **_drawn(reward), **more}


def _beta(beta: float | None, num_generations: int, reward: CalibratedReward | None) -> float:
    """The beta that is wanted."""
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


def _drawn(reward: CalibratedReward | None) -> dict[str, Any]:
    """How completions are drawn, as the references of the reward's table were; nothing where it does not say."""
    decoding = None if reward is None else decoding_of(reward.table.meta)
    if decoding is None:
        return {}
    return {setting: decoding[name] for name, setting in RLOO.sampling.items() if name in decoding}
