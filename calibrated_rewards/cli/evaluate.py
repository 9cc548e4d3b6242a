"""`calibrated-rewards evaluate`: what came of training, under the reward model and under a judge."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options as reward_model, policy_options as policy, saved_reward
from calibrated_rewards.cli.errors import Whole, folder
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.theory.procedures import BestOf, Procedure, Standard, WorstOf

if TYPE_CHECKING:
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.samplers.protocol import Sampler
    from calibrated_rewards.scorers.protocol import Scorer

EPILOG = """examples:
  calibrated-rewards evaluate --policy run/model --reference ./sft --prompts new.jsonl --reward reward/ \\
      --judge ./judge --out evaluation/
  calibrated-rewards evaluate --policy calibrated=run/model --policy raw=raw/model --reference ./sft \\
      --reward-model ./rm --judge ./judge --prompts new.jsonl --max-tokens 256 --best-of 16 --out evaluation/
  calibrated-rewards evaluate ... --reward-model ./toxicity --cost --judge ./judge      a model whose higher is worse
  calibrated-rewards evaluate ... --reward reward/ --judge ./toxicity --judge-cost       or a judge
  calibrated-rewards evaluate ... -m 64                 the same again with more completions: only what is missing
  calibrated-rewards evaluate ... --json | jq .policies[0].win_rates.judge

Prompts should be others than those of training. Best and worst of N are selected by the reward model, and each scorer
judges what was selected. A policy may be a PEFT adapter. Killed or stopped, the same command goes on where it was.
Exit code: 0 done, 2 wrong usage, or something that cannot be loaded or done, 130 stopped by Ctrl-C."""
# Of the command line, and of decoding.
DRAWING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    told = "What 'reference policy' and 'decoding' say below holds for every policy."
    group = parser.add_argument_group("evaluation", told)
    policy.add_arguments(parser, required=False)
    # --policy is here what was trained, once for each; what else is said of a policy, is said of the reference too.
    group.conflict_handler = "resolve"
    told = "what was trained: a model or a PEFT adapter; with a name, once for each of several"
    group.add_argument("--policy", action="append", required=True, metavar="[NAME=]PATH|ID|URL", help=told)
    group.add_argument("--reference", required=True, metavar="PATH|ID|URL", help="what it was trained from")
    told = "a CalibratedReward that was saved: its reward model, and its table's decoding"
    group.add_argument("--reward", type=Path, metavar="DIR", help=told)
    told = "a reward model that judges; loaded as the options under 'reward model' say"
    group.add_argument("--judge", metavar="PATH|ID|URL", help=told)
    told = "the judge's higher is worse; --cost is of the --reward-model alone"
    group.add_argument("--judge-cost", action=argparse.BooleanOptionalAction, default=None, help=told)
    group.add_argument("--out", type=folder, required=True, metavar="DIR", help="where everything is kept; go on there")
    group.add_argument("-m", "--m", type=Whole(1), default=32, help="completions of each prompt (%(default)s)")
    for name, what in (("best", "best"), ("worst", "worst")):
        told = f"the {what} of N, may be repeated (4)"
        group.add_argument(f"--{name}-of", type=Whole(1), action="append", metavar="N", help=told)
    group.add_argument("--select", metavar="NAME", help="the scorer that selects of N: the reward model")
    group.add_argument("--seed", type=int, default=1, help="another one than calibration's (%(default)s)")
    group.add_argument(
        "--prompts-per-shard", type=Whole(1), default=32, metavar="N", help="the unit of work (%(default)s)"
    )
    group.add_argument("--no-kl", action="store_true", help="do not read the completions again with both models")
    group.add_argument("--json", action="store_true", help="an object in place of tables")
    group.add_argument("--quiet", action="store_true", help="no progress")
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help="JSONL or what else calibrate reads")
    group.add_argument("--column", help="the column of the prompts, where it is not what TRL would read")
    group.add_argument("--split", help="of a dataset")
    group.add_argument("--limit", type=Whole(1), metavar="N", help="the first N prompts only")
    reward_model.add_arguments_of_reward_model(parser, several=True)


def run(options: argparse.Namespace) -> int:
    """Evaluate, and say what was found."""
    if not options.quiet:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out needs a folder, new or of an evaluation before, got the file {options.out}")
    from calibrated_rewards.evaluation.policies import evaluate

    reward = _reward(options)
    named = dict(map(_named, options.policy))
    if len(named) < len(options.policy):
        names = [_named(each)[0] for each in options.policy]  # an URL may hold a secret
        raise ValueError(f"of several, each --policy needs a name of its own, NAME=PATH; got {', '.join(names)}")
    drawing = _drawing(options, reward)
    samplers = Loading({name: argparse.Namespace(**{**drawing, "policy": place}) for name, place in named.items()})
    for name in samplers:
        _ = samplers[name]  # what cannot be loaded is an error now
    found = evaluate(
        samplers,
        policy.load(argparse.Namespace(**{**drawing, "policy": options.reference})),
        options.prompts,
        _scorers(options, reward),
        options.out,
        m=options.m,
        seed=options.seed,
        select=options.select,
        procedures=_procedures(options),
        divergence={} if options.no_kl else None,
        prompts_per_shard=options.prompts_per_shard,
        show_progress=not options.quiet,
        **{name: getattr(options, name) for name in ("column", "split", "limit")},
    )
    sys.stdout.write(f"{json.dumps(found.as_json(), indent=2) if options.json else found}\n")
    return 0


@dataclass(frozen=True)
class Loading(Mapping[str, "Sampler"]):
    """Policies that are loaded when they are asked for, so that the one before can be let go of."""

    options: Mapping[str, argparse.Namespace]

    def __getitem__(self, name: str) -> "Sampler":
        return policy.load(self.options[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.options)

    def __len__(self) -> int:
        return len(self.options)


def _named(given: str) -> tuple[str, str]:
    """A name and a place; a place alone may have a "=" in it.

    >>> _named("raw=runs/raw"), _named("./a=b/model")
    (('raw', 'runs/raw'), ('policy', './a=b/model'))
    """
    name, equals, place = given.partition("=")
    return (name, place) if equals and not any(letter in name for letter in "/:?\\") else ("policy", given)


def _reward(options: argparse.Namespace) -> "CalibratedReward | None":
    if options.reward is None:
        return None
    if options.reward_model:
        raise ValueError("--reward has its reward model, leave --reward-model out; another one may be the --judge")
    return saved_reward.open_reward(options.reward, trust=options.trust_remote_code)


def _scorers(options: argparse.Namespace, reward: "CalibratedReward | None") -> "dict[str, Scorer]":
    """By name, the one that selects first."""
    found: Any = {}
    if options.cost is not None and not options.reward_model:
        raise ValueError("--cost is of a --reward-model, there is none: of the judge say --judge-cost")
    if options.judge_cost is not None and not options.judge:
        raise ValueError("--judge-cost is of a --judge, there is none")
    if options.reward_model:
        several = reward_model.load_several(options)
        found = several if isinstance(several, dict) else {"reward": several}
    if reward is not None:
        if reward.scorer is None:
            raise ValueError(f"{options.reward} has no reward model of its own: say --reward-model in its place")
        found = {"reward": reward.scorer}
    if options.judge:
        if "judge" in found:
            raise ValueError("--judge is named judge, give the --reward-model of that name another one")
        judge = {**vars(options), "reward_model": options.judge, "cost": options.judge_cost}
        found["judge"] = reward_model.load_of_reward_model(argparse.Namespace(**judge))
    if not found:
        raise ValueError("an evaluation needs --reward DIR or --reward-model PATH|ID|URL, and better a --judge too")
    return dict(found)


def _drawing(options: argparse.Namespace, reward: "CalibratedReward | None") -> dict[str, Any]:
    """All options, with the decoding of the table where none was said."""
    said = vars(options)
    if options.max_tokens is not None or reward is None:
        policy.decoding(options)  # says it, if it lacks a number
        return said
    meta = reward.table.meta.get("sampler") or {}
    if "decoding" not in meta:
        raise ValueError(f"the table of {options.reward} does not say how it was drawn: say --max-tokens N, ...")
    drawn = {each.name: meta["decoding"][each.name] for each in fields(Decoding)}
    # JSON has lists.
    table = Decoding(**{**drawn, "stop": tuple(drawn["stop"]), "stop_token_ids": tuple(drawn["stop_token_ids"])})
    given = {name: tuple(said[name]) if name == "stop" else said[name] for name in DRAWING[1:]}
    plain = {name: getattr(Decoding(1), name) for name in given}
    if given != plain or table.stop_token_ids:
        raise ValueError("decoding is that of the table, or all of it is said: --max-tokens N too")
    return {**said, **{name: getattr(table, name) for name in DRAWING}}


def _procedures(options: argparse.Namespace) -> tuple[Procedure, ...]:
    best, worst = options.best_of or [4], options.worst_of or [4]
    return (Standard(), *map(BestOf, best), *map(WorstOf, worst))
