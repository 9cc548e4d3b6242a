"""`calibrated-rewards train`: train a policy for a saved reward, with RLOO, GRPO, A2PO or PPO, or offline; or a head.

A run's own options are the fields of its settings, a frozen dataclass: their names, defaults and lines of help.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from calibrated_rewards.cli.option_files import has_flag, parse_options
from calibrated_rewards.cli.options import Real, Whole, missing_text, parse_folder
from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward.saving import NeedsTrust
from calibrated_rewards.theory.named import TRANSFORM_HELP, parse_transform

EPILOG = """trainers:
  rloo          TRL's RLOO, whose optimum is exact
  grpo          TRL's GRPO, whose optimum is close
  grpo --plain  GRPO in plain PyTorch, whose optimum is exact
  a2po          TRL's A*-PO, whose optimum is exact, without its first stage
  ppo           PPO in plain PyTorch, the paper's algorithm, whose optimum is exact
  offline       learns from the rollouts of the calibration by --loss; draws nothing and needs no reward model
  head          a reward head on the policy's own hidden states, from preferences: one model generates and scores

examples:
  calibrated-rewards train rloo --policy ./sft --reward reward/ --prompts prompts.jsonl --out run/
  calibrated-rewards train offline --policy ./sft --reward reward/ --rollouts table/ --kl 0.3 --out run/
  calibrated-rewards train head --policy ./sft --pairs preferences.jsonl --out head/
  calibrated-rewards train ppo --help
  accelerate launch --num_processes 4 -m calibrated_rewards train rloo ...

docs/guides/train.md says which to take."""

# Errors that a user can do something about; the others come with their traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError, UnknownPromptError, FloatingPointError)
STOPPED = 130
# A setting of a run that an error names, in the words of the command line.
OTHER_OPTION = "--{flag} {value}"
TRANSFORM = f"in place of the reward's: {TRANSFORM_HELP}; one for a KL brings its beta"
BETA = "the reward's, or {}; a --transform for a KL brings its own, which this one replaces"
DTYPES = ("float32", "bfloat16", "float16", "auto")
METAVARS = {int: "N", float: "FLOAT"}


@dataclass(frozen=True)
class Trainer:
    """A trainer by the names of its module, of its settings and of the function that runs it."""

    module: str
    settings: str
    function: str
    extras: tuple[str, ...] = ("hf",)
    draws: bool = True
    """Draws completions for prompts that are given; if not, it learns from rollouts that exist already."""
    plain: bool = False
    """A loop of ours in PyTorch, which begins anew instead of going on, on any device."""
    launch: str = "launch.Launch"
    """The class of the parts of a run."""

    def load(self) -> tuple[str, type[Any], Callable[..., None]]:
        """Import the trainer: its help, settings and function; ImportError names all libraries that are missing."""
        missing = missing_text({*self.extras})
        if missing is not None:
            raise ImportError(missing)
        module = import_module(f"calibrated_rewards.training.{self.module}")
        run: Any = module
        for name in self.function.split("."):
            run = getattr(run, name)
        return str(module.__doc__), getattr(module, self.settings), run

    def load_launch(self) -> type[Any]:
        """Import the class of the parts of a run."""
        module, _, name = self.launch.rpartition(".")
        return getattr(import_module(f"calibrated_rewards.training.{module}"), name)  # type: ignore[no-any-return]


TRL = ("hf", "trl", "calibrate")
TRAINERS = {
    "rloo": Trainer("online.trl", "TRLSettings", "train_rloo.run", TRL),
    "grpo": Trainer("online.trl", "TRLSettings", "train_grpo.run", TRL),
    "a2po": Trainer("online.a2po", "TRLSettings", "train_a2po.run", TRL),
    "grpo --plain": Trainer("online.grpo", "GRPOSettings", "run", plain=True),
    "ppo": Trainer("online.ppo", "PPOSettings", "run", plain=True),
    "offline": Trainer("offline.train", "OfflineSettings", "run", ("hf", "calibrate"), draws=False),
    "head": Trainer("head", "HeadTraining", "run", launch="head.HeadLaunch"),
}
NAMES = ("rloo", "grpo", "a2po", "ppo", "offline", "head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the trainer; its own options are read by `run`, because they come with the trainer's libraries."""
    parser.add_argument("trainer", choices=NAMES, metavar="TRAINER", help=f"one of: {', '.join(NAMES)}")
    rest = "the trainer's options, which calibrated-rewards train TRAINER --help lists"
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help=rest)


def run(options: argparse.Namespace) -> int:
    """Parse the trainer's options, which `cli.main` then sees as well, and train."""
    if options.trainer == "grpo" and asks_for_plain(options.words):
        options.trainer = "grpo --plain"
    trainer = TRAINERS[options.trainer]
    description, settings, train = trainer.load()

    parser = argparse.ArgumentParser(
        prog=f"calibrated-rewards train {options.trainer}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if options.trainer == "head":
        add_head_arguments(parser)
    else:
        add_launch_arguments(parser, trainer.draws)
    if options.trainer.startswith("grpo"):
        parser.add_argument("--plain", action="store_true", help="GRPO in plain PyTorch, with an exact optimum")
    for each in fields(settings):
        add_setting(parser, each)
    if trainer.plain:
        parser.add_argument("--force", action="store_true", help="remove what another run left in --out")
        start = "begin with this model, or adapter, trained from the policy; KL and table are still the policy's"
        parser.add_argument("--start", metavar="PATH|ID", help=start)
        parser.add_argument("--device", metavar="DEVICE", help="a GPU if there is one")
    parse_options(parser, options.words, options)
    try:
        # Wrong settings are refused before anything is loaded.
        train(launch=read_fields(options, trainer.load_launch()), settings=read_fields(options, settings))
    except NeedsTrust as error:
        raise ValueError(f"{error.reason}: read it, then allow it with --trust-remote-code") from None
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{parser.prog}: stopped; its files so far are in {options.out}\n")
        return STOPPED
    except Exception as error:
        # A traceback says where hours of training ended.
        options.debug = options.debug or not isinstance(error, EXPECTED)
        raise
    return 0


def asks_for_plain(words: Sequence[str]) -> bool:
    """Look for --plain, here or in the file of --config, before the options are known."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--config", type=Path)
    options = parser.parse_known_args(words)[0]
    return bool(options.plain) or (options.config is not None and has_flag(options.config, "plain"))


def add_launch_arguments(parser: argparse.ArgumentParser, draws: bool = True) -> None:
    """Add the options that all trainers have, the parts of a run, and those of trainers that draw or do not."""
    parser.add_argument("--policy", required=True, metavar="PATH|ID", help="the policy that the table is of")
    parser.add_argument("--reward", required=True, metavar="DIR|ID", help="a CalibratedReward that was saved")
    parser.add_argument("--transform", type=parse_transform, metavar="NAME", help=TRANSFORM)
    parser.add_argument("--raw", action="store_true", help="train on the raw scores, not calibrated; wants --beta")
    if draws:
        add_prompt_arguments(parser)
    else:
        rollouts = "the directory of the calibration that the reward's table was made in"
        parser.add_argument("--rollouts", required=True, type=Path, metavar="DIR", help=rollouts)
    parser.add_argument("--out", required=True, type=parse_folder, metavar="DIR", help="for model/ and log.jsonl")
    parser.add_argument("--max-tokens", type=Whole(1), metavar="N", help="of a completion; by default the table's")
    parser.add_argument("--temperature", type=Real(1e-4), metavar="FLOAT", help="by default the table's")
    any_policy = "go on with another policy, or another way to draw, than the table's references are of"
    parser.add_argument("--any-policy", action="store_true", help=any_policy)
    dtype = "(%(default)s) in bfloat16 small steps are rounded away"
    if not draws:
        dtype = "(%(default)s) with bfloat16 the trained weights are kept, and saved, in float32 as well"
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=dtype)
    trust = "run the code that the policy or the saved reward brings, and ask the servers that the reward names"
    add_tracker_arguments(parser, trust)


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the parts of a run that trains a reward head."""
    parser.add_argument("--policy", required=True, metavar="PATH|ID", help="the model that the head is put on")
    pairs = "preferences: JSONL or what else calibrate reads; task=FILE for several tasks"
    parser.add_argument("--pairs", required=True, nargs="+", metavar="FILE|FOLDER|ID", help=pairs)
    checked = "preferences to evaluate on, in place of a share of --pairs"
    parser.add_argument("--eval-pairs", nargs="+", metavar="FILE|FOLDER|ID", help=checked)
    templates = 'JSON of templates by task, as {"nli": {"prompt": "{premise} So: {claim}", "answers": ["yes", "no"]}}'
    parser.add_argument("--templates", type=Path, metavar="FILE", help=templates)
    parser.add_argument("--out", required=True, type=parse_folder, metavar="DIR", help="for model/ and log.jsonl")
    end = "the end-of-turn token at which the head reads; by default the chat template's, or EOS"
    parser.add_argument("--end-token", metavar="TOKEN", help=end)
    chat = "make a user's message of each prompt that is text, and render it with the policy's chat template"
    parser.add_argument("--chat", action="store_true", default=None, help=chat)
    dtype = "of the policy's weights (%(default)s); the head is in float32 in any case"
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=dtype)
    add_tracker_arguments(parser, "run the code that the policy brings")


def add_tracker_arguments(parser: argparse.ArgumentParser, trust: str) -> None:
    """Add the options that every trainer has: trackers, trust and tracebacks."""
    trackers = "send the metrics to trackio, wandb, tensorboard, mlflow, ...: what transformers knows and is installed"
    parser.add_argument("--report-to", nargs="+", metavar="NAME", help=trackers)
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of trainers that draw completions for prompts."""
    parser.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help="JSONL or what else calibrate reads")
    parser.add_argument("--column", metavar="NAME", help="the prompts' column, where it is not what TRL would read")
    ties = "leave out prompts of whose pairs of references more than this share tie; 1: those whose references all tie"
    parser.add_argument("--most-ties", type=Real(0.0, 1.0), metavar="SHARE", help=ties)
    spread = "leave out prompts whose references have a smaller standard deviation, in the reward model's unit"
    parser.add_argument("--least-spread", type=Real(0.0), metavar="SD", help=spread)
    check = "check the policy on rollouts of this calibration, of prompts that are not trained on, by forward passes"
    parser.add_argument("--check-rollouts", type=parse_folder, metavar="DIR", help=check)
    parser.add_argument("--check-every", type=Whole(1), metavar="N", help="steps from one check to the next (20)")
    parser.add_argument("--check-prompts", type=Whole(2), metavar="N", help="prompts of a check, at most (64)")
    judge = "a second scorer of the rollouts of --check-rollouts, for the win rates of the check"
    parser.add_argument("--judge", metavar="NAME", help=judge)


def add_setting(parser: argparse.ArgumentParser, field: Field[Any]) -> None:
    """Add the option of a setting; None, where it is not given, leaves the setting at its default."""
    if field.default is MISSING:
        raise TypeError(f"settings of a run have defaults, got {field.name} without one")
    name, choices, kind = f"--{field.name.replace('_', '-')}", field.metadata["choices"], type(field.default)
    if kind is bool:
        parser.add_argument(name, action="store_true", default=None, help=field.metadata["help"])
        return
    values: dict[str, Any] = {"choices": choices} if choices else {"metavar": METAVARS.get(kind, "TEXT")}
    default = BETA.format(field.default) if field.name == "beta" else field.default
    parser.add_argument(name, type=kind, help=f"{field.metadata['help']} ({default})", **values)


def read_fields(options: argparse.Namespace, settings: type[Any]) -> Any:
    """Fill a dataclass with the options of its fields' names; those that were not given stay at their defaults."""
    values = {each.name: getattr(options, each.name, None) for each in fields(settings)}
    return settings(**{name: value for name, value in values.items() if value is not None})
