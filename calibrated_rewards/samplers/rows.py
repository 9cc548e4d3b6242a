"""Rows of tokens in a causal language model: read once, then a token at a time, by the model's own forward."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from calibrated_rewards.models.parts import device_of, rope_turn
from calibrated_rewards.models.unread import reading_errors
from calibrated_rewards.samplers.cache import choose, is_roomy, roomy

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
