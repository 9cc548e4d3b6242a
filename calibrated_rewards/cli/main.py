"""The command `calibrated-rewards COMMAND ...`: import the command's module, run it, and turn errors into messages.

A command is a line in COMMANDS and a module, which is imported only when its command is called, and imports what is
heavy (torch, transformers) only when it runs.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

from calibrated_rewards import __version__
from calibrated_rewards.cli.option_files import parse_options
from calibrated_rewards.cli.options import NEEDED, error_text, find_extras, missing_text

# In the order in which a user needs them.
COMMANDS = {
    "demo": "run the whole pipeline on a real language model: calibrate, predict, train, evaluate, report",
    "check-scorer": "check that a reward model scores alike on every path, cuts nothing silently, prefers good answers",
    "calibrate": "make a table of reference scores: draw rollouts of the reference policy and score them",
    "inspect": "show a table: what it was made with, K, ties, saturation, error band, suspicious prompts",
    "recommend": "say which transform and beta to train with, what it buys, and whether K is enough",
    "frontier": "predict win rates and KL of training for each reward, by reweighting the rollouts of a calibration",
    "reward": "save table, reward model and transform, verified, as the directory that trainers load",
    "export": "write the rollouts of a calibration as a dataset: best completions, pairs, or all with weights",
    "train": "train a policy for a saved reward: RLOO, GRPO, A2PO or PPO online, or offline from the rollouts",
    "evaluate": "compare trained policies with their reference: win rates and KL, with their errors",
    "generate": "write completions of a policy to a file, each the best of N by a reward model, or the worst",
    "multiple-choice": "answer questions by reward models and by log-probability, and compare how often each is right",
    "best-at-n": "read the validation completions that verl or TRL dumped: unbiased best@N, worst@N and pass@N by step",
    "report": "write one HTML page about the calibration, the training and the evaluation",
    "serve": "answer requests for a reward over HTTP, in the dialects of OpenRLHF, LightRFT, slime and LLaMA-Factory",
    "push": "upload a table, with its rollouts, or a saved reward to the Hugging Face Hub, with a card",
    "path": "print where the adapter for a trainer lies",
    "cp": "copy the adapter for a trainer, to change it",
}
# Where a command is not the module of its name: a module, and an object in it.
PLACES = {"demo": "demo.command", "path": "adapters:PATH", "cp": "adapters:CP"}

PASSED, FAILED, UNUSABLE, STOPPED = 0, 1, 2, 130


@runtime_checkable
class Command(Protocol):
    """A module with a command, or an object that stands for one."""

    EPILOG: str
    """The text under the options: examples."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's options to a parser."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command; 0 if all is well, 1 if the answer is no."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 passed, 1 failed, 2 wrong usage or something that cannot be loaded, 130 stopped."""
    name, rest = split_arguments(sys.argv[1:] if arguments is None else arguments)
    command = load_command(name)
    summary = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"calibrated-rewards {name}",
        description=f"{summary[:1].upper()}{summary[1:]}.",
        epilog=command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # A command with a second parser for the rest of its words reads files of options there.
    has_own_parser = any(action.nargs == argparse.REMAINDER for action in parser._actions)
    options = parser.parse_args(rest) if has_own_parser else parse_options(parser, rest)
    try:
        if missing_text({*NEEDED.get(name, ())}):  # before any work is done, and all of them at once
            raise ImportError(missing_text(find_extras(name, options)))
        return command.run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        sys.stderr.write(f"\n{parser.prog}: stopped\n")
        return STOPPED
    except Exception as error:  # shown as a message, without a traceback
        if options.debug:
            raise
        # The form of a setting in an error, where a command has another one than --option NAME=VALUE.
        other = getattr(command, "OTHER_OPTION", "--option {name}={value}")
        message = error_text(error, other, extras=find_extras(name, options))
        end = "\n" if "\n" in message else " "
        sys.stderr.write(f"{parser.prog}: error: {message}{end}(--debug shows where)\n")
        return UNUSABLE


def load_command(name: str) -> Command:
    """Import the module of a command, or the object in it."""
    module, _, attribute = PLACES.get(name, name.replace("-", "_")).partition(":")
    loaded = import_module(f"calibrated_rewards.cli.{module}")
    return cast(Command, getattr(loaded, attribute) if attribute else loaded)


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command's name from its own arguments; without a name, list the commands and exit with 2.

    >>> split_arguments(["check-scorer", "--reward-model", "my/model"])
    ('check-scorer', ['--reward-model', 'my/model'])
    """
    lines = [f"  {name:<16}{summary}" for name, summary in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="calibrated-rewards",
        description="Calibrate a reward model against a reference policy, and transform it for best-of-N and others.",
        epilog="\n".join(
            [
                "commands, in the order of use:",
                *lines,
                "",
                "calibrated-rewards COMMAND --help shows options and examples.",
                "Each command reads its options from a YAML file too: --config FILE, which --save-config FILE writes.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(UNUSABLE)
    # What follows the command is the command's, --help too.
    end = next((i for i, word in enumerate(arguments, 1) if not word.startswith("-")), len(arguments))
    return parser.parse_args(arguments[:end]).command, list(arguments[end:])
