"""`calibrated-rewards check-scorer`: print a line for each check of a reward model, and how fast it scores."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.options import Real, Whole, read_text
from calibrated_rewards.prompts import start_of
from calibrated_rewards.scorers.protocol import to_plain

if TYPE_CHECKING:
    from calibrated_rewards.testing.check_scorer import Examination
    from calibrated_rewards.testing.subject import Subject

EPILOG = """examples:
  calibrated-rewards check-scorer --reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B
  calibrated-rewards check-scorer --reward-model ./my-rm --max-length 4096 --prompts mine.jsonl
  calibrated-rewards check-scorer --reward-model ./stars --label expected:1,2,3,4,5
  calibrated-rewards check-scorer --reward-model ./toxicity --cost

A line of --prompts has a "prompt" and a "completion", or several "completions"; prompts are text or lists of messages.
The result of a check is ok, FAIL with what to do, or - where it does not apply. Differences are in standard deviations
(sd) of the model's scores. A slow model scores about 3,000 short pairs and 200 long ones; --spare-seconds is for more
places of long texts, more characters and larger calls (a fast function scores 20,000 pairs in half a second). The last
line counts the results. Exit code: 0 no check failed, 1 a check failed, 2 the model could not be loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check-scorer`."""
    model_options.add_reward_model_options(parser)
    add = parser.add_argument_group("checks").add_argument
    add("--prompts", type=Path, metavar="FILE.jsonl", help="your own pairs, in place of the built-in ones")
    text = "largest difference between equal scores: 1e-4 sd; in 16 bits 0.25 sd, root mean square"
    add("--tolerance", type=Real(0.0), metavar="SD", help=text)
    add("--no-sign", action="store_true", help="do not check that good answers score above bad ones")
    add("--no-prompt", action="store_true", help="the scorer is meant to read only the completion")
    add("--discrete", action="store_true", help="scores are grades or rules, and may tie")
    text = "use messages as prompts; default: if there is a chat template"
    add("--chat", action=argparse.BooleanOptionalAction, help=text)
    text = 'a difference that the scorer is meant to ignore, such as "digits" or "roles"; may be repeated'
    add("--may-ignore", action="append", metavar="WHAT", help=text)
    add("--spare-seconds", type=Real(0), metavar="S", help="seconds for more than the minimum of checks: 3")
    add("--long-words", type=Whole(1), metavar="N", help="words of an input that should be too long: 6000")


def run(options: argparse.Namespace) -> int:
    """Load the model, run all checks, and print a line for each."""
    from calibrated_rewards.testing.check_scorer import CHECKS

    examination = build_examination(options)
    subject = examination.subject
    model_options.check_server(subject.scorer, subject.pairs.prompts[0], subject.pairs.completions[0])
    print_line(examination.title)
    for line in format_fingerprint(subject.fingerprint):
        print_line(f"  {line}")
    statuses, findings = [], iter(examination)
    for check in CHECKS:
        with show_progress(check.name):
            finding = next(findings)
        print_line(str(finding))
        statuses.append(finding.status)
    failures = statuses.count("FAIL")
    if statuses[0] == "ok":
        print_line(measure_speed(subject))
    if failures and subject.few_bits:
        print_line(
            f"  this was {', '.join(subject.few_bits)}: rerun with --dtype float32 to tell rounding from a fault"
        )
    print_line(f"{statuses.count('ok')} ok, {failures} failed, {statuses.count('-')} not asked")
    return int(failures > 0)


def build_examination(options: argparse.Namespace) -> "Examination":
    """Load the model and build its examination."""
    from calibrated_rewards.testing.check_scorer import LONG_WORDS, SPARE_SECONDS, Examination

    prompts, completions = read_pairs(options.prompts) if options.prompts else (None, None)
    if (Path(options.reward_model) / "reward.json").is_file():
        raise ValueError(
            f"{options.reward_model} is a saved reward, which knows the prompts of its table alone: check its reward "
            "models, each as it was named to `calibrate`; `serve` and `reward` verify them against their tables"
        )
    return Examination(
        model_options.load_reward_model(options),
        prompts,
        completions,
        tolerance=options.tolerance,
        chat=options.chat,
        sign=not options.no_sign,
        discrete=options.discrete,
        reads_prompt=not options.no_prompt,
        long_words=options.long_words or LONG_WORDS,
        may_ignore=tuple(options.may_ignore or ()),
        spare_seconds=SPARE_SECONDS if options.spare_seconds is None else options.spare_seconds,
    )


def print_line(line: str) -> None:
    """Print a line at once: checks of a large model take their time."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def show_progress(name: str) -> Iterator[None]:
    """Show the check in progress on a terminal, and remove it afterwards."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(f"  ...   {name}\r")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\x1b[2K\r")
        sys.stderr.flush()


def format_fingerprint(fingerprint: dict[str, Any]) -> list[str]:
    """Format the settings of a fingerprint as lines, and cut long values.

    >>> text = {"max_length": 512, "template": "{{ x }}" * 99}
    >>> format_fingerprint({"kind": "cost", "of": {"dtype": "float32", "text": text}})
    ['kind: cost', 'dtype: float32', 'text: max_length=512, template=yes']
    """
    lines = []
    for name, value in fingerprint.items():
        if name == "text" and isinstance(value, dict):
            limit, template = value.get("max_length"), "yes" if value.get("template") else "no"
            lines.append(f"text: max_length={'none' if limit == 2**30 else limit}, template={template}")
        elif isinstance(value, dict):
            lines += format_fingerprint(value)
        elif value is not None:
            line = str(value)
            lines.append(f"{name}: {line if len(line) <= 100 else line[:97] + '...'}")
    return lines


def measure_speed(subject: "Subject") -> str:
    """Measure completions per second, all pairs in one call; and tokens, where the scorer shows its model."""
    from calibrated_rewards.testing.check_inputs import record_ids

    with record_ids(subject.model) as batches:
        start = time.perf_counter()
        subject.score(subject.pairs)
        seconds = time.perf_counter() - start
    count, tokens = len(subject.pairs), sum(ids.numel() for ids in batches)
    token_speed = f", {tokens / seconds:,.0f} tokens" if tokens else ""
    return f"  {count} completions in {seconds:.2f} s: {count / seconds:,.0f} completions{token_speed} a second"


def read_pairs(file: Path) -> tuple[list[Any], list[Any]]:
    """Read prompts and completions from a JSON Lines file."""
    prompts, completions = [], []
    # Not splitlines: JSON has U+2028 and others inside of its texts.
    for number, line in enumerate(read_text(file, "--prompts").split("\n"), 1):
        if line.strip():
            prompt, answers = parse_pairs(line, f"line {number} of {file}")
            prompts += [prompt for _ in answers]
            completions += answers
    if len(prompts) < 2:
        raise ValueError(f"--prompts {file} needs two or more completions, got {len(prompts)}")
    return prompts, completions


def parse_pairs(line: str, where: str) -> tuple[Any, list[Any]]:
    """Parse the prompt of a line and its completions."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where} needs an object with "prompt" and "completion", got {start_of(row)}')
    answers = row.get("completions", [row["completion"]] if "completion" in row else [])
    if "prompt" not in row or ("completion" in row) == ("completions" in row):
        raise ValueError(f'{where} needs a "prompt" and a "completion" or "completions", got {sorted(row)}')
    if not isinstance(answers, list) or not answers:
        raise ValueError(f'{where} needs a list of "completions", one or more, got {start_of(answers)}')
    for name, text in (("prompt", row["prompt"]), *(("completion", answer) for answer in answers)):
        if not isinstance(text, str | list):
            raise ValueError(f"{where} needs a {name} that is a text or a list of messages, got {start_of(text)}")
        try:
            to_plain(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} has no {name}: {error}") from error
    if row["prompt"] == []:
        raise ValueError(f"{where} needs a prompt of one or more messages, got an empty list")
    return row["prompt"], answers
