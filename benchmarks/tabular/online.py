"""What makes an online run cheaper: baselines, the table's rollouts, a warm start, a curriculum, in the exact world.

    python benchmarks/tabular/online.py            # goes on where it was; one core, some minutes
    python benchmarks/tabular/online.py --quick    # one case each, a few steps, nothing is kept
    python benchmarks/tabular/online.py --table    # the table of docs/evidence/exact_world.md

The policy-gradient loop of `grpo --plain` on the tables of log-probabilities themselves, several seeds at once: Adam,
gradients cut to length 1, a rate that falls to 0. After every third step E[reward] - beta KL is enumerated. Counted
are completions that were drawn until it has risen by so much of the way from the reference's to the optimum's. Each arm
has the best of several rates for each share. The library's own loop is run as well, to compare.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from world import KLS, LENGTH, LETTERS, PROMPTS, TRANSFORMS, World, enumerable, known, laws, save

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.models.text import Text
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.training.online import GRPOSettings, grpo

Array = np.ndarray[Any, np.dtype[np.float64]]
SEEDS, STEPS, EVERY = 6, 600, 3
SHARES = (0.5, 0.8, 0.95)
RATES = {1: (0.0125, 0.025, 0.05), 4: (0.025, 0.05, 0.1), 16: (0.05, 0.1, 0.2)}
NAMES = ("identity", "e^{10u}")
TOKENS = LETTERS + 1


@dataclass(frozen=True)
class Arm:
    """Settings in which a run differs from the plain loop."""

    baseline: str = "leave-one-out"
    completions: int = 4
    rollouts: int = 0
    """Steps that learn from the table's rollouts, with importance weights up to `clip`."""
    K: int = 128
    """Rollouts of a prompt in the table."""
    clip: float = 4.0
    offline: int = 0
    """Steps of offline training before, on the same rollouts: regression to the target log-ratio."""
    offline_rate: float = 0.05
    curriculum: int = 0
    """Steps over which reward or beta go from `begins` to what they are."""
    begins: str = ""


ARMS = {
    "leave-one-out, 4 completions": Arm(),
    "leave-one-out, 16 completions": Arm(completions=16),
    "warm start, K = 128, 10 offline steps": Arm(offline=10),
    "warm start, K = 128, 40 offline steps": Arm(offline=40),
    "warm start, K = 32, 10 offline steps": Arm(offline=10, K=32),
    "rollouts, K = 128, 5 steps": Arm(rollouts=5),
    "rollouts, K = 128, 20 steps": Arm(rollouts=20),
    "rollouts, K = 32, 5 steps": Arm(rollouts=5, K=32),
    "reference mean": Arm("reference mean"),
    "optimal value (A2PO)": Arm("optimal value"),
    "between the two": Arm("between"),
    "control variate of known mean": Arm("control variate"),
    "batch mean, 1 completion": Arm("batch", 1),
    "optimal value (A2PO), 1 completion": Arm("optimal value", 1),
    "curriculum of 100 steps, identity": Arm(curriculum=100, begins="identity"),
    "curriculum of 100 steps, 4 beta": Arm(curriculum=100, begins="4 beta"),
}


@dataclass(frozen=True, eq=False)
class Task:
    """The rewards of a transform in the exact world, and the beta of its KL."""

    name: str
    values: Array
    beta: float
    log_reference: Array
    starts: tuple[Array, Array]
    """Logits of first and of second tokens under the reference policy."""
    identity: Array
    """Rewards that a curriculum begins with, in the unit of beta."""

    @classmethod
    def of(cls, here: World, name: str) -> Task:
        """Build the task of a transform in the world."""
        exact, values = here.exact, here.values(name)
        order = [enumerable.completions(LENGTH, LETTERS).index(each) for each in _places()]
        beta = exact.beta(values, KLS[name])
        identity = here.values("identity") * beta / exact.beta(here.values("identity"), KLS[name])
        return cls(
            name, values[:, order], beta, np.log(exact.laws[:, order]), _logits(here.model()), identity[:, order]
        )

    def objective(self, log_policy: Array) -> Array:
        """Compute E[reward] - beta KL of each run, the mean over prompts."""
        gains = self.values - self.beta * (log_policy - self.log_reference)
        return np.asarray((np.exp(log_policy) * gains).sum(-1).mean(-1))

    @property
    def mean(self) -> Array:
        """The mean reward of the reference policy, of each prompt."""
        return np.asarray((np.exp(self.log_reference) * self.values).sum(-1))

    @property
    def optimal(self) -> Array:
        """The optimal value beta log Z of each prompt."""
        return np.asarray(self.beta * np.log((np.exp(self.log_reference + self.values / self.beta)).sum(-1)))

    def share(self, log_policy: Array) -> Array:
        """How much of the way to the optimum's objective each run has come."""
        start, end = self.mean.mean(), self.optimal.mean()
        return (self.objective(log_policy) - start) / (end - start)


def _places() -> list[tuple[int, ...]]:
    """The empty completion, then each first letter with each second token, the first of which ends it."""
    letters = range(1, TOKENS)
    return [(enumerable.END,), *((a, b) for a in letters for b in range(TOKENS))]


@torch.no_grad()
def _logits(model: Any) -> tuple[Array, Array]:
    first, second = [], []
    for prompt in PROMPTS:
        opening = enumerable.tokens(prompt)
        first.append(model(torch.tensor([opening])).logits[0, -1].double().numpy())
        second.append(model(torch.tensor([[*opening, a] for a in range(1, TOKENS)])).logits[:, -1].double().numpy())
    return np.array(first), np.array(second)


def log_softmax(logits: Array) -> Array:
    """Normalise logits over the last axis to log-probabilities."""
    high = logits - logits.max(-1, keepdims=True)
    return np.asarray(high - np.log(np.exp(high).sum(-1, keepdims=True)))


@dataclass(eq=False)
class Runs:
    """Tabular policies that are trained side by side, a seed each, with Adam."""

    task: Task
    rng: np.random.Generator
    logits: list[Array]
    moments: list[list[Array]]
    step: int = 0

    @classmethod
    def start(cls, task: Task, seeds: int) -> Runs:
        """Make policies of several runs, all at the reference."""
        logits = [np.broadcast_to(each, (seeds, *each.shape)).copy() for each in task.starts]
        return cls(task, np.random.default_rng(0), logits, [[np.zeros_like(x) for _ in range(2)] for x in logits])

    def log_policy(self) -> Array:
        """Compute the log-probability of each completion: runs, prompts, places."""
        first, second = map(log_softmax, self.logits)
        whole = first[..., 1:, None] + second
        return np.concatenate([first[..., :1], whole.reshape(*whole.shape[:2], -1)], -1)

    def draw(self, log_policy: Array, count: int) -> Array:
        """Draw so many completions of each prompt, as places in the enumeration."""
        upto = np.exp(log_policy).cumsum(-1)
        chances = self.rng.random((*upto.shape[:2], count)) * upto[..., -1:]
        return (upto[..., None, :] < chances[..., None]).sum(-1)

    def update(self, places: Array, weights: Array, rate: float) -> None:
        """Go along the gradient of the mean of weights times log-probabilities."""
        total = np.zeros((*places.shape[:2], 1 + LETTERS * TOKENS))
        runs, prompts, _ = np.indices(places.shape)
        np.add.at(total, (runs, prompts, places), weights / (places.shape[1] * places.shape[2]))
        pairs = total[..., 1:].reshape(*total.shape[:2], LETTERS, TOKENS)
        ahead = np.concatenate([total[..., :1], pairs.sum(-1)], -1)
        first, second = (np.exp(log_softmax(x)) for x in self.logits)
        gradients = [ahead - ahead.sum(-1, keepdims=True) * first, pairs - pairs.sum(-1, keepdims=True) * second]
        length = np.sqrt(sum((g**2).reshape(len(g), -1).sum(1) for g in gradients))
        self.step += 1
        for i, moment in enumerate(self.moments):
            gradient = gradients[i] / np.maximum(length, 1.0).reshape(-1, *[1] * (gradients[i].ndim - 1))
            moment[0] += 0.1 * (gradient - moment[0])
            moment[1] += 0.001 * (gradient**2 - moment[1])
            size = np.sqrt(moment[1] / (1 - 0.999**self.step)) + 1e-8
            self.logits[i] += rate * moment[0] / (1 - 0.9**self.step) / size


def center(arm: Arm, task: Task, rewards: Array, ratios: Array, progress: Array) -> Array:
    """Rewards less the KL, less the arm's baseline: runs, prompts, completions."""
    gains = rewards - task.beta * ratios
    G, mean, optimal = gains.shape[-1], task.mean[:, None], task.optimal[:, None]
    match arm.baseline:
        case "leave-one-out":
            return (gains - gains.mean(-1, keepdims=True)) * G / (G - 1)
        case "reference mean":
            return gains - mean
        case "optimal value":
            return gains - optimal
        case "between":  # as far from the mean to the optimal value as earlier steps were on average
            return gains - mean - progress[:, None, None] * (optimal - mean)
        case "control variate":  # E_policy[reward / ratio] is the reference's mean; the coefficient is fitted
            known = rewards * np.exp(np.minimum(-ratios, np.log(10.0))) - mean
            own = gains - gains.mean(-1, keepdims=True)
            fitted = (known * own).sum((1, 2), keepdims=True) / np.maximum((known**2).sum((1, 2), keepdims=True), 1e-12)
            rest = gains - fitted * known
            return gains - (rest.sum(-1, keepdims=True) - rest) / (G - 1)
        case "batch":
            n = gains[0].size
            return (gains - gains.mean((1, 2), keepdims=True)) * n / (n - 1)
    raise ValueError(arm.baseline)


def train(task: Task, arm: Arm, rate: float, seeds: int, steps: int) -> tuple[Array, Array]:
    """Completions drawn until each share of the way, nan where it was not reached; and the last share: by seed."""
    runs, progress = Runs.start(task, seeds), np.zeros(seeds)
    reference = np.broadcast_to(task.log_reference, (seeds, *task.log_reference.shape))
    pool = runs.draw(reference, arm.K)
    reached, drawn = np.full((len(SHARES), seeds), np.nan), 0

    def at(values: Array, places: Array) -> Array:
        return np.take_along_axis(np.broadcast_to(values, reference.shape), places, -1)

    own = at(task.values, pool) / task.beta
    for _ in range(arm.offline):
        ratios = at(runs.log_policy() - reference, pool)
        runs.update(pool, own - np.log(np.exp(own).mean(-1, keepdims=True)) - ratios, arm.offline_rate)
    runs = replace(runs, step=0, moments=[[np.zeros_like(x) for _ in range(2)] for x in runs.logits])
    for step in range(steps):
        log_policy = runs.log_policy()
        offline = step < arm.rollouts
        places = pool if offline else runs.draw(log_policy, arm.completions)
        drawn += 0 if offline else places[0].size
        ratios, values = at(log_policy - reference, places), at(task.values, places)
        left = max(0.0, 1 - step / arm.curriculum) if arm.curriculum else 0.0
        asked, strength = values, 1.0
        if arm.begins == "identity":
            asked = (1 - left) * values + left * at(task.identity, places)
        elif arm.begins == "4 beta":
            strength = 4.0**left
        centred = center(arm, task, asked, strength * ratios, progress)
        if offline:
            centred = centred * np.minimum(np.exp(ratios), arm.clip)
        gained = (values - task.beta * ratios).mean((1, 2)) - task.mean.mean()
        progress = np.clip(0.9 * progress + 0.1 * gained / (task.optimal - task.mean).mean(), 0, 1)
        runs.update(places, centred, rate * (1 - step / steps))
        if step % EVERY == EVERY - 1:
            share = task.share(runs.log_policy())
            for row, wanted in zip(reached, SHARES, strict=True):
                row[np.isnan(row) & (share >= wanted)] = drawn
            if not np.isnan(reached).any():
                break
    return reached, np.asarray(share)


@dataclass
class Counting:
    """The library's own loop of GRPO, whose policy is enumerated after every so many steps."""

    here: World
    task: Task
    every: int = 10

    def __call__(self, rate: float, seed: int, steps: int) -> list[float]:
        """Count the completions drawn until each share of the way."""
        model, reached = self.here.model(), [np.nan] * len(SHARES)
        policy = Policy(model, enumerable.tokenizer(LETTERS), Decoding(LENGTH), Text())
        reward = CalibratedReward(self.here.scorer, self.here.table(), TRANSFORMS[self.task.name])
        values = self.here.values(self.task.name)
        settings = GRPOSettings(beta=self.task.beta, steps=steps, lr=rate, seed=seed, completions=4, rows=1000)
        settings = replace(settings, prompts_a_step=len(PROMPTS))

        def log(row: Any) -> None:
            if row["step"] % self.every == self.every - 1:
                law = laws(model)
                gain = float((law * values).sum(1).mean()) - self.task.beta * self.here.exact.kl(law)
                start, end = self.task.mean.mean(), self.task.optimal.mean()
                for i, wanted in enumerate(SHARES):
                    if np.isnan(reached[i]) and (gain - start) / (end - start) >= wanted:
                        reached[i] = (row["step"] + 1) * settings.completions_a_step
                if not np.isnan(reached).any():
                    raise StopIteration

        with suppress(StopIteration):
            grpo.train(policy, reward, [Asked(p) for p in PROMPTS], settings, log)
        return reached


def summarise(reached: Array) -> list[dict[str, float | None]]:
    """Mean and its error over seeds for each share; None where a seed did not come so far."""
    rows: list[dict[str, float | None]] = []
    for row in reached:
        whole = not np.isnan(row).any()
        error = float(np.std(row) / np.sqrt(max(1, len(row) - 1))) if whole else None
        rows.append({"completions": float(np.mean(row)) if whole else None, "±": error})
    return rows


def best(cases: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """Choose, for each share, the rate with the fewest completions."""
    found: list[dict[str, Any] | None] = []
    for i in range(len(SHARES)):
        there = [{"rate": c["rate"], **c["reached"][i]} for c in cases if c["reached"][i]["completions"] is not None]
        found.append(min(there, key=lambda each: each["completions"], default=None))
    return found


def run(here: World, name: str, label: str, seeds: int, steps: int) -> dict[str, Any]:
    """Run one arm for one transform, at each rate."""
    task = Task.of(here, name)
    if label == "the library's loop":
        reached = np.array([Counting(here, task)(0.05, seed, steps) for seed in range(seeds)]).T
        cases, arm = [{"rate": 0.05, "reached": summarise(reached)}], Arm()
    else:
        arm, cases = ARMS[label], []
        for rate in RATES[arm.completions]:
            reached, last = train(task, arm, rate, seeds, steps)
            cases.append({"rate": rate, "reached": summarise(reached), "last share": float(last.mean())})
    return {
        "transform": name,
        "arm": label,
        **asdict(arm),
        "seeds": seeds,
        "steps": steps,
        "best": best(cases),
        "rates": cases,
    }


def describe(row: dict[str, Any]) -> str:
    """Format a row of the table: completions until each share, at the best rate."""
    cells = [
        "-" if each is None else f"{each['completions']:.0f} ± {each['±']:.0f} ({each['rate']})" for each in row["best"]
    ]
    return f"{row['transform']:<10} {row['arm']:<42} {' | '.join(cells)}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Write the results as the page's table: completions until each share, transforms side by side."""
    lines = []
    for label in dict.fromkeys(row["arm"] for row in rows):
        cells = [label]
        for name in NAMES:
            found = next((row["best"] for row in rows if (row["arm"], row["transform"]) == (label, name)), [])
            cells += ["not reached" if c is None else f"{c['completions']:,.0f} ± {c['±']:,.0f}" for c in found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the arms that the results do not have yet, and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case each, a few steps, nothing is kept")
    parser.add_argument("--table", action="store_true", help="print what there is as the page's table")
    args = parser.parse_args()
    if args.table:
        print(format_table(known("tabular_online")))
        return
    torch.set_num_threads(1)
    here = World()
    cases = [(name, label, SEEDS) for label in ARMS for name in NAMES]
    cases += [(name, "the library's loop", 3) for name in NAMES]
    cases = [(NAMES[0], label, 2) for label in ARMS] if args.quick else cases
    rows = [] if args.quick else known("tabular_online")
    done = {(row["transform"], row["arm"]) for row in rows}
    for name, label, seeds in tqdm([each for each in cases if each[:2] not in done], delay=3, disable=None):
        rows.append(run(here, name, label, seeds, 20 if args.quick else STEPS))
        tqdm.write(describe(rows[-1]), file=sys.stderr)
        if not args.quick:
            save("tabular_online", rows)


if __name__ == "__main__":
    main()
