"""The rollouts of a calibration as tokens with their rewards, and the log-probabilities that the reference gives them.

`load_groups` reads and tokenises them, `split_groups` holds some prompts out, `ReferenceFile` keeps the reference's
log-probabilities in the run's folder, so that a run that goes on has the very same numbers.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float32, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.files import replace_file
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.samplers.policy import Policy, tokenize_completion
from calibrated_rewards.theory.finite_k import Estimator, log_partition
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.training.held_out import PROMPTS, ROLLOUTS, HeldOutRollouts, compute_log_probabilities
from calibrated_rewards.training.loop import find_processes
from calibrated_rewards.training.offline.frozen_layers import GroupStates, count_frozen, find_layers
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.losses import LossInputs
from calibrated_rewards.training.offline.rollouts import PromptRollouts, iterate_rollouts


@dataclass(frozen=True, eq=False)
class PromptGroup:
    """A prompt and its K rollouts as tokens, with what is known of them."""

    key: bytes
    prompt: Prompt
    tokens: Group
    scores: Float64[np.ndarray, " K"]
    rewards: Float64[np.ndarray, " K"]
    beta: float
    log_z: float
    exact_log_z: float | None

    def take(self, at: Sequence[int]) -> "PromptGroup":
        """Return the group with some of its rollouts; log Z stays that of all."""
        at = list(at)
        return replace(self, tokens=self.tokens.take(at), scores=self.scores[at], rewards=self.rewards[at])

    def describe(self, reference: Tensor) -> LossInputs:
        """Return what a loss knows of the rollouts."""
        rewards = torch.tensor(self.rewards, dtype=torch.float32, device=reference.device)
        counts = torch.tensor([len(each) for each in self.tokens.completions], device=reference.device)
        return LossInputs(rewards, self.beta, self.log_z, counts, reference, self.exact_log_z)


class Groups(NamedTuple):
    """The groups of a calibration, and the share of completions whose text makes the tokens that were drawn."""

    groups: list[PromptGroup]
    as_drawn: float

    def digest(self) -> str:
        """Digest all tokens and rewards."""
        digest = blake2b(digest_size=8)
        for group in self.groups:
            digest.update(group.key + group.rewards.tobytes())
            for row in (group.tokens.prompt, *group.tokens.completions):
                digest.update(np.asarray([len(row), *row], np.int64).tobytes())
        return digest.hexdigest()


def load_groups(run: Path, reward: CalibratedReward, policy: Policy, beta: float) -> Groups:
    """Read a calibration's rollouts, and make them into tokens as the policy drew them."""
    groups, same, total = [], 0, 0
    for rollouts in tqdm(iterate_rollouts(run, reward, beta=beta), desc="reading", unit=" prompts", delay=3):
        pairs = [tokenize_completion(policy, each, rollouts.prompt) for each in rollouts.rollouts]
        tokens = Group(policy.check([rollouts.prompt])[0], [ids for ids, _ in pairs])
        exact = compute_exact_log_z(reward, rollouts)
        values = (rollouts.scores.astype(np.float64), rollouts.rewards, beta, rollouts.log_z, exact)
        groups.append(PromptGroup(rollouts.key, rollouts.prompt, tokens, *values))
        same, total = same + sum(as_drawn for _, as_drawn in pairs), total + len(pairs)
    if not groups:
        raise ValueError(f"offline training needs rollouts, got none in {run}")
    return Groups(groups, same / total)


def compute_exact_log_z(reward: CalibratedReward, rollouts: PromptRollouts) -> float | None:
    """Compute log Z of the reward's transform among the K - 1 other rollouts; None for raw scores."""
    others = len(rollouts.scores) - 1
    if isinstance(reward.calibration, Uncalibrated) or others < 1:
        return None
    transform: Any = scaled(reward.transform, reward.scale)
    return compute_log_partition(transform, rollouts.beta, others, reward.estimator)


@lru_cache(maxsize=1024)
def compute_log_partition(transform: Any, beta: float, K: int, estimator: Estimator) -> float:
    """Compute log Z among K references once for all prompts: it takes a tenth of a second."""
    return log_partition(transform, beta, K, estimator)


def split_groups(groups: Sequence[PromptGroup], share: float, seed: int) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Hold a share of the prompts out, and at least 2; return those that are trained on, and those held out."""
    if share == 0:
        return list(groups), []
    held = max(2, round(share * len(groups)))
    if len(groups) < held + 1:
        raise ValueError(f"{held} of {len(groups)} prompts held out leave none to train on: another --held-out, or 0")
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    return [groups[i] for i in sorted(order[held:])], [groups[i] for i in sorted(order[:held])]


def share_log_probabilities(
    reader: GroupReader, groups: Sequence[Group], description: str = "held-out check"
) -> list[Float32[Tensor, " K"]]:
    """Compute the log-probabilities of all completions of all groups, each process those of some."""
    processes = find_processes()
    own = groups[processes.process_index :: processes.num_processes]
    show: Any = None if processes.is_main_process else True
    values = compute_log_probabilities(reader, tqdm(own, desc=description, unit=" prompts", delay=3, disable=show))
    if processes.num_processes == 1:
        return values
    places = range(processes.process_index, len(groups), processes.num_processes)
    gathered = gather_object(list(zip(places, values, strict=True)))
    return [value for _, value in sorted(gathered, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class ReferenceFile:
    """The log-probabilities of all rollouts under the policy that training starts from, in a file."""

    path: Path
    identity: str
    """The digest of what they depend on."""

    def load(self) -> dict[bytes, Tensor] | None:
        """Read them by the keys of their prompts; None if there are none of this identity, or they cannot be read."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    return None
                return {bytes.fromhex(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            return None

    def save(self, logprobs: dict[bytes, Tensor]) -> None:
        """Write the log-probabilities to the file, which is replaced as a whole."""
        tensors = {key.hex(): values.contiguous() for key, values in logprobs.items()}
        with replace_file(self.path) as file:
            file.write(save(tensors, {"identity": self.identity}))

    def compute(self, reader: GroupReader, groups: Sequence[PromptGroup]) -> dict[bytes, Tensor]:
        """Read them, or compute and keep them; the model is as training finds it."""
        known, processes = self.load(), find_processes()
        # All processes have looked before one writes: they have to agree, for they compute together.
        processes.wait_for_everyone()
        if known is not None:
            return known
        values = share_log_probabilities(reader, [group.tokens for group in groups], "reference")
        logprobs = {group.key: each for group, each in zip(groups, values, strict=True)}
        if processes.is_main_process:
            self.save(logprobs)
        return logprobs


@dataclass(eq=False)
class RecordedStates:
    """Log-probabilities and hidden states of groups that were read, for other runs of this process, or of others."""

    weights: str = ""
    """The digest of the policy's weights."""
    by_tokens: dict[bytes, tuple[Tensor, GroupStates]] = field(default_factory=dict)

    def open(self, weights: str) -> None:
        """Prepare for a policy: what is of another one is dropped."""
        if weights != self.weights:
            self.weights, self.by_tokens = weights, {}

    def save(self, path: Path) -> None:
        """Write all of it to a file, for processes of their own."""
        tensors: dict[str, Tensor] = {}
        for key, (logprobs, states) in self.by_tokens.items():
            lengths = torch.tensor([len(row) for row in states.completions])
            parts = (logprobs, states.prompt, torch.cat(states.completions), lengths)
            tensors |= {f"{key.hex()} {i}": part.contiguous() for i, part in enumerate(parts)}
        with replace_file(path) as file:
            file.write(save(tensors, {"weights": self.weights}))

    @classmethod
    def load(cls, path: Path) -> "RecordedStates":
        """Read the log-probabilities and states of a file that `save` wrote."""
        with safe_open(path, "pt") as file:
            by_tokens = {}
            for key in {name.partition(" ")[0] for name in file.keys()}:  # noqa: SIM118
                logprobs, prompt, completions, lengths = (file.get_tensor(f"{key} {i}") for i in range(4))
                states = GroupStates(prompt, list(torch.split(completions, lengths.tolist())))
                by_tokens[bytes.fromhex(key)] = logprobs, states
            return cls((file.metadata() or {})["weights"], by_tokens)

    def read(
        self, reader: GroupReader, groups: Sequence[PromptGroup]
    ) -> Iterator[tuple[PromptGroup, tuple[Tensor, GroupStates]]]:
        """Read those groups that were not read before; iterate over all, with what is known of them."""
        layers = count_frozen(place[2]) if (place := find_layers(reader.model)) is not None else 0
        keys = [digest_tokens(group.tokens, layers) for group in groups]
        new = {key: group.tokens for key, group in zip(keys, groups, strict=True) if key not in self.by_tokens}
        progress = tqdm([*new.values()], desc="reference", unit=" prompts", delay=3, disable=None)
        for key, (logprobs, states) in zip(new, reader.record(progress), strict=True):
            self.by_tokens[key] = logprobs.cpu(), states
        return zip(groups, (self.by_tokens[key] for key in keys), strict=True)


def digest_tokens(group: Group, layers: int) -> bytes:
    """Digest the tokens of a group, and the number of layers below its states."""
    digest = blake2b(digest_size=16)
    for row in (group.prompt, *group.completions):
        digest.update(np.asarray([layers, len(row), *row], np.int64).tobytes())
    return digest.digest()


def record_states(
    reader: GroupReader,
    groups: Sequence[PromptGroup],
    reference: ReferenceFile,
    recorded: RecordedStates | None = None,
) -> tuple[list[PromptGroup], dict[bytes, Tensor]]:
    """Keep the hidden states below the trained layers, in memory, with the reference's log-probabilities.

    The groups come back as they were where the states of the first or of the longest group do not give the same
    numbers: a model may treat long inputs in another way.
    """
    if find_processes().num_processes > 1:
        raise ValueError(
            "states are kept by a process for all prompts, got several processes: leave --cache-states out"
        )
    place = find_layers(reader.model)
    if place is not None and not count_frozen(place[2]):
        sys.stderr.write(
            f"all {len(place[2])} layers are trained, so no states are kept: --layers N, or --lora-layers N with LoRA, "
            "trains fewer\n"
        )
        return list(groups), reference.compute(reader, groups)
    compared = (groups[0].tokens, max((group.tokens for group in groups), key=lambda tokens: tokens.longest))
    for tokens in compared:
        if not reader.can_skip(tokens._replace(states=next(reader.record([tokens]))[1])):
            sys.stderr.write("the trained layers alone give other numbers than the whole model: no states are kept\n")
            return list(groups), reference.compute(reader, groups)
    values, with_states = {}, []
    for group, (logprobs, states) in (recorded or RecordedStates()).read(reader, groups):
        values[group.key] = logprobs.clone()
        with_states.append(replace(group, tokens=group.tokens._replace(states=states)))
    known = reference.load()
    if known is None:
        reference.save(values)
    return with_states, values if known is None else known


def hold_rollouts(
    reader: GroupReader, groups: Sequence[PromptGroup], reference: dict[bytes, Tensor]
) -> HeldOutRollouts | None:
    """Take the first held-out prompts and rollouts, as many as a check reads; None if no prompt is held out."""
    few = [group.take(range(min(ROLLOUTS, len(group.rewards)))) for group in groups[:PROMPTS]]
    if not few:
        return None
    targets = [group.rewards / group.beta - group.log_z for group in few]
    known = [reference[group.key][: len(group.rewards)] for group in few]
    samples = Samples([group.scores for group in few])
    return HeldOutRollouts(
        reader, [group.tokens for group in few], samples, targets, known, compute=share_log_probabilities
    )


def report_tokens(groups: Groups) -> None:
    """Print how many completions' text makes other tokens than were drawn, if any does."""
    if groups.as_drawn < 1:
        sys.stderr.write(
            f"{100 * (1 - groups.as_drawn):.2g} % of the completions make other tokens of their text than were drawn: "
            "the policy learns those that the text makes\n"
        )
