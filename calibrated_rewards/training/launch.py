"""A recipe as a command: options from its settings, a log of its steps, and at the end what came of it."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from inspect import getfile
from pathlib import Path
from typing import Any

from calibrated_rewards.cli.errors import Real, Whole, error_text, folder
from calibrated_rewards.evaluation.expectations import expect_of
from calibrated_rewards.prompts import UnknownPromptError
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.theory.named import parse_transform
from calibrated_rewards.training import opening
from calibrated_rewards.training.run_folder import RunFolder, about
from calibrated_rewards.training.together import Together

# What a user can do something about; the rest comes with its traceback.
TOLD = (ValueError, TypeError, OSError, ImportError, UnknownPromptError)
UNUSABLE, STOPPED = 2, 130
# Steps at the beginning and at the end that the last words are means of.
FEW = 10
TRANSFORM = (
    "in place of the reward's: identity, log, exp:T; for a KL, with its beta: exp:T:KL, best-of:N:KL, worst-of:N:KL"
)
BETA = "the reward's, or {}; a --transform for a KL brings its own, which this one replaces"
DTYPES = ("float32", "bfloat16", "float16", "auto")
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
        parser.add_argument("--force", action="store_true", help="remove what another run left in --out")
        parser.add_argument("--device", metavar="DEVICE", help="a GPU if there is one")
    options = parser.parse_args(arguments)
    try:
        (run or run_loop)(options, settings, train)
    except TOLD as error:
        if options.debug:
            raise
        said = " ".join(error_text(error, "--{flag} {value}").split())
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
    parser.add_argument("--transform", type=parse_transform, metavar="NAME", help=TRANSFORM)
    parser.add_argument("--raw", action="store_true", help="train on the raw scores, not calibrated; wants --beta")
    parser.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help="JSONL or what else calibrate reads")
    parser.add_argument("--out", required=True, type=folder, metavar="DIR", help="for model/ and log.jsonl")
    parser.add_argument("--column", metavar="NAME", help="the prompts' column, where it is not what TRL would read")
    parser.add_argument("--max-tokens", type=Whole(1), metavar="N", help="of a completion; by default the table's")
    parser.add_argument("--temperature", type=Real(1e-4), metavar="FLOAT", help="the table's, if nothing is said")
    told = "go on with another policy, or another way to draw, than the table's references are of"
    parser.add_argument("--any-policy", action="store_true", help=told)
    dtype = "(%(default)s) in bfloat16 small steps are rounded away"
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=dtype)
    told = "run the code that the policy or the saved reward brings, and ask the servers that the reward names"
    parser.add_argument("--trust-remote-code", action="store_true", help=told)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    for each in fields(settings):
        _add(parser, each)


def _add(parser: argparse.ArgumentParser, each: Field[Any]) -> None:
    """The option of a setting."""
    if each.default is MISSING:
        raise TypeError(f"settings of a recipe have defaults, got {each.name} without one")
    name, choices, kind = f"--{each.name.replace('_', '-')}", each.metadata["choices"], type(each.default)
    shown: dict[str, Any] = {"choices": choices} if choices else {"metavar": METAVARS.get(kind, "TEXT")}
    default = BETA.format(each.default) if each.name == "beta" else each.default
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
    folder, together = RunFolder(options.out), Together.here()
    if together.first:
        check_free(folder, options)
    settings_of(options, settings)  # what is wrong with them is said before anything is loaded
    policy, reward, asked = opening.opened(options)
    policy.model.to(together.device(options.device))
    given = settings_of(options, settings, reward.beta)
    recipe = Path(getfile(settings)).stem  # under `python -m` its module has another name
    told = about(recipe, policy.model, reward, asked, policy.decoding, given, options.dtype)
    with folder.held(together.first):
        if together.first:
            check_free(folder, options)  # a run may have ended there since
            folder.empty()
            folder.describe(told)
            folder.log.touch()
        trained = train(policy, reward, asked, given, LogFile(folder.log))
        if together.first:
            trained.save_pretrained(folder.unfinished_model)
            policy.tokenizer.save_pretrained(folder.unfinished_model)
            folder.finish()
            tell(folder.log, folder.model, reward, given.beta)
    together.wait()


def check_free(folder: RunFolder, options: argparse.Namespace) -> None:
    """FileExistsError if a run is there that may not be removed: without --force none, and never the policy itself."""
    if folder.used is None:
        return
    if not options.force:
        raise FileExistsError(f"{folder.used} is of another run: choose another --out, or --force to remove it")
    if Path(options.policy).resolve().is_relative_to(folder.model.resolve()):
        raise FileExistsError(f"--policy is {folder.model}, which --force would remove: choose another --out")


def tell(log: Path, model: Path, reward: Any, beta: float) -> None:
    """What came of it, what the optimum would be, and where it is."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    sys.stdout.write(f"{outcome(rows)}{against_optimum(rows, reward, beta)}model: {model}\nlog: {log}\n")


def against_optimum(rows: Sequence[Mapping[str, float]], reward: Any, beta: float) -> str:
    """The KL at the optimum of a calibrated reward, on its table, and what to do if the last steps are far from it."""
    if not (isinstance(reward, CalibratedReward) and rows and beta > 0):
        return ""
    expected = expect_of(reward, beta=beta)
    if expected is None:
        return ""
    said = "".join(f"{line}\n" for line in expected.lines())
    least, most = sorted([expected.kl, expected.kl if expected.theory_kl is None else expected.theory_kl])
    last = _mean(_ends(rows)[-1], "kl")
    if last < least / 4:
        return f"{said}the last steps' KL, {last:.3g}, is far below that: more steps or a larger --lr\n"
    return f"{said}the last steps' KL, {last:.3g}, is far above that: a smaller --lr\n" if last > 2 * most else said


def outcome(rows: Sequence[Mapping[str, float]]) -> str:
    """Mean reward, quantile, if there is one, KL and objective of the first steps and of the last.

    >>> rows = [{"step": i, "reward": i, "u": 0.5, "kl": 0.1 * i, "objective": 0.9 * i} for i in range(4)]
    >>> print(outcome(rows), outcome(rows[:1]), sep="")
    steps 0 to 1: reward 0.5, u 0.5, KL 0.05, objective 0.45
    steps 2 to 3: reward 2.5, u 0.5, KL 0.25, objective 2.25
    step 0: reward 0, u 0.5, KL 0, objective 0
    <BLANKLINE>
    """
    return "".join(f"{_steps(end)}: {_means(end)}\n" for end in _ends(rows))


def _ends(rows: Sequence[Mapping[str, float]]) -> list[Sequence[Mapping[str, float]]]:
    few = max(1, min(FEW, len(rows) // 2))
    return [rows[:few], rows[-few:]] if len(rows) > 1 else [rows][: len(rows)]


def _steps(rows: Sequence[Mapping[str, float]]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _means(rows: Sequence[Mapping[str, float]]) -> str:
    shown = {"reward": "reward", "u": "u", "kl": "KL", "objective": "objective"}
    return ", ".join(f"{said} {_mean(rows, name):.4g}" for name, said in shown.items() if name in rows[0])


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
