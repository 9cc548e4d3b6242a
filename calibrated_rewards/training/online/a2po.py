"""A*-PO with TRL's trainer, on-policy regression to an optimal value that is known: nothing is drawn beforehand.

    calibrated-rewards train a2po --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/

At the optimum pi_ref(y) e^{Phi(C)/beta} / Z, beta times a completion's log-ratio is its reward less beta log Z, the
prompt's optimal value V*. A*-PO (arXiv 2505.20686) draws completions of the policy and makes the square of the
difference smaller. It estimates V* in a first stage, from 8 completions of the reference for each prompt. The table
has it: E_ref[e^{Phi/beta}] is a mean over ranks (`reference_values.py`), so the first stage is left out.

The gradient is that of E[reward] - beta KL with V* as baseline, so the optimum is exact, and an error in V* would only
add noise. No completion is compared with others of its prompt: --completions 1 will do, with more prompts a step. Near
the optimum this baseline leaves no noise; far from it, that of RLOO leaves less (docs/evidence/exact_world.md).

This is `trl.experimental.a2po`, which TRL may change or remove: 1.15 and later are supported. It computes
log-probabilities at temperature 1 and gives the policy prompts without special tokens of the tokenizer, so tables of
other temperatures, and texts to which the tokenizer adds such tokens, are refused: `train rloo` takes them. The rest,
checkpoints, LoRA and several processes, is as with `train rloo`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from transformers import set_seed
from trl import __version__ as trl_version
from trl.data_utils import maybe_apply_chat_template
from trl.trainer.utils import disable_dropout_in_model

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.training.check_settings.trl import a2po_settings
from calibrated_rewards.training.loop import WithoutAdapter
from calibrated_rewards.training.online.reference_values import compute_reference_values
from calibrated_rewards.training.online.trl import Trainer, TRLSettings

__all__ = ["TRLSettings", "build_a2po", "train_a2po"]
OLDEST = (1, 15)


def import_a2po() -> Any:
    """Import TRL's module; ImportError names the version where TRL has none, or one that knows a single end token."""
    if tuple(map(int, trl_version.split(".")[:2])) >= OLDEST:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # what it says is in this file's docstring
        try:
            return import_module("trl.experimental.a2po")
        except ModuleNotFoundError:
            pass
    raise ImportError(f"train a2po needs trl.experimental.a2po of trl 1.15 or later, got trl {trl_version}: train rloo")


def configure_a2po(*, shuffle_dataset: bool, **settings: Any) -> Any:
    """Make an A2POConfig, with the prompts in the order of the dataset, and none of them cut."""
    order = "random" if shuffle_dataset else "sequential"
    return import_a2po().A2POConfig(**settings, train_sampling_strategy=order, max_prompt_length=None)


def choose_settings(beta: float, _completions: int, **sampling: Any) -> dict[str, Any]:
    """Choose arguments for A2POConfig; ValueError for decoding that its loss, or it, does not have."""
    needed = {"temperature": 1.0, "min_p": None, "repetition_penalty": 1.0}
    wrong = ", ".join(f"{name}={sampling[name]}" for name in needed if sampling[name] != needed[name])
    if wrong:
        raise ValueError(f"TRL's A2PO has log-probabilities of the whole model at temperature 1, got {wrong}: rloo")
    return a2po_settings(beta, **{name: value for name, value in sampling.items() if name not in needed})


def build_a2po(
    model: Any, reward_funcs: Any, args: Any, train_dataset: Any, processing_class: Any, peft_config: Any
) -> Any:
    """Build TRL's trainer, with each prompt's optimal value in the place of its first stage."""
    reward, tokenizer = reward_funcs.reward, processing_class
    if not isinstance(reward, CalibratedReward):
        raise TypeError(f"a2po needs a CalibratedReward, whose optimal values are known, got {reward!r:.80}")
    tokenizer.padding_side = "left"  # completions begin in one column
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [maybe_apply_chat_template(row, tokenizer)["prompt"] for row in train_dataset]
    bare, whole = (tokenizer(texts[0], add_special_tokens=special)["input_ids"] for special in (False, True))
    if bare != whole and isinstance(train_dataset[0]["prompt"], str):
        added = tokenizer.decode([token for token in whole if token not in bare])
        raise ValueError(f"TRL's A2PO leaves out {added!r}, which the tokenizer adds to a text prompt: train rloo")
    disable_dropout_in_model(model)
    keywords = signature(model.forward).parameters.keys()
    if peft_config is not None:
        from peft import get_peft_model

        set_seed(args.seed)  # of the adapter
        model = get_peft_model(model, peft_config)
    trainer = import_a2po().A2POTrainer(
        model, reward_funcs, args=args, train_dataset=train_dataset, processing_class=tokenizer
    )
    if peft_config is not None:  # in place of a copy
        trainer.ref_model, trainer.model_kwarg_keys = WithoutAdapter(trainer.model), keywords
    trainer._optimal_values = find_optimal_values(reward, dict(zip(texts, train_dataset, strict=True)), args.beta2)
    log = LogMetric(trainer)
    trainer.reward_funcs = [LoggedReward(reward_funcs, log)]
    trainer._prepare_inputs = CountedInputs(trainer._prepare_inputs, log)
    # What is None here would be taken from the checkpoint's own generation config.
    trainer.generation_config.update(eos_token_id=trainer.eos_token_ids, min_p=0.0, repetition_penalty=1.0)
    return trainer


def find_optimal_values(reward: CalibratedReward, rows: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Compute the optimal value of each row of a dataset, by the text of its prompt, as TRL keeps them."""
    prompts = [Asked(row["prompt"], row.get(reward.id_column)) for row in rows.values()]
    return dict(zip(rows, compute_reference_values(reward, prompts, beta).optimal.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class LogMetric:
    """Adds a number to those that a trainer averages over the batches of a step and logs."""

    trainer: Any

    def __call__(self, name: str, value: float) -> None:
        """Add the number."""
        self.trainer._metrics["train" if self.trainer.model.training else "eval"][name].append(value)


@dataclass(frozen=True, eq=False)
class LoggedReward:
    """A reward that is given a function to log with, which A2PO does not pass."""

    reward: Callable[..., Any]
    log_metric: LogMetric

    def __call__(self, **columns: Any) -> Any:
        """Compute the rewards."""
        return self.reward(**columns, log_metric=self.log_metric)


@dataclass(frozen=True, eq=False)
class CountedInputs:
    """The trainer's own function for a batch, whose completions are counted in tokens."""

    prepare: Callable[[Any], dict[str, Any]]
    log_metric: LogMetric

    def __call__(self, rows: Any) -> dict[str, Any]:
        """Draw and score the batch."""
        batch = self.prepare(rows)
        tokens = batch["attention_mask"][:, -batch["logits_to_keep"] :].sum(1)
        self.log_metric("completions/mean_length", tokens.float().mean().item())
        return batch


train_a2po = Trainer("train_a2po", build_a2po, configure_a2po, choose_settings, groups=False)
