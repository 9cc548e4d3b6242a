"""The options that say what a reward model's server speaks, and the scorer that asks it."""

import argparse
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrated_rewards.reading.text import Text
    from calibrated_rewards.scorers.remote import Remote

SPOKEN = ("native", "vllm", "vllm-score", "openrlhf")
TOKEN = "CALIBRATED_REWARDS_TOKEN"
TOLD = f"a token for it, if it wants one, is read from the environment: {TOKEN}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--server and what it needs."""
    group = parser.add_argument_group("reward model that is a URL", TOLD)
    group.add_argument("--server", choices=SPOKEN, default=SPOKEN[0], help="what it speaks; native: this library's own")
    group.add_argument("--served-model", metavar="NAME", help="the name it is served under")
    group.add_argument("--tokenizer", metavar="PATH|ID", help="to render and cut text here (vllm, openrlhf)")


def load(options: argparse.Namespace, text: "Text | None") -> "Remote":
    """The scorer that asks the server; a token for it is read from the environment."""
    from calibrated_rewards.scorers.remote import Remote

    return Remote(options.reward_model, dialect(options, text), token=os.environ.get(TOKEN))


def dialect(options: argparse.Namespace, text: "Text | None") -> Any:
    """How the server is asked."""
    from calibrated_rewards.scorers.remote_dialects import Native, OpenRlhf
    from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore

    if options.server.startswith("vllm") and not options.served_model:
        raise ValueError("vLLM asks for the name that a model is served under: say --served-model NAME")
    name = options.served_model or options.reward_model
    reading: dict[str, Any] = {} if text is None else {"text": text}
    if options.tokenizer:
        from transformers import AutoTokenizer

        reading["tokenizer"] = AutoTokenizer.from_pretrained(options.tokenizer, revision=options.revision)
    if options.server == "vllm":
        return Vllm(name, labels=options.label, **reading)
    if options.server == "openrlhf":
        return OpenRlhf(name, **reading)
    if reading:
        raise ValueError(
            f"--server {options.server} renders text itself: no --tokenizer, --max-length, --chat-template"
        )
    return VllmScore(name) if options.server == "vllm-score" else Native(name)
