"""The Hugging Face sampler: K completions of a prompt that is read once, by any causal language model.

`HfSampler` batches and writes. A `Route` remembers which shortcuts (sharing, padding, a cache) give the model's own
log-probabilities: completions are read again, each alone and whole, the first time that one is taken.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan, nan
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from calibrated_rewards.models.batches import Budget
from calibrated_rewards.models.parts import (
    UnreadError,
    default_budget,
    device_of,
    dtype_of,
    for_scoring,
    lock_of,
    reading_errors,
    unwrap,
    vocabulary,
)
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt, start_of
from calibrated_rewards.samplers.drawing import ADVICE, processors
from calibrated_rewards.samplers.generation import Reader, bytes_of, contiguous_input
from calibrated_rewards.samplers.policy import Draft, Policy
from calibrated_rewards.samplers.protocol import PATIENCE, Decoding, Rollout, Seeds
from calibrated_rewards.samplers.turn_ends import ReadsTurnEnds, TurnEnds
from calibrated_rewards.samplers.writer import Writer

logger = logging.getLogger(__name__)

# Memory for keys and values by default: so much on a CPU, and this part of a GPU.
ON_CPU, PART_OF_GPU = 2**31, 4
# Logits that a batch may hold.
CELLS_ON_CPU, CELLS_ON_GPU = 2**26, 2**28
# Rows that are compared, and tokens of each.
CHECKED_ROWS, CHECKED_TOKENS = 4, 8
# Largest difference of log-probabilities, in nats a token: small models are within 5e-6. 16 bits round by the shape of
# a batch: on a 135M Llama in bfloat16 that is 0.02, and after another prompt 3.
AGREEMENT, AGREEMENT_16_BIT = 1e-3, 0.2


class Task(NamedTuple):
    """A completion to be written: the number of its prompt, and its seed."""

    prompt: int
    seed: int


@dataclass(frozen=True, eq=False)
class HfSampler:
    """Writes completions with a causal language model of transformers.

    A prompt is read once, and its keys and values are shared by all its completions. Each completion depends on the
    model, the prompt and its seed alone, not on the others that are written: its uniform numbers come from its seed. In
    batches of other sizes a model may round the last bits differently: in float32 hardly a token changes by that, in 16
    bits one does now and then. With one prompt at a time (the default on CPUs) the same prompt and seeds give the same
    bits, whatever the other prompts.

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
    """Most tokens of a batch, prompts and completions; None: as many as a part of the memory holds."""
    share_prefill: bool = True
    show_progress: bool = True
    scorer: ReadsTurnEnds | None = None
    """A scorer by a head on this very model (`PreferenceHeadScorer`): the pass that writes a completion reads the head
    as well, and the scorer, asked for the completion, has its score already. The completions are the same."""

    def __post_init__(self) -> None:
        if self.prompts_at_once is not None and self.prompts_at_once < 1:
            raise ValueError(f"HfSampler needs prompts_at_once >= 1, got prompts_at_once={self.prompts_at_once}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"HfSampler needs batch_tokens >= 1, got batch_tokens={self.batch_tokens}")
        _ = self._policy  # refuses a model that cannot write

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """Draw for each prompt a rollout for each of its seeds."""
        if len(prompts) != len(seeds):
            raise ValueError(f"each prompt needs its seeds, got {len(prompts)} prompts and seeds for {len(seeds)}")
        rows = self._policy.check(prompts)
        tasks = [Task(prompt, seed) for prompt, each in enumerate(seeds) for seed in each]
        drafts: list[Draft | None] = [None] * len(tasks)
        hidden = None if self.show_progress else True
        bar = tqdm(total=len(tasks), desc="sampling", unit=" completions", delay=PATIENCE, leave=False, disable=hidden)
        with for_scoring(self._model, lock_of(self.model)), bar:
            if self._turn_ends is not None:
                self._turn_ends.begin(prompts)
            for batch in self._batches(rows, tasks):
                try:
                    written = self._write(rows, [tasks[i] for i in batch])
                except FloatingPointError as error:
                    first = start_of(prompts[tasks[batch[0]].prompt])
                    raise FloatingPointError(f"{error}; the first prompt of the batch is {first}") from error
                if self._turn_ends is not None:
                    self._turn_ends.keep(written)
                for i, draft in zip(batch, written, strict=True):
                    drafts[i] = draft
                bar.update(len(batch))
        rollouts = iter(self._policy.endings.rollouts([draft for draft in drafts if draft is not None]))
        return [[next(rollouts) for _ in each] for each in seeds]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without tokens, or too long for the model with its completion: ValueError."""
        self._policy.check(prompts)

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the model reads."""
        return self._policy.rendered(prompt)

    def fingerprint(self) -> dict[str, Any]:
        """Describe all that the completions depend on, but for the seeds."""
        return {"kind": "hf sampler", **self._policy.fingerprint()}

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "HfSampler holds a model in memory and is not pickled with its weights; save the model and use "
            "load_sampler(name_or_path, ...), which pickles as how to load it"
        )

    def _batches(self, rows: Sequence[list[int]], tasks: Sequence[Task]) -> Iterator[list[int]]:
        """Group tasks within the budget, which may shrink, and the number of prompts at once."""
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
            prompts = set(_distinct(tasks[i].prompt for i in first)[:most])
            batch = [i for i in first if tasks[i].prompt in prompts]
            yield batch
            start += len(batch)

    def _write(self, rows: Sequence[list[int]], tasks: Sequence[Task]) -> list[Draft]:
        """Write a batch: in halves if memory does not suffice, prompt by prompt if padding disturbs."""
        costs = [len(rows[task.prompt]) + self.decoding.max_tokens for task in tasks]
        if len(set(costs)) > 1 and not (self._route.pads and self._reader.pads):
            alone = [[task for task in tasks if task.prompt == at] for at in _distinct(task.prompt for task in tasks)]
            return [draft for each in alone for draft in self._write(rows, each)]
        padded, every = len(set(costs)) > 1, list(range(len(tasks)))
        try:
            drafts = self._budget.run(lambda at: self._write_at_once(rows, [tasks[i] for i in at]), every, costs)
        except FloatingPointError:
            # Padding or sharing may be why: an error once there is neither.
            self._route.judge(nan, self._reader, padded)
            return self._write(rows, tasks)
        except UnreadError as error:
            if not self._route.fall_back(self._model, f"fails ({error.__cause__})", padded):
                raise
            return self._write(rows, tasks)
        prompts, of = _distinct_prompts(rows, tasks)
        if self._route.check(self._reader, prompts, of, [draft.ids for draft in drafts]):
            return drafts
        return self._write(rows, tasks)

    def _write_at_once(self, rows: Sequence[list[int]], tasks: Sequence[Task]) -> list[Draft]:
        endings, turns = self._policy.endings, None
        if self._turn_ends is not None:
            turns = self._turn_ends.make_turns(self.model, endings, [task.prompt for task in tasks])
        options = (processors(self.decoding), endings, self.decoding.max_tokens, turns, self._policy.limit)
        return Writer(self._reader, *options)(*_distinct_prompts(rows, tasks), [task.seed for task in tasks])

    @cached_property
    def _turn_ends(self) -> TurnEnds | None:
        return None if self.scorer is None else TurnEnds(self.scorer)

    @property
    def _model(self) -> Any:
        return unwrap(self.model)

    @cached_property
    def _policy(self) -> Policy:
        return Policy(self.model, self.tokenizer, self.decoding, self.text)

    def try_out(self) -> None:
        """Read a few made-up tokens; refuse a model that cannot be read, or is not causal."""
        with for_scoring(self._model, lock_of(self.model)):
            _ = self._route

    @cached_property
    def _route(self) -> "Route":
        check_causal(self._model)
        return Route(self.share_prefill)

    @property
    def _reader(self) -> Reader:
        layers = (-1,) if self.scorer is None else self.scorer.layers
        return Reader(self._model, self._route.shares, self._route.caches, layers)

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
        """Most tokens of a batch: without a cache, all of them go through the model at once."""
        return self._budget.tokens if self._route.caches else min(self._budget.tokens, default_budget(self._model))

    @property
    def _room(self) -> int:
        """The number of tokens whose keys and values there is memory for."""
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


def _distinct_prompts(rows: Sequence[list[int]], tasks: Sequence[Task]) -> tuple[list[list[int]], list[int]]:
    """List the distinct prompts of some tasks, as tokens, and the place of each task's among them."""
    numbers = _distinct(task.prompt for task in tasks)
    place = {number: at for at, number in enumerate(numbers)}
    return [rows[number] for number in numbers], [place[task.prompt] for task in tasks]


def _distinct(values: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(values))


@dataclass
class Route:
    """The way of rows through the model: shortcuts that agree with plain forwards, each compared once."""

    shares: bool
    pads: bool = True
    caches: bool = True
    """Each token is read behind a cache; without one, it takes a reading of the whole row."""
    checked: set[tuple[bool, bool]] = field(default_factory=set)
    """(sharing, padded) that were compared."""

    def check(
        self, reader: Reader, prompts: Sequence[list[int]], of: Sequence[int], completions: Sequence[list[int]]
    ) -> bool:
        """Compare completions, of which i follows prompts[of[i]]; False if they have to be written another way."""
        padded = len({*map(len, prompts)}) > 1
        way = (self.shares, padded)
        chosen = [] if way in self.checked else choose_rows(list(map(len, prompts)), of, list(map(len, completions)))
        if not chosen:
            return True
        # With all of the prompts, for their padding may disturb.
        gap = measure_gap(reader, prompts, [of[i] for i in chosen], [completions[i][:CHECKED_TOKENS] for i in chosen])
        self.checked.add(way)
        return self.judge(gap, reader, padded)

    def judge(self, gap: float, reader: Reader, padded: bool) -> bool:
        """Accept a gap, or give up a shortcut that may be its cause; raise if there is none."""
        if gap <= _largest_gap(reader.model):  # nan agrees with nothing
            return True
        if self.fall_back(reader.model, f"gives log-probabilities {gap:.1e} apart", padded):
            return False
        name = type(reader.model).__name__
        if isnan(gap):
            raise FloatingPointError(
                f"the policy gives nan or no probabilities, {name} in {dtype_of(reader.model)}: {ADVICE}"
            )
        raise ValueError(_not_causal(name, gap))

    def fall_back(self, model: Any, trouble: str, padded: bool) -> bool:
        """Give up padding, then sharing, then the cache, and log it; False if nothing is left to give up."""
        name = type(model).__name__
        if padded:
            logger.warning("%s %s in a padded batch: not padding", name, trouble)
            self.pads = False
        elif self.shares:
            logger.warning("%s %s behind a shared prompt: not sharing", name, trouble)
            self.shares = False
        elif self.caches:
            logger.warning("%s %s behind its cache: reading whole rows for each token, which is slow", name, trouble)
            self.caches = False
            self.checked.clear()
        else:
            return False
        return True


def choose_rows(prompts: Sequence[int], of: Sequence[int], completions: Sequence[int]) -> list[int]:
    """Choose completions to compare, by the lengths of prompts and of completions: long ones.

    Where prompts are padded, one of the longest prompt, which they are padded to, and two that are padded. None where
    there are no such completions of two tokens: one token shows nothing of what follows a token.

    >>> choose_rows([9, 9, 5, 7], [0, 0, 0, 0, 1, 1, 2, 2, 3], [4, 4, 4, 4, 4, 3, 4, 4, 4])
    [0, 6, 7, 1]
    >>> choose_rows([9, 5], [0, 0, 1], [4, 4, 1])
    []
    """
    longest = sorted((i for i in range(len(of)) if completions[i] > 1), key=lambda i: -completions[i])
    whole = [i for i in longest if prompts[of[i]] == max(prompts)]
    padded = [i for i in longest if prompts[of[i]] < max(prompts)]
    if len({*prompts}) > 1 and not (whole and padded):
        return []
    padded.sort(key=lambda i: (-min(completions[i], CHECKED_TOKENS), prompts[of[i]]))
    return list(dict.fromkeys([*whole[:1], *padded[:2], *longest]))[:CHECKED_ROWS]


def check_causal(model: Any) -> None:
    """Read a few made-up tokens; refuse a model that needs more than token ids, or is no causal language model."""
    few = min(32, vocabulary(model))
    ids = [i % few for i in range(3, 10)]
    gap = measure_gap(Reader(model, share=False, caches=False), [ids[:4]], [0], [ids[4:]])
    if gap > _largest_gap(model):  # nan is for the first batch, which names its prompt
        raise ValueError(_not_causal(type(model).__name__, gap))


def _not_causal(name: str, gap: float) -> str:
    return (
        "a policy is a causal language model, whose probabilities depend on the tokens before and on nothing else; "
        f"those of {name} are {gap:.1e} nats a token apart when the same tokens are read one by one and as a whole: "
        "it reads in both directions, or draws random numbers. Give a model that was trained to continue text, or "
        "sample with a callable of yours that runs its generate"
    )


def _largest_gap(model: Any) -> float:
    # GPUs may be told to multiply float32 as if it had fewer bits.
    exact = torch.get_float32_matmul_precision() == "highest" and dtype_of(model) in (torch.float32, torch.float64)
    return AGREEMENT if exact else AGREEMENT_16_BIT


def measure_gap(
    reader: Reader, prompts: Sequence[list[int]], of: Sequence[int], completions: Sequence[list[int]]
) -> float:
    """Average the difference in nats a token between rows read as the reader does and each row read alone and whole.

    Completion i follows prompts[of[i]]; halfway, half of the rows leave.
    """
    length = min(map(len, completions))
    tokens = torch.tensor([ids[:length] for ids in completions], device=device_of(reader.model))
    plain = [_plain(reader, prompts[at], ids[:length]) for at, ids in zip(of, completions, strict=True)]
    rows, members, gaps = reader.open(prompts, of), list(range(len(completions))), []
    for step in range(length):
        fed = tokens[members, step]
        logprobs = _pick(rows.logits, fed)
        gaps += [abs(float(logprobs[at]) - float(plain[i][step])) for at, i in enumerate(members)]
        if reader.can_select(rows) and step == length // 2 and len(members) > 1:
            keep = list(range(0, len(members), 2))
            rows, fed, members = reader.select(rows, keep), fed[keep], members[::2]
        if step + 1 < length:
            rows = reader.next(rows, fed[:, None])
    return sum(gaps) / len(gaps)


def _plain(reader: Reader, prompt: list[int], completion: list[int]) -> Tensor:
    """Compute the log-probability of each token of a completion by forwards without a cache."""
    if not reader.pads:  # the reading of a token depends on the length of the whole
        parts = range(len(completion))
        return torch.cat([_forward(reader, prompt + completion[:i], completion[i : i + 1]) for i in parts])
    return _forward(reader, prompt, completion)


def _forward(reader: Reader, prompt: list[int], completion: list[int]) -> Tensor:
    ids = torch.tensor([prompt + completion], device=device_of(reader.model))
    with contiguous_input(reader.model), reading_errors(reader.model, ids.shape[1] - 1):
        # The last token is not read: the token that follows it does not matter.
        logits = reader.model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    return _pick(logits, ids[0, len(prompt) :])


def _pick(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, tokens.to(logits.device)[:, None])[:, 0]
