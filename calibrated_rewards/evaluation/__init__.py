"""Evaluation: win rates and KL with their errors, expected before training and measured after it.

- `estimates`, `win_rate`: averages over prompts with intervals; win rates of samples and of weighted rollouts.
- `pass_at_k`: unbiased pass@k, best@k and worst@k; `validation_dumps` reads the samples that verl and TRL dump.
- `multiple_choice`: `answer_questions` compares reward models and log-probability on questions with options.
- `policies`, `kl`: `evaluate` draws from policies, scores, and compares them with their reference.
- `frontier`: `estimate_frontier` compares objectives without any training.
- `recommend`, `recommendation`: which transform and beta to train with, what it buys, whether K is enough;
  `reward_commands`: what to paste to make that reward.
- `held_out`, `importance_weights`: `check_log_ratios` judges a policy on held-out rollouts, without generating;
  `held_out_results`: `compare_held_out` puts several side by side.
- `expectations`, `table_laws`: `expect` predicts beta, KL and win rate of training on a table, with its ties.
- `results`, `frontier_results`, `wording`, `plots`, `report`: results in print, JSON, figures and one page of HTML.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.evaluation.estimates import Estimate as Estimate, Samples as Samples
from calibrated_rewards.evaluation.pass_at_k import (
    best_at_k as best_at_k,
    pass_at_k as pass_at_k,
    worst_at_k as worst_at_k,
)
from calibrated_rewards.evaluation.validation_dumps import DumpedStep as DumpedStep, read_dump as read_dump
from calibrated_rewards.evaluation.win_rate import Prediction as Prediction, predict as predict, win_rate as win_rate

if TYPE_CHECKING:
    from calibrated_rewards.evaluation.expectations import Expectation as Expectation, expect as expect
    from calibrated_rewards.evaluation.frontier import estimate_frontier as estimate_frontier
    from calibrated_rewards.evaluation.frontier_results import FrontierEstimate as FrontierEstimate
    from calibrated_rewards.evaluation.held_out import (
        HeldOutCheck as HeldOutCheck,
        HeldOutComparison as HeldOutComparison,
        check_log_ratios as check_log_ratios,
        compare_log_ratios as compare_log_ratios,
        realised_share as realised_share,
    )
    from calibrated_rewards.evaluation.held_out_results import (
        HeldOutPolicies as HeldOutPolicies,
        compare_held_out as compare_held_out,
    )
    from calibrated_rewards.evaluation.importance_weights import weighted_win_rate as weighted_win_rate
    from calibrated_rewards.evaluation.multiple_choice import (
        Answers as Answers,
        Question as Question,
        answer_questions as answer_questions,
        read_questions as read_questions,
    )
    from calibrated_rewards.evaluation.policies import evaluate as evaluate
    from calibrated_rewards.evaluation.recommend import recommend as recommend
    from calibrated_rewards.evaluation.recommendation import Recommendation as Recommendation
    from calibrated_rewards.evaluation.results import Evaluation as Evaluation

# Loaded on first use: they bring heavy libraries.
LAZY = {
    "evaluate": "policies",
    "Evaluation": "results",
    "estimate_frontier": "frontier",
    "FrontierEstimate": "frontier_results",
    "HeldOutCheck": "held_out",
    "HeldOutComparison": "held_out",
    "check_log_ratios": "held_out",
    "compare_log_ratios": "held_out",
    "realised_share": "held_out",
    "HeldOutPolicies": "held_out_results",
    "compare_held_out": "held_out_results",
    "weighted_win_rate": "importance_weights",
    **dict.fromkeys(("Answers", "Question", "answer_questions", "read_questions"), "multiple_choice"),
    "Expectation": "expectations",
    "expect": "expectations",
    "Recommendation": "recommendation",
    "recommend": "recommend",
}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
