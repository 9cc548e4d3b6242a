"""Preference data: rows of data sets to pairs, templates for the prompts of tasks, and the order of several tasks.

A row is in TRL's preference format, conversational or plain text, with or without a prompt of its own, of one turn or
several; or it has choices and the number of the right one. `order_pairs` shuffles tasks and interleaves them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.text import completion_messages, plain_messages
from calibrated_rewards.prompts import Completion, Prompt, start_of

MIXES = ("size", "uniform")
FIELD = re.compile(r"\{(\w+)\}")


class Pair(NamedTuple):
    """A prompt and two completions of it, the better one first."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    task: str = ""
    head: str = ""
    """The name of the head that learns from it; empty for the first."""


@dataclass(frozen=True)
class TaskTemplate:
    """How the rows of a task become prompts, and labels become pairs: {column} stands for a column's value.

    >>> template = TaskTemplate("{premise} Does it follow: {claim}", answers=("yes", "no"))
    >>> row = {"premise": "It rains.", "claim": "It is wet.", "label": 0}
    >>> template.make_pairs(row)
    [Pair(prompt='It rains. Does it follow: It is wet.', chosen='yes', rejected='no', task='', head='')]
    """

    prompt: str
    answers: tuple[str, ...] = ()
    """The answers of the labels 0, 1, ...: each wrong one makes a pair with the right one."""
    choices: str = "choices"
    """The column of a row's own list of answers, where there are no `answers`."""
    label: str = "label"
    """The column with the number of the right answer, from 0 on; a text such as "1" is read as one."""
    system: str = ""
    """A system message in front of the prompt."""
    chat: bool = False
    """Makes the prompt a user's message; with `system` it is one anyway."""

    def __post_init__(self) -> None:
        if not FIELD.search(self.prompt):
            raise ValueError(f"a template names columns in braces, such as {{question}}, got {start_of(self.prompt)}")

    def write_prompt(self, row: Mapping[str, Any], place: str = "a row") -> Prompt:
        """Write the prompt of a row; braces within a value stay as they are."""
        text = FIELD.sub(lambda match: str(_get(row, match[1], place)), self.prompt)
        if not self.chat and not self.system:
            return text
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, {"role": "user", "content": text}]

    def make_pairs(self, row: Mapping[str, Any], place: str = "a row", task: str = "") -> list[Pair]:
        """Make the pairs of a row: its own chosen and rejected, or the right answer with each wrong one."""
        prompt = self.write_prompt(row, place)
        if not self.answers and {"chosen", "rejected"} <= row.keys():
            chosen, rejected = (_read_side(row, column, place) for column in ("chosen", "rejected"))
            return [_checked(Pair(prompt, chosen, rejected, task, str(row.get("head") or "")), place)]
        answers = self.answers or _read_choices(row, self.choices, place)
        return _pair_choices(prompt, answers, _get(row, self.label, place), place, task, str(row.get("head") or ""))


@dataclass(frozen=True)
class PairReader:
    """The rules by which rows become pairs: a template for each task that has one."""

    templates: Mapping[str, TaskTemplate] = field(default_factory=dict)
    task_column: str = "task"
    """The column with a row's task, where the source does not say it."""

    def read(self, rows: Iterable[tuple[str, Any]], task: str = "") -> Iterator[Pair]:
        """Read rows, each with the place that an error names; a row without a pair is refused by its place."""
        for place, row in rows:
            if not isinstance(row, Mapping):
                raise TypeError(f"{place}: a preference is a row with chosen and rejected, got {start_of(row)}")
            own = task or str(row.get(self.task_column) or "")
            template = self.templates.get(own) or self.templates.get("")
            yield from template.make_pairs(row, place, own) if template else parse_pairs(row, place, own)


def parse_pairs(row: Mapping[str, Any], place: str = "a row", task: str = "") -> list[Pair]:
    """Read the pairs of a row: one of `chosen` and `rejected`, or one for each wrong answer among `choices`.

    `label` is the number of the right choice.
    Without a prompt, chats begin with it: the turns that both share. Texts share what they begin with alike.

    >>> parse_pairs({"chosen": "2+2= 4", "rejected": "2+2= five"})
    [Pair(prompt='2+2=', chosen=' 4', rejected=' five', task='', head='')]
    >>> [pair.rejected for pair in parse_pairs({"prompt": "2+2=", "choices": ["3", "4", "5"], "label": 1})]
    ['3', '5']
    """
    name = str(row.get("head") or "")
    if row.get("choices") is not None and (row.get("label") is not None or row.get("chosen") is None):
        prompt, label = _read_side(row, "prompt", place), _get(row, "label", place)
        return _pair_choices(prompt, _read_choices(row, "choices", place), label, place, task, name)
    chosen, rejected = (_read_side(row, column, place) for column in ("chosen", "rejected"))
    prompt = None if row.get("prompt") is None else _read_side(row, "prompt", place)
    if _is_chat(chosen) != _is_chat(rejected):
        raise TypeError(f"{place}: chosen and rejected are both texts or both messages, got {start_of(rejected)}")
    if prompt is not None and len(prompt):
        if _is_chat(chosen) and not _is_chat(prompt):
            # The text of a prompt: the messages may begin with it, as UltraFeedback's do, or go on from it.
            prompt = [{"role": "user", "content": prompt}] if chosen[0]["role"] == "assistant" else None
        elif _is_chat(chosen) and _starts_with(chosen, prompt):
            prompt = None
    if prompt is None or not len(prompt):
        shared = count_shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return [_checked(Pair(prompt, chosen, rejected, task, name), place)]


def count_shared(chosen: Any, rejected: Any) -> int:
    """Count the turns, or letters, that two completions begin with alike; a blank before them is theirs.

    >>> count_shared("to be good", "to be bad"), count_shared("a", "a b")
    (5, 0)
    """
    if _is_chat(chosen):
        chosen, rejected = plain_messages(chosen), plain_messages(rejected)
    length = min(len(chosen), len(rejected))
    shared = next((i for i in range(length) if chosen[i] != rejected[i]), length)
    if isinstance(chosen, str):
        # Not in the middle of a word, and never all of one.
        while shared and not (chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()):
            shared -= 1
        return shared
    return shared if shared < length else max(0, length - 1)


def order_pairs(
    tasks: Sequence[str], epochs: float = 1.0, *, mix: str = "size", seed: int = 0
) -> npt.NDArray[np.int64]:
    """Order pairs, by their tasks, for so many epochs: each task shuffled anew in each pass, tasks interleaved.

    With mix="size" a task comes as often as it has pairs, spread evenly, each pair once an epoch. With mix="uniform",
    the paper's, tasks come equally often: a small one is repeated, of a large one the rest comes in later epochs.

    >>> order_pairs(["a", "a", "a", "a", "b", "b"], mix="size", seed=1).tolist()
    [1, 5, 3, 2, 4, 0]
    >>> [["a", "b"][i // 4] for i in order_pairs(["a"] * 4 + ["b"] * 2, mix="uniform").tolist()]
    ['b', 'a', 'a', 'b', 'a', 'b']
    """
    if mix not in MIXES:
        raise ValueError(Message(f"tasks are mixed by {' or '.join(MIXES)}, got {setting('mix', mix)}"))
    names = sorted({*tasks})
    members = [np.flatnonzero(np.asarray(tasks, dtype=object) == name) for name in names]
    length = max(1, round(len(tasks) * epochs))
    rng = np.random.default_rng(seed)
    shares = np.array([len(each) for each in members], dtype=float) if mix == "size" else np.ones(len(members))
    shares = shares / shares.sum()
    owed, passes = np.zeros(len(members)), [np.empty(0, dtype=np.int64) for _ in members]
    order = np.empty(length, dtype=np.int64)
    for start in range(0, length, len(tasks)):
        # Within an epoch the tasks' numbers are exact; their places are even, from a random phase.
        count = min(len(tasks), length - start)
        owed += shares * count
        draws = _round_to(owed, count)
        owed -= draws
        places, owners = [], []
        for at, number in enumerate(draws.tolist()):
            places += ((np.arange(number) + rng.random(number)) / max(1, number)).tolist()
            owners += [at] * number
        for place, owner in enumerate(np.asarray(owners)[np.argsort(places, kind="stable")].tolist()):
            if not len(passes[owner]):
                passes[owner] = rng.permutation(members[owner])
            order[start + place], passes[owner] = passes[owner][0], passes[owner][1:]
    return order


def _round_to(numbers: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Round numbers to whole ones with this sum, the largest fractions up."""
    whole = np.floor(numbers + 1e-9).astype(np.int64)
    rest = total - int(whole.sum())
    whole[np.argsort(whole - numbers, kind="stable")[:rest]] += 1
    return whole


def _pair_choices(prompt: Any, answers: Sequence[str], label: Any, place: str, task: str, head: str) -> list[Pair]:
    """Pair the right answer with each of the others."""
    if len(answers) < 2:
        raise ValueError(f"{place}: the right answer is preferred to others, which needs 2 answers, got {len(answers)}")
    number = _read_number(label)
    if number is None or not 0 <= number < len(answers):
        raise ValueError(
            f"{place}: a label is the number of one of {len(answers)} answers, from 0 to {len(answers) - 1}, "
            f"got {label!r:.80}"
        )
    right = answers[number]
    if isinstance(label, str) and label in answers and label != right:
        raise ValueError(
            f"{place}: the label {label!r} is the number of the answer {start_of(right)}, and is an answer itself: "
            "write it as a number, without quotes"
        )
    wrong = [answer for i, answer in enumerate(answers) if i != number]
    return [_checked(Pair(prompt, right, answer, task, head), place) for answer in wrong]


def _read_number(label: Any) -> int | None:
    """Read a whole number, or a text of one such as "1"; None for anything else."""
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\s*[0-9]+\s*", label) else None
    return int(label) if isinstance(label, int | np.integer) and not isinstance(label, bool) else None


def _checked(pair: Pair, place: str) -> Pair:
    """Convert messages to plain ones; refuse a pair that is one completion twice, or the completion of a prompt."""
    if _is_chat(pair.prompt) and not len(pair.prompt):
        raise ValueError(f"{place}: chats without a prompt begin with it, both alike, got {start_of(pair.chosen)}")
    prompt = plain_messages(pair.prompt) if _is_chat(pair.prompt) else pair.prompt
    both = [completion_messages(each) if _is_chat(each) else each for each in (pair.chosen, pair.rejected)]
    if both[0] == both[1]:
        raise ValueError(f"{place}: a preference has two completions, got {start_of(pair.chosen)} twice")
    for each in both:
        last: Any = each[-1] if len(each) else {}
        if not isinstance(each, str) and last.get("role") != "assistant":
            raise ValueError(f"{place}: a completion ends with an assistant's message, got {start_of(each)}")
    if isinstance(prompt, str) and not all(isinstance(each, str) for each in both):
        raise TypeError(f"{place}: completions that are messages need a prompt of messages, got {start_of(prompt)}")
    for each in (prompt, *both):
        if re.search("[\ud800-\udfff]", json.dumps(each, ensure_ascii=False, default=str)):
            raise ValueError(f"{place}: a text is whole characters, got half of one in {start_of(each)}")
    return pair._replace(prompt=prompt, chosen=both[0], rejected=both[1])


def _read_side(row: Mapping[str, Any], column: str, place: str) -> Any:
    """Read a text or messages of a row, as they are; an error names the row and the column."""
    value = _get(row, column, place)
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{place}: {column} is a text or a list of messages, got {start_of(value)}")
    if len(value):
        try:
            plain_messages(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}: {column} is a text or a list of messages: {error}") from None
    return value


def _read_choices(row: Mapping[str, Any], column: str, place: str) -> list[str]:
    """Read the answers of a row as texts."""
    value = _get(row, column, place)
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{place}: {column} is a list of answers, got {start_of(value)}")
    return [str(each) for each in value]


def _starts_with(messages: Any, prompt: Any) -> bool:
    """Tell if messages repeat the prompt at their beginning."""
    first = plain_messages(messages)[: len(prompt)]
    return _is_chat(prompt) and len(messages) > len(prompt) and first == plain_messages(prompt)


def _is_chat(value: Any) -> bool:
    return not isinstance(value, str)


def _get(row: Mapping[str, Any], column: str, place: str) -> Any:
    if row.get(column) is None:
        raise ValueError(f"{place} has no {column!r}, it has {', '.join(map(str, row))}")
    return row[column]
