"""What was calibrated, and whether it is good: the health of each table in words and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calibrated_rewards import plots
from calibrated_rewards.health.sections import percent
from calibrated_rewards.health.table import Health, health
from calibrated_rewards.reporting.experiment import Experiment
from calibrated_rewards.reporting.fresh import Fresh, fresh
from calibrated_rewards.reporting.markup import (
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
from calibrated_rewards.transforms import Identity
from calibrated_rewards.wording import formula

# Shares from which on something is worth a sentence.
TIED, AT_CEILING, CUT, EMPTY, REPEATED, LENGTH = 0.1, 0.02, 0.5, 0.02, 0.2, 0.4
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
        folded("Every number", table(("", *found), _numbers(found))),
        *([folded("The completions", table(("", ""), rollouts.lines()))] if rollouts else []),
        _drawn(of, main, best),
    ]
    return Section("What was calibrated", tuple(blocks), (_told(best, main),))


def _what(found: Mapping[str, Health], main: str) -> str:
    size = found[main].size
    by = f"by each of {_listed(found)}" if len(found) > 1 else f"by {main}"
    many = f"{size.most:,}" if size.fewest == size.most else f"{size.fewest:,} to {size.most:,}"
    return (
        f"For each of {size.prompts:,} prompts, {many} completions of the reference policy were scored {by}; "
        "the calibrated reward u of a completion is the share of them that it beats, ties half."
    )


def _told(of: Health, main: str) -> str:
    return (
        f"The {main} was calibrated on {of.precision.K:,} completions of each of {of.size.prompts:,} prompts, which "
        f"leaves a calibrated reward off by {of.precision.rms:.3f} (rms): {percent(of.spread.between_share)} of the "
        "variance of the raw scores lies between prompts, and is taken away."
    )


def _good(of: Health, again: Fresh | None) -> Iterator[str]:
    size, precise, spread = of.size, of.precision, of.spread
    enough = "enough" if precise.rms <= RMS else "few"
    yield (
        f"K: {precise.K:,} references a prompt are {enough}. In the middle u is known to ± {precise.middle:.3f} at "
        f"95 %, on average it is off by {precise.rms:.3f} (rms); {precise.needed:,} references have {RMS:g}."
    )
    yield f"Ties: {percent(of.resolution.tied)} of references equal another of their prompt."
    yield (
        f"Saturation: {percent(of.resolution.at_ceiling)} of references have the highest score of all; "
        f"{of.resolution.unresolved:,} of {size.prompts:,} prompts have equal references only."
    )
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


def _worries(found: Mapping[str, Health]) -> Iterator[str]:
    for name, of in found.items():
        seen = of.resolution
        if seen.tied > TIED:
            yield f"{name}: {percent(seen.tied)} of references tie; tied completions get one reward."
        if seen.at_ceiling > AT_CEILING:
            yield f"{name}: {percent(seen.at_ceiling)} of references are at its ceiling: it cannot tell the best apart."
        if seen.unresolved:
            yield f"{name}: {seen.unresolved:,} prompts teach nothing, for all their references have one score."
        for reason, count in of.odd_rows.items():
            yield f"{name}: {count:,} suspicious {'prompts' if count > 1 else 'prompt'}, {reason}."


def _rollouts(of: Experiment) -> Any:
    if of.rollouts is None:
        return None
    from calibrated_rewards.health.rollouts import rollout_health

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
    name = next((said[key] for key in ("name", "path", "function", "model") if isinstance(said.get(key), str)), None)
    kind = str(said.get("kind", "not said"))
    return kind if name is None else f"{name} ({kind})"


def _numbers(found: Mapping[str, Health]) -> Iterator[Sequence[str]]:
    parts = [
        [line for part in (of.size, of.resolution, of.precision, of.spread) for line in part.lines()]
        for of in found.values()
    ]
    for lines in zip(*parts, strict=True):
        yield lines[0][0], *(text for _, text in lines)


def _drawn(of: Experiment, main: str, best: Health) -> Markup:
    share = percent(best.spread.between_share)
    ranks = figure(
        plots.scores_by_rank(of.tables[main], quantiles=True),
        f"Raw scores of prompts, from the lowest to the highest median: a line a prompt. The farther they lie from the "
        f"dashed line, the less raw scores can be compared ({share} of the variance is between prompts).",
        "ranks",
    )
    if of.reward is None or of.transform == Identity():
        return figures(ranks)
    k, estimator = best.precision.K, str((of.reward or {}).get("estimator", "empirical"))
    shown = plots.transforms([Identity(), of.transform], k if k <= 64 else None, estimator)  # type: ignore[arg-type]
    dots = f" Dots: what ranks among {k} references are worth ({estimator})." if k <= 64 else ""
    said = f"The transform that is trained for, {formula(of.transform)}, beside the identity.{dots}"
    return figures(ranks, figure(shown, raised(said), "transforms"))


def _listed(names: Mapping[str, Any]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
