"""Callbacks of TRL's trainers: time drawing and scoring, log a row a step, show progress, compare with the references.

`BestOfNWinRate` and `HeldOutCallback` are for any trainer of yours; the others are those of the command `train`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, cast

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.win_rate import win_rate
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.protocol import call, fingerprint, is_thread_safe, reads_messages
from calibrated_rewards.theory.procedures import BestOf, Standard, check_count
from calibrated_rewards.training.check_settings.rules import restore_decoding
from calibrated_rewards.training.held_out import HeldOutRollouts, is_due
from calibrated_rewards.training.progress import BETWEEN_LINES, ProgressLines
from calibrated_rewards.training.run_folder import RunFolder

# Numbers of a step that the log has, by their names in transformers' own.
LOGGED = ("loss", "loss/head", "loss/dpo", "loss/sft", "accuracy", "margin", "grad_norm", "learning_rate", "num_tokens")


@dataclass
class Stopwatch:
    """The seconds that calls took so far."""

    seconds: float = 0.0

    def __call__(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do the work, and add its time."""
        start = perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self.seconds += perf_counter() - start


@dataclass(frozen=True, eq=False)
class TimedScorer:
    """A scorer whose calls are timed."""

    scorer: Any
    stopwatch: Stopwatch

    def __call__(self, prompts: Any, completions: Any) -> Any:
        """Score the completions, and add the time."""
        return self.stopwatch(call, self.scorer, prompts, completions)

    @property
    def reads_messages(self) -> bool:
        """True if the scorer reads messages."""
        return reads_messages(self.scorer)

    @property
    def thread_safe(self) -> bool:
        """True if the scorer says that it is thread-safe."""
        return is_thread_safe(self.scorer)

    def fingerprint(self) -> dict[str, Any]:
        """Return the scorer's own fingerprint."""
        return fingerprint(self.scorer)


@dataclass(frozen=True, eq=False)
class TimedReward:
    """A reward that logs the seconds that it takes, and how many of them are spent outside of its scorer."""

    reward: Any
    scoring: Stopwatch | None = field(default_factory=Stopwatch)
    """None where the scorer's calls cannot be told from the others."""
    name: str | None = None
    """The reward's own, which is made of a scorer that is not timed."""

    @classmethod
    def of(cls, reward: Any) -> "TimedReward":
        """Time any reward that TRL can call."""
        if not isinstance(reward, CalibratedReward):
            return cls(reward, None)
        stopwatch = Stopwatch()
        return cls(replace(reward, scorer=TimedScorer(reward.scorer, stopwatch)), stopwatch, reward.__name__)

    @property
    def __name__(self) -> str:
        return self.name or str(getattr(self.reward, "__name__", type(self.reward).__name__))

    def __call__(self, *, log_metric: Callable[[str, float], Any], **columns: Any) -> Any:
        """Compute the rewards, and log the seconds."""
        whole, before = Stopwatch(), self.scoring.seconds if self.scoring else 0.0
        rewards = whole(self.reward, log_metric=log_metric, **columns)
        log_metric("seconds_scoring", whole.seconds)
        if self.scoring is not None:
            log_metric("seconds_lookup", whole.seconds - (self.scoring.seconds - before))
        return rewards


@dataclass(frozen=True, eq=False)
class TimedDrawing:
    """A trainer's own function for completions, timed."""

    draw: Callable[..., Any]
    log_metric: Callable[[str, float], Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the completions, and log the seconds."""
        stopwatch = Stopwatch()
        completions = stopwatch(self.draw, *args, **kwargs)
        self.log_metric("seconds_drawing", stopwatch.seconds)
        return completions


@dataclass(eq=False)
class StepLog(TrainerCallback):
    """Write a log row for each step, under the names that the plain loops use, and show progress."""

    folder: RunFolder
    beta: float
    steps: int
    show_progress: bool
    step_start: float = 0.0
    bar: Any = None
    lines: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the log up to the checkpoint again: what came after it happens again."""
        if state.is_world_process_zero:
            self.lines = ProgressLines(self.steps, state.global_step)
            self.folder.write_log(convert_row(each, self.beta) for each in state.log_history if is_step(each))
            bar: Any = {"desc": "training", "unit": " steps", "disable": None if self.show_progress else True}
            self.bar = tqdm(total=self.steps, initial=state.global_step, delay=3, **bar)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock at the beginning of a step."""
        self.step_start = perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write a step's row; its seconds go into the history, which a checkpoint keeps."""
        if state.is_world_process_zero and is_step(state.log_history[-1]):
            state.log_history[-1]["seconds"] = perf_counter() - self.step_start
            row = convert_row(state.log_history[-1], self.beta)
            self.folder.add_to_log(row)
            self.bar.update()
            if self.show_progress and self.bar.disable:  # stderr is a file or a pipe, and has no bar
                self.lines.add(row)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar at the end."""
        if state.is_world_process_zero:
            self.bar.close()


@dataclass(eq=False)
class BestOfNWinRate(TrainerCallback):
    """Log, every k steps, how often the best of N completions beats the table's references by a second scorer.

    `trainer.add_callback(BestOfNWinRate(trainer, reward, judge, prompts))`. The reward's scorer selects the best of N;
    `judge` is the second scorer with the table of its reference scores, from a calibration with both. A reward that is
    hacked rises while these numbers fall. Logged are `best_of_1/win_rate` (0.5 for the reference policy) and
    `best_of_N/win_rate` against one reference, each with its `standard_error` over prompts.

    The same seeds each time, and random numbers of its own: the run is the one that it would have been without. In
    several processes the first one draws, with its own copy of the weights (not FSDP or ZeRO-3).
    """

    trainer: Any
    """A trainer of TRL's that logs with `_metrics`, such as RLOO and GRPO."""
    reward: CalibratedReward
    judge: CalibratedReward
    prompts: Sequence[Prompt]
    """Calibrated prompts that are not trained on: 2 or more."""
    ids: Sequence[Any] | None = None
    n: int = 4
    completions: int | None = None
    """Completions of each prompt; more than n lower the error. None: 2 n."""
    every: int = 50
    """Steps from one measurement to the next; the first is before the first step."""
    decoding: Decoding | None = None
    """None: as the table's references were drawn."""
    seed: int = 0

    def __post_init__(self) -> None:
        completions = self.n if self.completions is None else self.completions
        # Each measurement reads them again.
        self.prompts, self.ids = [*self.prompts], None if self.ids is None else [*self.ids]
        check_count("BestOfNWinRate", n=self.n, every=self.every, completions=completions)
        if completions < self.n:
            raise ValueError(f"BestOfNWinRate needs completions >= n, got {completions} for n={self.n}")
        if len(self.prompts) < 2:
            raise ValueError(f"BestOfNWinRate needs prompts >= 2, got {len(self.prompts)}")
        if not isinstance(self.seed, int | np.integer) or self.seed < 0:
            raise ValueError(f"BestOfNWinRate needs a whole seed >= 0, got seed={self.seed!r}")
        rows = self.judge.rows(self.prompts, self.ids)
        if rows.min() < 0:
            raise ValueError("BestOfNWinRate needs prompts that the judge's table knows, got one that it does not")
        self.references = Samples([self.judge.table.scores(row) for row in rows.tolist()])
        if self.decoding is None:
            self.decoding = restore_decoding(self.judge.table.meta, "the judge's table", "give decoding")

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Measure the policy before its first step."""
        if state.global_step == 0:
            self.on_step_end(args, state, control, **parts)

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Measure the policy after every k-th step; the trainer logs it with the step's other numbers."""
        if state.is_world_process_zero and state.global_step % self.every == 0:
            for name, value in self.measure(parts["model"], parts["processing_class"]).items():
                self.trainer._metrics["train"][name].append(value)

    def measure(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Draw completions, score them with both scorers, and estimate the win rates."""
        count, each_count = len(self.prompts), self.completions or 2 * self.n
        seeds = np.random.SeedSequence(self.seed).generate_state(count * each_count).reshape(count, -1)
        sampler = HfSampler(model, tokenizer, cast(Decoding, self.decoding), show_progress=False)
        rollouts = sampler(self.prompts, seeds.tolist())
        prompts = [prompt for prompt, each in zip(self.prompts, rollouts, strict=True) for _ in each]
        texts = [rollout.completion for each in rollouts for rollout in each]
        select, judged = (scorer.raw(prompts, texts).reshape(count, -1) for scorer in (self.reward, self.judge))
        samples, metrics = Samples(select, judged), {}
        for n in sorted({1, self.n}):
            estimate = win_rate(samples, self.references, BestOf(n), Standard(), jackknife=False)
            metrics[f"best_of_{n}/win_rate"] = estimate.value
            metrics[f"best_of_{n}/standard_error"] = estimate.standard_error
        return metrics


@dataclass(eq=False)
class HeldOutCallback(TrainerCallback):
    """Log a check on held-out rollouts every k steps of a trainer of TRL's, and after its last.

    Before the run starts: `trainer.add_callback(HeldOutCallback(trainer, rollouts))`, where `rollouts` were read by
    `HeldOutRollouts.load` with the trainer's model. In several processes the first one computes, with its own copy of
    the weights (not FSDP or ZeRO-3).
    """

    trainer: Any
    """A trainer of TRL's that logs with `_metrics`, such as RLOO and GRPO."""
    rollouts: HeldOutRollouts
    every: int = 20

    def __post_init__(self) -> None:
        check_count("HeldOutCallback", every=self.every)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the policy after every k-th step; the trainer logs it with the step's other numbers."""
        if state.is_world_process_zero and is_due(state.global_step, self.every, state.max_steps):
            found = self.rollouts.measure()
            for name, value in (found.metrics() if found is not None else {}).items():
                self.trainer._metrics["train"][name].append(value)


def is_step(logged: Mapping[str, Any]) -> bool:
    """Tell TRL's log of a step from its log of a whole run."""
    return "completions/mean_length" in logged


def convert_row(logged: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """Convert TRL's log of a step to a row, whose KL is a sum over the completion.

    RLOO and GRPO log its mean over tokens, A2PO beta times the sum.
    """
    tokens, reward = logged["completions/mean_length"], logged["reward"]
    kl = logged["kl"] * tokens if "kl" in logged else logged["implicit_reward"] / beta
    quantile = {name.rpartition("/")[2]: value for name, value in logged.items() if name.endswith(("/u", "/raw"))}
    row = {"step": logged["step"] - 1, "lr": logged["learning_rate"], "reward": reward, **quantile, "kl": kl}
    row |= {"objective": None if reward is None else reward - beta * kl, "tokens": tokens}
    return row | {name: value for name, value in logged.items() if name.startswith(("seconds", "held_out/"))}


@dataclass(eq=False)
class HeadLog(TrainerCallback):
    """Write a log row for each step and each evaluation, and show progress with the time left."""

    folder: RunFolder
    steps: int
    bar: Any = None
    last_line: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the log up to the checkpoint again: what came after it happens again."""
        if state.is_world_process_zero:
            self.folder.write_log(row for each in state.log_history if (row := convert_head_row(each)))
            bar: Any = {"desc": "training", "unit": " steps", "disable": None}
            self.bar = tqdm(total=self.steps, initial=state.global_step, delay=3, **bar)
            self.last_line = perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the row of a step or an evaluation."""
        row = convert_head_row(state.log_history[-1]) if state.is_world_process_zero else None
        if row is None or self.bar is None:
            return
        self.folder.add_to_log(row)
        if "loss" in row:
            self.bar.update()
            self.bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.2f}", refresh=False)
        if self.bar.disable and perf_counter() - self.last_line > BETWEEN_LINES:
            self.last_line = perf_counter()
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
            sys.stderr.write(f"step {row['step'] + 1} of {self.steps}: {numbers}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar at the end."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def convert_head_row(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Convert an entry of transformers' history to a log row, counted from step 0; None for a summary.

    >>> convert_head_row({"loss": 1.2, "accuracy": 0.5, "step": 3, "epoch": 0.1})
    {'step': 2, 'loss': 1.2, 'accuracy': 0.5}
    >>> convert_head_row({"eval_loss": 1.5, "eval_accuracy": 0.75, "eval_runtime": 1.0, "step": 3})
    {'step': 2, 'held_out/accuracy': 0.75, 'held_out/loss': 1.5}
    """
    step = {"step": int(entry["step"]) - 1}
    if "loss" in entry:
        return step | {name: float(entry[name]) for name in LOGGED if name in entry}
    timing = ("_runtime", "_per_second")
    checks = {name: value for name, value in entry.items() if name.startswith("eval_") and not name.endswith(timing)}
    return step | {f"held_out/{name[5:]}": float(value) for name, value in sorted(checks.items())} if checks else None
