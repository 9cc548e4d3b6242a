"""Train a reward head on a policy's own hidden states from preferences: one model then generates and scores (DPH).

    calibrated-rewards train head --policy ./sft --pairs preferences.jsonl --out head/

The pairs are in TRL's preference format: `chosen` and `rejected`, texts or messages, with or without `prompt`; or a
prompt with `choices` and the number of the right one in `label`. Several tasks are shuffled and interleaved:
`--pairs reviews=reviews.jsonl nli=nli.jsonl`, each with a template of its own if `--templates FILE` has one.

`--backbone frozen` reads the policy once and trains the head alone, in minutes, and the policy stays what it is.
`lora` trains an adapter under the head, which is off while the policy generates; `full` trains all weights, and with
`--dpo-weight 1` the policy as well. Some pairs are held out, by prompt, and give accuracy and calibration at the end.

The same command goes on from the last checkpoint after Ctrl-C or a crash, and ends with the same weights. `head/model`
is the head: score with it by `--reward-model head/model`. On several GPUs: `accelerate launch -m calibrated_rewards
train head ...`.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments, set_seed

from calibrated_rewards.calibration.sources import read_rows
from calibrated_rewards.evaluation.wording import format_count
from calibrated_rewards.files import Message, setting, write_file
from calibrated_rewards.heads.data import Pair, PairReader, TaskTemplate, order_pairs
from calibrated_rewards.heads.headed_model import HeadedModel
from calibrated_rewards.heads.pair_batches import EncodedPair, encode_pairs
from calibrated_rewards.heads.trainer import (
    PreferenceHeadTrainer,
    add_references,
    cache_states,
    name_metrics,
)
from calibrated_rewards.models.loading import Placement, find_source
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.loading import check_policy
from calibrated_rewards.training.callbacks import HeadLog
from calibrated_rewards.training.head_settings import HeadLaunch, HeadTraining
from calibrated_rewards.training.loop import check_shares, find_processes
from calibrated_rewards.training.run_folder import RunFolder, resolve_policy
from calibrated_rewards.training.trackers import check_trackers, name_run, place_files

# How often each pair comes, unless a run says so.
EPOCHS, FROZEN_EPOCHS = 3, 30


def run(launch: HeadLaunch, settings: HeadTraining) -> None:
    """Train from files to files, or go on, as the command does."""
    folder, processes = RunFolder(launch.out), find_processes()
    check_trackers(launch.report_to)
    check_shares(settings.pairs_a_step, processes.num_processes)
    pairs = read_pairs(launch.pairs, launch.templates)
    training, held_out = split_pairs(pairs, settings.held_out, settings.seed)
    if launch.eval_pairs:
        training, held_out = pairs, read_pairs(launch.eval_pairs, launch.templates)
    if not training:
        share = setting("held_out", str(settings.held_out))
        others = f"say {setting('held_out', '0')}, or evaluate on others, {setting('eval_pairs', 'FILE')}"
        raise ValueError(Message(f"all of {format_count(len(pairs), 'pair')} are held out, got {share}: {others}"))
    named = {pair.head or settings.names[0] for pair in training}
    lacking = [name for name in settings.names if name not in named]
    if lacking and named <= {*settings.names}:  # of names that the head does not have, `encode_pairs` says more
        rule = "a head learns from the pairs whose column head names it"
        raise ValueError(Message(f"{rule}, got none for {', '.join(lacking)} of {setting('heads', settings.heads)}"))
    if launch.templates and processes.is_main_process:
        tasks = {pair.task for pair in (*training, *held_out)}
        for task in sorted({*load_templates(launch.templates)} - {"", *tasks}):
            known = ", ".join(sorted(tasks - {""})) or "no task"
            sys.stderr.write(f"the template {task} is not used: the pairs are of {known}\n")
    described = describe(launch, settings, training, held_out)
    if folder.is_finished(described):
        sys.stderr.write(f"{folder.model_folder} is this run's head: nothing to do\n")
        return
    with folder.reserve(processes.is_main_process):
        if processes.is_main_process:
            folder.begin(described)
        headed = build_model(launch, settings)
        trainer = build_trainer(headed, settings, folder, training, held_out, launch.report_to)
        trainer.train(resume_from_checkpoint=folder.find_checkpoint())
        metrics = trainer.evaluate(metric_key_prefix="held_out") if held_out else {}
        trainer.save_model(str(folder.unfinished_model))
        if processes.is_main_process:
            # Without timings: the same command ends with the same bytes.
            result = {name: metrics[name] for name in metrics if not name.endswith(("_runtime", "_per_second"))}
            write_file(folder.unfinished_model / "training.json", json.dumps(result, indent=2))
            folder.publish_model()
            verdict = summarise(result, Counter(pair.head or settings.names[0] for pair in held_out))
            sys.stdout.write(f"{verdict}head: {folder.model_folder}\nlog: {folder.log}\n")
    processes.wait_for_everyone()


def read_pairs(sources: Sequence[str], templates: Path | None) -> list[Pair]:
    """Read the pairs of all sources, each `task=source` or a source whose rows may name their task."""
    reader = PairReader({} if templates is None else load_templates(templates))
    pairs: list[Pair] = []
    for source in sources:
        task, separator, place = source.partition("=")
        if not separator or Path(source).exists():
            task, place = "", source
        rows = tqdm(read_rows(place), desc=f"reading {place}", unit=" rows", delay=3, disable=None)
        pairs += reader.read(iter(rows), task)
    if not pairs:
        raise ValueError(f"a head learns from pairs, got none in {', '.join(sources)}")
    return pairs


def load_templates(path: Path) -> dict[str, TaskTemplate]:
    """Load templates by task from a JSON file, each with the fields of `TaskTemplate`."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, Mapping) or not all(isinstance(each, Mapping) for each in content.values()):
        raise ValueError(f'{path} holds templates by task, as {{"nli": {{"prompt": "{{premise}}"}}}}')
    names = [each.name for each in fields(TaskTemplate)]
    for task, each in content.items():
        if "prompt" not in each or not {*each} <= {*names}:
            rule = f"the template {task} needs a prompt, and may have {', '.join(names[1:])}"
            raise ValueError(f"{path}: {rule}, got {', '.join(each) or 'nothing'}")
    return {task: TaskTemplate(**{**each, "answers": tuple(each.get("answers", ()))}) for task, each in content.items()}


def split_pairs(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split pairs by prompt: all of one prompt are trained on or held out, by a hash of the prompt and the seed."""
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        digest = blake2b(prompt_key(pair.prompt), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
        sides[int.from_bytes(digest, "little") < share * 2**64].append(pair)
    return sides


def build_model(launch: HeadLaunch, settings: HeadTraining) -> HeadedModel:
    """Load the policy and put a fresh head on it, the same for the same seed."""
    device = find_processes().device
    placement = Placement(launch.dtype, device, trust_remote_code=launch.trust_remote_code)
    source = find_source(resolve_policy(launch.policy), None, None, placement)
    check_policy(source)
    model = source.model(AutoModelForCausalLM)
    if source.checkpoint.adapter and find_processes().is_main_process:
        sys.stderr.write(
            f"{launch.policy} is an adapter: the head is put on its base, {source.base.name}, and reads without the "
            "adapter; to read the policy itself, merge_and_unload() the adapter first\n"
        )
    tokenizer = source.tokenizer(model)
    set_seed(settings.seed)
    return HeadedModel.build(
        model,
        tokenizer,
        backbone=settings.backbone,
        rank=settings.lora_rank,
        pooler=settings.pooler,
        layers=settings.layer_indices(model.config.get_text_config().num_hidden_layers),
        names=settings.names,
        dropout=settings.dropout,
        end_token=launch.end_token,
        text=Text(max_length=settings.max_length or None, chat=launch.chat),
    )


def build_trainer(
    headed: HeadedModel,
    settings: HeadTraining,
    folder: RunFolder,
    training: Sequence[Pair],
    held_out: Sequence[Pair],
    report_to: Sequence[str] = (),
) -> PreferenceHeadTrainer:
    """Encode the pairs, read what is read once, and make the trainer."""
    processes, loss = find_processes(), settings.joint_loss()
    check_template(headed, [*training, *held_out])
    pairs, checked = encode_pairs(headed, training), encode_pairs(headed, held_out) if held_out else []
    if settings.backbone == "frozen":
        states = cache_states(headed, [*pairs, *checked])
        pairs, checked = states[: len(pairs)], states[len(pairs) :]
    elif settings.dpo_weight:
        pairs, checked = (add_references(headed, each, settings.rows) for each in (pairs, checked))
    epochs = settings.epochs or (FROZEN_EPOCHS if settings.backbone == "frozen" else EPOCHS)
    steps = settings.steps or math.ceil(epochs * len(pairs) / settings.pairs_a_step)
    order = order_pairs(
        [pair.task for pair in pairs], steps * settings.pairs_a_step / len(pairs), mix=settings.mix, seed=settings.seed
    )
    if processes.is_main_process:
        sys.stderr.write(f"{describe_size(pairs, checked, settings, steps)}\n")
    trainer = PreferenceHeadTrainer(
        headed,
        configure(settings, folder, steps, processes.num_processes, bool(checked), report_to),
        pairs,
        order=order,
        eval_pairs=checked or None,
        loss=loss,
        window=settings.window,
        head_lr=settings.head_lr,
        head_decay=settings.head_decay,
        prior_decay=0.0 if settings.backbone == "frozen" else settings.prior_decay,
        callbacks=[HeadLog(folder, steps)],
    )
    trainer.remove_callback(PrinterCallback)  # which writes all numbers of each step to stdout
    place_files(trainer.callback_handler.callbacks, folder)
    return trainer


def check_template(headed: HeadedModel, pairs: Sequence[Pair]) -> None:
    """Refuse chats, and prompts that become chats, where the policy's tokenizer has no template to write them."""
    text, template = headed.settings.text, headed.tokenizer.chat_template
    if template is None and (text.chat or not all(isinstance(pair.prompt, str) for pair in pairs)):
        wanted = setting("chat", "True", option="--chat") + " needs" if text.chat else "pairs of messages need"
        raise ValueError(
            Message(
                f"the policy's tokenizer has no chat template, which {wanted}: put chat_template.jinja into the "
                "policy's folder, or train on texts"
            )
        )


def configure(
    settings: HeadTraining, folder: RunFolder, steps: int, processes: int, evaluates: bool, report_to: Sequence[str]
) -> TrainingArguments:
    """Make the trainer's arguments."""
    share = settings.pairs_a_step // processes
    # A frozen backbone's states are small: a step is one batch.
    rows = share if settings.backbone == "frozen" else math.gcd(share, settings.rows)
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(settings.warmup, max(0, steps - 1)),
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        activation_checkpointing=settings.checkpoint_activations,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=settings.layers != "-1" and settings.backbone != "frozen",
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluates and settings.eval_steps < steps else "no",
        eval_steps=settings.eval_steps,
        logging_steps=1,
        report_to=list(report_to) or "none",
        run_name=name_run(folder),
        disable_tqdm=True,
    )


def describe(
    launch: HeadLaunch, settings: HeadTraining, training: Sequence[Pair], held_out: Sequence[Pair]
) -> dict[str, Any]:
    """Describe as JSON all that a run depends on but for the weights."""
    digests = {name: blake2b(digest_size=8) for name in ("pairs", "held_out")}
    for name, pairs in (("pairs", training), ("held_out", held_out)):
        for pair in pairs:
            digests[name].update(json.dumps(pair, sort_keys=True).encode())
    return {
        "recipe": "head",
        "policy": resolve_policy(launch.policy),
        "dtype": launch.dtype,
        "text": {"end_token": launch.end_token, "chat": launch.chat},
        "settings": asdict(settings),
        "pairs": {"number": len(training), "digest": digests["pairs"].hexdigest()},
        "held_out": {"number": len(held_out), "digest": digests["held_out"].hexdigest()},
    }


def describe_size(
    pairs: Sequence[EncodedPair], held_out: Sequence[EncodedPair], settings: HeadTraining, steps: int
) -> str:
    """Describe how much a run reads."""
    tokens = sum(pair.tokens for pair in pairs)
    tasks = len({pair.task for pair in pairs})
    equal = sum(pair.chosen == pair.rejected for pair in pairs)  # truncated, or trimmed by the template
    return (
        f"{format_count(steps, 'step')} of {format_count(settings.pairs_a_step, 'pair')}; "
        f"{format_count(len(pairs), 'pair')} of {format_count(tasks, 'task')} with {format_count(tokens, 'token')}, "
        f"each about {steps * settings.pairs_a_step / len(pairs):.2g} times; "
        f"{format_count(len(held_out), 'pair')} held out"
        + (f"; {format_count(equal, 'pair')} with the same tokens twice: nothing to learn there" * (equal > 0))
    )


def summarise(metrics: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Say what came of a run on the held-out pairs of each head, in a line for all and one for each of several heads.

    >>> metrics = {"accuracy": 0.8125, "ties": 0.0, "ece": 0.031, "brier": 0.14, "margin": 1.5}
    >>> print(summarise({f"held_out_{name}": value for name, value in metrics.items()}, {"reward": 400}), end="")
    pairwise accuracy 81.2 % +- 2.0 on 400 held-out pairs; calibration error 0.031, Brier score 0.140, ties 0.0 %
    """
    if "held_out_accuracy" not in metrics:
        return "no pair was held out, so how well the head orders pairs is not known: --held-out 0.2, or --eval-pairs\n"
    lines = [_summarise_pairs(metrics, "held_out_", sum(counts.values()))]
    for head, count in counts.items():
        prefix = f"held_out_{name_metrics(head)}/"
        if f"{prefix}accuracy" in metrics:
            lines.append(f"head {head}: {_summarise_pairs(metrics, prefix, count)}")
    return "".join(f"{line}\n" for line in lines)


def _summarise_pairs(metrics: Mapping[str, float], prefix: str, count: int) -> str:
    accuracy, ties, ece, brier = (metrics[f"{prefix}{name}"] for name in ("accuracy", "ties", "ece", "brier"))
    share = (accuracy * count + 2) / (count + 4)  # Agresti and Coull's: 0 errors of 14 are no certainty
    error = math.sqrt(share * (1 - share) / (count + 4))
    return (
        f"pairwise accuracy {100 * accuracy:.1f} % +- {100 * error:.1f} on {format_count(count, 'held-out pair')}; "
        f"calibration error {ece:.3f}, Brier score {brier:.3f}, ties {100 * ties:.1f} %"
    )
