"""The settings of a calibrated reward: each error names the setting, the rule, and what came.

Name a reward for a trainer's log: its transform, its reward model, and the settings that change its numbers.

CalibratedReward: a reward model, the table of its reference scores, and a transform, as one reward for any trainer.

>>> from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
>>> from calibrated_rewards.testing.suites import NumberScorer
>>> table = ReferenceTable.build([("2+2=", [1.0, 2.0, 3.0, 5.0])])
>>> reward = CalibratedReward(NumberScorer(), table)
>>> reward(["2+2=", "2+2="], ["It is 4", "It is 5"])
[0.75, 0.875]
>>> CalibratedReward(NumberScorer(), table, Exponential(5.0))(["2+2="], ["4"])
[0.281...]
>>> reward.from_scores(["2+2="], np.array([[0.0, 2.5, 9.0]]))
array([[0. , 0.5, 1. ]])
"""

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from math import isfinite
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float32, Float64, Int64

from calibrated_rewards.prompts import Completion, UnknownPromptError
from calibrated_rewards.reward.batching import Coalescer
from calibrated_rewards.reward.calibrators import Calibration, EmpiricalCDF
from calibrated_rewards.reward.find_prompts import (
    Located,
    Reading,
    hint,
    ids_in,
    keys_of,
    located,
    rows_of,
    split_texts,
)
from calibrated_rewards.reward.lookup import OnMissing, Valuing
from calibrated_rewards.reward.monitoring import Alarm, EndingsWatch, first_ones, measures, without
from calibrated_rewards.reward.originals import Originals, of_run
from calibrated_rewards.reward.raw_scores import RawScores, are_rows, are_tensor
from calibrated_rewards.reward.scores import Score, Scores
from calibrated_rewards.reward.verification import Form, Verification, verified
from calibrated_rewards.scorers.lazy import Loaded
from calibrated_rewards.scorers.protocol import Scorer, fingerprint, is_thread_safe, paired, score
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.optimum import Optimal
from calibrated_rewards.theory.transforms import Affine, Chain, Identity, Scale, Transform, scaled

MISSING = ("raise", "neutral", "skip")


def check(reward: Any) -> None:
    """TypeError or ValueError for what makes no sense, before anything is scored."""
    if not isinstance(reward.table, ReferenceTable):
        _refuse("table", "a ReferenceTable", reward.table)
    if reward.scorer is not None and not callable(reward.scorer):
        _refuse("scorer", "called with prompts and completions", reward.scorer)
    if not callable(reward.transform):
        _refuse("transform", "called with quantiles, as Exponential(10.0) is", reward.transform)
    if not callable(reward.calibration):
        _refuse("calibration", "called, as EmpiricalCDF() is", reward.calibration)
    if not callable(reward.on_missing) and reward.on_missing not in MISSING:
        raise ValueError(f"on_missing is one of {MISSING} or a function, got {reward.on_missing!r:.80}")
    for name in ("name", "id_column"):
        if not isinstance(getattr(reward, name), str | None):
            _refuse(name, "a text or None", getattr(reward, name))
    if isinstance(reward.endings, str) or not all(isinstance(ending, str) for ending in reward.endings):
        _refuse("endings", "a tuple of texts", reward.endings)
    _check_numbers(reward.batch_size, reward.beta)


def _check_numbers(batch_size: Any, beta: Any) -> None:
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"CalibratedReward needs a whole batch_size >= 1, or None, got batch_size={batch_size!r}")
    if beta is not None and not (isinstance(beta, int | float) and isfinite(beta) and beta > 0):
        raise ValueError(f"CalibratedReward needs a finite beta > 0, or None, got beta={beta!r}")


def _refuse(setting: str, rule: str, got: Any) -> NoReturn:
    raise TypeError(f"CalibratedReward: {setting} is {rule}, got {got!r:.80}")


LONGEST, KEPT = 60, 40


def named(transform: Transform, scorer: Scorer | None, **settings: tuple[Any, Any]) -> str:
    """A name that is as good as an identifier: of many words the first ones, and a digest of all.

    `settings` are pairs of a value and its default: what differs from its default is part of the name, since TRL logs
    rewards of one name under one key.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> from calibrated_rewards.testing.suites import NumberScorer
    >>> from calibrated_rewards.theory.transforms import Exponential
    >>> named(Exponential(-10.0), NumberScorer())
    'calibrated_Exponential_t_minus_10_0_number'
    >>> named(Optimal(BestOf(4), beta=0.1), NumberScorer())
    'calibrated_optimal_BestOf_n_4_number'
    >>> named(Exponential(5.0), NumberScorer(), estimator=("unbiased", "empirical"), scale=("unit", "unit"))
    'calibrated_Exponential_t_5_0_number_estimator_unbiased'
    """
    changed = [
        f"{name} {value if isinstance(value, str) else repr(value)}"
        for name, (value, default) in settings.items()
        if value != default
    ]
    words = " ".join(["calibrated", _said(transform), _scorer_name(scorer), *changed])
    name = re.sub(r"\W+", "_", re.sub(r"-(?=\d)", "minus ", words)).strip("_")
    return name if len(name) <= LONGEST else f"{name[:KEPT]}_{blake2b(words.encode(), digest_size=4).hexdigest()}"


def _said(transform: Transform) -> str:
    """Its repr; of the optimal transform, the question; without a change of scale."""
    match transform:
        case Chain(parts=(*head, Affine())) if head:
            return " ".join(map(_said, head))
        case Optimal(procedure=procedure):
            return f"optimal {procedure!r}"
    return repr(transform)


def _scorer_name(scorer: Scorer | None) -> str:
    if isinstance(scorer, Loaded):
        return os.path.basename(os.path.normpath(scorer.recipe.name))
    return str(fingerprint(scorer).get("kind", "")) if scorer is not None else ""


Directory = str | os.PathLike[str]
# Beside transform and scorer, what changes the numbers that a reward gives, and so its name.
NAMED_SETTINGS = ("estimator", "scale", "calibration")


@dataclass(frozen=True, eq=False)
class CalibratedReward:
    """Called with prompts and completions it gives their rewards, as TRL's trainers ask for them.

    With its defaults the reward is exactly the quantile (below + equal / 2) / K of Eq. 12. Every way of asking gives
    the same numbers: one by one, in batches, from raw scores, on another thread, in another process. It pickles as how
    it is loaded, without weights. Nothing that it returns is ever nan or infinite.
    """

    scorer: Scorer | None
    """The reward model; None where raw scores come from elsewhere, and only `from_scores` is called."""
    table: ReferenceTable
    transform: Transform = Identity()  # noqa: RUF009 (frozen)
    beta: float | None = None
    """The strength of the KL that the transform was chosen for, at this scale; `check_settings` compares with it."""
    estimator: Estimator = "empirical"
    """What a rank among K tells of the quantile (`finite_k`)."""
    scale: Scale = "unit"
    """The unit of the reward, and so of beta (`scaling`)."""
    calibration: Calibration = EmpiricalCDF()  # noqa: RUF009 (frozen)
    """The paper's, or one of its peers' (`calibrations`)."""
    on_missing: OnMissing = "raise"
    """A prompt without references raises; or is worth the mean under the reference ("neutral"); or None, for trainers
    that leave such rows out ("skip"); or is calibrated now, by a function such as
    `OnTheSpot` (docs/guides/calibrate.md)."""
    id_column: str | None = None
    """The dataset column with the id by which the table knows a prompt."""
    name: str | None = None
    """What a trainer's log calls it; None for one made of transform and scorer."""
    batch_size: int | None = None
    """Pairs that the scorer is given at once, where it does not make batches itself."""
    originals: Originals | None = None
    """The prompts as they were calibrated, if they arrive rendered; a table in its run's directory needs none."""
    endings: tuple[str, ...] = ()
    """Special tokens that a trainer leaves at the end of completions, such as "<|im_end|>": taken off."""
    alarm: bool = True
    """Warn, once, if the first responses of a training run are not distributed as the table's references are."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "endings", tuple(self.endings))
        if self._valuing.by_rank:
            _ = self._valuing.lookup.vectors  # a transform that cannot be valued is an error now

    @property
    def __name__(self) -> str:
        if self.name:
            return self.name
        settings = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return named(self.transform, self.scorer, **{name: settings[name] for name in NAMED_SETTINGS})

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may ask at once without waiting for each other: whether the scorer says so."""
        return self.scorer is None or is_thread_safe(self.scorer)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Any = None,
        *,
        log_metric: Callable[[str, float], Any] | None = None,
        log_extra: Callable[[str, list[Any]], Any] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """The reward of each completion; a trainer's other columns may come along, and its functions for logging."""
        trained = trainer_state is not None and trainer_state.global_step > 0
        ids = ids_in(columns, self.id_column)
        scores = self._score(prompts, completions, ids, listen=not trained)
        if log_metric is not None:
            for what, value in measures(scores).items():
                log_metric(f"{self.__name__}/{what}", value)
        if log_extra is not None:
            log_extra(f"{self.__name__}/u", scores.u.tolist())
        return scores.reward

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Completion], ids: Sequence[Any] | None = None
    ) -> Scores:
        """Reward, raw score and quantile of each completion; a prompt of which only the id is at hand is None."""
        return self._score(prompts, completions, ids)

    def score_one(self, prompt: Any, completion: Completion, id: Any = None) -> Score:  # noqa: A002
        """The same for one; threads that ask at the same time share a batch."""
        score: Score = self._coalescer.submit((prompt, completion, id)).result()
        return score

    async def ascore(
        self, prompts: Sequence[Any], completions: Sequence[Completion], ids: Sequence[Any] | None = None
    ) -> Scores:
        """`score` for asyncio: tasks that ask at the same time share batches, and the event loop goes on."""
        asked, answered = paired(prompts, completions)
        if len(asked) > self._coalescer.max_batch:
            return await asyncio.to_thread(self._score, asked, answered, ids, listen=True)
        named = [None] * len(asked) if ids is None else list(ids)
        waiting = self._coalescer.submit_all(list(zip(asked, answered, named, strict=True)))
        return Scores.of(await asyncio.gather(*map(asyncio.wrap_future, waiting)))

    async def ascore_one(self, prompt: Any, completion: Completion, id: Any = None) -> Score:  # noqa: A002
        """`score_one` for asyncio."""
        future: Future[Score] = self._coalescer.submit((prompt, completion, id))
        return await asyncio.wrap_future(future)

    def score_texts(self, texts: Sequence[str]) -> Scores:
        """`score` for texts in which the completion follows its prompt, split after the longest known prompt.

        What begins with none is an unknown prompt as a whole.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts are a list of texts, got the text {texts!r:.60}")
        cut = split_texts(self.table, list(texts), self.on_missing == "raise")
        return self.score([prompt for prompt, _ in cut], [completion for _, completion in cut])

    def raw(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """What the reward model says, without gradients."""
        if self.scorer is None:
            raise ValueError("this reward has no scorer: give it one, or raw scores to from_scores")
        asked, answered = self._form.read(self.scorer, *paired(prompts, completions))
        answered = [without(self.endings, completion) for completion in answered]
        self._endings_watch.look(self.__name__, answered)
        step = self.batch_size or max(1, len(asked))
        with _inference():
            starts = range(0, len(asked), step)
            parts = [score(self.scorer, asked[at : at + step], answered[at : at + step]) for at in starts]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def calibrated(
        self, prompts: Sequence[Any], completions: Sequence[Completion], ids: Sequence[Any] | None = None
    ) -> Float64[np.ndarray, " n"]:
        """The quantile of each completion (Eq. 12), whatever the transform."""
        return self.score(prompts, completions, ids).u

    def rows(self, prompts: Iterable[Any], ids: Sequence[Any] | None = None) -> Int64[np.ndarray, " G"]:
        """Where the prompts are in the table: looked up once, `from_scores` takes rows in their place ever after."""
        prompts = list(prompts)
        return self._checked(rows_of(self.table, keys_of(prompts), ids), prompts, ids)

    def from_scores(self, prompts: Any, raw: Any, ids: Sequence[Any] | None = None) -> Any:
        """The rewards of raw scores that a loop has already: (P,) for P prompts, or (P, G) for G completions of each.

        An array gives an array of float64. A tensor gives a tensor on its device, float32 unless the scores are
        float64; on CUDA nothing waits for the device, so a score that is not finite raises at one of the next calls.
        """
        given = are_rows(prompts)
        if given and ids is not None:
            raise TypeError("from_scores takes prompts with their ids, or rows; got rows and ids")
        rows = prompts if given else self.rows(prompts, ids)
        scores = raw if are_tensor(raw) else np.asanyarray(raw)
        return self._raw_scores(rows, scores, None if given else prompts)

    def verify(self, tolerance: float | None = None) -> Verification:
        """Score the table's probes again, as a trainer would hand them over.

        ValueError if this is not the reward model that the table was made with.
        """
        if self.scorer is None:
            raise ValueError("this reward has no scorer to verify")
        return verified(self.scorer, self.table, tolerance, self.raw)

    def save_pretrained(self, save_directory: Directory) -> None:
        """Write scorer (how it is loaded), table, transform and settings to a directory."""
        from calibrated_rewards.reward import saving as directory

        directory.write(self, save_directory)

    @classmethod
    def from_pretrained(
        cls,
        name: Directory,
        *,
        scorer: Scorer | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        **changes: Any,
    ) -> "CalibratedReward":
        """What `save_pretrained` wrote, or `push_to_hub` uploaded; `changes` replace settings (transform=, name=, ...).

        A function, a checkpoint with code of its own or with options for loading it, and a server are loaded only with
        `trust_remote_code=True`, from a directory as from the Hub. Functions are not imported from the current folder.
        """
        from calibrated_rewards.reward import saving as directory

        read: CalibratedReward = directory.read_of_directory(
            cls, name, scorer, revision, token, trust_remote_code, changes
        )
        return read

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
        """Upload what `save_pretrained` writes, for the URL of the commit; the reward model has a repository itself."""
        from calibrated_rewards.reward import saving as directory

        return directory.push(self, repo_id, private, token)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def _score(
        self, prompts: Sequence[Any], completions: Sequence[Completion], ids: Any = None, *, listen: bool | None = None
    ) -> Scores:
        asked, answered = paired(prompts, completions)
        place = self._located(asked, ids)
        raw = self.raw(place.prompts, answered)
        found = self._valuing(place.rows, raw, place.prompts.__getitem__)
        if listen is not None and self.alarm:
            self._alarm.hear(*first_ones(place.rows, found.u, answered), trained=not listen)
        rewards: list[float | None] = found.value.tolist()
        if self.on_missing == "skip":
            rewards = [reward if known else None for reward, known in zip(rewards, found.known.tolist(), strict=True)]
        return Scores(rewards, raw, found.u, found.known)

    def _located(self, prompts: list[Any], ids: Sequence[Any] | None) -> Located:
        place = located(self.table, prompts, ids, self._reading)
        self._checked(place.rows, prompts, ids)
        return place

    def _checked(self, rows: Int64[np.ndarray, " G"], prompts: Any, ids: Any) -> Int64[np.ndarray, " G"]:
        if self.on_missing == "raise" and len(rows) and rows.min() < 0:
            try:
                self.table.rows([f"the id {i}" if p is None else p for i, p in enumerate(prompts)], ids)
            except UnknownPromptError as error:
                raise UnknownPromptError(f"{error}: {hint(self.table, prompts[int(rows.argmin())])}") from None
        return rows

    def _together(self, items: list[tuple[Any, Completion, Any]]) -> list[Score]:
        prompts, completions, ids = (list(each) for each in zip(*items, strict=True))
        return [*self._score(prompts, completions, ids, listen=True)]

    @cached_property
    def _form(self) -> Form:
        return Form.of(self.table.meta)

    @cached_property
    def _reading(self) -> Reading | None:
        return self.originals or of_run(self.table)

    @cached_property
    def _valuing(self) -> Valuing:
        transform = scaled(self.transform, self.scale)
        return Valuing(self.table, transform, self.estimator, self.calibration, self.on_missing)

    @cached_property
    def _raw_scores(self) -> RawScores:
        return RawScores(self._valuing)

    @cached_property
    def _coalescer(self) -> Coalescer:
        return Coalescer(self._together)

    @cached_property
    def _endings_watch(self) -> EndingsWatch:
        return EndingsWatch()

    @cached_property
    def _alarm(self) -> Alarm:
        return Alarm(self.__name__, self.table)


def _inference() -> AbstractContextManager[Any]:
    """Without gradients, where torch is at work: trainers call with gradients on."""
    torch = sys.modules.get("torch")
    return torch.inference_mode() if torch is not None else nullcontext()
