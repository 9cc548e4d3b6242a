"""The parts that runs share: model, reference, batches, completions with log-probabilities, processes.

Completions are drawn with `model.generate` from the whole distribution at the temperature, as the references of the
table were, so that the KL to the reference policy is the one in the objective. Several processes, started by
`accelerate launch`, each draw for their own prompts and average their gradients.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from transformers import AutoModelForCausalLM

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.adapters import build_lora_config, ignore_peft_warning
from calibrated_rewards.models.parts import device_of
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.samplers.policy import Draft, Policy
from calibrated_rewards.training.held_out import is_due, load_check
from calibrated_rewards.training.launch import Launch, load_inputs, print_outcome
from calibrated_rewards.training.progress import ProgressLines, describe_size
from calibrated_rewards.training.run_folder import RunFolder, describe_run, resolve_policy
from calibrated_rewards.training.trackers import check_trackers, open_trackers


def prepare_model(model: Any, rank: int, layers: int = 0) -> Any:
    """Return the model itself, to train all weights, or with LoRA adapters of a rank, in float32 whatever it is in."""
    make_head_contiguous(model)
    if rank == 0:
        return model
    from peft import get_peft_model

    with ignore_peft_warning():
        return get_peft_model(model, build_lora_config(model, rank, layers))


def load_start(launch: Launch, policy: Any, lora_rank: int = 0) -> tuple[Any, Any]:
    """Load the model that training begins with, and the reference of its KL: the policy, if it begins elsewhere.

    An adapter is loaded onto the policy and trained further; any other model takes memory beside it. Without `start`
    the model is the policy, and the reference None: the policy as it is now.
    """
    if launch.start is None:
        return policy, None
    path, trust = resolve_policy(launch.start), launch.trust_remote_code
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        from peft import PeftModel

        if lora_rank:
            number = setting("lora_rank", str(lora_rank))
            raise ValueError(Message(f"an adapter to start with is trained further at its own rank, got {number}"))
        with ignore_peft_warning():
            adapted = PeftModel.from_pretrained(policy, path, is_trainable=True)
        return adapted, WithoutAdapter(adapted)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=launch.dtype, trust_remote_code=trust)
    sizes = [each.config.get_text_config().vocab_size for each in (policy, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a model to start with has the policy's {sizes[0]:,} tokens, got {path} with {sizes[1]:,}")
    return model.to(device_of(policy)), policy.requires_grad_(False)


def list_trainable(model: Any) -> list[Any]:
    """List the weights that are trained."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def build_reference(model: Any) -> Any:
    """Fix the model as it is now: a frozen copy, or with a new adapter the model below it, for no further memory."""
    from peft import PeftModel

    return WithoutAdapter(model) if isinstance(model, PeftModel) else copy.deepcopy(model).requires_grad_(False)


@dataclass(frozen=True, eq=False)
class WithoutAdapter:
    """The model below an adapter, as the reference that it was trained from."""

    model: Any

    def __call__(self, **inputs: Any) -> Any:
        """Run the forward pass without the adapter."""
        with self.model.disable_adapter():
            return self.model(**inputs)


def make_head_contiguous(model: Any) -> None:
    """Copy the head's input first, on a CPU in half precision: part of a row takes hundreds of times as long."""
    if model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
        model.get_output_embeddings().register_forward_pre_hook(_copy_input)


def _copy_input(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


@dataclass(frozen=True)
class Episodes:
    """Completions: as text, and as tokens whose prompts are padded on the left, so that all begin in one column."""

    texts: list[str]
    ids: Int64[Tensor, "n T"]
    attention: Int64[Tensor, "n T"]
    mask: Bool[Tensor, "n L"]
    """Of the last L columns, which are the completion's: True up to the token that ends it, and for that token."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "Episodes":
        """Return the episodes of these rows."""
        return Episodes([self.texts[i] for i in rows], self.ids[rows], self.attention[rows], self.mask[rows])


@torch.no_grad()
def generate(policy: Policy, prompts: Sequence[Prompt], each: int = 1) -> Episodes:
    """Draw `each` completions of each prompt, prompt after prompt, with the text that calibration would have scored."""
    rows, device, ends = policy.ids(prompts), device_of(policy.model), sorted(policy.endings.ids)
    longest = max(map(len, rows))
    # Any token will do for padding, for no mask is made of it: many models have none, or end with the one they have.
    pad = policy.tokenizer.pad_token_id if policy.tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    attention = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    ids, attention = ids.repeat_interleave(each, 0), attention.repeat_interleave(each, 0)
    # All settings are given, because a checkpoint's generation_config may have others.
    tokens = policy.model.generate(
        input_ids=ids,
        attention_mask=attention,
        eos_token_id=ends or None,
        pad_token_id=pad,
        max_new_tokens=policy.decoding.max_tokens,
        temperature=policy.decoding.temperature,
        do_sample=True,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        num_beams=1,
    )
    completions = tokens[:, longest:]
    ended = torch.isin(completions, torch.tensor(ends, dtype=completions.dtype, device=device)).long()
    mask = ended.cumsum(1) - ended == 0
    # As a sampler gives them to the scorer: without the token that ended them.
    drafts = [Draft(row[columns].tolist()) for row, columns in zip(completions.cpu(), mask.cpu(), strict=True)]
    policy.endings.mark(drafts)
    texts = [str(rollout.completion) for rollout in policy.endings.rollouts(drafts)]
    return Episodes(texts, tokens, torch.cat([attention, mask.long()], 1), mask)


def forward(
    model: Any, episodes: Episodes, temperature: float
) -> tuple[Float32[Tensor, "n L"], Float32[Tensor, "n L H"]]:
    """Compute each completion token's log-probability, 0 in the padding, and the hidden state that predicts it."""
    length = episodes.mask.shape[1]
    out = model(
        input_ids=episodes.ids,
        attention_mask=episodes.attention,
        position_ids=(episodes.attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=length + 1,
    )
    # The token in a column is drawn from the logits one column before.
    logits = out.logits[:, -length - 1 : -1].float() / temperature
    chosen = episodes.ids[:, -length:, None]
    logprobs = logits.gather(2, chosen)[..., 0] - logits.logsumexp(2)
    return logprobs.masked_fill(~episodes.mask, 0.0), out.hidden_states[-1][:, -length - 1 : -1].float()


@torch.no_grad()
def compute_logprobs(model: Any, episodes: Episodes, temperature: float, rows: int) -> Float32[Tensor, "n L"]:
    """Compute the log-probability of each completion token without gradients, `rows` completions at once."""
    parts = split_rows(len(episodes), rows)
    return torch.cat([forward(model, episodes.take(part), temperature)[0] for part in parts])


def split_rows(n: int, most: int) -> Iterator[list[int]]:
    """Split the numbers below n into parts of at most `most`, each of which goes through the model at once.

    >>> [*split_rows(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    return (list(range(first, min(first + most, n))) for first in range(0, n, most))


def iterate_batches(prompts: Sequence[Asked], n: int, seed: int) -> Iterator[list[Asked]]:
    """Yield n prompts at a time, without end: each prompt comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Asked] = []
    while True:
        while len(waiting) < n:
            waiting += [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
        batch, waiting = waiting[:n], waiting[n:]
        yield batch


def set_learning_rate(optimizer: torch.optim.Optimizer, start: float, step: int, steps: int) -> float:
    """Lower the learning rate on a line to 0, so that the last steps leave little noise; return it."""
    rate = start * (1 - step / steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)
    return rate


def find_processes() -> PartialState:
    """Find the processes that train together, as `accelerate launch` or torchrun says; usually this one alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def choose_device(name: str | None) -> torch.device:
    """Choose the device that is named, or that of this process; ValueError for one that is not here."""
    if name is None:
        device: torch.device = find_processes().device
        return device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        text = f"a device is here and known to torch, got {setting('device', name)}: {str(error).splitlines()[0]}"
        raise ValueError(Message(text)) from error


def seed_process(seed: int) -> None:
    """Draw other completions in each process; a single process goes on with what was seeded before."""
    processes = find_processes()
    if processes.num_processes > 1:
        torch.manual_seed(seed + processes.process_index)


def check_shares(prompts_a_step: int, processes: int) -> None:
    """Raise ValueError if a step's prompts cannot be shared out evenly: a mean of means would be another mean."""
    if prompts_a_step % processes:
        raise ValueError(
            f"{processes} processes need prompts_a_step to be a multiple of {processes}, got {prompts_a_step}"
        )


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace each gradient by its mean over all processes; of a weight without one, as of an idle expert, it is 0.

    Which weights have a gradient may differ from process to process, and all have to take part in each mean.
    """
    if find_processes().num_processes > 1:
        for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
            weight.grad = reduce(torch.zeros_like(weight) if weight.grad is None else weight.grad, "mean")


def average_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Average each number over all processes."""
    # float32, which every device has: these are for reading.
    numbers = torch.tensor(list(metrics.values()), device=find_processes().device)
    return dict(zip(metrics, reduce(numbers, "mean").tolist(), strict=True))


def run_in_folder(name: str, train: Callable[..., Any], launch: Launch, settings: Any) -> None:
    """Load, train and save in a folder: the trained model, its tokenizer, the run's settings and a log of its steps."""
    folder, processes = RunFolder(launch.out), find_processes()
    main = processes.is_main_process
    check_trackers(launch.report_to)
    if main:
        folder.check_free(launch.force, launch.policy, launch.start)
    inputs = load_inputs(launch)
    policy, settings = inputs.policy, inputs.complete(settings)
    policy.model.to(choose_device(launch.device))
    check = load_check(launch, inputs, settings) if main else None
    run = describe_run(name, policy.model, inputs.reward, inputs.prompts, policy.decoding, settings, launch.dtype)
    run |= {} if launch.start is None else {"start": resolve_policy(launch.start)}
    model, reference = load_start(launch, policy.model, settings.lora_rank)
    policy = replace(policy, model=model)
    check = check and check.follow(model)
    with folder.reserve(main):
        if main:
            folder.check_free(launch.force, launch.policy, launch.start)  # a run may have ended there since
            folder.empty()
            folder.write_settings(run)
            folder.log.touch()
            sys.stderr.write(f"{describe_size(settings, len(inputs.prompts), policy.decoding.max_tokens)}\n")
        with open_trackers(launch.report_to if main else (), folder, policy.model, settings.steps) as send:
            lines = ProgressLines(settings.steps)

            def log(row: Mapping[str, Any]) -> None:
                if check is not None and is_due(row["step"] + 1, launch.check_every, settings.steps):
                    found = check.measure()
                    row = {**row, **(found.metrics() if found is not None else {})}
                folder.add_to_log(row)
                send(row)
                if not sys.stderr.isatty():  # where the loop's bar is not shown
                    lines.add(row)

            model = train(policy, inputs.reward, inputs.prompts, settings, log, reference)
        if main:
            model.save_pretrained(folder.unfinished_model)
            policy.tokenizer.save_pretrained(folder.unfinished_model)
            folder.publish_model()
            print_outcome(folder, inputs.reward, settings.beta)
    processes.wait_for_everyone()
