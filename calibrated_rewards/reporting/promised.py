"""What the frontier without training promised: the exact optimum of each reward, on the calibrated completions."""

from collections.abc import Iterator, Sequence

from calibrated_rewards import plots
from calibrated_rewards.prospects import RELIABLE, Point, Reweighted
from calibrated_rewards.reporting.experiment import Experiment, main_judge, main_procedure
from calibrated_rewards.reporting.markup import (
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
from calibrated_rewards.wording import arm, percents, points, spoken, tells


def promised(of: Experiment) -> Section | None:
    """The section; None without a frontier, or with none of its points."""
    found = of.frontier
    if found is None or not found.points:
        return None
    procedure, judge = main_procedure(found.procedures), main_judge([*found.points[0].win_rates], found.selected_by)
    kls = sorted({point.kl for point in found.points})
    kl = min(kls, key=lambda each: abs(each - 1.0))
    at = [point for point in found.points if point.kl == kl]
    leader = _leader(at, judge, procedure)
    explained = (
        f"The optimum for any reward is a reweighting of the completions there are, here of {found.prompts:,} prompts "
        f"with {found.rollouts:,} each, so rewards can be compared at equal KL before any is trained for. Both sides "
        f"are under the procedure, which selects by {found.selected_by}. A trained policy may fall short of this."
    )
    judges = [*found.points[0].win_rates]
    blocks = [
        element("p", explained),
        bullets([leader, *_against_first(at, judge, procedure)]),
        figures(*(_figure(found, procedure, name) for name in judges)),
        *(folded(f"KL {each:g}, judged by {name}", _table(found, each, name)) for each in kls for name in judges),
        _notes(found),
    ]
    return Section("What was promised without training", tuple(blocks), (leader,))


def _leader(at: Sequence[Point], judge: str, procedure: str) -> str:
    """The arm with the highest win rate, and whether that says anything."""
    best = max(at, key=lambda point: point.win_rates[judge][procedure].value)
    told = (
        f"Without training, at KL {best.kl:g} and {spoken(procedure)}, the highest win rate of {len(at)} rewards, "
        f"judged by {judge}, is that of {arm(best.arm)}: {percents(best.win_rates[judge][procedure])}"
    )
    first = at[0]
    if best is first or not best.gains:
        return f"{told}."
    gain = best.gains[judge][procedure]
    beyond = "" if tells(gain) else "; these data do not tell the two apart"
    return f"{told}, {points(gain)} from {arm(first.arm)}{beyond}."


def _against_first(at: Sequence[Point], judge: str, procedure: str) -> Iterator[str]:
    first, *others = at
    compared = [(point, point.gains[judge][procedure]) for point in others if point.gains]
    for words, chosen in (
        ("above", [point for point, gain in compared if tells(gain) and gain.value > 0]),
        ("below", [point for point, gain in compared if tells(gain) and gain.value < 0]),
    ):
        if chosen:
            yield f"{words.capitalize()} {arm(first.arm)}, by intervals without 0: {_named(chosen)}."
    left = [point for point, gain in compared if not tells(gain)]
    if left:
        yield f"These data do not tell from {arm(first.arm)}: {_named(left)}."


def _named(chosen: Sequence[Point]) -> str:
    return ", ".join(arm(point.arm) for point in chosen)


def _figure(found: Reweighted, procedure: str, judge: str) -> Markup:
    said = f"Judged by {judge}, {spoken(procedure)}; hollow marks rest on fewer than {RELIABLE} effective completions."
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
    few = {each: " ~" * (point.ess_of[each] < RELIABLE) for each in procedures}
    rates = [percents(point.win_rates[judge][each]) + few[each] for each in procedures]
    gain = points(point.gains[judge][main_procedure(procedures)]) if point.gains else "not known"
    return [raised(arm(point.arm)), *rates, gain, f"{point.ess:.1f}"]


def _notes(found: Reweighted) -> Markup:
    said = [
        "ESS: effective completions of a prompt behind a row. Each interval is at 95 %, over prompts, by itself: of "
        "many, about one in twenty misses, and the highest of many is flattered by being chosen.",
    ]
    if any(value < RELIABLE for point in found.points for value in point.ess_of.values()):
        said.append(f"~ rests on fewer than {RELIABLE} effective completions of a prompt, and may be far too low.")
    said += [f"Left out: {reason}" for reason in found.left_out]
    return element("div", *(element("p", each) for each in said), class_="note")


def _id(name: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)
