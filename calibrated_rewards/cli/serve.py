"""`calibrated-rewards serve`: a calibrated reward over HTTP."""

import argparse
import os

from calibrated_rewards.cli import saved_reward
from calibrated_rewards.cli.errors import Real, Whole

EPILOG = """examples:
  calibrated-rewards serve reward/
  REWARD_TOKEN=$(openssl rand -hex 16) calibrated-rewards serve reward/ --host 0.0.0.0 --token-env REWARD_TOKEN
  curl -d '{"prompts": ["2+2="], "completions": ["4"]}' http://127.0.0.1:8900/score

It speaks the dialects of OpenRLHF, LightRFT, slime and LLaMA-Factory, and its own: docs/guides/serve.md shows each. The
token is sent as a header, or by clients that cannot in the URL: http://HOST:PORT/t/TOKEN/get_reward. On SIGTERM it
takes no more connections, answers what it has accepted, and exits with 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("reward", help="a directory that save_pretrained wrote, or a name on the Hugging Face Hub")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=Whole(0, 65_535), default=8900, help="8900; 0 for any that is free")
    parser.add_argument("--revision", help="of a reward on the Hub")
    saved_reward.add_argument(parser)
    group = parser.add_argument_group("who may ask")
    group.add_argument("--token-env", metavar="NAME", help="the environment variable that holds the token")
    group.add_argument("--insecure", action="store_true", help="no token, though others can reach --host")
    group.add_argument("--no-verify", action="store_true", help="do not score the table's probes first")
    group = parser.add_argument_group("limits")
    group.add_argument("--max-batch", type=Whole(1), metavar="N", help="completions that are scored at once: 64")
    group.add_argument("--max-queue", type=Whole(1), metavar="N", help="completions that wait, before 503: 8192")
    group.add_argument("--max-pairs", type=Whole(1), metavar="N", help="completions of a request: 1024")
    group.add_argument("--max-body", type=Whole(1), metavar="BYTES", help="of a request: 16 MiB")
    group.add_argument("--seconds", type=Real(0.0, above=True), metavar="S", help="for an answer, before 504: 110")


def run(options: argparse.Namespace) -> int:
    """Load the reward, verify it, and answer until told to stop."""
    from calibrated_rewards.server import Limits, serve
    from calibrated_rewards.server.access import check_address

    given = {
        "batch": options.max_batch,
        "queue": options.max_queue,
        "pairs": options.max_pairs,
        "body": options.max_body,
        "answer_seconds": options.seconds,
    }
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    token = token_of(options.token_env)
    check_address(options.host, token, options.insecure)  # before a model is loaded
    reward = saved_reward.open_reward(options.reward, trust=options.trust_remote_code, revision=options.revision)
    serve(
        reward,
        options.host,
        options.port,
        token=token,
        insecure=options.insecure,
        limits=limits,
        verify=not options.no_verify,
    )
    return 0


def token_of(name: str | None) -> str | None:
    """The token in an environment variable: on a command line, everybody on the machine could read it."""
    if name is None:
        return None
    if not os.environ.get(name):
        raise ValueError(f"--token-env needs an environment variable that holds the token, {name} is not set")
    return os.environ[name]
