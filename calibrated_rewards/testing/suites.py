"""Conformance suites: what every transform, procedure and scorer must hold, ours and yours; and scorers for tests.

>>> from calibrated_rewards.theory.transforms import Exponential
>>> print(check_transform(Exponential(5.0)))
Exponential(t=5.0): 6 checks passed
>>> check_transform(lambda u: -u)
Traceback (most recent call last):
AssertionError: <lambda> does not rise with u: Phi(0) = -0.0 is above Phi(1/512) = -0.001953125
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
from functools import partial
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32
from scipy.special import expit, logit, ndtri

from calibrated_rewards.prompts import Completion, Prompt, canonical_chat, prompt_key
from calibrated_rewards.samplers.protocol import Rollout, Seeds
from calibrated_rewards.testing.check_scorer import titled
from calibrated_rewards.theory.procedures import Procedure
from calibrated_rewards.theory.quadrature import Law, reference_law, resolve
from calibrated_rewards.theory.transforms import PreciseTransform, Transform

Array: TypeAlias = npt.NDArray[np.float64]
STEPS = 512
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Verdict:
    """What was checked, and that all of it held; a check that does not hold raises AssertionError and says why."""

    subject: str
    checks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.subject}: {len(self.checks)} checks passed"


def check_transform(transform: Transform) -> Verdict:
    """Monotone, finite inside, batch = one by one, stable under repeated calls, picklable, precise near the ends."""
    return Verdict(titled(transform), tuple(_transform_checks(transform)))


def _hold(condition: object, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def _transform_checks(transform: Transform) -> Iterator[str]:
    u = np.arange(STEPS + 1) / STEPS
    values = np.asarray(transform(u), np.float64)
    _hold(values.shape == u.shape, f"{titled(transform)} maps shape {u.shape} to {values.shape}")
    yield "one value for each u"
    inside = (
        np.isfinite(values[1:-1]).all() and values[0] < np.inf and values[-1] > -np.inf and not np.isnan(values).any()
    )
    _hold(inside, f"{titled(transform)} is not finite inside (0, 1), or is infinite the wrong way at an end")
    yield "finite inside (0, 1)"
    falls = np.flatnonzero(values[1:] < values[:-1] - 1e-12 * np.abs(values[1:-1]).max())
    if len(falls):
        first = int(falls[0])
        at = [f"Phi({Fraction(i, STEPS)}) = {values[i]}" for i in (first, first + 1)]
        raise AssertionError(f"{titled(transform)} does not rise with u: {' is above '.join(at)}")
    yield "monotone"
    one_by_one = np.array([float(np.asarray(transform(x))) for x in u.tolist()])
    _hold(np.allclose(values, one_by_one, rtol=1e-13, atol=0), f"{titled(transform)} gives other values one by one")
    yield "batch = one by one"
    _hold(np.array_equal(values, np.asarray(transform(u))), f"{titled(transform)} gives other values when called again")
    yield "deterministic"
    if isinstance(transform, PreciseTransform):
        shifted = np.asarray(transform.at_logit(logit(u[1:-1])))
        shift = values[1:-1] - shifted
        _hold(np.ptp(shift) <= 1e-9 * np.ptp(values[1:-1]), f"{titled(transform)}.at_logit is not Phi up to a constant")
        yield "at_logit = Phi up to a constant"


def check_procedure(procedure: Procedure, seed: int = 0, runs: int = 20_000) -> Verdict:
    """The three faces of a procedure agree: running it, its tilt of a law, its weights over a pool."""
    return Verdict(titled(procedure), tuple(_procedure_checks(procedure, np.random.default_rng(seed), runs)))


def _procedure_checks(procedure: Procedure, rng: np.random.Generator, runs: int) -> Iterator[str]:
    for law in _laws(procedure):
        tilt = np.asarray(procedure.tilt(law))
        _hold((tilt >= 0).all(), f"{titled(procedure)} gives some response a negative density")
        _hold(abs(law.mass @ tilt - 1) < 1e-9, f"{titled(procedure)} turns a law into one of mass {law.mass @ tilt}")
    yield "the output is a distribution"
    pool = np.round(rng.random(procedure.draws + 20), 1)
    weights, order = procedure.pool_weights(pool), rng.permutation(len(pool))
    _hold(
        abs(weights.sum() - 1) < 1e-9 and (weights >= 0).all(),
        f"{titled(procedure)} has pool weights that are no distribution",
    )
    _hold(
        np.allclose(procedure.pool_weights(pool[order]), weights[order], rtol=1e-9),
        f"{titled(procedure)} minds the pool's order",
    )
    yield "the pool's order does not matter"
    _hold(all(np.ptp(weights[pool == x]) < 1e-9 for x in pool), f"{titled(procedure)} treats tied scores differently")
    yield "ties share"
    scores = rng.random((runs, procedure.draws))
    chosen = np.asarray(procedure.choose(scores, rng))
    _hold(
        chosen.shape == (runs,), f"{titled(procedure)} chooses shape {chosen.shape} from scores of shape {scores.shape}"
    )
    output = np.sort(np.take_along_axis(scores, chosen[:, None], 1)[:, 0])
    yield "one choice for each row of scores"
    law = next(_laws(procedure))
    expected = np.interp(output, law.u, law.grid.running(law.per_logit * procedure.tilt(law))[0])
    gap = np.abs(expected - (np.arange(runs) + 0.5) / runs).max()
    _hold(gap < 3.5 / np.sqrt(runs), f"{titled(procedure)} run {runs} times is {gap:.4f} away from its tilt")
    yield "running it = its tilt"
    small = np.round(rng.random(procedure.draws), 2)
    shuffled = rng.permuted(np.tile(np.arange(len(small)), (runs, 1)), axis=1)
    picked = np.take_along_axis(shuffled, np.asarray(procedure.choose(small[shuffled], rng))[:, None], 1)[:, 0]
    gap = np.abs(np.bincount(picked, minlength=len(small)) / runs - procedure.pool_weights(small)).max()
    _hold(gap < 3.5 / np.sqrt(runs), f"{titled(procedure)} run {runs} times is {gap:.4f} away from its pool weights")
    yield "running it = its pool weights"


def _laws(procedure: Procedure) -> Iterator[Law]:
    """The reference's law, and that of the policy with f ~ e^{3u}, on grids that resolve what the procedure does."""
    output = partial(_output, procedure)
    yield reference_law(resolve(np.zeros_like, procedure.breaks, watch=output).grid)
    yield resolve(_steep, procedure.breaks, watch=output)


def _output(procedure: Procedure, law: Law) -> Array:
    return np.asarray(procedure.tilt(law) * law.per_logit)


def _steep(s: Array) -> Array:
    return np.asarray(3.0 * expit(s))


def check_picklable(thing: object) -> Verdict:
    """Frozen dataclasses of ours survive a spawned worker: equal, and the same repr, after a round trip."""
    copy = pickle.loads(pickle.dumps(thing))
    _hold(copy == thing and repr(copy) == repr(thing), f"{titled(thing)} comes back from pickle as {titled(copy)}")
    return Verdict(titled(thing), ("pickle round trip",))


@dataclass(frozen=True)
class HashScorer:
    """A scorer without a model: scores like draws of a normal distribution, the same ones always.

    >>> HashScorer()(["Hi", "Hi"], ["Hello!", "Go away"]).round(3)
    array([1.088, 1.544], dtype=float32)
    """

    seed: int = 0

    thread_safe = True

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion], /) -> Float32[np.ndarray, " n"]:
        """The score of each pair: mean 0, variance 1."""
        return np.array([self._score(p, c) for p, c in zip(prompts, completions, strict=True)], np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Its seed."""
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
        """The number in each completion."""
        numbers = [_NUMBER.findall(_text(c)) for _, c in zip(prompts, completions, strict=True)]
        values = [float(found[-1]) if found else self.default for found in numbers]
        return np.clip(values, -LARGEST, LARGEST).astype(np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """Its default."""
        return {"kind": "number", "default": self.default}


@dataclass(frozen=True)
class NumberSampler:
    """A sampler without a model: each completion is a draw of a normal distribution, in words of a few digits.

    Prompts have means of their own, `spread` apart; `NumberScorer` reads the number. Equal seeds, equal completions.

    >>> NumberSampler()(["Hi"], [[1]])
    [[Rollout(completion='-0.3758', tokens=1, finish='stop', logprob=None)]]
    """

    spread: float = 1.0

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds, /) -> list[list[Rollout]]:
        """One number for each seed."""
        return [[self._rollout(prompt, seed) for seed in own] for prompt, own in zip(prompts, seeds, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """How far prompts are apart."""
        return {"kind": "number", "spread": self.spread}

    def _rollout(self, prompt: Prompt, seed: int) -> Rollout:
        mean = self.spread * float(HashScorer()([prompt], [""])[0])
        drawn = float(HashScorer(seed)([prompt], ["drawn"])[0])
        return Rollout(f"{mean + drawn:.4f}", tokens=1, finish="stop")


_NUMBER = re.compile(r"(?:(?<!\d)[-+])?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def _text(completion: Completion) -> str:
    """A completion as text; of messages, what the last one says."""
    if isinstance(completion, str):
        return completion
    last = json.loads(canonical_chat(completion))[-1] if len(completion) else {}
    return str(last.get("content") or "")
