"""Read a decoder at chosen tokens, its head in float32; rows that begin alike share the KV cache of their prefix.

`find_completion_starts` and `cut` say where a completion's tokens are, in a whole input and in a truncated one.
"""

import copy
import inspect
import logging
import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from calibrated_rewards.models.batches import (
    Budget,
    Padding,
    Rounding,
    moved_by_rounding,
    progress_bar,
    read_in_batches,
    stack_means,
)
from calibrated_rewards.models.parts import (
    RAISED,
    UnreadError,
    check_vocabulary,
    device_of,
    for_scoring,
    in_float32,
    pad_right,
    reading_errors,
    rope_turn,
)
from calibrated_rewards.models.text import Text, truncate
from calibrated_rewards.models.unchanged import StateKeeper
from calibrated_rewards.prompts import Prompt, prompt_key

logger = logging.getLogger(__name__)

# Sharing costs a forward of its own for the prefix: below this share of tokens saved it is not worth it.
WORTHWHILE = 0.15
# Rows of a group that are read both ways.
CHECKED_ROWS = 4
# They are again where a prompt or a row is so many times longer than all that were, or a completion shorter.
FARTHER = 2


class Row(NamedTuple):
    """An input's tokens, and the positions at which the head reads."""

    ids: list[int]
    read: list[int]


@runtime_checkable
class Head(Protocol):
    """A function from hidden states, in float32, and the token that follows each (-1: none) to numbers."""

    def __call__(self, hidden: Tensor, following: Tensor, /) -> Tensor:
        """Map (n, hidden size) and (n) to (n, numbers)."""


@dataclass(frozen=True)
class ModuleHead:
    """A head that is a module and does not mind what follows."""

    module: nn.Module

    def __call__(self, hidden: Tensor, following: Tensor, /) -> Tensor:
        """Run the module in float32, with the weights that it has now."""
        return in_float32(self.module)(hidden)  # type: ignore[no-any-return]


@dataclass
class Sharing:
    """Permission to share prefixes, found by comparing the first group, and longer ones, with rows alone."""

    allowed: bool = True
    checked: bool = False
    prefix: int = field(default=0, compare=False)
    """The longest prefix of a group that was compared."""
    longest: int = field(default=0, compare=False)
    """The longest row."""
    shortest: float = field(default=math.inf, compare=False)
    """The shortest rest of a row behind its prefix."""
    # Completions of one prompt may be nearly the same: in 16 bits their spread is no measure of how far is too far.
    rounding: Rounding = field(default_factory=lambda: Rounding(farthest=math.inf), compare=False)

    def due(self, rows: Sequence[Row], shared: int) -> bool:
        """Tell if a group is unlike all that were compared."""
        lengths = [len(row.ids) for row in rows]
        farther = (shared > FARTHER * self.prefix, max(lengths) > FARTHER * self.longest)
        return not self.checked or any(farther) or FARTHER * (min(lengths) - shared) < self.shortest

    def add(self, rows: Sequence[Row], shared: int) -> None:
        """Note that a group was compared."""
        lengths = [len(row.ids) for row in rows]
        self.checked = True
        self.prefix, self.longest = max(self.prefix, shared), max(self.longest, *lengths)
        self.shortest = min(self.shortest, min(lengths) - shared)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A reader of rows of tokens through body and head; `groups` say which rows may begin alike."""

    model: nn.Module
    """The whole model, which has the embeddings and is put into evaluation mode."""
    body: nn.Module
    head: Head
    budget: Budget
    sharing: Sharing = field(default_factory=Sharing)
    padding: Padding = field(default_factory=Padding)
    state: StateKeeper = field(default_factory=StateKeeper)
    show_progress: bool = True
    lock: Any = field(default_factory=threading.RLock)

    def __call__(self, rows: Sequence[Row], groups: Sequence[Hashable]) -> list[Tensor]:
        """Read each row at its positions: float32 on the CPU, (positions, numbers)."""
        check_vocabulary([row.ids for row in rows], self.model)
        numbers: dict[int, Tensor] = {}
        alone: list[int] = []
        with for_scoring(self.model, self.lock), progress_bar(len(rows), self.show_progress) as bar:
            for members in _group(groups):
                group = [rows[i] for i in members]
                shared = self._prefix(group)
                if shared and self._agrees(group, shared):
                    numbers |= zip(members, self._read_behind_prefix(group, shared, bar), strict=True)
                else:
                    alone += members
            rest = [rows[i] for i in alone]
            costs = [len(row.ids) for row in rest]
            kinds, forward = list(map(self._turned, costs)), partial(self._forward_at, rows=rest)
            answers = read_in_batches(self.model, forward, costs, kinds, self.budget, self.padding, bar)
            numbers |= zip(alone, answers, strict=True)
        return [numbers[i] for i in range(len(rows))]

    def _read_behind_prefix(self, rows: Sequence[Row], shared: int, bar: Any = None) -> list[Tensor]:
        """Read rows whose first `shared` tokens are the same: those are read once."""
        prefix = torch.tensor([rows[0].ids[:shared]], device=device_of(self.model))
        options = {"use_cache": True, **self._positions(0, prefix)}
        with reading_errors(self.body, shared):
            cache = self.state.run(self.body, lambda: self.body(input_ids=prefix, **options)).past_key_values
        rest = [Row(row.ids[shared:], [at - shared for at in row.read]) for row in rows]
        forward = partial(self._forward_at, rows=rest, cache=cache)
        numbers: dict[int, Tensor] = {}
        # A row holds its suffix and, in the cache, the prefix.
        costs = [len(row.ids) for row in rows]
        for batch in self.budget.batches(costs):
            numbers |= zip(batch, self.budget.run(forward, batch, costs), strict=True)
            if bar is not None:
                bar.update(len(batch))
        return [numbers[i] for i in range(len(rows))]

    def _forward_at(self, at: list[int], rows: Sequence[Row], cache: Cache | None = None) -> list[Tensor]:
        return self._forward([rows[i] for i in at], cache)

    def _forward(self, rows: list[Row], cache: Cache | None = None) -> list[Tensor]:
        """Read one batch, right-padded; behind a cached prefix where there is one."""
        ids, mask = pad_right([row.ids for row in rows], 0, device_of(self.model))
        past = cache.get_seq_length() if cache is not None else 0
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            mask = torch.cat([mask.new_ones(len(rows), past), mask], 1)
            options = {"past_key_values": repeated(cache, len(rows)), "use_cache": True}
        options |= self._positions(past, ids)
        with reading_errors(self.body, past + ids.shape[1]):
            answer = self.state.run(self.body, lambda: self.body(input_ids=ids, attention_mask=mask, **options))
        states = answer.last_hidden_state
        at = torch.tensor([(i, j) for i, row in enumerate(rows) for j in row.read], dtype=torch.long).reshape(-1, 2)
        at = at.to(states.device)
        following = [row.ids[j + 1] if j + 1 < len(row.ids) else -1 for row in rows for j in row.read]
        hidden = states[at[:, 0], at[:, 1]].float()
        numbers = self.head(hidden, torch.tensor(following, device=states.device)).float().cpu()
        return list(torch.split(numbers, [len(row.read) for row in rows]))

    def _positions(self, past: int, ids: Tensor) -> dict[str, Tensor]:
        if not self._takes_positions:
            return {}
        return {"position_ids": torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)}

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.body.forward).parameters

    @cached_property
    def _turn(self) -> int | None:
        return rope_turn(self.model)

    def _turned(self, length: int) -> bool:
        """Tell if an input is so long that LongRoPE has other angles: not to be mixed in a batch or behind a prefix."""
        return self._turn is not None and length > self._turn

    def _prefix(self, rows: list[Row]) -> int:
        """Count the first tokens to share; 0 where that saves too little, or cannot be."""
        if len(rows) < 2 or not self.sharing.allowed or not self.padding.allowed:
            return 0
        shared = min(common_prefix([row.ids for row in rows]), *(min(row.read) for row in rows))
        if self._turned(max(len(row.ids) for row in rows)) != self._turned(shared):
            return 0
        saved = shared * (len(rows) - 1)
        return shared if saved >= WORTHWHILE * sum(len(row.ids) for row in rows) else 0

    def _agrees(self, rows: list[Row], shared: int) -> bool:
        """Tell if sharing gives what rows alone give, by the first group and by those that are unlike it."""
        if self.sharing.due(rows, shared):
            order = sorted(rows, key=lambda row: len(row.ids))
            some = [order[i * (len(rows) - 1) // (CHECKED_ROWS - 1)] for i in range(CHECKED_ROWS)]
            self.sharing.allowed = self._compare(some if len(rows) > CHECKED_ROWS else order, shared)
            self.sharing.add(rows, shared)
        return self.sharing.allowed

    def _compare(self, rows: list[Row], shared: int) -> bool:
        """Read rows behind their shared prefix and alone; tell if the numbers are the same."""
        name = type(self.body).__name__
        if "past_key_values" not in inspect.signature(self.body.forward).parameters:
            return False
        if not repeatable(self._cache(rows[0].ids[:1])):
            logger.info("%s keeps a cache that cannot be shared: prompts are read anew for each completion", name)
            return False
        alone = self._alone(rows)
        try:
            sharing = stack_means(self._read_behind_prefix(rows, shared))
        except UnreadError as error:
            logger.warning("%s fails behind a shared prefix: not sharing; %s", name, error)
            return False
        excess = self.sharing.rounding.excess(sharing, alone, lambda: (alone, self._moved(rows)), self.model)
        if not excess <= 1:
            logger.warning(
                "%s gives other numbers behind a shared prefix, %.1e apart, than for whole rows: not sharing",
                name, float((sharing - alone).abs().max()),
            )  # fmt: skip
        return excess <= 1

    def _alone(self, rows: list[Row]) -> Tensor:
        return stack_means([self._forward([row])[0] for row in rows])

    def _moved(self, rows: list[Row]) -> Tensor:
        with moved_by_rounding(self.model):
            return self._alone(rows)

    def _cache(self, ids: list[int]) -> object:
        try:
            row = torch.tensor([ids], device=device_of(self.model))
            return self.state.run(self.body, lambda: self.body(input_ids=row, use_cache=True)).past_key_values
        except RAISED:  # recurrent models have other caches, or none
            return None


def group_of(prompt: Prompt) -> Hashable:
    """Return the key that equal prompts have in common."""
    return prompt if isinstance(prompt, str) else prompt_key(prompt)


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Count the first tokens that all rows share.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]])
    2
    """
    # The first and the last in order differ where any two do.
    low, high = min(rows), max(rows)
    return next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def repeatable(cache: object) -> bool:
    """Tell if a cache is keys and values alone, layer by layer; recurrent states cannot be viewed as many."""
    # MiniMax's own class keeps its states beside the layers.
    return type(cache) is DynamicCache and {*map(type, cache.layers)} <= {DynamicLayer, DynamicSlidingWindowLayer}


def repeated(cache: Cache, rows: int) -> Cache:
    """View one row's cache as that of many rows: no copy, and the original stays as it is."""
    many, layers = copy.copy(cache), [cast(DynamicLayer, copy.copy(layer)) for layer in cache.layers]
    many.layers = list(layers)
    for layer in layers:
        if layer.keys is not None and layer.values is not None:
            layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])
            layer.values = layer.values.expand(rows, *layer.values.shape[1:])
    return many


def _group(groups: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return list(members.values())


def find_completion_starts(
    text: Text, tokenizer: Any, prompts: Sequence[Prompt], rows: Sequence[list[int]]
) -> list[int]:
    """Count the tokens of each whole input before its completion: those that it shares with its prompt's opening.

    Where the tokenizer merges the prompt's end with the completion's beginning, the merged token is the completion's.
    """
    distinct = {group_of(prompt): prompt for prompt in prompts}
    openings = {key: text.opening(tokenizer, prompt) for key, prompt in distinct.items()}
    # An empty prompt may have no tokens at all, which is no input.
    openings = {key: opening for key, opening in openings.items() if opening[0]}
    ids = replace(text, append_eos=False).tokens(tokenizer, list(openings.values()))
    tokens = dict(zip(openings, ids, strict=True))
    pairs = zip(rows, map(group_of, prompts), strict=True)
    return [common_prefix([row, tokens.get(key, [])]) for row, key in pairs]


def cut(row: list[int], limit: int, tokenizer: Any) -> tuple[list[int], int]:
    """Truncate a row and count the tokens left out: what stood at p, if it is there, stands at p - out.

    >>> from types import SimpleNamespace
    >>> cut([0, 5, 6, 7, 8], 3, SimpleNamespace(bos_token_id=0, cls_token_id=None))
    ([0, 7, 8], 2)
    """
    read = truncate(row, limit, tokenizer)
    return read, len(row) - len(read)
