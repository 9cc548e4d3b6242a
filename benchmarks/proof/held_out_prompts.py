"""World 4: SmolLM2-135M-Instruct trained on some prompts and measured on others, all arms at one KL.

    python benchmarks/proof/held_out_prompts.py                # goes on where it was; one core, about two hours
    python benchmarks/proof/held_out_prompts.py --steps 48     # twice as many prompts and completions, other results
    python benchmarks/proof/held_out_prompts.py --tokens 2     # shorter completions, other results
    python benchmarks/proof/held_out_prompts.py --task harmlessness     # another task, of `harmlessness.py`
    python benchmarks/proof/held_out_prompts.py --quick OUT    # tiny random models, in the folder OUT

It writes some tokens of a film review behind its first three words. The reward model and the judge are the demo's. A
seed is other prompts to train on, out of one pool, and another order. Each arm is trained offline to its optimum at KL
.5, brought to KL .25 on the prompts that it is measured on by a factor on the weights' difference, and measured there,
where no setting was chosen: by importance weights on the reference's rollouts, paired between arms, and by fresh draws.
Results: benchmarks/results/proof_held_out_prompts*.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import harmlessness
import numpy as np
import torch
from arms import OTHERS, PROCEDURES, compute_targets, measure
from lines import Line
from safetensors.torch import load_file, save_file
from shares import FOR, average

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards import CalibratedReward, ReferenceTable
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.demo import pipeline
from calibrated_rewards.cli.demo.assets import CACHE
from calibrated_rewards.evaluation.estimates import Estimate, Samples, difference
from calibrated_rewards.evaluation.held_out_results import HeldOutPolicies, compare_held_out
from calibrated_rewards.evaluation.references import read_scores
from calibrated_rewards.files import write_file
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.protocol import score
from calibrated_rewards.training.launch import Launch, load_policy
from calibrated_rewards.training.offline import OfflineSettings
from calibrated_rewards.training.offline.group_batches import Group
from calibrated_rewards.training.offline.groups import PromptGroup, RecordedStates, ReferenceFile, load_groups
from calibrated_rewards.training.offline.log_probabilities import GroupReader
from calibrated_rewards.training.offline.train import train
from calibrated_rewards.training.offline.trained_weights import named_trainable, select_weights
from calibrated_rewards.training.run_folder import RunFolder

# In the order in which they are run; the first ones for all seeds before the others.
MAIN = ("raw", "worst-of:16", "identity", "worst-of:4", "z-score", "par")
FURTHER = ("best-of:16", "best-of:4")
# Prompts from here on were read by nobody who chose a setting, and not by the demo.
UNSEEN = 860
# So many prompts there are beside them, by task.
HARMLESSNESS = "harmlessness"
PROMPTS = {"reviews": 1_258, HARMLESSNESS: 463}
# By weights a procedure needs twice as many rollouts as it draws.
NAMES = {name: procedure for name, procedure in PROCEDURES.items() if name != "best of 32"}
MEASURED = [*NAMES.values()]


@dataclass(frozen=True)
class World:
    """Sizes of the world."""

    pool: int = 480
    """Prompts that seeds take theirs from."""
    k: int = 32
    prompts: int = 288
    """Prompts that a seed trains on."""
    dev: int = 32
    """Prompts that its KL is matched on."""
    test: int = 160
    test_k: int = 48
    fresh: int = 32
    """Fresh draws of each test prompt."""
    steps: int = 24
    layers: int = 10
    tokens: int = 4
    kl: float = 0.25
    far: float = 0.5
    """KL of the optimum that training aims at."""
    lr: float = 0.0035
    unseen: int = UNSEEN
    task: str = "reviews"

    @property
    def name(self) -> str:
        """The name of the results: the task, and the steps and tokens where they are others."""
        task = f"_{self.task}" if self.task == HARMLESSNESS else ""
        steps = "" if self.steps == World.steps else f"_{self.steps}"
        return f"proof_held_out_prompts{task}{steps}{'' if self.tokens == World.tokens else f'_{self.tokens}_tokens'}"


QUICK = World(12, 32, 8, 4, 6, 32, 32, 3, 1, 4, kl=0.01, unseen=12)


@dataclass(frozen=True, eq=False)
class Bench:
    """Rollouts, models and the place of the results."""

    world: World
    parts: pipeline.Parts
    folder: Path
    recorded: RecordedStates = field(default_factory=RecordedStates)

    @cached_property
    def demo(self) -> pipeline.Demo:
        """The demo's loaders of scorers and policy."""
        scale = replace(pipeline.FULL, tokens=self.world.tokens)
        return pipeline.Demo(self.parts, scale, self.folder)

    @cached_property
    def reward(self) -> CalibratedReward:
        """The rollouts to train on, as a table; only their scores are used."""
        scorers = {"reward": self.demo.scorers["reward"]}
        options: dict[str, Any] = {"k": self.world.k, "prompts_per_shard": 16}
        return CalibratedReward(
            None, calibrate(self.parts.prompts, self.demo.sampler, scorers, self.folder / "train", **options)["reward"]
        )

    @cached_property
    def references(self) -> Samples:
        """Scores of the reference's rollouts of the test prompts, by reward model and judge."""
        options: dict[str, Any] = {"k": self.world.test_k, "prompts_per_shard": 16}
        calibrate(self.parts.held_out, self.demo.sampler, self.demo.scorers, self.folder / "test", **options)
        return read_scores(self.folder / "test", "reward", "judge")

    @cached_property
    def policy(self) -> Any:
        """The reference policy, whose last layers are trained in place."""
        launch = Launch(str(self.parts.policy), str(self.folder), out=self.folder)
        policy = load_policy(launch, self.reward.table.meta)
        select_weights(policy.model, self.world.layers, 0, 0)
        return policy

    @cached_property
    def start(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, as they are in the reference."""
        return {name: weight.detach().clone() for name, weight in named_trainable(self.policy.model)}

    @cached_property
    def training(self) -> list[PromptGroup]:
        """The groups that seeds take theirs from."""
        return load_groups(self.folder / "train", self.reward, self.policy, 1.0).groups

    @cached_property
    def test(self) -> tuple[list[Group], list[torch.Tensor]]:
        """The groups of the test prompts with their states, and the reference's log-probabilities."""
        _ = self.references
        self.reset()
        reward = CalibratedReward(None, ReferenceTable.load(self.folder / "test" / "reward"))
        groups = load_groups(self.folder / "test", reward, self.policy, 1.0).groups
        reader = GroupReader(self.policy.model.eval(), self.policy.decoding.temperature, self.world.test_k)
        read = [*self.recorded.read(reader, groups)]
        tokens = [group.tokens._replace(states=states) for group, (_, states) in read]
        return tokens, [logprobs for _, (logprobs, _) in read]

    @torch.no_grad()
    def reset(self) -> None:
        """Set the weights to the reference's."""
        start = self.start  # the first time, they are
        for name, weight in named_trainable(self.policy.model):
            weight.copy_(start[name])
        self.policy.model.zero_grad()

    def choose(self, arm: str, seed: int) -> tuple[list[PromptGroup], list[PromptGroup]]:
        """Choose a seed's prompts, and give them an arm's targets: those to train on, and those to match the KL on."""
        count = self.world.prompts + self.world.dev
        at = np.random.default_rng([seed, 4]).permutation(len(self.training))[:count]
        groups = [self.training[i] for i in at]
        targets = compute_targets(arm, np.stack([group.scores for group in groups]), self.world.far)
        groups = [
            replace(group, rewards=values, beta=targets.beta, log_z=float(log_z), exact_log_z=None)
            for group, values, log_z in zip(groups, targets.values, targets.log_z, strict=True)
        ]
        return groups[: self.world.prompts], groups[self.world.prompts :]

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train an arm, bring it to the KL on the test prompts, and measure it in both ways."""
        began = time.process_time()
        known = self.place(arm, seed, "json")
        if not known.exists():
            self.train(arm, seed)
        line = self.line(arm, seed)
        factor, log_ratios = line.stretch(self.world.kl)
        np.save(self.place(arm, seed, "npy"), log_ratios)
        kl = line.measure_kl(log_ratios)
        fresh = measure(factor, self.draw(seed), self.references, np.full(len(log_ratios), kl))
        outcome = json.loads(known.read_text())
        return {
            "arm": arm, "seed": seed, **outcome, "factor": factor * outcome["factor"], "kl": kl,
            "seconds": round(time.process_time() - began), "drawn": self.world.fresh, "fresh": fresh.to_json(),
        }  # fmt: skip

    def draw_more(self, row: dict[str, Any]) -> dict[str, Any]:
        """Draw more often from an arm that was measured; the first completions are those of before."""
        arm, seed = row["arm"], row["seed"]
        self.reset()
        factor = row["factor"] / json.loads(self.place(arm, seed, "json").read_text())["factor"]
        trained = load_file(self.place(arm, seed, "safetensors"))
        Line(self.policy, self.start, trained, (), (), self.references).set(factor)
        fresh = measure(factor, self.draw(seed), self.references, row["fresh"]["kl"])
        return {**row, "drawn": self.world.fresh, "fresh": fresh.to_json()}

    def train(self, arm: str, seed: int) -> None:
        """Train an arm, and save its weights and what came of it."""
        began = time.process_time()
        self.reset()
        training, dev = self.choose(arm, seed)
        world = self.world
        settings = OfflineSettings(
            beta=training[0].beta, kl=world.kl, steps=world.steps, layers=world.layers, cache_states=True, seed=seed,
            check_steps=world.steps, save_steps=world.steps + 1, completions=world.k, lr=world.lr,
            prompts_a_step=min(12, world.prompts),
        )  # fmt: skip
        folder = self.place(arm, seed, "run")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reader = GroupReader(self.policy.model.eval(), self.policy.decoding.temperature, world.test_k)
        known = ReferenceFile(folder / "reference.safetensors", "")
        _, outcome = train(reader, training, dev, settings, RunFolder(folder), known, recorded=self.recorded)
        trained = {name: value.detach() for name, value in named_trainable(self.policy.model)}
        save_file(trained, self.place(arm, seed, "safetensors"))
        check = outcome["held_out"]
        described = {
            "factor": outcome["alpha"], "kl_dev": check["held_out/kl"], "correlation": check["held_out/correlation"],
            "training_seconds": round(time.process_time() - began),
        }  # fmt: skip
        write_file(self.place(arm, seed, "json"), json.dumps(described))
        shutil.rmtree(folder)

    def place(self, arm: str, seed: int, ending: str) -> Path:
        """Name a file of a trained arm: its weights, what came of its training, its log-ratios on the test rollouts."""
        return self.folder / f"{arm}-{seed}-{self.world.steps}.{ending}"

    def line(self, arm: str, seed: int) -> Line:
        """The line of policies through a trained arm, on the test rollouts."""
        tokens, reference = self.test
        return Line(
            self.policy, self.start, load_file(self.place(arm, seed, "safetensors")), tokens, reference, self.references
        )  # fmt: skip

    def draw(self, seed: int) -> Samples:
        """Draw from the model as it is, and score by reward model and judge."""
        decoding = Decoding(self.world.tokens, self.policy.decoding.temperature)
        sampler = HfSampler(self.policy.model, self.policy.tokenizer, decoding, prompts_at_once=8, show_progress=False)
        prompts = self.parts.held_out
        first = 1_000_000 * (seed + 1)  # seeds that the references are not of
        rows = [[*range(first, first + self.world.fresh)]] * len(prompts)
        drawn = [[each.completion for each in own] for own in sampler(prompts, rows)]
        flat = [(prompt, text) for prompt, own in zip(prompts, drawn, strict=True) for text in own]
        scores = [
            np.asarray(score(scorer, [p for p, _ in flat], [t for _, t in flat]), np.float64).reshape(len(prompts), -1)
            for scorer in self.demo.scorers.values()
        ]
        return Samples(*scores)


def list_cases(seeds: int, arms: Sequence[str]) -> Iterator[tuple[str, int]]:
    """List what is trained, the claims first."""
    for some in (MAIN, FURTHER):
        for seed in range(seeds):
            yield from ((arm, seed) for arm in some if arm in arms)


def summarise(bench: Bench, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gather KL and win rates of each arm, and what the arms for a procedure gain over the others by all of them."""
    by_case = {(row["arm"], row["seed"]): row for row in rows}
    names = sorted({arm for arm, _ in by_case}, key=lambda arm: arm not in OTHERS)
    optima = {arm: compute_targets(arm, np.stack(bench.references.select), bench.world.kl).log_ratios for arm in names}
    best = compare_held_out(optima, bench.references, MEASURED)
    seeds = {}
    for seed in sorted({seed for _, seed in by_case}):
        there = [arm for arm in names if (arm, seed) in by_case]
        log_ratios = {arm: np.load(bench.place(arm, seed, "npy")) for arm in there}
        seeds[seed] = compare_held_out(log_ratios, bench.references, MEASURED)
    gains = []
    for arm, other in product([name for name in names if name in FOR], [name for name in names if name in OTHERS]):
        pairs = [seed for seed, found in seeds.items() if {arm, other} <= {*found.checks}]
        if pairs:
            gains += [compare(seeds, by_case, best, (arm, other, procedure), pairs) for procedure in NAMES]
    arms = [describe(arm, seed, found, by_case[arm, seed]) for seed, found in seeds.items() for arm in found.checks]
    return {"arms": arms, "gains": gains}


def describe(arm: str, seed: int, found: HeldOutPolicies, row: dict[str, Any]) -> dict[str, Any]:
    """Describe a trained arm: its KL, win rates by the judge, and what training it took."""
    check = found.checks[arm]
    rates = {each: asdict(check.win_rates[found.judged_by][repr(NAMES[each])]) for each in NAMES}
    beside = {name: row[name] for name in ("factor", "kl_dev", "correlation", "training_seconds", "seconds")}
    fresh = {name: float(np.mean(each)) for name, each in row["fresh"]["rates"]["judge"].items()}
    drawn = row.get("drawn", World.fresh)
    told = {"arm": arm, "seed": seed, "kl": check.kl.value, **beside, "drawn": drawn}
    return {**told, "win_rates": rates, "fresh_win_rates": fresh}


def compare(
    seeds: dict[int, HeldOutPolicies],
    by_case: dict[tuple[str, int], dict[str, Any]],
    best: HeldOutPolicies,
    case: tuple[str, str, str],
    pairs: Sequence[int],
) -> dict[str, Any]:
    """Compare two arms by the judge: by weights and by fresh draws, each seed, their mean, and the realised share.

    `fresh` has an interval over seeds, `fresh_over_prompts` one over prompts, of the mean of these seeds' policies.
    """
    arm, other, procedure = case
    weighted = [seeds[seed].gain(arm, other, NAMES[procedure]) for seed in pairs]
    rates = {
        each: [np.array(by_case[each, seed]["fresh"]["rates"]["judge"][procedure]) for seed in pairs]
        for each in (arm, other)
    }
    drawn = [difference(Estimate(a), Estimate(b)) for a, b in zip(rates[arm], rates[other], strict=True)]
    together = difference(*(Estimate(np.mean(rates[each], axis=0)) for each in (arm, other)))
    gap = best.gain(arm, other, NAMES[procedure]).value
    means = [average(np.array([each.value for each in way])) for way in (weighted, drawn)]
    return {
        "arm": arm, "other": other, "procedure": procedure, "seeds": list(pairs), "gain": means[0], "gap": gap,
        "share": means[0]["value"] / gap,
        "kl": [[seeds[seed].checks[each].kl.value for each in (arm, other)] for seed in pairs],
        "by_seed": [[each.value, each.low, each.high] for each in weighted],
        "fresh": means[1], "fresh_by_seed": [[each.value, *each.interval()] for each in drawn],
        "fresh_over_prompts": [together.value, *together.interval()],
    }  # fmt: skip


def make_world(steps: int, lr: float, task: str, tokens: int = World.tokens) -> World:
    """Make a world of so many steps, each of prompts of its own."""
    prompts, there = 12 * steps, PROMPTS[task]
    return World(
        steps=steps,
        prompts=prompts,
        pool=there if task == HARMLESSNESS else min(prompts + 192, there),
        dev=min(World.dev, there - prompts),
        tokens=tokens,
        lr=lr,
        task=task,
    )


def find_folder(cache: Path, task: str, tokens: int = World.tokens) -> Path:
    """Find the folder of a task's rollouts and results."""
    length = "" if tokens == World.tokens else f"-{tokens}"
    return cache / f"proof-held-out-{'prompts' if task == 'reviews' else task}{length}"


def make_parts(cache: Path, world: World, quick: Path | None, tweets: Path | None = None) -> pipeline.Parts:
    """Fetch or train the models, and split the prompts into those to train on and those to measure on."""
    if world.task == HARMLESSNESS:
        return harmlessness.make_parts(cache, world.pool, world.test, tweets)
    scale = replace(pipeline.FULL, prompts=world.pool, held_out=world.test)
    if quick is not None:
        return pipeline.make_tiny_parts(quick, scale)
    parts = pipeline.make_real_parts(cache, scale)
    first, after = world.unseen, world.unseen + world.test
    prompts = pipeline.reward_models.make_prompts(cache, world.pool + world.test + first)
    others = prompts[:first] + prompts[after:]
    if len(others) < world.pool:
        raise ValueError(f"a world of {world.steps} steps needs {world.pool} prompts to train on, got {len(others)}.")
    return replace(parts, prompts=others[: world.pool], held_out=prompts[first:after])


def main() -> None:
    """Train and measure all that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=World.steps, help="of 12 prompts x 32 completions, each seen once")
    parser.add_argument("--tokens", type=int, default=World.tokens, help="of a completion")
    parser.add_argument("--fresh", type=int, default=World.fresh, help="draws of each test prompt, also of known arms")
    parser.add_argument("--task", choices=PROMPTS, default="reviews")
    parser.add_argument("--tweets", type=Path, metavar="CSV", help="a copy of what harmlessness.py fetches")
    parser.add_argument("--lr", type=float, default=World.lr, help="highest learning rate, of all arms")
    parser.add_argument("--arms", nargs="+", choices=MAIN + FURTHER, default=MAIN + FURTHER, metavar="ARM")
    parser.add_argument("--quick", type=Path, metavar="OUT")
    parser.add_argument("--summarise", action="store_true", help="train nothing: write the results of what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = QUICK if args.quick else make_world(args.steps, args.lr, args.task, args.tokens)
    world = replace(world, fresh=args.fresh)
    cache = args.cache.expanduser()
    folder: Path = args.quick or find_folder(cache, args.task, args.tokens)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(world, make_parts(cache, world, args.quick, args.tweets), folder)
    lines = folder / f"arms-{world.steps}.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    there = {(row["arm"], row["seed"]): row for row in rows}
    for arm, seed in list_cases(args.seeds, args.arms):
        known = there.get((arm, seed))
        if not args.summarise and (known is None or known.get("drawn", World.fresh) < world.fresh):
            rows.append(bench.draw_more(known) if known else bench.run(arm, seed))
            with lines.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            write(bench, rows, args.quick)
            print(*(f"{name}={rows[-1][name]}" for name in ("arm", "seed", "kl", "factor", "seconds")), flush=True)
    write(bench, rows, args.quick)


def write(bench: Bench, rows: Sequence[dict[str, Any]], quick: Path | None) -> None:
    """Write the results of all arms so far."""
    results = {"world": asdict(bench.world), **summarise(bench, rows)}
    if quick is None:
        save(bench.world.name, results)
    else:
        (quick / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
