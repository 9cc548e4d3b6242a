"""The Rubric of verifiers up to 0.1.14 with the adapter's group function, and what becomes of an unknown prompt."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

import verifiers as vf
from subject import report, subject

from calibrated_rewards.adapters.verifiers_reward import group


def state(chat: Any, said: str, uid: str | None) -> Any:
    """What a rollout leaves."""
    completion = [{"role": "assistant", "content": said}]
    given = {"prompt": chat, "completion": completion, "answer": "", "info": {"uid": uid} if uid else {}}
    return vf.State(**given, trajectory=[], task="t", timing={})


def main() -> None:
    """Run it, and report how far each number is from what it should be."""
    asked = subject()
    rubric = vf.Rubric(funcs=[group], weights=[1.0])
    worst = {}
    for name, pairs in (("ids", asked.pairs), ("no ids", [(chat, said, None) for chat, said, _ in asked.pairs])):
        states = [state(*pair) for pair in pairs]
        asyncio.run(rubric.score_group(states))
        worst[name] = asked.worst([each["reward"] for each in states])
    try:
        asyncio.run(rubric.score_group([state([{"role": "user", "content": "Who?"}], "I", None)]))
        unknown = None
    except SystemExit as error:
        unknown = f"SystemExit: {str(error)[:60]}"
    report(framework="verifiers, Rubric", version=version("verifiers"), pairs=len(asked), worst=worst, unknown=unknown)


if __name__ == "__main__":
    main()
