"""TRL 1.12's PPO trainer with the adapter's module in the place of a reward model: four updates, and every reward."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import trl
from datasets import Dataset
from subject import ADAPTERS, raised, render, report, subject
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.utils import get_reward

from calibrated_rewards.adapters.trl_ppo_module import RewardModule

sys.path.insert(0, str(ADAPTERS.parent / "tests"))
import tiny


def asked_directly(asked: Any, module: Any, tokenizer: Any) -> float:
    """TRL's get_reward on the subject's pairs: padded on the left, on the right, cut after the last token."""
    import torch

    rendered = [tokenizer(render(chat), add_special_tokens=False)["input_ids"] for chat in asked.chats]
    answers = [tokenizer(said, add_special_tokens=False)["input_ids"] for said in asked.completions]
    left, right = max(map(len, rendered)), max(map(len, answers)) + 1
    rows = [
        [tiny.PAD] * (left - len(p)) + p + c + [tiny.PAD] * (right - len(c))
        for p, c in zip(rendered, answers, strict=True)
    ]
    return asked.worst(get_reward(module, torch.tensor(rows), tiny.PAD, left)[1].tolist())


def trained(asked: Any, tokenizer: Any, module: Any) -> Any:
    """Four updates; the scores that the trainer logged."""
    chats = [asked.chats[n] for n in range(0, len(asked), 4)]
    ids = [tokenizer(render(chat), add_special_tokens=False)["input_ids"] for chat in chats]
    data = Dataset.from_dict({"input_ids": ids})
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        total_episodes=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=8,
        num_sample_generations=0,
        local_rollout_forward_batch_size=2,
        logging_steps=1,
        save_strategy="no",
    )
    models = {"model": tiny.causal(), "ref_model": tiny.causal(), "value_model": tiny.classifier(1)}
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, reward_model=module, train_dataset=data, eval_dataset=data, **models
    )
    trainer.train()
    return [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]


def main() -> None:
    """Run it, and report how far each number is from what it should be."""
    asked, tokenizer = subject(), tiny.tokenizer(side="left")
    module = RewardModule(tokenizer)
    worst = {"get_reward": asked_directly(asked, module, tokenizer)}
    scores = trained(asked, tokenizer, module)
    assert scores
    assert all(0 <= score <= 1 for score in scores), scores
    unknown = raised(lambda: module.backbone(*both(tokenizer("Who?", return_tensors="pt"))))
    report(
        framework="TRL PPO", version=f"trl {trl.__version__}", pairs=len(asked), worst=worst, updates=len(scores),
        unknown=unknown,
    )  # fmt: skip


def both(encoded: Any) -> tuple[Any, Any]:
    """Ids and mask."""
    return encoded["input_ids"], encoded["attention_mask"]


if __name__ == "__main__":
    main()
