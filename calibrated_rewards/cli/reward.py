"""`calibrated-rewards reward`: a table, its reward model and a transform, as the directory that trainers load."""

import argparse
import sys

from calibrated_rewards.cli import model_options as reward_model
from calibrated_rewards.cli.errors import Real, folder
from calibrated_rewards.theory.named import NamedTransform, parse_transform
from calibrated_rewards.theory.transforms import Identity

EPILOG = """examples:
  calibrated-rewards reward table/ --reward-model ./rm --transform exp:10 --out reward/
  calibrated-rewards reward table/ --reward-model ./rm --transform best-of:4:1.0 --out reward/
  calibrated-rewards reward table/ --reward-model http://rm:8000 --server vllm --served-model rm --out reward/
  calibrated-rewards reward table/safe --reward-model ./toxicity --cost --transform worst-of:4:1.0 --out safe/
  CALIBRATED_REWARD=reward/ trl rloo --reward_funcs calibrated_rewards.adapters.trl_reward.reward ...

With a KL, the beta to train with is solved for on the table, with its ties and its K references a prompt. Where the
theory of scores without ties says something else, both are printed. A KL that the table does not reach is an error.

The reward model is verified first: it scores the table's probes again, and has to give what it gave when the table was
made. The directory holds settings, table and prompts; of the reward model it holds where it is. Exit code: 0 written,
2 wrong usage, a reward model that is not the table's, or a table that cannot resolve the transform."""


ESTIMATORS = ("empirical", "posterior", "unbiased", "randomised")
SCALES = ("unit", "standard", "raw")
ON_MISSING = ("raise", "neutral", "skip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("table", help="the directory of a table or of a run, or a name on the Hugging Face Hub")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="the directory that is written")
    parser.add_argument("--force", action="store_true", help="write over a reward that is there")
    group = parser.add_argument_group("reward")
    group.add_argument(
        "--transform",
        type=parse_transform,
        default=NamedTransform("identity", Identity()),
        metavar="NAME",
        help="identity (none), log, exp:T, or with a KL in nats exp:T:KL; best-of:N:KL, worst-of:N:KL: the optimum",
    )
    group.add_argument(
        "--estimator", choices=ESTIMATORS, default="empirical", help="of quantiles, from K references (%(default)s)"
    )
    group.add_argument("--scale", choices=SCALES, default="unit", help="of the reward (%(default)s)")
    group.add_argument(
        "--on-missing", choices=ON_MISSING, default="raise", help="of a prompt without references (%(default)s)"
    )
    group.add_argument("--id-column", metavar="NAME", help="the trainer's column of the ids that the table knows")
    group.add_argument(
        "--ending", action="append", default=[], metavar="TEXT", help="taken off the end of completions: <|im_end|>"
    )
    group.add_argument("--name", help="what a trainer's log calls it")
    group.add_argument("--tolerance", type=Real(0.0), metavar="SD", help="of the probes, in standard deviations")
    group.add_argument("--no-verify", action="store_true", help="do not score the table's probes first")
    reward_model.add_arguments_of_reward_model(parser)


def run(options: argparse.Namespace) -> int:
    """Check, solve for beta, verify, write, and say what was written."""
    from calibrated_rewards.evaluation.expectations import check_resolved, expect
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.table.reference_table import ReferenceTable
    from calibrated_rewards.theory.transforms import scaled

    if (options.out / "reward.json").exists() and not options.force:
        raise FileExistsError(f"{options.out} is a calibrated reward already: --force writes over it")
    named: NamedTransform = options.transform
    table, trained = ReferenceTable.from_pretrained(options.table), scaled(named.transform, options.scale)
    settings = {"estimator": options.estimator, "name": named.name}
    check_resolved(table, trained, **settings)
    expected = named.kl and expect(table, trained, kl=named.kl, procedure=named.procedure, **settings)
    reward = CalibratedReward(
        reward_model.load_of_reward_model(options),
        table,
        named.transform,
        beta=expected.beta if expected else None,
        estimator=options.estimator,
        scale=options.scale,
        on_missing=options.on_missing,
        id_column=options.id_column,
        name=options.name,
        endings=tuple(options.ending),
    )
    if not options.no_verify:
        sys.stdout.write(f"verified: {reward.verify(options.tolerance)}\n")
    reward.save_pretrained(options.out)
    sys.stdout.write(f"{options.out}: {reward.__name__}, {len(reward.table)} prompts, {reward.transform!r}\n")
    if expected:
        sys.stdout.write("".join(f"{line}\n" for line in (f"train with beta={expected.beta:.4g}", *expected.lines())))
    sys.stderr.write(f"next: python -m calibrated_rewards.training.online.train_rloo --reward {options.out} --help\n")
    return 0
