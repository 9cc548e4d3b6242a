"""Conformance suites for transforms and procedures, and scorers and a sampler without a model for tests.

>>> from calibrated_rewards.theory.transforms import Exponential
>>> print(check_transform(Exponential(5.0)))
Exponential(t=5.0): 7 checks passed
>>> check_transform(lambda u: -u)
Traceback (most recent call last):
AssertionError: <lambda> does not rise with u: Phi(0) = -0.0 is above Phi(1/512) = -0.001953125
>>> from calibrated_rewards.testing.check_scorer import check_scorer
>>> print(check_scorer(HashScorer(), sign=False))  # a line a check; here the first two
HashScorer(seed=0)
  ok    one finite number for each completion: 64 scores, ...
"""

import json
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32
from scipy.special import expit, logit, ndtri

from calibrated_rewards.prompts import Completion, Prompt, canonical_chat, prompt_key
from calibrated_rewards.samplers.protocol import Rollout, Seeds
from calibrated_rewards.testing.subject import describe
from calibrated_rewards.theory.procedures import Procedure
from calibrated_rewards.theory.quadrature import Law, reference_law, resolve
from calibrated_rewards.theory.transforms import PreciseTransform, Transform

Array: TypeAlias = npt.NDArray[np.float64]
STEPS = 512
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Verdict:
    """The name of a thing and the checks that it passed; a check that fails raises AssertionError instead."""

    subject: str
    checks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.subject}: {len(self.checks)} checks passed"


def _require(condition: object, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def check_transform(transform: Transform) -> Verdict:
    """Check a transform: monotone, finite inside (0, 1), the same one by one and again, precise near the ends."""
    name = describe(transform)
    return Verdict(name, tuple(_check_transform(transform, name)))


def _check_transform(transform: Transform, name: str) -> Iterator[str]:
    u = np.arange(STEPS + 1) / STEPS
    values = np.asarray(transform(u), np.float64)
    _require(values.shape == u.shape, f"{name} maps shape {u.shape} to {values.shape}")
    yield "one value for each u"
    inside = np.isfinite(values[1:-1]).all() and values[0] < np.inf and values[-1] > -np.inf
    _require(
        inside and not np.isnan(values).any(),
        f"{name} is not finite inside (0, 1), or is infinite the wrong way at an end",
    )
    yield "finite inside (0, 1)"
    falls = np.flatnonzero(values[1:] < values[:-1] - 1e-12 * np.abs(values[1:-1]).max())
    if len(falls):
        first = int(falls[0])
        at = [f"Phi({Fraction(i, STEPS)}) = {values[i]}" for i in (first, first + 1)]
        raise AssertionError(f"{name} does not rise with u: {' is above '.join(at)}")
    yield "monotone"
    one_by_one = np.array([float(np.asarray(transform(x))) for x in u.tolist()])
    _require(np.allclose(values, one_by_one, rtol=1e-13, atol=0), f"{name} gives other values one by one")
    yield "batch = one by one"
    _require(np.array_equal(values, np.asarray(transform(u))), f"{name} gives other values when called again")
    yield "deterministic"
    if isinstance(transform, PreciseTransform):
        shift = values[1:-1] - np.asarray(transform.at_logit(logit(u[1:-1])))
        _require(np.ptp(shift) <= 1e-9 * np.ptp(values[1:-1]), f"{name}.at_logit is not Phi up to a constant")
        yield "at_logit = Phi up to a constant"
        _require(
            np.isinf(values[-1]) or abs(shift - values[-1]).max() <= 1e-9 * max(np.ptp(values[1:-1]), abs(values[-1])),
            f"{name}.at_logit is not Phi(u) - Phi(1), which a Chain relies on",
        )
        yield "that constant is Phi(1)"


def check_procedure(procedure: Procedure, seed: int = 0, runs: int = 20_000) -> Verdict:
    """Check that three descriptions of a procedure agree: running it, its tilt of a law, its weights over a pool."""
    name = describe(procedure)
    return Verdict(name, tuple(_check_procedure(procedure, name, np.random.default_rng(seed), runs)))


def _check_procedure(procedure: Procedure, name: str, rng: np.random.Generator, runs: int) -> Iterator[str]:
    def output(law: Law) -> Array:
        return np.asarray(procedure.tilt(law) * law.per_logit)

    # The reference's law, and that of the policy with f ~ e^{3u}, on grids that resolve what the procedure does.
    reference = reference_law(resolve(np.zeros_like, procedure.breaks, watch=output).grid)
    for law in (reference, resolve(lambda s: np.asarray(3.0 * expit(s)), procedure.breaks, watch=output)):
        tilt = np.asarray(procedure.tilt(law))
        _require((tilt >= 0).all(), f"{name} gives some response a negative density")
        _require(abs(law.mass @ tilt - 1) < 1e-9, f"{name} turns a law into one of mass {law.mass @ tilt}")
    yield "the output is a distribution"
    pool = np.round(rng.random(procedure.draws + 20), 1)
    weights, order = procedure.pool_weights(pool), rng.permutation(len(pool))
    _require(
        abs(weights.sum() - 1) < 1e-9 and (weights >= 0).all(), f"{name} has pool weights that are no distribution"
    )
    _require(
        np.allclose(procedure.pool_weights(pool[order]), weights[order], rtol=1e-9), f"{name} minds the pool's order"
    )
    yield "the pool's order does not matter"
    _require(all(np.ptp(weights[pool == x]) < 1e-9 for x in pool), f"{name} treats tied scores differently")
    yield "ties share"
    scores = rng.random((runs, procedure.draws))
    choices = np.asarray(procedure.choose(scores, rng))
    _require(choices.shape == (runs,), f"{name} chooses shape {choices.shape} from scores of shape {scores.shape}")
    chosen = np.sort(np.take_along_axis(scores, choices[:, None], 1)[:, 0])
    yield "one choice for each row of scores"
    expected = np.interp(chosen, reference.u, reference.grid.running(output(reference))[0])
    gap = np.abs(expected - (np.arange(runs) + 0.5) / runs).max()
    _require(gap < 3.5 / np.sqrt(runs), f"{name} run {runs} times is {gap:.4f} away from its tilt")
    yield "running it = its tilt"
    small = np.round(rng.random(procedure.draws), 2)
    shuffled = rng.permuted(np.tile(np.arange(len(small)), (runs, 1)), axis=1)
    picks = np.take_along_axis(shuffled, np.asarray(procedure.choose(small[shuffled], rng))[:, None], 1)[:, 0]
    gap = np.abs(np.bincount(picks, minlength=len(small)) / runs - procedure.pool_weights(small)).max()
    _require(gap < 3.5 / np.sqrt(runs), f"{name} run {runs} times is {gap:.4f} away from its pool weights")
    yield "running it = its pool weights"


def check_picklable(thing: object) -> Verdict:
    """Check that a thing comes back from pickle equal and with the same repr, as a spawned worker needs it."""
    copy, name = pickle.loads(pickle.dumps(thing)), describe(thing)
    _require(copy == thing and repr(copy) == repr(thing), f"{name} comes back from pickle as {describe(copy)}")
    return Verdict(name, ("pickle round trip",))


@dataclass(frozen=True)
class HashScorer:
    """A scorer without a model: standard normal scores, the same ones in every process.

    >>> HashScorer()(["Hi", "Hi"], ["Hello!", "Go away"]).round(3)
    array([1.088, 1.544], dtype=float32)
    """

    seed: int = 0

    thread_safe = True

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Float32[np.ndarray, " n"]:
        """Score each pair: mean 0, variance 1."""
        return np.array([self._score(p, c) for p, c in zip(prompts, completions, strict=True)], np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Return the kind and the seed."""
        return {"kind": "hash", "seed": self.seed}

    def _score(self, prompt: Prompt, completion: Completion) -> float:
        data = prompt_key(prompt) + _text(completion).encode("utf-8", "surrogatepass")
        digest = blake2b(data, digest_size=8, key=str(self.seed).encode()).digest()
        return float(ndtri((int.from_bytes(digest, "little") + 0.5) / 2**64))


@dataclass(frozen=True)
class NumberScorer:
    """A scorer without a model: the last number in a completion, within float32; or a default.

    >>> NumberScorer()(["2+2=", "2+2=", "2+2="], ["4", "3 or 4? I say -1.5", "Who knows?"])
    array([ 4. , -1.5,  0. ], dtype=float32)
    """

    default: float = 0.0

    thread_safe = True

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Float32[np.ndarray, " n"]:
        """Read the number in each completion."""
        numbers = [_NUMBER.findall(_text(c)) for _, c in zip(prompts, completions, strict=True)]
        values = [float(each[-1]) if each else self.default for each in numbers]
        return np.clip(values, -LARGEST, LARGEST).astype(np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Return the kind and the default."""
        return {"kind": "number", "default": self.default}


@dataclass(frozen=True)
class NumberSampler:
    """A sampler without a model: each completion is a number, drawn from a normal distribution.

    Each prompt has its own mean, with standard deviation `spread`; `NumberScorer` reads the number. Equal seeds give
    equal completions.

    >>> NumberSampler()(["Hi"], [[1]])
    [[Rollout(completion='-0.3758', tokens=1, finish='stop', logprob=None)]]
    """

    spread: float = 1.0

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds, /) -> list[list[Rollout]]:
        """Draw one number for each seed."""
        return [[self._draw(prompt, seed) for seed in each] for prompt, each in zip(prompts, seeds, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """Return the kind and the spread."""
        return {"kind": "number", "spread": self.spread}

    def _draw(self, prompt: Prompt, seed: int) -> Rollout:
        mean = self.spread * float(HashScorer()([prompt], [""])[0])
        noise = float(HashScorer(seed)([prompt], ["drawn"])[0])
        return Rollout(f"{mean + noise:.4f}", tokens=1, finish="stop")


_NUMBER = re.compile(r"(?:(?<!\d)[-+])?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def _text(completion: Completion) -> str:
    """Return a completion as text; of messages, the content of the last one."""
    if isinstance(completion, str):
        return completion
    last = json.loads(canonical_chat(completion))[-1] if len(completion) else {}
    return str(last.get("content") or "")
