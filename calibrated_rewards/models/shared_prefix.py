"""Read a decoder at chosen tokens, its head in float32; rows that begin alike share the KV cache of their prefix.

`ModelReader` is a scorer's access to its model: it encodes pairs, and reads them by a `Decoder` or the model's own
forward. `find_completion_starts` and `cut` say where a completion's tokens are, in whole and in truncated inputs.
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
from calibrated_rewards.models.own_forward import Fewest, HeadPrecision, OwnForward
from calibrated_rewards.models.parts import (
    RAISED,
    UnreadError,
    body_of,
    check_vocabulary,
    default_budget,
    device_of,
    for_scoring,
    in_float32,
    lock_of,
    pad_right,
    positions_of,
    reading_errors,
    rope_turn,
    vocabulary,
)
from calibrated_rewards.models.text import Text, truncate
from calibrated_rewards.models.unchanged import StateKeeper
from calibrated_rewards.prompts import Completion, Prompt, prompt_key

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
        members_of: dict[Hashable, list[int]] = {}
        for i, key in enumerate(groups):
            members_of.setdefault(key, []).append(i)
        with for_scoring(self.model, self.lock), progress_bar(len(rows), self.show_progress) as bar:
            for members in members_of.values():
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


@dataclass(frozen=True, eq=False)
class ModelReader:
    """Access to a model: encodes pairs, and makes readers of the parts that the model has now, anew for each call."""

    model: Any
    tokenizer: Any
    text: Text
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; None: by the device."""
    share_prefixes: bool = True
    show_progress: bool = True
    padding: Padding = field(default_factory=Padding)
    """Permission to pad rows, with what was compared for it."""
    state: StateKeeper = field(default_factory=StateKeeper)
    """The keeper that puts back what a forward changes in the model."""
    fewest: Fewest = field(default_factory=Fewest)
    precision: HeadPrecision = field(default_factory=HeadPrecision)

    @property
    def lock(self) -> Any:
        """The model's lock, which all share that score with it; fast tokenizers do not bear two threads either."""
        return lock_of(self.model)

    @property
    def pad(self) -> int | None:
        """The model's padding id; None if it has none, or one (such as -1) that no input can hold."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if pad is not None and 0 <= pad < vocabulary(self.model) else None

    @cached_property
    def limit(self) -> int:
        """The number of tokens above which an input is truncated."""
        return self.text.limit(self.tokenizer, positions_of(self.model))

    @property
    def reward_token(self) -> int | None:
        """The token at which the score is read, where the config names one (InternLM2's reward models)."""
        token = getattr(self.model.config, "reward_token_id", None)
        return token if isinstance(token, int) and 0 <= token < vocabulary(self.model) else None

    def encode(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Encode each pair, truncated to the limit; it ends in the reward token, where the model has one."""
        end = self.reward_token
        room = self.limit - (end is not None)
        with self.lock:  # fast tokenizers do not bear two threads
            rows = self.text.encode(self.tokenizer, prompts, completions, room)
        # A template may have written it; any other last token would be read in its place, without a word.
        return rows if end is None else [row if row[-1] == end else [*row, end] for row in rows]

    def text_fingerprint(self) -> dict[str, Any]:
        """Describe all that the token ids depend on, but for the tokenizer."""
        end = {} if self.reward_token is None else {"reward_token_id": self.reward_token}
        return {**self.text.fingerprint(self.tokenizer), "max_length": self.limit, **end}

    @cached_property
    def budget(self) -> Budget:
        """The tokens of a batch, which stay fewer once memory did not suffice."""
        return Budget(self.batch_tokens or default_budget(self.model))

    @cached_property
    def sharing(self) -> Sharing:
        """Permission to share prefixes, with what was compared for it."""
        return Sharing(self.share_prefixes)

    def decoder(self, head: Head) -> Decoder:
        """Make a reader with this head behind the model's body."""
        options = {"state": self.state, "show_progress": self.show_progress, "lock": self.lock}
        return Decoder(self.model, body_of(self.model), head, self.budget, self.sharing, self.padding, **options)

    def read_last(self, head: Head, rows: Sequence[list[int]], groups: Sequence[Hashable]) -> Tensor:
        """Read each row at its last token, `(rows, numbers)`; rows of one group share their prefix."""
        return torch.cat(self.decoder(head)([Row(row, [len(row) - 1]) for row in rows], groups))

    def own_forward(self, pad: int | None, **options: Any) -> OwnForward:
        """Make a reader through the model's own forward; without an id to pad with, it reads one by one."""
        shared = {"padding": self.padding, "fewest": self.fewest, "state": self.state, "lock": self.lock}
        options = {"show_progress": self.show_progress, **shared, **options}
        return OwnForward(self.model, pad or 0, self.budget, one_by_one=pad is None, **options)


def reader_of(scorer: Any) -> ModelReader:
    """Build the reader of a scorer's model, of the settings that the kinds of scorers have in common."""
    options = (scorer.batch_tokens, getattr(scorer, "share_prefixes", False), scorer.show_progress)
    return ModelReader(scorer.model, scorer.tokenizer, scorer.text, *options)


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
