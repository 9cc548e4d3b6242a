"""Best-of-N and other inference-time procedures as samplers: draw candidates, score them, return the chosen one.

`Reranked` is a sampler, so the best of N of a policy can be calibrated, evaluated and written to a file as the policy
itself can be.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> from calibrated_rewards.theory.procedures import BestOf
>>> best = Reranked(NumberSampler(), NumberScorer(), BestOf(4))
>>> choice = best.choose(["Hi"], [[7]])[0][0]
>>> [each.completion for each in choice.candidates], choice.rollout.completion, choice.score
(['1.0668', '1.5530', '0.8680', '-0.3397'], '1.5530', 1.5529999732971191)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Float64

from calibrated_rewards.files import Message, setting
from calibrated_rewards.prompts import Prompt, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Particular, Rendering, Rollout, Sampler, Seeds, sample, seeds_of
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, is_thread_safe, score


@runtime_checkable
class Choosing(Protocol):
    """The part of a procedure that runs it: those of `theory` have it, and one of yours may be no more than this."""

    @property
    def draws(self) -> int:
        """The largest number of candidates that it looks at."""

    def choose(self, scores: npt.ArrayLike, rng: np.random.Generator) -> Any:
        """Return the index of the candidate that comes out."""


@runtime_checkable
class Stopping(Protocol):
    """A procedure that takes the first candidate whose score reaches a threshold, and looks at no further ones."""

    @property
    def threshold(self) -> float:
        """The score at which drawing stops."""


@dataclass(frozen=True)
class Choice:
    """The rollout that a procedure chose, and the candidates that it was chosen from."""

    rollout: Rollout
    """Without a log-probability: that of the draw is not that of being chosen."""
    index: int
    candidates: list[Rollout]
    scores: list[float]

    @property
    def score(self) -> float:
        """The score of the rollout that was chosen."""
        return self.scores[self.index]


@dataclass
class Candidates:
    """What was drawn for one seed of one prompt so far."""

    prompt: int
    """The number of the prompt."""
    seeds: list[int]
    """A seed for each draw, and one for the choice."""
    drawn: list[Rollout]
    scores: list[float]
    done: bool = False


@dataclass(frozen=True)
class Reranked:
    """A sampler whose completions are chosen from several draws of another sampler, by their scores.

    A candidate depends on the prompt, the seed and its number alone: the best of 8 looks at the same first four as the
    best of 4. Ties are broken at random, by the seed. A procedure with a threshold (`RewindAndRepeat`) draws in rounds
    of growing size and stops once a draw has passed; what it returns is what it would return of all draws.

    `SoftBestOf` weighs scores by their differences and `RewindAndRepeat` compares them with a threshold: of a raw
    score they depend on its scale, which differs between prompts. Give them quantiles, `reward.Quantiles(reward)`.
    Best-of-N and worst-of-N depend on the order within a prompt alone, which calibration keeps: the plain reward model
    chooses the same, for prompts that no table knows too.
    """

    sampler: Sampler
    scorer: Scorer
    procedure: Choosing

    def __post_init__(self) -> None:
        if not isinstance(self.procedure, Choosing):
            raise TypeError(f"Reranked needs a procedure as BestOf(8) is one, got {self.procedure!r:.60}")
        if self.procedure.draws < 1:
            raise ValueError(f"Reranked needs a procedure that draws, got {self.procedure!r} with draws < 1")

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """Return for each prompt the rollout chosen for each of its seeds."""
        return [[choice.rollout for choice in each] for each in self.choose(prompts, seeds)]

    def choose(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Choice]]:
        """Draw, score and choose, for each seed of each prompt; with all candidates and their scores."""
        if len(prompts) != len(seeds):
            raise ValueError(f"each prompt needs its seeds, got {len(prompts)} prompts and seeds for {len(seeds)}")
        prompts, draws = list(prompts), self.procedure.draws
        keys = [prompt_key(prompt) for prompt in prompts]
        tasks = [
            Candidates(at, [*seeds_of(seed, keys[at], 0, draws), *seeds_of(seed, keys[at], -1, 0)], [], [])
            for at, own in enumerate(seeds)
            for seed in own
        ]
        size = 1 if isinstance(self.procedure, Stopping) else draws
        while going := [task for task in tasks if not task.done]:
            self._draw(prompts, going, size)
            size = max(1, len(going[0].drawn))  # in all, twice as many as before
        choices = iter([self._choose(task) for task in tasks])
        return [[next(choices) for _ in own] for own in seeds]

    def _draw(self, prompts: list[Prompt], tasks: Sequence[Candidates], size: int) -> None:
        """Draw and score so many more candidates of each task."""
        draws = self.procedure.draws
        new = [task.seeds[:draws][len(task.drawn) : len(task.drawn) + size] for task in tasks]
        at = sorted({task.prompt for task in tasks})
        per_prompt = [[s for task, own in zip(tasks, new, strict=True) if task.prompt == i for s in own] for i in at]
        answer = sample(self.sampler, [prompts[i] for i in at], per_prompt)
        drawn = {i: iter(rollouts) for i, rollouts in zip(at, answer, strict=True)}
        rollouts = [[next(drawn[task.prompt]) for _ in own] for task, own in zip(tasks, new, strict=True)]
        pairs = [
            (prompts[task.prompt], each.completion) for task, own in zip(tasks, rollouts, strict=True) for each in own
        ]
        scores = score(self.scorer, [prompt for prompt, _ in pairs], [completion for _, completion in pairs])
        self._check_scale(scores, pairs)
        values = iter(scores)
        for task, own in zip(tasks, rollouts, strict=True):
            task.drawn += own
            task.scores += [float(next(values)) for _ in own]
            task.done = len(task.drawn) >= draws or self._passes(task.scores)

    def _check_scale(self, scores: Float32[np.ndarray, " n"], pairs: Sequence[Any]) -> None:
        """Refuse scores that are no quantiles where a threshold is one."""
        if not isinstance(self.procedure, Stopping) or not 0 < self.procedure.threshold < 1:
            return
        wrong = np.flatnonzero((scores < 0) | (scores > 1))
        if len(wrong):
            prompt, completion = pairs[int(wrong[0])]
            quantiles = setting("scorer", "reward.Quantiles(reward)", option="--reward DIR")
            raise ValueError(
                Message(
                    f"{self.procedure!r} compares calibrated scores, in [0, 1], with its threshold; "
                    f"got {scores[wrong[0]]} for {start_of(completion)} of prompt {start_of(prompt)}: "
                    f"choose by the quantiles of a calibrated reward, {quantiles}"
                )
            )

    def _passes(self, scores: Sequence[float]) -> bool:
        if not isinstance(self.procedure, Stopping):
            return False
        return bool(max(scores) >= np.float32(self.procedure.threshold))

    def _choose(self, task: Candidates) -> Choice:
        # A score that is the threshold but for the rounding to float32 passes.
        scores: Float64[np.ndarray, " n"] = np.array(task.scores, np.float64)
        if isinstance(self.procedure, Stopping):
            scores[scores == np.float32(self.procedure.threshold)] = self.procedure.threshold
        rng = np.random.Generator(np.random.Philox(key=task.seeds[-1]))
        index = int(np.asarray(self.procedure.choose(scores, rng)))
        if not 0 <= index < len(task.drawn):
            raise ValueError(
                f"a procedure chooses one of {len(task.drawn)} candidates, {self.procedure!r} chose {index}"
            )
        rollout = task.drawn[index]._replace(logprob=None)
        return Choice(rollout, index, task.drawn, task.scores)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt that the scorer has no references for, or that the sampler cannot complete."""
        for part in (self.scorer, self.sampler):
            if isinstance(part, Particular):
                part.check(prompts)

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the policy reads; "" where only a server knows."""
        return self.sampler.rendered(prompt) if isinstance(self.sampler, Rendering) else ""

    @property
    def thread_safe(self) -> bool:
        """True if the scorer and the sampler say so."""
        return is_thread_safe(self.scorer) and is_thread_safe(self.sampler)

    def fingerprint(self) -> dict[str, Any]:
        """Describe all that the completions depend on, but for the seeds."""
        parts = {"of": fingerprint(self.sampler), "by": fingerprint(self.scorer)}
        return {"kind": "reranked", "procedure": repr(self.procedure), **parts}
