"""Section on policies that were compared on the same held-out rollouts of the reference, without drawing any."""

from collections.abc import Iterator

from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies
from calibrated_rewards.evaluation.report import page
from calibrated_rewards.evaluation.report.experiment import Experiment
from calibrated_rewards.evaluation.wording import (
    few_prompts_notes,
    format_count,
    format_estimate,
    format_points,
    format_procedure,
    format_share,
)


def write_held_out(experiment: Experiment) -> page.Section | None:
    """Write the section; None without such a comparison."""
    compared = experiment.held_out
    if compared is None:
        return None
    first = next(iter(compared.checks.values()))
    summary = (*few_prompts_notes(first.prompts), *compared.claims())
    explanation = (
        f"The reference wrote {format_count(first.rollouts, 'completion')} for "
        f"{format_count(first.prompts, 'prompt')} that no policy was trained on. Each policy gives them other "
        "probabilities, and is judged by the completions with these as weights: nothing was drawn from it, and all "
        "policies are compared on the same completions. 50 % is the reference itself."
    )
    drawings = [
        page.draw(plots.held_out(compared), f"Win rates, by the {compared.judge_word}.", "held-out"),
        page.draw(
            plots.held_out_gains(compared), "The same, less those of the first policy: paired, so narrower.", "gains"
        ),
    ]
    blocks = (
        page.Paragraph(explanation),
        page.Bullets(summary),
        page.Figures(drawings[: len(compared.checks)]),
        *_tabulate(compared),
        *(page.Paragraph(f"{name}: {note}.", note=True) for name, e in compared.checks.items() for note in e.notes()),
    )
    return page.Section("On held-out rollouts", blocks, summary)


def _tabulate(compared: HeldOutPolicies) -> Iterator[page.Block]:
    judge, names = compared.judged_by, compared.procedures
    heads = ["", "KL, nats", *map(format_procedure, names)]
    rates = [
        [name, format_estimate(check.kl), *(format_share(check.win_rates[judge][each]) for each in names)]
        for name, check in compared.checks.items()
    ]
    yield page.Heading(f"Judged by the {compared.judge_word}")
    yield page.Table(heads, rates)
    if compared.differences:
        gains = [
            [
                f"{each.a} less {each.b}",
                format_estimate(each.comparison.kl),
                *(format_points(each.comparison.win_rates[judge][name]) for name in names),
            ]
            for each in compared.differences
        ]
        yield page.Heading("One policy against another")
        yield page.Table(heads, gains)
    yield page.Paragraph("In brackets: 95 % intervals over prompts, each by itself.", note=True)
