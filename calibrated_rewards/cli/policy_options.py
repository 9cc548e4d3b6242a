"""The options that name the reference policy and how it draws, and the sampler that they lead to."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options as reward_model, model_options as server
from calibrated_rewards.cli.errors import Real, Whole, error_text
from calibrated_rewards.samplers.protocol import Decoding

if TYPE_CHECKING:
    from calibrated_rewards.models.text import Text
    from calibrated_rewards.samplers.protocol import Sampler

ENGINES = ("hf", "continuous", "vllm", "openai")
TOLD = (
    "A token for it, if it wants one, is read from the environment: CALIBRATED_REWARDS_POLICY_TOKEN, and the server "
    "that it is for, as in CALIBRATED_REWARDS_POLICY_TOKEN_URL=http://host:8000; for OpenAI's own hosts OPENAI_API_KEY"
)
OPTION_HELP = (
    "what else the engine takes, such as --policy-option gpu_memory_utilization=0.8 or, of a server, concurrency=64; "
    "JSON, or text that is none"
)
# Options of a model that is loaded here, and of one that is served, and what they are if nothing is said.
LOADED: dict[str, Any] = {
    "policy_dtype": "auto",
    "policy_device": None,
    "policy_trust_remote_code": False,
}
SERVED: dict[str, Any] = {"policy_served_model": None, "policy_api": None}


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--policy, how it draws, and all that says how it is loaded."""
    group = parser.add_argument_group("reference policy")
    group.add_argument(
        "--policy", required=required, metavar="PATH|ID|URL", help="a folder, an id of the Hub, a server"
    )
    group.add_argument(
        "--engine", choices=ENGINES, help="what writes: hf, if nothing is said; of a URL, openai (any such server)"
    )
    group.add_argument(
        "--policy-dtype", default="auto", metavar="DTYPE", help="as --dtype, of the policy; auto: as saved"
    )
    group.add_argument("--policy-device", metavar="DEVICE", help="as --device, of the policy; a GPU if there is one")
    group.add_argument("--policy-revision", metavar="REVISION", help="a branch, tag or commit of the Hub")
    group.add_argument("--policy-tokenizer", metavar="PATH|ID", help="its tokenizer, where that is not beside it")
    group.add_argument(
        "--policy-chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the tokenizer's"
    )
    group.add_argument("--policy-trust-remote-code", action="store_true", help="run code that comes with the policy")
    group.add_argument(
        "--policy-option", action="append", default=[], type=reward_model.named, metavar="NAME=VALUE", help=OPTION_HELP
    )
    _add_served(parser)
    _add_decoding(parser, required)


def _add_served(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reference policy that is a URL", TOLD)
    group.add_argument("--policy-served-model", metavar="NAME", help="the name that it is served under")
    group.add_argument(
        "--policy-api",
        choices=("completions", "chat"),
        help="completions: text, or tokens by --policy-tokenizer (the default); chat: the server renders messages",
    )


def _add_decoding(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("decoding", "As in training: other settings are another policy.")
    group.add_argument(
        "--max-tokens", type=Whole(1), required=required, metavar="N", help="most tokens of a completion"
    )
    group.add_argument("--temperature", type=Real(1e-4), default=1.0, metavar="T", help="default: 1")
    group.add_argument("--top-p", type=Real(0.0, 1.0, above=True), default=1.0, metavar="P", help="default: 1, off")
    group.add_argument("--top-k", type=Whole(0), default=0, metavar="N", help="default: 0, off")
    group.add_argument("--min-p", type=Real(0.0, 1.0), default=0.0, metavar="P", help="default: 0, off")
    group.add_argument(
        "--repetition-penalty", type=Real(0.0, above=True), default=1.0, metavar="X", help="default: 1, off"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends a completion; may be repeated"
    )


def decoding(options: argparse.Namespace) -> Decoding:
    """How completions are drawn."""
    if options.max_tokens is None:
        raise ValueError(
            "sampling needs --max-tokens N, the most tokens of a completion: give the trainer's own number"
        )
    return Decoding(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=tuple(options.stop),
    )


def load(options: argparse.Namespace) -> "Sampler":
    """The sampler that the options name."""
    if options.policy is None:
        raise ValueError("sampling needs --policy PATH|ID|URL")
    drawing, url = decoding(options), server.is_url(options.policy)
    engine: Any = options.engine or ("openai" if url else "hf")
    if url != (engine == "openai"):
        raise ValueError(f"--engine openai and a URL belong together, got --policy {_shown(options)} --engine {engine}")
    return _served(options, drawing) if url else _loaded(options, engine, drawing)


def _loaded(options: argparse.Namespace, engine: Any, drawing: Decoding) -> "Sampler":
    server.refuse(options, SERVED, "--policy is no URL")
    if engine == "vllm":
        server.refuse(options, {"policy_device": None}, "vLLM takes the GPUs that it sees (CUDA_VISIBLE_DEVICES)")
    from calibrated_rewards.samplers.loading import load_sampler

    device = {} if options.policy_device is None else {"device": options.policy_device}
    reads_with = {} if options.policy_tokenizer is None else {"tokenizer": options.policy_tokenizer}
    try:
        return load_sampler(
            options.policy,
            drawing,
            engine=engine,
            text=_text(options),
            dtype=options.policy_dtype,
            revision=options.policy_revision,
            trust_remote_code=options.policy_trust_remote_code,
            **device,
            **reads_with,
            **dict(options.policy_option),
        )
    except TypeError as error:  # an option that the engine does not know
        raise TypeError(error_text(error, "--policy-option {name}={value}")) from error


def _served(options: argparse.Namespace, drawing: Decoding) -> "Sampler":
    server.refuse(options, LOADED, "the server loads the policy")
    if not options.policy_served_model:
        raise ValueError("a server asks for the name that a model is served under: say --policy-served-model NAME")
    reading: dict[str, Any] = {}
    if options.policy_tokenizer:
        from transformers import AutoTokenizer

        at = {} if options.policy_revision is None else {"revision": options.policy_revision}
        reading["tokenizer"] = AutoTokenizer.from_pretrained(options.policy_tokenizer, **at)
    else:
        server.refuse(options, {"policy_revision": None}, "for a server, it is the revision of --policy-tokenizer")
    if (text := _text(options)) is not None:
        reading["text"] = text
    from calibrated_rewards.samplers.openai import OpenAISampler

    api = options.policy_api or "completions"
    return OpenAISampler(
        options.policy, options.policy_served_model, drawing, api, **reading, **dict(options.policy_option)
    )


def _text(options: argparse.Namespace) -> "Text | None":
    """How prompts become tokens, if anything was said about it."""
    if options.policy_chat_template is None:
        return None
    from calibrated_rewards.models.text import Text

    return Text(template=reward_model.read_text(options.policy_chat_template, "--policy-chat-template"))


def _shown(options: argparse.Namespace) -> str:
    """Without what may be secret in a URL."""
    from calibrated_rewards.models.server_address import redact_url

    return redact_url(options.policy) if server.is_url(options.policy) else str(options.policy)
