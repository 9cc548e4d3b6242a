"""Whether the references hold for completions that no table has seen: those have uniform quantiles, if they do.

What was calibrated, and whether it is good: the health of each table in words and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from calibrated_rewards.calibration.inspect_table import Health, health, percent
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import Estimate, Stated
from calibrated_rewards.evaluation.policies import REFERENCE
from calibrated_rewards.evaluation.report.expected import expectation_lines
from calibrated_rewards.evaluation.report.experiment import Experiment, named
from calibrated_rewards.evaluation.report.markup import (
    Markup,
    Section,
    bullets,
    element,
    figure,
    figures,
    folded,
    raised,
    table,
)
from calibrated_rewards.evaluation.wording import counted, formula, measured
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.transforms import Identity

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fresh:
    """Where fresh completions of the reference stand among the references of their prompts."""

    rollouts: int
    mean: Stated
    """Of their quantiles; 1/2, if both are of one policy."""
    square: Stated
    """The mean square of how far they are from 1/2."""
    expected: float
    """That of K references and no ties, (1 + 2/K) / 12."""

    @property
    def uniform(self) -> bool:
        """Whether both intervals hold what is expected; it is a test, and fails one time in ten where all is well."""
        return _holds(self.mean, 0.5) and _holds(self.square, self.expected)

    def __str__(self) -> str:
        verdict = "as it should be" if self.uniform else "not as it should be: other settings, ties, or bad luck"
        return (
            f"Fresh completions: {self.rollouts:,} new ones of the reference, for "
            f"{counted(self.mean.prompts, 'prompt')}, have a mean u of {measured(self.mean)} (0.5 expected) "
            f"and a mean square from 1/2 of {self.square.value:.4f} ({self.expected:.4f} expected): {verdict}."
        )


def fresh(table: ReferenceTable, evaluated: Path, scorer: str) -> Fresh | None:
    """By the evaluation's completions of the reference; None if their prompts are not in the table."""
    files = sorted((evaluated / REFERENCE / "rollouts").glob("*.parquet"))
    own: list[Array] = []
    sizes: list[int] = []
    for keys, scores in (_scored(path, scorer) for path in files):
        rows = table.find(keys)
        known = np.isfinite(scores) & (rows >= 0)
        u = table.cdf(rows[known], scores[known])
        places = rows[known]
        own += [u[places == row] for row in np.unique(places)]
        sizes += table.counts(np.unique(places)).tolist()
    if len(own) < 2:
        return None
    return Fresh(
        rollouts=sum(map(len, own)),
        mean=Stated.of(Estimate(np.array([u.mean() for u in own]))),
        square=Stated.of(Estimate(np.array([((u - 0.5) ** 2).mean() for u in own]))),
        expected=float(np.mean([(1 + 2 / K) / 12 for K in sizes])),
    )


def _scored(path: Path, scorer: str) -> tuple[list[bytes], Array]:
    from calibrated_rewards.calibration.shards import SCORE, read_table

    columns = read_table(path)
    name = SCORE + scorer
    if name not in columns.column_names:
        return [], np.empty(0)
    return columns.column("key").to_pylist(), columns.column(name).to_numpy().astype(np.float64)


def _holds(interval: Stated, value: float) -> bool:
    return interval.low is not None and interval.high is not None and interval.low <= value <= interval.high


# Shares from which on something is worth a sentence.
TIED, AT_HIGHEST, CUT, EMPTY, REPEATED, LENGTH = 0.1, 0.02, 0.5, 0.02, 0.2, 0.4
RMS = 0.05


def calibrated(of: Experiment) -> Section | None:
    """The section; None without a table."""
    main = of.trained_for
    if main is None:
        return None
    names = sorted(of.tables, key=lambda name: name != main)
    found = {name: health(of.tables[name]) for name in names}
    rollouts = _rollouts(of)
    again = fresh(of.tables[main], of.evaluated, main) if of.evaluated is not None else None
    worries = [*_worries(found), *(_worries_of_rollouts(rollouts) if rollouts else ())]
    best = found[main]
    blocks = [
        element("p", _what(found, main)),
        table(("", ""), _facts(best.meta)),
        element("h3", "Is it good?"),
        bullets([*_good(best, again), *worries] if worries else [*_good(best, again), "Nothing else stands out."]),
        *_expected(of),
        folded("Every number", table(("", *found), _numbers(found))),
        *([folded("The completions", table(("", ""), rollouts.lines()))] if rollouts else []),
        _drawn(of, main, best),
    ]
    return Section("What was calibrated", tuple(blocks), (*_demo(of), _told(best, main)))


def _expected(of: Experiment) -> list[Markup]:
    lines = [*expectation_lines(of)]
    return [element("h3", "What training for the reward leads to"), bullets(lines)] if lines else []


def _what(found: Mapping[str, Health], main: str) -> str:
    size = found[main].size
    by = f"by each of {_listed(found)}" if len(found) > 1 else f"by {main}"
    many = counted(size.most, "completion")
    many = many if size.fewest == size.most else f"{size.fewest:,} to {many}"
    were = "was" if size.most == 1 else "were"
    each = "For" if size.prompts == 1 else "For each of"
    return (
        f"{each} {counted(size.prompts, 'prompt')}, {many} of the reference policy {were} scored {by}; "
        "the calibrated reward u of a completion is the share of them that it beats, ties half."
    )


def _apart(of: Health) -> bool:
    """Whether there is anything to know of the variance between prompts, and of that within one."""
    return of.size.prompts > 1 and of.size.most > 1


def _demo(of: Experiment) -> Iterator[str]:
    about = of.demo.get("about")
    if isinstance(about, Mapping) and about.get("texts") == 0:
        yield (
            "This is a demo whose reward models have learned from no texts: its numbers show that the parts work "
            "together, and nothing else."
        )


def _told(of: Health, main: str) -> str:
    said = (
        f"The {main} was calibrated on {counted(of.precision.K, 'completion')} of each of "
        f"{counted(of.size.prompts, 'prompt')}, which leaves a calibrated reward off by {of.precision.rms:.3f} (rms)"
    )
    if of.size.prompts == 1:
        said = said.replace("each of 1 prompt", "1 prompt")
    if not _apart(of):
        return f"{said}."
    share = of.spread.between_share
    between = f"{percent(share)} of the variance of the raw scores lies between prompts, and is taken away"
    return f"{said}: {between}." if share > 0 else f"{said}; its raw scores show no variance between prompts."


def _good(of: Health, again: Fresh | None) -> Iterator[str]:
    size, precise, spread = of.size, of.precision, of.spread
    enough = "enough" if precise.rms <= RMS else "few"
    are = "is" if precise.K == 1 else "are"
    yield (
        f"K: {counted(precise.K, 'reference')} a prompt {are} {enough}. In the middle u is known to ± "
        f"{precise.middle:.3f} at 95 %, on average it is off by {precise.rms:.3f} (rms); {precise.needed:,} references "
        f"have {RMS:g}."
    )
    if size.most > 1:
        yield f"Ties: {percent(of.resolution.tied)} of references equal another of their prompt."
        yield f"Saturation: {_highest(of)}; {_unresolved(of)}."
    if _apart(of):
        yield (
            f"Spread: {percent(spread.between_share)} of the variance of raw scores is between prompts. As a raw score "
            f"{percent(spread.medians_in_top_tenth)} of prompts have their median completion in the best tenth of all."
        )
    probes = of.meta.get("probes")
    if isinstance(probes, list) and probes:
        yield (
            f"Probes: {len(probes)} pairs are kept with their scores; reward.verify() scores them again, and refuses "
            "another reward model."
        )
    if again is not None:
        yield str(again)


def _sharing(of: Health) -> int:
    """How many references have the highest score of all."""
    return round(of.resolution.at_ceiling * of.size.references)


def _highest(of: Health) -> str:
    if _sharing(of) == 1:
        return "one reference alone has the highest score of all"
    return f"{_sharing(of):,} references ({percent(of.resolution.at_ceiling)}) share the highest score of all"


def _unresolved(of: Health) -> str:
    if of.size.prompts == 1:
        return f"the references of the prompt are {'' if of.resolution.unresolved else 'not '}all equal"
    has = "has" if of.resolution.unresolved == 1 else "have"
    return f"{of.resolution.unresolved:,} of {of.size.prompts:,} prompts {has} equal references only"


def _worries(found: Mapping[str, Health]) -> Iterator[str]:
    for name, of in found.items():
        seen = of.resolution
        if seen.tied > TIED:
            yield f"{name}: {percent(seen.tied)} of references tie; tied completions get one reward."
        if _sharing(of) > 1 and seen.at_ceiling > AT_HIGHEST:
            yield f"{name}: {_highest(of)}; which of those is best, it does not tell."
        if seen.unresolved:
            teach = "teaches" if seen.unresolved == 1 else "teach"
            yield f"{name}: {counted(seen.unresolved, 'prompt')} {teach} nothing, with references of one score only."
        for reason, count in of.odd_rows.items():
            yield f"{name}: {count:,} suspicious {'prompts' if count > 1 else 'prompt'}, {reason}."


def _rollouts(of: Experiment) -> Any:
    if of.rollouts is None:
        return None
    from calibrated_rewards.calibration.inspect_rollouts import rollout_health

    return rollout_health(of.rollouts)


def _worries_of_rollouts(of: Any) -> Iterator[str]:
    if of.cut is not None and of.cut > CUT:
        yield f"{percent(of.cut)} of completions were cut at the most tokens: the reward is that of a beginning."
    if of.empty > EMPTY:
        yield f"{percent(of.empty)} of completions are empty."
    if of.repeated > REPEATED:
        yield f"{percent(of.repeated)} of completions are word for word an earlier one of their prompt."
    for name, r in of.score_length.items():
        if r is not None and abs(r) > LENGTH:
            yield f"{name}: the score goes with length, {r:+.2f} correlation within a prompt."


def _facts(meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Who drew, who scored, and how, in a few words; all of it stands at the end of the page."""
    sampler, scorer = meta.get("sampler") or {}, meta.get("scorer") or {}
    if sampler:
        yield "reference policy", identity(sampler)
    if scorer:
        yield "reward model", identity(scorer)
    if decoding := sampler.get("decoding"):
        yield "decoding", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in decoding.items() if value)
    if "seed" in meta:
        yield "seed", str(meta["seed"])


def identity(said: Mapping[str, Any]) -> str:
    """Who a fingerprint is of: its name, or else its kind.

    >>> identity({"kind": "hf sampler", "name": "my/policy", "weights": "1f3a"}), identity({"kind": "hash", "seed": 0})
    ('my/policy (hf sampler)', 'hash')
    """
    name = named(said)
    kind = str(said.get("kind", "not said"))
    return kind if name is None else f"{name} ({kind})"


def _numbers(found: Mapping[str, Health]) -> Iterator[Sequence[str]]:
    known = all(map(_apart, found.values()))
    for lines in zip(*(_lines(of, known) for of in found.values()), strict=True):
        yield lines[0][0], *(text for _, text in lines)


def _lines(of: Health, apart: bool) -> Iterator[tuple[str, str]]:
    for part in (of.size, of.resolution, of.precision):
        yield from part.lines()
    if apart:
        yield from of.spread.lines()


def _drawn(of: Experiment, main: str, best: Health) -> Markup:
    lines = "Raw scores against rank."
    if best.size.prompts > 1:
        share = f" ({percent(best.spread.between_share)} of the variance is between prompts)" if _apart(best) else ""
        lines = (
            "Raw scores of prompts, from the lowest to the highest median: a line a prompt. The farther they lie from "
            f"the dashed line, the less raw scores can be compared{share}."
        )
    ranks = figure(
        plots.scores_by_rank(of.tables[main], quantiles=best.size.prompts > 1),
        lines,
        "ranks",
    )
    if of.reward is None or of.transform == Identity():
        return figures(ranks)
    k, estimator = best.precision.K, str((of.reward or {}).get("estimator", "empirical"))
    shown = plots.transforms([Identity(), of.transform], k if k <= 64 else None, cast(Any, estimator))
    dots = f" Dots: what ranks among {k} references are worth ({estimator})." if k <= 64 else ""
    said = f"The transform that is trained for, {formula(of.transform)}, beside the identity.{dots}"
    return figures(ranks, figure(shown, raised(said), "transforms"))


def _listed(names: Mapping[str, Any]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
