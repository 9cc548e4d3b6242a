"""Policies side by side on the same held-out rollouts: a check of each, paired differences, and the claim they allow.

>>> from calibrated_rewards.theory.procedures import WorstOf
>>> rng = np.random.default_rng(0)
>>> u = rng.random((60, 32))
>>> d = {"raw": u - np.log(np.e - 1), "mine": 2 * u - np.log((np.exp(2) - 1) / 2)}
>>> compared = compare_held_out(d, Samples(u), [WorstOf(4)])
>>> print(compared.claim("mine", "raw", WorstOf(4)))
Under worst of 4, mine wins more than raw: +10.9 points [+10.7, +11.2], at more KL (0.154 and 0.041 nats), by ...
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from calibrated_rewards.evaluation.estimates import IntervalEstimate, Samples, from_json
from calibrated_rewards.evaluation.held_out import (
    HeldOutCheck,
    HeldOutComparison,
    check_log_ratios,
    compare_log_ratios,
)
from calibrated_rewards.evaluation.importance_weights import JUDGE, HeldOutProcedure
from calibrated_rewards.evaluation.wording import (
    few_prompts_notes,
    format_count,
    format_estimate,
    format_points,
    format_procedure,
    format_share,
    format_table,
)
from calibrated_rewards.files import write_file

# KLs that differ by less than this part of the larger one are equal.
EQUAL_KL = 0.05


@dataclass(frozen=True)
class HeldOutDifference:
    """Policy a less policy b, on the same rollouts."""

    a: str
    b: str
    comparison: HeldOutComparison


@dataclass(frozen=True)
class HeldOutPolicies:
    """A check of each policy by its name, and the difference of each two, the later less the earlier."""

    checks: Mapping[str, HeldOutCheck]
    differences: tuple[HeldOutDifference, ...]

    @property
    def judged_by(self) -> str:
        """The judge that claims go by: the second scorer if there is one."""
        return next(iter(self.checks.values())).judged_by

    @property
    def judge_word(self) -> str:
        """The judge in a sentence."""
        return "judge" if self.judged_by == JUDGE else "reward"

    @property
    def procedures(self) -> list[str]:
        """The reprs of the procedures."""
        return [*next(iter(self.checks.values())).win_rates[self.judged_by]]

    def gain(self, a: str, b: str, procedure: HeldOutProcedure | str) -> IntervalEstimate:
        """Return how much more a wins than b under a procedure, by the judge."""
        (comparison,) = (each.comparison for each in self.differences if (each.a, each.b) == (a, b))
        name = procedure if isinstance(procedure, str) else repr(procedure)
        return comparison.win_rates[self.judged_by][name]

    def claim(self, a: str, b: str, procedure: HeldOutProcedure | str) -> str:
        """Say which of two policies wins more under a procedure, and by how much; or that no difference is shown."""
        gain, (first, second) = self.gain(a, b, procedure), (self.checks[each] for each in (a, b))
        if gain.excludes(0.0):
            verdict = f"{a} wins {'more' if gain.value > 0 else 'less'} than {b}"
        else:
            verdict = f"no difference shown between {a} and {b}"
        kls = first.kl.value, second.kl.value
        equal = abs(kls[0] - kls[1]) <= EQUAL_KL * max(kls)
        at = "equal" if equal else "less" if kls[0] < kls[1] else "more"
        return (
            f"Under {format_procedure(procedure)}, {verdict}: {format_points(gain)}, at {at} KL ({kls[0]:.3f} and "
            f"{kls[1]:.3f} nats), by the {self.judge_word}, on {format_count(first.prompts, 'held-out prompt')}."
        )

    def claims(self) -> Iterator[str]:
        """Say which of each two policies wins more under the first procedure."""
        yield from (self.claim(each.a, each.b, self.procedures[0]) for each in self.differences)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        """Win rates of each policy, and the differences of each two, by the judge."""
        first, judge = next(iter(self.checks.values())), self.judged_by
        yield from few_prompts_notes(first.prompts)
        heads = {name: format_procedure(name) for name in self.procedures}
        columns: dict[str, Sequence[object]] = {"KL": [f"{check.kl.value:.3f}" for check in self.checks.values()]}
        columns |= {
            head: [format_share(check.win_rates[judge][name]) for check in self.checks.values()]
            for name, head in heads.items()
        }
        yield f"win rate over the reference, by the {self.judge_word}:"
        yield from format_table([*self.checks], columns)
        gains: dict[str, Sequence[object]] = {"KL": [format_estimate(e.comparison.kl) for e in self.differences]}
        gains |= {
            head: [format_points(each.comparison.win_rates[judge][name]) for each in self.differences]
            for name, head in heads.items()
        }
        yield "differences, paired by prompt and rollout:"
        yield from format_table([f"{each.a} less {each.b}" for each in self.differences], gains)
        each = first.rollouts / first.prompts
        yield (
            f"{format_count(first.prompts, 'prompt')}, {each:.4g} rollouts of the reference each, weighted as each "
            "policy has them; in brackets 95 % intervals over prompts"
        )
        for name, check in self.checks.items():
            yield from (f"{name}: {note}" for note in check.notes())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file in one step."""
        content = {
            "checks": {name: check.to_json() for name, check in self.checks.items()},
            "differences": [{"a": e.a, "b": e.b, "comparison": e.comparison.to_json()} for e in self.differences],
        }
        write_file(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeldOutPolicies":
        """Read the file that `save` wrote."""
        try:
            policies: HeldOutPolicies = from_json(cls, json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be a held-out comparison, got something else ({error!r})") from error
        return policies


def compare_held_out(
    log_ratios: Mapping[str, Iterable[npt.ArrayLike]], samples: Samples, procedures: Sequence[HeldOutProcedure]
) -> HeldOutPolicies:
    """Check policies on the same rollouts of the reference, and compare each two, by their log-ratios on them."""
    rows = {name: [np.asarray(row) for row in each] for name, each in log_ratios.items()}
    return HeldOutPolicies(
        {name: check_log_ratios(each, samples, procedures=procedures) for name, each in rows.items()},
        tuple(
            HeldOutDifference(a, b, compare_log_ratios(rows[a], rows[b], samples, procedures=procedures))
            for b, a in combinations(rows, 2)
        ),
    )
