"""The command line, `calibrated-rewards COMMAND ...`: finds the command's module, and turns errors into messages.

A sub-command is a module of `calibrated_rewards.cli` and a line below. The module is not imported before its
command is called, and imports what is heavy (torch, transformers) when it runs.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from calibrated_rewards import __version__
from calibrated_rewards.cli.errors import error_text, extras_of

COMMANDS = {
    "demo": "the whole machine on a real language model: calibrate, foresee, train, evaluate, report",
    "calibrate": "draw rollouts of the reference policy for each prompt, score them, and make the table of references",
    "frontier": "say what training for each reward would come to, by reweighting the rollouts of a calibration",
    "reward": "make the directory that trainers load: table, reward model and transform, verified",
    "serve": "answer a calibrated reward over HTTP, in the dialects of OpenRLHF, LightRFT, slime and LLaMA-Factory",
    "evaluate": "draw from policies and their reference, judge, and compare: win rates and KL, with their errors",
    "report": "one page of HTML that says what was calibrated, whether it is good, what was trained, what came out",
    "cp": "copy an adapter for a trainer to where it can be changed",
    "path": "say where an adapter for a trainer lies",
    "inspect": "show what a table holds: fingerprints, K, ties, saturation, error band, spread, suspicious prompts",
    "check-scorer": "check that a reward model scores alike on every path, cuts nothing silently, prefers good answers",
}

PASSED, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 130


class Command(Protocol):
    """A module of `calibrated_rewards.cli`."""

    EPILOG: str
    """What stands under its options: examples."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Its options."""

    def run(self, options: argparse.Namespace) -> int:
        """Does it; 0 if all is well, 1 if what was asked is answered with no."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 passed, 1 failed, 2 wrong usage or something that cannot be loaded."""
    chosen, rest = split(sys.argv[1:] if arguments is None else arguments)
    command = cast(Command, import_module(f"calibrated_rewards.cli.{chosen.replace('-', '_')}"))
    parser = argparse.ArgumentParser(
        prog=f"calibrated-rewards {chosen}",
        description=sentence(COMMANDS[chosen]),
        epilog=command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    options = parser.parse_args(rest)
    try:
        return command.run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        sys.stderr.write(f"\n{parser.prog}: stopped\n")
        return STOPPED
    except Exception as error:  # whatever went wrong is shown, without a traceback
        if options.debug:
            raise
        said = error_text(error, extras=extras_of(chosen, options))
        end = "\n" if "\n" in said else " "
        sys.stderr.write(f"{parser.prog}: error: {said}{end}(--debug shows where)\n")
        return UNUSABLE


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that is called, and what is said to it.

    >>> split(["check-scorer", "--reward-model", "my/model"])
    ('check-scorer', ['--reward-model', 'my/model'])
    """
    lines = [f"  {name:<14}{summary}" for name, summary in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="calibrated-rewards",
        description="Rewards calibrated against a reference policy, and transformed for the way the policy is served.",
        epilog="\n".join(
            ["commands:", *lines, "", "calibrated-rewards COMMAND --help tells the options, with examples."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=f"one of: {', '.join(COMMANDS)}")
    # What follows the command is the command's, --help too.
    own = next((i for i, word in enumerate(arguments, 1) if not word.startswith("-")), len(arguments))
    return parser.parse_args(arguments[:own]).command, list(arguments[own:])


def sentence(summary: str) -> str:
    """A summary as a sentence.

    >>> sentence("check that all is well")
    'Check that all is well.'
    """
    return f"{summary[:1].upper()}{summary[1:]}."
