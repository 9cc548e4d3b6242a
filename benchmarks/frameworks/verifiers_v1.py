"""Verifiers' own scoring with the adapter plugged in by configuration: tasks with and without ids, real traces."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

from subject import raised, report, subject
from verifiers.v1.configs.agent import AgentConfig
from verifiers.v1.task import Task, TaskConfig, TaskData
from verifiers.v1.trace import AgentInfo, MessageNode, Trace, TraceTask
from verifiers.v1.types import AssistantMessage

PLUGGED = {"calibrated": {"fn": "calibrated_rewards.adapters.verifiers_reward:reward", "weight": 1.0}}


class Row(TaskData):
    """A task with a field for the id."""

    uid: str | None = None


async def scored(data: Row, said: str) -> float:
    """The reward that the trace has in the end."""
    task = Task[Row, Any, TaskConfig](data, TaskConfig.model_validate({"rewards": PLUGGED}))
    node = MessageNode(message=AssistantMessage(content=said), sampled=True)
    given = TraceTask(type="Row", data=data, key=task.key, hash=task.hash)
    trace = Trace(task=given, agent=AgentInfo(config=AgentConfig()), nodes=[node])
    await task.score(trace)
    return float(trace.rewards["calibrated"].value)


def row(chat: Any, uid: str | None, *, as_messages: bool) -> Row:
    """System prompt and prompt apart, the prompt as a text or as messages."""
    system, *left = chat
    return Row(system_prompt=system["content"], prompt=left if as_messages else left[0]["content"], uid=uid)


async def all_of(asked: Any, ids: bool, as_messages: bool) -> list[float]:
    """All at once, as an environment's worker has them."""
    pairs = [(row(chat, uid if ids else None, as_messages=as_messages), said) for chat, said, uid in asked.pairs]
    return list(await asyncio.gather(*[scored(data, said) for data, said in pairs]))


def main() -> None:
    """Run it, and report how far each number is from what it should be."""
    asked = subject()
    worst = {}
    for ids in (True, False):
        for as_messages in (True, False):
            name = f"{'ids' if ids else 'no ids'}, {'messages' if as_messages else 'a text'}"
            worst[name] = asked.worst(asyncio.run(all_of(asked, ids, as_messages)))
    spaced = [f"  {said}\n" for said in asked.completions]
    from calibrated_rewards.reward.frameworks import configured

    wanted = configured().score(asked.chats, spaced, asked.ids).reward
    pairs = [(row(c, u, as_messages=True), s) for c, s, u in zip(asked.chats, spaced, asked.ids, strict=True)]

    async def with_space() -> list[float]:
        return list(await asyncio.gather(*[scored(data, said) for data, said in pairs]))

    worst["white space kept"] = max(abs(a - b) for a, b in zip(asyncio.run(with_space()), wanted, strict=True))
    unknown = raised(lambda: asyncio.run(scored(Row(prompt="Who?"), "I")))
    report(framework="verifiers", version=version("verifiers"), pairs=len(asked), worst=worst, unknown=unknown)


if __name__ == "__main__":
    main()
