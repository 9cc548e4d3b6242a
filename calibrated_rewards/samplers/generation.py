"""A cache of keys and values for many rows: taken from one row or more, and with room for what is yet to come.

Rows of tokens in a causal language model: read once, then a token at a time, by the model's own forward.

Completions, token by token: read, draw, leave out who has ended, go on."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from calibrated_rewards.models.parts import device_of, reading_errors, rope_turn
from calibrated_rewards.samplers.drawing import HALVINGS, Drawn, draw, uniforms
from calibrated_rewards.samplers.policy import Draft, Endings

# Room for at least so many tokens more, and for this part of what is there, whenever there is no room left.
ROOM, PART = 32, 4


class Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a layer, in tensors that are longer than they: DynamicLayer copies all for each token."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, layer.is_initialized
        self._space: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the others, and return all."""
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        length = self.keys.shape[-2]
        needed = length + key_states.shape[-2]
        if self._space is None or self._space[0].shape[-2] < needed:
            size = needed + max(ROOM, needed // PART)
            self._space = (_longer(self.keys, size), _longer(self.values, size))
        for space, states in zip(self._space, (key_states, value_states), strict=True):
            space[..., length:needed, :] = states
        self.keys, self.values = self._space[0][..., :needed, :], self._space[1][..., :needed, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Some of the rows, in the order given, in tensors of their own."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._space = None


def roomy(cache: Any) -> Any:
    """The cache, with room in the layers that keep all keys and values; others (windows, states) stay as they are."""
    if layers := layers_of(cache):
        layers[:] = [Roomy(layer) if _holds_all(layer) else layer for layer in layers]
    return cache


def layers_of(cache: Any) -> list[Any]:
    """The layers of a decoder's cache; none of what is no cache."""
    if isinstance(cache, EncoderDecoderCache):  # BERT and its kin as decoders: nothing is kept of an encoder
        cache = cache.self_attention_cache
    return cache.layers if isinstance(cache, Cache) else []


def _holds_all(layer: Any) -> bool:
    """Whether it keeps all keys and values; MiniMax has layers of that class which stay empty."""
    return type(layer) is DynamicLayer and layer.is_initialized


def is_roomy(cache: Any) -> bool:
    """Whether every layer keeps all keys and values."""
    layers = layers_of(cache)
    return bool(layers) and all(type(layer) is Roomy for layer in layers)


def choose(cache: Cache, rows: Tensor) -> None:
    """Keep these rows of the cache, in this order; a row may be there many times."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def bytes_of(cache: Any) -> int:
    """How much memory the keys and values take; 0 where that cannot be said."""
    layers = layers_of(cache)
    kept = [tensor for layer in layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept if isinstance(tensor, torch.Tensor))


def _longer(tensor: Tensor, size: int) -> Tensor:
    space = tensor.new_empty((*tensor.shape[:-2], size, tensor.shape[-1]))
    space[..., : tensor.shape[-2], :] = tensor
    return space


# What models call the cache that they take and return; recurrent ones have names of their own.
CACHES = ("past_key_values", "cache_params", "state")


class Rows(NamedTuple):
    """Rows that were read: their tokens, padded on the left, what the model keeps of them, and what it says next."""

    ids: Tensor
    mask: Tensor | None
    """None without padding: attention is faster then."""
    cache: Any
    logits: Tensor


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads rows through the model's own forward, which knows its scales and caps, in the model's precision."""

    model: Any
    share: bool = True
    """Read each prompt once, for all the rows that go on from it."""
    caches: bool = True
    """Keep what the model returns as its cache; if not, or if it returns none, each token takes a whole reading."""

    def open(self, prompts: Sequence[list[int]], of: Sequence[int]) -> Rows:
        """Rows that begin with a prompt each: row i with prompts[of[i]]."""
        # A shared prompt is read once; if not shared, each row reads its own.
        read = list(prompts) if self.share else [prompts[i] for i in of]
        ids, mask = left_padded(read, device_of(self.model))
        rows = self._forward(Rows(ids, mask, None, ids), ids)
        if self.share and list(of) != list(range(len(prompts))):
            if not self.parts(rows):
                return replace(self, share=False).open(prompts, of)
            rows = self.choose(rows, of)
        return rows._replace(cache=roomy(rows.cache))

    def next(self, rows: Rows, tokens: Tensor) -> Rows:
        """The rows with a token more each."""
        ids = torch.cat([rows.ids, tokens[:, None]], 1)
        if ids.shape[1] - 1 == self._turn:
            # From here on all angles are others, and so are all keys.
            return self.open(ids.tolist(), range(len(ids)))
        mask = None if rows.mask is None else torch.cat([rows.mask, rows.mask.new_ones(len(ids), 1)], 1)
        return self._forward(rows._replace(ids=ids, mask=mask), tokens[:, None])

    def choose(self, rows: Rows, at: Sequence[int]) -> Rows:
        """Some of the rows; one may be there many times."""
        index = torch.tensor(list(at), device=rows.ids.device)
        if rows.cache is not None:
            choose(rows.cache, index)
        mask = None if rows.mask is None else rows.mask[index]
        return Rows(rows.ids[index], mask, rows.cache, rows.logits[index.to(rows.logits.device)])

    def parts(self, rows: Rows) -> bool:
        """Whether some of the rows can go on without the others; not where sharing, which is the same, went wrong."""
        # A model's own cache class may keep more than reorder_cache moves, as MiniMax's does.
        return self.share and (rows.cache is None or type(rows.cache) in (DynamicCache, EncoderDecoderCache))

    @property
    def pads(self) -> bool:
        """Whether prompts of several lengths may be read together."""
        return self._turn is None

    def _forward(self, rows: Rows, ids: Tensor) -> Rows:
        """Read `ids`, which are the last of the rows, behind the rows' cache; without one, read the rows whole."""
        ids = rows.ids if rows.cache is None else ids
        options: dict[str, Any] = {"use_cache": self.caches}
        if rows.cache is not None:
            options[self._cache_name] = rows.cache
            if rows.mask is None and self._groups(rows.cache):
                seen = rows.cache.get_seq_length() + ids.shape[1]
                options["attention_mask"] = ids.new_ones(1, 1, 1, seen, dtype=torch.bool)
        if rows.mask is not None:
            options["attention_mask"] = rows.mask
            if "position_ids" in self._parameters:
                options["position_ids"] = (rows.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        with contiguous_input(self.model), reading_errors(self.model, rows.ids.shape[1]):
            answer = self.model(input_ids=ids, **options)
        return rows._replace(cache=self._cache_in(answer), logits=answer.logits[:, -1])

    def _cache_in(self, answer: Any) -> Any:
        """What the model returns to be read behind; None where it returns nothing, or should not."""
        return answer.get(self._cache_name) if self.caches else None

    def _groups(self, cache: Any) -> bool:
        """Whether a mask that masks nothing helps: with one, heads that share keys read them together.

        Without, torch's attention for 16 bits on CPUs takes several times as long for a single token.
        """
        config, part = self.model.config.get_text_config(), next(self.model.parameters())
        heads = getattr(config, "num_attention_heads", 1)
        grouped = getattr(config, "num_key_value_heads", heads) != heads and config._attn_implementation == "sdpa"
        slow = part.device.type == "cpu" and part.dtype in (torch.bfloat16, torch.float16)
        return self.share and grouped and slow and "position_ids" in self._parameters and is_roomy(cache)

    @cached_property
    def _parameters(self) -> set[str]:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return set(inspect.signature(inner.forward).parameters)

    @cached_property
    def _cache_name(self) -> str:
        return next((name for name in CACHES if name in self._parameters), CACHES[0])

    @cached_property
    def _turn(self) -> int | None:
        return rope_turn(self.model)


@contextmanager
def contiguous_input(model: Any) -> Iterator[None]:
    """While it runs, the output layer reads its input from one piece: on CPUs it is up to 1000 times slower if not."""
    layer = model.get_output_embeddings()
    hook = layer.register_forward_pre_hook(_in_one_piece) if layer is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids, and the mask of those that are not padding, if there is any.

    A row is padded with its own first token: a penalty on tokens that were there already sees no others.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return ids, None
    blank = torch.tensor([longest - len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) >= blank[:, None]).long()


def _in_one_piece(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


# Tokens for which a row's chances are made at a time.
AHEAD = 16
# Rows that have ended leave the batch when no more than this part goes on: taking the others out copies their cache.
CROWD = 0.75


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes completions of prompts; each depends on its prompt and its seed, not on those beside it."""

    reader: Reader
    processors: LogitsProcessorList
    endings: Endings
    max_tokens: int

    def __call__(self, prompts: Sequence[list[int]], of: Sequence[int], seeds: Sequence[int]) -> list[Draft]:
        """A draft for each seed: the i-th continues prompts[of[i]]."""
        drafts = [Draft() for _ in seeds]
        # The drafts that the rows of the batch are of, those that have ended but not left among them.
        members = list(range(len(drafts)))
        chances = np.empty((len(drafts), 0, HALVINGS))
        rows = self.reader.open(prompts, of)
        for written in range(self.max_tokens):
            if written % AHEAD == 0:
                chances = uniforms([seeds[i] for i in members], written, AHEAD)
            drawn = self._draw(rows, chances[:, written % AHEAD])
            self._note([drafts[i] for i in members], drawn)
            going = [at for at, i in enumerate(members) if drafts[i].end is None]
            if not going or written + 1 == self.max_tokens:
                break
            tokens = drawn.tokens
            if self.reader.parts(rows) and len(going) <= CROWD * len(members):
                members, chances = [members[at] for at in going], chances[going]
                rows, tokens = self.reader.choose(rows, going), tokens[torch.tensor(going, device=tokens.device)]
            rows = self.reader.next(rows, tokens.to(rows.ids.device))
        return drafts

    def _draw(self, rows: Rows, chances: Float64[np.ndarray, "rows halvings"]) -> Drawn:
        logits = rows.logits.float()
        scores = self.processors(rows.ids.to(logits.device), logits)  # type: ignore[arg-type]
        return draw(scores, torch.from_numpy(chances))

    def _note(self, drafts: Sequence[Draft], drawn: Drawn) -> None:
        """Write down the tokens of the drafts that go on."""
        found = zip(drafts, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)
        going = [(draft, token, logprob) for draft, token, logprob in found if draft.end is None]
        for draft, token, logprob in going:
            draft.ids.append(token)
            draft.logprob += logprob
        self.endings.mark([draft for draft, _, _ in going])
