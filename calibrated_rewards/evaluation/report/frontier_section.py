"""Section on the frontier without training: the exact optimum of each objective, on the calibrated completions."""

from collections.abc import Iterator, Sequence

from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.report import page
from calibrated_rewards.evaluation.report.experiment import Experiment, choose_judge, choose_procedure
from calibrated_rewards.evaluation.results import RELIABLE_ESS, FrontierEstimate, FrontierPoint, mark_ess
from calibrated_rewards.evaluation.wording import (
    few_prompts_notes,
    format_count,
    format_objective,
    format_points,
    format_procedure,
    format_share,
)


def write_frontier(experiment: Experiment) -> page.Section | None:
    """Write the section; None without a frontier, or with none of its points."""
    frontier = experiment.frontier
    if frontier is None or not frontier.points:
        return None
    judges = [*frontier.points[0].win_rates]
    procedure, judge = choose_procedure(frontier.procedures), choose_judge(judges, frontier.selected_by)
    kls = sorted({point.kl for point in frontier.points})
    at_kl = {kl: [point for point in frontier.points if point.kl == kl] for kl in kls}
    points = at_kl[min(kls, key=lambda kl: abs(kl - 1.0))]
    summary = (*few_prompts_notes(frontier.prompts), _write_headline(points, judge, procedure))
    explanation = (
        "The optimum for any reward is a reweighting of the completions there are, here of "
        f"{format_count(frontier.prompts, 'prompt')} with {frontier.rollouts:,} each, so rewards can be compared at "
        "equal KL before any is trained for. Both sides are under the procedure, which selects by "
        f"{frontier.selected_by}. A trained policy may fall short of this."
    )
    tables = [
        page.Details(f"KL {kl:g}, judged by {name}", _tabulate(points, frontier.procedures, name))
        for kl, points in at_kl.items()
        for name in judges
    ]
    blocks: tuple[page.Block, ...] = (
        page.Paragraph(explanation),
        page.Bullets([*summary, *_compare_with_first(points, judge, procedure)]),
        page.Figures([_draw(frontier, procedure, name) for name in judges]),
        *tables,
        *(page.Paragraph(note, note=True) for note in _notes(frontier)),
    )
    return page.Section("What to expect without training", blocks, summary)


def _write_headline(points: Sequence[FrontierPoint], judge: str, procedure: str) -> str:
    """Report the objective that is made for the procedure, or the highest, and then that it was picked."""
    first = points[0]
    made_for_it = "identity" if procedure == "Standard()" else f"optimum for {format_procedure(procedure)}"
    best = next((point for point in points if format_objective(point.arm) == made_for_it), None)
    picked = ""
    if best is None:
        best = max(points, key=lambda point: point.win_rates[judge][procedure].value)
        picked = f", picked as the highest of {len(points)} and flattered by it," * (len(points) > 1)
    sentence = (
        f"Without training, at KL {best.kl:g} and {format_procedure(procedure)}, judged by {judge}: "
        f"{format_objective(best.arm)}{picked} wins {_format_rate(best, judge, procedure)}"
    )
    if best is not first and best.gains:
        open_ = "" if best.verdict(judge, procedure) else "; these data do not tell the two apart"
        sentence += f", {_format_gain(best, judge, procedure)} from {format_objective(first.arm)}{open_}"
    ess = min(best.ess_of[procedure], best.ess_of_gain(procedure))
    if ess < RELIABLE_ESS:
        sentence += f" (~: from {ess:.1f} effective completions of a prompt, too few to go by the interval)"
    return f"{sentence}."


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


def _format_rate(point: FrontierPoint, judge: str, procedure: str) -> str:
    return f"{format_share(point.win_rates[judge][procedure])} {mark_ess(point.ess_of[procedure])}".rstrip()


def _format_gain(point: FrontierPoint, judge: str, procedure: str) -> str:
    return f"{format_points(point.gains[judge][procedure])} {mark_ess(point.ess_of_gain(procedure))}".rstrip()


def _draw(frontier: FrontierEstimate, procedure: str, judge: str) -> page.Drawing:
    hollow = any(point.ess_of[procedure] < RELIABLE_ESS for point in frontier.points)
    note = f"; hollow marks rest on fewer than {RELIABLE_ESS} effective completions" * hollow
    caption = f"Judged by {judge}, {format_procedure(procedure)}{note}."
    name = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in judge)
    return page.draw(plots.reweighted(frontier, procedure, judge), caption, f"frontier-{name}")


def _tabulate(points: Sequence[FrontierPoint], procedures: Sequence[str], judge: str) -> page.Table:
    main = choose_procedure(procedures)
    gain = f"{format_procedure(main)}, from {format_objective(points[0].arm)}"
    rows = [
        [
            format_objective(point.arm),
            *(_format_rate(point, judge, procedure) for procedure in procedures),
            _format_gain(point, judge, main) if point.gains else "not known",
            f"{point.ess:.1f}",
        ]
        for point in points
    ]
    return page.Table(["", *map(format_procedure, procedures), gain, "ESS"], rows)


def _notes(frontier: FrontierEstimate) -> Iterator[str]:
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
