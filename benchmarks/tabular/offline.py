"""How near each offline loss comes to the enumerated optimum from K rollouts a prompt, for six transforms.

    python benchmarks/tabular/offline.py            # goes on where it was; one core, some minutes
    python benchmarks/tabular/offline.py --quick    # a case of each kind, two draws, nothing is kept

The world has 12 prompts of 16 completions, so that K rollouts can hold all of them, with probabilities that are whole
multiples of 1/256: 256 rollouts in these proportions are the law itself, and stand for K = infinity. The policy has a
logit for each completion, and learns by the library's own losses, from rollouts whose rewards go by their ranks among
each other. Three parts:

* converged: the minimiser of each loss that has pi* as its optimum, by Newton's method from the reference;
* rivals: the optima of IPO, BoNBoN and top-1 for infinitely many rollouts, enumerated;
* epochs: Adam on groups of 8 rollouts of each prompt, as a real run has them.

A policy is compared with pi* at one beta (total variation), and with pi* of its own KL (points of win rate under the
procedure that the transform is for). "fixed references" trains nothing: it is the optimum of the reward that K rollouts
make, for all completions whether drawn or not, which theory/fixed_references.py predicts for a continuous world; with
"drawn completions" those that were not drawn keep their probability of the reference.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm
from world import KLS, PROCEDURES, TRANSFORMS, Exact, known, save, valued

from calibrated_rewards.theory.finite_k import log_partition, values
from calibrated_rewards.theory.fixed_references import win_rate_at_kl
from calibrated_rewards.theory.optimum import optimum
from calibrated_rewards.theory.procedures import BestOf, WorstOf
from calibrated_rewards.theory.scale import scaled
from calibrated_rewards.theory.tilted_policy import beta_for_kl, win_rate
from calibrated_rewards.theory.transforms import Identity, Transform
from calibrated_rewards.training.offline.losses import NAMED, BoNBoN, ControlVariate, Loss, LossInputs, parse_loss

COMPLETIONS, WHOLE, LEVELS = 16, 256, 5
# Draws of the rollouts, by K. None is K = infinity.
DRAWS: dict[int | None, int] = {8: 20, 32: 20, 100: 20, 1000: 6, None: 1}
# Each transform, and the procedure that it is for.
FOR = {
    "identity": "Standard()",
    **dict.fromkeys(("log", "e^{5u}", "e^{10u}", "best of 4"), "BestOf(n=4)"),
    "worst of 4": "WorstOf(n=4)",
}
CONVERGED: dict[str, Loss] = {**NAMED, "control-variate, nothing clamped": ControlVariate(inf, inf)}
TRAINED: dict[str, Loss] = {
    name: parse_loss(name)
    for name in ("weighted", "control-variate", "regression", "centred", "ipo:2", "ipo:8", "bonbon:8", "top-1:8")
}
FIXED = ("fixed references", "fixed references, drawn completions")
EPOCHS, RATE, GROUP = (1, 3, 10, 30), 0.05, 8


def few(levels: int | None = None, prompts: int = 12) -> Exact:
    """Build a world of few completions, whose scores are all different, or in so many levels."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(COMPLETIONS, 3.0), prompts)
    counts = np.array([6 + rng.multinomial(WHOLE - 6 * COMPLETIONS, own) for own in shares])
    scores = np.array([rng.permutation(COMPLETIONS) for _ in range(prompts)]).astype(float)
    return Exact(counts / WHOLE, scores if levels is None else np.floor(scores * levels / COMPLETIONS))


WORLDS = {"no ties": few(), "5 levels": few(LEVELS)}


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Drawn completions of each prompt, several times, with what a loss has to know of them."""

    exact: Exact
    drawn: Int[torch.Tensor, "D P K"]
    inputs: LossInputs
    fixed: np.ndarray[Any, np.dtype[np.float64]]
    """Rewards of all completions, by their ranks among the drawn references."""

    @property
    def log_reference(self) -> torch.Tensor:
        """Log-probabilities of all completions under the reference policy."""
        return torch.tensor(np.log(self.exact.laws)).expand(len(self.drawn), -1, -1)

    def log_ratios(self, logits: torch.Tensor) -> Float[torch.Tensor, "D P K"]:
        """Compute the log-ratios log pi - log pi_ref of the drawn completions."""
        return (logits.log_softmax(-1) - self.log_reference).gather(-1, self.drawn)


def draw(exact: Exact, name: str, beta: float, size: int | None, draws: int) -> Rollouts:
    """Draw rollouts of each prompt, or take the law itself, with their rewards by rank (below + equal / 2) / K."""
    if size is None:
        drawn = np.array([[np.repeat(np.arange(COMPLETIONS), np.round(law * WHOLE).astype(int)) for law in exact.laws]])
    else:
        rng = np.random.default_rng(size)
        drawn = np.array([[rng.choice(COMPLETIONS, size, p=law) for law in exact.laws] for _ in range(draws)])
    chosen = np.take_along_axis(np.broadcast_to(exact.levels, (len(drawn), *exact.levels.shape)), drawn, 2)
    levels = int(exact.levels.max()) + 1
    equal = (chosen[..., None] == np.arange(levels)).sum(2)
    ranks = 2 * (equal.cumsum(2) - equal) + equal
    transform = scaled(TRANSFORMS[name], "unit")
    vector = values(transform, drawn.shape[2])
    by_level = vector[ranks]
    rewards = torch.tensor(np.take_along_axis(by_level, chosen, 2))
    exact_log_z = log_partition(transform, beta, drawn.shape[2])
    fixed = np.take_along_axis(by_level, np.broadcast_to(exact.levels, (len(drawn), *exact.levels.shape)), 2)
    return Rollouts(exact, torch.tensor(drawn), LossInputs.from_rewards(rewards, beta, exact_log_z=exact_log_z), fixed)


def minimise(loss: Loss, rollouts: Rollouts) -> tuple[np.ndarray, float]:
    """Minimise a loss, from the reference on; return the policies and the largest gradient that is left.

    Newton's method for each prompt, with the absolute values of the Hessian's eigenvalues (a loss is not convex in the
    logits) and a damping that falls while steps succeed. Where the minimum is not unique it ends near the reference.
    """
    logits = rollouts.log_reference.clone().requires_grad_()
    damping = torch.ones(*logits.shape[:2], 1, dtype=torch.float64)
    for _ in range(100):
        value = loss(rollouts.log_ratios(logits), rollouts.inputs)
        (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
        if gradient.abs().max() < 1e-9:
            break
        rows = [torch.autograd.grad(gradient[..., i].sum(), logits, retain_graph=True)[0] for i in range(COMPLETIONS)]
        bends, axes = torch.linalg.eigh(torch.stack(rows, -1))
        along = (axes.mT @ gradient.detach()[..., None])[..., 0] / (bends.abs() + damping)
        with torch.no_grad():
            moved = logits - (axes @ along[..., None])[..., 0]
            better = (loss(rollouts.log_ratios(moved), rollouts.inputs) <= value)[..., None]
            logits.copy_(torch.where(better, moved, logits))
            damping = torch.where(better, damping / 8, damping * 4)
    return logits.detach().softmax(-1).numpy(), float(gradient.detach().abs().max())


def train(loss: Loss, rollouts: Rollouts) -> dict[int, np.ndarray]:
    """Train by Adam on groups of a few rollouts of each prompt, in a new order each epoch; return policies by epoch."""
    logits, rng = rollouts.log_reference.clone().requires_grad_(), np.random.default_rng(0)
    optimiser, size, found = torch.optim.Adam([logits], lr=RATE), rollouts.drawn.shape[-1], {}
    for epoch in range(1, EPOCHS[-1] + 1):
        order = torch.tensor(rng.permuted(np.broadcast_to(np.arange(size), rollouts.drawn.shape), axis=2))
        for group in order.split(GROUP, -1):
            if group.shape[-1] < GROUP:
                continue
            own = LossInputs(
                rollouts.inputs.rewards.gather(-1, group), rollouts.inputs.beta, rollouts.inputs.log_z
            )  # Z is that of all K
            optimiser.zero_grad()
            loss(rollouts.log_ratios(logits).gather(-1, group), own).sum().backward()
            optimiser.step()
        if epoch in EPOCHS:
            found[epoch] = logits.detach().softmax(-1).numpy()
    return found


def compare(exact: Exact, name: str, beta: float, policies: np.ndarray) -> dict[str, float]:
    """Measure how far policies are from pi*: means over draws in nats, total variation and points, with an error."""
    best, best_values, procedure = exact.optimum(exact_values(exact, name), beta), exact_values(exact, name), FOR[name]
    rows = []
    for policy in policies:
        kl = exact.kl(policy)
        rival = exact.win_rates(exact.at_kl(best_values, kl))[procedure]
        rows.append((kl, exact.distance(policy, best), 100 * (rival - exact.win_rates(policy)[procedure])))
    means = np.mean(rows, 0)
    error = np.std([row[2] for row in rows], ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return {**dict(zip(("kl", "tv", "missed"), means.tolist(), strict=True)), "missed ±": float(error)}


def exact_values(exact: Exact, name: str) -> np.ndarray:
    """Compute the rewards of all completions, by their exact quantiles."""
    return valued(exact, TRANSFORMS[name])


@cache
def predict(name: str, size: int) -> float:
    """Predict by `fixed_references` the points that are missed at the transform's KL, in a continuous world."""
    kl = KLS[name]
    transform, procedure = TRANSFORMS[name], PROCEDURES[FOR[name]]
    best = win_rate(transform, beta_for_kl(transform, kl), procedure)
    return 100 * (best - win_rate_at_kl(transform, kl, procedure, size).win_rate)


def converge(case: dict[str, Any], draws: int | None = None) -> dict[str, Any]:
    """Measure one case of a minimiser, or of the optimum with fixed references."""
    exact, name, size = WORLDS[case["world"]], case["transform"], case["K"]
    beta = exact.beta(exact_values(exact, name), KLS[name])
    rollouts = draw(exact, name, beta, size, draws or DRAWS[size])
    if case["loss"] in FIXED:
        policies = np.array([exact.optimum(own, beta) for own in rollouts.fixed])
        if case["loss"] == FIXED[1]:
            policies = keep_undrawn(rollouts, policies)
        found = compare(exact, name, beta, policies)
        return found if size is None or case["world"] != "no ties" else {**found, "predicted": predict(name, size)}
    policies, gradient = minimise(CONVERGED[case["loss"]], rollouts)
    seen = np.array([np.unique(row).size for row in rollouts.drawn.reshape(-1, rollouts.drawn.shape[-1])]).mean()
    return {**compare(exact, name, beta, policies), "gradient": gradient, "seen": float(seen)}


def keep_undrawn(rollouts: Rollouts, policies: np.ndarray) -> np.ndarray:
    """Give completions that were not drawn their probability under the reference; return such policies."""
    drawn = (rollouts.drawn[..., None] == torch.arange(COMPLETIONS)).any(2).numpy()
    laws = np.broadcast_to(rollouts.exact.laws, policies.shape)
    share = (laws * drawn).sum(2, keepdims=True) / (policies * drawn).sum(2, keepdims=True)
    return np.where(drawn, policies * share, laws)


def run_epochs(case: dict[str, Any], draws: int | None = None) -> dict[str, Any]:
    """Train one case by Adam, and compare its policies with pi* after some epochs."""
    exact, name, size = WORLDS[case["world"]], case["transform"], case["K"]
    beta = exact.beta(exact_values(exact, name), KLS[name])
    found = train(TRAINED[case["loss"]], draw(exact, name, beta, size, draws or 10))
    return {"epochs": {epoch: compare(exact, name, beta, policies) for epoch, policies in found.items()}}


def pair_chances(exact: Exact, n: int) -> Float[np.ndarray, "P M M"]:
    """Compute the joint law of the best and the worst of n draws for each prompt; ties are broken by a fair coin."""
    mass = exact.by_level(exact.laws)
    upto = np.pad(mass.cumsum(1), ((0, 0), (1, 0)))
    between = np.maximum(upto[:, 1:, None] - upto[:, None, :-1], 0) ** n  # all at most the row's level, and at least
    between = np.pad(between, ((0, 0), (1, 0), (0, 1)))
    levels = between[:, 1:, :-1] - between[:, :-1, :-1] - between[:, 1:, 1:] + between[:, :-1, 1:]
    share = exact.laws / np.take_along_axis(mass, exact.levels, 1)
    own = np.array([each[np.ix_(rows, rows)] for each, rows in zip(levels, exact.levels, strict=True)])
    return own * share[:, :, None] * share[:, None, :]


def solve_ipo(exact: Exact, n: int) -> Float[np.ndarray, "P M"]:
    """Solve for the log-ratios, up to a constant, at which IPO with a gap of 1 is least: linear systems."""
    return np.array([np.linalg.lstsq(*system, rcond=None)[0] for system in _systems(exact, n)])


def _systems(exact: Exact, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Half the Hessian of E (h_best - h_worst - 1)^2 for each prompt, and half the gradient at 0, with its sign off."""
    systems = []
    for chances, levels in zip(pair_chances(exact, n), exact.levels, strict=True):
        both, wins = chances + chances.T, chances * (levels[:, None] != levels)
        systems.append((np.diag(both.sum(1)) - both, wins.sum(1) - wins.sum(0)))
    return systems


def solve_bonbon(exact: Exact, n: int, alpha: float = BoNBoN.alpha) -> Float[np.ndarray, "P M"]:
    """Solve for the policies at which BoNBoN is least, by Newton's method."""
    gap, best, policies = (n - 1) * sum(1 / i for i in range(1, n)), law_of_best(exact, n), []
    for (matrix, slope), reference, chosen in zip(_systems(exact, n), exact.laws, best, strict=True):
        h = np.zeros(len(reference))
        for _ in range(100):
            law = reference * np.exp(h - h.max())
            law /= law.sum()
            gradient = 2 * (1 - alpha) * (matrix @ h - gap * slope) + alpha * (law - chosen)
            hessian = 2 * (1 - alpha) * matrix + alpha * (np.diag(law) - np.outer(law, law))
            h -= np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        policies.append(law)
    return np.array(policies)


def law_of_best(exact: Exact, n: int) -> Float[np.ndarray, "P M"]:
    """Compute the law of the best of n draws of the reference, at which Top1 is least."""
    return np.asarray(pair_chances(exact, n).sum(2))


@cache
def optima(kl: float) -> dict[str, Transform]:
    """Find the best transform of each procedure at a KL."""
    return {"Standard()": Identity(), **{repr(p): optimum(p, kl=kl).transform for p in (BestOf(4), WorstOf(4))}}


def rival(case: dict[str, Any]) -> dict[str, Any]:
    """Solve for the optimum of a loss that has not pi*; return its KL and what it misses of each optimum."""
    exact, n = WORLDS[case["world"]], case["n"]
    if case["loss"] == "ipo":
        policy = exact.at_kl(solve_ipo(exact, n), case["kl asked"])
    else:
        policy = solve_bonbon(exact, n) if case["loss"] == "bonbon" else law_of_best(exact, n)
    kl, missed = exact.kl(policy), {}
    for procedure, phi in optima(round(kl, 6)).items():
        best = exact.at_kl(valued(exact, phi), kl)
        rates = [exact.win_rates(each)[procedure] for each in (best, policy)]
        missed[procedure] = {"points": 100 * (rates[0] - rates[1]), "tv": exact.distance(policy, best)}
    return {"kl": kl, "tv to the best of n": exact.distance(policy, law_of_best(exact, n)), "missed": missed}


def cases() -> list[dict[str, Any]]:
    """List the cases of all three parts."""
    found = []
    for world in WORLDS:
        for n in (2, 4, 8):
            found += [{"part": "rivals", "world": world, "loss": "ipo", "n": n, "kl asked": kl} for kl in (0.25, 0.5)]
            found += [{"part": "rivals", "world": world, "loss": loss, "n": n} for loss in ("bonbon", "top-1")]
        for name in FOR:
            for size in DRAWS if world == "no ties" else (100, None):
                for loss in (*FIXED, *CONVERGED):
                    if loss != "pairs" or size in (8, None):  # otherwise so many; centred is the same
                        found.append({"part": "converged", "world": world, "transform": name, "K": size, "loss": loss})
    for size in (32, 100):
        own = {"part": "epochs", "world": "no ties", "transform": "best of 4", "K": size}
        found += [{**own, "loss": loss} for loss in TRAINED]
    return found


def run(case: dict[str, Any], draws: int | None = None) -> dict[str, Any]:
    """Run one case of any part."""
    if case["part"] == "rivals":
        return rival(case)
    return (converge if case["part"] == "converged" else run_epochs)(case, draws)


def main() -> None:
    """Run the cases that the results do not have yet, and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a case of each kind, two draws, nothing is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, asked = ([], cases()) if args.quick else (known("tabular_offline"), cases())
    if args.quick:
        asked = [*{(case["part"], case["loss"]): case for case in asked}.values()]
    finished = [row["case"] for row in rows]
    for case in tqdm([each for each in asked if each not in finished], delay=3, disable=None):
        rows.append({"case": case, **run(case, 2 if args.quick else None)})
        tqdm.write(str(rows[-1]), file=sys.stderr)
        if not args.quick:
            save("tabular_offline", rows)


if __name__ == "__main__":
    main()
