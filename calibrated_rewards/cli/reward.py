"""`calibrated-rewards reward`: save a table, its reward model and a transform as the directory that trainers load."""

import argparse
import sys

from calibrated_rewards.cli import model_options
from calibrated_rewards.cli.options import Real, parse_folder
from calibrated_rewards.theory.named import TRANSFORM_HELP, NamedTransform, parse_transform
from calibrated_rewards.theory.transforms import Identity

EPILOG = """examples:
  calibrated-rewards reward table/ --reward-model ./rm --transform exp:10 --out reward/
  calibrated-rewards reward table/ --reward-model ./rm --transform best-of:4:1.0 --out reward/
  calibrated-rewards reward table/ --reward-model http://rm:8000 --server vllm --served-model rm --out reward/
  calibrated-rewards reward table/safe --reward-model ./toxicity --cost --transform worst-of:4:1.0 --out safe/
  CALIBRATED_REWARD=reward/ trl rloo --reward_funcs calibrated_rewards.adapters.trl_reward.reward ...

If the transform names a KL, the command solves for the beta to train with, on this table, with its ties and its K
references per prompt. It prints the theory's values for scores without ties too, where they differ. A KL that the table
cannot reach is an error.

The reward model first scores the table's probes again, and must give the scores that it gave when the table was made.
The directory holds settings, table and prompts; of the reward model it holds only the place. Exit code: 0 written,
2 wrong usage, a reward model that is not the table's, or a table that cannot resolve the transform."""

ESTIMATORS = ("empirical", "posterior", "unbiased", "randomised")
SCALES = ("unit", "standard", "raw")
ON_MISSING = ("raise", "neutral", "skip")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command `reward`."""
    parser.add_argument("table", help="the folder of a table or of a run, or a name on the Hugging Face Hub")
    parser.add_argument("--out", type=parse_folder, required=True, metavar="DIR", help="the directory to write")
    parser.add_argument("--force", action="store_true", help="write over a reward that is there")
    add = parser.add_argument_group("reward").add_argument
    identity = NamedTransform("identity", Identity())
    add("--transform", type=parse_transform, default=identity, metavar="NAME", help=f"{TRANSFORM_HELP} (identity)")
    text = "how K references estimate a quantile (%(default)s)"
    add("--estimator", choices=ESTIMATORS, default="empirical", help=text)
    text = "the reward's scale: [0, 1], mean 0 and variance 1, or the transform as it is (%(default)s)"
    add("--scale", choices=SCALES, default="unit", help=text)
    text = "what to do with a prompt that has no references (%(default)s)"
    add("--on-missing", choices=ON_MISSING, default="raise", help=text)
    add("--id-column", metavar="NAME", help="the trainer's column with the prompt ids that the table knows")
    text = "a text to strip from the end of completions, such as <|im_end|>; may be repeated"
    add("--ending", action="append", default=[], metavar="TEXT", help=text)
    add("--name", help="the reward's name in a trainer's log")
    text = "largest difference of a probe's score, in standard deviations"
    add("--tolerance", type=Real(0.0), metavar="SD", help=text)
    add("--no-verify", action="store_true", help="do not score the table's probes again")
    model_options.add_reward_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Check the table, solve for beta, verify the reward model, write the directory and print what it holds."""
    from calibrated_rewards.evaluation.expectations import check_resolved, expect
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.table.reference_table import ReferenceTable
    from calibrated_rewards.theory.scale import scaled

    if (options.out / "reward.json").exists() and not options.force:
        raise FileExistsError(f"{options.out} is a calibrated reward already: --force writes over it")
    named: NamedTransform = options.transform
    table, transform = ReferenceTable.from_pretrained(options.table), scaled(named.transform, options.scale)
    settings = {"estimator": options.estimator, "name": named.name}
    check_resolved(table, transform, **settings)
    expected = named.kl and expect(table, transform, kl=named.kl, procedure=named.procedure, **settings)
    scorer = model_options.load_reward_model(options)
    if not options.no_verify:
        model_options.check_cost(f"the table {options.table}", table.meta.get("scorer"), scorer)
    reward = CalibratedReward(
        scorer,
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
    verified = None if options.no_verify else reward.verify(options.tolerance)
    reward.save_pretrained(options.out)
    lines = [f"{options.out}: {reward.__name__}, {len(reward.table)} prompts, {reward.transform!r}"]
    if expected:
        lines += [f"train with beta={expected.beta:.4g}", *expected.lines()]
    if verified is not None:
        lines.append(f"verified: {verified}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stderr.write(f"next: calibrated-rewards train rloo --reward {options.out} --help\n")
    return 0
