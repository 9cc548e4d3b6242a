"""What came out: KL and win rates with their intervals, and what these tell of one policy against another."""

from collections.abc import Iterator, Sequence

import numpy as np

from calibrated_rewards import theory
from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.estimates import Stated
from calibrated_rewards.evaluation.outcomes import Difference, Evaluation, Outcome, completion_notes, precision_notes
from calibrated_rewards.evaluation.report.expected import table_curve
from calibrated_rewards.evaluation.report.experiment import Experiment, main_judge, main_procedure, procedure_of
from calibrated_rewards.evaluation.report.markup import Markup, Piece, Section, bullets, element, figure, figures, table
from calibrated_rewards.evaluation.wording import caution, counted, measured, percents, points, short, spoken, tells
from calibrated_rewards.theory.transforms import Identity

UNKNOWN = "these data do not tell"


def outcome(of: Experiment) -> Section | None:
    """The section; None without an evaluation of a policy."""
    found = of.evaluation
    if found is None or not found.policies:
        return None
    judges = [*found.policies[0].win_rates]
    main = main_procedure([*found.policies[0].win_rates[judges[0]]])
    few, told = (*caution(found.prompts), *completion_notes(found)), claims(found)
    explained = (
        f"Each policy and the reference wrote {counted(found.completions, 'completion')} for each of "
        f"{counted(found.prompts, 'prompt')}. "
        f"A win rate is how often a policy beats the reference, both under the same procedure, which selects by "
        f"{found.selected_by}; 50 % is the reference itself."
        f"{' In brackets: 95 % intervals over prompts.' * (found.prompts > 1)}"
    )
    blocks = [
        element("p", explained),
        bullets([*few, *told]),
        *(block for name in judges for block in (element("h3", f"Judged by {name}"), _table(found, name))),
        *_notes(found),
        *_differences(found),
        figures(*(_figure(found, name) for name in judges), *_beside_theory(of, found, main)),
    ]
    return Section("What came out", tuple(blocks), (*few, *told))


def claims(found: Evaluation) -> tuple[str, ...]:
    """What the intervals allow to be said of each policy beside the reference, and of each beside another."""
    rates = found.policies[0].win_rates
    judge = main_judge([*rates], found.selected_by)
    procedure = main_procedure([*rates[judge]])
    return (_against_reference(found, judge, procedure), *_between(found, judge, procedure))


def _against_reference(found: Evaluation, judge: str, procedure: str) -> str:
    each = [_wins(policy, policy.win_rates[judge][procedure]) for policy in found.policies]
    return f"Judged by {judge}, {spoken(procedure)}: {'; '.join(each)}."


def _wins(policy: Outcome, rate: Stated) -> str:
    at = "" if policy.kl is None else f" at a KL of {short(policy.kl.value)}"
    if rate.low is None or rate.high is None:
        verdict = ", from one prompt, without an interval"
    elif not tells(rate, about=0.5):
        verdict = ", whether it is better than the reference these data do not tell"
    else:
        verdict = ", above the reference" if rate.low > 0.5 else ", below the reference"
    return f"{policy.name} wins {percents(rate)}{at}{verdict}"


def _between(found: Evaluation, judge: str, procedure: str) -> Iterator[str]:
    each = [d for d in found.differences if (d.judged_by, d.procedure) == (judge, procedure)]
    if each:
        said = [f"{d.a} less {d.b}: {points(d.value)}, {_verdict(d)}" for d in each]
        yield f"Between policies, judged by {judge}, {spoken(procedure)}: {'; '.join(said)}."


def _verdict(d: Difference) -> str:
    if not tells(d.value):
        return UNKNOWN
    return f"{d.a if d.value.value > 0 else d.b} is ahead"


def _table(found: Evaluation, judge: str) -> Markup:
    procedures = [*found.policies[0].win_rates[judge]]
    head = ["", "KL, nats", "tokens", f"mean score by {judge}", *(f"win rate, {spoken(each)}" for each in procedures)]
    rows = [_row(each, judge, procedures) for each in (*found.policies, found.reference)]
    return table(head, rows)


def _row(each: Outcome, judge: str, procedures: Sequence[str]) -> list[Piece]:
    rates = each.win_rates.get(judge, {})
    shown = [percents(rates[procedure]) if procedure in rates else "" for procedure in procedures]
    kl = "" if each.kl is None else measured(each.kl)
    return [
        each.name,
        kl,
        "not said" if each.tokens is None else _tenths(each.tokens),
        measured(each.scores[judge]),
        *shown,
    ]


def _tenths(value: Stated) -> str:
    return f"{value.value:.1f}" + ("" if value.low is None else f" [{value.low:.1f}, {value.high:.1f}]")


def _notes(found: Evaluation) -> Iterator[Markup]:
    other = [f"{each.not_as_drawn:,} of {each.name}" for each in found.policies if each.not_as_drawn]
    if other:
        said = "The text of some completions makes other tokens than were drawn, and their KL is along those: "
        yield element("p", f"{said}{', '.join(other)}.", class_="note")
    for each in found.policies:
        yield from (element("p", f"{each.name}: {note}.", class_="note") for note in precision_notes(each.kl_precision))


def _differences(found: Evaluation) -> Iterator[Markup]:
    if not found.differences:
        return
    unclear = sum(not tells(d.value) for d in found.differences)
    rows = [
        [f"{d.a} less {d.b}", d.judged_by, spoken(d.procedure), points(d.value), _verdict(d)] for d in found.differences
    ]
    yield element("h3", "One policy against another")
    yield table(["", "judged by", "procedure", "difference of win rates", "what the interval says"], rows)
    if found.prompts > 1:
        many = (
            f"Of {counted(len(rows), 'difference')}, these data leave {unclear} open. They are paired by prompt, each "
            "at 95 % by itself: of many true zeros, about one in twenty would be left out by chance."
        )
        yield element("p", many, class_="note")


def _figure(found: Evaluation, judge: str) -> Markup:
    said = f"Win rates over the reference, judged by {judge}{_intervals(found)}; at 0.5 the reference itself."
    return figure(plots.outcomes(found, judge), said, f"outcomes-{[*found.policies[0].win_rates].index(judge)}")


def _intervals(found: Evaluation) -> str:
    return ", with 95 % intervals" * (found.prompts > 1)


def _beside_theory(of: Experiment, found: Evaluation, procedure: str) -> Iterator[Markup]:
    """Measured KL and win rate under the reward itself, which is what theory speaks of."""
    known, by = procedure_of(procedure), found.selected_by
    measured = {
        policy.name: (policy.kl, policy.win_rates[by][procedure])
        for policy in found.policies
        if policy.kl is not None and by in policy.win_rates
    }
    most = max((kl.value for kl, _ in measured.values()), default=0.0)
    if known is None or most <= 0:
        return
    most = max(1.2 * most, 0.1)
    curves = []
    for transform in dict.fromkeys((Identity(), of.transform)):
        high, low = (theory.beta_for_kl(transform, kl) for kl in (most / 50, most))
        curves.append(theory.frontier(transform, [known], np.geomspace(high, low, 24)))
    said = (
        f"Win rate, {spoken(procedure)}, against KL, judged by {by}: lines are the exact optimum of theory for a "
        "reward without ties, marks are what was measured"
        f"{_intervals(found)}."
    )
    own = table_curve(of, known, most)
    if own is not None:
        said += ' "This table": the policies that fit the rewards of the table, with its ties and its K.'
    yield figure(plots.frontier(curves, known, measured, on_table=own), said, "theory")
