"""Win rate and KL of a policy that is trained on the same K references a prompt from the first step to the last.

Its reward is a step function of the true quantile, and nothing keeps it from fitting the noise of the steps: the worst
case for finite K, computed exactly for each draw of references and averaged over draws.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, isfinite, log, sqrt

import numpy as np
import numpy.typing as npt
from numpy.polynomial import legendre
from scipy.special import xlogy

from calibrated_rewards.theory.finite_k import Estimator, values
from calibrated_rewards.theory.mixtures import BestOfUpTo
from calibrated_rewards.theory.procedures import BestOf, CalibratedProcedure, Procedure, Standard, WorstOf
from calibrated_rewards.theory.quadrature import Array, NodeLaw
from calibrated_rewards.theory.transforms import Transform


@dataclass(frozen=True)
class WinRateAtK:
    """Mean win rate and KL, over references, of the policy that is optimal for K fixed references a prompt.

    The errors are standard errors over draws of references; from `win_rate_at_kl`, that of the win rate at that KL.
    """

    win_rate: float
    kl: float
    beta: float
    win_rate_error: float
    kl_error: float


def win_rate_at_k(
    transform: Transform,
    beta: float,
    procedure: Procedure,
    K: int,
    estimator: Estimator = "empirical",
    *,
    base: Procedure | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> WinRateAtK:
    """Compute true win rate and KL when each prompt keeps the same K references all through training.

    The reward is then a step function of the true quantile, v_2j between the references' own quantiles U_(j) and
    U_(j+1), and so is the optimal policy's density. This is the worst case for finite K, a policy free to fit the noise
    of every prompt's own references. `procedure` decodes the policy, `base` the reference: the same, unless given.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> from calibrated_rewards.theory.transforms import Identity
    >>> [round(win_rate_at_k(Identity(), 0.2, BestOf(4), K, draws=200).win_rate, 2) for K in (4, 32)]
    [0.81, 0.82]
    """
    if not (isfinite(beta) and beta > 0):
        raise ValueError(f"win_rate_at_k needs a finite beta > 0, got beta={beta!r}.")
    return _draw_policies(transform, procedure, K, estimator, base, draws, seed).outcome(beta)


def win_rate_at_kl(
    transform: Transform,
    kl: float,
    procedure: Procedure,
    K: int,
    estimator: Estimator = "empirical",
    *,
    base: Procedure | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> WinRateAtK:
    """Compute `win_rate_at_k` at the beta where the mean true KL over the draws is `kl`.

    >>> from calibrated_rewards.theory.procedures import BestOf
    >>> from calibrated_rewards.theory.transforms import Exponential
    >>> at_kl = win_rate_at_kl(Exponential(10.0), 0.5, BestOf(4), 32, draws=200)
    >>> round(at_kl.win_rate, 2), round(at_kl.kl, 9)
    (0.85, 0.5)
    """
    from scipy.optimize import brentq

    policies = _draw_policies(transform, procedure, K, estimator, base, draws, seed)
    scale = float(np.ptp(policies.rewards)) or 1.0
    low, high = max(log(scale) - 25, -700.0), min(log(scale) + 25, 700.0)  # what exp can hold
    reached = [float(policies.kl(exp(log_beta)).mean()) for log_beta in (low, high)]
    if not reached[1] < kl < reached[0]:
        raise ValueError(f"win_rate_at_kl needs a KL > 0 and < {reached[0]:.4g}, the most K={K} gives, got kl={kl!r}.")
    log_beta = brentq(lambda x: float(policies.kl(exp(x)).mean()) - kl, low, high, xtol=1e-13)
    return policies.outcome(exp(log_beta), fixed_kl=True)


@dataclass(frozen=True)
class StepPolicies:
    """The optimal policies of many draws of references, a row each: densities constant between the ends of panels.

    A panel may be an atom: responses of one score, which tie with each other. Panels of no width are ignored.
    """

    rewards: Array
    ends: Array
    procedure: Procedure
    base: Procedure
    atoms: npt.NDArray[np.bool_] | None = None
    """Which panels are atoms; None for none."""

    def density(self, beta: float) -> Array:
        """Return f on each panel, proportional to e^{reward / beta}."""
        with np.errstate(over="ignore"):
            height = np.exp(np.minimum(self.rewards - self._highest, 0.0) / beta)
        return np.asarray(height / (height * np.diff(self.ends)).sum(axis=1, keepdims=True))

    @property
    def _highest(self) -> Array:
        """The highest reward of each row, among panels that have a width."""
        return np.asarray(np.where(np.diff(self.ends) > 0, self.rewards, -np.inf).max(axis=1, keepdims=True))

    def most_kl(self) -> Array:
        """Return the KL of each policy as beta falls to 0: minus the log of what has the highest reward."""
        at_highest = (self.rewards == self._highest) * np.diff(self.ends)
        return np.asarray(np.maximum(-np.log(np.minimum(at_highest.sum(axis=1), 1.0)), 0.0))

    def kl(self, beta: float) -> Array:
        """Return the KL of each policy."""
        density = self.density(beta)
        return np.asarray((np.diff(self.ends) * xlogy(density, density)).sum(axis=1))

    def win_rates(self, beta: float) -> Array:
        """Return the win rate of each policy."""
        blocks = np.array_split(np.arange(len(self.ends)), ceil(self.ends.size * self.order / 2e6))
        density = self.density(beta)
        atoms = np.zeros_like(density, bool) if self.atoms is None else self.atoms
        return np.concatenate([self._win_rates(self.ends[rows], density[rows], atoms[rows]) for rows in blocks])

    @property
    def order(self) -> int:
        """Nodes on each panel: with as many as draws the integral of two polynomials is exact, as of best-of-n."""
        sides = self.procedure, self.base
        polynomials = all(isinstance(each, Standard | BestOf | BestOfUpTo | WorstOf) for each in sides)
        return min(128, max(1 if polynomials else 16, *(each.draws for each in sides)))

    def _win_rates(self, ends: Array, density: Array, atoms: npt.NDArray[np.bool_]) -> Array:
        """Integrate the policies' output density against the CDF of the base's output (Thm 4)."""
        _, weights, running = rule = _gauss(self.order)
        policy, reference = _step_law(ends, density, rule), _step_law(ends, np.ones_like(density), rule)
        base_density = _tilt(self.base, reference) * np.diff(ends)[:, :, None]
        totals = base_density @ weights
        before = np.cumsum(totals, axis=1) - totals
        base_cdf = np.where(atoms[:, :, None], totals[:, :, None] / 2, base_density @ running.T) + before[:, :, None]
        output = policy.mass * _tilt(self.procedure, policy)
        won = (output * base_cdf).sum(axis=(1, 2))
        return np.asarray(won / (output.sum(axis=(1, 2)) * totals.sum(axis=1)))

    def outcome(self, beta: float, fixed_kl: bool = False) -> WinRateAtK:
        """Return means over the policies with their standard errors."""
        wins, kls = self.win_rates(beta), self.kl(beta)
        trade = 0.0
        if fixed_kl:  # beta moves with the draws, along the frontier, so that only what is off the frontier is noise
            nearby = beta * 1.01
            trade = float((self.win_rates(nearby) - wins).mean() / (self.kl(nearby) - kls).mean())
        errors = [float(x.std(ddof=1) / sqrt(len(x))) for x in (wins - trade * kls, kls)]
        return WinRateAtK(float(wins.mean()), float(kls.mean()), beta, *errors)


def _draw_policies(
    transform: Transform,
    procedure: Procedure,
    K: int,
    estimator: Estimator,
    base: Procedure | None,
    draws: int,
    seed: int,
) -> StepPolicies:
    """Make the policies of many draws of K references; panels end at references and where a tilt jumps."""
    if not (isfinite(draws) and int(draws) == draws and draws >= 2):
        raise ValueError(f"A standard error needs a whole draws >= 2, got draws={draws!r}.")
    whole, base = values(transform, K, estimator)[::2], procedure if base is None else base
    breaks = np.array(sorted({*procedure.breaks, *base.breaks}), np.float64)
    ends = np.hstack([np.random.default_rng(seed).random((draws, K)), np.tile(breaks, (draws, 1))])
    order = np.argsort(ends, axis=1)
    below = np.cumsum(order < K, axis=1)
    rewards = whole[np.hstack([np.zeros((draws, 1), np.intp), below])]
    ends = np.hstack([np.zeros((draws, 1)), np.take_along_axis(ends, order, axis=1), np.ones((draws, 1))])
    return StepPolicies(rewards, ends, procedure, base)


def _step_law(ends: Array, density: Array, rule: tuple[Array, Array, Array]) -> NodeLaw:
    """Return laws with a constant density on each panel."""
    gap, (x, weights, _) = np.diff(ends)[:, :, None], rule
    mass = gap * density[:, :, None]
    cdf = np.cumsum(mass, axis=1) - mass * (1 - x)
    survival = np.flip(np.cumsum(np.flip(mass, 1), axis=1), 1) - mass * x
    return NodeLaw(ends[:, :-1, None] + gap * x, mass * weights, np.clip(cdf, 0, 1), np.clip(survival, 0, 1))


def _tilt(procedure: Procedure, law: NodeLaw) -> Array:
    """Compute the procedure's tilt of each law, all at once where it is a function of the rank alone (Def. 6)."""
    if isinstance(procedure, CalibratedProcedure):
        return procedure.density(law.cdf, law.survival)
    flat = [part.reshape(len(part), -1) for part in (law.u, law.mass, law.cdf, law.survival)]
    return np.array([procedure.tilt(NodeLaw(*row)) for row in zip(*flat, strict=True)]).reshape(law.u.shape)


@lru_cache(maxsize=32)
def _gauss(order: int) -> tuple[Array, Array, Array]:
    """Return the Gauss-Legendre rule on [0, 1]: nodes, weights, and a matrix from values to running integrals."""
    x, weights = legendre.leggauss(order)
    p, odd = legendre.legvander(x, order), 2 * np.arange(order) + 1
    integrals = np.column_stack([x + 1, (p[:, 2:] - p[:, :-2]) / odd[1:]])
    return (x + 1) / 2, weights / 2, integrals @ (p[:, :order] * weights[:, None] * odd / 4).T
