"""A real language model calibrated with a real reward model, end to end, and what the table is good for.

    python benchmarks/real/calibrate.py                 # minutes: 100 prompts, 100 rollouts each
    python benchmarks/real/calibrate.py --out table     # the run stays, for `calibrated-rewards inspect`

SmolLM2-135M-Instruct goes on from the first words of held-out movie reviews, 24 tokens at temperature 0.8; two reward
models trained on disjoint halves of human ratings (reward_models.py) score it. Then 32 rollouts that no table has seen
are ranked: were the references those of another policy, their quantiles would not be uniform. Writes
benchmarks/results/real_calibration.json and docs/figures/real_calibration.png.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
import torch
from policy import DECODING, sampler
from reward_models import load
from scipy import stats
from watch import Watch, Watched

from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.cli.demo.reward_models import make_prompts, train_judge, train_reward_model

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.samplers.protocol import sample, seeds_of
from calibrated_rewards.scorers.protocol import score
from calibrated_rewards.table.reference_table import ReferenceTable

FIGURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "real_calibration.png"
SHOWN = 10
MODELS = {"reward": train_reward_model, "judge": train_judge}


def run(
    cache: Path,
    asked: list[str],
    out: Path,
    k: int,
    texts: int | None = None,
    seed: int = 0,
    **drawn: Any,
) -> tuple[dict[str, ReferenceTable], dict[str, float]]:
    """Both reward models' tables, and the seconds by part; each model has learned from so many texts of its half."""
    draw, watch = sampler(cache, **drawn), Watch()
    scorers = {name: load(folder(cache, texts), show_progress=False) for name, folder in MODELS.items()}
    draw(asked[:1], [list(range(8))])  # the first call of a process takes longer
    watched = {name: Watched(scorer, watch, f"scoring ({name})") for name, scorer in scorers.items()}
    watch.restart()
    tables = calibrate(asked, Watched(draw, watch, "drawing"), watched, out, k=k, seed=seed, prompts_per_shard=8)
    return tables, watch.parts("files and tables")


def rates(out: Path, seconds: dict[str, float], from_nothing: bool) -> dict[str, Any]:
    """How completions came to their end; for a run that this process has made, how fast, by processor time."""
    columns = pq.read_table(out / "rollouts", columns=["tokens", "finish"])
    tokens, finish = columns["tokens"].to_numpy(), columns["finish"].to_numpy(zero_copy_only=False)
    counts = {
        "completions": len(tokens),
        "tokens": int(tokens.sum()),
        "cut_at_the_limit": float((finish == "length").mean()),
    }
    speeds = {
        "completions_per_processor_second": len(tokens) / seconds["all"],
        "tokens_per_processor_second": counts["tokens"] / seconds["all"],
        "tokens_per_processor_second_of_drawing": counts["tokens"] / max(seconds.get("drawing", 0.0), 1e-9),
    }
    return {**counts, **(speeds if from_nothing else {})}


def fresh_scores(cache: Path, asked: list[str], count: int) -> np.ndarray:
    """The reward of rollouts that no table has, prompts by rollouts."""
    seeds = [seeds_of(1, prompt_key(prompt), 0, count) for prompt in asked]
    drawn = sample(sampler(cache), asked, seeds)
    pairs = [(prompt, rollout.completion) for prompt, own in zip(asked, drawn, strict=True) for rollout in own]
    scores = score(load(train_reward_model(cache), show_progress=False), *zip(*pairs, strict=True))
    return scores.reshape(len(asked), count)


def references(table: ReferenceTable, asked: list[str]) -> np.ndarray:
    """The sorted references, prompts by K."""
    return np.stack([table.scores(int(row)) for row in table.rows(asked)])


def quantiles(table: ReferenceTable, asked: list[str], fresh: np.ndarray) -> dict[str, np.ndarray]:
    """Where fresh scores stand among their prompt's references, and among those of all prompts."""
    pool = np.sort(references(table, asked).ravel())
    pooled = (np.searchsorted(pool, fresh, "left") + np.searchsorted(pool, fresh, "right")) / (2 * len(pool))
    own = np.stack(
        [table.cdf(np.full(fresh.shape[1], row), each) for row, each in zip(table.rows(asked), fresh, strict=True)]
    )
    return {"own": own, "pooled": pooled}


def uniformity(u: np.ndarray, k: int) -> dict[str, float]:
    """Moments of the quantiles; of K references of the same policy, 1/2 and (1 + 2/K)/12 without ties."""
    means = u.mean(axis=1)
    squares = ((u - 0.5) ** 2).mean(axis=1)
    error = np.sqrt(len(u))
    return {
        "mean": float(means.mean()),
        "mean_error": float(means.std(ddof=1) / error),
        "variance": float(squares.mean() - (means.mean() - 0.5) ** 2),
        "variance_error": float(squares.std(ddof=1) / error),
        "variance_expected": (1 + 2 / k) / 12,
        "between_prompts_share": between(u),
    }


def between(values: np.ndarray) -> float:
    """The share of the variance that lies between prompts: one-way random effects, unbiased up to their ratio."""
    count = values.shape[1]
    within = float(values.var(axis=1, ddof=1).mean())
    across = float(values.mean(axis=1).var(ddof=1)) - within / count
    return across / (across + within)


def agreement(out: Path) -> dict[str, float]:
    """How the two reward models order the rollouts of a prompt, and how they order prompts."""
    columns = pq.read_table(out / "rollouts", columns=["key", "score:reward", "score:judge"])
    keys = np.unique(columns["key"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    both = np.stack([columns["score:reward"].to_numpy(), columns["score:judge"].to_numpy()])
    groups = [both[:, keys == group] for group in range(keys.max() + 1)]
    return {
        "within_prompt_pearson": float(np.mean([np.corrcoef(group)[0, 1] for group in groups])),
        "within_prompt_spearman": float(np.mean([stats.spearmanr(*group).statistic for group in groups])),
        "between_prompts_pearson": float(np.corrcoef([group.mean(axis=1) for group in groups], rowvar=False)[0, 1]),
    }


def figure(own: np.ndarray, fresh: dict[str, np.ndarray]) -> None:
    """The paper's Fig. 3, and the same for all prompts: where fresh rollouts stand on the mean."""
    pool = np.sort(own.ravel())
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for row in own[:SHOWN]:
        left.plot(np.searchsorted(pool, row, "right") / len(pool), (np.arange(len(row)) + 1) / len(row), lw=1)
    left.plot([0, 1], [0, 1], "k--", lw=1)
    left.set(
        xlabel="raw reward, as a quantile of all prompts' references",
        ylabel="calibrated reward",
        title=f"{SHOWN} prompts; dashed: a raw reward that needs no calibration",
    )
    order = np.argsort(fresh["pooled"].mean(axis=1))
    for name, label in (("pooled", "among all prompts' references"), ("own", "among the prompt's own references")):
        right.plot(fresh[name].mean(axis=1)[order], ".", label=label)
    right.axhline(0.5, color="k", ls="--", lw=1)
    right.set(
        xlabel="prompt, ordered by its raw reward",
        ylabel="mean quantile",
        ylim=(0, 1),
        title=f"the mean quantile of {fresh['own'].shape[1]} fresh rollouts of a prompt",
    )
    right.legend()
    plt.savefig(FIGURE, dpi=150)


def main() -> None:
    """Calibrate, rank fresh rollouts, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--fresh", type=int, default=32)
    parser.add_argument("--out", type=Path, help="keep the run here, and go on with one that is here")
    args = parser.parse_args()
    asked = make_prompts(args.cache, args.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / "table"
        from_nothing = not out.exists()
        tables, seconds = run(args.cache, asked, out, args.k)
        results: dict[str, Any] = {
            "prompts": len(asked),
            "k": args.k,
            "decoding": DECODING.fingerprint(),
            "threads": torch.get_num_threads(),
            "processor_seconds": seconds,
            **rates(out, seconds, from_nothing),
            "tables": {name: table.describe() for name, table in tables.items()},
            "reward_and_judge": agreement(out),
        }
        fresh = fresh_scores(args.cache, asked, args.fresh)
        u = quantiles(tables["reward"], asked, fresh)
        results["fresh"] = {"rollouts": args.fresh, **{name: uniformity(each, args.k) for name, each in u.items()}}
        results["between_prompts_share_of_raw"] = between(fresh)
        figure(references(tables["reward"], asked), u)
    for name, value in results.items():
        print(name, value)
    print(save("real_calibration", results))


if __name__ == "__main__":
    main()
