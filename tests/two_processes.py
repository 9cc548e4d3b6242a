"""What tests/training/test_two_processes.py starts: a gradient, plain loops, TRL's, and commands of a file."""

import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import distributed

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.testing.suites import HashScorer
from calibrated_rewards.training import loop
from calibrated_rewards.training.online import GRPOSettings, PPOSettings, TRLSettings, grpo, ppo, train_rloo
from calibrated_rewards.training.run_folder import RunFolder


def same_gradient() -> None:
    """Two halves in two processes against all in one; completions that both draw from one seed."""
    policy = Policy(tiny.causal(), tiny.tokenizer(), Decoding(4), Text())
    torch.manual_seed(0)
    whole = loop.generate(policy, tiny.texts(4), 2)
    old, advantage = loop.compute_logprobs(policy.model, whole, 1.0, 8), torch.randn(8)
    settings = GRPOSettings(rows=3)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    processes, found = loop.find_processes(), []
    assert processes.num_processes == 2
    for rows in (list(range(8))[processes.process_index :: 2], list(range(8))):
        optimizer.zero_grad()
        grpo.accumulate_gradients(policy, whole.take(rows), old[rows], advantage[rows], settings)
        if len(rows) < 8:
            loop.average_gradients(optimizer)
        found.append(torch.cat([weight.grad.flatten() for weight in policy.model.parameters()]))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert found[0].abs().max() > 1e-3
    sys.stdout.write("the same gradient\n")


def one_model(model: Any) -> None:
    """Both processes have the same weights, which are not those of the start."""
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    distributed.all_gather(both, weights)
    assert torch.equal(*both)
    assert (weights - torch.cat([weight.flatten() for weight in tiny.causal().parameters()])).abs().max() > 1e-4


@dataclass(eq=False)
class Counted:
    """A reward that knows how many completions it was given, call by call."""

    reward: CalibratedReward
    sizes: list[int] = field(default_factory=list)
    __name__: str = "counted"

    def __call__(self, prompts: Any, completions: Any, **more: Any) -> Any:
        """The rewards."""
        self.sizes.append(len(completions))
        return self.reward(prompts, completions, **more)


def main(policy: str, out: Path, commands: Path) -> None:
    """Train in all ways; `commands` is a JSON list of command lines."""
    same_gradient()
    rng = np.random.default_rng(0)
    prompts = tiny.texts(4)
    reward = CalibratedReward(HashScorer(), ReferenceTable.build([(p, rng.normal(size=8)) for p in prompts]))
    asked = [Asked(prompt) for prompt in prompts]
    size = {"steps": 2, "prompts_a_step": 2, "completions": 2, "lr": 1e-2}
    for module, settings in ((grpo, GRPOSettings(**size)), (ppo, PPOSettings(**size))):
        folder = RunFolder(out / module.__name__.rpartition(".")[2])
        folder.out.mkdir(exist_ok=True)
        start = Policy(tiny.causal(), tiny.tokenizer(), Decoding(4), Text())
        one_model(module.train(start, reward, asked, settings, folder.add_to_log))
    rank = float(loop.find_processes().process_index)
    assert loop.average_metrics({"a": rank, "b": 3.0}) == {"a": 0.5, "b": 3.0}
    settings, counted = TRLSettings(**size, lora_rank=2), Counted(reward)
    train_rloo(policy, counted, asked, Decoding(4), settings, out / "train_rloo", show_progress=False)
    assert counted.sizes == [2, 2]  # half of each step's
    for words in json.loads(commands.read_text()):
        sys.argv = ["calibrated-rewards", *words]
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_module("calibrated_rewards", run_name="__main__")  # as `accelerate launch -m` does
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
