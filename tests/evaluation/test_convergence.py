"""TRL's RLOO with CalibratedReward ends at pi_ref e^{log C / beta} / Z; benchmarks/convergence.py has the rest."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import RLOOConfig, RLOOTrainer

from calibrated_rewards import CalibratedReward, Log, ReferenceTable
from calibrated_rewards.testing.suites import NumberScorer
from calibrated_rewards.training.check_settings.check import check_settings
from calibrated_rewards.training.check_settings.trl import rloo_settings

DIGITS = "0123456"
PROMPTS = ("01", "23", "45")
BETA, GROUP, K = 0.25, 16, 1000


def tokenizer():
    """One token a digit, and an end token, which is also the padding."""
    vocabulary = {**{digit: i for i, digit in enumerate(DIGITS)}, "</s>": len(DIGITS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", padding_side="left")


def policy(folder):
    """A tiny Llama with a skewed law, in its folder: TRL reads the reference from there."""
    torch.manual_seed(0)
    end = len(DIGITS)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": end + 1, "bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, max_position_embeddings=16, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def law(model):
    """The chance of each token after each prompt; the last is the end token, which is the empty completion."""
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([[int(digit) for digit in prompt] for prompt in PROMPTS])).logits
    return logits[:, -1].double().softmax(-1).numpy()


def references(chances, scores):
    """K scores in the proportions of the law, by largest remainders."""
    counts = np.floor(chances * K).astype(int)
    counts[np.argsort(counts - chances * K, kind="stable")[: K - counts.sum()]] += 1
    return np.repeat(scores, counts)


# TRL asks models by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_rloo_converges_to_the_tilted_reference(tmp_path):
    """The trained law is within 0.03 of the reference times C^{1/beta}, in total variation, where C is by counting."""
    model = policy(tmp_path / "reference")
    before = law(model)
    scores = np.array([*range(len(DIGITS)), 0.0], np.float32)  # the number that was written; none is as bad as 0
    known = [references(chances, scores) for chances in before]
    below = np.array([[(own < s).sum() + (own == s).sum() / 2 for s in scores] for own in known]) / K
    target = before * np.maximum(below, 0.5 / K) ** (1 / BETA)
    target /= target.sum(axis=1, keepdims=True)

    table = ReferenceTable.build(list(zip(PROMPTS, known, strict=True)))
    reward = CalibratedReward(NumberScorer(default=0.0), table, Log())
    args = RLOOConfig(
        output_dir=str(tmp_path / "run"),
        **rloo_settings(BETA, GROUP, max_completion_length=1, learning_rate=5e-3, lr_scheduler_type="cosine"),
        adam_beta2=0.95,
        max_steps=250,
        per_device_train_batch_size=GROUP * len(PROMPTS),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
    )
    assert check_settings(args, reward, beta=BETA).problems == ()
    data = Dataset.from_dict({"prompt": list(PROMPTS)})
    RLOOTrainer(model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer()).train()

    distance = np.abs(law(model) - target).sum(axis=1) / 2
    assert (np.abs(before - target).sum(axis=1) / 2).min() > 0.3  # there was something to learn
    assert distance.max() < 0.03, distance
