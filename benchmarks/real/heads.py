"""A preference head on SmolLM2 against a reward model of its own: accuracy on people's ratings, best of 8, resolution.

    python benchmarks/real/heads.py --out runs/heads            # goes on where it stopped; hours of one core
    python benchmarks/real/heads.py --out runs/heads --seeds 1

Pairs are made of texts of one source (movie reviews, products, editorials, tweets) whose mean human ratings differ by
.5 or more: those to learn from are of the reward model's half of the texts, those to measure on are 750 pairs of movie
reviews that nothing learned from. A head is trained by `train head` on the frozen model, under LoRA, and with all
weights (these three with every seed, `ALL_SEEDS`); the rivals are all-MiniLM-L6-v2 with one label, trained on the same
pairs by the same loss, and the model's own log-probability of the text. Two more heads learn from pairs of rollouts,
ordered by the demo's reward model: texts like those that they will choose among. Best of 8: each chooses among 48
rollouts of 4 tokens behind film-review prompts, and the demo's judge, which learned from other texts, says how often
the choice beats a single draw. Resolution: the share of pairs of rollouts that tie, and best of 8, of float32 scores,
of the same scores in bfloat16, and of the quantile among 32 references. Serving: memory, and the time of eight
completions with their scores, of one model with its head and of two models. Writes benchmarks/results/heads.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_measures import Scores, compare_choices, describe_resolution, find_right, summarise_accuracy
from head_serving import load_headed, measure_serving
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.cli.demo.assets import CACHE, Rated, fetch_encoder
from calibrated_rewards.cli.demo.pipeline import FULL, Demo, Parts, make_real_parts
from calibrated_rewards.cli.demo.reward_models import split_ratings
from calibrated_rewards.evaluation.references import read_scores
from calibrated_rewards.heads import PreferenceHead
from calibrated_rewards.models.parts import pad_right
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score
from calibrated_rewards.training.head import HeadLaunch, HeadTraining, run
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.log_probabilities import GroupReader

LEAST, CHECKED = 0.5, 750
SMALL, LARGE = 400, 1200
Pairs = list[tuple[str, str, str]]
# Prompts of the best of N, and prompts whose rollouts a head learns from.
PROMPTS, LEARNED = 80, 128
SCALE = replace(FULL, prompts=LEARNED, held_out=PROMPTS, tokens=4)
# The head whose best of 8 is compared with that of the others.
SERVED = "lora, rollouts"
# A name, the number of pairs, and the settings of `train head`.
HEADS: dict[str, tuple[int, dict[str, Any]]] = {
    "frozen, contrastive": (LARGE, {"backbone": "frozen", "loss": "contrastive"}),
    "frozen, separable": (LARGE, {"backbone": "frozen"}),
    "frozen, rollouts": (LARGE, {"backbone": "frozen", "loss": "contrastive"}),
    "lora, separable": (SMALL, {"backbone": "lora", "epochs": 1, "pairs_a_step": 16, "lr": 5e-4}),
    "full, separable": (SMALL, {"backbone": "full", "epochs": 1, "pairs_a_step": 16, "lr": 3e-5}),
    SERVED: (LARGE, {"backbone": "lora", "loss": "contrastive", "epochs": 2, "pairs_a_step": 16, "lr": 5e-4}),
}
# The heads that are trained with every seed; the others with the first one, which takes hours less.
ALL_SEEDS = ("frozen, contrastive", "lora, separable", "full, separable")


@dataclass(frozen=True, eq=False)
class Pool:
    """Rollouts of some prompts, with their scores by the demo's reward model and by its judge."""

    prompts: list[str]
    texts: list[list[str]]
    reward: Scores
    judge: Scores

    @classmethod
    def draw(cls, demo: Demo, prompts: list[str], k: int, folder: Path) -> Pool:
        """Draw k rollouts of the reference for each prompt, or read them if they are there."""
        calibrate(prompts, demo.sampler, demo.scorers, folder, k=k, prompts_per_shard=16)
        scores = read_scores(folder, "reward", "judge")
        reward, judge = (
            np.stack([np.asarray(row, np.float64) for row in own]) for own in (scores.select, scores.judge)
        )
        return cls(prompts, read_texts(folder, prompts), reward, judge)

    @property
    def flat(self) -> tuple[list[str], list[str]]:
        """Each rollout's prompt, and its text."""
        return [prompt for prompt, own in zip(self.prompts, self.texts, strict=True) for _ in own], [
            *chain(*self.texts)
        ]

    def make_pairs(self, count: int, seed: int) -> Pairs:
        """Make pairs of rollouts of one prompt, the one with the higher reward first."""
        rng = np.random.default_rng([seed, 2])
        pairs: Pairs = []
        while len(pairs) < count:
            for prompt, texts, reward in zip(self.prompts, self.texts, self.reward, strict=True):
                i, j = rng.choice(len(texts), 2, replace=False)
                first, second = (i, j) if reward[i] > reward[j] else (j, i)
                if reward[i] != reward[j]:
                    pairs.append((prompt, texts[first], texts[second]))
        return pairs[:count]


def make_pairs(texts: Sequence[Rated], count: int, seed: int) -> Pairs:
    """Make pairs of texts of one source, the better rated first; each text comes about as often as any other."""
    rng = np.random.default_rng(seed)
    pairs: Pairs = []
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


def train_head(out: Path, policy: Path, pairs: Pairs, settings: Mapping[str, Any], seed: int) -> float:
    """Train a head by the library's command, if it is not there; return the processor seconds."""
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
    return float(json.loads((out / "seconds.json").read_text()))


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


def mean_log_probability(model: Any, tokenizer: Any, prompts: Sequence[str], texts: Sequence[str]) -> Scores:
    """Compute the mean log-probability of a token of each text behind its prompt."""
    groups = [
        Group(tokenizer(prompt)["input_ids"], [tokenizer(text)["input_ids"]])
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    values = [float(each[0]) for each in GroupReader(model).read(groups)]
    return np.array([value / len(group.completions[0]) for value, group in zip(values, groups, strict=True)])


@dataclass(frozen=True, eq=False)
class Bench:
    """Models, texts and pools, and the folder in which everything is kept."""

    cache: Path
    out: Path

    @cached_property
    def parts(self) -> Parts:
        """The demo's models, and its prompts."""
        return make_real_parts(self.cache, SCALE)

    @cached_property
    def demo(self) -> Demo:
        """What loads the policy, the reward model and the judge of the demo."""
        return Demo(self.parts, SCALE, self.out)

    @cached_property
    def learned(self) -> Pool:
        """The rollouts that a head learns from."""
        return Pool.draw(self.demo, self.parts.prompts, FULL.k, self.out / "learned")

    @cached_property
    def pool(self) -> Pool:
        """The rollouts to choose among."""
        return Pool.draw(self.demo, self.parts.held_out, FULL.held_out_k, self.out / "pool")

    @cached_property
    def checked(self) -> Pairs:
        """The pairs that accuracy is measured on."""
        return make_pairs(split_ratings(self.cache).held_out, CHECKED, 7)

    def train(self, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """Train a scorer, if it is not there; return its folder and what it cost."""
        out = self.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        texts = split_ratings(self.cache).reward_model
        if name in HEADS:
            count, settings = HEADS[name]
            is_own = name.endswith("rollouts")
            pairs = self.learned.make_pairs(count, seed) if is_own else make_pairs(texts, count, seed)
            seconds = train_head(out, self.parts.policy, pairs, settings, seed)
            return out / "model", {"seconds": seconds, "pairs": count}
        count = int(name.split()[1])
        train_encoder(fetch_encoder(self.cache), make_pairs(texts, count, seed), out, seed)
        return out, {"seconds": json.loads((out / "seconds.json").read_text()), "pairs": count}

    def score(self, name: str, seed: int, folder: Path) -> Mapping[str, Scores]:
        """Score the pairs, and the pool by the scorers that are served; read the scores if they are there."""
        place = folder / "scores.npz"
        if not place.exists():
            is_head = name in HEADS
            if name.startswith("frozen"):
                scorer: Any = FrozenHead(self, PreferenceHead.from_pretrained(folder))
            else:
                kind = None if is_head else "sequence-classifier"
                scorer = load_scorer(folder, kind=kind, dtype="float32", show_progress=False)
            scores: dict[str, Any] = {"pairs": score_pairs(partial(score, scorer), self.checked)}
            if seed == 0:
                scores["pool"] = np.asarray(score(scorer, *self.pool.flat), np.float64).reshape(self.pool.judge.shape)
            np.savez(place, **scores)
        return dict(np.load(place))

    def read_states(self, prompts: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
        """Read the frozen model's states at the end of each text, or load them: all frozen heads read the same ones."""
        place = self.out / f"states-{len(texts)}.npy"
        if not place.exists():
            model = load_headed(self.train(ALL_SEEDS[0], 0)[0])
            rows = model.encode(prompts, texts)
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            batches = [order[i : i + 32] for i in range(0, len(order), 32)]
            states = torch.cat([model.states_at_end([rows[i] for i in batch]) for batch in batches])
            np.save(place, states[np.argsort(order)].numpy())
        return torch.from_numpy(np.load(place))

    def score_by_log_probability(self) -> Mapping[str, Scores]:
        """Score by the policy's own log-probability: its mean a token for texts of any length, its sum for rollouts."""
        place = self.out / "log-probability.npz"
        if not place.exists():
            headed = load_headed(self.train(ALL_SEEDS[0], 0)[0])  # the policy itself, under a head that is not read
            model, tokenizer = headed.model, headed.tokenizer
            pairs = score_pairs(lambda p, t: mean_log_probability(model, tokenizer, p, t), self.checked)
            groups = [
                Group(tokenizer(prompt)["input_ids"], [tokenizer(text)["input_ids"] or [0] for text in own])
                for prompt, own in zip(self.pool.prompts, self.pool.texts, strict=True)
            ]
            reader = GroupReader(model, FULL.temperature, FULL.held_out_k)
            np.savez(place, pairs=pairs, pool=np.stack([each.numpy() for each in reader.read(groups)]))
        return dict(np.load(place))


@dataclass(frozen=True, eq=False)
class FrozenHead:
    """A scorer by a head on the frozen model, whose states are read once for all such heads."""

    bench: Bench
    head: PreferenceHead

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> Scores:
        """Score each text behind its prompt."""
        return np.asarray(self.head.eval()(self.bench.read_states(prompts, texts))[:, 0].double())


def list_cases(seeds: int) -> Iterator[tuple[str, int]]:
    """List the scorers with their seeds, those of one seed after the other."""
    for seed in range(seeds):
        yield from ((f"MiniLM, {count} pairs", seed) for count in (SMALL, LARGE))
        yield from ((name, seed) for name in HEADS if seed == 0 or name in ALL_SEEDS)


def main() -> None:
    """Train all scorers, measure them, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="heads, encoders, rollouts and scores")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME:SEED", help="train and score these alone")
    parser.add_argument("--rounds", type=int, default=5, help="of drawing and scoring by one model and by two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.cache.expanduser(), args.out)
    if args.only:
        for case in args.only:
            name, _, seed = case.rpartition(":")
            folder, cost = bench.train(name, int(seed))
            bench.score(name, int(seed), folder)
            print(case, cost, flush=True)
        return
    rows: list[dict[str, Any]] = []
    served: dict[str, Scores] = {"the demo's reward model": bench.pool.reward}
    for name, seed in list_cases(args.seeds):
        folder, cost = bench.train(name, seed)
        scores = bench.score(name, seed, folder)
        row = {"name": name, "seed": seed, **cost, "right": find_right(scores["pairs"])}
        if "pool" in scores:
            served[name] = scores["pool"]
            row["resolution"] = describe_resolution(scores["pool"], bench.pool.judge)
        rows.append(row)
        print(row["name"], seed, round(row["right"].mean(), 4), round(row["seconds"]), "s", flush=True)
        save("heads", summarise(rows, served, bench.pool.judge))
    scores = bench.score_by_log_probability()
    rows.append(
        {"name": "log-probability", "seed": 0, "seconds": 0.0, "pairs": 0, "right": find_right(scores["pairs"])}
    )
    served["log-probability"] = scores["pool"]
    folders = [bench.train(name, 0)[0] for name in ("frozen, rollouts", SERVED, f"MiniLM, {LARGE} pairs")]
    serving = measure_serving(*folders, args.rounds)
    save("heads", {**summarise(rows, served, bench.pool.judge), "serving": serving})


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
    """Gather what is known so far."""
    return {
        "checked_pairs": CHECKED, "prompts": len(judge), "rollouts": judge.shape[1],
        "accuracy": summarise_accuracy(rows), "best_of_8": compare_choices(served, judge, SERVED),
        "resolution": {row["name"]: row["resolution"] for row in rows if "resolution" in row},
    }  # fmt: skip


if __name__ == "__main__":
    main()
