"""A small language model of our own: a Llama of half a million weights and a BPE of 2,048 tokens, on the rated texts.

    python benchmarks/proof/small_language_model.py     # trains it in some minutes, and prints its held-out loss

It is trained on the texts that prompts are not made of (`split_ratings`), each behind the prompt of its source. There
is no token for an end: completions have a fixed number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from calibrated_rewards.cli.demo.assets import CACHE, MOVIES, make_folder
from calibrated_rewards.cli.demo.reward_models import split_ratings

PAD = "<pad>"


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of its training."""

    vocabulary: int = 2048
    hidden: int = 96
    layers: int = 3
    epochs: float = 1.2
    rate: float = 3e-3
    batch: int = 64
    texts: int | None = None

    @property
    def name(self) -> str:
        """The folder in the cache."""
        few = f"-{self.texts}" if self.texts else ""
        return f"small-language-model-{self.vocabulary}-{self.hidden}x{self.layers}-{self.epochs:g}{few}"


def fetch_small_language_model(cache: Path, size: Size) -> Path:
    """Train the model if it is missing; return its folder."""
    return make_folder(cache, size.name, lambda folder: train(cache, size, folder))


def load(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE."""
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, settings)
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=backend, pad_token=PAD, padding_side="right")


def build_model(size: Size, tokens: int) -> Any:
    """Build a random model whose head shares the embeddings."""
    config = cast(Any, LlamaConfig)(
        vocab_size=tokens,
        hidden_size=size.hidden,
        intermediate_size=round(size.hidden * 8 / 3 / 16) * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // 32),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return cast(Any, LlamaForCausalLM)(config)


def iterate_batches(rows: Sequence[list[int]], batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Iterate over an epoch in batches of rows of near length, padded with -100."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    pools = [sorted(order[at : at + 32 * batch], key=lambda i: len(rows[i])) for at in range(0, len(rows), 32 * batch)]
    batches = [pool[at : at + batch] for pool in pools for at in range(0, len(pool), batch)]
    for at in torch.randperm(len(batches), generator=generator).tolist():
        yield nn.utils.rnn.pad_sequence(
            [torch.tensor(rows[i]) for i in batches[at]], batch_first=True, padding_value=-100
        )


def compute_loss(model: Any, batch: Tensor) -> tuple[Tensor, int]:
    """Compute the sum of the next tokens' losses, and how many there are."""
    logits = model(batch.clamp_min(0)[:, :-1]).logits
    targets = batch[:, 1:]
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


@torch.no_grad()
def measure_loss(model: Any, rows: Sequence[list[int]]) -> float:
    """Compute the mean loss of a token."""
    total, count = 0.0, 0
    for batch in iterate_batches(rows, 128, torch.Generator().manual_seed(0)):
        loss, tokens = compute_loss(model, batch)
        total, count = total + float(loss), count + tokens
    return total / count


def train(cache: Path, size: Size, folder: Path) -> None:
    """Train tokenizer and model, and write them with the held-out loss."""
    parts = split_ratings(cache)
    rated = [*parts.reward_model, *parts.judge]
    texts = [each.opening + each.text for each in sorted(rated, key=lambda each: each.opening != MOVIES)]
    texts = texts[: size.texts]
    tokenizer = train_tokenizer(texts, size.vocabulary)
    rows, held_out = (
        [ids[:64] for ids in tokenizer(some)["input_ids"] if len(ids) > 1]
        for some in (texts, [each.opening + each.text for each in parts.held_out[:500]])
    )
    torch.manual_seed(0)
    model = build_model(size, len(tokenizer))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.rate, betas=(0.9, 0.98), fused=True)
    generator, steps = torch.Generator().manual_seed(0), math.ceil(size.epochs * len(rows) / size.batch)
    began, done, log = time.process_time(), 0, []
    progress = tqdm(total=steps, desc="language model", delay=3, mininterval=10, disable=None)
    while done < steps:
        for batch in iterate_batches(rows, size.batch, generator):
            if done == steps:
                break
            rate = size.rate * min((done + 1) / 50, 0.5 * (1 + math.cos(math.pi * done / steps)) + 0.02)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, tokens = compute_loss(model.train(), batch)
            torch.autograd.backward(loss / tokens)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            progress.update()
            if done % 100 == 0 or done == steps:
                log.append(
                    {
                        "step": done,
                        "held_out": measure_loss(model.eval(), held_out),
                        "last": float(loss.detach()) / tokens,
                    }
                )
                print(json.dumps(log[-1]), flush=True)
    progress.close()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "weights": sum(p.numel() for p in model.parameters()),
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "processor_seconds": round(time.process_time() - began),
        "log": log,
    }
    (folder / "trained.json").write_text(json.dumps(record))


def main() -> None:
    """Train the model if it is missing, and print what is known of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--epochs", type=float, default=Size.epochs)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = fetch_small_language_model(args.cache, Size(hidden=args.hidden, layers=args.layers, epochs=args.epochs))
    print((folder / "trained.json").read_text())


if __name__ == "__main__":
    main()
