"""Health of the rollouts behind a table: cut, empty or repeated completions, and a reward for length."""

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from tqdm import tqdm

from calibrated_rewards.calibration.inspect_table import Lines, percent
from calibrated_rewards.calibration.shards import SCORE, decode_text, read_table
from calibrated_rewards.prompts import start_of

# A prompt is odd if this share of its rollouts is.
CUT, REPEATED, EMPTY = 0.5, 0.5, 0.1


class OddPrompt(NamedTuple):
    """A prompt with more cut, empty or repeated rollouts than it should have."""

    share: float
    key: str
    prompt: str
    reason: str


@dataclass(frozen=True)
class RolloutHealth:
    """The result of `rollout_health` on the files of a run.

    Shares are of rollouts: `cut` at the most tokens, of those whose end is known; `empty` of text; `repeated`, word for
    word, from an earlier one of their prompt. `score_length` is, by reward model, the mean over prompts of the
    correlation within a prompt of score and length, in tokens where they are known, else in characters; `varied`
    how many prompts have one, with more lengths and scores than one; `unscored` counts the rollouts that wait for a
    score. `odd_prompts` counts prompts with many of a kind, `odd` are the worst.
    """

    where: str
    prompts: int
    rollouts: int
    cut: float | None
    empty: float
    repeated: float
    tokens_mean: float | None
    score_length: dict[str, float | None]
    varied: dict[str, int]
    unscored: dict[str, int]
    odd_prompts: dict[str, int]
    odd: tuple[OddPrompt, ...]
    starts: dict[str, str] = field(repr=False)
    """The start of the prompts whose keys were given, by key."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields in the types of JSON, without `starts`."""
        fields = {name: value for name, value in asdict(self).items() if name != "starts"}
        return {**fields, "odd": [each._asdict() for each in self.odd]}

    def lines(self) -> Lines:
        """Yield shares, lengths, and the odd prompts."""
        yield "rollouts", f"{self.rollouts:,} of {self.prompts:,} prompts"
        yield "cut", "not known" if self.cut is None else f"{percent(self.cut)} ended for want of tokens"
        yield "empty", percent(self.empty)
        yield "repeated", f"{percent(self.repeated)} are an earlier one of their prompt, word for word"
        yield "tokens", "not known" if self.tokens_mean is None else f"{self.tokens_mean:,.1f} on average"
        for name, r in self.score_length.items():
            over = f"on average of {self.varied[name]:,}" if self.varied[name] < self.prompts else "on average"
            what = "not known" if r is None else f"{r:+.2f} correlation within a prompt, {over}"
            waiting = f"; {self.unscored[name]:,} rollouts have no score" if self.unscored[name] else ""
            yield f"length and {name}", f"{what}{waiting}"
        for reason, count in self.odd_prompts.items():
            yield reason, f"{count:,} prompt{'s' * (count > 1)}"
            for each in self.odd:
                if each.reason == reason:
                    yield "", f"{each.key}: {percent(each.share)}  {each.prompt}"


def rollout_health(directory: Path, most: int = 5, keys: Collection[str] = ()) -> RolloutHealth:
    """Inspect the Parquet files of `directory`, one after the other; `most` odd prompts of each kind are named."""
    tally = _Tally(most, frozenset(keys))
    for path in tqdm(sorted(directory.glob("*.parquet")), desc="rollouts", unit=" files", delay=3, disable=None):
        tally.add(read_table(path))
    return tally.summarise(str(directory))


@dataclass
class _Tally:
    """Counts over the files that were read so far."""

    most: int
    keys: frozenset[str]
    sums: Counter[str] = field(default_factory=Counter)
    correlations: dict[str, tuple[float, int]] = field(default_factory=dict)
    unscored: Counter[str] = field(default_factory=Counter)
    odd_prompts: Counter[str] = field(default_factory=Counter)
    odd: dict[str, list[OddPrompt]] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)

    def add(self, table: Any) -> None:
        """Count a file, in which the rollouts of a prompt are one after the other."""
        if not len(table):
            return
        keys = table.column("key").to_pylist()
        changes = [row for row in range(1, len(keys)) if keys[row] != keys[row - 1]]
        firsts = np.array([0, *changes])
        prompt = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(keys))))
        size = np.bincount(prompt).astype(np.float64)
        finish, tokens = table.column("finish").to_pylist(), _numbers(table, "tokens")
        cut = np.bincount(prompt, [each == "length" for each in finish])
        with_finish = np.bincount(prompt, [each is not None for each in finish])
        empty, repeated, characters = _count_texts(table, prompt)
        self.sums.update(prompts=len(firsts), rollouts=len(keys), cut=int(cut.sum()), known=int(with_finish.sum()))
        self.sums.update(empty=int(empty.sum()), repeated=int(repeated.sum()))
        self.sums.update(tokens=int(np.nansum(tokens)), counted=int(np.isfinite(tokens).sum()))
        lengths = characters if np.isnan(tokens).any() else tokens
        for name in (each for each in table.column_names if each.startswith(SCORE)):
            self._score(name.removeprefix(SCORE), _numbers(table, name), lengths, prompt)
        for reason, share, least in (
            ("mostly cut", cut / np.maximum(with_finish, 1), CUT),
            ("often empty", empty / size, EMPTY),
            ("mostly repeated", repeated / size, REPEATED),
        ):
            self._note(table, firsts, reason, share, least)
        for first in firsts[[keys[first].hex() in self.keys for first in firsts]]:
            self.starts[keys[first].hex()] = _start(table, int(first))

    def _note(
        self, table: Any, firsts: Int64[np.ndarray, " p"], reason: str, share: Float64[np.ndarray, " p"], least: float
    ) -> None:
        odd = np.flatnonzero(share >= least)
        if not len(odd):
            return
        self.odd_prompts[reason] += len(odd)
        worst = odd[np.argsort(-share[odd], kind="stable")][: self.most]
        places = [(float(share[at]), int(firsts[at])) for at in worst]
        prompts = [OddPrompt(s, table.column("key")[at].as_py().hex(), _start(table, at), reason) for s, at in places]
        self.odd[reason] = nlargest(self.most, [*self.odd.get(reason, []), *prompts], key=lambda each: each.share)

    def _score(
        self,
        name: str,
        scores: Float64[np.ndarray, " r"],
        lengths: Float64[np.ndarray, " r"],
        prompt: Int64[np.ndarray, " r"],
    ) -> None:
        """Add Pearson's correlation of score and length, of each prompt that has one."""
        there = np.isfinite(scores)
        self.unscored[name] += int((~there).sum())
        at = prompt[there]
        count = np.maximum(np.bincount(at), 1)
        x, y = (z - (np.bincount(at, z) / count)[at] for z in (scores[there], lengths[there]))
        xx, yy, xy = (np.bincount(at, z) for z in (x * x, y * y, x * y))
        some = (count >= 3) & (xx > 0) & (yy > 0)
        total, prompts = self.correlations.get(name, (0.0, 0))
        r = xy[some] / np.sqrt(xx[some] * yy[some])
        self.correlations[name] = (total + float(r.sum()), prompts + len(r))

    def summarise(self, where: str) -> RolloutHealth:
        """Return the counts as shares."""
        of = self.sums
        rollouts = max(of["rollouts"], 1)
        return RolloutHealth(
            where=where,
            prompts=of["prompts"],
            rollouts=of["rollouts"],
            cut=of["cut"] / of["known"] if of["known"] else None,
            empty=of["empty"] / rollouts,
            repeated=of["repeated"] / rollouts,
            tokens_mean=of["tokens"] / of["counted"] if of["counted"] else None,
            score_length={name: total / n if n else None for name, (total, n) in self.correlations.items()},
            varied={name: n for name, (_, n) in self.correlations.items()},
            unscored=dict(self.unscored),
            odd_prompts=dict(self.odd_prompts),
            odd=tuple(each for prompts in self.odd.values() for each in prompts),
            starts=self.starts,
        )


def _numbers(table: Any, name: str) -> Float64[np.ndarray, " r"]:
    """Read a column as float64, nan where there is none."""
    return np.asarray(table.column(name).to_numpy(), np.float64)


def _count_texts(
    table: Any, prompt: Int64[np.ndarray, " r"]
) -> tuple[Float64[np.ndarray, " p"], Int64[np.ndarray, " p"], Float64[np.ndarray, " r"]]:
    """Count each prompt's empty and repeated completions, and return the length of each completion."""
    encoded = table.column("completion").combine_chunks().dictionary_encode()
    texts, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
    chat = table.column("completion_chat").to_numpy()
    nothing = np.array([not text.strip() for text in texts])[codes]
    short = np.array([len(text) <= 200 for text in texts])[codes]
    for row in np.flatnonzero(chat & short):  # longer messages say something
        nothing[row] = not any(_has_content(message) for message in decode_text(texts[codes[row]], True))
    distinct = np.unique(prompt * len(texts) + codes) // len(texts)
    lengths = np.array([len(text) for text in texts], np.float64)[codes]
    return np.bincount(prompt, nothing), np.bincount(prompt) - np.bincount(distinct), lengths


def _has_content(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def _start(table: Any, row: int) -> str:
    prompt = decode_text(table.column("prompt")[row].as_py(), table.column("chat")[row].as_py())
    return start_of(prompt)
