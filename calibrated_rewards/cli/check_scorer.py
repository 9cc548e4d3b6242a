"""`calibrated-rewards check-scorer`: a line for each check as it is made, and how fast the model scores."""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options as reward_model, model_options as server
from calibrated_rewards.cli.errors import Real, Whole
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
Each check says ok, FAIL with what to do, or - where it does not apply. Differences are in standard deviations (sd) of
the model's scores. A model that is slow scores about 3,000 short pairs and 200 long ones; --spare-seconds is for more
places of long texts, more characters and larger calls (a fast function scores 20,000 pairs in half a second). The last
line counts the pairs that were scored. Exit code: 0 all well, 1 a check failed, 2 the model could not be loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    reward_model.add_arguments_of_reward_model(parser)
    group = parser.add_argument_group("checks")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="pairs of yours in place of the built-in ones"
    )
    group.add_argument(
        "--tolerance", type=Real(0.0), metavar="SD", help="how near is equal: 1e-4 sd; in 16 bits 0.25, rms"
    )
    group.add_argument("--no-sign", action="store_true", help="do not ask that good answers score above bad ones")
    group.add_argument("--no-prompt", action="store_true", help="the scorer is meant to read the completion alone")
    group.add_argument("--discrete", action="store_true", help="scores are grades or rules, and may tie")
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="ask with messages; if there is a template"
    )
    group.add_argument(
        "--may-ignore",
        action="append",
        metavar="WHAT",
        help='a difference that the scorer is meant not to see, as "digits" or "roles"; may be given several times',
    )
    group.add_argument(
        "--spare-seconds", type=Real(0), metavar="S", help="time for more than the least that is asked: 3"
    )
    group.add_argument(
        "--long-words", type=Whole(1), metavar="N", help="words of an input that should be too long: 6000"
    )


def run(options: argparse.Namespace) -> int:
    """Load the model, ask it everything, and say so line by line."""
    from calibrated_rewards.testing.check_scorer import CHECKS

    examination = asked(options)
    subject = examination.subject
    server.reach(subject.scorer, subject.pairs.prompts[0], subject.pairs.completions[0])
    say(examination.title)
    for line in told(subject.fingerprint):
        say(f"  {line}")
    statuses, findings = [], iter(examination)
    for check in CHECKS:
        with doing(check.name):
            finding = next(findings)
        say(str(finding))
        statuses.append(finding.status)
    failed = statuses.count("FAIL")
    if statuses[0] == "ok":
        say(speed(subject))
    if failed and subject.few_bits:
        say(f"  this was {', '.join(subject.few_bits)}: rerun with --dtype float32 to tell rounding from a fault")
    say(f"{statuses.count('ok')} ok, {failed} failed, {statuses.count('-')} not asked")
    return int(failed > 0)


def asked(options: argparse.Namespace) -> "Examination":
    """The model, and what it will be asked."""
    from calibrated_rewards.testing.check_scorer import LONG_WORDS, SPARE_SECONDS, Examination

    prompts, completions = read_pairs(options.prompts) if options.prompts else (None, None)
    return Examination(
        reward_model.load_of_reward_model(options),
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


def say(line: str) -> None:
    """A line of output, at once: checks of a large model take their time."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def doing(name: str) -> Iterator[None]:
    """What is being checked, where somebody watches; gone when it is done."""
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


def told(fingerprint: dict[str, Any]) -> list[str]:
    """What is worth knowing of a fingerprint: lines of `name: value`, long values cut.

    >>> told({"kind": "cost", "of": {"dtype": "float32", "text": {"max_length": 512, "template": "{{ x }}" * 99}}})
    ['kind: cost', 'dtype: float32', 'text: max_length=512, template=yes']
    """
    lines = []
    for name, value in fingerprint.items():
        if name == "text" and isinstance(value, dict):
            limit, template = value.get("max_length"), "yes" if value.get("template") else "no"
            lines.append(f"text: max_length={'none' if limit == 2**30 else limit}, template={template}")
        elif isinstance(value, dict):
            lines += told(value)
        else:
            shown = str(value)
            lines += [f"{name}: {shown if len(shown) <= 100 else shown[:97] + '...'}"] if value is not None else []
    return lines


def speed(subject: "Subject") -> str:
    """How many completions it scores in a second, all pairs in one call; and tokens, where the model shows them."""
    from calibrated_rewards.testing.check_inputs import ids_read

    with ids_read(subject.model) as batches:
        start = time.perf_counter()
        subject.score(subject.pairs)
        seconds = time.perf_counter() - start
    count, tokens = len(subject.pairs), sum(ids.numel() for ids in batches)
    read = f", {tokens / seconds:,.0f} tokens" if tokens else ""
    return f"  {count} completions in {seconds:.2f} s: {count / seconds:,.0f} completions{read} a second"


def read_pairs(file: Path) -> tuple[list[Any], list[Any]]:
    """Prompts and completions of a JSON Lines file."""
    prompts, completions = [], []
    # Not splitlines: JSON has U+2028 and others inside of its texts.
    for number, line in enumerate(reward_model.read_text(file, "--prompts").split("\n"), 1):
        if line.strip():
            prompt, several = pairs_in(line, f"line {number} of {file}")
            prompts += [prompt for _ in several]
            completions += several
    if len(prompts) < 2:
        raise ValueError(f"--prompts {file} needs two or more completions, got {len(prompts)}")
    return prompts, completions


def pairs_in(line: str, where: str) -> tuple[Any, list[Any]]:
    """The prompt of a line, and its completions."""
    row = parsed(line, where)
    several = row.get("completions", [row["completion"]] if "completion" in row else [])
    if "prompt" not in row or ("completion" in row) == ("completions" in row):
        raise ValueError(f'{where} needs a "prompt" and a "completion" or "completions", got {sorted(row)}')
    if not isinstance(several, list) or not several:
        raise ValueError(f'{where} needs a list of "completions", one or more, got {start_of(several)}')
    for name, said in (("prompt", row["prompt"]), *(("completion", one) for one in several)):
        if not isinstance(said, str | list):
            raise ValueError(f"{where} needs a {name} that is a text or a list of messages, got {start_of(said)}")
        try:
            to_plain(said)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} has no {name}: {error}") from error
    if row["prompt"] == []:
        raise ValueError(f"{where} needs a prompt of one or more messages, got an empty list")
    return row["prompt"], several


def parsed(line: str, where: str) -> dict[str, Any]:
    """A line that is a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where} needs an object with "prompt" and "completion", got {start_of(row)}')
    return row
