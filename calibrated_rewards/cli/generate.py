"""`calibrated-rewards generate`: write completions of a policy, each the best of N by a reward model, to a file."""

import argparse
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.options import (
    Whole,
    add_prompt_options,
    open_any_reward,
    parse_best_of,
    parse_file,
    parse_rewind,
    parse_soft_best_of,
)
from calibrated_rewards.scorers.protocol import Loaded
from calibrated_rewards.theory.procedures import RewindAndRepeat, SoftBestOf, Standard, WorstOf

if TYPE_CHECKING:
    from calibrated_rewards.reward.combined import Reward
    from calibrated_rewards.samplers.completions_file import Written
    from calibrated_rewards.samplers.protocol import Decoding, Sampler
    from calibrated_rewards.scorers.protocol import Scorer

EPILOG = """examples:
  calibrated-rewards generate --policy run/model --prompts test.jsonl --max-tokens 256 --best-of 8 \\
      --reward-model ./rm --out answers.jsonl
  calibrated-rewards generate ... --best-of 8 --reward reward/ --out answers.jsonl     decoding as in calibration
  calibrated-rewards generate ... --worst-of 16 --reward-model ./safety --out attacks.jsonl
  calibrated-rewards generate ... --rewind 0.85:32 --reward reward/ --out answers.jsonl
  calibrated-rewards generate ... --soft-best-of 8:0.1 --reward reward/ --candidates --out answers.jsonl

A line of the file is {"prompt", "number", "completion", "tokens", "finish", "score", "draws", ...}. A run that was
stopped goes on when the same command is called again, and the file has the same bytes as if it had not been stopped.
The candidates of a prompt depend on the prompt and --seed alone. The best and the worst of N need no table: within a
prompt, the reward model orders as its calibrated reward does. --soft-best-of and --rewind look at quantiles: with
--reward the prompts have to be in its table. Exit code: 0 done, 2 wrong usage, or something that cannot be loaded or
done, 130 stopped by Ctrl-C."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--out", required=True, type=parse_file, metavar="FILE", help="the JSONL file to write, or to go on with")
    served = group.add_mutually_exclusive_group()
    text = "keep the best of N draws; 1-N draws a number up to N at random"
    served.add_argument("--best-of", type=parse_best_of, metavar="N", help=text)
    served.add_argument("--worst-of", type=Whole(1), metavar="N", help="keep the worst of N draws: an attacker's pick")
    text = "keep one of N in proportion to e^{score / T}; with --reward the score is the quantile"
    served.add_argument("--soft-best-of", type=parse_soft_best_of, metavar="N:T", help=text)
    text = "draw until the quantile reaches Q, at most TRIES times (32)"
    served.add_argument("--rewind", type=parse_rewind, metavar="Q[:TRIES]", help=text)
    add("--samples", type=Whole(1), default=1, metavar="M", help="completions to keep of each prompt (%(default)s)")
    add("--seed", type=int, default=0, help="the seed of all draws (%(default)s)")
    add("--candidates", action="store_true", help="write all candidates with their scores, not only the chosen one")
    text = "a saved reward, calibrated or combined, to choose by, in place of a --reward-model"
    add("--reward", metavar="DIR", help=text)
    text = "prompts that are drawn together, and that a crash loses (%(default)s)"
    add("--prompts-at-once", type=Whole(1), default=32, metavar="N", help=text)
    add("--quiet", action="store_true", help="show no progress")
    add("--json", action="store_true", help="print JSON in place of a sentence")
    group = parser.add_argument_group("prompts")
    text = "a JSONL, Parquet or text file, a saved dataset, or one on the Hub"
    group.add_argument("--prompts", required=True, metavar="FILE|FOLDER|ID", help=text)
    add_prompt_options(group)
    model_options.add_policy_options(parser, required=False)
    model_options.add_reward_model_options(parser, required=False)


def run(options: argparse.Namespace) -> int:
    """Draw, choose and write; print a line about it."""
    if not options.quiet:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    from calibrated_rewards.calibration.sources import prompts_from
    from calibrated_rewards.samplers.completions_file import write_completions

    if options.policy is None:
        raise ValueError("generate needs --policy PATH|ID|URL")
    procedure = choose_procedure(options)
    rows = [*prompts_from(options.prompts, **{name: getattr(options, name) for name in ("column", "split", "limit")})]
    if not rows:
        raise ValueError(f"{options.prompts} has no prompts")
    ids = [row.id for row in rows]
    reward = load_reward(options)
    sampler = model_options.load_policy(options, decoding=choose_decoding(options, reward))
    written = write_completions(
        options.out,
        [row.prompt for row in rows],
        rerank(sampler, choose_scorer(options, reward, procedure), procedure),
        ids=ids if any(each is not None for each in ids) else None,
        seed=options.seed,
        samples=options.samples,
        candidates=options.candidates,
        prompts_at_once=options.prompts_at_once,
        show_progress=not options.quiet,
    )
    sys.stdout.write(describe(written, procedure, options.json) + "\n")
    return 0


def choose_procedure(options: argparse.Namespace) -> Any:
    """Make the procedure that the options name; one draw if they name none."""
    worst = None if options.worst_of is None else WorstOf(options.worst_of)
    return options.best_of or worst or options.soft_best_of or options.rewind or Standard()


def load_reward(options: argparse.Namespace) -> "Reward | None":
    """Load the saved reward of --reward."""
    if options.reward is None:
        return None
    if options.reward_model:
        raise ValueError("--reward has its reward model, leave --reward-model out")
    return open_any_reward(options.reward, trust=options.trust_remote_code)


def choose_decoding(options: argparse.Namespace, reward: "Reward | None") -> "Decoding":
    """Choose the decoding that the options name, or that of the table of a calibrated reward."""
    from calibrated_rewards.cli import evaluate
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward

    return evaluate.choose_decoding(options, reward if isinstance(reward, CalibratedReward) else None)


def choose_scorer(options: argparse.Namespace, reward: "Reward | None", procedure: Any) -> "Scorer | None":
    """Choose what selects: the reward model, or, for procedures that compare quantiles, the calibrated reward."""
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.reward.quantiles import Quantiles

    if isinstance(procedure, Standard):
        if reward is None and not options.reward_model:
            return None
    elif reward is None and not options.reward_model:
        raise ValueError("choosing among draws needs --reward-model PATH|ID|URL, or --reward DIR")
    if reward is None:
        return model_options.load_reward_model(options)
    if not isinstance(reward, CalibratedReward):
        return reward
    if reward.scorer is None:
        raise ValueError(f"{options.reward} has no reward model of its own: say --reward-model in its place")
    return Quantiles(reward) if isinstance(procedure, SoftBestOf | RewindAndRepeat) else reward.scorer


def rerank(sampler: "Sampler", scorer: "Scorer | None", procedure: Any) -> "Sampler":
    """Make the sampler that chooses; the policy itself where there is nothing to choose by."""
    if scorer is None:
        return sampler
    from calibrated_rewards.samplers.reranking import Reranked

    return Reranked(share_with_head(sampler, scorer), scorer, procedure)


def share_with_head(sampler: "Sampler", scorer: "Scorer") -> "Sampler":
    """Let a policy write with the model of a preference head that reads the policy: one model in memory, free scores.

    The scorer may be one that gives the quantiles of a calibrated reward by such a head.
    """
    from calibrated_rewards.reward.quantiles import Quantiles

    if isinstance(scorer, Quantiles):
        scorer = scorer.reward.scorer or scorer
    if not isinstance(scorer, Loaded):
        return sampler
    from calibrated_rewards.samplers.loading import share_model

    return share_model(sampler, scorer)


def describe(written: "Written", procedure: Any, as_json: bool) -> str:
    """Write what came of it in a sentence, or as JSON."""
    if as_json:
        fields = {"out": str(written.path), "procedure": repr(procedure)}
        names = ("prompts", "completions", "before", "mean_score", "draws")
        return json.dumps({**fields, **{name: getattr(written, name) for name in names}}, indent=2)
    from calibrated_rewards.evaluation.wording import format_count, format_procedure

    chosen = "" if isinstance(procedure, Standard) else f", {format_procedure(procedure)}"
    score = "" if written.mean_score is None else f"; mean score {written.mean_score:.4g}"
    draws = "" if written.draws == written.completions else f" from {written.draws:,} draws"
    before = f" ({written.before:,} were there)" if written.before else ""
    many = f"{format_count(written.completions, 'completion')}{before} of {format_count(written.prompts, 'prompt')}"
    return f"{written.path}: {many}{chosen}{draws}{score}"
