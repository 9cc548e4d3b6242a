"""What the frontier without training promised: the exact optimum of each reward, on the calibrated completions."""

from collections.abc import Iterator, Sequence

from calibrated_rewards.evaluation import plots
from calibrated_rewards.evaluation.prospects import RELIABLE, Point, Reweighted, ess_of_gain, told
from calibrated_rewards.evaluation.report.experiment import Experiment, main_judge, main_procedure
from calibrated_rewards.evaluation.report.markup import (
    Markup,
    Piece,
    Section,
    bullets,
    element,
    figure,
    figures,
    folded,
    raised,
    table,
)
from calibrated_rewards.evaluation.wording import arm, caution, counted, percents, points, spoken


def promised(of: Experiment) -> Section | None:
    """The section; None without a frontier, or with none of its points."""
    found = of.frontier
    if found is None or not found.points:
        return None
    procedure, judge = main_procedure(found.procedures), main_judge([*found.points[0].win_rates], found.selected_by)
    kls = sorted({point.kl for point in found.points})
    kl = min(kls, key=lambda each: abs(each - 1.0))
    at = [point for point in found.points if point.kl == kl]
    few, headline = caution(found.prompts), _headline(at, judge, procedure)
    judges = [*found.points[0].win_rates]
    blocks = [
        element("p", _explained(found)),
        bullets([*few, headline, *_against_first(at, judge, procedure)]),
        figures(*(_figure(found, procedure, name) for name in judges)),
        *(folded(f"KL {each:g}, judged by {name}", _table(found, each, name)) for each in kls for name in judges),
        _notes(found),
    ]
    return Section("What was promised without training", tuple(blocks), (*few, headline))


def _explained(found: Reweighted) -> str:
    return (
        "The optimum for any reward is a reweighting of the completions there are, here of "
        f"{counted(found.prompts, 'prompt')} with {found.rollouts:,} each, so rewards can be compared at equal KL "
        "before any is trained for. Both sides are under the procedure, which selects by "
        f"{found.selected_by}. A trained policy may fall short of this."
    )


def _headline(at: Sequence[Point], judge: str, procedure: str) -> str:
    """Of the arm that was made for the procedure, whatever came of it; without one, of the highest, as what it is."""
    first = at[0]
    made = next((point for point in at if arm(point.arm) == arm_for(procedure)), None)
    best = made or max(at, key=lambda point: point.win_rates[judge][procedure].value)
    picked = "" if made is not None or len(at) == 1 else f", picked as the highest of {len(at)} and flattered by it,"
    rate = percents(best.win_rates[judge][procedure]) + _mark(best.ess_of[procedure])
    said = (
        f"Without training, at KL {best.kl:g} and {spoken(procedure)}, judged by {judge}: {arm(best.arm)}{picked} "
        f"wins {rate}"
    )
    if best is not first and best.gains:
        gain, ess = best.gains[judge][procedure], ess_of_gain(best, procedure)
        beyond = "" if told(best, judge, procedure) else "; these data do not tell the two apart"
        said += f", {points(gain)}{_mark(ess)} from {arm(first.arm)}{beyond}"
    least = min(best.ess_of[procedure], ess_of_gain(best, procedure))
    few = f" (~: from {least:.1f} effective completions of a prompt, too few to go by the interval)"
    return f"{said}{few if least < RELIABLE else ''}."


def arm_for(procedure: str) -> str:
    """The optimum for a procedure, as arms are called; the quantile itself for a single draw.

    >>> arm_for("BestOf(n=4)"), arm_for("Standard()")
    ('optimum for best of 4', 'identity')
    """
    return "identity" if procedure == "Standard()" else f"optimum for {spoken(procedure)}"


def _against_first(at: Sequence[Point], judge: str, procedure: str) -> Iterator[str]:
    first, *others = at
    compared = [(point, told(point, judge, procedure)) for point in others if point.gains]
    for words, way in (("Above", "better"), ("Below", "worse")):
        if chosen := [point for point, found in compared if found == way]:
            yield (
                f"{words} {arm(first.arm)}, by intervals without 0 and by more than so few effective completions were "
                f"found to be off: {_named(chosen)}."
            )
    if left := [point for point, found in compared if found is None]:
        yield f"These data do not tell from {arm(first.arm)}: {_named(left)}."


def _mark(ess: float) -> str:
    return " ~" * (ess < RELIABLE)


def _named(chosen: Sequence[Point]) -> str:
    return ", ".join(arm(point.arm) for point in chosen)


def _figure(found: Reweighted, procedure: str, judge: str) -> Markup:
    said = f"Judged by {judge}, {spoken(procedure)}"
    if any(point.ess_of[procedure] < RELIABLE for point in found.points):
        said += f"; hollow marks rest on fewer than {RELIABLE} effective completions"
    said += "."
    return figure(plots.reweighted(found, procedure, judge), said, f"frontier-{_id(judge)}")


def _table(found: Reweighted, kl: float, judge: str) -> Markup:
    at = [point for point in found.points if point.kl == kl]
    head = [
        "",
        *map(spoken, found.procedures),
        f"{spoken(main_procedure(found.procedures))}, from {arm(at[0].arm)}",
        "ESS",
    ]
    return table(head, [_row(point, judge, found.procedures) for point in at])


def _row(point: Point, judge: str, procedures: Sequence[str]) -> list[Piece]:
    rates = [percents(point.win_rates[judge][each]) + _mark(point.ess_of[each]) for each in procedures]
    main = main_procedure(procedures)
    gain = points(point.gains[judge][main]) + _mark(ess_of_gain(point, main)) if point.gains else "not known"
    return [raised(arm(point.arm)), *rates, gain, f"{point.ess:.1f}"]


def _notes(found: Reweighted) -> Markup:
    said = [
        "ESS: effective completions of a prompt behind a row. Each interval is at 95 %, over prompts, by itself: of "
        "many, about one in twenty misses, and the highest of many is flattered by being chosen.",
    ]
    if any(value < RELIABLE for point in found.points for value in point.ess_of.values()):
        said.append(
            f"~ rests on fewer than {RELIABLE} effective completions of a prompt: off by up to .04, below 3 by .07, "
            "below 1.5 by .14, whatever the interval says."
        )
    said += [f"Left out: {reason}" for reason in found.left_out]
    return element("div", *(element("p", each) for each in said), class_="note")


def _id(name: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)
