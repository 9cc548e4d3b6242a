"""World 3: a small language model of our own, trained and measured on the same prompts; share against completions.

    python benchmarks/proof/small_model.py                # goes on where it was; one core, about an hour
    python benchmarks/proof/small_model.py --quick OUT    # a tiny random world, some steps; results in the folder OUT

The model writes the last tokens of film reviews (`small_language_model.py`, `tree.py`); the reward model and the judge
of the demo score all completions once. Every arm is trained offline on K rollouts of each prompt, and measured exactly,
which is what infinitely many fresh completions would give. One JSON line an arm, in the folder of the world; they are
gathered in benchmarks/results/proof_small_model.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import add_options, describe, run_world, score_all
from laws import Laws
from learn import Policy, Settings
from small_language_model import Size, build_model, fetch_small_language_model, load
from tree import Tree, choose_prompts, grow_widest

from calibrated_rewards.cli.demo.reward_models import make_prompts


@dataclass(frozen=True)
class World:
    """Sizes of the world."""

    prompts: int = 8
    length: int = 3
    width: int = 12
    temperature: float = 1.0
    model: Size = field(default_factory=Size)

    @property
    def name(self) -> str:
        """The folder of its scores and results."""
        return f"proof-{self.model.name}-{self.prompts}x{self.width}^{self.length}"


def build(cache: Path, world: World, folder: Path) -> tuple[Policy, dict[str, Any]]:
    """Build the world: the model, its tree of completions, their laws and scores."""
    model, tokenizer = load(fetch_small_language_model(cache, world.model))
    candidates = choose_prompts(lambda text: tokenizer(text)["input_ids"], make_prompts(cache, 600), 4 * world.prompts)
    body, head, shape = model.model, model.lm_head.weight, (world.length, world.width)
    texts, tree = grow_widest(body, head, *candidates, world.prompts, shape, world.temperature)
    completions = [tokenizer.batch_decode(rows.tolist()) for rows in tree.tokens()]
    scores = score_all(folder, cache, texts, completions)
    law = np.exp(tree.law(body, head))
    laws = Laws(law / law.sum(axis=1, keepdims=True), scores["reward"], scores["judge"])
    policy = Policy(body, head, list(model.parameters()), tree, laws)
    samples = [[texts[at] + completions[at][i] for i in np.argsort(-law[at])[:3]] for at in range(3)]
    return policy, {**asdict(world), "texts": texts, "likeliest": samples, **describe(laws)}


def build_tiny() -> tuple[Policy, dict[str, Any]]:
    """Build a tiny world of a random model, whose scores are random as well."""
    torch.manual_seed(0)
    model = build_model(Size(hidden=32, layers=2), 64)
    tree = Tree.grow(model.model, model.lm_head.weight, torch.randint(1, 64, (3, 4)), 2, 8, 1.0)
    law, rng = np.exp(tree.law(model.model, model.lm_head.weight)), np.random.default_rng(0)
    reward = rng.normal(size=law.shape)
    laws = Laws(law / law.sum(1, keepdims=True), reward, reward + 0.5 * rng.normal(size=law.shape))
    return Policy(model.model, model.lm_head.weight, list(model.parameters()), tree, laws), describe(laws)


def main() -> None:
    """Train and measure all that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Settings())
    for name in ("prompts", "length", "width"):
        parser.add_argument(f"--{name}", type=int, default=getattr(World, name))
    for name in ("hidden", "layers", "epochs"):
        parser.add_argument(f"--{name}", type=type(getattr(Size, name)), default=getattr(Size, name))
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(hidden=args.hidden, layers=args.layers, epochs=args.epochs)
    world = World(args.prompts, args.length, args.width, model=size)
    folder: Path = args.quick or args.cache.expanduser() / world.name
    folder.mkdir(parents=True, exist_ok=True)
    policy, about = build_tiny() if args.quick else build(args.cache.expanduser(), world, folder)
    run_world(policy, about, folder, args, None if args.quick else "proof_small_model")


if __name__ == "__main__":
    main()
