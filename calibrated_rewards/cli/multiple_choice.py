"""`calibrated-rewards multiple-choice`: answer questions by reward models and by log-probability, and compare."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.options import add_prompt_options, refuse_options

if TYPE_CHECKING:
    from calibrated_rewards.scorers.protocol import Scorer

EPILOG = """examples:
  calibrated-rewards multiple-choice --questions arc.jsonl --reward-model ./rm
  calibrated-rewards multiple-choice --questions arc.jsonl --reward-model head=./head --reward-model rm=./rm \\
      --policy ./sft --options choices --answer answerKey --json

A row has a prompt, a list of options, and the right one: its number from 0, its letter, or its text. The option with
the highest score is the answer; of n with the same score each counts 1/n. --policy answers by log-probability: the
mean over the tokens of an option, as completion of the prompt. Differences are paired by question, with 95 % intervals.
Exit code: 0 done, 2 wrong usage, or something that cannot be loaded or done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `multiple-choice`."""
    group = parser.add_argument_group("questions")
    text = "a JSONL, Parquet or CSV file, a saved dataset, or one on the Hub"
    group.add_argument("--questions", required=True, metavar="FILE|FOLDER|ID", help=text)
    group.add_argument("--options", default="choices", metavar="COLUMN", help="the column of options (%(default)s)")
    text = "the column of the right option (%(default)s)"
    group.add_argument("--answer", default="answer", metavar="COLUMN", help=text)
    add_prompt_options(group)
    group.add_argument("--json", action="store_true", help="print JSON in place of lines")
    text = "a language model that answers by log-probability, loaded with --dtype and --device"
    group.add_argument("--policy", metavar="PATH|ID", help=text)
    text = "the sum of an option's log-probabilities, which prefers short ones, in place of the mean"
    group.add_argument("--sum", action="store_true", help=text)
    model_options.add_reward_model_options(parser, several=True)


def run(options: argparse.Namespace) -> int:
    """Answer all questions and print how often each scorer is right."""
    from calibrated_rewards.evaluation.multiple_choice import answer_questions, read_questions

    source = {name: getattr(options, name) for name in ("options", "answer", "column", "split", "limit")}
    questions = [*read_questions(options.questions, **source)]
    if not questions:
        raise ValueError(f"{options.questions} has no questions")
    answers = answer_questions(questions, load_scorers(options))
    sys.stdout.write(f"{json.dumps(answers.as_json(), indent=2) if options.json else answers}\n")
    return 0


def load_scorers(options: argparse.Namespace) -> "dict[str, Scorer]":
    """Load the reward models, and the policy as a scorer by log-probability."""
    scorers: dict[str, Scorer] = {}
    if options.reward_model:
        loaded = model_options.load_reward_models(options)
        scorers |= loaded if isinstance(loaded, dict) else {"reward": loaded}
    if options.policy:
        from calibrated_rewards.scorers.loading import load_scorer

        if "log-probability" in scorers:
            raise ValueError("--policy is named log-probability, give the --reward-model of that name another one")
        scorers["log-probability"] = load_scorer(
            options.policy,
            kind="implicit",
            reference_free=True,
            beta=1.0,
            reduce="sum" if options.sum else "mean",
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    else:
        refuse_options(options, {"sum": False}, "it is of a --policy")
    if not scorers:
        raise ValueError("multiple choice needs --reward-model PATH|ID|URL, or --policy PATH|ID, or both")
    return scorers
