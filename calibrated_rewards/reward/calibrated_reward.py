"""CalibratedReward: a reward model, the table of its reference scores, and a transform, as one reward for any trainer.

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

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from math import isfinite
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from calibrated_rewards.prompts import Completion
from calibrated_rewards.reward.calibrators import Calibration, EmpiricalCDF, Uncalibrated
from calibrated_rewards.reward.completions import CompletionForm, EndingsWatch, remove_endings
from calibrated_rewards.reward.find_prompts import (
    Originals,
    PromptsByRow,
    RunPrompts,
    compute_keys,
    find_prompts,
    find_rows,
    raise_unknown_prompt,
    select_ids,
    split_texts,
)
from calibrated_rewards.reward.lookup import OnMissing, RawScores, Scores, Valuation, are_rows, is_tensor
from calibrated_rewards.reward.monitoring import ENOUGH, Alarm, Responses, compute_metrics
from calibrated_rewards.reward.verification import Verification, verify_scorer
from calibrated_rewards.scorers.protocol import (
    Loaded,
    Scorer,
    check_pairs,
    check_prompts,
    fingerprint,
    is_thread_safe,
    score,
)
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.finite_k import Estimator
from calibrated_rewards.theory.optimum import Optimal
from calibrated_rewards.theory.scale import Scale, scaled
from calibrated_rewards.theory.transforms import Affine, Chain, Identity, Transform

Directory = str | os.PathLike[str]
MISSING = ("raise", "neutral", "skip")
# Beside transform and scorer, the settings that change the rewards, and so the name in a log.
NAMED_SETTINGS = ("estimator", "scale", "calibration")
# Characters of a name, and how many of them stay where the rest is a digest.
LONGEST, KEPT = 60, 40


@dataclass(frozen=True, eq=False)
class CalibratedReward:
    """The reward of prompts and completions, called as TRL's trainers call a reward.

    With its defaults the reward is exactly the quantile (below + equal / 2) / K of Eq. 12. Every path gives the same
    numbers: one by one, in batches, from raw scores, on another thread, in another process. It pickles as the way in
    which it is loaded, without weights. Nothing that it returns is ever nan or infinite.
    """

    scorer: Scorer | None
    """The reward model; None where raw scores come from elsewhere, and only `from_scores` is called."""
    table: ReferenceTable
    transform: Transform = Identity()  # noqa: RUF009 (frozen)
    beta: float | None = None
    """The strength of the KL that the transform was chosen for, at this scale; `check_settings` compares with it."""
    estimator: Estimator = "empirical"
    """The value of a rank among K references (`theory.finite_k`)."""
    scale: Scale = "unit"
    """The unit of the reward, and so of beta (`theory.scale.scaled`)."""
    calibration: Calibration = EmpiricalCDF()  # noqa: RUF009 (frozen)
    """The paper's calibration, or one to compare it with (`reward.calibrators`)."""
    on_missing: OnMissing = "raise"
    """For a prompt without references: raise; or give the mean under the reference ("neutral"); or None, for trainers
    that leave such rows out ("skip"); or calibrate it now, with a function such as `OnTheSpot`
    (docs/guides/calibrate.md)."""
    id_column: str | None = None
    """The dataset column with the id by which the table knows a prompt."""
    name: str | None = None
    """The name in a trainer's log; None for one made of transform and scorer, and metrics named `calibrated/u`, ..."""
    # Those above are the settings of a run. Those below adapt to a scorer or to a trainer, and are seldom set by hand.
    batch_size: int | None = None
    """Pairs that the scorer is given at once, where it does not make batches itself."""
    originals: Originals | None = None
    """The prompts as they were calibrated, if they arrive rendered; a table in its run's directory needs none."""
    endings: tuple[str, ...] = ()
    """Special tokens that a trainer leaves at the end of completions, such as "<|im_end|>": they are removed."""
    alarm: bool = True
    """Warn, once, if the first responses of a training run are not distributed as the table's references are."""

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "endings", tuple(self.endings))
        if self._valuation.by_rank:
            _ = self._valuation.lookup.vectors  # a transform that cannot be valued is an error now

    @property
    def __name__(self) -> str:
        return self.name or self._made_name

    @property
    def metric_prefix(self) -> str:
        """The first part of its metrics' names, the same whatever transform and scorer: `calibrated`, or its name."""
        return self.name or "calibrated"

    @property
    def thread_safe(self) -> bool:
        """True if the scorer says that several threads may call it without waiting for each other."""
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
        """Compute the reward of each completion; a trainer may pass its other columns, and functions for logging."""
        trained = trainer_state is not None and trainer_state.global_step > 0
        if trained and self._watches:
            self._alarm.hear_all(self._unheard)
            self._alarm.finish()
        scores = self.score(prompts, completions, select_ids(columns, self.id_column), watch=not trained)
        if log_metric is not None:
            for metric, value in compute_metrics(scores).items():
                log_metric(f"{self.metric_prefix}/{metric}", value)
        if log_extra is not None:
            log_extra(f"{self.__name__}/u", scores.u.tolist())
        return scores.reward

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        ids: Sequence[Any] | None = None,
        *,
        watch: bool = False,
    ) -> Scores:
        """Compute reward, raw score and quantile of each completion; a prompt that is None is found by its id.

        An unknown prompt is UnknownPromptError, with a hint (reward/find_prompts.py), unless `on_missing` differs.
        `watch=True` is for the first responses of a training run, which the alarm looks at.
        """
        prompts, completions = check_pairs(prompts, completions)
        rows, prompts = find_prompts(self.table, prompts, ids, self._prompts_by_row)
        if self.on_missing == "raise" and len(rows) and rows.min() < 0:
            raise_unknown_prompt(self.table, rows, prompts, ids)
        raw = self.raw(prompts, completions)
        rewards, u, known = self._valuation(rows, raw, prompts.__getitem__)
        if watch and self._watches and not self._alarm.done:
            self._unheard.append((rows, u, completions))
            if self._alarm.heard + sum(len(each) for each, *_ in self._unheard) >= ENOUGH:
                self._alarm.hear_all(self._unheard)
        values: list[float | None] = rewards.tolist()
        if self.on_missing == "skip":
            values = [value if hit else None for value, hit in zip(values, known.tolist(), strict=True)]
        return Scores(values, raw, u, known)

    def score_texts(self, texts: Sequence[str]) -> Scores:
        """`score` for texts in which the completion follows its prompt, split after the longest known prompt.

        A text that begins with none is an unknown prompt as a whole, and so UnknownPromptError (`on_missing`).
        """
        if isinstance(texts, str):
            raise TypeError(f"texts are a list of texts, got the text {texts!r:.60}")
        parts = split_texts(self.table, list(texts), self.on_missing == "raise")
        return self.score([prompt for prompt, _ in parts], [completion for _, completion in parts])

    def raw(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Compute the reward model's own scores, without gradients."""
        if self.scorer is None:
            raise ValueError("this reward has no scorer: give it one, or raw scores to from_scores")
        prompts, completions = self._form.apply(self.scorer, *check_pairs(prompts, completions))
        completions = [remove_endings(self.endings, completion) for completion in completions]
        self._endings_watch.check(self.__name__, completions)
        step = self.batch_size or max(1, len(prompts))
        torch = sys.modules.get("torch")  # trainers call with gradients on
        with torch.inference_mode() if torch is not None else nullcontext():
            starts = range(0, len(prompts), step)
            parts = [score(self.scorer, prompts[at : at + step], completions[at : at + step]) for at in starts]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def calibrated(
        self, prompts: Sequence[Any], completions: Sequence[Completion], ids: Sequence[Any] | None = None
    ) -> Float64[np.ndarray, " n"]:
        """Compute the quantile of each completion (Eq. 12), whatever the transform."""
        return self.score(prompts, completions, ids).u

    def rows(self, prompts: Iterable[Any], ids: Sequence[Any] | None = None) -> Int64[np.ndarray, " G"]:
        """Find the prompts in the table: looked up once, `from_scores` takes rows in their place ever after."""
        prompts = list(prompts)
        rows = find_rows(self.table, compute_keys(prompts), ids)
        if self.on_missing == "raise" and len(rows) and rows.min() < 0:
            raise_unknown_prompt(self.table, rows, prompts, ids)
        return rows

    def check(self, prompts: Sequence[Any]) -> None:
        """Refuse a prompt without references, before anything is drawn for it: UnknownPromptError (`on_missing`)."""
        self.rows(prompts)
        check_prompts(self.scorer, prompts)  # a combined reward has tables of its own

    def from_scores(self, prompts: Any, raw: Any, ids: Sequence[Any] | None = None) -> Any:
        """Compute the rewards of raw scores: (P,) for P prompts, or (P, G) for G completions of each.

        An array gives an array of float64. A tensor gives a tensor on its device, float32 unless the scores are
        float64; on CUDA nothing waits for the device, so a score that is not finite raises at one of the next calls.
        """
        by_row = are_rows(prompts)
        if by_row and ids is not None:
            raise TypeError("from_scores takes prompts with their ids, or rows; got rows and ids")
        rows = prompts if by_row else self.rows(prompts, ids)
        return self._raw_scores(rows, raw if is_tensor(raw) else np.asanyarray(raw), None if by_row else prompts)

    def verify(self, tolerance: float | None = None) -> Verification:
        """Score the table's probes again, as a trainer would pass them.

        ValueError if this is not the reward model that the table was made with.
        """
        if self.scorer is None:
            raise ValueError("this reward has no scorer to verify")
        return verify_scorer(self.scorer, self.table, tolerance, self.raw)

    def save_pretrained(self, save_directory: Directory) -> None:
        """Write scorer (how it is loaded), table, transform and settings to a directory."""
        from calibrated_rewards.reward import saving

        saving.save(self, save_directory)

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
        """Load what `save_pretrained` wrote or `push_to_hub` uploaded; `changes` replace settings (transform=, name=).

        A function, a checkpoint with code of its own or with options for loading it, and a server are loaded only with
        `trust_remote_code=True`, from a directory as from the Hub. Functions are not imported from the current folder.
        """
        from calibrated_rewards.reward import saving

        at = saving.find_folder(name, revision, token)
        reward: CalibratedReward = saving.load(cls, at, scorer, trust_remote_code, changes)
        return reward

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **card: Any
    ) -> str:
        """Upload what `save_pretrained` writes, for the URL of the commit; the reward model has a repository itself.

        A card takes the place of README.md: `licence=` and `base_model=` (names on the Hub) are for it, `card=False` is
        none.
        """
        from calibrated_rewards.reward import hub

        return hub.push(self, repo_id, private=private, token=token, **card)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def _made_name(self) -> str:
        settings = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        if isinstance(self.calibration, Uncalibrated):
            # Beside the calibrated reward in a log, and named after it.
            return f"raw_{make_name(self.transform, self.scorer, {n: settings[n] for n in NAMED_SETTINGS[:2]})}"
        return make_name(self.transform, self.scorer, {name: settings[name] for name in NAMED_SETTINGS})

    @cached_property
    def _form(self) -> CompletionForm:
        return CompletionForm.of(self.table.meta)

    @cached_property
    def _prompts_by_row(self) -> PromptsByRow | None:
        return self.originals or RunPrompts.beside(self.table)

    @cached_property
    def _valuation(self) -> Valuation:
        transform = scaled(self.transform, self.scale)
        return Valuation(self.table, transform, self.estimator, self.calibration, self.on_missing)

    @cached_property
    def _raw_scores(self) -> RawScores:
        return RawScores(self._valuation)

    @cached_property
    def _endings_watch(self) -> EndingsWatch:
        return EndingsWatch()

    @cached_property
    def _watches(self) -> bool:
        return self.alarm and not isinstance(self.calibration, Uncalibrated)

    @cached_property
    def _alarm(self) -> Alarm:
        return Alarm(self.__name__, self.table)

    @cached_property
    def _unheard(self) -> list[Responses]:
        """Responses that the alarm gets as soon as there are enough, since a batch is seldom enough."""
        return []


def check_settings(reward: CalibratedReward) -> None:
    """Raise TypeError or ValueError for settings that make no sense, before anything is scored."""
    rules: dict[str, tuple[bool, str]] = {
        "table": (isinstance(reward.table, ReferenceTable), "a ReferenceTable"),
        "scorer": (reward.scorer is None or callable(reward.scorer), "called with prompts and completions"),
        "transform": (callable(reward.transform), "called with quantiles, as Exponential(10.0) is"),
        "calibration": (callable(reward.calibration), "called, as EmpiricalCDF() is"),
        "name": (isinstance(reward.name, str | None), "a text or None"),
        "id_column": (isinstance(reward.id_column, str | None), "a text or None"),
        "endings": (
            not isinstance(reward.endings, str) and all(isinstance(ending, str) for ending in reward.endings),
            "a tuple of texts",
        ),
    }
    for setting, (holds, rule) in rules.items():
        if not holds:
            raise TypeError(f"CalibratedReward: {setting} is {rule}, got {getattr(reward, setting)!r:.80}")
    if not callable(reward.on_missing) and reward.on_missing not in MISSING:
        raise ValueError(f"on_missing is one of {MISSING} or a function, got {reward.on_missing!r:.80}")
    size, beta = reward.batch_size, reward.beta
    if size is not None and not (isinstance(size, int) and size >= 1):
        raise ValueError(f"CalibratedReward needs a whole batch_size >= 1, or None, got batch_size={size!r}")
    if beta is not None and not (isinstance(beta, int | float) and isfinite(beta) and beta > 0):
        raise ValueError(f"CalibratedReward needs a finite beta > 0, or None, got beta={beta!r}")


def make_name(transform: Transform, scorer: Scorer | None, settings: dict[str, tuple[Any, Any]]) -> str:
    """Name a reward for a trainer's log: its transform, its reward model, and settings that change its numbers.

    The name is as good as an identifier: of many words the first ones, and a digest of all. `settings` are pairs of a
    value and its default: what differs from its default is part of the name, since TRL logs rewards of one name under
    one key.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> from calibrated_rewards.testing.suites import NumberScorer
    >>> from calibrated_rewards.theory.transforms import Exponential
    >>> make_name(Exponential(-10.0), NumberScorer(), {})
    'calibrated_Exponential_t_minus_10_0_number'
    >>> make_name(Optimal(BestOf(4), beta=0.1), NumberScorer(), {})
    'calibrated_optimal_BestOf_n_4_number'
    >>> make_name(Exponential(5.0), NumberScorer(), {"estimator": ("unbiased", "empirical"), "scale": ("unit", "unit")})
    'calibrated_Exponential_t_5_0_number_estimator_unbiased'
    """
    if isinstance(scorer, Loaded):
        model = os.path.basename(os.path.normpath(scorer.recipe.name))
    else:
        model = str(fingerprint(scorer).get("kind", "")) if scorer is not None else ""
    changes = [
        f"{name} {value if isinstance(value, str) else repr(value)}"
        for name, (value, default) in settings.items()
        if value != default
    ]
    words = " ".join(["calibrated", _describe(transform), model, *changes])
    name = re.sub(r"\W+", "_", re.sub(r"-(?=\d)", "minus ", words)).strip("_")
    return name if len(name) <= LONGEST else f"{name[:KEPT]}_{blake2b(words.encode(), digest_size=4).hexdigest()}"


def _describe(transform: Transform) -> str:
    """The repr of a transform without its change of scale; of an optimal one, its procedure."""
    match transform:
        case Chain(parts=(*head, Affine())) if head:
            return " ".join(map(_describe, head))
        case Optimal(procedure=procedure):
            return f"optimal {procedure!r}"
    return repr(transform)
