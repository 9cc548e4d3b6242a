"""Rollouts made elsewhere, and their scores: a row a prompt or a row a completion, each prompt given once.

Rollouts made elsewhere become shards of a directory like those that were drawn here."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from calibrated_rewards.calibration.plan import Ids, checked, taken_back
from calibrated_rewards.calibration.records import Row, readable_again, rows
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import State, empty
from calibrated_rewards.calibration.sources import Asked, as_messages, asked_of, is_given, kept, member
from calibrated_rewards.prompts import Completion, Prompt, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Finish, Rollout

Names = str | Mapping[str, str] | None

_COMPLETIONS = ("completions", "completion")
_SCORE = "score:"  # what our own files put before the name of a reward model
_SAID = ("text", "content", "message")
# What there may be to say about a completion, as a column or within it: a Rollout's tokens, finish and logprob.
_ABOUT = (("tokens", "token_ids"), ("finish", "finish_reason"), ("logprob", "cumulative_logprob"))
_ENDS: dict[str, Finish] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls"), "stop"),
    **dict.fromkeys(("length", "max_tokens"), "length"),
}


class Imported(NamedTuple):
    """A prompt with the rollouts that it has, and for each reward model a score of each."""

    prompt: Prompt
    id: Any
    rollouts: list[Rollout]
    scores: dict[str, Float32[np.ndarray, " K"]]


def imported(
    source: Any,
    *,
    prompt: str | None = None,
    completions: str | None = None,
    scores: Names = None,
    id_column: str | None = None,
    split: str | None = None,
) -> Iterator[Imported]:
    """The prompts of a source with their rollouts, each prompt once, with all that the source has of it.

    A source is what `rows` takes. A row has the list of a prompt's completions, or one of them; so have its columns of
    scores (`scores` is a column's name, or a mapping of a reward model's name to its column; by default each column
    `score:NAME`), of `tokens` (how many, or which), `finish` or `finish_reason`, and `logprob`. A completion is a text,
    a list of messages, or a mapping with `text`, `content` or `message` and the like of those columns. Rows of one
    prompt need not lie together.

    The source is read twice, to know which row is a prompt's last. In memory is a count for each prompt, and the
    rollouts of those that wait for a row: of one prompt if its rows lie together. An iterator is held whole.

    >>> rows = [{"prompt": "2+2=", "completion": text, "reward": r} for text, r in (("4", 1.0), ("5", 0.0))]
    >>> for found in imported(rows, scores="reward"):
    ...     print(found.prompt, [rollout.completion for rollout in found.rollouts], found.scores["reward"])
    2+2= ['4', '5'] [1. 0.]
    """
    again = source if readable_again(source) else [*source]
    named = {scores: scores} if isinstance(scores, str) else scores
    first = rows(again, split)  # at once: what cannot be opened is told here
    return _gathered(first, again, split, _Reader(prompt, completions, named, id_column))


class _Reader(NamedTuple):
    """In which columns a row has what."""

    prompt: str | None
    completions: str | None
    scores: Mapping[str, str] | None
    id_column: str | None

    def asked(self, row: Row) -> Asked:
        """Whose rollouts a row has."""
        if not isinstance(row.value, Mapping):
            raise TypeError(f"{row.place} needs columns, a prompt and completions, got {start_of(row.value)}")
        return asked_of(row, self.prompt, self.id_column)

    def found(self, row: Row, asked: Asked) -> Imported:
        """What one row has of a prompt's rollouts."""
        place, columns = f"{row.place}, prompt {start_of(asked.prompt)}", row.value
        name = self.completions or next((name for name in _COMPLETIONS if name in columns), _COMPLETIONS[0])
        said = _loaded(columns, member(columns, name, place))
        many = _are_many(said, place)
        given = said if many else [said]
        if not len(given):
            raise ValueError(f"{place} needs a completion, got none")
        about = [_column(columns, _first(columns, names), len(given), many, place) for names in _ABOUT]
        rollouts = [_rollout(said, notes, place) for said, *notes in zip(given, *about, strict=True)]
        scores = {
            model: _finite(_column(columns, column, len(given), many, place), model, place)
            for model, column in self._scores(columns).items()
        }
        return Imported(*asked, rollouts, scores)

    def _scores(self, columns: Mapping[str, Any]) -> Mapping[str, str]:
        if self.scores is not None:
            return self.scores
        return {name.removeprefix(_SCORE): name for name in map(str, columns) if name.startswith(_SCORE)}


def _gathered(first: Iterator[Row], source: Any, split: str | None, reader: _Reader) -> Iterator[Imported]:
    from tqdm import tqdm

    counting = tqdm(first, desc="counting rollouts", unit=" rows", delay=3, disable=None)
    left = Counter(prompt_key(reader.asked(row).prompt) for row in counting)
    waiting: dict[bytes, list[Imported]] = {}
    models: set[str] | None = None
    for row in rows(source, split):
        asked = reader.asked(row)
        key, found = prompt_key(asked.prompt), reader.found(row, asked)
        models = {*found.scores} if models is None else models
        if models != {*found.scores}:
            raise ValueError(
                f"{row.place}: all rows have the same scores, {sorted(models)}, got {sorted(found.scores)}"
            )
        waiting.setdefault(key, []).append(found)
        left[key] -= 1
        if left[key] == 0:
            yield _merged(waiting.pop(key), row.place)
    if any(left.values()):
        raise ValueError(f"{start_of(source)} gave other rows when it was read again: give what stays, or an iterator")


def _merged(parts: list[Imported], place: str) -> Imported:
    """All rows of a prompt as one."""
    first = parts[0]
    ids = {part.id for part in parts} - {None}
    if len(ids) > 1:
        raise ValueError(f"{place}: a prompt has one id, {start_of(first.prompt)} got {len(ids)}: {start_of(ids)}")
    scores = {model: np.concatenate([part.scores[model] for part in parts]) for model in first.scores}
    return Imported(
        first.prompt, next(iter(ids), None), [rollout for part in parts for rollout in part.rollouts], scores
    )


def _are_many(said: Any, place: str) -> bool:
    """Whether a row has a list of completions, rather than one: a text, a mapping, or messages."""
    if isinstance(said, str | Mapping):
        return False
    if not isinstance(said, list | tuple | np.ndarray):
        raise TypeError(f"{place} needs completions, texts or messages, got {start_of(said)}")
    roles = [each.get("role") if isinstance(each, Mapping) else None for each in said]
    if ("assistant", "assistant") in pairwise(roles):
        raise ValueError(
            f"{place}: a list of messages is one completion, in which the assistant speaks twice on end; if these are "
            f"several completions, each is a list of its own: {start_of(said)}"
        )
    return not len(said) or roles[0] is None


def _column(row: Mapping[str, Any], name: str | None, wanted: int, many: bool, place: str) -> Any:
    """What a column says of each completion; nothing if there is no such column."""
    if name is None:
        return [None] * wanted
    value = member(row, name, place)
    if not many:
        return [value]
    if not isinstance(value, list | tuple | np.ndarray):
        raise TypeError(f"{place} has a list of completions, and of {name!r}, got {start_of(value)}")
    if len(value) != wanted:
        raise ValueError(f"{place} has {wanted} completions, and as many of {name!r}, got {len(value)}")
    return value


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of these columns in which a row has something."""
    return next((name for name in names if is_given(row.get(name))), None)


def _rollout(said: Any, about: list[Any], place: str) -> Rollout:
    """A completion in any of its forms; what it says about itself goes before what columns say."""
    if isinstance(said, Mapping):
        own = [_first(said, names) for names in _ABOUT]
        about = [value if name is None else said[name] for name, value in zip(own, about, strict=True)]
        words = _first(said, _SAID)
        said = [{name: said[name] for name in said if name not in own}] if "role" in said else said.get(words)
        said = [said] if isinstance(said, Mapping) else said  # a choice of OpenAI's has a message
    tokens, finish, logprob = about
    return Rollout(_completion(said, place), _count(tokens, place), _end(finish, place), _logprob(logprob, place))


def _completion(said: Any, place: str) -> Completion:
    if isinstance(said, str):
        return str(kept(said, place))
    if not isinstance(said, list | tuple | np.ndarray) or not len(said):
        raise TypeError(f"{place}: a completion is a text or a list of messages, got {start_of(said)}")
    return as_messages(said, place)


def _count(tokens: Any, place: str) -> int | None:
    """How many tokens there are, of a number or a list of them."""
    if isinstance(tokens, list | tuple | np.ndarray):
        return len(tokens)
    number = _number(tokens, "a count of tokens", place)
    if math.isnan(number):
        return None
    if number < 0 or not number.is_integer():
        raise ValueError(f"{place}: a count of tokens is a whole number >= 0, got {tokens}")
    return int(number)


def _end(finish: Any, place: str) -> Finish | None:
    reason = finish.get("type") if isinstance(finish, Mapping) else finish
    if not is_given(reason) or reason == "":
        return None
    if reason not in _ENDS:
        raise ValueError(
            f"{place}: a completion ended by itself or was cut ({', '.join(_ENDS)}), and what was broken off otherwise "
            f"is no rollout, got finish {start_of(reason)}"
        )
    return _ENDS[reason]


def _logprob(given: Any, place: str) -> float | None:
    number = _number(given, "a sum of log-probabilities", place)
    if math.isinf(number):
        raise ValueError(f"{place}: a sum of log-probabilities is finite, got {given}")
    return None if math.isnan(number) else number


def _finite(values: Sequence[Any] | np.ndarray, model: str, place: str) -> Float32[np.ndarray, " K"]:
    """Scores as they are ranked; what is missing, nan or too large is an error that names its completion."""
    with np.errstate(over="ignore"):
        scores = np.array([_number(value, "a score", place) for value in values], np.float64).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"{place}: a score is a finite number, {model!r} of completion {i} is {values[i]}")
    return scores


def _number(value: Any, what: str, place: str) -> float:
    """A number, or its text as CSV has it; nan for nothing."""
    if value is None or (isinstance(value, str) and not value):
        return math.nan
    try:
        if isinstance(value, str | int | float | np.generic):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise TypeError(f"{place}: {what} is a number, got {start_of(value)}")


def _loaded(row: Mapping[str, Any], said: Any) -> Any:
    """A completion that this library wrote, which has messages as JSON."""
    return json.loads(said) if row.get("completion_chat") is True and isinstance(said, str) else said


logger = logging.getLogger(__name__)
NOTHING = State([], {})


def adopt(
    directory: RunDirectory,
    found: Iterable[Imported],
    columns: Sequence[str],
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> int:
    """Keep the rollouts of prompts that the directory does not have yet, with their scores of `columns`; how many.

    For who holds the directory. All of them, or none if one is refused; the settings are written before the first.
    """
    with taken_back(directory):
        return _adopted(directory, found, columns, per_shard, settings, show_progress)


def _adopted(
    directory: RunDirectory,
    found: Iterable[Imported],
    columns: Sequence[str],
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool,
) -> int:
    old, ids = {*directory.keys()}, Ids(directory.aliases())
    names, waiting, new, known = directory.free_names(), list[Imported](), 0, 0
    # What is there already has these scores, or will never have them.
    lacking = [
        c for name in directory.names()[:1] for c in columns if c not in (directory.state(name) or NOTHING).scored
    ]
    for item in tqdm(found, desc="rollouts", unit=" prompts", delay=3, disable=None if show_progress else True):
        key = prompt_key(item.prompt)
        ids.add(Asked(item.prompt, item.id), key)
        for column in columns:
            if column not in item.scores:
                raise ValueError(f"each rollout needs its score of {column!r}, got none for {start_of(item.prompt)}")
        if key in old and lacking:
            raise ValueError(
                f"the directory has rollouts of {start_of(item.prompt)} without scores of {lacking[0]!r}: score them "
                "by a reward model, or import into another directory"
            )
        known += key in old
        if key in old:
            continue
        new += 1
        waiting.append(item)
        if len(waiting) == per_shard:
            _keep(directory, names, waiting, columns, settings)
            waiting = []
    if waiting:
        _keep(directory, names, waiting, columns, settings)
    if known:
        logger.warning("%s has rollouts of %d prompts already, and keeps those", directory.path, known)
    directory.add_aliases(ids.new)
    return new


def _keep(
    directory: RunDirectory,
    names: Iterator[str],
    found: list[Imported],
    columns: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Settings and rollouts first: a shard exists from the moment that its prompts do."""
    if directory.settings() != settings:
        directory.write_settings(settings)
    shard = empty(checked([item.prompt for item in found], None))
    keys = [planned.key for planned in shard.prompts]
    name = next(name for name in names if directory.is_free(name, keys))
    # Nobody knows their seeds: what is drawn later gets those of numbers that these do not have.
    shard = shard.drawn([item.rollouts for item in found], [[None] * len(item.rollouts) for item in found])
    for column in columns:
        shard = shard.scored(column, [item.scores[column] for item in found])
    directory.save(name, shard)
    directory.plan(name, list(shard.prompts))
