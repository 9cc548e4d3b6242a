"""Distil a calibrated reward into a reward model: pairs whose Bradley-Terry optimum is the logit of the reward.

The paper trains "calibrated reward models" (section 5.1) and does not say how. This way works with any pairwise trainer
whose loss is -log sigmoid(r_chosen - r_rejected - margin), as TRL's RewardTrainer's is.

Each pair (a, b) comes in both orders, with margins m and -m, m = logit u_a - logit u_b. The two losses together are
-log sigmoid(d - m) - log sigmoid(m - d), d = r_a - r_b: convex in d, even around m, and least at d = m exactly. So the
optimum is r = logit u + c, with one c for each prompt, since pairs are of one prompt.

Each completion is paired with its mirror image: the best with the worst, the second best with the second worst. Their
logits add up to 0 (ties aside), so TRL's `center_rewards_coefficient`, which adds the square of r_a + r_b, is least at
c = 0 without pulling at anything else: with any coefficient > 0 the optimum is r = logit u, and u = sigmoid(r). Near
the optimum the two losses of a pair are log 4 + (d - m)^2 / 4, so with the coefficient 1/8 a pair costs
((r_a - logit u_a)^2 + (r_b - logit u_b)^2) / 2: plain regression.
"""

from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from scipy.special import logit

from calibrated_rewards.models.text import completion_messages
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.table.reference_table import ReferenceTable

# The weight of a pair's sum beside its difference: `center_rewards_coefficient`.
CENTER = 1 / 8


class MarginPairs(TypedDict):
    """Columns of a preference dataset, as `datasets.Dataset.from_dict` takes them."""

    prompt: list[Prompt]
    chosen: list[Completion]
    rejected: list[Completion]
    margin: list[float]


def distillation_pairs(
    table: ReferenceTable,
    prompts: Iterable[Prompt],
    completions: Iterable[Completion],
    scores: npt.ArrayLike,
    *,
    most: int | None = None,
    seed: int = 0,
) -> MarginPairs:
    """Make both orders of the mirrored pairs of each prompt's completions, with margins.

    `prompts`, `completions` and `scores` are rollouts, one of each for each rollout, in any order: those that the table
    was made of. Of others the logits of a pair need not add up to 0, and centring pulls them a little that way.
    `most` is the number of pairs of a prompt that are used, drawn at random; None for all.

    >>> table = ReferenceTable.build([("2+2=", [0.0, 1.0, 2.0, 3.0])])
    >>> pairs = distillation_pairs(table, ["2+2="] * 4, ["5", "3", "four", "4"], [0.0, 1.0, 2.0, 3.0])
    >>> [*zip(pairs["chosen"], pairs["rejected"], np.round(pairs["margin"], 2).tolist())]
    [('4', '5', 3.89), ('5', '4', -3.89), ('four', '3', 1.02), ('3', 'four', -1.02)]
    """
    prompts, completions, values = list(prompts), list(completions), np.asarray(scores)
    if not len(prompts) == len(completions) == len(values):
        numbers = f"{len(prompts)}, {len(completions)} and {len(values)}"
        raise ValueError(f"each rollout has a prompt, a completion and a score, got {numbers}")
    if most is not None and most < 1:
        raise ValueError(f"distillation_pairs needs most >= 1, got most={most}")
    rows = table.rows(prompts)
    targets = calibrated_logits(table, rows, values)
    pairs = MarginPairs(prompt=[], chosen=[], rejected=[], margin=[])
    rng = np.random.default_rng(seed)
    for rollouts in np.split(np.lexsort((targets, rows)), np.flatnonzero(np.diff(np.sort(rows))) + 1):
        mirrored = np.stack([rollouts[::-1], rollouts], axis=1)[: len(rollouts) // 2]
        if most is not None and len(mirrored) > most:
            mirrored = mirrored[np.sort(rng.choice(len(mirrored), most, replace=False))]
        for better, worse in mirrored.tolist():
            for chosen, rejected in ((better, worse), (worse, better)):
                # Messages where the prompt is messages, as the trainer's chat template wants them.
                chat = not isinstance(prompts[chosen], str)
                both = completions[chosen], completions[rejected]
                good, bad = map(completion_messages, both) if chat else both
                pairs["prompt"].append(prompts[chosen])
                pairs["chosen"].append(good)
                pairs["rejected"].append(bad)
                pairs["margin"].append(float(targets[chosen] - targets[rejected]))
    return pairs


def calibrated_logits(table: ReferenceTable, rows: npt.ArrayLike, scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute logit u, u the quantile of Eq. 12; where that is 0 or 1, half a reference short of it."""
    edge = 0.5 / table.counts(rows)
    return np.asarray(logit(np.clip(table.cdf(rows, scores), edge, 1 - edge)))


def distil(model: Any, tokenizer: Any, pairs: MarginPairs, output_dir: str, **settings: Any) -> Any:
    """Train a sequence classifier of one label with TRL's RewardTrainer, and return the trainer.

    `settings` are RewardConfig's: learning_rate, max_steps, ... The trainer's accuracy is one half by construction.
    It appends EOS to plain text: score what it trained with `Text(append_eos=True)`.
    """
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    config = RewardConfig(output_dir=output_dir, **{"center_rewards_coefficient": CENTER, **settings})
    data = Dataset.from_dict(dict(pairs))
    trainer = RewardTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer
