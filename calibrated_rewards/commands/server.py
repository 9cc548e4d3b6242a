"""The options that say what a reward model's server speaks, and the scorer that asks it."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calibrated_rewards.models.server_address import is_variable
from calibrated_rewards.scorers.ensemble import Cost

if TYPE_CHECKING:
    from calibrated_rewards.models.text import Text
    from calibrated_rewards.scorers.protocol import Scorer
    from calibrated_rewards.scorers.remote import Remote

SPOKEN = ("native", "vllm", "vllm-score", "openrlhf")
TOLD = (
    "a token for it, if it wants one, is read from the environment: CALIBRATED_REWARDS_TOKEN, and which server it is "
    "for, as in CALIBRATED_REWARDS_TOKEN_URL=http://rm:8000. '$NAME' is an environment variable that holds the URL"
)
# Options that say how a model is loaded here, and what they are if nothing is said.
LOADING: dict[str, Any] = {
    "kind": None,
    "option": [],
    "batch_tokens": None,
    "dtype": "auto",
    "device": None,
    "trust_remote_code": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--server and what it needs."""
    group = parser.add_argument_group("reward model that is a URL", TOLD)
    group.add_argument(
        "--server", choices=SPOKEN, help="what it speaks; native, this library's own, if nothing is said"
    )
    group.add_argument("--served-model", metavar="NAME", help="the name it is served under")
    group.add_argument("--tokenizer", metavar="PATH|ID", help="to render and cut text here (vllm, openrlhf)")


def is_url(model: str) -> bool:
    """Whether a reward model is a server."""
    return model.lower().startswith(("http://", "https://")) or is_variable(model)


def check_local(options: argparse.Namespace) -> None:
    """Refuse, for a model that is loaded here, what is only said of servers."""
    refuse(options, {"server": None, "served_model": None, "tokenizer": None}, "--reward-model is no URL")


def load(options: argparse.Namespace, text: "Text | None") -> "Remote":
    """The scorer that asks the server; the environment's token, if it is for that server."""
    from calibrated_rewards.models.server_address import token_for
    from calibrated_rewards.scorers.remote import Remote

    refuse(options, LOADING, "the server loads the model")
    return Remote(options.reward_model, dialect(options, text), token=token_for(options.reward_model))


def reach(scorer: "Scorer", prompt: Any, completion: Any) -> None:
    """Ask a server once, soon: one that is not there, or that refuses us, is no model that fails its checks."""
    try:
        from calibrated_rewards.scorers.remote import Refused, Remote
    except ImportError:
        return
    if isinstance(scorer, Cost):
        scorer = scorer.scorer
    if not isinstance(scorer, Remote):
        return
    try:
        replace(scorer, retries=min(scorer.retries, 1), show_progress=False)([prompt], [completion])
    except Refused:
        raise
    except ValueError:
        return  # it answers: what is wrong with its answers is for the checks to say


def dialect(options: argparse.Namespace, text: "Text | None") -> Any:
    """How the server is asked."""
    from calibrated_rewards.scorers.remote import Native, OpenRlhf
    from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore

    server = options.server or SPOKEN[0]
    if server.startswith("vllm") and not options.served_model:
        raise ValueError("vLLM asks for the name that a model is served under: say --served-model NAME")
    check_applicable(options, server, text)
    name = options.served_model or _name_in(options.reward_model)
    reading: dict[str, Any] = {} if text is None else {"text": text}
    if options.tokenizer:
        from transformers import AutoTokenizer

        reading["tokenizer"] = AutoTokenizer.from_pretrained(options.tokenizer, revision=options.revision)
    if server == "vllm":
        return Vllm(name, labels=options.label, **reading)
    if server == "openrlhf":
        return OpenRlhf(name, **reading)
    return VllmScore(name) if server == "vllm-score" else Native(name)


def _name_in(url: str) -> str:
    """What a model is called that only its url names."""
    from calibrated_rewards.models.server_address import HIDDEN, shown

    if HIDDEN in shown(url):
        raise ValueError(f"{shown(url)} may have a token in its path, so it names no model: say --served-model NAME")
    return shown(url)


def check_applicable(options: argparse.Namespace, server: str, text: "Text | None") -> None:
    """Refuse what would have no effect on a kind of server."""
    if server != "vllm":
        refuse(options, {"label": None}, f"--server {server} makes one score of them itself")
    if server not in ("vllm", "openrlhf"):
        if text is not None or options.tokenizer:
            raise ValueError(f"--server {server} renders text itself: no --tokenizer, --max-length, --chat-template")
    elif text is not None and not options.tokenizer:
        raise ValueError("--max-length and --chat-template need the reward model's tokenizer: say --tokenizer PATH|ID")
    if not options.tokenizer:
        refuse(options, {"revision": None}, "for a server, it is the revision of --tokenizer")


def refuse(options: argparse.Namespace, usual: dict[str, Any], why: str) -> None:
    """An error for the options that were said, though they have no effect."""
    said = [f"--{name.replace('_', '-')}" for name, value in usual.items() if getattr(options, name) != value]
    if said:
        raise ValueError(f"{', '.join(said)}: {why}, leave {'it' if len(said) == 1 else 'them'} out")
