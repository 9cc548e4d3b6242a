"""The reward that the frameworks are asked for, and what it has to say: messages, their renderings and ids known."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from calibrated_rewards import CalibratedReward, Exponential, ReferenceTable
from calibrated_rewards.prompts import id_key
from calibrated_rewards.reward.find_prompts import Originals
from calibrated_rewards.reward.frameworks import PLACE, configured
from calibrated_rewards.reward.lookup import Scores
from calibrated_rewards.table.build import Row
from calibrated_rewards.testing.suites import HashScorer

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
END = "<|end|>"
PROMPTS, COMPLETIONS = 6, 4


def render(messages: Sequence[Any]) -> str:
    """What the chat template of tests/tiny.py makes of a prompt."""
    return "<s>" + "".join(f"<|{each['role']}|>{each['content']}{END}" for each in messages) + "<|assistant|>"


def tokenizer() -> Any:
    """That of tests/tiny.py, one token a byte; its template renders as `render` does."""
    sys.path.insert(0, str(ADAPTERS.parent / "tests"))
    from tiny import tokenizer as tiny

    made = tiny()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == render(chat)
    return made


@dataclass(frozen=True)
class Subject:
    """Pairs to be scored, and what the reward says of them when it is asked directly."""

    directory: str
    chats: list[Any]
    completions: list[str]
    ids: list[str]
    expected: Scores

    def __len__(self) -> int:
        return len(self.chats)

    @property
    def pairs(self) -> list[tuple[Any, str, str]]:
        """Messages, completion and id."""
        return list(zip(self.chats, self.completions, self.ids, strict=True))

    @property
    def details(self) -> dict[str, list[float]]:
        """What frameworks log."""
        wanted = self.expected
        return {"raw": wanted.raw.tolist(), "u": wanted.u.tolist(), "hit": [float(known) for known in wanted.known]}

    def worst(self, rewards: Any) -> float:
        """How far rewards are from what they should be."""
        return float(np.abs(np.asarray(rewards, np.float64) - np.asarray(self.expected.reward, np.float64)).max())


def subject(save_to: str | None = None) -> Subject:
    """A reward in a directory, which the environment variable names from now on.

    Its scorer minds every character of prompt and completion, so a rendering that is scored in place of the messages,
    or a special token that is left, shows.
    """
    directory = save_to or tempfile.mkdtemp()
    system = {"role": "system", "content": "Be brief."}
    chats = [[system, {"role": "user", "content": f"What is {n} + {n}?"}] for n in range(PROMPTS)]
    scorer = HashScorer()
    rows = [
        Row(chat, scorer([chat] * 16, [f"It is {k}." for k in range(16)]), [render(chat), id_key(f"p{n}")])
        for n, chat in enumerate(chats)
    ]
    probes = [{"prompt": chats[0], "completion": "It is 0.", "score": float(scorer([chats[0]], ["It is 0."])[0])}]
    table = ReferenceTable.build(rows, meta={"probes": probes})
    originals = Originals.write(f"{directory}/originals.jsonl", table, chats)
    reward = CalibratedReward(scorer, table, Exponential(5.0), originals=originals, id_column="uid", endings=(END,))
    reward.save_pretrained(f"{directory}/reward")
    os.environ[PLACE] = f"{directory}/reward"
    asked = [(chat, f"Let me think: {c}", f"p{n}") for n, chat in enumerate(chats) for c in range(COMPLETIONS)]
    prompts, completions, ids = (list(each) for each in zip(*asked, strict=True))
    return Subject(f"{directory}/reward", prompts, completions, ids, reward.score(prompts, completions))


@contextmanager
def served() -> Iterator[str]:
    """The reward server, and its address."""
    import uvicorn

    from calibrated_rewards.server.app import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(configured()), log_level="warning"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def report(**found: Any) -> None:
    """The last line that a script prints, which `run.py` reads."""
    print(json.dumps(found))


def raised(call: Callable[[], Any]) -> str | None:
    """What kind of error a call ends with."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (which one is the result)
        return type(error).__name__
    return None
