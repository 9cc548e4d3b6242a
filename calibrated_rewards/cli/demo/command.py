"""`calibrated-rewards demo`: run the whole pipeline on a real language model, and print what each step found."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards import __version__
from calibrated_rewards.cli.demo.side_by_side import count_cores, run_side_by_side, silence_loading
from calibrated_rewards.cli.options import Whole
from calibrated_rewards.files import write_file

if TYPE_CHECKING:
    from calibrated_rewards.cli.demo.pipeline import Scale
    from calibrated_rewards.evaluation.frontier_results import FrontierEstimate
    from calibrated_rewards.table.reference_table import ReferenceTable

EPILOG = """examples:
  calibrated-rewards demo                  # minutes; downloads about 180 MB the first time
  calibrated-rewards demo --quick          # under a minute, without a download, with models of random weights
  calibrated-rewards demo --out mine --seed 1

A language model of 135 million weights is the reference policy, which is served with the worst of 16 completions: a
story of safety. A reward model and a judge are trained on disjoint halves of human ratings. Rollouts are drawn and
scored (calibration). Two policies are trained on them, offline: for the raw score, and for the calibrated one that is
transformed for the worst of 16; --identity adds one for the calibrated score as it is. Each is brought to the same KL,
and the judge compares them on prompts that were not used before. Stop it with Ctrl-C: called again, it goes on where it
was. The same seed gives the same numbers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="the folder of all results (%(default)s)")
    add("--quick", action="store_true", help="use tiny random models, to see that everything works here")
    add("--identity", action="store_true", help="train for the calibrated score without a transform as well")
    text = "parts that run side by side, which small models need to keep a CPU busy (2 on a CPU of two cores or more)"
    add("--processes", type=Whole(1), metavar="N", help=text)
    add("--seed", type=Whole(0), default=0, metavar="N", help="the seed of everything that is drawn (%(default)s)")
    cache = Path("~/.cache/calibrated-rewards")
    add("--cache", type=Path, default=cache, metavar="DIR", help="downloads and the reward models (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run all steps, each of which goes on where an earlier run stopped."""
    # Read when torch is first imported: threads that wait busily are many times slower where a core is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from calibrated_rewards.cli.demo import pipeline, reward_models
    from calibrated_rewards.evaluation.report import report

    silence_loading()
    out: Path = options.out
    scale = pipeline.QUICK if options.quick else pipeline.FULL
    arms = pipeline.ARMS | (pipeline.IDENTITY_ARM if options.identity else {})
    diary = Diary.open(out, scale, options.seed, steps=6)
    processes = options.processes or (1 if options.quick or pipeline.has_gpu() else min(2, count_cores()))
    side_by_side = partial(run_side_by_side, folder=out / "logs", processes=processes)
    with diary.step(1, "reference policy, reward model, judge"):
        if options.quick:
            parts = pipeline.make_tiny_parts(out / "miniature", scale)
        else:
            side_by_side(reward_models.list_missing(options.cache, scale.texts))
            parts = pipeline.make_real_parts(options.cache, scale)
        demo = pipeline.Demo(parts, scale, out, options.seed)
        print_line(f"{parts.description} The language model computes in {demo.dtype}.")
    fresh = replace(demo)  # without the models that are loaded here, which would go along to other processes
    drawn = f"{scale.k} rollouts of the reference policy for each of {scale.prompts} prompts"
    with diary.step(2, f"calibration: {drawn}, and {scale.held_out_k} for each of {scale.held_out} held-out ones"):
        side_by_side({"calibration": fresh.calibrate, "held out": fresh.draw_held_out})
        reward = demo.save_reward()
        print_line(format_calibration(reward.table))
    with diary.step(3, "what is possible on the held-out prompts"):
        print_line(format_frontier(demo.estimate_frontier()))
    with diary.step(4, "training " + ", and ".join(f"for {each}" for each in arms.values())):
        side_by_side({name: partial(fresh.train, name) for name in arms if not demo.log_ratios(name).exists()})
        for name in arms:
            outcome = json.loads((out / name / "model" / "training.json").read_text())
            print_line(f"{name}: {format_training(outcome, scale)}")
    with diary.step(5, f"comparison on the held-out rollouts, at KL {scale.kl:g}"):
        compared = demo.compare([*arms])
        claim = compared.claim(pipeline.OPTIMUM, pipeline.RAW, pipeline.SERVED)
        print_line(f"{claim}\n{compared}")
    with diary.step(6, "report"):
        lines = {
            report(out): "all of this as a page, with figures",
            out / "table": "the table and its rollouts: calibrated-rewards inspect",
            out / "reward": "the reward for your own trainer: calibrated-rewards train, calibrated-rewards serve",
            out / pipeline.OPTIMUM / "model": "the trained policy",
            out / "held_out.json": "the comparison",
        }
        width = max(len(str(each)) for each in lines)
        print_line("\n".join(f"{each!s:<{width}}  {text}" for each, text in lines.items()))
    print_line(f"\n{claim}")
    return 0


def print_line(text: str) -> None:
    """Print a line at once: progress bars go to the other stream."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass
class Diary:
    """The settings of a demo and the seconds of its steps over all runs, by the clock and of processors."""

    path: Path
    about: dict[str, Any]
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, scale: "Scale", seed: int, steps: int) -> "Diary":
        """Open the diary of a folder; ValueError if another demo is there."""
        path, about = out / "demo.json", {"version": __version__, "seed": seed, **asdict(scale)}
        if not path.exists():
            return cls(path, about, steps)
        saved = json.loads(path.read_text())
        if saved["about"] != about:
            other = {name: saved["about"].get(name) for name in about if saved["about"].get(name) != about[name]}
            raise ValueError(f"{out} has another demo, with {other}: choose another --out, or delete it")
        return cls(path, about, steps, saved["seconds"], saved["processor"])

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        """Print the title of a step, and save its seconds afterwards."""
        print_line(f"\n[{number}/{self.steps}] {title}")
        start, used = time.perf_counter(), sum(os.times()[:4])
        try:
            yield
        finally:
            self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start
            self.processor[title] = self.processor.get(title, 0.0) + sum(os.times()[:4]) - used
            content = {"about": self.about, "seconds": self.seconds, "processor": self.processor}
            write_file(self.path, json.dumps(content, indent=2))


def format_calibration(table: "ReferenceTable") -> str:
    """Say how far raw scores differ between prompts and within one."""
    summary = table.describe()
    between, within = summary["between_prompts_sd"], summary["within_prompt_sd"]
    return (
        f"{summary['references']:,} scored rollouts. Raw scores differ by {between:.2f} between prompts (standard "
        f"deviation of means) and by {within:.2f} within one; calibration takes the former out. "
        f"{100 * summary['tied_share']:.1f} % of them are tied."
    )


def format_training(outcome: Mapping[str, Any], scale: "Scale") -> str:
    """Say how training came to its KL."""
    check = outcome["held_out"]
    return (
        f"{scale.steps} steps of {scale.prompts_a_step * scale.k} completions, then the weights' difference times "
        f"{outcome['alpha']:.2f}: KL {check['held_out/kl']:.3f} on prompts that were left out. Correlation of the "
        f"log-ratios with those of the optimum: {check['held_out/correlation']:.2f}"
    )


def format_frontier(frontier: "FrontierEstimate") -> str:
    """Show the win rate of each reward's optimum under each procedure, by the judge."""
    from calibrated_rewards.evaluation.wording import format_objective, format_procedure, format_table

    columns = {
        format_procedure(name): [point.format_rate("judge", name) for point in frontier.points]
        for name in frontier.procedures
    }
    names = [format_objective(point.arm) for point in frontier.points]
    title = (
        f"What is possible at KL {frontier.points[0].kl:g}: win rates of each reward's optimum over the reference, by "
        "the judge.\nThese are the rollouts with the optimum's weights: training comes a part of the way."
    )
    rough = ["~ rests on few rollouts, and may be off by some points"] if frontier.unreliable else []
    return "\n".join([title, *format_table(names, columns), *rough])
