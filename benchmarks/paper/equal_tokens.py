"""Figures 6 and 10: CTRL against GRPO at equal generated completions, those of calibration among them.

    python benchmarks/paper/equal_tokens.py                # goes on where it was; one core, some minutes
    python benchmarks/paper/equal_tokens.py --quick OUT    # two small budgets, a few seeds; results in the folder OUT

In the exact world, tabular policies (benchmarks/tabular/online.py) are trained on a budget of completions of each
prompt. CTRL spends K of them on the reference policy, to calibrate; what is left is drawn in training, in groups. GRPO
and RLOO on the raw score draw all of them in training. KL and win rates of what comes out are enumerated. Every method
is trained at several beta, and its win rate is read at one KL, as the paper's figures are. For each budget and
procedure a method has the best of several rates, chosen on seeds that are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tabular"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "proof"))
import matplotlib.pyplot as plt
from online import LENGTH, LETTERS, Array, Runs, Task, _places, enumerable
from scipy.stats import ttest_ind
from shares import average
from tqdm import tqdm
from world import PROMPTS, TRANSFORMS, World, save

from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.table.reference_table import ReferenceTable

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
# What a figure shows: the KL at which its win rates are read, and CTRL's transforms for it, the optimum first.
PROCEDURES = {
    "Standard()": (0.5, ("identity",)),
    "BestOf(n=4)": (0.5, ("best of 4", "identity")),
    "WorstOf(n=4)": (0.25, ("worst of 4", "identity")),
}
# Completions of each prompt, in all; K = 100 is the paper's.
BUDGETS = (48, 64, 96, 128, 192, 256, 512, 1024)
SIZES, GROUP = (32, 100), 8
# Rates are these over the root of the number of steps; the KLs are those of the optimum at each beta.
PACES, KLS = (0.5, 1.0, 2.0, 4.0), (0.125, 0.25, 0.5, 1.0, 2.0)
TUNING, MEASURED = 3, 6
# Offline steps before the first online one, as in online.py; and the largest budget that has them.
WARM_STEPS, WARM_RATE, LAST_WARM = 40, 0.05, 256
# The budget whose win rates are drawn against KL.
SHOWN = 256


@dataclass(frozen=True)
class Method:
    """What is maximised, and what is drawn of the reference policy before."""

    reward: str
    """The name of a transform, or "raw", or "z-score": raw scores over their spread in the group, as GRPO has them."""
    K: int = 0
    warm: bool = False
    """Begin with offline training on the K rollouts, which costs no completions."""
    k3: bool = False
    """The gradient of GRPO's own KL term, in place of that of the KL."""

    @property
    def label(self) -> str:
        """Name the method as the table does."""
        if not self.K:
            return {"raw": "RLOO, raw score", "z-score": "GRPO"}[self.reward] + (", its own KL term" if self.k3 else "")
        return f"CTRL, {self.reward}, K = {self.K}" + (", warm start" if self.warm else "")


def list_methods() -> list[Method]:
    """List the methods: those without calibration, then CTRL's transforms."""
    plain = [Method("raw"), Method("z-score"), Method("z-score", k3=True)]
    optima = [names[0] for _, names in PROCEDURES.values()]
    cases = [Method(name, K, warm) for name in optima for K in SIZES for warm in (False, True)]
    return plain + cases


@dataclass(frozen=True, eq=False)
class Prepared:
    """The rewards of every run, a seed and a beta each."""

    beta: Array
    values: Array
    pool: Any
    """Places of the K rollouts."""


@dataclass(frozen=True, eq=False)
class Bench:
    """The world with its completions in the order of the trained tables."""

    here: World
    task: Task
    order: list[int]
    """The completion of each place."""
    seeds: int

    @classmethod
    def build(cls, seeds: int) -> Bench:
        """Enumerate the world."""
        here = World()
        order = [enumerable.completions(LENGTH, LETTERS).index(each) for each in _places()]
        return cls(here, Task.of(here, "identity"), order, seeds)

    @property
    def scores(self) -> Array:
        """Raw scores of each place."""
        return np.asarray(self.here.exact.scores[:, self.order], np.float64)

    def draw_pool(self, K: int) -> Array:
        """Draw K rollouts of the reference for each seed: the same for all methods and beta."""
        runs = replace(Runs.start(self.task, self.seeds), rng=np.random.default_rng([1, K]))
        return runs.draw(runs.log_policy(), K)

    def calibrate(self, name: str, pool: Array) -> Array:
        """Compute each seed's rewards: the quantile among its K rollouts (Eq. 12), transformed."""
        rows = []
        for own in pool:
            references = zip(PROMPTS, np.take_along_axis(self.scores, own, 1), strict=True)
            reward = CalibratedReward(self.here.scorer, ReferenceTable.build(references), TRANSFORMS[name])
            rows.append(reward.from_scores(list(PROMPTS), self.scores))
        return np.array(rows, np.float64)

    def betas(self, name: str) -> list[float]:
        """Compute the beta of the optimum's KLs for a reward of infinitely many references."""
        exact = self.here.exact
        if name in TRANSFORMS:
            values = self.here.values(name)
        else:
            values = np.asarray(exact.scores, np.float64)
            mean = (exact.laws * values).sum(1, keepdims=True)
            spread = np.sqrt((exact.laws * (values - mean) ** 2).sum(1, keepdims=True))
            values = (values - mean) / spread if name == "z-score" else values
        return [exact.beta(values, kl) for kl in KLS]

    def prepare(self, method: Method) -> Prepared:
        """Calibrate with each seed's own rollouts, and compute the beta."""
        beta = np.tile(self.betas(method.reward), self.seeds)[:, None, None]
        if not method.K:
            values = np.broadcast_to(self.scores, (beta.size, *self.scores.shape))
            return Prepared(beta, values, np.empty((beta.size, len(PROMPTS), 0), int))
        pool = self.draw_pool(method.K)
        return Prepared(beta, *(np.repeat(each, len(KLS), 0) for each in (self.calibrate(method.reward, pool), pool)))

    def measure(self, log_policy: Array) -> list[dict[str, float]]:
        """Enumerate the KL and the win rates of each policy."""
        exact, rows = self.here.exact, []
        for policy in np.exp(log_policy):
            law = np.empty_like(policy)
            law[:, self.order] = policy
            rows.append({"kl": exact.kl(law), **exact.win_rates(law)})
        return rows

    def optimum(self, procedure: str) -> float:
        """Compute the win rate of the best policy at the procedure's KL."""
        kl, names = PROCEDURES[procedure]
        return float(self.here.exact.win_rates(self.here.exact.at_kl(self.here.values(names[0]), kl))[procedure])


def leave_one_out(values: Array) -> Array:
    """Subtract the mean of the others in the group."""
    return np.asarray((values - values.mean(-1, keepdims=True)) * values.shape[-1] / (values.shape[-1] - 1))


def weigh(method: Method, rewards: Array, ratios: Array, beta: Array) -> Array:
    """Compute the weight of each completion's log-probability in the gradient."""
    if method.reward != "z-score":
        return leave_one_out(rewards - beta * ratios)
    scaled = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, ddof=1, keepdims=True) + 1e-4)
    return np.asarray(scaled - beta * (1 - np.exp(-ratios) if method.k3 else leave_one_out(ratios)))


def train(bench: Bench, method: Method, task: Prepared, pace: float, budget: int) -> list[list[dict[str, float]]]:
    """Train one policy for each seed and beta, on a budget of completions of each prompt; return what each is like."""
    beta, values = task.beta, task.values
    runs = replace(Runs.start(bench.task, len(values)), rng=np.random.default_rng([2, budget]))
    reference = np.broadcast_to(bench.task.log_reference, values.shape)
    if method.warm:
        warm(runs, task.pool, values / beta, reference)
        runs = replace(runs, step=0, moments=[[np.zeros_like(x) for _ in range(2)] for x in runs.logits])
    steps = count_steps(method, budget)
    for step in range(steps):
        log_policy = runs.log_policy()
        places = runs.draw(log_policy, GROUP)
        rewards, ratios = (np.take_along_axis(x, places, -1) for x in (values, log_policy - reference))
        runs.update(places, weigh(method, rewards, ratios, beta), pace / np.sqrt(steps) * (1 - step / steps))
    rows = bench.measure(runs.log_policy())
    return [rows[at : at + len(KLS)] for at in range(0, len(rows), len(KLS))]


def count_steps(method: Method, budget: int) -> int:
    """Count the steps that a budget has after calibration."""
    return (budget - method.K) // GROUP


def warm(runs: Runs, pool: Array, targets: Array, reference: Array) -> None:
    """Train offline on rollouts of the reference: regression to the optimum's log-ratios (online.py's warm start)."""
    own = np.take_along_axis(targets, pool, -1)
    own = own - np.log(np.exp(own - own.max(-1, keepdims=True)).mean(-1, keepdims=True)) - own.max(-1, keepdims=True)
    for _ in range(WARM_STEPS):
        ratios = np.take_along_axis(runs.log_policy() - reference, pool, -1)
        runs.update(pool, own - ratios, WARM_RATE)


def read_at(line: Sequence[dict[str, float]], kl: float, procedure: str) -> float:
    """Read the win rate at a KL between the two policies next to it, on a scale of the root of the KL; else nan."""
    rows = sorted(line, key=lambda row: row["kl"])
    for low, high in pairwise(rows):
        if low["kl"] <= kl <= high["kl"]:
            roots = [np.sqrt(row["kl"]) for row in (low, high)]
            return float(np.interp(np.sqrt(kl), roots, [row[procedure] for row in (low, high)]))
    return float("nan")


def choose(cases: Sequence[dict[str, Any]], kl: float, procedure: str, tuning: int) -> dict[str, Any] | None:
    """Choose the rate that wins most on the tuning seeds; return the measured seeds' win rates."""
    best, chosen = -np.inf, None
    for case in cases:
        rates = np.array([read_at(line, kl, procedure) for line in case["lines"]])
        # A case counts if all seeds have policies on both sides of the KL.
        if not np.isnan(rates).any() and rates[:tuning].mean() > best:
            best, own = float(rates[:tuning].mean()), case["lines"][tuning:]
            means = [
                [float(np.mean([line[i][key] for line in own])) for i in range(len(KLS))] for key in ("kl", procedure)
            ]
            at = {name: case[name] for name in ("pace", "steps")}
            chosen = {**at, **average(rates[tuning:]), "by_seed": rates[tuning:].tolist(), "line": means}
    return chosen


def run(bench: Bench, method: Method, budgets: Sequence[int], tuning: int) -> list[dict[str, Any]]:
    """Train a method on every budget that it has steps in, and read its win rates."""
    rows, prepared = [], bench.prepare(method)
    for budget in budgets:
        steps = count_steps(method, budget)
        if steps < 1 or (method.warm and budget > LAST_WARM):
            continue
        cases = [
            {"pace": pace, "steps": steps, "lines": train(bench, method, prepared, pace, budget)} for pace in PACES
        ]
        for procedure, (kl, names) in PROCEDURES.items():
            if not method.K or method.reward in names:
                row = {"label": method.label, **asdict(method), "procedure": procedure, "kl": kl, "budget": budget}
                rows.append({**row, "win_rate": choose(cases, kl, procedure, tuning)})
    return rows


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare CTRL with each of the others at equal budgets: differences, with Welch's intervals over seeds."""
    found = []
    for ours, theirs in product(rows, rows):
        same = all(ours[name] == theirs[name] for name in ("procedure", "budget"))
        if same and ours["K"] and not theirs["K"] and ours["win_rate"] and theirs["win_rate"]:
            a, b = (each["win_rate"]["by_seed"] for each in (ours, theirs))
            interval = ttest_ind(a, b, equal_var=False).confidence_interval()
            names = {name: ours[name] for name in ("label", "procedure", "budget", "K")}
            ends = [float(interval.low), float(interval.high)]
            found.append({**names, "over": theirs["label"], "value": float(np.mean(a) - np.mean(b)), "interval": ends})
    return found


def draw(rows: Sequence[dict[str, Any]], optima: dict[str, float], at: int) -> Any:
    """Draw win rates against completions at one KL, and below against KL at one budget."""
    figure, axes = plt.subplots(2, len(PROCEDURES), figsize=(13, 8), layout="constrained")
    for (above, below), (procedure, (kl, names)) in zip(axes.T, PROCEDURES.items(), strict=True):
        for label, (colour, style) in show(names[0]).items():
            line = [row for row in rows if (row["label"], row["procedure"]) == (label, procedure) and row["win_rate"]]
            budgets = [row["budget"] for row in line]
            values = [row["win_rate"]["value"] for row in line]
            ends = np.array([row["win_rate"]["interval"] for row in line]).reshape(-1, 2).T
            name = label.replace(f", {names[0]}", "")
            above.plot(budgets, values, style, color=colour, label=name, marker="o", markersize=3)
            above.fill_between(budgets, *ends, color=colour, alpha=0.15, linewidth=0)
            for row in line:
                if row["budget"] == at:
                    below.plot(*row["win_rate"]["line"], style, color=colour, marker="o", markersize=3)
        above.axhline(optima[procedure], color="black", linestyle="--", linewidth=1, label="the optimum")
        below.plot(kl, optima[procedure], "k*")
        title = {"identity": "one draw"}.get(names[0], names[0])
        above.set(title=f"{title}, KL {kl:g}", xlabel="completions of a prompt, calibration included", xscale="log")
        above.set_xticks(BUDGETS, [str(each) for each in BUDGETS], fontsize=7)
        above.minorticks_off()
        below.set(title=f"{title}, {at} completions", xlabel="KL from the reference, nats", xlim=(0, 1))
        for axis in (above, below):
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("win rate over the reference")
    axes[0][0].legend(fontsize=7)
    return figure


def show(name: str) -> dict[str, tuple[str, str]]:
    """Choose colour and line of the methods that are drawn, CTRL with its first transform."""
    drawn = {"RLOO, raw score": ("#999999", "-"), "GRPO": ("#CC79A7", "-"), "GRPO, its own KL term": ("#CC79A7", ":")}
    for K, colour in zip(SIZES, ("#56B4E9", "#D55E00"), strict=True):
        drawn |= {Method(name, K, warm).label: (colour, ":" if warm else "-") for warm in (False, True)}
    return drawn


def list_tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """List the page's tables as Markdown: win rates by budget, with half the width of their intervals."""
    budgets = sorted({row["budget"] for row in rows})
    for procedure in PROCEDURES:
        own = [row for row in rows if row["procedure"] == procedure]
        yield f"\n| {procedure} | " + " | ".join(map(str, budgets)) + " |"
        yield "|---" * (1 + len(budgets)) + "|"
        for label in dict.fromkeys(row["label"] for row in own):
            found = {row["budget"]: row["win_rate"] for row in own if row["label"] == label}
            yield f"| {label} | " + " | ".join(format_rate(found.get(budget)) for budget in budgets) + " |"


def format_rate(rate: dict[str, Any] | None) -> str:
    """Format a win rate in percent."""
    return f"{100 * rate['value']:.1f} ± {50 * (rate['interval'][1] - rate['interval'][0]):.1f}" if rate else ""


def main() -> None:
    """Train, compare, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", type=Path, metavar="OUT", help="two small budgets, results in this folder")
    args = parser.parse_args()
    tuning, measured = (1, 2) if args.quick else (TUNING, MEASURED)
    bench = Bench.build(tuning + measured)
    optima = {procedure: bench.optimum(procedure) for procedure in PROCEDURES}
    results: dict[str, Any] = {"seeds": {"tuning": tuning, "measured": measured}, "prompts": len(PROMPTS)}
    results |= {"group": GROUP, "optima": optima, "rows": [] if args.quick else read_rows()}
    done = {row["label"] for row in results["rows"]}
    for method in tqdm([each for each in list_methods() if each.label not in done], disable=None):
        results["rows"] += run(bench, method, (48, 112) if args.quick else BUDGETS, tuning)
        results["differences"] = compare(results["rows"])
        if not args.quick:
            save("equal_tokens", results)
    if args.quick:
        (args.quick / "equal_tokens.json").write_text(json.dumps(results))
    figure = draw(results["rows"], optima, 112 if args.quick else SHOWN)
    figure.savefig((args.quick or FIGURES) / "equal_tokens.png", dpi=130)
    print("\n".join(list_tables(results["rows"])))


def read_rows() -> list[dict[str, Any]]:
    """Read the rows of the methods that are done."""
    path = Path(__file__).resolve().parents[1] / "results" / "equal_tokens.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["results"]["rows"] if path.exists() else []
    return rows


if __name__ == "__main__":
    main()
