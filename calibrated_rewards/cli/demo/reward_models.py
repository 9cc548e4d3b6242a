"""Two reward models trained on disjoint halves of the same human ratings: one to be rewarded by, one to judge.

Each is all-MiniLM-L6-v2 with one label, fully fine-tuned for an epoch to the mean rating of a text. It reads a prompt
and its completion as one text, in training and after: `load_scorer(folder, kind="sequence-classifier")`, since without
`kind` an encoder with one label is taken to read pairs. 1,500 movie reviews are held out of both halves; prompts are
made of their first words.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from calibrated_rewards.cli.demo.assets import MOVIES, Rated, encoder, made, ratings
from calibrated_rewards.files import replace_file
from calibrated_rewards.models.parts import right_padded
from calibrated_rewards.models.text import Text

HELD_OUT = 1_500
BATCH, RATE, WARM_UP, LONGEST = 32, 1e-4, 0.1, 128
# Batches after which what is learnt so far is written down.
OFTEN = 25
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
    movies = [rated for rated in texts if rated.opening == MOVIES]
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


def reward_model(cache: Path, texts: int | None = None) -> Path:
    """The folder of the reward model, trained if it is not there; on so many texts of its half, movie reviews first."""
    return _trained(cache, "reward-model", texts)


def judge(cache: Path, texts: int | None = None) -> Path:
    """The folder of the judge."""
    return _trained(cache, "judge", texts)


def _trained(cache: Path, name: str, texts: int | None) -> Path:
    whole = name if texts is None else f"{name}-{texts}"
    so_far = cache.expanduser() / f"{whole}.so-far"
    return made(cache, whole, partial(_learn, cache, name, texts, so_far))


def _learn(cache: Path, name: str, texts: int | None, so_far: Path, folder: Path) -> None:
    own = getattr(split(cache), name.replace("-", "_"))
    first = own if texts is None else sorted(own, key=lambda rated: rated.opening != MOVIES)[:texts]
    train(encoder(cache), first, folder, so_far)
    so_far.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Learner:
    """A model on its way through an epoch; all of it can be written down, and taken up again."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def of(cls, base: Path, batches: int) -> "Learner":
        """At its start: the encoder with a fresh label."""
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
        falling = cast(Any, get_linear_schedule_with_warmup)(optimizer, int(WARM_UP * batches), batches)
        return cls(model, optimizer, falling)

    def save(self, done: int, path: Path) -> None:
        """After so many batches."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with replace_file(path) as file:
            torch.save({**parts, "done": done, "random": torch.get_rng_state()}, file)

    def load(self, path: Path) -> int:
        """As it was written down, and after how many batches."""
        kept = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(kept[name])
        torch.set_rng_state(kept["random"])
        return int(kept["done"])

    def step(self, rows: Tensor, mask: Tensor, targets: Tensor) -> None:
        """One batch of least squares, in bfloat16 but for the weights."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            given = self.model(input_ids=rows, attention_mask=mask).logits[:, 0]
        torch.autograd.backward(nn.functional.mse_loss(given.float(), targets))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train(base: Path, texts: Sequence[Rated], folder: Path, so_far: Path) -> None:
    """An epoch; one that was stopped goes on from `so_far`, and ends with the same weights."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = Text().encode(tokenizer, [rated.opening for rated in texts], [rated.text for rated in texts])
    targets = torch.tensor([rated.rating for rated in texts])
    batches = alike([min(len(row), LONGEST) for row in ids])
    learner = Learner.of(base, len(batches))
    done = learner.load(so_far) if so_far.exists() else 0
    progress = tqdm(total=len(batches), initial=done, desc=so_far.stem, unit="batch", delay=3, disable=None)
    for n, batch in enumerate(batches[done:], done + 1):
        rows, mask = right_padded([ids[i][:LONGEST] for i in batch], tokenizer.pad_token_id, learner.model.device)
        learner.step(rows, mask, targets[batch])
        progress.update()
        if n % OFTEN == 0:
            learner.save(n, so_far)
    progress.close()
    learner.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    how = {"texts": len(texts), "seconds": round(time.perf_counter() - start), "threads": torch.get_num_threads()}
    (folder / "trained.json").write_text(json.dumps(how))


def alike(lengths: Sequence[int]) -> list[Tensor]:
    """Batches of texts of similar length in random order: padded to the longest, random ones are mostly padding."""
    order = torch.randperm(len(lengths))
    pools = [sorted(pool.tolist(), key=lengths.__getitem__) for pool in torch.split(order, 32 * BATCH)]
    batches = [batch for pool in pools for batch in torch.split(torch.tensor(pool), BATCH)]
    return [batches[i] for i in torch.randperm(len(batches))]
