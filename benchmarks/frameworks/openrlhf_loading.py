"""OpenRLHF's own executor with the adapter's file: every completion in a coroutine of its own, and a prompt unknown."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor
from subject import ADAPTERS, END, Subject, render, report, served, subject, tokenizer

SETTINGS = SimpleNamespace(max_tokens=128, logprobs=None)


class Engine:
    """In place of vLLM: answers a prompt's tokens with the completion that is next for it."""

    def __init__(self, tokens: Any, said: str) -> None:
        self.tokens, self.said = tokens, said

    async def generate(self, prompt_tokens: list[int], *_: Any, **__: Any) -> Any:
        """What the executor reads of a RequestOutput."""
        ids = self.tokens(self.said + END, add_special_tokens=False).input_ids
        one = SimpleNamespace(token_ids=ids, text=self.said, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[one])


async def executed(executor: Any, pairs: list[tuple[Any, str, Any]], tokens: Any) -> list[dict[str, Any]]:
    """All of them at once."""
    return await asyncio.gather(
        *(
            executor.execute(prompt, label, SETTINGS, 4096, tokens, Engine(tokens, said))
            for prompt, said, label in pairs
        )
    )


def compared(asked: Subject, executor: Any, tokens: Any, way: str) -> dict[str, float]:
    """The worst difference of everything that OpenRLHF keeps, by what the label is."""
    worst: dict[str, float] = {}
    labels: dict[str, Any] = {"no label": lambda _: "", "the id": str, "a label with the id": lambda own: {"uid": own}}
    for how, label in labels.items():
        pairs = [(render(chat), said, label(own)) for chat, said, own in asked.pairs]
        given = asyncio.run(executed(executor, pairs, tokens))
        logged = {name: [torch.tensor(each["extra_logs"][name]).item() for each in given] for name in asked.details}
        found = {"rewards": [torch.as_tensor(each["reward"]).item() for each in given], **logged}
        found["scores"] = [each["scores"][0] for each in given]
        wanted = {"rewards": asked.expected.reward, **asked.details, "scores": asked.details["u"]}
        for name, values in found.items():
            worst[f"{name}, {way}, {how}"] = max(abs(a - b) for a, b in zip(values, wanted[name], strict=True))
    return worst


def main() -> None:
    """Compare, and report."""
    asked, tokens = subject(), tokenizer()
    file = SingleTurnAgentExecutor(f"{ADAPTERS}/openrlhf_reward.py")
    worst = compared(asked, file, tokens, "the file")
    with served() as url:
        worst |= compared(asked, SingleTurnAgentExecutor([f"{url}/get_reward"] * 2), tokens, "two addresses")
    heard: list[logging.LogRecord] = []
    ours = logging.getLogger("calibrated_rewards")
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    ours.addHandler(handler)
    ours.propagate = False
    unknown = asyncio.run(executed(file, [("<s><|user|>Who?<|assistant|>", "I", "")], tokens))[0]
    report(
        framework="OpenRLHF",
        version=version("openrlhf"),
        pairs=len(asked),
        worst=worst,
        unknown_prompt={"reward": unknown["reward"], "logged": [record.levelname for record in heard]},
    )


if __name__ == "__main__":
    main()
