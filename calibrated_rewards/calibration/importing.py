"""Import rollouts made elsewhere: read a row a prompt or a row a completion, and keep them as shards of a run."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from calibrated_rewards.calibration.run import Ids, plan_prompts, show_bar, undo_on_error
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import SCORE, new_shard
from calibrated_rewards.calibration.sources import (
    Asked,
    Row,
    get_column,
    has_value,
    parse_messages,
    parse_row,
    read_rows,
    to_json,
)
from calibrated_rewards.prompts import Prompt, prompt_key, start_of
from calibrated_rewards.samplers.protocol import Finish, Rollout

logger = logging.getLogger(__name__)

_COMPLETIONS = ("completions", "completion")
# The columns of a Rollout's tokens, finish and logprob, or the members of a completion that is a mapping.
_DETAILS = (("tokens", "token_ids"), ("finish", "finish_reason"), ("logprob", "cumulative_logprob"))
_FINISHES: dict[str, Finish] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls"), "stop"),
    **dict.fromkeys(("length", "max_tokens"), "length"),
}


class Imported(NamedTuple):
    """A prompt with the rollouts that it has, and for each reward model a score of each."""

    prompt: Prompt
    id: Any
    rollouts: list[Rollout]
    scores: dict[str, Float32[np.ndarray, " K"]]


def read_rollouts(
    source: Any,
    *,
    prompt: str | None = None,
    completions: str | None = None,
    scores: str | Mapping[str, str] | None = None,
    id_column: str | None = None,
    split: str | None = None,
) -> Iterator[Imported]:
    """Read the prompts of a source with all their rollouts and scores, each prompt once.

    A source is anything that `read_rows` takes. A row has the list of a prompt's completions, or one of them; so have
    its columns of scores (`scores` is a column's name, or a mapping of a reward model's name to its column; by default
    each column `score:NAME`), of `tokens` (how many, or which), `finish` or `finish_reason`, and `logprob`. A
    completion is a text, a list of messages, or a mapping with `text`, `content` or `message` and the like of those
    columns. Rows of one prompt need not lie together.

    The source is read twice, to know which row is a prompt's last. In memory is a count for each prompt, and the
    rollouts of those that wait for a row: of one prompt if its rows lie together. An iterator is held whole.

    >>> rows = [{"prompt": "2+2=", "completion": text, "reward": r} for text, r in (("4", 1.0), ("5", 0.0))]
    >>> for item in read_rollouts(rows, scores="reward"):
    ...     print(item.prompt, [rollout.completion for rollout in item.rollouts], item.scores["reward"])
    2+2= ['4', '5'] [1. 0.]
    """
    again = [*source] if isinstance(source, Iterator) else source
    by_name = {scores: scores} if isinstance(scores, str) else scores
    rows = read_rows(again, split)  # at once: a source that cannot be opened is an error of this call
    return _gather(rows, again, split, _Reader(prompt, completions, by_name, id_column))


class _Reader(NamedTuple):
    """The columns of a source, and how a row's completions and scores are read from them."""

    prompt: str | None
    completions: str | None
    scores: Mapping[str, str] | None
    id_column: str | None

    def read_prompt(self, row: Row) -> Asked:
        """Read the prompt and id of a row."""
        if not isinstance(row.value, Mapping):
            raise TypeError(f"{row.place} needs columns, a prompt and completions, got {start_of(row.value)}")
        return parse_row(row, self.prompt, self.id_column)

    def read(self, row: Row, asked: Asked) -> Imported:
        """Read the rollouts and scores of one row."""
        place, columns = f"{row.place}, prompt {start_of(asked.prompt)}", row.value
        name = self.completions or next((name for name in _COMPLETIONS if name in columns), _COMPLETIONS[0])
        value = get_column(columns, name, place)
        if columns.get("completion_chat") is True and isinstance(value, str):
            value = json.loads(value)  # a file of this library has messages as JSON
        many = _is_list_of_completions(value, place)
        completions = value if many else [value]
        count = len(completions)
        if not count:
            raise ValueError(f"{place} needs a completion, got none")
        details = [_read_column(columns, _first_with_value(columns, names), count, many, place) for names in _DETAILS]
        rollouts = [_parse_rollout(*each, place=place) for each in zip(completions, *details, strict=True)]
        by_name = self.scores
        if by_name is None:
            by_name = {name.removeprefix(SCORE): name for name in map(str, columns) if name.startswith(SCORE)}
        scores = {
            model: _parse_scores(_read_column(columns, column, count, many, place), model, place)
            for model, column in by_name.items()
        }
        return Imported(*asked, rollouts, scores)


def _gather(rows: Iterator[Row], source: Any, split: str | None, reader: _Reader) -> Iterator[Imported]:
    """Join the rows of each prompt: count them in a first reading, collect them in a second."""
    counting = show_bar(rows, "counting rollouts", " rows")
    left = Counter(prompt_key(reader.read_prompt(row).prompt) for row in counting)
    waiting: dict[bytes, list[Imported]] = {}
    models: set[str] | None = None
    for row in read_rows(source, split):
        asked = reader.read_prompt(row)
        key, item = prompt_key(asked.prompt), reader.read(row, asked)
        models = {*item.scores} if models is None else models
        if models != {*item.scores}:
            raise ValueError(f"{row.place}: all rows have the same scores, {sorted(models)}, got {sorted(item.scores)}")
        waiting.setdefault(key, []).append(item)
        left[key] -= 1
        if left[key] == 0:
            parts = waiting.pop(key)
            ids = {part.id for part in parts} - {None}
            if len(ids) > 1:
                prompt = start_of(asked.prompt)
                raise ValueError(f"{row.place}: a prompt has one id, {prompt} got {len(ids)}: {start_of(ids)}")
            scores = {model: np.concatenate([part.scores[model] for part in parts]) for model in parts[0].scores}
            rollouts = [rollout for part in parts for rollout in part.rollouts]
            yield Imported(parts[0].prompt, next(iter(ids), None), rollouts, scores)
    if any(left.values()):
        raise ValueError(f"{start_of(source)} gave other rows when it was read again: give what stays, or an iterator")


def _is_list_of_completions(value: Any, place: str) -> bool:
    """Tell a list of completions from one completion: a text, a mapping, or messages."""
    if isinstance(value, str | Mapping):
        return False
    if not isinstance(value, list | tuple | np.ndarray):
        raise TypeError(f"{place} needs completions, texts or messages, got {start_of(value)}")
    roles = [each.get("role") if isinstance(each, Mapping) else None for each in value]
    if ("assistant", "assistant") in pairwise(roles):
        raise ValueError(
            f"{place}: a list of messages is one completion, in which the assistant speaks twice on end; if these are "
            f"several completions, each is a list of its own: {start_of(value)}"
        )
    return not len(value) or roles[0] is None


def _read_column(row: Mapping[str, Any], name: str | None, count: int, many: bool, place: str) -> Any:
    """Read a column's value for each completion of a row; Nones if there is no such column."""
    if name is None:
        return [None] * count
    value = get_column(row, name, place)
    if not many:
        return [value]
    if not isinstance(value, list | tuple | np.ndarray):
        raise TypeError(f"{place} has a list of completions, and of {name!r}, got {start_of(value)}")
    if len(value) != count:
        raise ValueError(f"{place} has {count} completions, and as many of {name!r}, got {len(value)}")
    return value


def _first_with_value(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if has_value(row.get(name))), None)


def _parse_rollout(completion: Any, *details: Any, place: str) -> Rollout:
    """Read a completion in any of its forms; details within it go before those of the row's columns."""
    if isinstance(completion, Mapping):
        names = [_first_with_value(completion, each) for each in _DETAILS]
        details = tuple(value if name is None else completion[name] for name, value in zip(names, details, strict=True))
        if "role" in completion:
            completion = [{name: completion[name] for name in completion if name not in names}]
        else:
            completion = completion.get(_first_with_value(completion, ("text", "content", "message")))
        if isinstance(completion, Mapping):
            completion = [completion]  # a choice of OpenAI's has a message
    if isinstance(completion, str):
        completion = str(to_json(completion, place))
    elif not isinstance(completion, list | tuple | np.ndarray) or len(completion) == 0:
        raise TypeError(f"{place}: a completion is a text or a list of messages, got {start_of(completion)}")
    else:
        completion = parse_messages(completion, place)
    tokens, finish, logprob = details
    is_list = isinstance(tokens, list | tuple | np.ndarray)
    count = float(len(tokens)) if is_list else _parse_number(tokens, "a count of tokens", place)
    if not math.isnan(count) and (count < 0 or not count.is_integer()):
        raise ValueError(f"{place}: a count of tokens is a whole number >= 0, got {tokens}")
    reason: Any = finish.get("type") if isinstance(finish, Mapping) else finish
    ended = has_value(reason) and reason != ""
    if ended and reason not in _FINISHES:
        raise ValueError(
            f"{place}: a completion ended by itself or was cut ({', '.join(_FINISHES)}), and what was broken off "
            f"otherwise is no rollout, got finish {start_of(reason)}"
        )
    total = _parse_number(logprob, "a sum of log-probabilities", place)
    if math.isinf(total):
        raise ValueError(f"{place}: a sum of log-probabilities is finite, got {logprob}")
    return Rollout(
        completion,
        None if math.isnan(count) else int(count),
        _FINISHES[reason] if ended else None,
        None if math.isnan(total) else total,
    )


def _parse_scores(values: Sequence[Any] | np.ndarray, model: str, place: str) -> Float32[np.ndarray, " K"]:
    """Convert scores to float32, as they are ranked; name the completion of one that is missing or not finite."""
    with np.errstate(over="ignore"):
        scores = np.array([_parse_number(value, "a score", place) for value in values], np.float64).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        i = int(bad[0])
        raise ValueError(f"{place}: a score is a finite number, {model!r} of completion {i} is {values[i]}")
    return scores


def _parse_number(value: Any, what: str, place: str) -> float:
    """Read a number, or its text as CSV has it; nan for nothing."""
    if value is None or (isinstance(value, str) and not value):
        return math.nan
    try:
        if isinstance(value, str | int | float | np.generic):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise TypeError(f"{place}: {what} is a number, got {start_of(value)}")


def add_imported(
    directory: RunDirectory,
    items: Iterable[Imported],
    columns: Sequence[str],
    per_shard: int,
    settings: Mapping[str, Any],
    show_progress: bool = True,
) -> int:
    """Add the rollouts of new prompts to a locked directory, with their scores of `columns`; count the new prompts.

    All are added, or none if one is refused. The settings are written before the first.
    """
    old, ids = {*directory.keys()}, Ids(directory.aliases())
    names, waiting, new, known = directory.free_names(), list[Imported](), 0, 0
    # Prompts of the directory have these scores already, or will never have them.
    scored = [{} if (state := directory.state(name)) is None else state.scored for name in directory.names()[:1]]
    lacking = [column for counts in scored for column in columns if column not in counts]
    with undo_on_error(directory):
        for item in show_bar(items, "rollouts", " prompts", show_progress):
            key = prompt_key(item.prompt)
            ids.add(Asked(item.prompt, item.id), key)
            for column in columns:
                if column not in item.scores:
                    raise ValueError(
                        f"each rollout needs its score of {column!r}, got none for {start_of(item.prompt)}"
                    )
            if key in old and lacking:
                raise ValueError(
                    f"the directory has rollouts of {start_of(item.prompt)} without scores of {lacking[0]!r}: score "
                    "them by a reward model, or import into another directory"
                )
            known += key in old
            if key in old:
                continue
            new += 1
            waiting.append(item)
            if len(waiting) == per_shard:
                _save_shard(directory, names, waiting, columns, settings)
                waiting = []
        if waiting:
            _save_shard(directory, names, waiting, columns, settings)
        if known:
            logger.warning("%s has rollouts of %d prompts already, and keeps those", directory.path, known)
        directory.add_aliases(ids.new)
    return new


def _save_shard(
    directory: RunDirectory,
    names: Iterator[str],
    items: list[Imported],
    columns: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write settings and rollouts before the prompts: a shard exists from the moment that its prompts do."""
    if directory.settings() != settings:
        directory.write_settings(settings)
    shard = new_shard(plan_prompts([item.prompt for item in items], None))
    keys = [planned.key for planned in shard.prompts]
    name = next(name for name in names if directory.is_free(name, keys))
    # Their seeds are unknown: rollouts that are drawn later get the seeds of numbers that these do not have.
    shard = shard.add_rollouts([item.rollouts for item in items], [[None] * len(item.rollouts) for item in items])
    for column in columns:
        shard = shard.add_scores(column, [item.scores[column] for item in items])
    directory.save(name, shard)
    directory.write_prompts(name, list(shard.prompts))
