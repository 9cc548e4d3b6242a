"""`calibrated-rewards evaluate`: measure win rates and KL of trained policies, by the reward model and by a judge."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.options import (
    Whole,
    add_prompt_options,
    add_run_options,
    open_reward,
    parse_best_of,
    split_name,
)
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.theory.procedures import BestOf, Standard, WorstOf

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
  calibrated-rewards evaluate ... --reward reward/ --judge ./toxicity --judge-cost      a judge whose higher is worse
  calibrated-rewards evaluate ... -m 64                 the same with more completions: only what is missing is drawn
  calibrated-rewards evaluate ... --json | jq .policies[0].win_rates.judge

Use other prompts than in training. The reward model selects the best and worst of N, and each scorer judges what was
selected. A policy may be a PEFT adapter. A run that was stopped goes on when the same command is called again.
Exit code: 0 done, 2 wrong usage, or something that cannot be loaded or done, 130 stopped by Ctrl-C."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    text = "What 'reference policy' and 'decoding' say below holds for every policy."
    group = parser.add_argument_group("evaluation", text)
    model_options.add_policy_options(parser, required=False)
    # Here --policy is a trained policy, and may be repeated; the other options of a policy hold for the reference too.
    group.conflict_handler = "resolve"
    add = group.add_argument
    text = "a trained policy: a model or a PEFT adapter; repeat it as NAME=PATH for several"
    add("--policy", action="append", required=True, metavar="[NAME=]PATH|ID|URL", help=text)
    add("--reference", required=True, metavar="PATH|ID|URL", help="the policy before training")
    text = "a saved CalibratedReward, for its reward model and its table's decoding"
    add("--reward", type=Path, metavar="DIR", help=text)
    text = "a reward model that judges, loaded by the options under 'reward model'"
    add("--judge", metavar="PATH|ID|URL", help=text)
    text = "the judge's higher is worse; --cost is for the --reward-model only"
    add("--judge-cost", action=argparse.BooleanOptionalAction, default=None, help=text)
    add_run_options(group)
    add("-m", "--m", type=Whole(1), default=32, help="completions per prompt (%(default)s)")
    text = "also compare the best of N, or of 1-N where N is not known; may be repeated (4)"
    add("--best-of", type=parse_best_of, action="append", metavar="N", help=text)
    text = "also compare the worst of N; may be repeated (4)"
    add("--worst-of", type=Whole(1), action="append", metavar="N", help=text)
    add("--select", metavar="NAME", help="the scorer that selects of N; default: the reward model")
    add("--seed", type=int, default=1, help="a seed other than calibration's (%(default)s)")
    add("--no-kl", action="store_true", help="leave out the KL, for which both models read the completions again")
    add("--json", action="store_true", help="print JSON in place of tables")
    group = parser.add_argument_group("prompts")
    text = "a JSONL, Parquet or text file, a saved dataset, or one on the Hub"
    group.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help=text)
    add_prompt_options(group)
    model_options.add_reward_model_options(parser, several=True)


def run(options: argparse.Namespace) -> int:
    """Evaluate all policies and print the comparison."""
    if not options.quiet:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out needs a folder, new or of an evaluation before, got the file {options.out}")
    from calibrated_rewards.evaluation.policies import evaluate

    reward = load_reward(options)
    places = [(name or "policy", place) for name, place in map(split_name, options.policy)]
    if len(dict(places)) < len(places):
        names = ", ".join(name for name, _ in places)  # a URL may hold a secret
        raise ValueError(f"of several, each --policy needs a name of its own, NAME=PATH; got {names}")
    decoding = choose_decoding(options, reward)
    samplers = Policies(options, dict(places), decoding)
    for name in samplers:
        _ = samplers[name]  # an error of loading is raised before anything is drawn
    evaluation = evaluate(
        samplers,
        model_options.load_policy(options, options.reference, decoding),
        options.prompts,
        load_scorers(options, reward),
        options.out,
        m=options.m,
        seed=options.seed,
        select=options.select,
        procedures=(Standard(), *(options.best_of or [BestOf(4)]), *map(WorstOf, options.worst_of or [4])),
        divergence={} if options.no_kl else None,
        prompts_per_shard=options.prompts_per_shard,
        show_progress=not options.quiet,
        **{name: getattr(options, name) for name in ("column", "split", "limit")},
    )
    sys.stdout.write(f"{json.dumps(evaluation.as_json(), indent=2) if options.json else evaluation}\n")
    return 0


@dataclass(frozen=True)
class Policies(Mapping[str, "Sampler"]):
    """Policies that are loaded at each access, so that one leaves memory before the next comes."""

    options: argparse.Namespace
    places: Mapping[str, str]
    decoding: Decoding

    def __getitem__(self, name: str) -> "Sampler":
        return model_options.load_policy(self.options, self.places[name], self.decoding)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def load_reward(options: argparse.Namespace) -> "CalibratedReward | None":
    """Load the saved reward of --reward."""
    if options.reward is None:
        return None
    if options.reward_model:
        raise ValueError("--reward has its reward model, leave --reward-model out; another one may be the --judge")
    return open_reward(options.reward, trust=options.trust_remote_code)


def load_scorers(options: argparse.Namespace, reward: "CalibratedReward | None") -> "dict[str, Scorer]":
    """Load reward models and judge by name, the one that selects first."""
    scorers: Any = {}
    if options.cost is not None and not options.reward_model:
        raise ValueError("--cost is of a --reward-model, there is none: of the judge say --judge-cost")
    if options.judge_cost is not None and not options.judge:
        raise ValueError("--judge-cost is of a --judge, there is none")
    if options.reward_model:
        loaded = model_options.load_reward_models(options)
        scorers = loaded if isinstance(loaded, dict) else {"reward": loaded}
    if reward is not None:
        if reward.scorer is None:
            raise ValueError(f"{options.reward} has no reward model of its own: say --reward-model in its place")
        scorers = {"reward": reward.scorer}
    if options.judge:
        if "judge" in scorers:
            raise ValueError("--judge is named judge, give the --reward-model of that name another one")
        judge = {**vars(options), "reward_model": options.judge, "cost": options.judge_cost}
        scorers["judge"] = model_options.load_reward_model(argparse.Namespace(**judge))
    if not scorers:
        raise ValueError("an evaluation needs --reward DIR or --reward-model PATH|ID|URL, and better a --judge too")
    return dict(scorers)


def choose_decoding(options: argparse.Namespace, reward: "CalibratedReward | None") -> Decoding:
    """Choose the decoding that the options name; if they name none, that of the reward's table."""
    if options.max_tokens is not None or reward is None:
        return model_options.build_decoding(options)
    from calibrated_rewards.training.check_settings.rules import restore_decoding

    decoding = restore_decoding(reward.table.meta, f"the table of {options.reward}", "say --max-tokens N, ...")
    said = model_options.build_decoding(argparse.Namespace(**{**vars(options), "max_tokens": 1}))
    if said != Decoding(1) or decoding.stop_token_ids:
        raise ValueError("decoding is that of the table, or all of it is said: --max-tokens N too")
    return decoding
