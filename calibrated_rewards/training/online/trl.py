"""A training run with one of TRL's trainers: what train_rloo.py and train_grpo.py share.

It goes on from its last checkpoint, and is then the run that it would have been: prompts are in the order that their
seed gives, which is written out, and the states of optimizer and random numbers are in the checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting as given
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training import launch as command, opening
from calibrated_rewards.training.callbacks import TimedDrawing, TimedReward
from calibrated_rewards.training.check_settings.check import Report, check_settings
from calibrated_rewards.training.loop import check_numbers, setting, turns
from calibrated_rewards.training.policy_model import contiguous_head, lora, place_of, quiet
from calibrated_rewards.training.run_folder import RunFolder, about
from calibrated_rewards.training.together import Together

# Seconds between the lines that stand for a bar where there is no terminal.
BETWEEN_LINES = 30.0
# What is nothing about the objective: the weights are in the precision that they were loaded in.
PLAIN: dict[str, Any] = {"bf16": False, "activation_checkpointing": False, "report_to": [], "weight_decay": 0.0}
PLAIN |= {"disable_tqdm": True, "ddp_find_unused_parameters": False}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_total_limit": 1, "logging_steps": 1, "shuffle_dataset": False}


@dataclass(frozen=True)
class Settings:
    """What can be set; each is an option of the command."""

    beta: float = setting(0.1, "the strength of the KL: small is far from the reference")
    steps: int = setting(200, "updates of the policy, of new completions each")
    prompts_a_step: int = setting(8, "prompts of a step, of all processes together")
    completions: int = setting(8, "completions of a prompt, G: 2 or more")
    lr: float = setting(1e-6, "learning rate at the start; it falls to 0. LoRA wants more, such as 1e-4")
    lora_rank: int = setting(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_layers: int = setting(0, "the last so many layers that get adapters, to compute less; 0: all")
    max_grad_norm: float = setting(1.0, "longer gradients are cut to this length")
    rows: int = setting(8, "completions that a process learns from at once; memory, not the result")
    save_steps: int = setting(20, "steps from checkpoint to checkpoint, from which the run can go on")
    seed: int = setting(0, "of the prompts' order, the completions and the adapters")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.completions < 2:
            few = given("completions", str(self.completions))
            raise ValueError(Message(f"a run needs completions >= 2, got {few}"))
        if self.beta == 0:
            raise ValueError(Message(f"a run needs beta > 0, got {given('beta', str(self.beta))}"))


@dataclass(eq=False)
class StepLog(TrainerCallback):
    """Writes a line for each step, under the names that the plain loops use, and shows how far the run is."""

    folder: RunFolder
    settings: Settings
    show_progress: bool
    began: float = 0.0
    bar: Any = None
    told: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer, as all here. What came after the checkpoint happens again."""
        if state.is_world_process_zero:
            self.told = perf_counter()
            self.folder.write_log(row(each, self.settings.beta) for each in state.log_history if "kl" in each)
            shown: Any = {"desc": "training", "unit": " steps", "disable": None if self.show_progress else True}
            self.bar = tqdm(total=self.settings.steps, initial=state.global_step, delay=3, **shown)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock starts."""
        self.began = perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The history is what a checkpoint holds of the log."""
        if state.is_world_process_zero and "kl" in state.log_history[-1]:
            state.log_history[-1]["seconds"] = perf_counter() - self.began
            line = row(state.log_history[-1], self.settings.beta)
            self.folder.add_to_log(line)
            self.bar.update()
            self._tell(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar's line ends."""
        if state.is_world_process_zero:
            self.bar.close()

    def _tell(self, line: Mapping[str, Any]) -> None:
        """Now and then a line, where stderr is a file or a pipe and has no bar."""
        if self.show_progress and self.bar.disable and perf_counter() - self.told >= BETWEEN_LINES:
            self.told = perf_counter()
            shown = ", ".join(
                f"{name} {line[name]:.4g}" for name in ("reward", "u", "kl") if line.get(name) is not None
            )
            sys.stderr.write(f"step {line['step']} of {self.settings.steps}: {shown}\n")


def row(logged: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """A line of the log. TRL's KL is a mean over tokens: times their number it is that of a completion."""
    tokens, reward = logged["completions/mean_length"], logged["reward"]
    kl = logged["kl"] * tokens
    own = {name.rpartition("/")[2]: value for name, value in logged.items() if name.endswith(("/u", "/raw"))}
    objective = None if reward is None else reward - beta * kl
    timed = {name: value for name, value in logged.items() if name.startswith("seconds")}
    told = {"step": logged["step"] - 1, "lr": logged["learning_rate"], "reward": reward, **own, "kl": kl}
    return {**told, "objective": objective, "tokens": tokens, **timed}


@dataclass(frozen=True)
class Kind:
    """One of TRL's trainers, its configuration, and the settings with which it maximises E[reward] - beta KL."""

    name: str
    trainer: Any
    config: Any
    faithful: Callable[..., dict[str, Any]]

    def __call__(
        self,
        policy: str | os.PathLike[str] | Any,
        reward: Any,
        prompts: Sequence[Asked],
        decoding: Decoding,
        settings: Settings,
        out: Path,
        *,
        tokenizer: Any = None,
        dtype: str = "float32",
        show_progress: bool = True,
    ) -> Path:
        """Train in the folder `out`, or go on there from the last checkpoint; where the model is, when it is finished.

        `policy` is a path, an id of the Hub, or a model with its tokenizer; `reward` any function that TRL takes, such
        as a CalibratedReward or `RawReward(reward)`. The folder has settings.json, log.jsonl and model/ (an adapter
        with LoRA); other settings in it are a ValueError.
        """
        folder, told = RunFolder(Path(out)), about(self.name, policy, reward, prompts, decoding, settings, dtype)
        if folder.finished(told):
            return folder.model
        with quiet(), completions_alone(), folder.held(os.environ.get("RANK", "0") == "0"):
            if not folder.finished(told):  # by the run that was there until now
                args = arguments(self, settings, decoding, folder)
                trainer = made(self, args, policy, reward, prompts, decoding, settings, tokenizer, dtype)
                trainer.add_callback(StepLog(folder, settings, show_progress))
                known = reward if isinstance(reward, CalibratedReward) else None
                fit(trainer, folder, told, check_settings(args, known, beta=settings.beta))
        return folder.model


def fit(trainer: Any, folder: RunFolder, told: Mapping[str, Any], report: Report) -> None:
    """Train, from the folder's last checkpoint if it has one, and save there."""
    if trainer.is_world_process_zero():
        folder.begin(told)
        sys.stderr.write(f"{report if report.findings else 'settings checked: nothing to change'}\n")
    trainer.train(resume_from_checkpoint=folder.last_checkpoint())
    trainer.save_model(str(folder.unfinished_model))
    if trainer.is_world_process_zero():
        folder.finish()
    trainer.accelerator.wait_for_everyone()


def run(options: argparse.Namespace, settings: type[Any], train: Callable[..., Path]) -> None:
    """What the commands do: open, train or go on, tell."""
    command.settings_of(options, settings)  # what is wrong with them is said before anything is loaded
    policy, reward, asked = opening.opened(options)
    given = command.settings_of(options, settings, reward.beta)
    own = {"tokenizer": policy.tokenizer, "dtype": options.dtype}
    model = train(policy.model, reward, asked, policy.decoding, given, options.out, **own)
    if Together.here().first:
        command.tell(options.out / "log.jsonl", model, reward, given.beta)


def arguments(kind: Kind, settings: Settings, decoding: Decoding, folder: RunFolder) -> Any:
    """The trainer's configuration."""
    if decoding.stop:
        raise ValueError(f"TRL ends completions by tokens alone, got stop={decoding.stop}: say stop_token_ids")
    rows = rows_at_once(settings)
    drawn = {name: getattr(decoding, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    drawn |= {"max_completion_length": decoding.max_tokens, "min_p": decoding.min_p or None}
    return kind.config(
        output_dir=str(folder.checkpoints),
        **kind.faithful(settings.beta, settings.completions, **drawn),
        max_steps=settings.steps,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=_of_a_process(settings) // rows,
        save_steps=settings.save_steps,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        **PLAIN,
        **SAVED,
    )


def _of_a_process(settings: Settings) -> int:
    """Completions of a step that a process draws; `accelerate launch` says how many processes there are."""
    whole, processes = settings.prompts_a_step * settings.completions, int(os.environ.get("WORLD_SIZE", "1"))
    if whole % processes:
        raise ValueError(f"prompts_a_step * completions is a multiple of the processes, got {whole} for {processes}")
    return whole // processes


def rows_at_once(settings: Settings) -> int:
    """As many of a process's completions as are allowed, in parts of one size: TRL has no others."""
    own = _of_a_process(settings)
    return max(n for n in range(1, own + 1) if own % n == 0 and n <= settings.rows)


def made(
    kind: Kind,
    args: Any,
    policy: Any,
    reward: Any,
    prompts: Sequence[Asked],
    decoding: Decoding,
    settings: Settings,
    tokenizer: Any,
    dtype: str,
) -> Any:
    """TRL's trainer, with all that it needs."""
    at = place_of(policy) if isinstance(policy, str | os.PathLike) else None
    model = AutoModelForCausalLM.from_pretrained(at, dtype=dtype) if at is not None else policy
    if settings.lora_rank == 0 and not model.config._name_or_path:
        raise ValueError("training all weights reads the reference from the policy's files: give a path or an id")
    contiguous_head(model)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(at or model.config._name_or_path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "TRL ends and pads completions with the tokenizer's eos_token, got a tokenizer that has none: give it one, "
            "or train with grpo_plain or ppo, which do without"
        )
    if decoding.stop_token_ids:
        given = model.generation_config.eos_token_id
        own = given if isinstance(given, list) else [each for each in (given,) if each is not None]
        model.generation_config.eos_token_id = sorted({*own, *decoding.stop_token_ids})
    trainer = kind.trainer(
        model=model,
        reward_funcs=TimedReward.of(reward),
        args=args,
        train_dataset=dataset(prompts, settings, getattr(reward, "id_column", None)),
        processing_class=tokenizer,
        peft_config=lora(model, settings.lora_rank, settings.lora_layers) if settings.lora_rank else None,
    )
    trainer._generate = TimedDrawing(trainer._generate, trainer._log_metric)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def dataset(prompts: Sequence[Asked], settings: Settings, id_column: str | None) -> Dataset:
    """The prompts of all steps in their order, with the ids by which the reward knows them."""
    if len({isinstance(each.prompt, str) for each in prompts}) != 1:
        raise ValueError("TRL takes prompts that are all texts or all messages, got both, or none")
    steps = islice(turns(prompts, settings.prompts_a_step, settings.seed), settings.steps)
    asked = [each for step in steps for each in step]
    ids = {} if id_column is None else {id_column: [each.id for each in asked]}
    return Dataset.from_dict({"prompt": [each.prompt for each in asked], **ids})


@contextmanager
def completions_alone() -> Iterator[None]:
    """On a CPU TRL works out log-probabilities of the prompts as well, most of a step, and leaves them out after."""
    trl_utils: Any = import_module("trl.trainer.utils")
    scores_all = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or scores_all(device)
    try:
        yield
    finally:
        trl_utils._use_triton = scores_all
