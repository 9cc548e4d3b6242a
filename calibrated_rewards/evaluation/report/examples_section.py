"""What policies write: for a few prompts, the completion that the procedure selects."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrated_rewards.evaluation.policies import REFERENCE
from calibrated_rewards.evaluation.report.experiment import Experiment, main_procedure, procedure_of
from calibrated_rewards.evaluation.report.markup import Markup, Section, element
from calibrated_rewards.evaluation.wording import counted, short
from calibrated_rewards.theory.procedures import BestOf

PROMPTS, LONGEST = 3, 800


@dataclass(frozen=True)
class Selected:
    """A prompt, and the best of the first completions that a policy wrote for it."""

    prompt: str
    completion: str
    scores: Mapping[str, float]


def examples(of: Experiment) -> Section | None:
    """The section; None where the completions of the evaluation are not at hand."""
    found, at = of.evaluation, of.evaluated
    if found is None or at is None or not found.policies:
        return None
    names = [policy.name for policy in found.policies]
    known = procedure_of(main_procedure([*found.policies[0].win_rates[found.selected_by]]))
    n = known.n if isinstance(known, BestOf) else 1
    written = {name: selected(at / name / "rollouts", found.selected_by, n) for name in (*names, REFERENCE)}
    shared = [key for key in written[REFERENCE] if all(key in own for own in written.values())][:PROMPTS]
    if not shared:
        return None
    what = f"the best of its first {n}, by {found.selected_by}" if n > 1 else "its first completion"
    prompts = "first prompt" if len(shared) == 1 else f"first {counted(len(shared), 'prompt')}"
    explained = f"The {prompts} of the evaluation, not chosen by anybody; of each policy {what}."
    blocks = [block for key in shared for block in _shown({name: own[key] for name, own in written.items()})]
    return Section("What they write", (element("p", explained), *blocks))


def selected(folder: Path, by: str, n: int) -> dict[bytes, Selected]:
    """The best of the first n completions of each prompt of the first file, in its order."""
    from calibrated_rewards.calibration.shards import SCORE, decode_text, read_table

    files = sorted(folder.glob("*.parquet"))
    best: dict[bytes, Selected] = {}
    for row in read_table(files[0]).to_pylist() if files else []:
        scores = {name.removeprefix(SCORE): score for name, score in row.items() if name.startswith(SCORE)}
        if row["number"] >= n or scores.get(by) is None:
            continue
        before = best.get(row["key"])
        if before is None or scores[by] > before.scores[by]:
            prompt = decode_text(row["prompt"], row["chat"])
            said = decode_text(row["completion"], row["completion_chat"])
            best[row["key"]] = Selected(as_text(prompt), as_text(said), scores)
    return best


def as_text(said: Any) -> str:
    """A text as it is; of messages, who says what.

    >>> as_text([{"role": "user", "content": "Hi"}])
    'user: Hi'
    """
    if isinstance(said, str):
        return said
    return "\n".join(f"{message.get('role')}: {message.get('content') or ''}" for message in said)


def _shown(own: Mapping[str, Selected]) -> Iterator[Markup]:
    yield element("h3", "Prompt")
    yield element("div", _cut(next(iter(own.values())).prompt), class_="said")
    for name, each in own.items():
        scores = ", ".join(f"{scorer} {short(score)}" for scorer, score in each.scores.items() if score is not None)
        yield element("p", element("b", name), f" ({scores})")
        yield element("div", _cut(each.completion), class_="said")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
