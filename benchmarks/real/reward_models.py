"""Two reward models trained on disjoint halves of the same human ratings: one to be rewarded by, one to judge.

    python benchmarks/real/reward_models.py    # minutes: an epoch of MiniLM for each

Each is all-MiniLM-L6-v2 with one label, fully fine-tuned for an epoch to the mean rating of a text. It reads a prompt
and its completion as one text, in training and after: `load_scorer(folder, kind="sequence-classifier")`, since without
`kind` an encoder with one label is taken to read pairs. 1,500 movie reviews are held out of both halves; prompts are
made of their first words. Writes benchmarks/results/real_reward_models.json; the models stay in the cache.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import CACHE, Rated, encoder, made, ratings
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.reading.body import right_padded
from calibrated_rewards.reading.text import Text
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score

HELD_OUT = 1_500
BATCH, RATE, WARM_UP, LONGEST = 32, 1e-4, 0.1, 128
SEED = 0


@dataclass(frozen=True)
class Split:
    """Who learns from what; nobody from what is held out."""

    reward_model: list[Rated]
    judge: list[Rated]
    held_out: list[Rated]


def split(cache: Path) -> Split:
    """Movie reviews held out, and all else in two halves."""
    draw = random.Random(SEED)
    texts = ratings(cache)
    movies = [rated for rated in texts if rated.opening == texts[0].opening]
    draw.shuffle(movies)
    rest = movies[HELD_OUT:] + texts[len(movies) :]
    draw.shuffle(rest)
    middle = len(rest) // 2
    return Split(rest[:middle], rest[middle:], movies[:HELD_OUT])


def prompts(cache: Path, count: int, words: int = 3) -> list[str]:
    """Different beginnings of held-out movie reviews: "Movie review: An intriguing and"."""
    long = [rated for rated in split(cache).held_out if len(rated.text.split()) > words]
    found = dict.fromkeys(rated.opening + " ".join(rated.text.split()[:words]) for rated in long)
    return list(found)[:count]


def reward_model(cache: Path) -> Path:
    """The folder of the reward model, trained if it is not there."""
    return made(cache, "reward-model", partial(train, encoder(cache), split(cache).reward_model))


def judge(cache: Path) -> Path:
    """The folder of the judge."""
    return made(cache, "judge", partial(train, encoder(cache), split(cache).judge))


def load(folder: Path, **options: Any) -> Any:
    """A reward model as a scorer that reads one text."""
    return load_scorer(folder, kind="sequence-classifier", **options)


def train(base: Path, texts: list[Rated], folder: Path) -> None:
    """An epoch of least squares, in bfloat16 but for the weights."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).train()
    ids = Text().encode(tokenizer, [rated.opening for rated in texts], [rated.text for rated in texts])
    targets = torch.tensor([rated.rating for rated in texts])
    batches = alike([min(len(row), LONGEST) for row in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARM_UP * len(batches)), len(batches))
    for batch in tqdm(batches, desc=folder.stem, unit="batch", delay=3, disable=None):
        rows, mask = right_padded([ids[i][:LONGEST] for i in batch], tokenizer.pad_token_id, model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            given = model(input_ids=rows, attention_mask=mask).logits[:, 0]
        torch.nn.functional.mse_loss(given.float(), targets[batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    how = {"texts": len(texts), "seconds": round(time.perf_counter() - start), "threads": torch.get_num_threads()}
    (folder / "trained.json").write_text(json.dumps(how))


def alike(lengths: list[int]) -> list[torch.Tensor]:
    """Batches of texts of similar length in random order: padded to the longest, random ones are mostly padding."""
    order = torch.randperm(len(lengths))
    pools = [sorted(pool.tolist(), key=lengths.__getitem__) for pool in order.split(32 * BATCH)]
    batches = [batch for pool in pools for batch in torch.tensor(pool).split(BATCH)]
    return [batches[i] for i in torch.randperm(len(batches))]


def agreement(given: Any, rated: list[Rated]) -> dict[str, float]:
    """Correlation with the mean ratings, and how often the sign is theirs."""
    wanted = np.array([each.rating for each in rated])
    return {
        "pearson": float(np.corrcoef(given, wanted)[0, 1]),
        "sign_accuracy": float((np.sign(given) == np.sign(wanted)).mean()),
    }


def main() -> None:
    """Train both, and see how they do on what neither has read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE)
    cache = parser.parse_args().cache
    logging.disable_progress_bar()
    parts = split(cache)
    openings, texts = [rated.opening for rated in parts.held_out], [rated.text for rated in parts.held_out]
    results: dict[str, Any] = {"held_out": len(texts)}
    given = []
    for name, folder in (("reward_model", reward_model(cache)), ("judge", judge(cache))):
        given.append(score(load(folder), openings, texts))
        how = json.loads((folder / "trained.json").read_text())
        results[name] = {**how, **agreement(given[-1], parts.held_out)}
        print(name, results[name])
    results["pearson_between"] = float(np.corrcoef(*given)[0, 1])
    print("between them", results["pearson_between"])
    print(save("real_reward_models", results))


if __name__ == "__main__":
    main()
