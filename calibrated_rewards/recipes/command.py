"""A recipe as a command: options from its settings, a log of its steps, and at the end what came of it."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from calibrated_rewards.recipes import opening
from calibrated_rewards.recipes.together import Together
from calibrated_rewards.table import UnknownPromptError

# What a user can do something about; the rest comes with its traceback.
TOLD = (ValueError, TypeError, OSError, ImportError, UnknownPromptError)
UNUSABLE, STOPPED = 2, 130
# Steps at the beginning and at the end that the last words are means of.
FEW = 10
TRANSFORM = "in place of the reward's: identity, log, exp:T, best-of:N:KL or worst-of:N:KL, with the beta for that KL"
METAVARS = {int: "N", float: "FLOAT"}


def main(
    doc: str,
    settings: type[Any],
    train: Callable[..., Any],
    arguments: Sequence[str] | None = None,
    run: Callable[..., None] | None = None,
) -> int:
    """Parse, run, tell: 0, or 2 and a line if something is wrong; `run` is that of a loop, if none is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, settings)
    if run is None:
        parser.add_argument("--force", action="store_true", help="write over what another run left in --out")
        parser.add_argument("--device", metavar="DEVICE", help="a GPU if there is one")
    options = parser.parse_args(arguments)
    try:
        (run or run_loop)(options, settings, train)
    except TOLD as error:
        if options.debug:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"{parser.prog}: error: {said} (--debug shows where)\n")
        return UNUSABLE
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: stopped; what there is is in {options.out}\n")
        return STOPPED
    return 0


def add_arguments(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """The options of a recipe: what it is made of, and a line for each of its settings."""
    parser.add_argument("--policy", required=True, metavar="PATH|ID", help="the policy that the table is of")
    parser.add_argument("--reward", required=True, metavar="DIR|ID", help="a CalibratedReward that was saved")
    parser.add_argument("--transform", type=opening.Named.of, metavar="NAME", help=TRANSFORM)
    parser.add_argument("--raw", action="store_true", help="train on the raw scores, not calibrated; wants --beta")
    parser.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help="JSONL or what else calibrate reads")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for model/ and log.jsonl")
    parser.add_argument("--column", metavar="NAME", help="the prompts' column, where it is not what TRL would read")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a completion; the table's, if nothing is said")
    parser.add_argument("--temperature", type=float, metavar="FLOAT", help="the table's, if nothing is said")
    told = "go on with another policy, or another way to draw, than the table's references are of"
    parser.add_argument("--any-policy", action="store_true", help=told)
    dtype = "(%(default)s) in bfloat16 small steps are rounded away"
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help=dtype)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    for each in fields(settings):
        _add(parser, each)


def _add(parser: argparse.ArgumentParser, each: Field[Any]) -> None:
    """The option of a setting."""
    if each.default is MISSING:
        raise TypeError(f"settings of a recipe have defaults, got {each.name} without one")
    name, choices, kind = f"--{each.name.replace('_', '-')}", each.metadata["choices"], type(each.default)
    shown: dict[str, Any] = {"choices": choices} if choices else {"metavar": METAVARS.get(kind, "TEXT")}
    default = f"the reward's, or {each.default}" if each.name == "beta" else each.default
    parser.add_argument(name, type=kind, help=f"{each.metadata['help']} ({default})", **shown)


def settings_of(options: argparse.Namespace, settings: type[Any], beta: float | None = None) -> Any:
    """The settings that were given, and for what beta the reward was made, if another one was not."""
    given = {each.name: getattr(options, each.name) for each in fields(settings)}
    if given.get("beta") is None and beta is not None:
        given["beta"] = beta
    return settings(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class LogFile:
    """A line of JSON for each step, written at once."""

    path: Path

    def __call__(self, row: Mapping[str, float]) -> None:
        """Write one."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_loop(options: argparse.Namespace, settings: type[Any], train: Callable[..., Any]) -> None:
    """Open, train, save: the model that came out, its tokenizer, and a line of log for each step."""
    log, model, together = options.out / "log.jsonl", options.out / "model", Together.here()
    if together.first and log.exists() and not options.force:
        raise FileExistsError(f"{log} is of another run: choose another --out, or --force to write over it")
    settings_of(options, settings)  # what is wrong with them is said before anything is loaded
    policy, reward, asked = opening.opened(options)
    policy.model.to(together.device(options.device))
    if together.first:
        options.out.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    trained = train(policy, reward, asked, settings_of(options, settings, reward.beta), LogFile(log))
    if together.first:
        trained.save_pretrained(model)
        policy.tokenizer.save_pretrained(model)
        tell(log, model)
    together.wait()


def tell(log: Path, model: Path) -> None:
    """What came of it, and where it is."""
    came = outcome([json.loads(line) for line in log.read_text().splitlines()])
    sys.stdout.write(f"{came}model: {model}\nlog: {log}\n")


def outcome(rows: Sequence[Mapping[str, float]]) -> str:
    """Mean reward, quantile, if there is one, and KL of the first steps and of the last.

    >>> print(outcome([{"step": i, "reward": i, "u": 0.5, "kl": 0.1 * i} for i in range(4)]))
    steps 0 to 1: reward 0.5, u 0.5, KL 0.05
    steps 2 to 3: reward 2.5, u 0.5, KL 0.25
    <BLANKLINE>
    """
    few = max(1, min(FEW, len(rows) // 2))
    ends = [rows[:few], rows[-few:]] if len(rows) > 1 else [rows][: len(rows)]
    return "".join(f"steps {end[0]['step']} to {end[-1]['step']}: {_means(end)}\n" for end in ends)


def _means(rows: Sequence[Mapping[str, float]]) -> str:
    shown = {"reward": "reward", "u": "u", "kl": "KL"}
    return ", ".join(
        f"{said} {sum(row[name] for row in rows) / len(rows):.4g}" for name, said in shown.items() if name in rows[0]
    )
