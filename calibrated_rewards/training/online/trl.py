"""RLOO and GRPO with TRL's trainers, set to maximise E[reward] - beta KL.

    calibrated-rewards train rloo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

For each prompt a group of completions is drawn and scored by the calibrated reward. With RLOO, beta times the log-ratio
of policy and reference, summed over the completion, goes from the reward; that, less the mean of the others of its
group, says how much more likely the completion shall be. Its optimum is exact: pi_ref(y) e^{Phi(C)/beta} / Z. With
GRPO the KL is a term of each token's loss, so that a token has no credit for the KL of those that come after it: its
optimum is nearly the same for one token, and further off the longer completions are and the smaller beta is
(docs/evidence/results.md has numbers). Where nothing speaks for GRPO, RLOO is the one to take. GRPO's logged KL is
TRL's estimate, which is never negative, per token times their mean number.

The settings are those of `check_settings.rloo_settings` and `grpo_settings`, and what `check_settings` says of them is
printed. Both differ from the paper (InfAlign-CTRL, algorithm 1), which uses PPO, in that they need no value function.

The same command goes on from the last checkpoint after Ctrl-C or a crash, and the run is then the one that it would
have been: prompts are in the order that their seed gives, which is written out, and the states of optimizer and random
numbers are in the checkpoint. On several GPUs: `accelerate launch --num_processes 4 -m calibrated_rewards train rloo`.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.adapters import build_lora_config, ignore_peft_warning
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training.callbacks import HeldOutCallback, StepLog, TimedDrawing, TimedReward
from calibrated_rewards.training.check_settings import check_settings, grpo_settings, rloo_settings
from calibrated_rewards.training.held_out import HeldOutRollouts, load_check
from calibrated_rewards.training.launch import Launch, check_numbers, load_inputs, option, print_outcome
from calibrated_rewards.training.loop import find_processes, iterate_batches, make_head_contiguous
from calibrated_rewards.training.progress import describe_size
from calibrated_rewards.training.run_folder import RunFolder, describe_run, resolve_policy
from calibrated_rewards.training.trackers import check_trackers, name_run, place_files


@dataclass(frozen=True)
class TRLSettings:
    """Settings of the run; each is an option of the command."""

    beta: float = option(0.1, "the strength of the KL: small is far from the reference")
    steps: int = option(200, "updates of the policy, of new completions each")
    prompts_a_step: int = option(8, "prompts of a step, of all processes together")
    completions: int = option(8, "completions of a prompt, G: 2 or more, with a2po 1 or more")
    lr: float = option(1e-6, "learning rate at the start; it falls to 0. LoRA wants more, such as 1e-4")
    lora_rank: int = option(0, "rank of LoRA adapters on all linear layers; 0 trains all weights")
    lora_layers: int = option(0, "the last so many layers that get adapters, to compute less; 0: all")
    max_grad_norm: float = option(1.0, "longer gradients are cut to this length")
    rows: int = option(8, "completions that a process learns from at once; memory, not the result")
    save_steps: int = option(20, "steps from checkpoint to checkpoint, from which the run can go on")
    seed: int = option(0, "of the prompts' order, the completions and the adapters")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.beta == 0:
            raise ValueError(Message(f"a run needs beta > 0, got {setting('beta', str(self.beta))}"))

    @property
    def completions_a_step(self) -> int:
        """Completions of a step, of all processes together."""
        return self.prompts_a_step * self.completions


@dataclass(frozen=True)
class Trainer:
    """One of TRL's trainers, its configuration, and the settings with which it maximises E[reward] - beta KL."""

    name: str
    trainer: Any
    config: Any
    faithful: Callable[..., dict[str, Any]]
    groups: bool = True
    """Whether it draws G completions of a prompt itself and compares them; else the dataset has each prompt G times."""

    def run(self, launch: Launch, settings: TRLSettings) -> None:
        """Train from files to files, or go on, as the command does."""
        self.check_completions(settings)
        check_trackers(launch.report_to)
        inputs = load_inputs(launch)
        settings, policy = inputs.complete(settings), inputs.policy
        if find_processes().is_main_process:
            sys.stderr.write(f"{describe_size(settings, len(inputs.prompts), policy.decoding.max_tokens)}\n")
        policy.model.to(find_processes().device)  # where TRL has it too: a check computes both sides of a ratio there
        check = load_check(launch, inputs, settings) if find_processes().is_main_process else None
        parts = (policy.model, inputs.reward, inputs.prompts, policy.decoding, settings, launch.out)
        more: Any = {"check": check, "check_every": launch.check_every, "report_to": launch.report_to}
        self(*parts, tokenizer=policy.tokenizer, dtype=launch.dtype, **more)
        if find_processes().is_main_process:
            print_outcome(RunFolder(launch.out), inputs.reward, settings.beta)

    def __call__(
        self,
        policy: str | os.PathLike[str] | Any,
        reward: Any,
        prompts: Sequence[Asked],
        decoding: Decoding,
        settings: TRLSettings,
        out: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        dtype: str = "float32",
        show_progress: bool = True,
        report_to: Sequence[str] = (),
        check: HeldOutRollouts | None = None,
        check_every: int = 20,
    ) -> Path:
        """Train in the folder `out`, or go on there from the last checkpoint; return the place of the trained model.

        `policy` is a path, an id of the Hub, or a model with its tokenizer; `reward` any function that TRL takes, such
        as a CalibratedReward. The folder has settings.json, log.jsonl and model/ (an adapter with LoRA); other settings
        in it are a ValueError. `report_to` names trackers as TRL does; `check` are rollouts, read with this very model,
        on which it is checked every so many steps.
        """
        self.check_completions(settings)
        folder = RunFolder(Path(out))
        run = describe_run(self.name, policy, reward, prompts, decoding, settings, dtype)
        if folder.is_finished(run):
            return folder.model_folder
        processes = find_processes()
        with ignore_peft_warning(), skip_prompt_logprobs(), folder.reserve(processes.is_main_process):
            if folder.is_finished(run):  # by a run that was there until now
                return folder.model_folder
            args = self.configure(settings, decoding, folder, processes.num_processes, report_to)
            trainer = self.build_trainer(args, policy, reward, prompts, decoding, settings, tokenizer, dtype)
            place_files(trainer.callback_handler.callbacks, folder)
            if check is not None:
                trainer.add_callback(HeldOutCallback(trainer, check, check_every))
            trainer.add_callback(StepLog(folder, settings.beta, settings.steps, show_progress))
            calibrated = reward if isinstance(reward, CalibratedReward) else None
            report = check_settings(args, calibrated, beta=settings.beta)
            if trainer.is_world_process_zero():
                folder.begin(run)
                sys.stderr.write(f"{report if report.findings else 'settings checked: nothing to change'}\n")
            trainer.train(resume_from_checkpoint=folder.find_checkpoint())
            trainer.save_model(str(folder.unfinished_model))
            if trainer.is_world_process_zero():
                folder.publish_model()
            trainer.accelerator.wait_for_everyone()
        return folder.model_folder

    def check_completions(self, settings: TRLSettings) -> None:
        """Raise ValueError for groups of one completion, which has no others to be compared with."""
        if self.groups and settings.completions < 2:
            number = setting("completions", str(settings.completions))
            raise ValueError(Message(f"a run needs completions >= 2, got {number}"))

    def configure(
        self,
        settings: TRLSettings,
        decoding: Decoding,
        folder: RunFolder,
        processes: int = 1,
        report_to: Sequence[str] = (),
    ) -> Any:
        """Make the trainer's configuration."""
        if decoding.stop:
            raise ValueError(f"TRL ends completions by tokens alone, got stop={decoding.stop}: say stop_token_ids")
        completions, rows = share_completions(settings, processes)
        sampling = {name: getattr(decoding, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
        sampling |= {"max_completion_length": decoding.max_tokens, "min_p": decoding.min_p or None}
        return self.config(
            output_dir=str(folder.checkpoints),
            **self.faithful(settings.beta, settings.completions, **sampling),
            max_steps=settings.steps,
            learning_rate=settings.lr,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=completions // rows,
            activation_checkpointing=False,
            seed=settings.seed,
            shuffle_dataset=False,  # the dataset has the prompts of all steps, in their order
            bf16=False,  # the weights stay in the precision that they were loaded in
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=1,
            logging_steps=1,
            report_to=list(report_to),
            run_name=name_run(folder),
            disable_tqdm=True,
        )

    def build_trainer(
        self,
        args: Any,
        policy: Any,
        reward: Any,
        prompts: Sequence[Asked],
        decoding: Decoding,
        settings: TRLSettings,
        tokenizer: Any,
        dtype: str,
    ) -> Any:
        """Build TRL's trainer, whose reward and drawing are timed."""
        path = resolve_policy(policy) if isinstance(policy, str | os.PathLike) else None
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype) if path is not None else policy
        if settings.lora_rank == 0 and not model.config._name_or_path:
            raise ValueError("training all weights reads the reference from the policy's files: give a path or an id")
        make_head_contiguous(model)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(path or model.config._name_or_path)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "TRL ends and pads completions with the tokenizer's eos_token, got a tokenizer that has none: give it "
                "one, or train with ppo or the plain grpo, which do without"
            )
        if decoding.stop_token_ids:
            ends = model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [each for each in (ends,) if each is not None]
            model.generation_config.eos_token_id = sorted({*ends, *decoding.stop_token_ids})
        rank, layers, id_column = settings.lora_rank, settings.lora_layers, getattr(reward, "id_column", None)
        trainer = self.trainer(
            model=model,
            reward_funcs=TimedReward.of(reward),
            args=args,
            train_dataset=build_dataset(prompts, settings, id_column, 1 if self.groups else settings.completions),
            processing_class=tokenizer,
            peft_config=build_lora_config(model, rank, layers) if rank else None,
        )
        if self.groups:
            trainer._generate = TimedDrawing(trainer._generate, trainer._log_metric)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer


# Their names are in the settings.json of runs.
train_rloo = Trainer("train_rloo", RLOOTrainer, RLOOConfig, rloo_settings)
train_grpo = Trainer("train_grpo", GRPOTrainer, GRPOConfig, grpo_settings)


def share_completions(settings: TRLSettings, processes: int) -> tuple[int, int]:
    """Count the completions of a step that a process draws, and as many of them at once as `rows` allows.

    TRL takes parts of one size alone, so that the second number divides the first.
    """
    whole = settings.prompts_a_step * settings.completions
    if whole % processes:
        raise ValueError(f"prompts_a_step * completions is a multiple of the processes, got {whole} for {processes}")
    share = whole // processes
    return share, max(n for n in range(1, share + 1) if share % n == 0 and n <= settings.rows)


def build_dataset(prompts: Sequence[Asked], settings: TRLSettings, id_column: str | None, each: int = 1) -> Dataset:
    """List the prompts of all steps in their order, `each` times, with the ids by which the reward knows them."""
    if len({isinstance(each.prompt, str) for each in prompts}) != 1:
        raise ValueError("TRL takes prompts that are all texts or all messages, got both, or none")
    steps = islice(iterate_batches(prompts, settings.prompts_a_step, settings.seed), settings.steps)
    rows = [asked for step in steps for asked in step for _ in range(each)]
    ids = {} if id_column is None else {id_column: [asked.id for asked in rows]}
    return Dataset.from_dict({"prompt": [asked.prompt for asked in rows], **ids})


@contextmanager
def skip_prompt_logprobs() -> Iterator[None]:
    """Keep TRL from computing log-probabilities of the prompts on a CPU: most of a step, and left out afterwards."""
    trl_utils: Any = import_module("trl.trainer.utils")
    use_triton = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or use_triton(device)
    try:
        yield
    finally:
        trl_utils._use_triton = use_triton
