"""`calibrated-rewards demo`: run the whole pipeline on a real language model, and print what each step found."""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards import __version__
from calibrated_rewards.cli.options import Whole
from calibrated_rewards.files import write_file

if TYPE_CHECKING:
    from calibrated_rewards.cli.demo.pipeline import Scale
    from calibrated_rewards.evaluation.frontier_results import FrontierEstimate, FrontierPoint
    from calibrated_rewards.evaluation.results import Evaluation
    from calibrated_rewards.table.reference_table import ReferenceTable

EPILOG = """examples:
  calibrated-rewards demo                  # minutes; downloads about 180 MB the first time
  calibrated-rewards demo --quick          # under a minute, without a download, with models of random weights
  calibrated-rewards demo --out mine --seed 1

A language model of 135 million weights is the reference policy. A reward model and a judge are trained on disjoint
halves of human ratings. Rollouts are drawn and scored (calibration); what training would achieve is predicted (the
frontier); two policies are trained, one for the calibrated and transformed reward and one for the raw score; and the
judge evaluates both on prompts that were not used before. Stop it with Ctrl-C: called again, it goes on where it was.
The same seed gives the same numbers."""
STEPS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="the folder of all results (%(default)s)")
    add("--quick", action="store_true", help="use tiny random models, to see that everything works here")
    add("--seed", type=Whole(0), default=0, metavar="N", help="the seed of everything that is drawn (%(default)s)")
    cache = Path("~/.cache/calibrated-rewards")
    add("--cache", type=Path, default=cache, metavar="DIR", help="downloads and the reward models (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run all steps, each of which goes on where an earlier run stopped."""
    # Read when torch is first imported: threads that wait busily are many times slower where a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import transformers

    from calibrated_rewards.cli.demo import pipeline
    from calibrated_rewards.evaluation.references import read_scores
    from calibrated_rewards.evaluation.report import report
    from calibrated_rewards.training.launch import summarise_steps

    # The progress bars and reports of transformers are about many small loads; the demo has its own.
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it
    out: Path = options.out
    scale = pipeline.QUICK if options.quick else pipeline.FULL
    diary = Diary.open(out, scale, options.seed)
    with diary.step(1, "reference policy, reward model, judge"):
        parts = (
            pipeline.make_tiny_parts(out / "miniature", scale)
            if options.quick
            else pipeline.make_real_parts(options.cache, scale)
        )
        demo = pipeline.Demo(parts, scale, out, options.seed)
        print_line(parts.description)
    with diary.step(2, f"calibration: {scale.k} rollouts of the reference policy for each of {scale.prompts} prompts"):
        tables = demo.calibrate()
        reward = demo.save_reward(tables["reward"])
        print_line(format_calibration(tables["reward"]))
    with diary.step(3, "the frontier without training: the rollouts, reweighted"):
        frontier = demo.estimate_frontier(read_scores(out / "table", "reward", "judge"))
        print_line(format_frontier(frontier, scale))
    betas = pipeline.choose_betas(frontier, demo.choice, scale.kl)
    rewards = {
        pipeline.CALIBRATED: "the quantile among the rollouts, transformed for best-of-N",
        pipeline.RAW: "the raw score, for comparison, at the beta whose optimum has the same KL on the rollouts",
    }
    models = {}
    for number, (name, description) in enumerate(rewards.items(), 4):
        with diary.step(number, f"training, {scale.steps} steps of RLOO: {description}"):
            models[name] = demo.train(name, reward, betas[name])
            log = (out / name / "log.jsonl").read_text().splitlines()
            print_line(summarise_steps([json.loads(line) for line in log]).rstrip())
    with diary.step(6, f"evaluation: {scale.m} completions for each of {scale.held_out} prompts that nobody has seen"):
        evaluation = demo.evaluate(models)
        print_line(f"{evaluation}\n{format_kl(evaluation, scale)}")
    with diary.step(7, "report"):
        lines = {
            report(out): "all of this as a page, with figures and completions",
            out / "table": "the table and its rollouts: calibrated-rewards inspect",
            out / "reward": "the reward for your own trainer: calibrated-rewards train, calibrated-rewards serve",
            out / pipeline.CALIBRATED / "model": "the trained policy, a LoRA adapter",
            out / "evaluation": "what the policies wrote, and evaluation.json",
        }
        width = max(len(str(each)) for each in lines)
        print_line("\n".join(f"{each!s:<{width}}  {text}" for each, text in lines.items()))
    return 0


def print_line(text: str) -> None:
    """Print a line at once: progress bars go to the other stream."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass
class Diary:
    """The settings of a demo and the seconds of its steps over all runs, in demo.json."""

    path: Path
    about: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, scale: "Scale", seed: int) -> "Diary":
        """Open the diary of a folder; ValueError if another demo is there."""
        path, about = out / "demo.json", {"version": __version__, "seed": seed, **asdict(scale)}
        if not path.exists():
            return cls(path, about)
        saved = json.loads(path.read_text())
        if saved["about"] != about:
            other = {name: saved["about"].get(name) for name in about if saved["about"].get(name) != about[name]}
            raise ValueError(f"{out} has another demo, with {other}: choose another --out, or delete it")
        return cls(path, about, saved["seconds"])

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        """Print the title of a step, and save its seconds afterwards."""
        print_line(f"\n[{number}/{STEPS}] {title}")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start
            write_file(self.path, json.dumps({"about": self.about, "seconds": self.seconds}, indent=2))


def format_calibration(table: "ReferenceTable") -> str:
    """Say how far raw scores differ between prompts and within one."""
    summary = table.describe()
    between, within = summary["between_prompts_sd"], summary["within_prompt_sd"]
    return (
        f"{summary['references']:,} scored rollouts. Raw scores differ by {between:.2f} between prompts (standard "
        f"deviation of means) and by {within:.2f} within one; calibration takes the former out. "
        f"{100 * summary['tied_share']:.1f} % of them are tied."
    )


def format_frontier(frontier: "FrontierEstimate", scale: "Scale") -> str:
    """Say which rewards are above the raw one, then show the best-of-N win rate of each, by the judge."""
    from calibrated_rewards.evaluation.frontier_results import RELIABLE_ESS, mark_ess
    from calibrated_rewards.theory.procedures import BestOf

    procedure = repr(BestOf(scale.n))
    kls = sorted({point.kl for point in frontier.points})
    names = list(dict.fromkeys(point.arm for point in frontier.points))
    points = {(point.arm, point.kl): point for point in frontier.points}

    def format_cell(point: "FrontierPoint | None") -> str:
        return f"{point.win_rates['judge'][procedure]}{mark_ess(point.ess_of[procedure])}" if point else "not reached"

    lines = []
    for kl in kls:
        better = [
            name for name in names if (name, kl) in points and points[name, kl].verdict("judge", procedure) == "better"
        ]
        lines.append(
            f"Above the raw score at KL {kl:g}, so far as these rollouts can tell: {', '.join(better) or 'none'}."
        )
    lines += [
        f"What training for each reward achieves at best: best-of-{scale.n} win rate over the reference, by the judge",
        " " * 13 + "".join(f"  {f'at KL {kl:g}':<22}" for kl in kls),
    ]
    for name in names:
        lines.append(f"  {name:<11}" + "".join(f"  {format_cell(points.get((name, kl))):<22}" for kl in kls))
    lines.append(f"~ rests on fewer than {RELIABLE_ESS} effective rollouts of a prompt, and may be off by .04 to .14.")
    return "\n".join(lines)


def format_kl(evaluation: "Evaluation", scale: "Scale") -> str:
    """Say which KL the policies reached, which is a part of every difference between them."""
    kls = [f"{each.name} {each.kl.value:.2f}" for each in evaluation.policies if each.kl is not None]
    return (
        f"KL reached: {', '.join(kls)} nats, where both were to reach {scale.kl:g}. {scale.steps} steps are few:\n"
        "neither is at its optimum, and at unequal KL a difference is not the reward's alone;\n"
        "the frontier is at equal KL."
    )
