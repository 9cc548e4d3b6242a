"""What a preference head costs when it serves, against two models: memory, and the time of completions and scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from head_measures import N
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sampling import in_rounds

from calibrated_rewards.cli.demo.pipeline import FULL
from calibrated_rewards.heads import HeadedModel
from calibrated_rewards.models.loading import Placement
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.preference_head import PreferenceHeadScorer


def load_headed(folder: Path) -> HeadedModel:
    """Load a head with its model in float32, in which it was trained."""
    return HeadedModel.from_pretrained(folder, placement=Placement("float32"))


def measure_serving(frozen: Path, lora: Path, encoder: Path, rounds: int) -> dict[str, Any]:
    """Measure the weights in memory, and the time of 8 completions a prompt with their scores: one model, and two.

    A frozen head's scores come from the pass that writes. A head with LoRA reads the completions afterwards, with its
    adapter, which is off while the model writes.
    """
    headed, adapted = load_headed(frozen), load_headed(lora)
    adapted.model.base_model.disable_adapter_layers()
    scorer, reader = (PreferenceHeadScorer(each, show_progress=False) for each in (headed, adapted))
    other = load_scorer(encoder, kind="sequence-classifier", show_progress=False)
    prompts = [f"Movie review: {word}" for word in ("This", "The", "A", "It", "An", "If", "One", "What")]
    decoding, seeds = Decoding(32, FULL.temperature), [list(range(N))] * len(prompts)
    plain = HfSampler(headed.model, headed.tokenizer, decoding, show_progress=False)
    with_head = HfSampler(headed.model, headed.tokenizer, decoding, scorer=scorer, show_progress=False)

    def draw_and_score(sampler: HfSampler, by: Any) -> Any:
        drawn = sampler(prompts, seeds)
        flat = [(prompt, each.completion) for prompt, own in zip(prompts, drawn, strict=True) for each in own]
        return by([prompt for prompt, _ in flat], [text for _, text in flat])

    sides: dict[str, Callable[[], Any]] = {
        "completions": lambda: plain(prompts, seeds),
        "head, frozen": lambda: draw_and_score(with_head, scorer),
        "head, LoRA": lambda: draw_and_score(plain, reader),
        "MiniLM": lambda: draw_and_score(plain, other),
    }
    times = in_rounds(rounds, sides)
    ratio = {
        name: float(np.median([row[1] / alone[1] for row, alone in zip(own, times["completions"], strict=True)])) - 1
        for name, own in times.items()
    }
    classifier = AutoModelForSequenceClassification.from_pretrained(encoder)
    sizes = {
        name: sum(weight.nbytes for weight in part.parameters()) / 1e6
        for name, part in {"policy": headed.model, "head": headed.head, "MiniLM": classifier}.items()
    }
    adapter = [weight.nbytes for name, weight in adapted.model.named_parameters() if "lora_" in name]
    return {
        "prompts": len(prompts), "completions": N, "tokens": 32, "rounds": rounds, "cost_by_processor_time": ratio,
        "megabytes": {**sizes, "adapter": sum(adapter) / 1e6},
    }  # fmt: skip
