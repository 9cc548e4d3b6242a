"""Sections on win rates: the frontier without training, the evaluation with its claims, and examples of completions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from calibrated_rewards import theory
from calibrated_rewards.calibration.shards import SCORE, decode_text, read_table
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.frontier_results import RELIABLE_ESS, FrontierEstimate, FrontierPoint
from calibrated_rewards.evaluation.policies import REFERENCE
from calibrated_rewards.evaluation.report import page
from calibrated_rewards.evaluation.report.experiment import Experiment, find_procedure
from calibrated_rewards.evaluation.results import Evaluation
from calibrated_rewards.evaluation.wording import (
    choose_procedure,
    few_prompts_notes,
    format_count,
    format_estimate,
    format_number,
    format_objective,
    format_points,
    format_procedure,
    format_share,
)
from calibrated_rewards.theory.procedures import BestOf, Procedure
from calibrated_rewards.theory.tilted_policy import Frontier
from calibrated_rewards.theory.transforms import Identity

# Prompts that are shown, and characters of a text.
PROMPTS, LONGEST = 3, 800


def write_frontier(experiment: Experiment) -> page.Section | None:
    """Write the section; None without a frontier, or with none of its points."""
    frontier = experiment.frontier
    if frontier is None or not frontier.points:
        return None
    judges = [*frontier.points[0].win_rates]
    points, judge, procedure = frontier.main_points()
    at_kl = {kl: [each for each in frontier.points if each.kl == kl] for kl in sorted({e.kl for e in frontier.points})}
    summary = (*few_prompts_notes(frontier.prompts), frontier.headline())
    explanation = (
        "The optimum for any reward is a reweighting of the completions there are, here of "
        f"{format_count(frontier.prompts, 'prompt')} with {frontier.rollouts:,} each, so rewards can be compared at "
        "equal KL before any is trained for. Both sides are under the procedure, which selects by "
        f"{frontier.selected_by}. A trained policy may fall short of this."
    )
    tables = [
        page.Details(f"KL {kl:g}, judged by {name}", _tabulate_frontier(each, frontier.procedures, name))
        for kl, each in at_kl.items()
        for name in judges
    ]
    blocks: tuple[page.Block, ...] = (
        page.Paragraph(explanation),
        page.Bullets([*summary, *_compare_with_first(points, judge, procedure)]),
        page.Figures([_draw_frontier(frontier, procedure, name) for name in judges]),
        *tables,
        *(page.Paragraph(note, note=True) for note in _frontier_notes(frontier)),
    )
    return page.Section("What to expect without training", blocks, summary)


def _compare_with_first(points: Sequence[FrontierPoint], judge: str, procedure: str) -> Iterator[str]:
    first, *others = points
    baseline = format_objective(first.arm)
    names: dict[str | None, list[str]] = {}
    for point in others:
        if point.gains:
            names.setdefault(point.verdict(judge, procedure), []).append(format_objective(point.arm))
    for verdict, word in (("better", "Above"), ("worse", "Below")):
        if verdict in names:
            yield (
                f"{word} {baseline}, by intervals without 0 and by more than so few effective completions were found "
                f"to be off: {', '.join(names[verdict])}."
            )
    if None in names:
        yield f"These data do not tell from {baseline}: {', '.join(names[None])}."


def _draw_frontier(frontier: FrontierEstimate, procedure: str, judge: str) -> page.Drawing:
    hollow = any(point.ess_of[procedure] < RELIABLE_ESS for point in frontier.points)
    note = f"; hollow marks rest on fewer than {RELIABLE_ESS} effective completions" * hollow
    caption = f"Judged by {judge}, {format_procedure(procedure)}{note}."
    name = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in judge)
    return page.draw(plots.reweighted(frontier, procedure, judge), caption, f"frontier-{name}")


def _tabulate_frontier(points: Sequence[FrontierPoint], procedures: Sequence[str], judge: str) -> page.Table:
    main = choose_procedure(procedures)
    gain = f"{format_procedure(main)}, from {format_objective(points[0].arm)}"
    rows = [
        [
            format_objective(point.arm),
            *(point.format_rate(judge, procedure) for procedure in procedures),
            point.format_gain(judge, main) if point.gains else "not known",
            f"{point.ess:.1f}",
        ]
        for point in points
    ]
    return page.Table(["", *map(format_procedure, procedures), gain, "ESS"], rows)


def _frontier_notes(frontier: FrontierEstimate) -> Iterator[str]:
    yield (
        "ESS: effective completions of a prompt behind a row. Each interval is at 95 %, over prompts, by itself: of "
        "many, about one in twenty misses, and the highest of many is flattered by being chosen."
    )
    if frontier.unreliable:
        yield (
            f"~ rests on fewer than {RELIABLE_ESS} effective completions of a prompt: off by up to .04, below 3 by "
            ".07, below 1.5 by .14, whatever the interval says."
        )
    yield from (f"Left out: {reason}" for reason in frontier.left_out)


def write_evaluation(experiment: Experiment) -> page.Section | None:
    """Write the section on win rates; None without an evaluation of a policy."""
    evaluation = experiment.evaluation
    if evaluation is None or not evaluation.policies:
        return None
    judges = [*evaluation.policies[0].win_rates]
    summary = (*few_prompts_notes(evaluation.prompts), *evaluation.completion_notes(), *evaluation.claims())
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
            f"outcomes-{number}",
        )
        for number, judge in enumerate(judges)
    ]
    blocks.append(page.Figures([*drawings, *_draw_beside_theory(experiment, evaluation, intervals)]))
    return page.Section("What came out", tuple(blocks), summary)


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
        [f"{c.a} less {c.b}", c.judged_by, format_procedure(c.procedure), format_points(c.value), c.claim]
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
