"""Multiple choice: the option with the highest score is the answer, by reward models and by log-probability.

Direct Preference Heads are evaluated so: a head scores each option as a completion, against the mean log-probability
of its tokens. Log-probability is a scorer as well, `ImplicitReward(..., reference_free=True, reduce="mean")`.

>>> from calibrated_rewards.testing.suites import NumberScorer
>>> questions = [Question("2+2=", ("3", "4"), answer=1), Question("9-9=", ("0", "1"), answer=0)]
>>> print(answer_questions(questions, {"largest": NumberScorer()}))
largest is right on 0.500 [0.000, 1.000] of 2 questions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float64

from calibrated_rewards.calibration.sources import get_column, parse_row, read_rows
from calibrated_rewards.evaluation.estimates import Estimate, IntervalEstimate
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import Scorer, score

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A prompt with its options, one of which is right."""

    prompt: Prompt
    options: tuple[Completion, ...]
    answer: int
    """The number of the right option, from 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        if len(self.options) < 2 or not 0 <= self.answer < len(self.options):
            raise ValueError(
                f"a question has two options or more, and an answer that is one of them by its number from 0, got "
                f"{len(self.options)} options and answer={self.answer}"
            )


@dataclass(frozen=True)
class Answers:
    """How often each scorer was right, and by how much two of them differ on the same questions."""

    right: Mapping[str, IntervalEstimate]
    differences: Mapping[tuple[str, str], IntervalEstimate]
    """Of each two scorers, the first less the second, paired by question."""
    tied: Mapping[str, float]
    """The share of questions on which several options have the highest score; each of n counts 1/n."""
    scores: Mapping[str, list[list[float]]]
    """By scorer and question, the score of each option."""

    def as_json(self) -> dict[str, Any]:
        """Return accuracies, differences and ties as JSON holds them."""
        return {
            "right": {name: asdict(each) for name, each in self.right.items()},
            "differences": [{"first": a, "second": b, **asdict(each)} for (a, b), each in self.differences.items()],
            "tied": dict(self.tied),
        }

    def __str__(self) -> str:
        names = sorted(self.right, key=lambda name: -self.right[name].value)
        best = self.right[names[0]]
        lines = [f"{names[0]} is right on {best} of {best.prompts} questions."]
        lines += [f"{name}: {self.right[name]}" for name in names[1:]]
        lines += [f"{a} less {b}: {each}" for (a, b), each in self.differences.items()]
        lines += [f"{name}: several options have the highest score on {x:.1%}" for name, x in self.tied.items() if x]
        return "\n".join(lines)


def answer_questions(questions: Iterable[Question], scorers: Mapping[str, Scorer]) -> Answers:
    """Score every option of every question by each scorer, and compare how often the highest one is right."""
    questions = list(questions)
    if not questions or not scorers:
        raise ValueError(f"multiple choice needs questions and scorers, got {len(questions)} and {len(scorers)}")
    prompts = [question.prompt for question in questions for _ in question.options]
    options = [option for question in questions for option in question.options]
    ends = np.cumsum([len(question.options) for question in questions])[:-1]
    right: dict[str, Float64[np.ndarray, " n"]] = {}
    tied, scores = {}, {}
    for name, scorer in scorers.items():
        rows = np.split(score(scorer, prompts, options), ends)
        best = [row == row.max() for row in rows]
        right[name] = np.array([b[q.answer] / b.sum() for b, q in zip(best, questions, strict=True)], np.float64)
        tied[name] = float(np.mean([b.sum() > 1 for b in best]))
        scores[name] = [row.tolist() for row in rows]
    differences = {
        (a, b): IntervalEstimate.of(Estimate(right[a] - right[b])).clip(-1.0, 1.0) for a, b in combinations(right, 2)
    }
    rates = {name: IntervalEstimate.of(Estimate(each)).clip(0.0, 1.0) for name, each in right.items()}
    return Answers(rates, differences, tied, scores)


def read_questions(
    source: Any,
    *,
    options: str = "choices",
    answer: str = "answer",
    column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Iterator[Question]:
    """Read questions from anything that prompts are read from; an answer is a number from 0, a letter or the option.

    >>> rows = [{"prompt": "2+2=", "choices": ["3", "4"], "answer": "B"}]
    >>> [*read_questions(rows)]
    [Question(prompt='2+2=', options=('3', '4'), answer=1)]
    """
    for count, row in enumerate(read_rows(source, split)):
        if count == limit:
            return
        prompt = parse_row(row, column).prompt
        if not isinstance(row.value, Mapping):
            raise TypeError(f"{row.place} needs columns {options} and {answer}, it is a bare prompt")
        texts = get_column(row.value, options, row.place)
        if isinstance(texts, Mapping) and "text" in texts:  # as ARC and OpenBookQA have them
            labels, texts = [*map(str, texts.get("label", ()))], texts["text"]
        else:
            labels = []
        texts = [*map(str, texts)] if not isinstance(texts, str) else []
        value = get_column(row.value, answer, row.place)
        try:
            yield Question(prompt, tuple(texts), _find_answer(value, texts, labels))
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None


def _find_answer(value: Any, options: Sequence[str], labels: Sequence[str]) -> int:
    """Find the number of the right option; -1 if it is none of them."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and not labels:
        return int(value)
    names = [*labels] or [*LETTERS[: len(options)]]
    text = str(value)
    for known in (names, options, [str(i) for i in range(len(options))]):
        if text in known:
            return known.index(text)
    return -1
