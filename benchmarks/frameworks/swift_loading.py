"""ms-swift's own plug-in import, registries and reward loop with the adapter: a function, and a model's plug-in."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from subject import ADAPTERS, render, report, subject, tokenizer
from swift.rewards import orms, rm_plugins
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func
from swift.rlhf_trainers.utils import resolve_reward_funcs
from swift.utils import import_external_file

from calibrated_rewards import CalibratedReward


class Template:
    """In place of ms-swift's template: the adapter hands rows on to it, and no more."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def encode(self, row: dict[str, Any]) -> list[int]:
        """Tokens of all messages."""
        text = render(row["messages"][:-1]) + row["messages"][-1]["content"]
        ids: list[int] = self.tokens(text, add_special_tokens=False).input_ids
        return ids

    def data_collator(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """Padded on the right."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[int(t < len(r)) for t in range(longest)] for r in rows]),
        }


def main() -> None:
    """Compare, and report."""
    asked, tokens = subject(), tokenizer()
    from tiny import classifier

    import_external_file(f"{ADAPTERS}/swift_reward.py")
    functions, names = resolve_reward_funcs(["calibrated"])
    samples = [
        GRPOSample(messages=[*chat, {"role": "assistant", "content": said}], extra={"uid": own, "solution": "x"})
        for chat, said, own in asked.pairs
    ]
    cpu, state = torch.device("cpu"), SimpleNamespace(global_step=0)
    given = compute_rewards_per_func(samples, functions, [None], cpu, trainer_state=state)
    worst = {"reward function (float32)": asked.worst(given[:, 0])}
    model, template = classifier(), Template(tokens)
    plugin = rm_plugins["calibrated"](model=model, template=template)
    given = compute_rewards_per_func(samples, [model], [plugin], cpu)
    raw = rm_plugins["default"](model=model, template=template)([sample.to_reward_row() for sample in samples])
    wanted = CalibratedReward.from_pretrained(asked.directory).from_scores(asked.chats, raw.numpy(), asked.ids)
    worst["reward model's plug-in (float32)"] = float(np.abs(given[:, 0].numpy() - wanted).max())
    assert orms["calibrated"] is sys.modules[type(functions[0]).__module__].Calibrated
    report(framework="ms-swift", version=version("ms-swift"), pairs=len(asked), logged_as=names, worst=worst)


if __name__ == "__main__":
    main()
