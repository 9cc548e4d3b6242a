"""The Hugging Face sampler: K completions of a prompt that is read once, by any causal language model."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import nan
from typing import Any, NamedTuple, NoReturn

import torch
from tqdm import tqdm

from calibrated_rewards.models.batches import PATIENCE, Budget
from calibrated_rewards.models.parts import default_budget, device_of, for_scoring, lock_of, unwrapped, vocabulary
from calibrated_rewards.models.text import Text
from calibrated_rewards.models.unread import UnreadError
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.agreement import Route, check_causal
from calibrated_rewards.samplers.cache import bytes_of
from calibrated_rewards.samplers.decoding import Decoding
from calibrated_rewards.samplers.drawing import processors
from calibrated_rewards.samplers.endings import Draft
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Rollout, Seeds
from calibrated_rewards.samplers.rows import Reader
from calibrated_rewards.samplers.writing import Writer

logger = logging.getLogger(__name__)

# Memory for keys and values, unless the user says otherwise: so much on a CPU, and this part of a GPU.
ON_CPU, PART_OF_GPU = 2**31, 4
# Logits that a batch may hold.
CELLS_ON_CPU, CELLS_ON_GPU = 2**26, 2**28


class Task(NamedTuple):
    """A completion to be written: of which prompt, with which seed."""

    prompt: int
    seed: int


@dataclass(frozen=True, eq=False)
class HfSampler:
    """Writes completions with a causal language model of transformers.

    A prompt is read once, and its keys and values are shared by all its completions. Each completion depends on the
    model, the prompt and its seed alone, not on how many or which others are written: the numbers that it is drawn with
    come from its seed. In batches of other sizes a model may round differently, by its last bits: in float32
    hardly a token changes by that, in 16 bits one does now and then. With one prompt at a time (the default on CPUs)
    the same prompt and seeds give the same bits, whatever the other prompts.

    With the first batch, and with the first padded one, some completions are read again, each alone and without a
    cache; if that gives other probabilities, prompts are no longer shared or padded, or read behind a cache, and a
    warning says so. A model that is no causal language model is refused before its first batch.
    """

    model: Any
    tokenizer: Any
    decoding: Decoding
    text: Text = field(default_factory=Text)
    prompts_at_once: int | None = None
    """Most prompts in a batch, padded on the left; None: one on a CPU, on a GPU as many as there is room for."""
    batch_tokens: int | None = None
    """Most tokens of a batch, prompts and completions; None: what a part of the memory holds."""
    share_prefill: bool = True
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.prompts_at_once is not None and self.prompts_at_once < 1:
            raise ValueError(f"HfSampler needs prompts_at_once >= 1, got prompts_at_once={self.prompts_at_once}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"HfSampler needs batch_tokens >= 1, got batch_tokens={self.batch_tokens}")
        _ = self._policy  # refuses a model that cannot write

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """For each prompt a rollout for each of its seeds."""
        if len(prompts) != len(seeds):
            raise ValueError(f"each prompt needs its seeds, got {len(prompts)} prompts and seeds for {len(seeds)}")
        rows = self._policy.check(prompts)
        tasks = [Task(prompt, seed) for prompt, own in enumerate(seeds) for seed in own]
        drafts: list[Draft | None] = [None] * len(tasks)
        with (
            for_scoring(self._model, lock_of(self.model)),
            _progress(len(tasks), self.show_progress) as bar,
        ):
            for batch in self._batches(rows, tasks):
                try:
                    written = self._written(rows, [tasks[i] for i in batch])
                except FloatingPointError as error:
                    first = start_of(prompts[tasks[batch[0]].prompt])
                    raise FloatingPointError(f"{error}; the first prompt of the batch is {first}") from error
                for i, draft in zip(batch, written, strict=True):
                    drafts[i] = draft
                bar.update(len(batch))
        rollouts = iter(self._policy.endings.rollouts([draft for draft in drafts if draft is not None]))
        return [[next(rollouts) for _ in own] for own in seeds]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError for a prompt without tokens, or too long for the model with its completion."""
        self._policy.check(prompts)

    def rendered(self, prompt: Prompt) -> str:
        """The text that the model reads."""
        return self._policy.rendered(prompt)

    def fingerprint(self) -> dict[str, Any]:
        """What the completions depend on, but for the seeds."""
        return {"kind": "hf sampler", **self._policy.fingerprint()}

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "HfSampler holds a model in memory and is not pickled with its weights; save the model and use "
            "load_sampler(name_or_path, ...), which pickles as how to load it"
        )

    def _batches(self, rows: Sequence[list[int]], tasks: Sequence[Task]) -> Iterator[list[int]]:
        """Which tasks go together: the budget, which may shrink, and the number of prompts are what bounds them."""
        order = list(range(len(tasks)))
        if self._most_prompts > 1:
            order.sort(key=lambda i: (-len(rows[tasks[i].prompt]), tasks[i].prompt))
        start = 0
        while start < len(order):
            longest = len(rows[tasks[order[start]].prompt])
            fit = min(self._most_tokens // (longest + self.decoding.max_tokens), self._most_rows)
            first = order[start : start + max(1, fit)]
            # What the forward of the prompts holds is bounded too.
            most = min(self._most_prompts, max(1, default_budget(self._model) // longest))
            together = set(_distinct(tasks[i].prompt for i in first)[:most])
            batch = [i for i in first if tasks[i].prompt in together]
            yield batch
            start += len(batch)

    def _written(self, rows: Sequence[list[int]], tasks: Sequence[Task]) -> list[Draft]:
        """The drafts of a batch: in halves if memory does not suffice, prompt by prompt if padding disturbs."""
        costs = [len(rows[task.prompt]) + self.decoding.max_tokens for task in tasks]
        if len(set(costs)) > 1 and not (self._route.pads and self._reader.pads):
            alone = [[task for task in tasks if task.prompt == at] for at in _distinct(task.prompt for task in tasks)]
            return [draft for own in alone for draft in self._written(rows, own)]
        prompts, of = _apart(tasks)
        read = [rows[prompt] for prompt in prompts]
        everyone = list(range(len(tasks)))
        try:
            drafts = self._budget.run(lambda at: self._write(rows, [tasks[i] for i in at]), everyone, costs)
        except FloatingPointError:
            # Padding or sharing may be why: an error once there is neither.
            self._route.judged(nan, self._reader, len(set(costs)) > 1)
            return self._written(rows, tasks)
        except UnreadError as error:
            if not self._route.fall_back(self._model, f"fails ({error.__cause__})", len(set(costs)) > 1):
                raise
            return self._written(rows, tasks)
        if self._route.agrees(self._reader, read, of, [draft.ids for draft in drafts]):
            return drafts
        return self._written(rows, tasks)

    def _write(self, rows: Sequence[list[int]], tasks: Sequence[Task]) -> list[Draft]:
        prompts, of = _apart(tasks)
        writer = Writer(self._reader, processors(self.decoding), self._policy.endings, self.decoding.max_tokens)
        return writer([rows[prompt] for prompt in prompts], of, [task.seed for task in tasks])

    @property
    def _model(self) -> Any:
        return unwrapped(self.model)

    @cached_property
    def _policy(self) -> Policy:
        return Policy(self.model, self.tokenizer, self.decoding, self.text)

    def try_out(self) -> None:
        """Read a few made-up tokens: ValueError for a model that cannot be read, or is not causal."""
        with for_scoring(self._model, lock_of(self.model)):
            _ = self._route

    @cached_property
    def _route(self) -> Route:
        check_causal(self._model)
        return Route(self.share_prefill)

    @property
    def _reader(self) -> Reader:
        return Reader(self._model, self._route.shares, self._route.caches)

    @property
    def _most_prompts(self) -> int:
        if not self._route.pads or not self._reader.pads:
            return 1
        if self.prompts_at_once is not None:
            return self.prompts_at_once
        return 1 if device_of(self._model).type == "cpu" else 2**30

    @cached_property
    def _budget(self) -> Budget:
        return Budget(self.batch_tokens or self._room)

    @property
    def _most_tokens(self) -> int:
        """Tokens of a batch: without a cache, all of them go through the model at once."""
        return self._budget.tokens if self._route.caches else min(self._budget.tokens, default_budget(self._model))

    @property
    def _room(self) -> int:
        """How many tokens' keys and values there is memory for."""
        device = device_of(self._model)
        gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory // PART_OF_GPU if gpu else ON_CPU
        cache = Reader(self._model).open([[0, 0]], [0]).cache
        if cache is None:
            logger.info("%s returns no cache: each token takes a reading of the whole row", type(self._model).__name__)
        return int(max(1, memory // max(1, bytes_of(cache) // 2)))

    @property
    def _most_rows(self) -> int:
        cells = CELLS_ON_CPU if device_of(self._model).type == "cpu" else CELLS_ON_GPU
        return max(1, cells // vocabulary(self._model))


def _apart(tasks: Sequence[Task]) -> tuple[list[int], list[int]]:
    """The distinct prompts of some tasks, and which of these each task has."""
    prompts = _distinct(task.prompt for task in tasks)
    place = {prompt: at for at, prompt in enumerate(prompts)}
    return prompts, [place[task.prompt] for task in tasks]


def _distinct(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))


def _progress(total: int, shown: bool) -> "tqdm[Any]":
    hidden = None if shown else True
    return tqdm(total=total, desc="sampling", unit=" completions", delay=PATIENCE, leave=False, disable=hidden)
