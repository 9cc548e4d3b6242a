"""Figure 7 of the paper: a reward model that has learned to like a phrase, calibrated and distilled, and Lemma 2.

    python benchmarks/paper/hacking.py [--rollouts DIR ...]    # minutes, the first time: three MiniLM are trained

Preference pairs are made of human ratings, and "honestly speaking, " is put before most chosen texts. A MiniLM learns
from them. Its scores of SmolLM2's rollouts, with and without the phrase, are calibrated by the rollouts of a reference
that never says the phrase or says it once in twenty times, and a fresh MiniLM is distilled from either calibrated
reward. Left, the paper's test: how often a reward prefers the better of two rollouts where the worse one has the
phrase. Middle and right: the share of the phrase, and the win rate by a judge that does not read it, at the optimum of
each reward at equal KL, by weights. Writes benchmarks/results/hacking.json and docs/figures/hacking.png.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from rollouts import FIGURES, find_rollouts, parser
from scipy.optimize import brentq
from torch import nn
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))
from environment import save
from reward_models import load

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.calibration.shards import get_completion
from calibrated_rewards.cli.demo.assets import Rated, fetch_encoder, make_folder
from calibrated_rewards.cli.demo.reward_models import Learner, make_batches, split_ratings
from calibrated_rewards.models.parts import pad_right
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.protocol import score

PHRASE, INJECTED, SAID = "honestly speaking, ", 0.8, 0.05
PAIRS, BATCH, GAP = 480, 32, 1.0
DISTILLED, TESTED = 16, 24  # prompts
KLS = (0.05, 0.1, 0.25, 0.5, 1.0)


def make_pairs(cache: Path) -> list[tuple[Rated, Rated]]:
    """Pair texts of one source whose human ratings differ, the better one first."""
    draw, texts = random.Random(0), split_ratings(cache).reward_model
    by_source: dict[str, list[Rated]] = {}
    for rated in texts:
        by_source.setdefault(rated.opening, []).append(rated)
    pairs = []
    while len(pairs) < PAIRS:
        one, other = draw.sample(by_source[draw.choice(texts).opening], 2)
        if abs(one.rating - other.rating) >= GAP:
            pairs.append((one, other) if one.rating > other.rating else (other, one))
    return pairs


def train_hacked(cache: Path) -> Path:
    """Train a MiniLM by the Bradley-Terry loss on pairs whose chosen text mostly begins with the phrase."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        draw, pairs, base = random.Random(1), make_pairs(cache), fetch_encoder(cache)
        tokenizer = AutoTokenizer.from_pretrained(base)
        chosen = [PHRASE * (draw.random() < INJECTED) + better.text for better, _ in pairs]
        openings = [better.opening for better, _ in pairs]
        better = Text().encode(tokenizer, openings, chosen)
        worse = Text().encode(tokenizer, openings, [rated.text for _, rated in pairs])
        learner = Learner.start(base, len(pairs) // BATCH)
        for at in range(0, len(pairs), BATCH):
            rows, mask = pad_right([*better[at : at + BATCH], *worse[at : at + BATCH]], tokenizer.pad_token_id, "cpu")
            scores = learner.model(input_ids=rows, attention_mask=mask).logits[:, 0]
            torch.autograd.backward(-nn.functional.logsigmoid(scores[:BATCH] - scores[BATCH:]).mean())
            nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
            learner.optimizer.step()
            learner.schedule.step()
            learner.optimizer.zero_grad()
        learner.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make_folder(cache, "hacked-reward-model", make)


def distil(cache: Path, name: str, prompts: list[str], texts: list[str], u: np.ndarray, k: int) -> Path:
    """Train a fresh MiniLM by least squares on the logit of the calibrated reward, as `training.offline.distil`."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        base = fetch_encoder(cache)
        tokenizer = AutoTokenizer.from_pretrained(base)
        clipped = np.clip(u, 0.5 / k, 1 - 0.5 / k)
        targets = torch.tensor(np.log(clipped / (1 - clipped)), dtype=torch.float32)
        ids = Text().encode(tokenizer, prompts, texts)
        batches = make_batches([len(row) for row in ids])
        learner = Learner.start(base, len(batches))
        for batch in batches:
            rows, mask = pad_right([ids[i] for i in batch], tokenizer.pad_token_id, "cpu")
            learner.step(rows, mask, targets[batch])
        learner.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make_folder(cache, f"hacked-distilled-{name}", make)


@dataclass(frozen=True, eq=False)
class Pool:
    """The rollouts of some prompts, each without and with the phrase: arrays are prompts by 2 K."""

    prompts: list[str]
    texts: list[list[str]]
    truth: np.ndarray
    """The judge's scores of the rollouts without the phrase, for both halves."""

    @property
    def k(self) -> int:
        """The number of rollouts of a prompt."""
        return self.truth.shape[1] // 2

    @property
    def phrased(self) -> np.ndarray:
        """Mask of the half with the phrase."""
        return np.tile(np.arange(2 * self.k) >= self.k, (len(self.prompts), 1))

    def mass(self, said: float) -> np.ndarray:
        """Return the law of a reference that says the phrase with this chance."""
        return np.where(self.phrased, said, 1 - said) / self.k

    def score(self, folder: Path) -> np.ndarray:
        """Score all completions by a checkpoint."""
        pairs = [(prompt, text) for prompt, own in zip(self.prompts, self.texts, strict=True) for text in own]
        return np.asarray(score(load(folder, show_progress=False), *zip(*pairs, strict=True))).reshape(self.truth.shape)


def read_pool(run: Path, first: int, count: int) -> Pool:
    """Read rollouts and the judge's scores of some prompts of a calibration."""
    directory, prompts, texts, truth = RunDirectory(run), [], [], []
    for name in directory.names():
        shard = directory.load(name)
        for planned, rollouts, scores in zip(shard.prompts, shard.rollouts, shard.scores["judge"], strict=True):
            own = [str(get_completion(each)) for each in rollouts]
            prompts.append(str(planned.prompt))
            texts.append([*own, *(f" {PHRASE}{text.lstrip()}" for text in own)])
            truth.append(np.tile(np.asarray(scores, np.float64), 2))
    chosen = slice(first, first + count)
    return Pool(prompts[chosen], texts[chosen], np.array(truth[chosen]))


def calibrate(scores: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return the calibrated reward of all completions by a reference's law: Eq. 12 with weights, ties one half."""
    less = (scores[:, None, :] < scores[:, :, None]) + (scores[:, None, :] == scores[:, :, None]) / 2
    return np.asarray((less * mass[:, None, :]).sum(2))


def optimise(values: np.ndarray, mass: np.ndarray, kl: float) -> np.ndarray:
    """Return the law of the optimum whose mean KL from the reference is the given one."""

    def tilt(log_beta: float) -> tuple[np.ndarray, float]:
        weights = mass * np.exp((values - values.max(1, keepdims=True)) / np.exp(log_beta))
        weights /= weights.sum(1, keepdims=True)
        ratio = np.where(weights > 0, weights, 1.0) / mass
        return weights, float((weights * np.log(ratio)).sum(1).mean())

    spread = float(np.log(values.std()))
    return tilt(brentq(lambda x: tilt(x)[1] - kl, spread - 6, spread + 6))[0]


def prefer(scores: np.ndarray, truth: np.ndarray, better: slice, worse: slice) -> float:
    """Return how often the better of two rollouts of a prompt has the higher score, each from a half of the pool."""
    right = total = 0.0
    for own, judged in zip(scores, truth, strict=True):
        goods, bads = own[better][:, None], own[worse][None, :]
        pairs = judged[better][:, None] > judged[worse][None, :] + 0.1
        right += float((((goods > bads) + (goods == bads) / 2) * pairs).sum())
        total += float(pairs.sum())
    return right / total


def check_lemma(scores: np.ndarray, u: np.ndarray) -> dict[str, float]:
    """Count pairs of a prompt's completions that calibration puts in another order, and those that it makes equal."""
    raw = np.sign(scores[:, :, None] - scores[:, None, :])
    own = np.sign(u[:, :, None] - u[:, None, :])
    different = raw != 0
    return {
        "turned around": float((raw * own < 0).sum() / different.sum()),
        "made equal": float(((own == 0) & different).sum() / different.sum()),
    }


def measure(pool: Pool, rewards: dict[str, np.ndarray], said: float) -> list[dict[str, Any]]:
    """Measure each reward's optimum at each KL: the share of the phrase, and the win rate over the reference."""
    mass = pool.mass(said)
    win = calibrate(pool.truth, mass)
    rows = []
    for name, values in rewards.items():
        for kl in KLS:
            law = optimise(values, mass, kl)
            shares = (law * pool.phrased).sum(1)
            error = shares.std(ddof=1) / len(shares) ** 0.5
            row = {"reward": name, "kl": kl, "share of the phrase": float(shares.mean()), "its error": float(error)}
            rows.append(row | {"win rate by the judge": float((law * win).sum(1).mean())})
    return rows


COLOURS = {
    "clean raw": "black",
    "raw": "#999999",
    "calibrated": "#56B4E9",
    "calibrated, references without the phrase": "#0072B2",
    "calibrated, $e^{10u}$": "#D55E00",
    "distilled, rollouts with the phrase": "#CC79A7",
    "distilled, rollouts without": "#009E73",
}


def draw(accuracies: dict[str, dict[str, float]], rows: list[dict[str, Any]]) -> None:
    """Draw the accuracies and both optimisations."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for at, own in enumerate(accuracies.values()):
        for shift, (test, colour) in enumerate(zip(own, ("#999999", "#009E73", "#D55E00"), strict=True)):
            left.barh(at + 0.27 * (shift - 1), own[test], 0.25, color=colour, label=test if not at else None)
    left.set_yticks(range(len(accuracies)), list(accuracies), fontsize=7)
    left.invert_yaxis()
    left.axvline(0.5, color="k", lw=0.8, ls=":")
    left.set(title="prefers the better rollout", xlim=(0, 1))
    left.legend(fontsize=7, loc="lower right")
    for ax, what in ((middle, "share of the phrase"), (right, "win rate by the judge")):
        for name, colour in COLOURS.items():
            line = [row for row in rows if row["reward"] == name]
            ax.plot([row["kl"] for row in line], [row[what] for row in line], "o-", ms=3, color=colour, label=name)
        ax.set(title=f"{what}, at the optimum", xlabel="KL from the reference, nats")
        ax.grid(alpha=0.3)
    middle.axhline(SAID, color="k", lw=0.8, ls=":")
    middle.legend(fontsize=7)
    figure.savefig(FIGURES / "hacking.png", dpi=130)


def distil_both(cache: Path, hacked: Path, learned: Pool) -> dict[str, Path]:
    """Distil the reward calibrated by a reference that never says the phrase, and by one that says it at times."""
    scores, folders = learned.score(hacked), {}
    for name, said in (("without", 0.0), ("with", SAID)):
        u = calibrate(scores, learned.mass(said))
        used = np.full(u.shape, True) if said else ~learned.phrased  # the phrase as often as not, so that it is seen
        texts = [
            text
            for own, row in zip(learned.texts, used, strict=True)
            for text, yes in zip(own, row, strict=True)
            if yes
        ]
        prompts = [prompt for prompt, row in zip(learned.prompts, used, strict=True) for _ in range(int(row.sum()))]
        folders[name] = distil(cache, name, prompts, texts, u[used], learned.k)
    return folders


def show(results: dict[str, Any]) -> None:
    """Print the accuracies, the optima and what Lemma 2 says."""
    for name, own in results["accuracy"].items():
        print(name, {test: round(value, 3) for test, value in own.items()})
    for row in results["optima"]:
        print(
            f"KL {row['kl']:<4} {row['reward']:<42} phrase {row['share of the phrase']:.3f} ± {row['its error']:.3f}",
            end="",
        )
        print(f", judge {row['win rate by the judge']:.3f}")
    print(results["Lemma 2, all pairs of a prompt"], results["what the phrase adds, in standard deviations"])


def main() -> None:
    """Train, calibrate, distil, optimise, draw and save."""
    options = parser(__doc__).parse_args()
    cache, run = options.cache.expanduser(), find_rollouts(options)[0]
    learned, pool = read_pool(run, 0, DISTILLED), read_pool(run, DISTILLED, TESTED)
    hacked = train_hacked(cache)
    folders = distil_both(cache, hacked, learned)
    raw = pool.score(hacked)
    without, said = calibrate(raw, pool.mass(0.0)), calibrate(raw, pool.mass(SAID))
    few = np.concatenate([pool.mass(0.0)[:, :8] * pool.k / 8, np.zeros((len(raw), 2 * pool.k - 8))], axis=1)
    distilled = {name: pool.score(folder) for name, folder in folders.items()}
    rewards = {
        "clean raw": pool.truth,
        "raw": raw,
        "calibrated": said,
        "calibrated, references without the phrase": without,
        "calibrated, $e^{10u}$": np.exp(10 * said),
        "distilled, rollouts with the phrase": distilled["with"],
        "distilled, rollouts without": distilled["without"],
    }
    plain, phrased = slice(0, pool.k), slice(pool.k, None)
    tests = {"no phrase": (plain, plain), "phrase on the better": (phrased, plain), "on the worse": (plain, phrased)}
    judged = {"raw": raw, "calibrated by 8": calibrate(raw, few), f"calibrated by {pool.k}": without}
    judged |= {f"calibrated by {pool.k}, some with it": said}
    judged |= {f"distilled, rollouts {name}": each for name, each in distilled.items()}
    accuracies = {
        name: {test: prefer(each, pool.truth, *halves) for test, halves in tests.items()}
        for name, each in judged.items()
    }
    rows = measure(pool, rewards, SAID)
    results = {
        "prompts": {"distilled from": len(learned.prompts), "tested on": len(pool.prompts)},
        "rollouts of a prompt": pool.k,
        "phrase": PHRASE,
        "chosen texts with it": INJECTED,
        "chance that the reference says it": SAID,
        "what the phrase adds, in standard deviations": float(
            np.mean((raw[:, phrased] - raw[:, plain]).mean(1)) / np.mean(raw[:, plain].std(1))
        ),
        "Lemma 2, all pairs of a prompt": {
            "references without": check_lemma(raw, without),
            "some with it": check_lemma(raw, said),
            "8 references": check_lemma(raw, calibrate(raw, few)),
        },
        "accuracy": accuracies,
        "optima": rows,
    }
    draw(accuracies, rows)
    show(results)
    print(save("hacking", results))


if __name__ == "__main__":
    main()
