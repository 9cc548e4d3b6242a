"""What came of training: completions of policies and of their reference, judged, win rates and KL with their errors.

Everything is kept in one directory, as in calibration: a run that was killed goes on where it was.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> found = evaluate({"same": NumberSampler()}, NumberSampler(), ["2+2=", "Hi"], {"reward": NumberScorer()}, m=8)
>>> found.policies[0].win_rates["reward"]["BestOf(n=4)"].prompts
2
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Float

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.sources import Asked, prompts_from
from calibrated_rewards.evaluation.estimates import Estimate, Samples, Stated, difference
from calibrated_rewards.evaluation.outcomes import Difference, Evaluation, Outcome, Precision, plain_prompts_note
from calibrated_rewards.evaluation.responses import KnowsPrecision, Measure, Responses, distances, responses
from calibrated_rewards.evaluation.win_rate import win_rate
from calibrated_rewards.evaluation.wording import spoken
from calibrated_rewards.files import Message, check_folder_name, setting
from calibrated_rewards.prompts import Prompt, prompt_key
from calibrated_rewards.samplers.protocol import Sampler
from calibrated_rewards.scorers.protocol import Scorer, fingerprint
from calibrated_rewards.theory.procedures import BestOf, Procedure, Standard, WorstOf

logger = logging.getLogger(__name__)
REFERENCE = "reference"
# Policies share their seeds, so that a difference of two is less noisy; the reference has others, or completions of a
# policy near it would be its own, and would not be independent.
APART = 2**32


def evaluate(
    policies: Mapping[str, Sampler],
    reference: Sampler,
    prompts: Any,
    scorers: Mapping[str, Scorer],
    out: str | os.PathLike[str] | None = None,
    *,
    m: int = 32,
    seed: int = 1,
    select: str | None = None,
    procedures: Sequence[Procedure] = (Standard(), BestOf(4), WorstOf(4)),
    divergence: Mapping[str, Measure] | None = None,
    prompts_per_shard: int = 32,
    show_progress: bool = True,
    **source: Any,
) -> Evaluation:
    """Draw m completions of each prompt from each policy and from the reference, score them, and compare.

    Best-of-N and worst-of-N select by the scorer `select`, the first if nothing is said, and each scorer judges what
    was selected. Win rates are over the reference under the same procedure, by U-statistics; intervals are for all
    prompts like these, so they need prompts that the policies were not trained on. `prompts` is whatever `calibrate`
    takes, with its options.

    `divergence` says for which policies a KL is measured, and how; if nothing is said, for all that are transformers
    models, as the reference must be. With `out` all is kept there, a run of `calibrate` for each policy, and
    `evaluation.json`: the same call goes on where it was stopped, a larger m or another scorer adds what is missing.

    The seed is another one than calibration's: a policy has been trained to beat the very references of its table, and
    is to be compared with new ones.
    """
    m = int(m) if isinstance(m, np.integer) else m
    _check(policies, scorers, select, procedures, m)
    _check_folder(out)
    asked = [*prompts_from(prompts, **source)]
    if not asked:
        raise ValueError("evaluate needs prompts, got none")
    plain = _plain_prompts(asked, reference)
    if plain:
        logger.warning("%s", plain_prompts_note(plain, len({prompt_key(each.prompt) for each in asked})))
    settings = {"k": m, "prompts_per_shard": prompts_per_shard, "show_progress": show_progress}
    with TemporaryDirectory() as folder:
        run = _Run(Path(folder if out is None else out), asked, scorers, settings)
        run.draw(REFERENCE, reference, seed)
        # A mapping may load a policy when it is asked for; it is let go of before the next one comes.
        made = {name: _made(run, name, policies[name], reference, seed + APART, divergence) for name in policies}
        kl = {name: found for name, found in made.items() if found is not None}
        compared = _Compared({name: run.read(name) for name in (REFERENCE, *policies)}, select or next(iter(scorers)))
        found = replace(compared.evaluation(procedures, kl), plain_prompts=plain)
    if out is not None:
        found.save(Path(out) / "evaluation.json")
    return found


def _check(policies: Any, scorers: Any, select: str | None, procedures: Any, m: Any) -> None:
    procedures = procedures if isinstance(procedures, Sequence) else ()
    if not (isinstance(policies, Mapping) and isinstance(scorers, Mapping) and policies and scorers and procedures):
        raise ValueError("evaluate needs policies and scorers, each by its name, and procedures, got none of one")
    for name in policies:
        check_folder_name(name, "a policy", (REFERENCE, "evaluation.json"))
    if select is not None and select not in scorers:
        named = setting("select", repr(select))
        raise ValueError(Message(f"the scorers are {', '.join(scorers)}, and one of them selects; got {named}"))
    for each in procedures:
        if not isinstance(each, Procedure):
            raise TypeError(f"evaluate needs procedures as BestOf(4) is one, got {each!r:.60}")
    if not isinstance(m, int) or isinstance(m, bool):
        raise TypeError(f"evaluate needs a whole m, got m={m!r:.60}")
    most = max(procedures, key=lambda each: each.draws)
    if m < max(1, most.draws):
        needs = f"{spoken(most)} needs {max(1, most.draws)} completions of each prompt or more"
        raise ValueError(f"{needs}, got {m}: draw more (m), or take a smaller N")


def _check_folder(out: str | os.PathLike[str] | None) -> None:
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"evaluate needs a folder to keep all in, got out={str(out)!r}, a file")


def _plain_prompts(asked: Sequence[Asked], reference: Sampler) -> int:
    """How many prompts are text though the reference has a chat template, which it does not use for text."""
    plain = len({prompt_key(each.prompt) for each in asked if isinstance(each.prompt, str)})
    text = fingerprint(reference).get("text") if plain else None
    unused = isinstance(text, Mapping) and text.get("template") is not None and not text.get("chat")
    return plain if unused else 0


def _made(
    run: "_Run", name: str, policy: Sampler, reference: Sampler, seed: int, divergence: Mapping[str, Measure] | None
) -> "_MeasuredKL | None":
    """Completions of a policy, scored, and their KL, if it is measured."""
    run.draw(name, policy, seed)
    measure = _between(policy, reference) if divergence is None else divergence.get(name)
    return None if measure is None else run.distances(name, measure)


def _between(policy: Sampler, reference: Sampler) -> Measure | None:
    # Without torch there is nothing that has log-probabilities, and no need to load it.
    if "torch" not in sys.modules:
        return None
    from calibrated_rewards.evaluation.kl import between

    return between(policy, reference)


@dataclass(frozen=True)
class _Run:
    """Where the rollouts of all are, of which prompts, and how they are made."""

    out: Path
    asked: list[Asked]
    scorers: Mapping[str, Scorer]
    settings: Mapping[str, Any]

    def draw(self, name: str, sampler: Sampler, seed: int) -> None:
        calibrate(self.asked, sampler, dict(self.scorers), self.out / name, seed=seed, **self.settings)

    def distances(self, name: str, measure: Measure) -> "_MeasuredKL":
        found = distances(self.out / name, self.prompts, measure, self.settings["k"], self.settings["show_progress"])
        return _MeasuredKL(*found, measure.precision() if isinstance(measure, KnowsPrecision) else None)

    def read(self, name: str) -> Responses:
        return responses(self.out / name, self.prompts, [*self.scorers], self.settings["k"])

    @property
    def prompts(self) -> dict[bytes, Prompt]:
        """Each once, in the order in which they came."""
        return {prompt_key(each.prompt): each.prompt for each in self.asked}


@dataclass(frozen=True)
class _MeasuredKL:
    """The KL of each completion of a policy, and how it was read."""

    values: Float[np.ndarray, "P m"]
    not_as_drawn: int
    precision: Precision | None

    def stated(self) -> Stated:
        """The mean; of one model saved in two dtypes the interval begins at 0, for the rest may be rounding."""
        mean = _mean(self.values).within(0.0, np.inf)
        rounded = self.precision is not None and self.precision.rounding is not None
        return replace(mean, low=0.0) if rounded and mean.low is not None else mean


@dataclass(frozen=True)
class _Compared:
    """The responses of the reference and of each policy, and what follows from them."""

    of: Mapping[str, Responses]
    select: str

    def evaluation(self, procedures: Sequence[Procedure], kl: Mapping[str, _MeasuredKL]) -> Evaluation:
        samples = {name: self._samples(own) for name, own in self.of.items()}
        wins = {
            (name, judge, repr(each)): win_rate(own[judge], samples[REFERENCE][judge], each, jackknife=False)
            for name, own in samples.items()
            for judge in own
            for each in procedures
            if name != REFERENCE
        }
        names = [name for name in self.of if name != REFERENCE]
        differences = (
            Difference(a, b, judge, how, Stated.of(difference(one, wins[b, judge, how])).within(-1.0, 1.0))
            for a, b in combinations(names, 2)
            for (name, judge, how), one in wins.items()
            if name == a
        )
        return Evaluation(
            reference=self._outcome(REFERENCE, {}, None),
            policies=tuple(self._outcome(name, wins, kl.get(name)) for name in names),
            differences=tuple(differences),
            selected_by=self.select,
            prompts=len(self.of[REFERENCE].tokens),
            completions=self.of[REFERENCE].tokens.shape[1],
        )

    def _samples(self, own: Responses) -> dict[str, Samples]:
        return {judge: Samples(own.scores[self.select], scores) for judge, scores in own.scores.items()}

    def _outcome(self, name: str, wins: Mapping[tuple[str, str, str], Estimate], kl: _MeasuredKL | None) -> Outcome:
        own = self.of[name]
        rates: dict[str, dict[str, Stated]] = {}
        for (whose, judge, how), estimate in wins.items():
            if whose == name:
                rates.setdefault(judge, {})[how] = Stated.of(estimate).within(0.0, 1.0)
        return Outcome(
            name,
            None if kl is None else kl.stated(),
            None if np.isnan(own.tokens).any() else _mean(own.tokens).within(0.0, np.inf),
            {judge: _mean(scores) for judge, scores in own.scores.items()},
            rates,
            0 if kl is None else kl.not_as_drawn,
            None if kl is None else kl.precision,
            own.empty,
        )


def _mean(values: Float[np.ndarray, "P m"]) -> Stated:
    """Over prompts, of the means of their completions."""
    return Stated.of(Estimate(values.mean(axis=1)))
