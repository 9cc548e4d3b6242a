"""`calibrated-rewards serve`: answer requests for a calibrated reward over HTTP."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from calibrated_rewards.cli.options import Real, Whole, add_trust_option, open_any_reward

EPILOG = """examples:
  calibrated-rewards serve reward/
  REWARD_TOKEN=$(openssl rand -hex 16) calibrated-rewards serve reward/ --host 0.0.0.0 --token-env REWARD_TOKEN
  curl -d '{"prompts": ["2+2="], "completions": ["4"]}' http://127.0.0.1:8900/score

The server answers the dialects of OpenRLHF, LightRFT, slime and LLaMA-Factory, and its own: docs/guides/serve.md shows
each request and answer.
Clients send the token as a header; those that cannot put it into the URL: http://HOST:PORT/t/TOKEN/get_reward. On
SIGTERM it accepts no more connections, answers the accepted requests, and exits with 0."""

# Each limit with its type, metavar and help; the defaults are those of server.Limits.
LIMITS: dict[str, tuple[str, Callable[[str], Any], str, str]] = {
    "max_batch": ("batch", Whole(1), "N", "completions scored at once (64)"),
    "max_queue": ("queue", Whole(1), "N", "completions that may wait; more are refused with 503 (8192)"),
    "max_pairs": ("pairs", Whole(1), "N", "completions in a request (1024)"),
    "max_body": ("body", Whole(1), "BYTES", "size of a request (16 MiB)"),
    "seconds": ("answer_seconds", Real(0.0, above=True), "S", "time for an answer; longer is refused with 504 (110)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command `serve`."""
    text = "a directory that `reward` or save_pretrained wrote, or a name on the Hugging Face Hub"
    parser.add_argument("reward", help=text)
    text = "the address to listen at (%(default)s, this machine only)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    text = "the port to listen at (%(default)s); 0 for any that is free"
    parser.add_argument("--port", type=Whole(0, 65_535), default=8900, help=text)
    parser.add_argument("--revision", help="a branch, tag or commit on the Hub")
    add_trust_option(parser)
    group = parser.add_argument_group("access")
    group.add_argument("--token-env", metavar="NAME", help="the environment variable that holds the token")
    group.add_argument("--insecure", action="store_true", help="need no token, although others can reach --host")
    group.add_argument(
        "--no-verify", action="store_true", help="do not score the table's probes before the first request"
    )
    group = parser.add_argument_group("limits")
    for name, (_, kind, metavar, text) in LIMITS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def run(options: argparse.Namespace) -> int:
    """Load the reward, verify it, and answer requests until stopped."""
    from calibrated_rewards.server import Limits, serve
    from calibrated_rewards.server.access import check_address

    values = {field: getattr(options, name) for name, (field, *_) in LIMITS.items()}
    limits = Limits(**{name: value for name, value in values.items() if value is not None})
    token = read_token(options.token_env)
    check_address(options.host, token, options.insecure)  # before a model is loaded
    serve(
        open_any_reward(options.reward, trust=options.trust_remote_code, revision=options.revision),
        options.host,
        options.port,
        token=token,
        insecure=options.insecure,
        limits=limits,
        verify=not options.no_verify,
    )
    return 0


def read_token(name: str | None) -> str | None:
    """Read the token from an environment variable: a command line shows it to everybody on the machine."""
    if name is None:
        return None
    if not os.environ.get(name):
        raise ValueError(f"--token-env needs an environment variable that holds the token, {name} is not set")
    return os.environ[name]
