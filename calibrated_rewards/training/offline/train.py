"""Learn the optimum from the rollouts of a calibration, offline: nothing is drawn, and no reward model is loaded.

    calibrated-rewards train offline --policy ./sft --reward reward/ --rollouts table/ --out run/

The rollouts are an exact sample of the reference policy, and their rewards are known, so that the optimum's log-ratio
log pi(y)/pi_ref(y) = Phi/beta - log Z is known for each of them. A step takes some prompts, reads some rollouts of each
behind their prompt, which is read once, and moves the log-ratios to where the loss has them. `--loss` is one of
weighted, control-variate, regression, centred, pairs (whose optimum is pi_ref(y) e^{Phi/beta} / Z) and of the rivals
ipo, bonbon, top-1.

Some prompts are held out. On their rollouts the policy is checked every so many steps by importance weights: its KL,
the correlation of its log-ratios with their targets, its win rates. With --kl 0.3 training ends where that KL is
reached, and a factor on the difference of the weights to the reference then brings it there exactly, also from below.

The last 10 layers are trained with SGD, or all weights (--layers 0), or LoRA adapters (--lora-rank 16 --optimizer adamw
--lr 1e-4). The same command goes on from the last checkpoint after Ctrl-C or a crash, and the run is the one that it
would have been. On several GPUs: `accelerate launch --num_processes 4 -m calibrated_rewards train offline ...`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibrated_rewards.calibration.dry_run import format_seconds
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.evaluation.held_out import HeldOutCheck
from calibrated_rewards.files import Message, setting, write_file
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.training import loop
from calibrated_rewards.training.held_out import HeldOutRollouts
from calibrated_rewards.training.launch import Launch, check_numbers, digest_weights, load_policy, load_reward, option
from calibrated_rewards.training.offline.groups import (
    PromptGroup,
    RecordedStates,
    ReferenceFile,
    hold_rollouts,
    load_groups,
    record_states,
    report_tokens,
    split_groups,
)
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.losses import LOSS_NAMES, LogProbabilityLoss, Loss, parse_loss
from calibrated_rewards.training.offline.rollouts import check_source
from calibrated_rewards.training.offline.trained_weights import (
    TrainedWeights,
    build_optimizer,
    find_factor,
    load_checkpoint,
    save_checkpoint,
    select_weights,
)
from calibrated_rewards.training.progress import ProgressLines, describe_size
from calibrated_rewards.training.run_folder import RunFolder, describe_run
from calibrated_rewards.training.trackers import check_trackers, open_trackers

# The learning rate at the end, as a part of the highest.
LAST_RATE = 0.1
# A gradient costs about so many forwards.
FORWARDS = 3
# Log-ratios with a smaller spread are rounding: a reference that was read in other batches differs by as much.
ROUNDING = 1e-4


@dataclass(frozen=True)
class OfflineSettings:
    """Settings of the run; each is an option of the command."""

    loss: str = option("control-variate", LOSS_NAMES)
    beta: float = option(0.1, "the strength of the KL: small is far from the reference")
    kl: float = option(0.0, "the KL to end at, measured on held-out rollouts; 0: that of the last step")
    epochs: int = option(2, "how often each prompt comes, where --steps does not say how many steps there are")
    steps: int = option(0, "updates of the policy; 0: as --epochs says")
    prompts_a_step: int = option(12, "prompts of a step, of all processes together")
    completions: int = option(32, "rollouts of a prompt in a step, drawn from its K without replacement; at most K")
    optimizer: str = option(
        "sgd", "sgd has less noise than adamw for the same KL, where all of a layer is trained", "sgd", "adamw"
    )
    lr: float = option(0.0035, "highest learning rate; it falls to a tenth. adamw wants less: 3e-5, with LoRA 1e-4")
    momentum: float = option(0.8, "momentum of sgd")
    warmup: int = option(3, "steps in which the learning rate rises")
    max_grad_norm: float = option(4.0, "longer gradients are cut to this length")
    layers: int = option(10, "train the last so many layers and the norm behind them; 0, or all of them: all weights")
    lora_rank: int = option(0, "rank of LoRA adapters on all linear layers, in place of --layers; 0: none")
    lora_layers: int = option(0, "the last so many layers that get adapters, to compute less; 0: all")
    rows: int = option(32, "completions of a prompt that go through the model at once; memory, not the result")
    cache_states: bool = option(
        False, "keep the hidden states below the trained layers in memory: steps then read the trained layers alone"
    )
    held_out: float = option(0.1, "share of the prompts that are held out for checks; 0: no checks")
    check_steps: int = option(25, "steps from one held-out check to the next")
    save_steps: int = option(50, "steps from checkpoint to checkpoint, from which the run can go on")
    seed: int = option(0, "of the prompts' order, the rollouts of a step, the held-out prompts and the adapters")

    def __post_init__(self) -> None:
        check_numbers(self, steps=0, kl=0, warmup=0, layers=0, check_steps=1, momentum=0, seed=0)
        for name, value, right in (
            ("momentum", self.momentum, self.momentum < 1),
            ("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0),
            ("beta", self.beta, self.beta > 0),
        ):
            if not right:
                rule = "below 1" if name == "momentum" else "above 0"
                raise ValueError(Message(f"a run needs a {name} {rule}, got {setting(name, str(value))}"))
        if self.lora_layers and not self.lora_rank:
            number = setting("lora_layers", str(self.lora_layers))
            raise ValueError(Message(f"adapters on the last layers need a lora_rank, got {number} without"))
        try:
            parse_loss(self.loss)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
        if not 0 <= self.held_out < 1:
            raise ValueError(
                Message(f"a share is 0 or more and below 1, got {setting('held_out', str(self.held_out))}")
            )
        if self.kl and not self.held_out:
            raise ValueError(Message(f"a KL is measured on held-out prompts, got {setting('held_out', '0')} with a kl"))

    @property
    def completions_a_step(self) -> int:
        """Completions of a step, of all processes together."""
        return self.prompts_a_step * self.completions


def run(launch: Launch, settings: OfflineSettings) -> None:
    """Train from files to files, or go on, and print what came of it: the command."""
    folder = RunFolder(launch.out)
    outcome = train_from_files(launch, settings)
    if loop.find_processes().is_main_process and outcome is not None:
        sys.stdout.write(f"{summarise(outcome)}model: {folder.model_folder}\nlog: {folder.log}\n")


def train_from_files(
    launch: Launch, settings: OfflineSettings, recorded: RecordedStates | None = None
) -> dict[str, Any] | None:
    """Train from files to files, or go on; return what came of it, or None if the model was there.

    Runs of one process that are given the same `recorded` read the layers below the trained ones once for all of them.
    """
    folder, processes = RunFolder(launch.out), loop.find_processes()
    main = processes.is_main_process
    check_trackers(launch.report_to)
    loop.check_shares(settings.prompts_a_step, processes.num_processes)
    if launch.rollouts is None:
        raise ValueError("offline training learns from the rollouts of a calibration: say --rollouts DIR")
    reward = load_reward(launch)
    check_source(launch.rollouts, reward, launch.any_policy)
    beta = launch.beta or reward.beta or settings.beta
    if launch.raw:
        reward = replace(reward, calibration=Uncalibrated(), beta=None)
    policy = load_policy(launch, reward.table.meta)
    loaded = load_groups(launch.rollouts, reward, policy, beta)
    training, held_out = split_groups(loaded.groups, settings.held_out, settings.seed)
    check_groups(training, settings)
    steps = settings.steps or math.ceil(settings.epochs * len(training) / settings.prompts_a_step)
    settings = replace(settings, beta=beta, steps=steps)
    asked = [Asked(group.prompt) for group in loaded.groups]
    described = describe_run("offline", policy.model, reward, asked, policy.decoding, settings, launch.dtype)
    described |= {"rollouts": loaded.digest()}
    weights = digest_weights(policy.model, str(policy.model.dtype).removeprefix("torch."))
    reference = ReferenceFile(folder.out / "reference.safetensors", f"{weights} {loaded.digest()}")
    if recorded is not None:
        recorded.open(weights)
    policy.model.to(launch.device or processes.device)
    if folder.is_finished(described):
        sys.stderr.write(f"{folder.model_folder} is this run's model: nothing to do\n")
        return None
    with folder.reserve(main):
        if main:
            folder.begin(described)
            report_tokens(loaded)
            sys.stderr.write(f"{describe_size(settings, len(training), policy.decoding.max_tokens)}\n")
        with open_trackers(launch.report_to if main else (), folder, policy.model, steps) as send:
            reader = GroupReader(policy.model.eval(), policy.decoding.temperature, settings.rows)
            model, outcome = train(reader, training, held_out, settings, folder, reference, send, recorded)
        if main:
            model.save_pretrained(folder.unfinished_model)
            policy.tokenizer.save_pretrained(folder.unfinished_model)
            write_file(folder.unfinished_model / "training.json", json.dumps(outcome, indent=2))
            folder.publish_model()
    processes.wait_for_everyone()
    return outcome


def train(
    reader: GroupReader,
    training: Sequence[PromptGroup],
    held_out: Sequence[PromptGroup],
    settings: OfflineSettings,
    folder: RunFolder,
    reference: ReferenceFile,
    send: Callable[[Mapping[str, float]], None] = lambda row: None,
    recorded: RecordedStates | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Train the reader's model in place, or go on from the folder's checkpoint; return it and what came of it."""
    processes, loss = loop.find_processes(), parse_loss(settings.loss)
    torch.manual_seed(settings.seed)
    model = select_weights(reader.model, settings.layers, settings.lora_rank, settings.lora_layers).eval()
    reader = replace(reader, model=model)
    reader.check(max((*training, *held_out), key=lambda group: len(group.tokens.prompt)).tokens)
    start, first_read = time.perf_counter(), recorded is None or not recorded.by_tokens
    # Only what a step will read: a short run of many prompts would otherwise spend its time on the others.
    count = len(training)
    coming = sorted({i for step in range(settings.steps) for i in choose_prompts(count, settings, step)})
    groups = [*(training[i] for i in coming), *held_out]
    if settings.cache_states:
        groups, logprobs = record_states(reader, groups, reference, recorded)
    else:
        logprobs = reference.compute(reader, groups)
    by_number, held_out = dict(zip(coming, groups, strict=False)), groups[len(coming) :]
    if processes.is_main_process and first_read:
        announce(time.perf_counter() - start, len(groups), settings)
    checked = hold_rollouts(reader, held_out, logprobs)
    weights = TrainedWeights.of(model, keep_start=settings.kl > 0)
    optimizer = build_optimizer(weights, settings.optimizer, settings.lr, settings.momentum)
    place = folder.find_checkpoint()
    first = 0 if place is None else load_checkpoint(place, weights, optimizer)
    log = open_log(folder, first, settings.steps, send)
    check, far = None, False
    for step in tqdm(range(first, settings.steps), desc="offline", unit=" steps", delay=3, disable=None):
        start = time.perf_counter()
        rate = set_learning_rate(optimizer, settings, step)
        at = choose_prompts(count, settings, step)[processes.process_index :: processes.num_processes]
        chosen = [choose_completions(by_number[i], settings, step, i, logprobs) for i in at]
        metrics = take_step(reader, chosen, loss, weights, optimizer, settings)
        row = {"step": step, **loop.average_metrics(metrics), "lr": rate}
        if checked and ((step + 1) % settings.check_steps == 0 or step + 1 == settings.steps):
            check = checked.measure()
            row |= check.metrics() if check is not None else {}
            far = check is None or check.kl.value >= settings.kl
        log(row | {"seconds": time.perf_counter() - start})
        if settings.kl and far:
            break
        if (step + 1) % settings.save_steps == 0 and processes.is_main_process:
            save_checkpoint(folder, step + 1, weights, optimizer)
    outcome = finish(weights, checked, check, settings)
    weights.widen()
    return model, outcome


def check_groups(groups: Sequence[PromptGroup], settings: OfflineSettings) -> None:
    """Raise ValueError for prompts with fewer rollouts in a step than compete in the loss, or with nothing to learn."""
    n, fewest = getattr(parse_loss(settings.loss), "n", None) or 1, min(len(group.rewards) for group in groups)
    if n > min(fewest, settings.completions):
        raise ValueError(
            Message(
                f"{n} rollouts compete in {setting('loss', settings.loss)}, got prompts with {fewest}, and "
                f"{setting('completions', str(settings.completions))}"
            )
        )
    if all(np.ptp(group.rewards) == 0 for group in groups):
        raise ValueError("a run learns from rollouts that differ in reward, got one reward for all of each prompt")


def take_step(
    reader: GroupReader,
    groups: Sequence[tuple[PromptGroup, Tensor]],
    loss: Loss,
    weights: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    settings: OfflineSettings,
) -> dict[str, float]:
    """Do one step: add up the gradients of the prompts' mean loss, cut them to length, update; return the metrics."""
    optimizer.zero_grad()
    rows = []
    losses = [LogProbabilityLoss(loss, group.describe(known), known, len(groups)) for group, known in groups]
    results = reader.accumulate_gradients([group.tokens for group, _ in groups], losses)
    for own, (value, logprobs) in zip(losses, results, strict=True):
        log_ratios, targets = (each.double() for each in (logprobs - own.reference, own.inputs.targets))
        moved = log_ratios.std(correction=0) > ROUNDING
        spread = moved * log_ratios.std(correction=0) * targets.std(correction=0)
        product = ((log_ratios - log_ratios.mean()) * (targets - targets.mean())).mean()
        ratios = log_ratios.exp()
        rows.append(
            {
                "loss": value * len(groups),
                "kl": float((ratios * log_ratios - ratios + 1).mean()),
                "corr": float(product / spread) if spread > 0 else 0.0,
                "ess": float(ratios.sum().square() / ratios.square().sum()),
            }
        )
    weights.collect_gradients()
    loop.average_gradients(optimizer)
    trained = [weight for part in optimizer.param_groups for weight in part["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"a gradient is finite, got a norm of {norm}: a smaller --lr, or --dtype float32")
    optimizer.step()
    weights.publish()
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {"grad_norm": norm}


def choose_prompts(count: int, settings: OfflineSettings, step: int) -> list[int]:
    """Choose a step's prompts: each comes once before any comes again, in an order by the seed and the epoch alone."""
    places = range(step * settings.prompts_a_step, (step + 1) * settings.prompts_a_step)
    orders = {at: np.random.default_rng([settings.seed, at]).permutation(count) for at in {i // count for i in places}}
    return [int(orders[i // count][i % count]) for i in places]


def choose_completions(
    group: PromptGroup, settings: OfflineSettings, step: int, number: int, logprobs: Mapping[bytes, Tensor]
) -> tuple[PromptGroup, Tensor]:
    """Choose a step's rollouts of a prompt, by the seed, the step and the prompt's number; with their reference."""
    size = len(group.rewards)
    drawn = np.random.default_rng([settings.seed, step, number]).permutation(size)[: settings.completions].tolist()
    return group.take(drawn), logprobs[group.key][drawn].to(loop.find_processes().device)


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OfflineSettings, step: int) -> float:
    """Raise the learning rate in the first steps, and lower it on a line to a tenth; return it."""
    rise = min(1.0, (step + 1) / (settings.warmup + 1))
    rate = settings.lr * rise * (1 - (1 - LAST_RATE) * step / settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def open_log(
    folder: RunFolder, first: int, steps: int, send: Callable[[Mapping[str, float]], None]
) -> Callable[[Mapping[str, Any]], None]:
    """Open the log at the step that comes next; rows of later steps, which come again, are removed."""
    if not loop.find_processes().is_main_process:
        return lambda row: None
    rows = folder.read_log() if folder.log.exists() else []
    folder.write_log(row for row in rows if row["step"] < first)
    lines = ProgressLines(steps, first)

    def log(row: Mapping[str, Any]) -> None:
        folder.add_to_log(row)
        send(row)
        if not sys.stderr.isatty():  # where the loop's bar is not shown
            lines.add(row)

    return log


def announce(seconds: float, prompts: int, settings: OfflineSettings) -> None:
    """Print how long training takes, by the time that the reference's log-probabilities took, if they were computed."""
    left = seconds / prompts * FORWARDS * settings.prompts_a_step * settings.steps
    if seconds > 1:
        sys.stderr.write(
            f"log-probabilities of the reference took {format_seconds(seconds)}: training may take "
            f"{format_seconds(left)}\n"
        )


def finish(
    weights: TrainedWeights, held_out: HeldOutRollouts | None, check: HeldOutCheck | None, settings: OfflineSettings
) -> dict[str, Any]:
    """Bring the held-out KL to the one asked for, by a factor on the weights' difference; return what came of it."""
    weights.check()
    outcome: dict[str, Any] = {"loss": settings.loss, "beta": settings.beta, "alpha": 1.0, "kl_asked": settings.kl}
    if held_out is None:
        return outcome
    if check is None:  # the run was over when it was started again, or went too far to be checked
        check = held_out.measure()
    if settings.kl:
        factors, checks = [1.0], [check]

        def measure(factor: float) -> float:
            weights.scale(factor / factors[-1])
            factors.append(factor)
            try:
                checks.append(held_out.measure())
            except FloatingPointError:  # stretched too far
                checks.append(None)
            return get_kl(checks[-1])

        outcome["alpha"], _ = find_factor(measure, settings.kl, get_kl(check))
        check = checks[-1]
        if check is None:
            raise ValueError(f"no factor on the difference of the weights has a KL of {settings.kl:g}: a smaller --lr")
    return outcome if check is None else outcome | {"held_out": check.metrics(), "summary": str(check)}


def get_kl(check: HeldOutCheck | None) -> float:
    """Return a check's KL; that of a policy too far away for a check is infinite."""
    return math.inf if check is None else check.kl.value


def summarise(outcome: Mapping[str, Any]) -> str:
    """Say what came of a run: its KL, the factor that brought it there, and the check on held-out rollouts."""
    text, asked = "", outcome["kl_asked"]
    if asked:
        kl = outcome["held_out"]["held_out/kl"]
        text = f"KL {kl:.3g} on held-out rollouts, {asked:.3g} was asked for: weights' difference times "
        text += f"{outcome['alpha']:.3g}\n"
        if kl < 0.9 * asked:
            text += "the weights' difference is not stretched further: more --epochs or a larger --lr\n"
    return text + (f"{outcome['summary']}\n" if "summary" in outcome else "")
