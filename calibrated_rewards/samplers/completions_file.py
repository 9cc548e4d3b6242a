"""Write the completions of a policy to a JSONL file, a line each, as they are drawn; a stopped run goes on.

The completions of a prompt depend on the seed and the prompt alone, and prompts are taken in groups that begin at the
same places, so a run that was killed and called again writes the same bytes as one that was not.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from calibrated_rewards.files import claim, write_file
from calibrated_rewards.prompts import Prompt, prompt_key, start_of
from calibrated_rewards.samplers.protocol import PATIENCE, Particular, Rollout, Sampler, sample, seeds_of
from calibrated_rewards.samplers.reranking import Choice, Reranked
from calibrated_rewards.scorers.differences import Difference, differences
from calibrated_rewards.scorers.protocol import fingerprint, to_plain

# Beside the completions: how they were drawn, which a run that goes on compares with its own.
SETTINGS = ".run.json"


@dataclass(frozen=True)
class Written:
    """A file of completions: what it holds, and what of that was there before."""

    path: Path
    prompts: int
    completions: int
    before: int
    """Completions that an earlier call had written."""
    mean_score: float | None = None
    """The mean score of all chosen completions; None where none has a score."""
    draws: int = 0
    """Completions that were drawn for those in the file, the rejected ones included."""


def write_completions(
    out: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    sampler: Sampler,
    *,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
    samples: int = 1,
    candidates: bool = False,
    prompts_at_once: int = 32,
    show_progress: bool = True,
) -> Written:
    """Write `samples` completions of each prompt to a JSONL file; of a `Reranked` sampler, with their scores.

    A line is {"prompt", "number", "completion", "tokens", "finish"}, with the prompt's "id" where there are ids, and
    for a `Reranked` sampler with "score" and "draws"; `candidates=True` adds all candidates with their scores. The
    second time that a prompt occurs it gets further completions, not the same ones. A call that was stopped goes on
    when it is made again with the same settings; a file of other prompts, seeds or models is refused.
    """
    path, prompts = Path(out), list(prompts)
    for name, count in {"samples": samples, "prompts_at_once": prompts_at_once}.items():
        if count < 1:
            raise ValueError(f"write_completions needs {name} >= 1, got {name}={count}")
    if not prompts:
        raise ValueError("write_completions needs prompts, got none")
    if ids is not None and len(ids) != len(prompts):
        raise ValueError(f"each prompt needs its id, got {len(prompts)} prompts and {len(ids)} ids")
    if isinstance(sampler, Particular):
        sampler.check(prompts)
    settings = {
        "seed": seed,
        "samples": samples,
        "candidates": candidates,
        "prompts_at_once": prompts_at_once,
        "sampler": json.loads(json.dumps(fingerprint(sampler))),
    }
    _claim_settings(path, settings)
    tasks = list(_tasks(prompts, seed, samples))
    with claim(_settings_of(path)) as mine:
        if not mine or _find_difference(_settings_of(path), settings):
            raise ValueError(_busy(path))
        with open(path, "ab+") as file:
            before = _find_end(file, path, prompts, ids, samples, samples * prompts_at_once)
            groups = range(before // samples, len(prompts), prompts_at_once)
            shown = None if show_progress else True
            bar = tqdm(
                total=len(prompts), initial=before // samples, desc="generating", unit=" prompts",
                delay=PATIENCE, leave=False, disable=shown,
            )  # fmt: skip
            with bar:
                for start in groups:
                    group = range(start, min(start + prompts_at_once, len(prompts)))
                    lines = _complete(sampler, [tasks[i] for i in group], [ids[i] for i in group] if ids else None)
                    for line in lines:
                        if not candidates:
                            line.pop("candidates", None)
                        file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                    bar.update(len(group))
            return _summarize(file, path, len(prompts), before)


@dataclass(frozen=True)
class _Task:
    prompt: Prompt
    first: int
    """The number of its first completion: higher for a prompt that occurred before."""
    seeds: list[int]


def _tasks(prompts: Sequence[Prompt], seed: int, samples: int) -> Iterator[_Task]:
    """Give each prompt the seeds of its completions; a repeated prompt gets those that follow."""
    counts: Counter[bytes] = Counter()
    for prompt in prompts:
        key = prompt_key(prompt)
        first = samples * counts[key]
        counts[key] += 1
        yield _Task(prompt, first, seeds_of(seed, key, first, first + samples))


def _complete(sampler: Sampler, tasks: Sequence[_Task], ids: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Draw the completions of some prompts, and make a line of each."""
    prompts, seeds = [task.prompt for task in tasks], [task.seeds for task in tasks]
    if isinstance(sampler, Reranked):
        lines = [[_describe_choice(each) for each in own] for own in sampler.choose(prompts, seeds)]
    else:
        lines = [[_describe(each) for each in own] for own in sample(sampler, prompts, seeds)]
    heads = [
        [
            {"prompt": to_plain(task.prompt), **({"id": ids[at]} if ids else {}), "number": task.first + i}
            for i in range(len(own))
        ]
        for at, (task, own) in enumerate(zip(tasks, lines, strict=True))
    ]
    return [{**head, **line} for pair in zip(heads, lines, strict=True) for head, line in zip(*pair, strict=True)]


def _describe(drawn: Rollout) -> dict[str, Any]:
    return {"completion": to_plain(drawn.completion), "tokens": drawn.tokens, "finish": drawn.finish}


def _describe_choice(drawn: Choice) -> dict[str, Any]:
    """Write a completion that was chosen, with its score and its candidates."""
    scores = [_shortest(value) for value in drawn.scores]
    candidates = [
        {"completion": to_plain(each.completion), "score": value}
        for each, value in zip(drawn.candidates, scores, strict=True)
    ]
    chosen = {"score": scores[drawn.index], "draws": len(scores), "chosen": drawn.index, "candidates": candidates}
    return {**_describe(drawn.rollout), **chosen}


def _shortest(value: float) -> float:
    """Return the shortest number that is this one in float32, in which scores are: 0.7, not 0.699999988."""
    return float(str(np.float32(value)))


def _settings_of(path: Path) -> Path:
    return path.with_name(path.name + SETTINGS)


def _claim_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write how the completions are drawn; refuse a file whose completions were drawn in another way."""
    place, empty = _settings_of(path), not path.exists() or not path.stat().st_size
    if not place.exists():
        if not empty:
            raise ValueError(f"{path} is there, and no {place.name} beside it says how it was made: name another file")
        write_file(place, json.dumps(settings, indent=2) + "\n")
        return
    difference = _find_difference(place, settings)
    if difference is None:
        return
    if not empty:
        raise ValueError(
            f"{path} was begun with {difference.place} {difference.there!r:.80}, got {difference.here!r:.80}: name "
            "another file, or make the call that began it"
        )
    with claim(place) as mine:  # a call that failed before its first completion holds nobody up
        if not mine:
            raise ValueError(_busy(path))
        write_file(place, json.dumps(settings, indent=2) + "\n")


def _find_difference(place: Path, settings: dict[str, Any]) -> Difference | None:
    return next(iter(differences(json.loads(place.read_text("utf-8")), settings)), None)


def _busy(path: Path) -> str:
    return f"{path} is being written by another process: wait for it, or name another file"


def _find_end(
    file: BinaryIO, path: Path, prompts: Sequence[Prompt], ids: Sequence[Any] | None, samples: int, per_group: int
) -> int:
    """Count the whole lines of a file, check that they are of these prompts, and cut off a group that is not whole."""
    file.seek(0)
    ends = [0]
    for number, line in enumerate(file):
        if not line.endswith(b"\n"):
            break
        if number == samples * len(prompts):
            raise ValueError(
                f"{path} has completions of more prompts than the {len(prompts)} of this call, which would be lost: "
                "give all prompts, or name another file"
            )
        row = json.loads(line)
        at = number // samples
        if prompt_key(row["prompt"]) != prompt_key(prompts[at]) or (ids is not None and row.get("id") != ids[at]):
            raise ValueError(
                f"{path}, line {number + 1} is of the prompt {start_of(row['prompt'])}, in its place the prompts now "
                f"have {start_of(prompts[at])}: name another file"
            )
        ends.append(ends[-1] + len(line))
    whole = len(ends) - 1
    if whole < samples * len(prompts):
        # What a group's completions are beside may round them in 16 bits: a group is drawn again as a whole.
        whole -= whole % per_group
    file.truncate(ends[whole])
    file.seek(ends[whole])
    return whole


def _summarize(file: BinaryIO, path: Path, prompts: int, before: int) -> Written:
    """Read the file once more for its totals."""
    file.seek(0)
    rows = [json.loads(line) for line in file]
    scores = [row["score"] for row in rows if "score" in row]
    mean = float(np.mean(scores)) if scores else None
    return Written(path, prompts, len(rows), before, mean, sum(row.get("draws", 1) for row in rows))
