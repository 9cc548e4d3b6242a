"""Choose the rows of a dataset from the rollouts of a prompt: the best, pairs of best and worst, or all with weights.

>>> from calibrated_rewards.samplers.protocol import Rollout
>>> rollouts = [Rollout(text, tokens=1) for text in ("4", "5", "four", "")]
>>> scores, u = np.array([3.0, 0.0, 2.0, 1.0], np.float32), np.array([0.875, 0.125, 0.625, 0.375])
>>> prompt = PromptRollouts(b"k" * 16, "2+2=", rollouts, scores, u, u, beta=0.25)
>>> left_out = Counter()
>>> Selection("sft").rows(prompt, left_out)
[{'prompt': '2+2=', 'completion': '4', 'score': 3.0, 'u': 0.875}]
>>> [(row["chosen"], row["rejected"], row["margin"]) for row in Selection("pairs", of=3).rows(prompt, left_out)]
[('4', '5', 0.75)]
>>> +left_out
Counter({'rollouts with an empty completion': 2})
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import softmax

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.text import completion_messages
from calibrated_rewards.prompts import Completion, start_of
from calibrated_rewards.training.offline.rollouts import PromptRollouts

Kind = Literal["sft", "pairs", "scored", "weighted"]
KINDS = ("sft", "pairs", "scored", "weighted")
Row: TypeAlias = dict[str, Any]

# Reasons to leave something out, as the card of a dataset counts them.
NO_RESOLUTION = "prompts whose rollouts all have one reward"
TOO_FEW = "prompts with too few rollouts"
EMPTY = "rollouts with an empty completion"
CUT = "rollouts that the token limit cut"
LIGHT = "rollouts with less weight than the floor"
TIED = "pairs of equal scores"


@dataclass(frozen=True)
class Selection:
    """Which rollouts of a prompt become rows; the same whenever and wherever they are chosen."""

    kind: Kind
    draws: int | None = None
    """Of "sft", completions drawn a prompt by their weights, in place of the best; of "pairs", the most a prompt."""
    of: int | None = None
    """The n of pairs of best and worst of n; None for all rollouts of a prompt."""
    floor: float = 1e-6
    """The least weight of a row of "weighted"."""
    finished_only: bool = False
    """Leave out rollouts that the token limit cut."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a dataset is one of {', '.join(KINDS)}, got {self.kind!r:.80}")
        if self.draws is not None and (self.draws < 1 or self.kind not in ("sft", "pairs")):
            raise ValueError(Message(f"{setting('draws', str(self.draws))} needs >= 1, and sft or pairs: {self.kind}"))
        if self.of is not None and (self.of < 2 or self.kind != "pairs"):
            raise ValueError(Message(f"{setting('of', str(self.of))} needs >= 2, and pairs: {self.kind}"))
        if not 0 <= self.floor < 1:
            raise ValueError(Message(f"a floor is a weight from 0 to 1, got {setting('floor', str(self.floor))}"))

    @property
    def needs_beta(self) -> bool:
        """True if the rows have weights, or are drawn by them."""
        return self.kind in ("scored", "weighted") or (self.kind == "sft" and self.draws is not None)

    def rows(self, prompt: PromptRollouts, left_out: Counter[str]) -> list[Row]:
        """Make the rows of a prompt, and count by reason what is in none: prompts, rollouts and pairs."""
        if self.kind == "scored":
            return [*iterate_scored(prompt)]
        if prompt.rewards.min() == prompt.rewards.max():
            left_out[NO_RESOLUTION] += 1
            return []
        usable = self._find_usable(prompt, left_out)
        if len(usable) < (self.of or (2 if self.kind == "pairs" else 1)):
            left_out[TOO_FEW] += 1
            return []
        rng = np.random.default_rng([self.seed, int.from_bytes(prompt.key, "big")])
        if self.kind == "pairs":
            return [*self._iterate_pairs(prompt, usable, rng, left_out)]
        if self.kind == "weighted":
            weights = prompt.weights
            heavy = usable[weights[usable] >= self.floor]
            left_out[LIGHT] += len(usable) - len(heavy)
            return [
                {**make_row(prompt, i), "weight": float(weights[i]), "rollouts": len(weights)} for i in heavy.tolist()
            ]
        if self.draws is None:
            # The first of several that tie: rollouts are exchangeable, so this favours none.
            chosen = usable[[np.argmax(prompt.scores[usable])]]
        else:
            # The weights of all may round to 0 beside that of a rollout that is left out.
            weights = np.asarray(softmax(prompt.rewards[usable] / prompt.beta))
            chosen = usable[resample(weights, self.draws, float(rng.random()))]
        return [
            {**make_row(prompt, i), "score": float(prompt.scores[i]), "u": float(prompt.u[i])} for i in chosen.tolist()
        ]

    def _find_usable(self, prompt: PromptRollouts, left_out: Counter[str]) -> Int64[np.ndarray, " _"]:
        """Number the rollouts that a trainer can use."""
        empty = np.array([is_empty(completion) for completion in prompt.completions])
        cut = np.array([self.finished_only and each.finish == "length" for each in prompt.rollouts])
        left_out[EMPTY] += int(empty.sum())
        left_out[CUT] += int((cut & ~empty).sum())
        return np.flatnonzero(~(empty | cut)).astype(np.int64)

    def _iterate_pairs(
        self,
        prompt: PromptRollouts,
        usable: Int64[np.ndarray, " _"],
        rng: np.random.Generator,
        left_out: Counter[str],
    ) -> Iterator[Row]:
        """Yield best and worst of all rollouts, or of disjoint random sets of n, which are independent."""
        n = self.of or len(usable)
        order = usable if self.of is None else rng.permutation(usable)
        for at in range(0, len(order) - n + 1, n)[: self.draws]:
            some = order[at : at + n]
            best, worst = (int(some[pick(prompt.scores[some])]) for pick in (np.argmax, np.argmin))
            if prompt.scores[best] == prompt.scores[worst]:
                left_out[TIED] += 1
                continue
            yield {
                "prompt": prompt.prompt,
                "chosen": as_completion(prompt, best),
                "rejected": as_completion(prompt, worst),
                "margin": float(prompt.rewards[best] - prompt.rewards[worst]),
                "score_chosen": float(prompt.scores[best]),
                "score_rejected": float(prompt.scores[worst]),
            }


def iterate_scored(prompt: PromptRollouts) -> Iterator[Row]:
    """Yield every rollout with its score, quantile and reward, and its weight and log-ratio under the optimum."""
    columns = (prompt.scores, prompt.u, prompt.rewards, prompt.weights, prompt.log_ratios)
    numbers = zip(prompt.rollouts, *(column.tolist() for column in columns), strict=True)
    for i, (rollout, raw, u, reward, weight, log_ratio) in enumerate(numbers):
        yield {
            **make_row(prompt, i),
            "raw": raw,
            "u": u,
            "reward": reward,
            "weight": weight,
            "log_z": prompt.log_z,
            "log_ratio": log_ratio,
            "tokens": rollout.tokens,
            "logprob": rollout.logprob,
            "number": i,
            "key": prompt.key.hex(),
        }


def make_row(prompt: PromptRollouts, number: int) -> Row:
    """Make a row of a prompt and one of its completions."""
    return {"prompt": prompt.prompt, "completion": as_completion(prompt, number)}


def as_completion(prompt: PromptRollouts, number: int) -> Completion:
    """Return a completion in its prompt's form: messages after messages, a text after a text."""
    completion = prompt.completions[number]
    if not isinstance(prompt.prompt, str):
        return completion_messages(completion)
    if not isinstance(completion, str):
        raise ValueError(f"a text is completed by a text, got {start_of(completion)} for {start_of(prompt.prompt)}")
    return completion


def is_empty(completion: Completion) -> bool:
    """Tell if a completion has no text, and calls no tool."""
    if isinstance(completion, str):
        return not completion
    return not any(message.get("content") or message.get("tool_calls") for message in list[Any](completion))


def resample(weights: Float64[np.ndarray, " K"], draws: int, start: float) -> Int64[np.ndarray, " draws"]:
    """Draw numbers by weights, systematically: number i comes floor or ceil of draws w_i times, draws w_i on average.

    `start` is uniform on [0, 1).

    >>> resample(np.array([0.5, 0.25, 0.25]), 4, start=0.6)
    array([0, 0, 1, 2])
    """
    ends = np.cumsum(weights) / weights.sum()
    ends[np.flatnonzero(weights)[-1] :] = 1.0  # rounding must not leave a point beyond the last
    points = np.minimum((start + np.arange(draws)) / draws, np.nextafter(1.0, 0.0))
    return np.asarray(np.searchsorted(ends, points, side="right"), np.int64)
