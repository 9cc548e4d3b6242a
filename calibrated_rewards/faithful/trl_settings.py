"""What to write in TRL: RLOO with which the optimum is exact, GRPO that comes close, drawn as the table's references.

Measured with the trainers themselves, see docs/evidence/results.md and benchmarks/convergence.py.
"""

from typing import Any

from calibrated_rewards.faithful.sampled import decoding_of
from calibrated_rewards.faithful.trl_rules import COMMON, RLOO
from calibrated_rewards.reward import CalibratedReward


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
