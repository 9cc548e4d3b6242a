"""Laws of a quantile: densities on [0, 1] held on Gauss-Legendre panels in the logit s = log(u / (1 - u)).

After calibration every question is an integral over u in [0, 1], and at small beta or large N all of the mass sits
within 1e-6 of an end. In the logit both ends are far away and every scale there has width about 1, so a handful of
panels resolves any of them; what the panels cannot see in advance (kinks, jumps, narrow peaks) is found by bisection.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.polynomial import legendre
from scipy.special import expit, log_expit, logit

Array: TypeAlias = npt.NDArray[np.float64]

ORDER = 16
NODES, WEIGHTS = legendre.leggauss(ORDER)
# Values at the nodes -> Legendre coefficients, integrals from -1 up to each node, derivatives at the nodes.
TO_COEFFICIENTS = np.linalg.inv(legendre.legvander(NODES, ORDER - 1))
RUNNING = np.stack([legendre.legval(NODES, legendre.legint(c, lbnd=-1)) for c in TO_COEFFICIENTS.T], axis=1)
DIFFERENTIATE = np.stack([legendre.legval(NODES, legendre.legder(c)) for c in TO_COEFFICIENTS.T], axis=1)
SIGNS: Array = np.where(np.arange(ORDER) % 2, -1.0, 1.0)
# A polynomial through rounded values is off by this much more at its edges than at its nodes.
EDGE_NOISE = 30.0

# |s| = 45 leaves out 3e-20 of the reference's mass at each end; panels of 1.5 resolve F^N u^{N-1} for any N.
WINDOW: Array = np.linspace(-45.0, 45.0, 61)
FAR: Array = np.sinh(np.linspace(np.arcsinh(45.0), np.arcsinh(1e7), 40))
MOST_PANELS = 2000
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Grid:
    """Panels in the logit between `edges`; functions are arrays of their values at `s`, panel after panel."""

    edges: Array

    @cached_property
    def s(self) -> Array:
        """The nodes of all panels, as ascending logits."""
        middle, half = (self.edges[1:] + self.edges[:-1]) / 2, self.widths / 2
        return (middle[:, None] + half[:, None] * NODES).ravel()

    @cached_property
    def widths(self) -> Array:
        """The length of each panel in the logit."""
        return np.diff(self.edges)

    @cached_property
    def u(self) -> Array:
        """The nodes of all panels, as quantiles."""
        return np.asarray(expit(self.s))

    @cached_property
    def log_slope(self) -> Array:
        """log du/ds = log u (1 - u): the log density of the reference's law in the logit."""
        return np.asarray(log_expit(self.s) + log_expit(-self.s))

    @cached_property
    def weights(self) -> Array:
        """The quadrature weight of each node, for ds."""
        return (self.widths[:, None] / 2 * WEIGHTS).ravel()

    def running(self, density: Array) -> tuple[Array, Array]:
        """Integrate a density in s from -inf to each node and from there to inf, each precise near its end."""
        panels = density.reshape(-1, ORDER) * (self.widths[:, None] / 2)
        inside, total = panels @ RUNNING.T, panels @ WEIGHTS
        before = np.concatenate([[0.0], np.cumsum(total)[:-1]])
        after = np.concatenate([np.cumsum(total[::-1])[-2::-1], [0.0]])
        return (before[:, None] + inside).ravel(), (after[:, None] + total[:, None] - inside).ravel()

    def derivative(self, values: Array) -> Array:
        """Differentiate with respect to s the panels' polynomials through `values`."""
        return np.asarray((values.reshape(-1, ORDER) @ DIFFERENTIATE.T * (2 / self.widths)[:, None]).ravel())

    def unresolved(self, density: Array, tolerance: float, breaks: Array | None = None) -> npt.NDArray[np.bool_]:
        """Mark the panels that miss more than `tolerance` of a density in s."""
        return np.asarray(self.missed(density, breaks) * self.widths > tolerance * (self.weights @ density))

    def missed(self, values: Array, breaks: Array | None = None) -> Array:
        """Estimate how much each panel's polynomial misses of a function of s.

        Judged by its last Legendre coefficients, and by whether neighbours agree at their common edge: a jump between
        an edge and the next node is seen by no coefficient. At `breaks`, logits where it jumps, they need not.
        """
        coefficients = values.reshape(-1, ORDER) @ TO_COEFFICIENTS.T
        missed = np.abs(coefficients[:, -3:]).max(axis=1)
        gap = np.abs(coefficients[1:] @ SIGNS - coefficients[:-1].sum(axis=1)) / EDGE_NOISE
        if breaks is not None:
            gap[np.isin(self.edges[1:-1], breaks)] = 0.0
        missed[1:] = np.maximum(missed[1:], gap)
        missed[:-1] = np.maximum(missed[:-1], gap)
        return np.asarray(missed)

    def split(self, panels: npt.NDArray[np.bool_]) -> "Grid":
        """Return a grid with these panels bisected."""
        middles = (self.edges[1:] + self.edges[:-1])[panels] / 2
        return Grid(np.sort(np.concatenate([self.edges, middles])))

    def interpolate(self, values: Array, s: Array) -> Array:
        """Evaluate the panels' polynomials through `values` at any logits, held constant outside the edges."""
        inside = np.clip(s, self.edges[0], self.edges[-1])
        panel = np.clip(np.searchsorted(self.edges, inside, side="right") - 1, 0, len(self.widths) - 1)
        local = 2 * (inside - self.edges[panel]) / self.widths[panel] - 1
        coefficients = values.reshape(-1, ORDER) @ TO_COEFFICIENTS.T
        return np.asarray(legendre.legval(local, coefficients[panel].T, tensor=False))


@dataclass(frozen=True)
class Law:
    """A distribution of u on a grid: its log density against the reference (0 for the reference itself, Lemma 4)."""

    grid: Grid
    log_density: Array

    @cached_property
    def per_logit(self) -> Array:
        """Density in s at the nodes."""
        return np.exp(self.log_density + self.grid.log_slope)

    @cached_property
    def mass(self) -> Array:
        """Weight of each node: the mean of any function under this law is a sum with these."""
        return self.grid.weights * self.per_logit

    @cached_property
    def _running(self) -> tuple[Array, Array]:
        return self.grid.running(self.per_logit)

    @property
    def u(self) -> Array:
        """The nodes as quantiles of the reference."""
        return self.grid.u

    @property
    def cdf(self) -> Array:
        """The cumulative F(u) at the nodes."""
        return np.clip(self._running[0], 0.0, 1.0)

    @property
    def survival(self) -> Array:
        """The survival 1 - F(u) at the nodes, to full relative precision."""
        return np.clip(self._running[1], 0.0, 1.0)


@dataclass(frozen=True)
class NodeLaw:
    """A law of u by its values at some nodes alone: all that `Procedure.tilt` reads of a law."""

    u: Array
    mass: Array
    cdf: Array
    survival: Array


def reference_law(grid: Grid) -> Law:
    """Return the reference's own law, Unif[0, 1] (Lemma 4)."""
    return Law(grid, np.zeros_like(grid.s))


def normalised(grid: Grid, log_weight: Array) -> Law:
    """Return the law whose density against the reference is proportional to e^{log_weight}, however large that is."""
    log_mass = log_weight + grid.log_slope
    peak = log_mass.max()
    return Law(grid, log_weight - peak - np.log(grid.weights @ np.exp(log_mass - peak)))


def resolve(
    log_weight: Callable[[Array], Array],
    breaks: Iterable[float] = (),
    tolerance: float = 1e-13,
    watch: Callable[[Law], Array] | None = None,
) -> Law:
    """Return the law with density e^{log_weight(s)}, normalised, on a grid fine enough for it (and for `watch`).

    `breaks` are quantiles in (0, 1) where something jumps or bends. Refinement ends at the tolerance, at the rounding
    error of log_weight itself, or where a panel has become too short to matter.
    """
    jumps = logit(np.array(list(breaks), np.float64))
    edges = np.unique(np.concatenate([_window(log_weight), jumps]))
    grid = Grid(edges[np.isfinite(edges)])
    while True:
        exponent = log_weight(grid.s)
        law = normalised(grid, exponent)
        noise = 4 * EPSILON * float(np.abs(exponent[law.mass > 1e-20]).max(initial=0.0))
        if noise > 1e-6:
            raise ValueError(
                f"Phi/beta of size {noise / EPSILON / 4:.2g} has no digits left after rounding: "
                "a larger beta, or a transform with an at_logit of its own, is needed."
            )
        coarse = grid.unresolved(law.per_logit, max(tolerance, noise), jumps)
        if watch is not None:
            coarse |= grid.unresolved(watch(law), max(tolerance, noise), jumps)
        coarse &= grid.widths > 1e-9 * np.maximum(1.0, np.abs(grid.edges[1:]))
        if not coarse.any() or len(coarse) > MOST_PANELS:
            return law
        grid = grid.split(coarse)


def _window(log_weight: Callable[[Array], Array]) -> Array:
    """Place panel edges that cover the bulk of both the reference and e^{log_weight}, wherever in the logit that is."""
    edges: Array = np.concatenate([-FAR[:0:-1], WINDOW, FAR[1:]])
    log_mass = log_weight(edges) + log_expit(edges) + log_expit(-edges)
    if not np.max(log_mass) < np.inf or log_mass[-1] > np.max(log_mass) - 60.0:
        raise ValueError("e^{Phi/beta} has no finite integral: Phi rises too fast towards u = 1 for this beta.")
    heavy = np.flatnonzero(log_mass > np.max(log_mass) - 60.0)
    low, high = edges[max(heavy[0] - 1, 0)], edges[min(heavy[-1] + 1, len(edges) - 1)]
    return np.asarray(edges[(edges >= min(low, -45.0)) & (edges <= max(high, 45.0))])
