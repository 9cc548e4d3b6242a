"""A demo from its beginning to its report, said aloud: what is done, how long it took, what the numbers say."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibrated_rewards import __version__
from calibrated_rewards.cli.demo.parts import Parts, Scale
from calibrated_rewards.cli.demo.pipeline import CALIBRATED, RAW, Demo, betas
from calibrated_rewards.evaluation.report.report import report
from calibrated_rewards.evaluation.responses import read_scores
from calibrated_rewards.evaluation.results import RELIABLE_ESS, Evaluation, FrontierEstimate, FrontierPoint
from calibrated_rewards.files import write_file
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.training.launch import outcome

STEPS = 7


@dataclass
class Diary:
    """What a demo is, and how long each of its steps has taken, over however many runs."""

    path: Path
    about: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, out: Path, scale: Scale, seed: int) -> "Diary":
        """That of a folder; ValueError if another demo is there."""
        path, about = out / "demo.json", {"version": __version__, "seed": seed, **asdict(scale)}
        if not path.exists():
            return cls(path, about)
        kept = json.loads(path.read_text())
        if kept["about"] != about:
            other = {name: kept["about"].get(name) for name in about if kept["about"].get(name) != about[name]}
            raise ValueError(f"{out} has another demo, with {other}: choose another --out, or delete it")
        return cls(path, about, kept["seconds"])

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        """One step, with its title above and its seconds below."""
        say(f"\n[{number}/{STEPS}] {title}")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start
            self.save()

    def save(self) -> None:
        """Write it down."""
        write_file(self.path, json.dumps({"about": self.about, "seconds": self.seconds}, indent=2))


def say(text: str) -> None:
    """A line, at once: bars go to the other stream."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show(make: Callable[[Scale], Parts], scale: Scale, out: Path, seed: int) -> Evaluation:
    """All of it, in `out`; what is there already is not done again."""
    diary = Diary.of(out, scale, seed)
    with diary.step(1, "reference policy, reward model, judge"):
        demo = Demo(make(scale), scale, out, seed)
        say(demo.parts.what)
    with diary.step(2, f"calibration: {scale.k} rollouts of the reference policy for each of {scale.prompts} prompts"):
        tables = demo.calibrate()
        reward = demo.reward(tables["reward"])
        say(calibrated(tables["reward"]))
    with diary.step(3, "the frontier without training: the rollouts, reweighted"):
        promised = demo.foresee(read_scores(out / "table", "reward", "judge"))
        say(foreseen(promised, scale))
    strengths = betas(promised, demo.choice, scale.kl)
    models = {}
    for number, name in enumerate((CALIBRATED, RAW), 4):
        with diary.step(number, f"training, {scale.steps} steps of RLOO: {TRAINED[name]}"):
            models[name] = demo.train(name, reward, strengths[name])
            say(trained(out / name / "log.jsonl"))
    with diary.step(6, f"evaluation: {scale.m} completions for each of {scale.held_out} prompts that nobody has seen"):
        found = demo.evaluate(models)
        say(f"{found}\n{reached(found, scale)}")
    with diary.step(7, "report"):
        say(where(out, report(out)))
    return found


TRAINED = {
    CALIBRATED: "the quantile among the rollouts, transformed for best-of-N",
    RAW: "the raw score, for comparison, at the beta whose optimum has the same KL on the rollouts",
}


def calibrated(table: ReferenceTable) -> str:
    """What the table shows of the reward model."""
    seen = table.describe()
    between, within = seen["between_prompts_sd"], seen["within_prompt_sd"]
    return (
        f"{seen['references']:,} scored rollouts. Raw scores differ by {between:.2f} between prompts (standard "
        f"deviation of means) and by {within:.2f} within one; calibration takes the former out. "
        f"{100 * seen['tied_share']:.1f} % of them are tied."
    )


def foreseen(found: FrontierEstimate, scale: Scale) -> str:
    """The best-of-N win rates that each reward comes to, by the judge, and which are above the raw one's."""
    procedure = repr(BestOf(scale.n))
    kls = sorted({point.kl for point in found.points})
    arms = list(dict.fromkeys(point.arm for point in found.points))
    at = {(point.arm, point.kl): point for point in found.points}
    lines = [
        f"What training for each reward comes to at best: best-of-{scale.n} win rate over the reference, by the judge",
        " " * 13 + "".join(f"  {f'at KL {kl:g}':<22}" for kl in kls),
    ]
    for arm in arms:
        cells = (_cell(at.get((arm, kl)), procedure) for kl in kls)
        lines.append(f"  {arm:<11}" + "".join(f"  {cell:<22}" for cell in cells))
    for kl in kls:
        better = [arm for arm in arms if (arm, kl) in at and at[arm, kl].verdict("judge", procedure) == "better"]
        lines.append(
            f"Above the raw score at KL {kl:g}, so far as these rollouts can tell: {', '.join(better) or 'none'}."
        )
    lines.append(f"~ rests on fewer than {RELIABLE_ESS} effective rollouts of a prompt, and may be off by .04 to .14.")
    return "\n".join(lines)


def _cell(point: FrontierPoint | None, procedure: str) -> str:
    few = point is not None and point.ess_of[procedure] < RELIABLE_ESS
    return "not reached" if point is None else f"{point.win_rates['judge'][procedure]}{'~' * few}"


def trained(log: Path) -> str:
    """The first steps of a run and the last, in words."""
    return outcome([json.loads(line) for line in log.read_text().splitlines()]).rstrip()


def reached(found: Evaluation, scale: Scale) -> str:
    """How far the policies went, which is part of every difference between them."""
    far = [f"{each.name} {each.kl.value:.2f}" for each in found.policies if each.kl is not None]
    return (
        f"KL reached: {', '.join(far)} nats, where both were to reach {scale.kl:g}. {scale.steps} steps are few:\n"
        "neither is at its optimum, and at unequal KL a difference is not the reward's alone;\n"
        "the frontier is at equal KL."
    )


def where(out: Path, page: Path) -> str:
    """Where everything is."""
    lines = {
        page: "all of this as a page, with figures and completions",
        out / "table": "the table and its rollouts: calibrated-rewards inspect",
        out / "reward": "the reward for your own trainer: CalibratedReward.from_pretrained, calibrated-rewards serve",
        out / CALIBRATED / "model": "the trained policy, a LoRA adapter",
        out / "evaluation": "what the policies wrote, and evaluation.json",
    }
    width = max(len(str(each)) for each in lines)
    return "\n".join(f"{each!s:<{width}}  {told}" for each, told in lines.items())
