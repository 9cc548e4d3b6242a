"""OnTheSpot: calibrate unseen prompts when they come, with the rollouts and scores that `calibrate` would give.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> spot = OnTheSpot(None, NumberSampler(), NumberScorer(), k=4, seed=0)
>>> spot(["2+2=", "Hello"])
ReferenceTable(2 prompts, 8 references, in memory)
"""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from calibrated_rewards.calibration.shards import Planned, new_shard
from calibrated_rewards.calibration.work import Task, Work
from calibrated_rewards.prompts import Prompt, prompt_key
from calibrated_rewards.samplers.protocol import Particular, Sampler
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.scorers.protocol import Scorer, check_prompts, fingerprint
from calibrated_rewards.table.reference_table import ReferenceTable, Row


@dataclass(frozen=True, eq=False)
class OnTheSpot:
    """A function from prompts to a table of them: the rows of `known`, and rows that are drawn now for all others.

    Rows that are drawn are cached, and are the same whenever and wherever they are drawn, as far as the sampler
    promises that. It is thread-safe: a prompt is drawn once, and only the callers who need it wait for it. A pickled
    copy has an empty cache.
    """

    known: ReferenceTable | None
    """The table of the prompts that are calibrated already. One of another reward model or sampler is refused."""
    sampler: Sampler
    scorer: Scorer
    k: int | None = None
    """Rollouts of a prompt; None for as many as the rows of `known` have, in the median."""
    seed: int | None = None
    """None for that of `known`."""
    _drawn: dict[bytes, "Future[Row]"] = field(default_factory=dict, init=False, repr=False)
    _kinds: dict[str, set[str]] = field(default_factory=dict, init=False, repr=False)
    """The forms, text or messages, of the prompts and completions that were drawn."""
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        meta = {} if self.known is None else self.known.meta
        if self.known is not None and self.k is None:
            object.__setattr__(self, "k", int(np.median(self.known.counts(np.arange(len(self.known))))))
        if self.seed is None:
            object.__setattr__(self, "seed", meta.get("seed"))
        for name, value in (("k", self.k), ("seed", self.seed)):
            if not isinstance(value, int) or isinstance(value, bool) or (name == "k" and value < 1):
                least = " >= 1" if name == "k" else ""
                raise ValueError(f"OnTheSpot needs a whole {name}{least}, or a table that has one, got {value!r}")
        for name, part in (("scorer", self.scorer), ("sampler", self.sampler)):
            there, here = meta.get(name), json.loads(json.dumps(fingerprint(part)))
            if there is not None and (apart := [each.place for each in differences(there, here)]):
                raise ValueError(f"the table was made with another {name}: it differs in {', '.join(apart)}")

    def __call__(self, prompts: Sequence[Prompt]) -> ReferenceTable:
        """Return the table of these prompts, drawn first where need be."""
        by_key = {prompt_key(prompt): prompt for prompt in prompts}
        return ReferenceTable.build(self._rows(by_key), meta=self._meta())

    def merged(self) -> ReferenceTable:
        """Return the table of all prompts, those of `known` and those drawn since, to be saved."""
        rows = [future.result() for future in list(self._drawn.values()) if future.done() and not future.exception()]
        tables = [] if self.known is None else [self.known]
        if rows:
            tables.append(ReferenceTable.build(rows, meta=self._meta()))
        if not tables:
            raise ValueError("there is nothing to merge: no table was given, and no prompt was drawn")
        return tables[0].merge(*tables[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _drawn={}, _kinds={}, _lock=threading.Lock())

    def _rows(self, prompts: dict[bytes, Prompt]) -> list[Row]:
        known_rows = self._find_known(prompts)
        with self._lock:
            new = [key for key in prompts if key not in known_rows and key not in self._drawn]
            mine: dict[bytes, Future[Row]] = {key: Future() for key in new}
            self._drawn.update(mine)
        waiting = {key: self._drawn[key] for key in prompts if key not in known_rows}
        if mine:
            self._draw({key: prompts[key] for key in mine}, mine)
        return [*known_rows.values(), *(future.result() for future in waiting.values())]

    def _find_known(self, prompts: dict[bytes, Prompt]) -> dict[bytes, Row]:
        if self.known is None or not prompts:
            return {}
        rows = self.known.find(list(prompts.values()))
        places = zip(prompts.items(), rows.tolist(), strict=True)
        return {key: Row(prompt, self.known.scores(row)) for (key, prompt), row in places if row >= 0}

    def _draw(self, prompts: dict[bytes, Prompt], mine: dict[bytes, "Future[Row]"]) -> None:
        """Draw prompts and set the results, or the error, that others wait for; after an error the next call tries."""
        try:
            rows = self._sample(prompts)
        except BaseException as error:
            with self._lock:
                for key in mine:
                    del self._drawn[key]
            for future in mine.values():
                future.set_exception(error)
            raise
        for key, row in rows.items():
            mine[key].set_result(row)

    def _sample(self, prompts: dict[bytes, Prompt]) -> dict[bytes, Row]:
        """Draw and score prompts by the same work that `calibrate` does."""
        if isinstance(self.sampler, Particular):
            self.sampler.check(list(prompts.values()))
        check_prompts(self.scorer, list(prompts.values()))
        planned = [Planned(key, prompt) for key, prompt in prompts.items()]
        work = Work(self.sampler, {"reward": self.scorer}, int(self.seed or 0))
        shard = work(Task("", new_shard(planned), [int(self.k or 0)] * len(planned))).shard
        drawn = [rollout.completion for rollouts in shard.rollouts for rollout in rollouts]
        for what, values in (("prompts", [*prompts.values()]), ("completions", drawn)):
            kinds = {"text" if isinstance(value, str) else "messages" for value in values}
            self._kinds.setdefault(what, set()).update(kinds)
        return {
            key: Row(prompt, scores)
            for (key, prompt), scores in zip(prompts.items(), shard.scores["reward"], strict=True)
        }

    def _meta(self) -> dict[str, Any]:
        """Return the meta of the known table, or the one that `calibrate` would write."""
        if self.known is not None:
            return self.known.meta
        form = {what: "both" if len(kinds) > 1 else min(kinds) for what, kinds in self._kinds.items() if kinds}
        return {
            "scorer": fingerprint(self.scorer),
            "sampler": fingerprint(self.sampler),
            "seed": self.seed,
            "form": form,
        }
