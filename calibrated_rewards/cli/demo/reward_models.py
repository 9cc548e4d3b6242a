"""Train two reward models on disjoint halves of the same human ratings: one gives the rewards, the other judges.

Each is all-MiniLM-L6-v2 with one label, fully fine-tuned for an epoch to the mean rating of a text. It reads a prompt
and its completion as one text, in training and after: `load_scorer(folder, kind="sequence-classifier")`, since without
`kind` an encoder with one label is taken to read pairs. 1,500 movie reviews are held out of both halves; prompts are
made of their first words.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from calibrated_rewards.cli.demo.assets import MOVIES, Rated, fetch_encoder, fetch_ratings, make_folder
from calibrated_rewards.files import replace_file
from calibrated_rewards.models.parts import multiplies_bfloat16, pad_right
from calibrated_rewards.models.text import Text

HELD_OUT = 1_500
BATCH, RATE, WARM_UP, LONGEST = 32, 1e-4, 0.1, 128
# Batches after which the state of training is saved.
OFTEN = 25
SEED = 0


@dataclass(frozen=True)
class Split:
    """The texts of the reward model, of the judge, and those that neither learns from."""

    reward_model: list[Rated]
    judge: list[Rated]
    held_out: list[Rated]


def split_ratings(cache: Path) -> Split:
    """Split the rated texts: some movie reviews held out, and all others in two halves."""
    draw = random.Random(SEED)
    texts = fetch_ratings(cache)
    movies = [rated for rated in texts if rated.opening == MOVIES]
    draw.shuffle(movies)
    rest = movies[HELD_OUT:] + texts[len(movies) :]
    draw.shuffle(rest)
    middle = len(rest) // 2
    return Split(rest[:middle], rest[middle:], movies[:HELD_OUT])


def make_prompts(cache: Path, count: int, words: int = 3) -> list[str]:
    """Make prompts of different beginnings of held-out movie reviews: "Movie review: An intriguing and"."""
    long = [rated for rated in split_ratings(cache).held_out if len(rated.text.split()) > words]
    prompts = dict.fromkeys(rated.opening + " ".join(rated.text.split()[:words]) for rated in long)
    return list(prompts)[:count]


def train_reward_model(cache: Path, texts: int | None = None) -> Path:
    """Train the reward model if it is missing, on so many texts of its half, movie reviews first; return its folder."""
    return _train_half(cache, "reward-model", texts)


def train_judge(cache: Path, texts: int | None = None) -> Path:
    """Train the judge if it is missing, on so many texts of its half, movie reviews first; return its folder."""
    return _train_half(cache, "judge", texts)


def list_missing(cache: Path, texts: int) -> dict[str, Callable[[], Path]]:
    """List what trains the models that are missing, by their names; the downloads are made first."""
    fetch_encoder(cache)
    fetch_ratings(cache)
    makers = {"reward-model": train_reward_model, "judge": train_judge}
    return {
        name: partial(make, cache, texts)
        for name, make in makers.items()
        if not (cache.expanduser() / _name_folder(name, texts)).exists()
    }


def _name_folder(name: str, count: int | None) -> str:
    return name if count is None else f"{name}-{count}"


def _train_half(cache: Path, name: str, count: int | None) -> Path:
    folder_name = _name_folder(name, count)
    checkpoint = cache.expanduser() / f"{folder_name}.so-far"

    def make(folder: Path) -> None:
        half = getattr(split_ratings(cache), name.replace("-", "_"))
        texts = half if count is None else sorted(half, key=lambda rated: rated.opening != MOVIES)[:count]
        train(fetch_encoder(cache), texts, folder, checkpoint)
        checkpoint.unlink(missing_ok=True)

    return make_folder(cache, folder_name, make)


@dataclass(frozen=True, eq=False)
class Learner:
    """A model in training for an epoch, which can be saved and loaded at any batch."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def start(cls, base: Path, batches: int) -> "Learner":
        """Start from the encoder with a fresh head of one label."""
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
        falling = cast(Any, get_linear_schedule_with_warmup)(optimizer, int(WARM_UP * batches), batches)
        return cls(model, optimizer, falling)

    def save(self, done: int, path: Path) -> None:
        """Save the state after so many batches."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        with replace_file(path) as file:
            torch.save({**parts, "done": done, "random": torch.get_rng_state()}, file)

    def load(self, path: Path) -> int:
        """Load a saved state; return the number of batches after which it was saved."""
        state = torch.load(path, weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        return int(state["done"])

    def step(self, rows: Tensor, mask: Tensor, targets: Tensor) -> None:
        """Train on a batch by least squares, in bfloat16 but for the weights where the processor has it."""
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            scores = self.model(input_ids=rows, attention_mask=mask).logits[:, 0]
        torch.autograd.backward(nn.functional.mse_loss(scores.float(), targets))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train(base: Path, texts: Sequence[Rated], folder: Path, so_far: Path) -> None:
    """Train for an epoch; one that was stopped goes on from `so_far`, and ends with the same weights."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = Text().encode(tokenizer, [rated.opening for rated in texts], [rated.text for rated in texts])
    targets = torch.tensor([rated.rating for rated in texts])
    batches = make_batches([min(len(row), LONGEST) for row in ids])
    learner = Learner.start(base, len(batches))
    done = learner.load(so_far) if so_far.exists() else 0
    progress = tqdm(total=len(batches), initial=done, desc=so_far.stem, unit="batch", delay=3, disable=None)
    for n, batch in enumerate(batches[done:], done + 1):
        rows, mask = pad_right([ids[i][:LONGEST] for i in batch], tokenizer.pad_token_id, learner.model.device)
        learner.step(rows, mask, targets[batch])
        progress.update()
        if n % OFTEN == 0:
            learner.save(n, so_far)
    progress.close()
    learner.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"texts": len(texts), "seconds": round(time.perf_counter() - start), "threads": torch.get_num_threads()}
    (folder / "trained.json").write_text(json.dumps(record))


def make_batches(lengths: Sequence[int]) -> list[Tensor]:
    """Group texts of similar length into batches, in random order: random batches would be mostly padding."""
    order = torch.randperm(len(lengths))
    pools = [sorted(pool.tolist(), key=lengths.__getitem__) for pool in torch.split(order, 32 * BATCH)]
    batches = [batch for pool in pools for batch in torch.split(torch.tensor(pool), BATCH)]
    return [batches[i] for i in torch.randperm(len(batches))]
