"""A preference head on SmolLM2 against a reward model of its own: accuracy on people's ratings, best of 8, resolution.

    python benchmarks/real/heads.py --out runs/heads            # goes on where it stopped; about an hour of one core
    python benchmarks/real/heads.py --out runs/heads --seeds 1

Pairs are made of texts of one source (movie reviews, products, editorials, tweets) whose mean human ratings differ by
.5 or more: those to learn from are of the reward model's half of the texts, those to measure on are 750 pairs of movie
reviews that nothing learned from. A head is trained by `train head` on the frozen model, under LoRA, and with all
weights; the rivals are all-MiniLM-L6-v2 with one label, trained on the same pairs by the same loss, and the model's
own log-probability of the text. Best of 8: each chooses among rollouts of the reference behind film-review prompts, and
the demo's judge, which learned from other texts, says how often the choice beats a single draw. Resolution: the share
of pairs of rollouts that tie, and best of 8, of float32 scores, of the same scores in bfloat16, and of the quantile
among 32 references. Writes benchmarks/results/heads.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "proof"))
from environment import save
from held_out_prompts import Bench, World, make_parts

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.cli.demo.assets import CACHE, Rated, fetch_encoder, fetch_language_model
from calibrated_rewards.cli.demo.reward_models import split_ratings
from calibrated_rewards.evaluation.estimates import Estimate, difference
from calibrated_rewards.models.parts import pad_right
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score
from calibrated_rewards.theory.procedures import BestOf
from calibrated_rewards.training.head import HeadLaunch, HeadTraining, run
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.log_probabilities import GroupReader

LEAST, CHECKED = 0.5, 750
SMALL, LARGE = 400, 1200
N = 8
# References of the calibration; best of N chooses among the other rollouts.
K = 32
Pairs = list[tuple[str, str, str]]
Scores = npt.NDArray[np.float64]
# Prompts of the best of N.
PROMPTS = 80
# The head whose best of 8 is compared with that of the others.
SERVED = "frozen, contrastive"
# A name, the number of pairs, and the settings of `train head`.
HEADS: dict[str, tuple[int, dict[str, Any]]] = {
    "frozen, separable": (LARGE, {"backbone": "frozen"}),
    "frozen, contrastive": (LARGE, {"backbone": "frozen", "loss": "contrastive"}),
    "lora, separable": (SMALL, {"backbone": "lora", "epochs": 1, "pairs_a_step": 16, "lr": 5e-4}),
    "full, separable": (SMALL, {"backbone": "full", "epochs": 1, "pairs_a_step": 16, "lr": 3e-5}),
}


def make_pairs(texts: Sequence[Rated], count: int, seed: int) -> Pairs:
    """Make pairs of texts of one source, the better rated first; each text comes about as often as any other."""
    rng, pairs = np.random.default_rng(seed), []
    by_source: dict[str, list[Rated]] = {}
    for each in texts:
        by_source.setdefault(each.opening, []).append(each)
    while len(pairs) < count:
        for opening, own in by_source.items():
            order = rng.permutation(len(own))
            for i, j in zip(order[::2], order[1::2], strict=False):
                first, second = sorted((own[i], own[j]), key=lambda each: -each.rating)
                if first.rating - second.rating >= LEAST:
                    pairs.append((opening, first.text, second.text))
    at = np.random.default_rng([seed, 1]).permutation(len(pairs))[:count]
    return [pairs[i] for i in at]


def score_pairs(score_texts: Callable[[list[str], list[str]], Any], pairs: Pairs) -> Scores:
    """Score both texts of each pair: (pairs, 2)."""
    prompts = [prompt for prompt, _, _ in pairs] * 2
    texts = [chosen for _, chosen, _ in pairs] + [rejected for _, _, rejected in pairs]
    return np.asarray(score_texts(prompts, texts), np.float64).reshape(2, -1).T


def measure_accuracy(scores: Scores) -> dict[str, float]:
    """Compute the share of pairs in the right order, ties half, with its standard error."""
    right = (scores[:, 0] > scores[:, 1]) + 0.5 * (scores[:, 0] == scores[:, 1])
    return {"accuracy": float(right.mean()), "standard_error": float(right.std() / np.sqrt(len(right)))}


def train_head(out: Path, policy: Path, pairs: Pairs, settings: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train a head by the library's command; return the processor seconds and the trained weights."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
        (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        began = time.process_time()
        run(
            HeadLaunch(str(policy), [str(out / "pairs.jsonl")], out),
            HeadTraining(**{"held_out": 0.0, "save_steps": 10_000, "seed": seed, **settings}),
        )
        (out / "seconds.json").write_text(json.dumps(time.process_time() - began))
    return {"seconds": json.loads((out / "seconds.json").read_text())}


def train_encoder(base: Path, pairs: Pairs, out: Path, seed: int, epochs: int = 1, rate: float = 1e-4) -> None:
    """Train a MiniLM with one label on pairs by -ln sigmoid(r_w - r_l), with the head's label smoothing."""
    if (out / "config.json").exists():
        return
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).train()
    prompts, good, bad = (list(column) for column in zip(*pairs, strict=True))
    ids = [Text().encode(tokenizer, prompts, texts) for texts in (good, bad)]
    steps = epochs * -(-len(pairs) // 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule: Any = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    began = time.process_time()
    for step in range(steps):
        at = [i % len(pairs) for i in range(16 * step, 16 * step + 16)]
        rows, mask = pad_right([half[i][:128] for half in ids for i in at], int(tokenizer.pad_token_id), model.device)
        scores = model(input_ids=rows, attention_mask=mask).logits[:, 0].unflatten(0, (2, -1))
        margin = scores[0] - scores[1]
        loss = -(0.9 * nn.functional.logsigmoid(margin) + 0.1 * nn.functional.logsigmoid(-margin)).mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "seconds.json").write_text(json.dumps(time.process_time() - began))


def score_by_log_probability(model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> Scores:
    """Compute the mean log-probability of a token of each text behind its prompt."""
    groups = [
        Group(tokenizer(prompt)["input_ids"], [tokenizer(text)["input_ids"]])
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    values = [float(each[0]) for each in GroupReader(model).read(groups)]
    return np.array([value / len(group.completions[0]) for value, group in zip(values, groups, strict=True)])


def win_rates(scores: Scores, judge: Scores, n: int = N) -> Scores:
    """Compute for each prompt how often the best of n by the scores beats a single draw, by the judge; ties half."""
    rates = []
    for own, judged in zip(scores, judge, strict=True):
        wins = (judged[:, None] > judged) + 0.5 * (judged[:, None] == judged)
        beaten = (wins.sum(1) - 0.5) / (len(judged) - 1)
        rates.append(float(BestOf(n).pool_weights(own) @ beaten))
    return np.array(rates)


def count_ties(scores: Scores) -> float:
    """Compute the share of pairs of one prompt's completions that tie."""
    k = scores.shape[1]
    equal = (scores[:, :, None] == scores[:, None]).sum((1, 2)) - k
    return float(equal.mean() / (k * (k - 1)))


def rank(scores: Scores) -> Scores:
    """Compute the quantile of each rollout behind the first K among those, ties half."""
    references, rest = scores[:, None, :K], scores[:, K:, None]
    return np.asarray(((references < rest) + 0.5 * (references == rest)).mean(2))


def describe_resolution(scores: Scores, judge: Scores) -> dict[str, Any]:
    """Compare scores in float32, in bfloat16, and as quantiles, on the rollouts that are no references."""
    half = torch.from_numpy(scores).bfloat16().double().numpy()
    views = {
        "float32": scores[:, K:], "bfloat16": half[:, K:], "quantile of float32": rank(scores),
        "quantile of bfloat16": rank(half),
    }  # fmt: skip
    found = {}
    for name, view in views.items():
        rates = Estimate(win_rates(view, judge[:, K:]))
        found[name] = {"ties": count_ties(view), "best_of_8": rates.value, "interval": rates.interval()}
    spread = scores.std(1).mean()
    return {"spread": float(spread), "level_between_prompts": float(scores.mean(1).std()), **found}


def iterate_scorers(args: argparse.Namespace, cache: Path) -> Iterator[tuple[str, int, Any, dict[str, Any]]]:
    """Train and load every scorer, one after the other: name, seed, scorer, and what it cost."""
    texts, policy = split_ratings(cache).reward_model, fetch_language_model(cache)
    for seed in range(args.seeds):
        for count in (SMALL, LARGE):
            out = args.out / f"minilm-{count}-{seed}"
            train_encoder(fetch_encoder(cache), make_pairs(texts, count, seed), out, seed)
            cost = {"seconds": json.loads((out / "seconds.json").read_text()), "pairs": count}
            yield (
                f"MiniLM, {count} pairs",
                seed,
                load_scorer(out, kind="sequence-classifier", show_progress=False),
                cost,
            )
        for name, (count, settings) in HEADS.items():
            out = args.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            cost = train_head(out, policy, make_pairs(texts, count, seed), settings, seed)
            yield name, seed, load_scorer(out / "model", show_progress=False), {**cost, "pairs": count}


def main() -> None:
    """Train all scorers, measure them, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="heads, encoders and scores")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache = args.cache.expanduser()
    args.out.mkdir(parents=True, exist_ok=True)
    checked = make_pairs(split_ratings(cache).held_out, CHECKED, 7)
    world = World()
    bench = Bench(world, make_parts(cache, world, None), cache / "proof-held-out-prompts")
    pools = bench.references
    judge, reward = (np.stack([np.asarray(row, np.float64) for row in each]) for each in (pools.judge, pools.select))
    judge, reward, prompts = judge[:PROMPTS], reward[:PROMPTS], bench.parts.held_out[:PROMPTS]
    texts = read_texts(bench.folder / "test", prompts)
    flat = [(prompt, text) for prompt, own in zip(prompts, texts, strict=True) for text in own]

    def score_pool(scorer: Any) -> Scores:
        values = score(scorer, [prompt for prompt, _ in flat], [text for _, text in flat])
        return np.asarray(values, np.float64).reshape(judge.shape)

    rows: list[dict[str, Any]] = []
    served: dict[str, Scores] = {}
    for name, seed, scorer, cost in iterate_scorers(args, cache):
        place = args.out / f"scores-{name.replace(', ', '-').replace(' ', '-')}-{seed}.npz"
        if not place.exists():
            pairs = score_pairs(partial(score, scorer), checked)
            np.savez(place, pairs=pairs, pool=score_pool(scorer) if seed == 0 and is_served(name) else np.zeros(0))
        scores = np.load(place)
        row = {"name": name, "seed": seed, **cost, **measure_accuracy(scores["pairs"])}
        if len(scores["pool"]):
            served[name] = scores["pool"]
            row["resolution"] = describe_resolution(scores["pool"], judge)
        rows.append(row)
        print(row["name"], seed, round(row["accuracy"], 4), round(row["seconds"]), "s", flush=True)
        results = summarise(rows, served | {"the demo's reward model": reward}, judge)
        save("heads", results)
    model, tokenizer = bench.policy.model, bench.policy.tokenizer
    place = args.out / "scores-log-probability.npz"
    if not place.exists():
        pairs = score_pairs(lambda p, t: score_by_log_probability(model, tokenizer, p, t), checked)
        reader = GroupReader(model, bench.policy.decoding.temperature, world.test_k)
        groups = [
            Group(tokenizer(prompt)["input_ids"], [tokenizer(text)["input_ids"] or [0] for text in own])
            for prompt, own in zip(prompts, texts, strict=True)
        ]
        np.savez(place, pairs=pairs, pool=np.stack([each.numpy() for each in reader.read(groups)]))
    scores = np.load(place)
    rows.append({"name": "log-probability", "seed": 0, "seconds": 0.0, "pairs": 0, **measure_accuracy(scores["pairs"])})
    served["log-probability"] = scores["pool"]
    save("heads", summarise(rows, served | {"the demo's reward model": reward}, judge))


def is_served(name: str) -> bool:
    """Tell if a scorer chooses among rollouts: reading them takes minutes."""
    return name.startswith(("frozen", "MiniLM"))


def read_texts(folder: Path, prompts: Sequence[str]) -> list[list[str]]:
    """Read the rollouts' texts of a calibration in the order of the prompts."""
    directory = RunDirectory(folder)
    by_prompt: dict[str, list[str]] = {}
    for name in directory.names():
        shard = directory.load(name)
        for planned, rollouts in zip(shard.prompts, shard.rollouts, strict=True):
            by_prompt[str(planned.prompt)] = [str(each.completion) for each in rollouts]
    return [by_prompt[prompt] for prompt in prompts]


def summarise(rows: Sequence[dict[str, Any]], served: Mapping[str, Scores], judge: Scores) -> dict[str, Any]:
    """Average the accuracy over seeds, and compare best of 8 with the first of those that are served."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    accuracy = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        each = [row["accuracy"] for row in own]
        accuracy.append(
            {
                "name": name, "pairs": own[0]["pairs"], "seeds": len(own), "accuracy": float(np.mean(each)),
                "by_seed": each, "standard_error_over_pairs": own[0]["standard_error"],
                "seconds": float(np.mean([row["seconds"] for row in own])),
            }
        )  # fmt: skip
    first = Estimate(win_rates(served[SERVED], judge)) if SERVED in served else None
    best = []
    for name, scores in served.items():
        rate = Estimate(win_rates(scores, judge))
        best.append({"name": name, "best_of_8": rate.value, "interval": rate.interval()})
        if first is not None and name != SERVED:
            gain = difference(first, rate)
            best[-1] |= {"head_gains": gain.value, "gain_interval": gain.interval()}
    return {
        "checked_pairs": CHECKED, "prompts": len(judge), "rollouts": judge.shape[1], "accuracy": accuracy,
        "best_of_8": best, "resolution": {row["name"]: row["resolution"] for row in rows if "resolution" in row},
    }  # fmt: skip


if __name__ == "__main__":
    main()
