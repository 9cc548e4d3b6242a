"""Section on the calibration: size, quality and origin of each table, and what training on it leads to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from calibrated_rewards.calibration.inspect_rollouts import RolloutHealth, rollout_health
from calibrated_rewards.calibration.inspect_table import Health, health, percent
from calibrated_rewards.calibration.shards import SCORE, read_table
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate
from calibrated_rewards.evaluation.expectations import expect
from calibrated_rewards.evaluation.policies import REFERENCE
from calibrated_rewards.evaluation.report import page
from calibrated_rewards.evaluation.report.experiment import Experiment, find_name
from calibrated_rewards.evaluation.wording import format_count, format_estimate, format_transform
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.transforms import Identity

Array: TypeAlias = npt.NDArray[np.float64]
# Shares from which on something is worth a sentence.
TIED, AT_HIGHEST, CUT, EMPTY, REPEATED, LENGTH = 0.1, 0.02, 0.5, 0.02, 0.2, 0.4
# With this error on average a table has enough references.
RMS = 0.05


def write_calibration(experiment: Experiment) -> page.Section | None:
    """Write the section; None without a table."""
    main = experiment.trained_for
    if main is None:
        return None
    names = sorted(experiment.tables, key=lambda name: name != main)
    tables = {name: health(experiment.tables[name]) for name in names}
    rollouts = None if experiment.rollouts is None else rollout_health(experiment.rollouts)
    quality = [*_describe_quality(tables[main])]
    if experiment.evaluated is not None:
        fresh = check_fresh_completions(experiment.tables[main], experiment.evaluated, main)
        quality += [] if fresh is None else [str(fresh)]
    problems = [*_find_problems(tables), *(_find_rollout_problems(rollouts) if rollouts else ())]
    expectation = [*expectation_lines(experiment)]
    blocks: list[page.Block] = [
        page.Paragraph(_describe_tables(tables, main)),
        page.Table(("", ""), [*_list_origins(tables[main].meta)]),
        page.Heading("Is it good?"),
        page.Bullets([*quality, *(problems or ["Nothing else stands out."])]),
    ]
    if expectation:
        blocks += [page.Heading("What training for the reward leads to"), page.Bullets(expectation)]
    blocks.append(page.Details("Every number", page.Table(("", *tables), [*_list_numbers(tables)])))
    if rollouts:
        blocks.append(page.Details("The completions", page.Table(("", ""), [*rollouts.lines()])))
    blocks.append(_draw_figures(experiment, main, tables[main]))
    about = experiment.demo.get("about")
    untaught = isinstance(about, Mapping) and about.get("texts") == 0
    demo = (
        "This is a demo whose reward models have learned from no texts: its numbers show that the parts work together, "
        "and nothing else."
    )
    return page.Section("What was calibrated", tuple(blocks), (*[demo] * untaught, _summarize(tables[main], main)))


@dataclass(frozen=True)
class FreshCheck:
    """Test of a table by fresh completions of the reference: their quantiles are uniform, if the references hold."""

    rollouts: int
    mean: IntervalEstimate
    """Mean quantile among the references of the prompt; 1/2, if both are of one policy."""
    square: IntervalEstimate
    """Mean square of the quantile's distance from 1/2."""
    expected: float
    """The mean square of K references without ties, (1 + 2/K) / 12."""

    @property
    def uniform(self) -> bool:
        """True if both intervals hold what is expected; one time in ten they do not though all is well."""
        pairs = (self.mean, 0.5), (self.square, self.expected)
        return all(e.low is not None and e.high is not None and e.low <= value <= e.high for e, value in pairs)

    def __str__(self) -> str:
        verdict = "as it should be" if self.uniform else "not as it should be: other settings, ties, or bad luck"
        return (
            f"Fresh completions: {self.rollouts:,} new ones of the reference, for "
            f"{format_count(self.mean.prompts, 'prompt')}, have a mean u of {format_estimate(self.mean)} (0.5 "
            f"expected) and a mean square from 1/2 of {self.square.value:.4f} ({self.expected:.4f} expected): "
            f"{verdict}."
        )


def check_fresh_completions(table: ReferenceTable, evaluated: Path, scorer: str) -> FreshCheck | None:
    """Rank an evaluation's completions of the reference in a table; None if their prompts are not in it."""
    quantiles: list[Array] = []
    sizes: list[int] = []
    for path in sorted((evaluated / REFERENCE / "rollouts").glob("*.parquet")):
        columns = read_table(path)
        if SCORE + scorer not in columns.column_names:
            continue
        scores = columns.column(SCORE + scorer).to_numpy().astype(np.float64)
        rows = table.find(columns.column("key").to_pylist())
        scored = np.isfinite(scores) & (rows >= 0)
        u, rows = table.cdf(rows[scored], scores[scored]), rows[scored]
        quantiles += [u[rows == row] for row in np.unique(rows)]
        sizes += table.counts(np.unique(rows)).tolist()
    if len(quantiles) < 2:
        return None
    return FreshCheck(
        rollouts=sum(map(len, quantiles)),
        mean=IntervalEstimate.of(Estimate(np.array([u.mean() for u in quantiles]))),
        square=IntervalEstimate.of(Estimate(np.array([((u - 0.5) ** 2).mean() for u in quantiles]))),
        expected=float(np.mean([(1 + 2 / K) / 12 for K in sizes])),
    )


def expectation_lines(experiment: Experiment) -> Iterator[str]:
    """Write what the policy that fits the table's rewards gets, and what theory has where it differs."""
    beta = (experiment.reward or {}).get("beta")
    rewards = experiment.table_rewards(experiment.procedure)
    if rewards is None or not isinstance(beta, int | float):
        return
    try:
        expectation = expect(
            rewards.table,
            rewards.transform,
            beta=beta,
            procedure=rewards.procedure,
            estimator=rewards.estimator,
            tolerance=rewards.tolerance,
            name="the reward",
        )
        lines = [*expectation.lines()]
    except ValueError as error:
        lines = [str(error)]
    yield from (f"{line[:1].upper()}{line[1:]}." for line in lines)


def _describe_tables(tables: Mapping[str, Health], main: str) -> str:
    size = tables[main].size
    *first, last = tables
    scorers = f"each of {', '.join(first)} and {last}" if first else main
    completions = format_count(size.most, "completion")
    completions = completions if size.fewest == size.most else f"{size.fewest:,} to {completions}"
    return (
        f"{'For' if size.prompts == 1 else 'For each of'} {format_count(size.prompts, 'prompt')}, {completions} of the "
        f"reference policy {'was' if size.most == 1 else 'were'} scored by {scorers}; the calibrated reward u of a "
        "completion is the share of them that it beats, ties half."
    )


def _summarize(table: Health, main: str) -> str:
    prompts = format_count(table.size.prompts, "prompt")
    sentence = (
        f"The {main} was calibrated on {format_count(table.precision.K, 'completion')} of "
        f"{prompts if table.size.prompts == 1 else f'each of {prompts}'}, which leaves a calibrated reward off by "
        f"{table.precision.rms:.3f} (rms)"
    )
    if not _has_variances(table):
        return f"{sentence}."
    share = table.spread.between_share
    if share <= 0:
        return f"{sentence}; its raw scores show no variance between prompts."
    return f"{sentence}: {percent(share)} of the variance of the raw scores lies between prompts, and is taken away."


def _has_variances(table: Health) -> bool:
    """True if there are enough scores for a variance between prompts and one within a prompt."""
    return table.size.prompts > 1 and table.size.most > 1


def _describe_quality(table: Health) -> Iterator[str]:
    precision, spread = table.precision, table.spread
    yield (
        f"K: {format_count(precision.K, 'reference')} a prompt {'is' if precision.K == 1 else 'are'} "
        f"{'enough' if precision.rms <= RMS else 'few'}. In the middle u is known to ± {precision.middle:.3f} at 95 %, "
        f"on average it is off by {precision.rms:.3f} (rms); {precision.needed:,} references have {RMS:g}."
    )
    if table.size.most > 1:
        unresolved, prompts = table.resolution.unresolved, table.size.prompts
        equal = f"{unresolved:,} of {prompts:,} prompts {'has' if unresolved == 1 else 'have'} equal references only"
        if prompts == 1:
            equal = f"the references of the prompt are {'' if unresolved else 'not '}all equal"
        yield f"Ties: {percent(table.resolution.tied)} of references equal another of their prompt."
        yield f"Saturation: {_describe_highest(table)}; {equal}."
    if _has_variances(table):
        yield (
            f"Spread: {percent(spread.between_share)} of the variance of raw scores is between prompts. As a raw score "
            f"{percent(spread.medians_in_top_tenth)} of prompts have their median completion in the best tenth of all."
        )
    probes = table.meta.get("probes")
    if isinstance(probes, list) and probes:
        yield (
            f"Probes: {len(probes)} pairs are kept with their scores; reward.verify() scores them again, and refuses "
            "another reward model."
        )


def _count_highest(table: Health) -> int:
    """Count the references with the highest score of all."""
    return round(table.resolution.at_ceiling * table.size.references)


def _describe_highest(table: Health) -> str:
    count = _count_highest(table)
    if count == 1:
        return "one reference alone has the highest score of all"
    return f"{count:,} references ({percent(table.resolution.at_ceiling)}) share the highest score of all"


def _find_problems(tables: Mapping[str, Health]) -> Iterator[str]:
    for name, table in tables.items():
        resolution = table.resolution
        if resolution.tied > TIED:
            yield f"{name}: {percent(resolution.tied)} of references tie; tied completions get one reward."
        if _count_highest(table) > 1 and resolution.at_ceiling > AT_HIGHEST:
            yield f"{name}: {_describe_highest(table)}; which of those is best, it does not tell."
        if resolution.unresolved:
            teach = "teaches" if resolution.unresolved == 1 else "teach"
            prompts = format_count(resolution.unresolved, "prompt")
            yield f"{name}: {prompts} {teach} nothing, with references of one score only."
        for reason, count in table.odd_rows.items():
            yield f"{name}: {count:,} suspicious {'prompts' if count > 1 else 'prompt'}, {reason}."


def _find_rollout_problems(rollouts: RolloutHealth) -> Iterator[str]:
    if rollouts.cut is not None and rollouts.cut > CUT:
        yield f"{percent(rollouts.cut)} of completions were cut at the most tokens: the reward is that of a beginning."
    if rollouts.empty > EMPTY:
        yield f"{percent(rollouts.empty)} of completions are empty."
    if rollouts.repeated > REPEATED:
        yield f"{percent(rollouts.repeated)} of completions are word for word an earlier one of their prompt."
    for name, r in rollouts.score_length.items():
        if r is not None and abs(r) > LENGTH:
            yield f"{name}: the score goes with length, {r:+.2f} correlation within a prompt."


def _list_origins(meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List policy, reward model, decoding and seed; all of it stands at the end of the page."""
    sampler, scorer = meta.get("sampler"), meta.get("scorer")
    if sampler:
        yield "reference policy", format_identity(sampler)
    if scorer:
        yield "reward model", format_identity(scorer)
    decoding = sampler.get("decoding") if isinstance(sampler, Mapping) else None
    if isinstance(decoding, Mapping) and decoding:
        yield "decoding", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in decoding.items() if value)
    if "seed" in meta:
        yield "seed", str(meta["seed"])


def format_identity(fingerprint: Any) -> str:
    """Write the name in a fingerprint, or else its kind; what is no mapping as it is.

    >>> format_identity({"kind": "hf sampler", "name": "my/policy", "weights": "1f3a"})
    'my/policy (hf sampler)'
    >>> format_identity({"kind": "hash", "seed": 0}), format_identity("my policy")
    ('hash', 'my policy')
    """
    if not isinstance(fingerprint, Mapping):
        return str(fingerprint)
    name, kind = find_name(fingerprint), str(fingerprint.get("kind", "not said"))
    return kind if name is None else f"{name} ({kind})"


def _list_numbers(tables: Mapping[str, Health]) -> Iterator[Sequence[str]]:
    """List every number of each table, a column a table."""
    spread = all(map(_has_variances, tables.values()))
    columns = []
    for table in tables.values():
        shares = [*table.spread.lines()] if spread else []
        columns.append([*table.size.lines(), *table.resolution.lines(), *table.precision.lines(), *shares])
    for lines in zip(*columns, strict=True):
        yield lines[0][0], *(text for _, text in lines)


def _draw_figures(experiment: Experiment, main: str, table: Health) -> page.Figures:
    several = table.size.prompts > 1
    caption = "Raw scores against rank."
    if several:
        share = percent(table.spread.between_share)
        caption = (
            "Raw scores of prompts, from the lowest to the highest median: a line a prompt. The farther they lie from "
            "the dashed line, the less raw scores can be compared"
            f"{f' ({share} of the variance is between prompts)' if _has_variances(table) else ''}."
        )
    drawings = [page.draw(plots.scores_by_rank(experiment.tables[main], quantiles=several), caption, "ranks")]
    transform, k = experiment.transform, table.precision.K
    if experiment.reward is not None and transform != Identity():
        estimator = str(experiment.reward.get("estimator", "empirical"))
        ax = plots.transforms([Identity(), transform], k if k <= 64 else None, cast(Any, estimator))
        dots = f" Dots: what ranks among {k} references are worth ({estimator})." if k <= 64 else ""
        caption = f"The transform that is trained for, {format_transform(transform)}, beside the identity.{dots}"
        drawings.append(page.draw(ax, caption, "transforms"))
    return page.Figures(drawings)
