"""A policy whose completions can all be listed: a fixed number of tokens, each among the reference's likeliest ones.

Top-k decoding of the reference, with the k tokens behind each prefix fixed once: every policy chooses among the same
tokens, so that its law over all width^length completions is known exactly, and with it KL and win rates. The network is
a whole language model all the same. Completions are read as a tree: each prefix once, whatever the number of rollouts.

A completion is a number from 0 to width^length - 1, whose digits are the choices; `nodes` are such numbers of all
prompts, prompt after prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a body reads: tokens, or the hidden states that enter its first trained layer."""

    prompts: Tensor
    """(P, tokens) or (P, tokens, hidden size)"""
    levels: tuple[Tensor, ...]
    """Of each choice's nodes: (nodes,) or (nodes, hidden size)"""

    def read(self, body: Any, values: Tensor, cache: Any) -> Tensor:
        """Read (rows, tokens) or their states behind a cache; return the last hidden states."""
        name = "input_ids" if values.dim() == 2 else "inputs_embeds"
        hidden: Tensor = body(**{name: values}, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden[:, -1]


@dataclass(frozen=True, eq=False)
class Path:
    """The prefixes of some completions, level by level, each with its parent's place."""

    nodes: tuple[Int[np.ndarray, " nodes"], ...]
    parents: tuple[Tensor, ...]
    choices: tuple[Tensor, ...]

    @classmethod
    def to(cls, completions: Int[np.ndarray, " n"], width: int, length: int, prompts: int) -> Path:
        """Find all prefixes of distinct completions in ascending order."""
        nodes = [np.unique(completions // width ** (length - level)) for level in range(1, length + 1)]
        before = [np.arange(prompts), *nodes[:-1]]
        parents = [torch.from_numpy(np.searchsorted(b, own // width)) for b, own in zip(before, nodes, strict=True)]
        return cls(tuple(nodes), tuple(parents), tuple(torch.from_numpy(own % width) for own in nodes))


@dataclass(frozen=True, eq=False)
class Tree:
    """The completions of each prompt, and how a model reads them."""

    prompts: Int[Tensor, "P tokens"]
    choices: tuple[Int[Tensor, "nodes width"], ...]
    """The tokens that may follow each prefix, level by level."""
    temperature: float

    @classmethod
    @torch.no_grad()
    def grow(cls, body: Any, head: Tensor, prompts: Tensor, length: int, width: int, temperature: float) -> Tree:
        """Grow the tree of the reference's likeliest tokens; token 0, which is padding, is never among them."""
        choices: list[Tensor] = []
        cache = DynamicCache()
        hidden = body(input_ids=prompts, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        for level in range(length):
            logits = hidden.float() @ head.float().T
            logits[:, 0] = -torch.inf
            choices.append(logits.topk(width, -1).indices)
            if level + 1 < length:
                cache.batch_repeat_interleave(width)
                rows = choices[-1].reshape(-1, 1)
                hidden = body(input_ids=rows, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        return cls(prompts, tuple(choices), temperature)

    @property
    def width(self) -> int:
        """Tokens to choose from."""
        return self.choices[0].shape[1]

    @property
    def length(self) -> int:
        """Tokens of a completion."""
        return len(self.choices)

    @property
    def size(self) -> int:
        """Completions of a prompt."""
        return self.width**self.length

    @cached_property
    def inputs(self) -> Inputs:
        """The tokens themselves."""
        return Inputs(self.prompts, tuple(each.reshape(-1) for each in self.choices[:-1]))

    @cached_property
    def whole(self) -> Path:
        """All completions."""
        return self.path(np.arange(len(self.prompts) * self.size))

    def path(self, completions: Int[np.ndarray, " n"]) -> Path:
        """Find the prefixes of distinct completions, which are numbered through all prompts."""
        return Path.to(completions, self.width, self.length, len(self.prompts))

    def log_probs(
        self, body: Any, head: Tensor, path: Path, inputs: Inputs | None = None
    ) -> Float[Tensor, " completions"]:
        """Compute the log-probabilities of the completions of a path, with gradients."""
        inputs = inputs or self.inputs
        cache = DynamicCache()
        hidden = inputs.read(body, inputs.prompts, cache)
        known, before = torch.zeros(len(self.prompts)), np.arange(len(self.prompts))
        for level, (nodes, parents, choices) in enumerate(zip(path.nodes, path.parents, path.choices, strict=True)):
            tokens = self.choices[level][torch.from_numpy(before)]
            # Only the logits of the tokens to choose from are computed.
            logits = torch.einsum("nh,nwh->nw", hidden.float(), head[tokens].float()) / self.temperature
            known = known[parents] + logits.log_softmax(-1)[parents, choices]
            if level + 1 < self.length:
                cache.batch_select_indices(parents)
                hidden = inputs.read(body, inputs.levels[level][torch.from_numpy(nodes)][:, None], cache)
                before = nodes
        return known

    @torch.no_grad()
    def law(self, body: Any, head: Tensor, inputs: Inputs | None = None) -> Float[np.ndarray, "P completions"]:
        """Compute the log-probabilities of all completions."""
        known = self.log_probs(body, head, self.whole, inputs)
        return np.asarray(known.double().numpy().reshape(len(self.prompts), self.size))

    def tokens(self) -> Int[np.ndarray, "P completions length"]:
        """List the tokens of all completions."""
        numbers = np.arange(len(self.prompts) * self.size)
        columns = []
        for level, choices in enumerate(self.choices):
            nodes = numbers // self.width ** (self.length - level)
            digit = numbers // self.width ** (self.length - level - 1) % self.width
            columns.append(choices.numpy()[nodes, digit])
        return np.stack(columns, -1).reshape(len(self.prompts), self.size, self.length)


def choose_prompts(encode: Any, texts: Sequence[str], count: int) -> tuple[list[str], Tensor]:
    """Choose the first prompts that have the most common number of tokens, so that nothing is padded."""
    rows = [encode(text) for text in texts]
    sizes = np.array([len(row) for row in rows])
    size = np.bincount(sizes).argmax()
    at = np.flatnonzero(sizes == size)[:count]
    if len(at) < count:
        raise ValueError(f"choose_prompts found {len(at)} prompts of {size} tokens, {count} are needed.")
    return [texts[i] for i in at], torch.tensor([rows[i] for i in at])


def grow_widest(
    body: Any,
    head: Tensor,
    texts: Sequence[str],
    prompts: Tensor,
    count: int,
    shape: tuple[int, int],
    temperature: float,
) -> tuple[list[str], Tree]:
    """Grow the tree of the prompts whose laws have the largest entropy: a few completions have few quantiles."""
    law = Tree.grow(body, head, prompts, *shape, temperature).law(body, head)
    entropies = -(np.exp(law) * law).sum(axis=1)
    at = np.sort(np.argsort(-entropies)[:count])
    return [texts[i] for i in at], Tree.grow(body, head, prompts[torch.from_numpy(at)], *shape, temperature)
