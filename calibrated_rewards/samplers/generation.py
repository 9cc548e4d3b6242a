"""Read rows of tokens through a model's own forward, behind a cache of their keys and values.

`Reader` opens rows, reads more tokens of each, selects some, and reads other tokens behind a part of them. `add_room`
gives the cache room for the tokens that are yet to come.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from calibrated_rewards.models.parts import body_of, device_of, pad_right, reading_errors, rope_turn

# A full cache gets room for at least so many tokens more, and for this part of its tokens.
ROOM, PART = 32, 4
# Names of the cache that models take and return; recurrent ones have names of their own.
CACHES = ("past_key_values", "cache_params", "state")


class Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values of a layer, in longer tensors: a DynamicLayer copies all of them for each token."""

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
            self._space = (_lengthen(self.keys, size), _lengthen(self.values, size))
        for space, states in zip(self._space, (key_states, value_states), strict=True):
            space[..., length:needed, :] = states
        self.keys, self.values = self._space[0][..., :needed, :], self._space[1][..., :needed, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, in the order given, into tensors of their own."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._space = None

    def take(self, rows: Tensor, length: int) -> "Roomy":
        """Copy the first tokens of some rows."""
        other = copy.copy(self)
        other.keys, other.values = self.keys[rows, :, :length], self.values[rows, :, :length]  # type: ignore[index]
        other._space = None
        return other


def _lengthen(tensor: Tensor, size: int) -> Tensor:
    space = tensor.new_empty((*tensor.shape[:-2], size, tensor.shape[-1]))
    space[..., : tensor.shape[-2], :] = tensor
    return space


def add_room(cache: Any) -> Any:
    """Give room to the layers that keep all keys and values; others (windows, states) stay as they are."""
    if layers := layers_of(cache):
        # MiniMax has layers of that class which stay empty.
        keep_all = [type(layer) is DynamicLayer and layer.is_initialized for layer in layers]
        layers[:] = [Roomy(layer) if keeps else layer for layer, keeps in zip(layers, keep_all, strict=True)]
    return cache


def layers_of(cache: Any) -> list[Any]:
    """The layers of a decoder's cache; none of anything else."""
    if isinstance(cache, EncoderDecoderCache):  # BERT and its kin as decoders: the part of an encoder is empty
        cache = cache.self_attention_cache
    return cache.layers if isinstance(cache, Cache) else []


def has_room(cache: Any) -> bool:
    """Check that every layer keeps all keys and values."""
    layers = layers_of(cache)
    return bool(layers) and all(type(layer) is Roomy for layer in layers)


def bytes_of(cache: Any) -> int:
    """Count the bytes of keys and values; 0 where the cache has none to count."""
    tensors = [getattr(layer, name, None) for layer in layers_of(cache) for name in ("keys", "values")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


class Rows(NamedTuple):
    """Rows that were read: their tokens, padded on the left, the model's cache, and the logits of the next token."""

    ids: Tensor
    mask: Tensor | None
    """None without padding: attention is faster then."""
    cache: Any
    logits: Tensor
    states: Tensor | None = None
    """The hidden states at the last tokens, (rows, tokens, layers x size), where they were asked for."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads rows through the model's own forward, with its scales and caps, in the model's precision."""

    model: Any
    share: bool = True
    """Read each prompt once, for all the rows that go on from it."""
    caches: bool = True
    """Use the cache that the model returns; if not, or if it returns none, each token takes a whole reading."""
    layers: tuple[int, ...] = (-1,)
    """The layers of which hidden states are returned where they are asked for, side by side."""

    def open(self, prompts: Sequence[list[int]], of: Sequence[int], states: int = 0) -> Rows:
        """Read prompts: row i begins with prompts[of[i]]."""
        # A shared prompt is read once; if not shared, each row reads its own.
        read = list(prompts) if self.share else [prompts[i] for i in of]
        ids, mask = left_padded(read, device_of(self.model))
        rows = self._forward(Rows(ids, mask, None, ids), ids, states)
        if self.share and list(of) != list(range(len(prompts))):
            if not self.can_select(rows):
                return replace(self, share=False).open(prompts, of, states)
            rows = self.select(rows, of)
        return rows._replace(cache=add_room(rows.cache))

    def next(self, rows: Rows, tokens: Tensor, states: int = 0, going_on: bool = True) -> Rows:
        """Read more tokens of each row, (rows, tokens); with the hidden states at so many of the last ones.

        Rows that do not go on need no logits: their body alone is run, where it takes what the model takes.
        """
        before, ids = rows.ids.shape[1], torch.cat([rows.ids, tokens], 1)
        if self._turn is not None and before <= self._turn < ids.shape[1]:
            # From this length on all angles are others, and so are all keys.
            return self.open(ids.tolist(), range(len(ids)), states)
        mask = None if rows.mask is None else torch.cat([rows.mask, torch.ones_like(tokens)], 1)
        return self._forward(rows._replace(ids=ids, mask=mask), tokens, states, going_on)

    def select(self, rows: Rows, at: Sequence[int]) -> Rows:
        """Select rows; one may be selected many times."""
        index = torch.tensor(list(at), device=rows.ids.device)
        if rows.cache is not None:
            rows.cache.reorder_cache(index)
        mask = None if rows.mask is None else rows.mask[index]
        return Rows(rows.ids[index], mask, rows.cache, rows.logits[index.to(rows.logits.device)])

    def read_others(self, rows: Rows, at: Sequence[int], kept: Sequence[int], tokens: Sequence[list[int]]) -> Tensor:
        """Read tokens behind the first `kept[i]` tokens of rows at[i]; return the hidden states at the last of each.

        The rows stay as they are: it is a copy of their cache that is read behind, with the tokens that were not kept
        masked out.
        """
        index = torch.tensor(list(at), device=rows.ids.device)
        mask = (torch.ones_like(rows.ids) if rows.mask is None else rows.mask)[index]
        mask = mask * (mask.cumsum(1) <= torch.tensor(kept, device=mask.device)[:, None])
        length = int((mask * torch.arange(1, 1 + mask.shape[1], device=mask.device)).max())
        cache = copy.copy(rows.cache)
        cache.layers = [layer.take(index, length) for layer in rows.cache.layers]
        fed, is_fed = pad_right([*tokens], 0, rows.ids.device)
        whole, ids = torch.cat([mask[:, :length], is_fed], 1), torch.cat([rows.ids[index, :length], fed], 1)
        unmasked = len(tokens) == 1 and bool(whole.all())  # attention is faster then
        states = self._forward(
            Rows(ids, None if unmasked else whole, cache, rows.logits), fed, fed.shape[1], going_on=False
        ).states
        return torch.stack([own[len(each) - 1] for own, each in zip(states, tokens, strict=True)])  # type: ignore[arg-type]

    def reads_ahead(self, rows: Rows) -> bool:
        """Check that several tokens may be read at once behind the cache: recurrent models take one there."""
        plain = type(rows.cache) in (DynamicCache, EncoderDecoderCache)
        kinds = {Roomy, DynamicLayer, DynamicSlidingWindowLayer}
        return rows.cache is None or (plain and {*map(type, layers_of(rows.cache))} <= kinds)

    def can_read_others(self, rows: Rows) -> bool:
        """Check that all of a row that later tokens depend on are keys and values, each of one token, and positions."""
        plain = type(rows.cache) is DynamicCache and has_room(rows.cache)
        return plain and self._body is not None and self._turn is None and "position_ids" in self._parameters

    def can_select(self, rows: Rows) -> bool:
        """Check that rows can go on without the others; not where sharing, which selects too, went wrong."""
        # A model's own cache class may keep more than reorder_cache moves, as MiniMax's does.
        return self.share and (rows.cache is None or type(rows.cache) in (DynamicCache, EncoderDecoderCache))

    @property
    def pads(self) -> bool:
        """True if prompts of several lengths may be read together."""
        return self._turn is None

    def _forward(self, rows: Rows, ids: Tensor, states: int = 0, going_on: bool = True) -> Rows:
        """Read `ids`, which are the last of the rows, behind the rows' cache; without one, read the rows whole."""
        ids = rows.ids if rows.cache is None else ids
        options: dict[str, Any] = {"use_cache": self.caches}
        if rows.cache is not None:
            options[self._cache_name] = rows.cache
            if rows.mask is None and ids.shape[1] == 1 and self._needs_empty_mask(rows.cache):
                seen = rows.cache.get_seq_length() + ids.shape[1]
                options["attention_mask"] = ids.new_ones(1, 1, 1, seen, dtype=torch.bool)
        if rows.mask is not None:
            options["attention_mask"] = rows.mask
            if "position_ids" in self._parameters:
                options["position_ids"] = (rows.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        # Those of the last layer are the body's output, and cost nothing; others are asked for.
        asks = bool(states) and (self.layers != (-1,) or self._body is None)
        if asks:
            options["output_hidden_states"] = True
        if not going_on and self._body is not None:
            options.pop("logits_to_keep", None)
            with reading_errors(self._body, rows.ids.shape[1]):
                answer = self._body(input_ids=ids, **options)
            last = [] if asks else [answer.last_hidden_state]
            return rows._replace(states=self._join(answer, last, states))
        last = []
        listening = last_states(self.model, last) if states and not asks else nullcontext()
        with listening, contiguous_input(self.model), reading_errors(self.model, rows.ids.shape[1]):
            answer = self.model(input_ids=ids, **options)
        cache = answer.get(self._cache_name) if self.caches else None
        joined = self._join(answer, last[-1:], states) if states else None
        return rows._replace(cache=cache, logits=answer.logits[:, -1], states=joined)

    def _join(self, answer: Any, last: list[Tensor], count: int) -> Tensor:
        """Put the states of the layers at the last tokens side by side; of the last layer alone they are in `last`."""
        picked = last or [answer.hidden_states[layer] for layer in self.layers]
        return torch.cat([each[:, -count:] for each in picked], -1)

    @cached_property
    def _body(self) -> Any:
        """The model without its output layer, if its forward takes what the model's does; else None."""
        body = body_of(self.model)
        taken = set(inspect.signature(body.forward).parameters)
        needed = {"input_ids", "attention_mask", self._cache_name, *({"position_ids"} & self._parameters)}
        return body if body is not self.model and needed <= taken else None

    def _needs_empty_mask(self, cache: Any) -> bool:
        """Find models that are faster with a mask that masks nothing: heads that share keys then read them together.

        Without one, torch's attention for 16 bits on CPUs takes several times as long for a single token.
        """
        config, part = self.model.config.get_text_config(), next(self.model.parameters())
        heads = getattr(config, "num_attention_heads", 1)
        grouped = getattr(config, "num_key_value_heads", heads) != heads and config._attn_implementation == "sdpa"
        slow = part.device.type == "cpu" and part.dtype in (torch.bfloat16, torch.float16)
        return self.share and grouped and slow and "position_ids" in self._parameters and has_room(cache)

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
    """Make the input of the output layer contiguous during the block: on CPUs it is up to 1000 times slower if not."""
    layer = model.get_output_embeddings()
    hook = None if layer is None else layer.register_forward_pre_hook(lambda _, x: (x[0].contiguous(), *x[1:]))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def last_states(model: Any, states: list[Tensor]) -> Iterator[None]:
    """Append the last layer's hidden states of each forward of the model to a list; they cost nothing."""
    body = body_of(model)
    hook = body.register_forward_hook(lambda _module, _inputs, answer: states.append(answer[0]))
    try:
        yield
    finally:
        hook.remove()


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pad rows on the left; return token ids, and the mask of those that are not padding, if there is any.

    A row is padded with its own first token: a penalty on tokens that were there already sees no others.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return ids, None
    blank = torch.tensor([longest - len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) >= blank[:, None]).long()
