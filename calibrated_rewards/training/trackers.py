"""Trackers of a run's metrics, such as trackio, wandb or tensorboard, by transformers' callbacks.

TRL's trainers call them themselves. For the plain loops `open_trackers` calls them, with the same names and events.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from calibrated_rewards.training.run_folder import RunFolder

# Columns of a plain loop's log, by the names that a CalibratedReward gives to trainers.
RENAMED = {"u": "calibrated/u", "raw": "calibrated/raw"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that transformers does not know, ImportError for one that is not installed."""
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            nearest = get_close_matches(name, INTEGRATION_TO_CALLBACK, 1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"--report-to takes {', '.join(INTEGRATION_TO_CALLBACK)}, all or none, got {name!r}{hint}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ImportError(f"--report-to {name}: {error}") from error


def name_run(folder: RunFolder) -> str:
    """Name a run in trackers after its folder."""
    return folder.out.resolve().name


def place_files(callbacks: Sequence[Any], folder: RunFolder) -> None:
    """Let tensorboard write into `runs/` of the run's folder: checkpoints, its own choice, are removed at the end."""
    for each in callbacks:
        if isinstance(each, TensorBoardCallback) and each.logging_dir is None:
            each.logging_dir = str(folder.out / "runs")


@contextmanager
def open_trackers(
    names: Sequence[str], folder: RunFolder, model: Any, steps: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open the trackers of a plain loop, yield a function that sends them a log row, and close them."""
    if not names:
        yield lambda row: None
        return
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        report_to=list(names),
        run_name=name_run(folder),
        max_steps=steps,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    callbacks: Any = [DefaultFlowCallback, *(INTEGRATION_TO_CALLBACK[name] for name in args.report_to or ())]
    handler = CallbackHandler(callbacks, model, None, None, None)  # type: ignore[no-untyped-call]
    place_files(handler.callbacks, folder)
    state, control = TrainerState(max_steps=steps), TrainerControl()
    handler.on_train_begin(args, state, control)

    def send(row: Mapping[str, Any]) -> None:
        state.global_step = row["step"] + 1
        numbers = {RENAMED.get(name, name): value for name, value in row.items() if name != "step"}
        handler.on_log(args, state, control, numbers)

    try:
        yield send
    finally:
        handler.on_train_end(args, state, control)
