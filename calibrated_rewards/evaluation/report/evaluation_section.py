"""Sections on the evaluation: KL and win rates, the claims that intervals allow, and examples of completions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from calibrated_rewards import theory
from calibrated_rewards.calibration.shards import SCORE, decode_text, read_table
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import IntervalEstimate
from calibrated_rewards.evaluation.policies import REFERENCE
from calibrated_rewards.evaluation.report import page
from calibrated_rewards.evaluation.report.experiment import (
    Experiment,
    choose_judge,
    choose_procedure,
    find_procedure,
)
from calibrated_rewards.evaluation.results import Comparison, Evaluation, PolicyResult
from calibrated_rewards.evaluation.wording import (
    format_count,
    format_estimate,
    format_number,
    format_points,
    format_procedure,
    format_share,
)
from calibrated_rewards.theory.procedures import BestOf, Procedure
from calibrated_rewards.theory.tilted_policy import Frontier
from calibrated_rewards.theory.transforms import Identity

# Prompts that are shown, and characters of a text.
PROMPTS, LONGEST = 3, 800


def write_evaluation(experiment: Experiment) -> page.Section | None:
    """Write the section on win rates; None without an evaluation of a policy."""
    evaluation = experiment.evaluation
    if evaluation is None or not evaluation.policies:
        return None
    judges = [*evaluation.policies[0].win_rates]
    summary = (*evaluation.completion_notes(), *write_claims(evaluation))
    brackets = " In brackets: 95 % intervals over prompts." * (evaluation.prompts > 1)
    explanation = (
        f"Each policy and the reference wrote {format_count(evaluation.completions, 'completion')} for each of "
        f"{format_count(evaluation.prompts, 'prompt')}. A win rate is how often a policy beats the reference, both "
        f"under the same procedure, which selects by {evaluation.selected_by}; 50 % is the reference itself.{brackets}"
    )
    blocks: list[page.Block] = [page.Paragraph(explanation), page.Bullets(summary)]
    for judge in judges:
        blocks += [page.Heading(f"Judged by {judge}"), _tabulate_policies(evaluation, judge)]
    blocks += [page.Paragraph(f"{note}.", note=True) for note in evaluation.kl_notes()]
    blocks += _tabulate_comparisons(evaluation)
    intervals = ", with 95 % intervals" * (evaluation.prompts > 1)
    drawings = [
        page.draw(
            plots.outcomes(evaluation, judge),
            f"Win rates over the reference, judged by {judge}{intervals}; at 0.5 the reference itself.",
            f"outcomes-{place}",
        )
        for place, judge in enumerate(judges)
    ]
    blocks.append(page.Figures([*drawings, *_draw_beside_theory(experiment, evaluation, intervals)]))
    return page.Section("What came out", tuple(blocks), summary)


def write_claims(evaluation: Evaluation) -> Iterator[str]:
    """Claim what the intervals allow of each policy beside the reference, and of each beside another."""
    rates = evaluation.policies[0].win_rates
    judge = choose_judge([*rates], evaluation.selected_by)
    procedure = choose_procedure([*rates[judge]])
    by = f"judged by {judge}, {format_procedure(procedure)}"
    wins = [_claim_win(policy, policy.win_rates[judge][procedure]) for policy in evaluation.policies]
    yield f"J{by[1:]}: {'; '.join(wins)}."
    comparisons = [c for c in evaluation.differences if (c.judged_by, c.procedure) == (judge, procedure)]
    if comparisons:
        claims = [f"{c.a} less {c.b}: {format_points(c.value)}, {_claim_comparison(c)}" for c in comparisons]
        yield f"Between policies, {by}: {'; '.join(claims)}."


def _claim_win(policy: PolicyResult, rate: IntervalEstimate) -> str:
    at_kl = "" if policy.kl is None else f" at a KL of {format_number(policy.kl.value)}"
    if rate.low is None:
        verdict = ", from one prompt, without an interval"
    elif not rate.excludes(0.5):
        verdict = ", whether it is better than the reference these data do not tell"
    else:
        verdict = ", above the reference" if rate.low > 0.5 else ", below the reference"
    return f"{policy.name} wins {format_share(rate)}{at_kl}{verdict}"


def _claim_comparison(comparison: Comparison) -> str:
    return f"{comparison.winner} is ahead" if comparison.significant else "these data do not tell"


def _tabulate_policies(evaluation: Evaluation, judge: str) -> page.Table:
    procedures = [*evaluation.policies[0].win_rates[judge]]
    rates = [f"win rate, {format_procedure(each)}" for each in procedures]
    rows = []
    for policy in (*evaluation.policies, evaluation.reference):
        tokens, wins = policy.tokens, policy.win_rates.get(judge, {})
        length = "not said" if tokens is None else f"{tokens.value:.1f}"
        if tokens is not None and tokens.low is not None:
            length += f" [{tokens.low:.1f}, {tokens.high:.1f}]"
        kl = "" if policy.kl is None else format_estimate(policy.kl)
        shares = [format_share(wins[each]) if each in wins else "" for each in procedures]
        rows.append([policy.name, kl, length, format_estimate(policy.scores[judge]), *shares])
    return page.Table(["", "KL, nats", "tokens", f"mean score by {judge}", *rates], rows)


def _tabulate_comparisons(evaluation: Evaluation) -> Iterator[page.Block]:
    comparisons = evaluation.differences
    if not comparisons:
        return
    rows = [
        [f"{c.a} less {c.b}", c.judged_by, format_procedure(c.procedure), format_points(c.value), _claim_comparison(c)]
        for c in comparisons
    ]
    yield page.Heading("One policy against another")
    yield page.Table(["", "judged by", "procedure", "difference of win rates", "what the interval says"], rows)
    if evaluation.prompts > 1:
        yield page.Paragraph(
            f"Of {format_count(len(rows), 'difference')}, these data leave "
            f"{sum(not c.significant for c in comparisons)} open. They are paired by prompt, each at 95 % by itself: "
            "of many true zeros, about one in twenty would be left out by chance.",
            note=True,
        )


def _draw_beside_theory(experiment: Experiment, evaluation: Evaluation, intervals: str) -> Iterator[page.Drawing]:
    """Draw measured KL and win rate under the reward itself, the one that theory is about."""
    by, policies = evaluation.selected_by, evaluation.policies
    name = choose_procedure([*next(iter(policies[0].win_rates.values()))])
    procedure = find_procedure(name)
    measured = {p.name: (p.kl, p.win_rates[by][name]) for p in policies if p.kl is not None and by in p.win_rates}
    most = max((kl.value for kl, _ in measured.values()), default=0.0)
    if procedure is None or most <= 0:
        return
    most = max(1.2 * most, 0.1)
    curves = []
    for transform in dict.fromkeys((Identity(), experiment.transform)):
        high, low = (theory.beta_for_kl(transform, kl) for kl in (most / 50, most))
        curves.append(theory.frontier(transform, [procedure], np.geomspace(high, low, 24)))
    caption = (
        f"Win rate, {format_procedure(name)}, against KL, judged by {by}: lines are the exact optimum of theory for a "
        f"reward without ties, marks are what was measured{intervals}."
    )
    on_table = compute_table_curve(experiment, procedure, most)
    if on_table is not None:
        caption += ' "This table": the policies that fit the rewards of the table, with its ties and its K.'
    yield page.draw(plots.frontier(curves, procedure, measured, on_table=on_table), caption, "theory")


def compute_table_curve(experiment: Experiment, procedure: Procedure, most: float) -> Frontier | None:
    """Compute win rate against KL of the policies that fit the table's rewards, as far as the table's KL reaches."""
    rewards = experiment.table_rewards(procedure)
    if rewards is None:
        return None
    most = min(most, 0.98 * float(rewards.most_kls.mean()))
    if most <= 0:
        return None
    high, low = (rewards.beta_for_kl(kl) for kl in (most / 50, most))
    betas = np.geomspace(high, low, 16)
    rates = np.array([[rewards.win_rate(beta) for beta in betas.tolist()]])
    kls = np.array([rewards.kl(beta) for beta in betas.tolist()])
    return Frontier(experiment.transform, (procedure,), betas, kls, rates)


@dataclass(frozen=True)
class Example:
    """A prompt, and the best of the first completions that a policy wrote for it."""

    prompt: str
    completion: str
    scores: Mapping[str, float]


def write_examples(experiment: Experiment) -> page.Section | None:
    """Write the section with examples; None where the completions of the evaluation are not there."""
    evaluation, at = experiment.evaluation, experiment.evaluated
    if evaluation is None or at is None or not evaluation.policies:
        return None
    by, names = evaluation.selected_by, [*(policy.name for policy in evaluation.policies), REFERENCE]
    procedure = find_procedure(choose_procedure([*evaluation.policies[0].win_rates[by]]))
    n = procedure.n if isinstance(procedure, BestOf) else 1
    examples = {name: _read_examples(at / name / "rollouts", by, n) for name in names}
    shared = [key for key in examples[REFERENCE] if all(key in each for each in examples.values())][:PROMPTS]
    if not shared:
        return None
    completion = f"the best of its first {n}, by {by}" if n > 1 else "its first completion"
    prompts = "first prompt" if len(shared) == 1 else f"first {format_count(len(shared), 'prompt')}"
    blocks: list[page.Block] = [
        page.Paragraph(f"The {prompts} of the evaluation, not chosen by anybody; of each policy {completion}.")
    ]
    for key in shared:
        blocks += [page.Heading("Prompt"), page.Quote(_shorten(examples[REFERENCE][key].prompt))]
        for name in names:
            example = examples[name][key]
            scores = ", ".join(f"{each} {format_number(score)}" for each, score in example.scores.items())
            blocks += [
                page.Paragraph(Markup("<b>{}</b> ({})").format(name, scores)),
                page.Quote(_shorten(example.completion)),
            ]
    return page.Section("What they write", tuple(blocks))


def _read_examples(folder: Path, by: str, n: int) -> dict[bytes, Example]:
    """Select the best of the first n completions of each prompt of the first file, in its order."""
    files = sorted(folder.glob("*.parquet"))
    best: dict[bytes, Example] = {}
    for row in read_table(files[0]).to_pylist() if files else []:
        columns = {name.removeprefix(SCORE): value for name, value in row.items() if name.startswith(SCORE)}
        scores = {name: score for name, score in columns.items() if score is not None}
        if row["number"] < n and by in scores and (row["key"] not in best or scores[by] > best[row["key"]].scores[by]):
            prompt = format_chat(decode_text(row["prompt"], row["chat"]))
            completion = format_chat(decode_text(row["completion"], row["completion_chat"]))
            best[row["key"]] = Example(prompt, completion, scores)
    return best


def format_chat(text: Any) -> str:
    """Write messages as text, each after its role; text stays as it is.

    >>> format_chat([{"role": "user", "content": "Hi"}])
    'user: Hi'
    """
    if isinstance(text, str):
        return text
    return "\n".join(f"{message.get('role')}: {message.get('content') or ''}" for message in text)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
