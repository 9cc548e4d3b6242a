"""Train a preference head with transformers' Trainer: frozen, LoRA or whole backbone, alone or beside cDPO.

    pairs = encode_pairs(headed, [*PairReader().read(rows)])
    args = TrainingArguments("run", learning_rate=1e-3, max_steps=200, per_device_train_batch_size=16, bf16=False)
    trainer = PreferenceHeadTrainer(headed, args, cache_states(headed, pairs), eval_pairs=held_out)
    trainer.train()

A frozen backbone is read once (`cache_states`): epochs then cost the head alone. Pairs are trained on in the order that
they are given in, `order_pairs`'s, so that a resumed run goes on as it would have: bit for bit. Evaluation has
pairwise accuracy, ties and how well the sigmoid of the margin is calibrated (`measure_pairs`), by task and head too.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from tqdm import tqdm
from transformers import EvalPrediction, Trainer, TrainingArguments

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.headed_model import HeadedModel, SelectedLayers
from calibrated_rewards.heads.losses import JointLoss, PriorDecay
from calibrated_rewards.heads.pair_batches import EncodedPair, PairCollator, check_packing
from calibrated_rewards.models.shared_prefix import ModelReader, Row
from calibrated_rewards.models.vocabulary_head import output_layer

# Bins of a confidence between 1/2 and 1, for the calibration error.
BINS = 10


@dataclass(frozen=True)
class OrderedPairs(Dataset[EncodedPair]):
    """Pairs in the order of training, some of them several times: a data set of torch."""

    pairs: Sequence[EncodedPair]
    order: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.pairs) if self.order is None else len(self.order)

    def __getitem__(self, at: int) -> EncodedPair:
        return self.pairs[at if self.order is None else int(self.order[at])]


class PreferenceHeadTrainer(Trainer):
    """Trainer of a headed model on encoded pairs, in their order; `order` repeats and reorders them for epochs."""

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        headed: HeadedModel,
        args: TrainingArguments,
        pairs: Sequence[EncodedPair],
        *,
        order: npt.NDArray[np.int64] | None = None,
        eval_pairs: Sequence[EncodedPair] | None = None,
        loss: JointLoss | None = None,
        window: int = 0,
        head_lr: float | None = None,
        head_decay: float = 0.1,
        prior_decay: float = 0.0,
        callbacks: Any = None,
    ) -> None:
        loss = loss or JointLoss()
        check_joint(headed.settings.backbone, loss, prior_decay)
        check_window(pairs[0].states is not None, window)
        if window:
            check_packing(headed, pairs, window)
        self.joint_loss, self.head_lr, self.head_decay = loss, head_lr, head_decay
        args.remove_unused_columns = False
        tasks = tuple(sorted({pair.task for pair in (*pairs, *(eval_pairs or ()))}))
        metrics = PairMetrics(tasks, headed.head.names)
        targets = loss.needs_log_probabilities
        if targets and headed.settings.backbone == "full":
            output_layer(headed.model).requires_grad_(True)
        super().__init__(
            model=headed,
            args=args,
            data_collator=PairCollator(window, targets, tasks=tasks),
            train_dataset=OrderedPairs(pairs, order),
            eval_dataset=None if eval_pairs is None else OrderedPairs(eval_pairs),
            compute_metrics=metrics,
            callbacks=callbacks,
        )
        self.headed = headed
        self.model_accepts_loss_kwargs = False
        # Now, before weights of a checkpoint take the place of the initial ones.
        backbone = [weight for weight in headed.model.parameters() if weight.requires_grad]
        self.prior, self.prior_decay = PriorDecay(backbone if prior_decay else []), prior_decay
        self._sums: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser of `args`: the backbone decays towards its start, the head towards 0, at its own rate."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.headed.model)
            backbone = [weight for weight in self.headed.model.parameters() if weight.requires_grad]
            head = {"params": list(self.headed.head.parameters()), "weight_decay": self.head_decay}
            head |= {} if self.head_lr is None else {"lr": self.head_lr}
            groups: list[dict[str, Any]] = [head]
            if backbone:
                prior = {"prior_decay": self.prior_decay}
                groups.append({"params": backbone, "weight_decay": self.args.weight_decay, **prior})
            self.optimizer = kind(groups, **options)
            if self.prior_decay:
                self.prior.register(self.optimizer)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch; on request also the scores, (pairs, 2)."""
        beside = {"heads", "tokens", "references", "task_ids"}
        answer = model(**{name: each for name, each in inputs.items() if name not in beside})
        heads, sums = inputs["heads"], None
        if "targets" in inputs:
            answer, sums = answer
        scores = answer.gather(1, heads.repeat(2)[:, None])[:, 0].unflatten(0, (2, -1))
        ratios = nll = None
        if sums is not None:
            both = sums.unflatten(0, (2, -1)) - inputs["references"].T
            ratios = (both[0], both[1])
            good = inputs["targets"][:, 0] < len(heads)
            nll = -sums[: len(heads)].sum() / good.sum().clamp(min=1)
        loss, parts = self.joint_loss((scores[0], scores[1]), ratios, nll)
        self._note(scores.detach(), parts, inputs)
        return (loss, scores.T) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluate a batch: its loss, the scores of its pairs, and the numbers of their tasks and of their heads."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        groups = torch.stack([inputs["task_ids"], inputs["heads"]], 1)
        rest = (None, None) if prediction_loss_only else (scores.detach().float(), groups)
        return (loss.detach(), *rest)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log: parts of the loss, accuracy, margin, and the tokens read so far."""
        mode = "train" if self.headed.training else "eval"
        sums = self._sums[mode]
        means = {name: torch.stack(values).float().mean() for name, values in sums.items() if name != "tokens"}
        if mode == "train":
            if sums["tokens"]:
                # Those before a checkpoint that this run goes on from are in its history.
                before = [row["num_tokens"] for row in self.state.log_history if "num_tokens" in row]
                tokens = self.accelerator.reduce(torch.stack(sums["tokens"]).sum(), "sum")
                logs["num_tokens"] = max([0.0, *before[-1:]]) + float(tokens)
            means = {name: self.accelerator.reduce(mean, "mean") for name, mean in means.items()}
            logs |= {name: float(mean) for name, mean in means.items()}
        sums.clear()
        super().log(logs, start_time)

    def _note(self, scores: Tensor, parts: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        """Keep a batch's numbers on its device until the next log: reading them would wait for the device."""
        sums, margin = self._sums["train" if self.headed.training else "eval"], scores[0] - scores[1]
        accuracy = (margin > 0).float().mean() + (margin == 0).float().mean() / 2
        numbers = {**parts, "accuracy": accuracy, "margin": margin.mean(), "score": scores.mean()}
        for name, value in numbers.items():
            sums[name].append(value)
        if "tokens" in inputs:
            sums["tokens"].append(inputs["tokens"])

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        pairs: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(pairs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained: head, and its adapter or the whole model."""
        if self.args.should_save:
            self.headed.save_pretrained(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.headed.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.headed.load_weights(str(self.state.best_model_checkpoint))


@dataclass(frozen=True)
class PairMetrics:
    """The metrics of an evaluation from the scores of its pairs: of all, of each task and of each head."""

    tasks: tuple[str, ...] = ("",)
    heads: tuple[str, ...] = ("",)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Measure all pairs, and of several tasks or heads each by its name."""
        scores, groups = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
        metrics = measure_pairs(scores)
        tasks = [task or "other" for task in self.tasks]
        for column, names in enumerate((tasks, [name_metrics(head) for head in self.heads])):
            for number, group in enumerate(names if len(names) > 1 else []):
                if (mine := groups[:, column] == number).any():
                    metrics |= {f"{group}/{name}": value for name, value in measure_pairs(scores[mine]).items()}
        return metrics


def name_metrics(head: str) -> str:
    """Name the group of metrics of a head's pairs, apart from a task of that name.

    >>> name_metrics("helpful")
    'head_helpful'
    """
    return f"head_{head}"


def measure_pairs(scores: npt.NDArray[np.floating[Any]]) -> dict[str, float]:
    """Measure scores of chosen and rejected completions, (pairs, 2): accuracy, and the calibration of its confidence.

    The confidence in the completion with the higher score is sigmoid(|margin|). `ece` is its expected calibration
    error over ten bins, `brier` the mean of (1 - sigmoid(margin))^2, `nll` of -ln sigmoid(margin). Ties are half right.

    >>> measure_pairs(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, -3.0]]))["accuracy"]
    0.625
    """
    margin = scores[:, 0] - scores[:, 1]
    right = (margin > 0) + 0.5 * (margin == 0)
    confidence, probability = 1 / (1 + np.exp(-np.abs(margin))), 0.5 * (1 + np.tanh(margin / 2))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right - confidence)[bins == i].sum())) for i in range(BINS)]
    return {
        "accuracy": float(right.mean()),
        "ties": float((margin == 0).mean()),
        "margin": float(margin.mean()),
        "ece": sum(gaps) / len(margin),
        "brier": float(np.square(1 - probability).mean()),
        "nll": float(np.logaddexp(0, -margin).mean()),
    }


def check_joint(backbone: str, loss: JointLoss, prior_decay: float) -> None:
    """Refuse losses on the language model, and decay to its start, where no weight of it is trained."""
    if backbone != "frozen":
        return
    name = next((each for each in ("dpo_weight", "sft_weight") if getattr(loss, each) > 0), None)
    if name is None and prior_decay > 0:
        name = "prior_decay"
    if name is not None:
        value = prior_decay if name == "prior_decay" else getattr(loss, name)
        raise ValueError(
            Message(
                f"a frozen backbone learns nothing, got {setting(name, str(value))}: train an adapter or all weights, "
                f"{setting('backbone', 'lora')} or {setting('backbone', 'full')}"
            )
        )


def check_window(cached: bool, window: int) -> None:
    """Refuse to pack texts that are not read in training, since their states were read once before it."""
    if cached and window:
        raise ValueError(
            Message(
                f"texts under a frozen backbone are read once, before training, and never packed, got "
                f"{setting('window', str(window))}: leave it out, or train {setting('backbone', 'lora')}"
            )
        )


def cache_states(
    headed: HeadedModel, pairs: Sequence[EncodedPair], *, batch_tokens: int | None = None, show_progress: bool = True
) -> list[EncodedPair]:
    """Read the hidden states at the ends of all pairs once, in float32 on the CPU, for a frozen backbone.

    Equal texts are read once, and the texts of one prompt share it.
    """
    if headed.settings.backbone != "frozen":
        raise ValueError(f"states are kept of a backbone that is not trained, got {headed.settings.backbone!r}")
    rows: dict[tuple[int, ...], tuple[int, ...]] = {}
    for pair in pairs:
        rows |= {tuple(pair.chosen): tuple(pair.chosen[: pair.chosen_start])}
        rows |= {tuple(pair.rejected): tuple(pair.rejected[: pair.rejected_start])}
    reader = ModelReader(headed.model, headed.tokenizer, headed.settings.text, batch_tokens, True, show_progress)
    decoder = reader.decoder(HiddenStates())
    if headed.settings.layers != (-1,):
        decoder = replace(decoder, body=SelectedLayers(decoder.body, headed.head))
    with headed.activate():
        states = decoder([Row(list(row), [len(row) - 1]) for row in rows], [hash(group) for group in rows.values()])
    place = {row: state[0].clone() for row, state in zip(rows, states, strict=True)}
    return [pair._replace(states=(place[tuple(pair.chosen)], place[tuple(pair.rejected)])) for pair in pairs]


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states themselves, as what a decoder reads."""

    def __call__(self, hidden: Tensor, following: Tensor, /) -> Tensor:
        """Return the states."""
        return hidden


def add_references(
    headed: HeadedModel, pairs: Sequence[EncodedPair], batch_pairs: int = 8, *, show_progress: bool = True
) -> list[EncodedPair]:
    """Add the log-probabilities of both completions under the model as it is now, before it is trained: for cDPO."""
    collate, training = PairCollator(targets=True), headed.training
    device = headed.head.score.weight.device
    done: list[EncodedPair] = []
    headed.eval()
    try:
        for at in tqdm(range(0, len(pairs), batch_pairs), desc="reference", delay=3, disable=not show_progress or None):
            some = pairs[at : at + batch_pairs]
            batch = collate([pair._replace(states=None) for pair in some])
            names = ("input_ids", "attention_mask", "ends", "targets")
            with torch.no_grad():
                _, sums = headed(**{name: batch[name].to(device) for name in names})
            both = sums.unflatten(0, (2, -1)).T.tolist()
            done += [pair._replace(reference=(first, second)) for pair, (first, second) in zip(some, both, strict=True)]
    finally:
        headed.train(training)
    return done
