"""Check a policy while it trains, on rollouts of a calibration that it is not trained on; nothing is generated.

`HeldOutRollouts.load` reads rollouts and their scores and remembers the reference's log-probabilities of them; `check`
computes the policy's, by forward passes that read a prompt once for all of its completions, and estimates KL,
correlation with the target, effective sample size and win rates (`evaluation.held_out`). Both log-probabilities of a
ratio take the same route, batch by batch: in 16 bits two routes differ by some tenths of a nat a completion.

The command `train` has it as `--check-rollouts`; for a trainer of TRL's there is `callbacks.HeldOutCallback`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float32, Float64
from torch import Tensor

from calibrated_rewards.evaluation.estimates import Samples
from calibrated_rewards.evaluation.held_out import HeldOutCheck, check_log_ratios
from calibrated_rewards.evaluation.importance_weights import PolicyTooFarError
from calibrated_rewards.evaluation.references import choose_scorer, match_scorer
from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.parts import lock_of
from calibrated_rewards.prompts import Prompt, prompt_key
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy, tokenize_completion
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import check_count
from calibrated_rewards.training.check_settings.rules import read_decoding
from calibrated_rewards.training.launch import Inputs, Launch, check_policy
from calibrated_rewards.training.offline.frozen_layers import freeze_lower_layers
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.rollouts import PromptRollouts, iterate_rollouts

# Prompts, and rollouts of each, that are read for a check, unless it is told otherwise.
PROMPTS, ROLLOUTS = 64, 32


def load_check(launch: Launch, inputs: Inputs, settings: Any) -> "HeldOutRollouts | None":
    """Load the rollouts on which a run of the command is checked; None where the launch names none."""
    if launch.check_rollouts is None:
        if launch.judge is not None:
            raise ValueError(f"--judge is a scorer of --check-rollouts, got --judge {launch.judge} alone")
        return None
    check_count("--check-every", steps=launch.check_every)
    if not launch.any_policy:
        select = match_scorer(launch.check_rollouts, inputs.reward.table)
        check_policy(inputs.policy, load_table(launch.check_rollouts, select).meta)
    rollouts = HeldOutRollouts.load(
        launch.check_rollouts,
        inputs.reward,
        inputs.policy,
        trained_on=[each.prompt for each in inputs.prompts],
        beta=settings.beta,
        judge=launch.judge,
        prompts=launch.check_prompts,
        rows=settings.rows,
    )
    sys.stderr.write(f"a check every {launch.check_every} steps on {rollouts}\n")
    return rollouts


def compute_log_probabilities(reader: GroupReader, groups: Iterable[Group]) -> list[Float32[Tensor, " K"]]:
    """Compute the log-probabilities of all completions, without dropout or an autocast of a loop around it."""
    with _evaluation_mode(reader.model):
        return [values.float().cpu() for values in reader.read(groups)]


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    training = [part for part in model.modules() if part.training]
    with lock_of(model), torch.autocast(model.device.type, enabled=False):
        model.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True


@dataclass(frozen=True, eq=False)
class HeldOutRollouts:
    """Rollouts of held-out prompts with their scores, targets, and log-probabilities under the reference."""

    reader: GroupReader
    """Reads the model that is trained, as it is at the time."""
    groups: Sequence[Group]
    samples: Samples
    targets: Sequence[Float64[np.ndarray, " K"]]
    reference: Sequence[Float32[Tensor, " K"]]
    as_drawn: float = 1.0
    """The share of completions whose text makes as many tokens as were drawn."""
    layers: int = 0
    """The groups have the states below the last so many layers, if it is not 0."""
    compute: Callable[[GroupReader, Sequence[Group]], list[Tensor]] = compute_log_probabilities
    """The function that reads the groups; one that shares them out wants all processes to check at the same step."""

    @classmethod
    def load(
        cls,
        run: str | Path,
        reward: CalibratedReward,
        policy: Policy,
        *,
        trained_on: Sequence[Prompt] = (),
        beta: float | None = None,
        judge: str | None = None,
        prompts: int = PROMPTS,
        rollouts: int = ROLLOUTS,
        rows: int = 32,
        layers: int = 0,
    ) -> "HeldOutRollouts":
        """Read the first prompts of a calibration's directory that are not trained on, and so many rollouts of each.

        `policy` is the model that is going to be trained, still as the reference. `judge` names a second scorer of the
        rollouts; `beta` is the reward's by default. `rows` completions are read at once. Of policies that differ from
        this one in the last `layers` layers alone, those are read: the states below are kept in memory.
        """
        check_count("a held-out check", prompts=prompts, rollouts=rollouts, rows=rows)
        run, trained = Path(run), {prompt_key(prompt) for prompt in trained_on}
        select = match_scorer(run, reward.table)
        table = load_table(run, select)
        check_decoding(run, table, policy)
        reward = replace(reward, scorer=None, table=table, alarm=False, on_missing="raise")
        scorers = [select] if judge is None else [select, choose_scorer(run, judge)]
        streams = [iterate_rollouts(run, reward, select=scorer, beta=beta) for scorer in scorers]
        untrained = (rows for rows in zip(*streams, strict=True) if prompt_key(rows[0].prompt) not in trained)
        chosen = list(islice(untrained, prompts))
        if len(chosen) < 2:
            number = "1 of its prompts is" if chosen else "none of its prompts is"
            raise ValueError(
                f"a check needs 2 prompts or more of {run} that the run does not train on, and {number}: leave some "
                "out of the prompts to train on, or calibrate others"
            )
        return cls._read(chosen, policy, rollouts, rows, layers)

    @classmethod
    def _read(
        cls, chosen: Sequence[tuple[PromptRollouts, ...]], policy: Policy, most: int, rows: int, layers: int
    ) -> "HeldOutRollouts":
        openings = policy.check([each[0].prompt for each in chosen])
        groups, as_drawn = [], []
        for opening, (first, *_) in zip(openings, chosen, strict=True):
            pairs = [tokenize_completion(policy, rollout, first.prompt) for rollout in first.rollouts[:most]]
            groups.append(Group(opening, [ids for ids, _ in pairs]))
            as_drawn += [same for _, same in pairs]
        scores = [[each.scores[:most] for each in column] for column in zip(*chosen, strict=True)]
        targets = [each[0].log_ratios[:most] for each in chosen]
        reader = GroupReader(policy.model, policy.decoding.temperature, rows)
        if layers:
            freeze_lower_layers(policy.model, layers)
            with _evaluation_mode(policy.model):
                recorded = [*reader.record(groups)]
            groups = [group._replace(states=states) for group, (_, states) in zip(groups, recorded, strict=True)]
            reference = [logprobs.float().cpu() for logprobs, _ in recorded]
        else:
            reference = compute_log_probabilities(reader, groups)
        return cls(reader, groups, Samples(*scores), targets, reference, float(np.mean(as_drawn)), layers)

    def check(self) -> HeldOutCheck:
        """Estimate the policy as the model is now; it is left as it was, and no random number is drawn."""
        return check_log_ratios(self.compute_log_ratios(), self.samples, self.targets)

    def compute_log_ratios(self, model: Any = None) -> list[Float64[np.ndarray, " K"]]:
        """Compute the log-ratios to the reference: of the model as it is now, or of another one, of the same dtype."""
        own_rollouts = self if model is None else self.follow(model)
        pairs = zip(self.compute(own_rollouts.reader, own_rollouts.groups), self.reference, strict=True)
        log_ratios = [(own - ref).double().numpy() for own, ref in pairs]
        if not all(np.isfinite(each).all() for each in log_ratios):
            raise FloatingPointError("log-probabilities of the policy are finite numbers, got others: a smaller --lr")
        return log_ratios

    def measure(self) -> HeldOutCheck | None:
        """Check the policy; None, and a line that says so, if it is too far away for a check.

        A check is a look at a run, and must not end it.
        """
        try:
            return self.check()
        except PolicyTooFarError as error:
            if PartialState().is_main_process:
                sys.stderr.write(f"no held-out check, for the policy is too far from the reference: {error}\n")
            return None

    def follow(self, model: Any) -> "HeldOutRollouts":
        """Return the same rollouts, to check another model on: one that training begins with in place of the policy."""
        reader = GroupReader(model, self.reader.temperature, self.reader.rows)
        if not self.layers:
            return replace(self, reader=reader)
        freeze_lower_layers(model, self.layers)
        if reader.can_skip(self.groups[0]):
            return replace(self, reader=reader)
        return replace(self, reader=reader, groups=[group._replace(states=None) for group in self.groups], layers=0)

    def __str__(self) -> str:
        sizes, tokens = self.samples.sizes, sum(len(row) for group in self.groups for row in group.completions)
        text = f"{len(self.groups)} held-out prompts, {sizes.sum():,} rollouts of {tokens:,} tokens"
        if self.as_drawn == 1:
            return text
        return f"{text}; the text of {100 * (1 - self.as_drawn):.2g} % makes other tokens than were drawn"


def is_due(done: int, every: int, steps: int) -> bool:
    """Tell if a check is due after so many steps: after every k-th and the last.

    >>> [done for done in range(1, 8) if is_due(done, 3, 7)]
    [3, 6, 7]
    """
    return done % every == 0 or done == steps


def load_table(run: Path, select: str) -> ReferenceTable:
    """Load the table of a calibration's directory, of the scorer that a reward is trained for."""
    folder = next((each for each in (run, run / select) if (each / "table.json").is_file()), None)
    if folder is None:
        raise ValueError(f"{run} needs the table of {select!r}, got none: calibrate to the end")
    return ReferenceTable.load(folder)


def check_decoding(run: Path, table: ReferenceTable, policy: Policy) -> None:
    """Raise ValueError for rollouts that were drawn in another way than the policy draws."""
    recorded, decoding = read_decoding(table.meta) or {}, policy.decoding.fingerprint()
    for name in ("temperature", "max_tokens"):
        if recorded.get(name, decoding[name]) != decoding[name]:
            value = setting(name, str(decoding[name]))
            raise ValueError(Message(f"the rollouts of {run} were drawn with {name}={recorded[name]}, got {value}"))
