"""Write saved_by_0_1/: every kind of file that version 0.1 leaves on disk, small, and what is to be read in it.

    python tests/data/make_saved_by_0_1.py

It was run once, with the last commit of the package's first layout, and is kept to say how each number came about; a
later version has other modules, and reads the files in place of writing them. What tests/test_saved_by_earlier_versions
compares with is worked out here by formulas that use nothing of the package: `Among` and what follows it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import comb, exp, expm1, factorial, log, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import integrate, optimize, special, stats

HERE = Path(__file__).parent
OUT = HERE / "saved_by_0_1"
sys.path[:0] = [str(HERE), str(HERE.parent)]

import functions_of_saved_rewards as functions  # noqa: E402

from calibrated_rewards import (  # noqa: E402
    BestOf,
    CalibratedReward,
    Chain,
    Exponential,
    Log,
    ReferenceTable,
    Standard,
    Tabulated,
    WorstOf,
    id_key,
    optimum,
    tune,
)
from calibrated_rewards.amortised import fit  # noqa: E402
from calibrated_rewards.arms import ARMS  # noqa: E402
from calibrated_rewards.calibrate import calibrate, import_rollouts  # noqa: E402
from calibrated_rewards.calibrations import (  # noqa: E402
    EmpiricalCDF,
    LogSigmoidAtQuantile,
    MedianCentered,
    SmoothedCDF,
    ZScore,
)
from calibrated_rewards.estimates import Samples  # noqa: E402
from calibrated_rewards.evaluate import evaluate  # noqa: E402
from calibrated_rewards.optimal import Optimal  # noqa: E402
from calibrated_rewards.procedures import Calibrated  # noqa: E402
from calibrated_rewards.reading.labels import Difference, Expected, Label, Ordinal, Weighted  # noqa: E402
from calibrated_rewards.reading.text import Text  # noqa: E402
from calibrated_rewards.reweighted import reweighted  # noqa: E402
from calibrated_rewards.samplers.protocol import Rollout  # noqa: E402
from calibrated_rewards.scorers.cost import Cost  # noqa: E402
from calibrated_rewards.scorers.ensemble import Ensemble, LowerBound, Mean, Min  # noqa: E402
from calibrated_rewards.scorers.function import Function  # noqa: E402
from calibrated_rewards.scorers.loading import FromCheckpoint  # noqa: E402
from calibrated_rewards.scorers.pair_models import PairClassifier  # noqa: E402
from calibrated_rewards.scorers.pairwise import BothOrders, MeanWin  # noqa: E402
from calibrated_rewards.scorers.pretrained import Placement  # noqa: E402
from calibrated_rewards.scorers.recipe import Loaded  # noqa: E402
from calibrated_rewards.scorers.remote import Remote  # noqa: E402
from calibrated_rewards.scorers.remote_dialects import Native, OpenRlhf  # noqa: E402
from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore  # noqa: E402
from calibrated_rewards.testing import HashScorer, NumberSampler, NumberScorer  # noqa: E402
from calibrated_rewards.transforms import Affine, NormalQuantile, Power  # noqa: E402

# The table: ragged K, ties, a chat, an id, scores that float32 holds exactly.
CHAT = [{"role": "user", "content": "Hi"}]
ROWS: list[tuple[Any, list[float], list[Any]]] = [
    ("2+2=", [4.0, 1.0, 0.5, 2.0, 1.0], []),
    (CHAT, [0.25, -1.0], ["<|user|>Hi<|end|>"]),
    ("alone", [0.0], []),
    ("by id", [3.0, -2.0, 5.0, -1.0, 0.0, 4.0, 1.0, 2.0], [id_key("row-7"), id_key(7)]),
    ("all alike", [1.0, 1.0, 1.0], []),
]
PROBES = [{"prompt": "2+2=", "completion": "It is 4", "score": 4.0}, {"prompt": CHAT, "completion": "-1", "score": -1}]
META = {"scorer": {"kind": "number", "default": 0.0}, "probes": PROBES, "form": {"completions": "text"}}
# Below all, between two, tied with one and with two, above all.
ASKED: list[tuple[int, float]] = [
    *product([0], [-9.0, 0.5, 1.0, 1.5, 9.0]),
    *product([1], [-1.0, 0.0, 1.0]),
    *product([2], [-1.0, 0.0, 1.0]),
    *product([3], [-2.5, -2.0, 1.25, 5.0]),
    *product([4], [0.0, 1.0, 2.0]),
]


@dataclass(frozen=True)
class Among:
    """A score and the references that it stands among: all that a reward depends on."""

    references: np.ndarray
    score: float

    @property
    def K(self) -> int:
        """How many."""
        return len(self.references)

    @property
    def index(self) -> int:
        """2 below + equal, from 0 to 2K."""
        return int(2 * (self.references < self.score).sum() + (self.references == self.score).sum())

    @property
    def u(self) -> float:
        """Eq. 12."""
        return self.index / (2 * self.K)


Formula = Callable[[Among], float]


def at_rank(value: Callable[[float], float], low: bool = False, high: bool = False) -> Formula:
    """Phi(u), half a reference short of an end where Phi is infinite."""

    def formula(of: Among) -> float:
        first, last = (1 / (2 * of.K) if low else 0.0), (1 - 1 / (2 * of.K) if high else 1.0)
        return value(min(max(of.u, first), last))

    return formula


def posterior(value: Callable[[float], float]) -> Formula:
    """The mean of Phi under Beta(i/2 + 1, K - i/2 + 1), by scipy's adaptive quadrature."""

    def formula(of: Among) -> float:
        law = stats.beta(of.index / 2 + 1, of.K - of.index / 2 + 1)
        found = integrate.quad(lambda u: value(u) * law.pdf(u), 0, 1, epsabs=1e-13, epsrel=1e-12, limit=500)
        return float(found[0])

    return formula


def with_ties(whole: Callable[[int, int], float]) -> Formula:
    """Of an odd index the mean of its neighbours: a tie is broken by a fair coin."""
    return lambda of: (whole(of.index // 2, of.K) + whole((of.index + 1) // 2, of.K)) / 2


def falling(p: int) -> Callable[[int, int], float]:
    """binom(j, p) / binom(K, p), the unbiased estimate of C^p; for K < p there is none."""
    return lambda j, K: comb(j, p) / comb(K, p)


def shot(g: Callable[[float], float], beta: float) -> Callable[[float], float]:
    """The optimum for a procedure of density g against itself, by scipy's solver and a root: not the package's way.

    F' = f(1) e^{Phi/beta} and Phi' = g(F) g(u), from F(1) = 1 and Phi(1) = 0 down to F(0) = 0.
    """

    def down(log_density: float) -> Any:
        def slope(t: float, state: np.ndarray) -> list[float]:
            u, (F, phi) = 1 - t, state
            return [-exp(log_density + phi / beta), -g(min(max(F, 0.0), 1.0)) * g(u)]

        return integrate.solve_ivp(
            slope, (0, 1), [1.0, 0.0], method="DOP853", rtol=1e-12, atol=1e-14, dense_output=True
        )

    top = optimize.brentq(lambda x: down(x).y[0, -1], -6, 8, xtol=1e-14)
    curve = down(top).sol
    return lambda u: float(curve(1 - u)[1])


def unit(value: Callable[[float], float]) -> Callable[[float], float]:
    """Onto [0, 1]."""
    low, high = value(0.0), value(1.0)
    return lambda u: (value(u) - low) / (high - low)


def standard(value: Callable[[float], float]) -> Callable[[float], float]:
    """Mean 0 and variance 1 for uniform u."""
    mean = integrate.quad(value, 0, 1, epsabs=1e-13)[0]
    spread = sqrt(integrate.quad(lambda u: (value(u) - mean) ** 2, 0, 1, epsabs=1e-13)[0])
    return lambda u: (value(u) - mean) / spread


def smoothed(of: Among, temperature: float) -> float:
    """PAR."""
    return float(np.mean(1 / (1 + np.exp(-(of.score - of.references) / temperature))))


def z_score(of: Among) -> float:
    """0 where all are equal."""
    sd = np.sqrt(np.mean((of.references - of.references.mean()) ** 2))
    return float((of.score - of.references.mean()) / sd) if sd else 0.0


def median_centred(of: Among, mad: bool) -> float:
    """A step where the median absolute deviation is 0."""
    gap = of.score - float(np.median(of.references))
    scale = float(np.median(np.abs(of.references - np.median(of.references)))) if mad else 1.0
    return float(np.heaviside(gap, 0.5)) if scale == 0 else 1 / (1 + exp(-gap / scale))


def log_sigmoid(of: Among, q: float) -> float:
    """Against the smallest reference with a share of q at or below it."""
    at = float(np.sort(of.references)[int(np.ceil(q * of.K)) - 1])
    return -log(1 + exp(at - of.score))


def joined(u: float) -> float:
    """The monotone cubic through (0, 0), (1/2, 1/5), (1, 1), from Fritsch and Carlson's formulas."""
    d1, d2 = 0.4, 1.6
    inner = 2 / (1 / d1 + 1 / d2)
    left = max((3 * d1 - d2) / 2, 0.0) if (3 * d1 - d2) * d1 > 0 else 0.0
    right = min((3 * d2 - d1) / 2, 3 * d2)
    x0, y0, y1, m0, m1 = (0.0, 0.0, 0.2, left, inner) if u < 0.5 else (0.5, 0.2, 1.0, inner, right)
    t, h = (u - x0) / 0.5, 0.5
    cubic = (2 * t**3 - 3 * t**2 + 1) * y0 + (t**3 - 2 * t**2 + t) * h * m0
    return cubic + (3 * t**2 - 2 * t**3) * y1 + (t**3 - t**2) * h * m1


def rewards() -> Iterator[tuple[str, dict[str, Any], Formula]]:
    """A name, what differs from the defaults, and the reward by formula."""
    e5, e_7 = (lambda u: exp(5 * u)), (lambda u: -exp(-7 * u))
    yield "identity", {}, at_rank(lambda u: u)
    yield "identity-standard", {"scale": "standard"}, at_rank(lambda u: (u - 0.5) * sqrt(12))
    yield "log", {"transform": Log()}, at_rank(log, low=True)
    yield "log-standard", {"transform": Log(), "scale": "standard"}, at_rank(lambda u: log(u) + 1, low=True)
    yield "exponential", {"transform": Exponential(5.0), "beta": 0.25}, at_rank(unit(e5))
    yield "exponential-raw", {"transform": Exponential(5.0), "scale": "raw"}, at_rank(e5)
    yield "exponential-standard", {"transform": Exponential(5.0), "scale": "standard"}, at_rank(standard(e5))
    yield "exponential-negative", {"transform": Exponential(-7.0)}, at_rank(unit(e_7))
    ends = partial(at_rank, low=True, high=True)
    yield "normal-quantile", {"transform": NormalQuantile()}, ends(lambda u: float(stats.norm.ppf(u)))
    yield "power", {"transform": Power(3.0)}, at_rank(lambda u: u**3)
    affine = {"transform": Affine(2.0, -1.0), "scale": "raw"}
    yield "affine", affine, at_rank(lambda u: 2 * u - 1)
    yield "tabulated", {"transform": Tabulated([0.0, 0.5, 1.0], [0.0, 0.2, 1.0])}, at_rank(joined)
    chain = Chain(Power(2.0), Exponential(3.0), Affine(0.5, 1.0))
    yield "chain", {"transform": chain, "scale": "raw"}, at_rank(lambda u: 0.5 * exp(3 * u**2) + 1)
    yield "optimal-standard", {"transform": Optimal(Standard(), 0.1), "scale": "raw"}, at_rank(lambda u: u - 1)
    best, worst = (lambda c: 4 * c**3), (lambda c: 4 * (1 - c) ** 3)
    best_of = {"transform": Optimal(BestOf(4), 0.3), "scale": "raw"}
    yield "optimal-best-of", best_of, at_rank(shot(best, 0.3))
    worst_of = {"transform": Optimal(WorstOf(4), 0.3), "scale": "unit"}
    yield "optimal-worst-of", worst_of, at_rank(unit(shot(worst, 0.3)))
    base = {"transform": Optimal(BestOf(4), 0.3, base=BestOf(4)), "scale": "unit"}
    yield "optimal-base", base, at_rank(unit(shot(best, 0.3)))
    own = {"transform": Optimal(Calibrated(functions.rising, draws=16), 0.3), "scale": "unit"}
    yield "optimal-own-procedure", own, at_rank(unit(shot(lambda c: 2 * c, 0.3)))
    yield "own-function", {"transform": functions.half}, at_rank(lambda u: u / (2 - u))
    chosen = optimum(BestOf(4), beta=0.3)
    yield "chosen-optimum", {"transform": chosen.transform, "beta": chosen.beta}, at_rank(unit(shot(best, 0.3)))
    tuned = tune(BestOf(4), kl=1.0)
    t = tuned.transform.parts[0].t  # type: ignore[attr-defined]
    yield "tuned", {"transform": tuned.transform, "beta": tuned.beta}, at_rank(lambda u: expm1(t * u) / expm1(t))
    yield "posterior", {"estimator": "posterior"}, lambda of: (of.index / 2 + 1) / (of.K + 2)
    digamma = special.digamma
    of_log: Formula = lambda of: float(digamma(of.index / 2 + 1) - digamma(of.K + 2))  # noqa: E731
    yield "posterior-log", {"estimator": "posterior", "transform": Log()}, of_log
    of_e5 = {"estimator": "posterior", "transform": Exponential(5.0), "scale": "raw"}
    yield "posterior-exponential", of_e5, posterior(e5)
    # C itself: what is unbiased for it is what K draws say.
    yield "unbiased", {"estimator": "unbiased", "transform": Power(1.0)}, with_ties(falling(1))

    def series(j: int, K: int) -> float:
        return sum(5.0**m / factorial(m) * comb(j, m) / comb(K, m) for m in range(j + 1))

    unbiased_e5 = {"estimator": "unbiased", "transform": Exponential(5.0), "scale": "raw"}
    yield "unbiased-exponential", unbiased_e5, with_ties(series)
    randomised = {"estimator": "randomised"}
    yield "randomised", randomised, with_ties(lambda j, K: (j + 0.5) / (K + 1))
    of_power = {"estimator": "randomised", "transform": Power(2.0)}

    def third(j: int, K: int) -> float:
        return ((j + 1) ** 3 - j**3) / (3 * (K + 1) ** 2)

    yield "randomised-power", of_power, with_ties(third)
    near: Formula = lambda of: float(np.heaviside(of.score - of.references, 0.5).mean())  # noqa: E731

    def within(of: Among) -> float:
        gap = of.score - of.references
        return float(np.where(np.abs(gap) <= 0.5, 0.5, gap > 0).mean())

    yield "empirical-cdf", {"calibration": EmpiricalCDF()}, near
    yield "empirical-cdf-tolerance", {"calibration": EmpiricalCDF(tolerance=0.5)}, within
    yield "smoothed-cdf", {"calibration": SmoothedCDF(0.5)}, partial(smoothed, temperature=0.5)
    plain = {"scale": "raw"}
    yield "z-score", {"calibration": ZScore(), **plain}, z_score
    yield "median-centered", {"calibration": MedianCentered()}, partial(median_centred, mad=False)
    yield "median-centered-mad", {"calibration": MedianCentered("mad")}, partial(median_centred, mad=True)
    quantile = {"calibration": LogSigmoidAtQuantile(q=0.7), **plain}
    yield "log-sigmoid-at-quantile", quantile, partial(log_sigmoid, q=0.7)
    smooth_e5 = {"calibration": SmoothedCDF(), "transform": Exponential(5.0)}
    yield "smoothed-cdf-exponential", smooth_e5, lambda of: unit(e5)(smoothed(of, 1.0))
    settings = {"name": "mine", "id_column": "row_id", "batch_size": 2, "endings": ("<|end|>", "</s>")}
    yield "settings", {**settings, "on_missing": "neutral", "alarm": False, "beta": 0.5}, at_rank(lambda u: u)
    yield "skip", {"on_missing": "skip"}, at_rank(lambda u: u)


def checkpoint(name: str, **told: Any) -> Loaded:
    """A scorer that comes from a checkpoint, which nobody loads here."""
    return Loaded(FromCheckpoint(f"/checkpoints/{name}", rules=2, **told))


def scorers() -> Iterator[tuple[str, Any]]:
    """Each kind of scorer that a reward.json can hold; the checkpoints lie nowhere, and are not loaded."""
    number = NumberScorer()
    yield "hash", HashScorer(3)
    yield "number", NumberScorer(-1.0)
    yield "function-by-name", functions.length
    yield "function", Function(functions.exclamations, name="exclamations", version="2")
    yield "cost", Cost(number)
    yield "ensemble-mean", Ensemble([number, functions.length], Mean(), shifts=[1.0, 0.0], scales=[2.0, 1.0])
    yield "ensemble-min", Ensemble([number, functions.length], Min())
    yield "ensemble-lower-bound", Ensemble([number, functions.length], LowerBound(0.5))
    yield "ensemble-own", Ensemble([number, functions.length, Cost(number)], functions.median)
    yield "mean-win", MeanWin(functions.longer, functions.two_answers)
    yield "mean-win-both-orders", MeanWin(BothOrders(functions.longer), functions.two_answers)
    pairs = PairClassifier(checkpoint("pairs"), "{prompt} 1: {first} 2: {second}")
    yield "mean-win-classifier", MeanWin(pairs, functions.two_answers)
    yield "remote-native", Remote("http://rewards:8000", Native("m"), batch_size=3, retries=1)
    yield "remote-openrlhf", Remote("http://rewards:8000/get_reward", OpenRlhf("m", text=Text(strip=("</s>",))))
    labels = Difference(good=1, bad=0)
    vllm = Vllm("m", labels=labels, path="/pooling", steps="min", options={"priority": 1})
    yield "remote-vllm", Remote("$REWARD_SERVER", vllm, concurrency=2, timeout=5.0, backoff=0.1)
    yield "remote-vllm-score", Remote("https://rewards", VllmScore("m", probabilities=True), show_progress=False)
    yield "checkpoint-plain", checkpoint("classifier")
    placement = Placement(dtype="bfloat16", device="cpu", model_options={"attn_implementation": "eager"})
    yield "checkpoint-placed", checkpoint("classifier", revision="abc123", placement=placement)
    text = Text(max_length=64, template="{{ messages }}", strip=("</s>",), append_eos=True)
    yield "checkpoint-text", checkpoint("classifier", options={"text": text})
    kinds: dict[str, dict[str, Any]] = {
        "sequence-classifier": {"labels": Expected((1.0, 2.0, 3.0)), "text": Text(max_length=24), "batch_tokens": 99},
        "cross-encoder": {"labels": Label(0)},
        "multi-attribute": {"output": "score", "labels": Weighted((1.0, -0.5))},
        "value-head": {},
        "process": {"mark": "<|end|>", "label": 1, "reduce": "min"},
        "judge": {"good": "a", "bad": "b"},
        "expected-rating": {"high": 3},
        "rated-judge": {"unparsed": 0.5, "max_new_tokens": 2},
        "token-logit": {},  # a token that is told is taken for a secret, and left out: files have the first one
        "implicit": {"share_prefixes": False, "beta": 0.5},
    }
    for kind, options in kinds.items():
        lasting: dict[str, Any] = {"reference": "/checkpoints/reference"} if kind == "implicit" else {}
        if kind == "multi-attribute":
            lasting["placement"] = Placement(trust_remote_code=True)
        yield f"checkpoint-{kind}", checkpoint(kind, kind=kind, options=options, **lasting)
    yield "checkpoint-ordinal-cost", checkpoint("ordinal", cost=True, options={"labels": Ordinal()})
    lasting = {"base": "/checkpoints/base", "tokenizer": "/checkpoints/tokenizer"}
    yield "checkpoint-adapter", checkpoint("adapter", **lasting)
    # Saved before names of labels were read: `make_scorers` takes "rules" and "cost" out of the file.
    yield "checkpoint-first-rules", Loaded(FromCheckpoint("/checkpoints/first-rules", rules=1))


def write_json(at: Path, what: Any) -> None:
    """A file that a person can read."""
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text(json.dumps(what, indent=1) + "\n")


def make_table() -> ReferenceTable:
    """The table, and its rows as they were given."""
    table = ReferenceTable.build(ROWS_AS_BUILT, meta=META)
    table.save(OUT / "table")
    names = {"by id": ["row-7", 7]}
    rows = [
        {"prompt": p, "scores": s, "ids": names.get(str(p), []), "aliases": [a for a in more if isinstance(a, str)]}
        for p, s, more in ROWS
    ]
    write_json(OUT / "table.expected.json", {"rows": rows, "meta": META})
    return ReferenceTable.load(OUT / "table")


ROWS_AS_BUILT = [(prompt, scores, aliases) if aliases else (prompt, scores) for prompt, scores, aliases in ROWS]


def keep(reward: CalibratedReward, at: Path) -> None:
    """Only its reward.json: the table is the same for all, OUT / "table"."""
    with TemporaryDirectory() as folder:
        reward.save_pretrained(folder)
        at.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder, "reward.json"), at)


def make_rewards(table: ReferenceTable) -> None:
    """A reward.json each, and its values by formula, which the package gives too."""
    expected: dict[str, Any] = {}
    for name, settings, formula in rewards():
        reward = CalibratedReward(NumberScorer(), table, **settings)
        keep(reward, OUT / "rewards" / f"{name}.json")
        known = [formula(Among(np.array(ROWS[at][1]), score)) for at, score in ASKED]
        given = reward.from_scores([ROWS[at][0] for at, _ in ASKED], [score for _, score in ASKED])
        worst = float(np.abs(given - known).max())
        sys.stdout.write(f"{name:28} {worst:.1e}\n")
        np.testing.assert_allclose(given, known, rtol=1e-8, atol=1e-8, err_msg=name)
        expected[name] = known
    write_json(OUT / "rewards.expected.json", {"asked": ASKED, "rewards": expected})


def make_scorers(table: ReferenceTable) -> None:
    """A reward.json each."""
    for name, scorer in scorers():
        keep(CalibratedReward(scorer, table), OUT / "scorers" / f"{name}.json")
    first = OUT / "scorers" / "checkpoint-first-rules.json"
    said = json.loads(first.read_text())
    for newer in ("rules", "cost"):
        del said["scorer"]["recipe"][newer]
    first.write_text(json.dumps(said, indent=2) + "\n")


# A calibration of two reward models: three shards of two prompts, K = 6; a chat and ids among them.
PROMPTS: list[Any] = ["2+2=", CHAT, "Hello", "Why?", "One more", "The last"]
RECORDS = [{"prompt": prompt, "row": f"row-{at}"} for at, prompt in enumerate(PROMPTS)]
SCORERS = {"reward": NumberScorer(), "judge": HashScorer(5)}
CALIBRATION: dict[str, Any] = {"k": 6, "seed": 3, "prompts_per_shard": 2, "id_column": "row", "show_progress": False}


@dataclass(frozen=True)
class Shifted:
    """A policy whose numbers are higher than the reference's by so much."""

    by: float

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """The reference's, moved."""
        drawn = NumberSampler()(prompts, seeds)
        return [[Rollout(f"{float(r.completion) + self.by:.4f}", 1, "stop") for r in own] for own in drawn]

    def fingerprint(self) -> dict[str, Any]:
        """How far."""
        return {"kind": "shifted", "by": self.by}


@dataclass(frozen=True)
class ShiftKL:
    """The KL of normals that are `by` apart."""

    by: float

    def __call__(self, prompts: Any, rollouts: Any) -> list[list[tuple[float, bool]]]:
        """The same for each completion."""
        return [[(self.by**2 / 2, True) for _ in own] for own in rollouts]

    def fingerprint(self) -> dict[str, Any]:
        """How far."""
        return {"kind": "shift", "by": self.by}


@dataclass
class Stopped:
    """The sampler of the calibration, which is stopped at a prompt as by Ctrl-C."""

    at: str

    def __call__(self, prompts: Any, seeds: Any, /) -> list[list[Rollout]]:
        """Until then the same."""
        if self.at in prompts:
            raise KeyboardInterrupt
        return NumberSampler()(prompts, seeds)

    def fingerprint(self) -> dict[str, Any]:
        """That of the sampler."""
        return NumberSampler().fingerprint()


def make_interrupted() -> None:
    """A run that was stopped at its second shard of three, and one that has scores by one of two reward models."""
    with suppress(KeyboardInterrupt):
        calibrate(RECORDS, Stopped("Why?"), SCORERS, OUT / "interrupted", **CALIBRATION)
    shutil.rmtree(OUT / "unscored", ignore_errors=True)
    calibrate(RECORDS, NumberSampler(), {"reward": NumberScorer()}, OUT / "unscored", **CALIBRATION)
    rollouts = [{"prompt": p, "completions": ["1", "2.5", "no"], "scores": [1.0, 2.5, 0.0]} for p in PROMPTS[:3]]
    import_rollouts(rollouts, OUT / "imported", scores="scores", show_progress=False)


def make_callable() -> None:
    """A run whose scorer is a function with names of the package in it: run.json has digests of what they lead to."""
    small: dict[str, Any] = {**CALIBRATION, "k": 2}
    calibrate(RECORDS[:2], NumberSampler(), {"risen": functions.risen}, OUT / "callable", **small)


def make_experiment() -> None:
    """What a demo leaves: a calibration, a frontier, a reward, a training run, an evaluation."""
    at = OUT / "experiment"
    tables = calibrate(RECORDS, NumberSampler(), SCORERS, at / "table", **CALIBRATION)
    CalibratedReward(NumberScorer(), tables["reward"], Exponential(5.0), beta=0.4).save_pretrained(at / "reward")
    rows = [[scores.astype(float) for _, scores in tables[name].items()] for name in SCORERS]
    references = {"selected_by": "reward", "judged_by": "reward"}
    arms = {name: ARMS[name] for name in ("identity", "exp:10")}
    frontier = reweighted(Samples(np.array(rows[0])), arms, [0.1, 0.3], [Standard(), BestOf(2)], **references)
    frontier.save(at / "frontier.json")
    evaluate(
        {"shifted": Shifted(1.0)},
        NumberSampler(),
        RECORDS,
        SCORERS,
        at / "evaluation",
        m=4,
        seed=11,
        procedures=(Standard(), BestOf(2)),
        divergence={"shifted": ShiftKL(1.0)},
        prompts_per_shard=4,
        id_column="row",
        show_progress=False,
    )


@dataclass(frozen=True)
class Length:
    """Features of a prompt: one, its length."""

    def __call__(self, prompts: Any, /) -> np.ndarray:
        """A row each."""
        return np.array([[len(prompt)] for prompt in prompts], np.float32)

    def fingerprint(self) -> dict[str, Any]:
        """What it is."""
        return {"kind": "length"}


def make_predictors() -> None:
    """Reference quantiles by prediction: the mean is the length. One without a network, one whose curve is bent."""
    rng = np.random.default_rng(0)
    prompts = ["a" * n for n in range(1, 41)]
    table = ReferenceTable.build([(p, len(p) + rng.normal(size=24)) for p in prompts], meta={"scorer": {"kind": "x"}})
    fit(table, prompts, Length(), levels=20, network=False).save(OUT / "predictor")


def make_training_run() -> None:
    """A run of two steps that is finished, less the model: what a report reads, and by which a run is known again."""
    import tiny

    from calibrated_rewards.recipes import train_rloo
    from calibrated_rewards.rollouts.sources import Asked
    from calibrated_rewards.samplers.decoding import Decoding

    reward = CalibratedReward.from_pretrained(OUT / "experiment" / "reward")
    asked = [Asked(prompt) for prompt in PROMPTS if isinstance(prompt, str)]
    settings = train_rloo.Settings(steps=2, prompts_a_step=2, completions=2, lr=1e-3, rows=2)
    at = OUT / "experiment" / "trained"
    with TemporaryDirectory() as folder:
        policy = tiny.saved(tiny.causal(), Path(folder, "policy"), tiny.tokenizer())
        train_rloo.train(policy, reward, asked, Decoding(5, temperature=0.9), settings, at, show_progress=False)
        said = (at / "settings.json").read_text()
        (at / "settings.json").write_text(said.replace(policy, "/checkpoints/policy"))
    shutil.rmtree(at / "model")


def main() -> int:
    """All of it, anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    os.environ["REWARD_SERVER"] = "http://rewards:8000"
    table = make_table()
    make_rewards(table)
    make_scorers(table)
    make_interrupted()
    make_callable()
    make_experiment()
    make_training_run()
    make_predictors()
    for lock in OUT.rglob(".lock"):
        lock.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
