"""World 2: SmolLM2-135M-Instruct, trained and measured on the same few prompts; share against completions.

    python benchmarks/proof/same_prompts.py                # goes on where it was; one core, about an hour
    python benchmarks/proof/same_prompts.py --quick OUT    # a tiny random world, some steps; results in the folder OUT

As world 3 (`small_model.py`), with a real language model: it writes two tokens of a film review, each among the 32
that it finds likeliest (`tree.py`), the reward model and the judge of the demo score all completions once, and the last
layers are trained on cached states. Results: benchmarks/results/proof_same_prompts.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import add_options, describe, run_world, score_all
from laws import Laws
from learn import Policy, Settings
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from tree import Inputs, Tree, choose_prompts, grow_widest

from calibrated_rewards.cli.demo.assets import fetch_language_model
from calibrated_rewards.cli.demo.reward_models import make_prompts
from calibrated_rewards.training.offline.frozen_layers import cut_upper_layers, find_layers, record_inputs
from calibrated_rewards.training.offline.trained_weights import named_trainable, select_weights


@dataclass(frozen=True)
class World:
    """Sizes of the world."""

    prompts: int = 8
    length: int = 2
    width: int = 32
    temperature: float = 1.0
    layers: int = 2
    """Layers that are trained, counted from the last."""

    @property
    def name(self) -> str:
        """The folder of its scores and results."""
        return f"proof-smollm2-{self.prompts}x{self.width}^{self.length}-{self.layers}"


@torch.no_grad()
def record_states(model: Any, tree: Tree, layers: int) -> Inputs:
    """Read all prefixes of a tree once, and keep what enters the first trained layer."""
    place = find_layers(model)
    if place is None:
        raise ValueError(f"record_states needs a model whose layers are in one list, got {type(model).__name__}.")
    cache, levels = DynamicCache(), []
    with record_inputs(place[2][-layers]) as recorded:
        tree.inputs.read(model.model, tree.prompts, cache)
        for tokens in tree.inputs.levels:
            cache.batch_repeat_interleave(tree.width)
            tree.inputs.read(model.model, tokens[:, None], cache)
    prompts, *rest = recorded
    levels = [each[:, 0].clone() for each in rest]
    return Inputs(prompts.clone(), tuple(levels))


def make_policy(model: Any, tree: Tree, layers: int, score_tree: Any) -> Policy:
    """Make a policy of which the last layers are trained, on cached states; `score_tree` gives reward and judge."""
    inputs = record_states(model, tree, layers)
    select_weights(model, layers, 0, 0)
    body, head = cut_upper_layers(model), model.lm_head.weight.detach()
    law = np.exp(tree.law(body, head, inputs))
    laws = Laws(law / law.sum(axis=1, keepdims=True), *score_tree(tree))
    weights: list[Tensor] = [weight for _, weight in named_trainable(model)]
    return Policy(body, head, weights, tree, laws, inputs)


def build(cache: Path, world: World, folder: Path) -> tuple[Policy, dict[str, Any]]:
    """Build the world: the model in float32, its tree, laws and scores."""
    place = fetch_language_model(cache)
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    candidates = choose_prompts(lambda text: tokenizer(text)["input_ids"], make_prompts(cache, 600), 5 * world.prompts)
    shape = (world.length, world.width)
    body, head = model.model, model.lm_head.weight
    texts, tree = grow_widest(body, head, *candidates, world.prompts, shape, world.temperature)
    completions = [tokenizer.batch_decode(rows.tolist()) for rows in tree.tokens()]

    def score_tree(_: Tree) -> tuple[Any, Any]:
        scores = score_all(folder, cache, texts, completions)
        return scores["reward"], scores["judge"]

    policy = make_policy(model, tree, world.layers, score_tree)
    law = policy.laws.reference
    samples = [[texts[at] + completions[at][i] for i in np.argsort(-law[at])[:3]] for at in range(3)]
    return policy, {**asdict(world), "texts": texts, "likeliest": samples, **describe(policy.laws)}


def build_tiny() -> tuple[Policy, dict[str, Any]]:
    """Build a tiny world of a random model, whose scores are random as well."""
    from small_language_model import Size, build_model

    torch.manual_seed(0)
    model = build_model(Size(hidden=32, layers=3), 64).eval()
    tree = Tree.grow(model.model, model.lm_head.weight, torch.randint(1, 64, (3, 4)), 2, 8, 1.0)
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(3, 64))
    policy = make_policy(model, tree, 2, lambda _: (reward, reward + 0.5 * rng.normal(size=reward.shape)))
    return policy, describe(policy.laws)


def main() -> None:
    """Train and measure all that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Settings(rate=1e-4, steps=60))
    for name in ("prompts", "length", "width", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(World, name))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = World(args.prompts, args.length, args.width, layers=args.layers)
    folder: Path = args.quick or args.cache.expanduser() / world.name
    folder.mkdir(parents=True, exist_ok=True)
    policy, about = build_tiny() if args.quick else build(args.cache.expanduser(), world, folder)
    run_world(policy, about, folder, args, None if args.quick else "proof_same_prompts")


if __name__ == "__main__":
    main()
