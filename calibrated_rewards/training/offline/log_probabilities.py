"""Log-probabilities of the completions of one prompt, with gradients: the prompt is read once for all of them.

A group is a prompt and its completions, as tokens. One forward of the prompt leaves keys and values, behind which all
completions are read; gradients flow back through them. The head is applied to completion tokens alone. Of more than
`rows` completions, some are read at a time: their gradients by the prompt's keys and values are added up, and one
backward pass goes through the prompt in the end.

Models whose completions cannot share a prompt (recurrent states, some windows) are found by comparing values and
gradients of a group with rows read alone. They are read in whole rows.

Where the lower layers are frozen, `GroupReader.record` keeps the hidden states that enter the first trained one, and
groups with states are read from there on.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from calibrated_rewards.models.batches import Rounding, coarsest, moved_by_rounding
from calibrated_rewards.models.parts import RAISED, body_of, device_of, lock_of, pad_right, rope_turn
from calibrated_rewards.models.shared_prefix import CHECKED_ROWS, FARTHER, repeatable, repeated
from calibrated_rewards.models.vocabulary_head import Logits, logits_of, output_layer
from calibrated_rewards.training.offline.frozen_layers import (
    FrozenHead,
    GroupStates,
    count_frozen,
    cut_upper_layers,
    find_layers,
    record_inputs,
    stack_states,
)

# Logits that are held at once in float32: 256 MB.
CELLS = 2**26
# A completion shorter than this part of the longest is not padded to it, but read in another batch.
LEAST_FULL = 0.6
# Gradients that are the same but for rounding: the norm of their difference, as a part of the norm.
SAME_GRADIENT = {torch.float32: 1e-3, torch.float64: 1e-3}
SAME_GRADIENT_16_BIT = 0.2
# So many of the first weights that are trained are compared: a gradient that is lost on the way is missing there.
COMPARED_WEIGHTS = 8

ComputeLoss = Callable[[Tensor], Tensor]


class Group(NamedTuple):
    """The tokens of a prompt and of its completions, each with the token that ended it, if one did."""

    prompt: list[int]
    completions: list[list[int]]
    states: GroupStates | None = None
    """The hidden states that enter the first trained layer, in place of the tokens, if they are known."""

    @property
    def longest(self) -> int:
        """The number of tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))

    def take(self, at: Sequence[int]) -> "Group":
        """Return the group with some of its completions."""
        states = self.states and GroupStates(self.states.prompt, [self.states.completions[i] for i in at])
        return Group(self.prompt, [self.completions[i] for i in at], states)


class Opening(NamedTuple):
    """A prompt that was read: its keys and values, and the hidden state that predicts the next token."""

    cache: Cache
    hidden: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All that a completion's log-probability takes from the prompt."""
        layers: Any = self.cache.layers
        return [self.hidden, *(each for layer in layers for each in (layer.keys, layer.values))]

    def detach(self) -> "Opening":
        """Cut the graph: the tensors are leaves, which collect the gradients of several backward passes."""
        cache = repeated(self.cache, 1)
        layers: Any = cache.layers
        for layer in layers:
            layer.keys, layer.values = _leaf(layer.keys), _leaf(layer.values)
        return Opening(cache, _leaf(self.hidden))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


@dataclass
class Route:
    """How groups are read: behind a shared prompt, in padded rows, or each row alone; as far as groups have shown."""

    shared: bool = True
    padded: bool = True
    longest: int = 0
    """The longest prompt of a group that was compared."""


@dataclass(frozen=True, eq=False)
class GroupReader:
    """A reader of log-probabilities of completions, summed over their tokens, at a policy's temperature."""

    model: Any
    """A causal language model, in evaluation mode."""
    temperature: float = 1.0
    rows: int = 32
    """Completions that are held with their activations at once."""
    cells: int = CELLS
    route: Route = field(default_factory=Route)

    @torch.no_grad()
    def __call__(self, group: Group) -> Float32[Tensor, " K"]:
        """Compute the completions' log-probabilities, without gradients."""
        self.check(group)
        parts = self._split(group)
        opening = self._open(group) if self._shares(group) else None
        return self._join(group, parts, [self._read(group, part, opening) for part in parts])

    def accumulate_gradients(self, group: Group, compute_loss: ComputeLoss) -> tuple[float, Float32[Tensor, " K"]]:
        """Add the gradient of a loss of the log-probabilities to the weights'; return the loss and what it is of."""
        self.check(group)
        parts = self._split(group)
        opening = self._open(group) if self._shares(group) else None
        if len(group.completions) <= self.rows:
            values = self._join(group, parts, [self._read(group, part, opening) for part in parts])
            loss = compute_loss(values)
            if loss.requires_grad:  # not if no completion has a token
                torch.autograd.backward(loss)
            return float(loss.detach()), values.detach()
        cut = None if opening is None else opening.detach()
        with torch.no_grad():
            values = self._join(group, parts, [self._read(group, part, cut) for part in parts])
        values.requires_grad_()
        loss = compute_loss(values)
        (slopes,) = torch.autograd.grad(loss, values)
        for part in parts:
            own = slopes[part]
            if bool(own.any()):
                torch.autograd.backward(self._read(group, part, cut), own)
        if opening is not None and cut is not None:
            pairs = [(there, leaf.grad) for there, leaf in zip(opening.tensors, cut.tensors, strict=True)]
            pairs = [(there, gradient) for there, gradient in pairs if gradient is not None]
            torch.autograd.backward([there for there, _ in pairs], [gradient for _, gradient in pairs])
        return float(loss.detach()), values.detach()

    @torch.no_grad()
    def record(self, group: Group) -> tuple[Float32[Tensor, " K"], GroupStates]:
        """Compute the log-probabilities, and keep the states that enter the first layer that is trained."""
        self.check(group)
        place = find_layers(self.model)
        if place is None:
            raise TypeError(f"{type(self.model).__name__} has no list of layers whose states could be kept")
        _ = self._head  # reads a few tokens when it is made
        shared, lengths = self._shares(group), [max(0, len(row) - 1) for row in group.completions]
        with record_inputs(place[2][count_frozen(place[2])]) as inputs:
            values = self(group)
        prompt = inputs[0][0, : len(group.prompt)].clone()
        past = 0 if shared else len(group.prompt)
        states = [prompt[:0]] * len(lengths)
        # A part of completions of one token is not fed behind a shared prompt.
        parts = [part for part in self._split(group) if not shared or any(lengths[i] for i in part)]
        for part, own in zip(parts, inputs[1:] if shared else inputs, strict=True):
            for i, row in zip(part, own, strict=True):
                states[i] = row[past : past + lengths[i]].clone()
        return values, GroupStates(prompt, states)

    def can_skip(self, group: Group) -> bool:
        """Tell if a group with states has the values and gradients that it has from its tokens."""
        plain = Group(group.prompt, group.completions)
        whole = self._try(plain, self.route)
        return self._upper is not None and whole is not None and self._agrees(group, whole, self.route)

    def check(self, group: Group) -> None:
        """Find the route that gives what rows alone give, by the first group and by those with far longer prompts."""
        if self.route.longest and len(group.prompt) <= FARTHER * self.route.longest:
            return
        self.route.longest = len(group.prompt)
        order = sorted(group.completions, key=len)
        some = [order[i * (len(order) - 1) // (CHECKED_ROWS - 1)] for i in range(CHECKED_ROWS)]
        group = Group(group.prompt, some if len(order) > CHECKED_ROWS else order)
        if not (self.route.shared or self.route.padded):
            return
        alone = self._try(group, Route(shared=False, padded=False))
        if alone is None:
            return
        self.route.shared = self.route.shared and self._can_share(group) and self._agrees(group, alone, Route())
        if not self.route.shared:
            self.route.padded = self.route.padded and self._agrees(group, alone, Route(shared=False))

    def _agrees(self, group: Group, alone: tuple[Tensor, list[Tensor]], route: Route) -> bool:
        """Tell if a route gives the values and gradients of rows alone, but for rounding."""
        answer = self._try(group, route)
        if answer is None:
            return False
        kind = coarsest(self.model)
        limit = SAME_GRADIENT.get(kind, SAME_GRADIENT_16_BIT)
        pairs = list(zip(answer[1], alone[1], strict=True))
        apart = math.sqrt(sum(float((a - b).float().square().sum()) for a, b in pairs))
        size = math.sqrt(sum(float(b.float().square().sum()) for _, b in pairs))
        excess = Rounding(farthest=math.inf).excess(
            answer[0], alone[0], lambda: (alone[0], self._move(group, alone[0])), self.model
        )
        return excess <= 1 and apart <= limit * size

    def _move(self, group: Group, alone: Tensor) -> Tensor:
        with moved_by_rounding(self.model):
            moved = self._try(group, Route(shared=False, padded=False))
        return alone if moved is None else moved[0]

    def _try(self, group: Group, route: Route) -> tuple[Tensor, list[Tensor]] | None:
        """Read a group by a route: values, (rows, 1), and gradients of some weights; None where the model fails."""
        reader = GroupReader(self.model, self.temperature, self.rows, self.cells, route)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad][:COMPARED_WEIGHTS]
        total = [torch.zeros_like(weight) for weight in weights]
        values = []
        try:
            with torch.enable_grad():
                parts, opening = reader._split(group), reader._open(group) if route.shared else None
                for part in parts:
                    # Whole rows one after the other, or what is compared would need more memory than what is used.
                    own = reader._read(group, part, opening)
                    values.append(own.detach())
                    last = part is parts[-1]
                    options: Any = {"allow_unused": True, "retain_graph": opening is not None and not last}
                    gradients = torch.autograd.grad(own.sum(), weights, **options) if weights else ()
                    for whole, gradient in zip(total, gradients, strict=True):
                        if gradient is not None:
                            whole.add_(gradient)
        except RAISED:
            return None
        return reader._join(group, parts, values).cpu()[:, None], total

    def _can_share(self, group: Group) -> bool:
        """Tell if the model takes and returns a cache of keys and values alone."""
        if "past_key_values" not in self._parameters:
            return False
        try:
            with torch.no_grad():
                cache = self._open(group).cache
        except RAISED:
            return False
        return repeatable(cache) and cache.get_seq_length() == len(group.prompt)

    def _shares(self, group: Group) -> bool:
        """Tell if a group is read behind its prompt: LongRoPE has other angles for all of a long input."""
        turned = self._turn is not None and len(group.prompt) <= self._turn < group.longest
        return self.route.shared and len(group.completions) > 1 and not turned

    def _split(self, group: Group) -> list[list[int]]:
        """Split the completions into batches of at most `rows`, of nearly one length."""
        most = self.rows if self.route.padded or self._shares(group) else 1
        return list(split_by_length([len(each) for each in group.completions], most))

    def _join(self, group: Group, parts: Sequence[list[int]], values: Sequence[Tensor]) -> Tensor:
        """Put the values of parts in the order of the group; a completion without tokens has 0."""
        device = device_of(self.model)
        zeros = torch.zeros(len(group.completions), device=device)
        order = torch.tensor([i for part in parts for i in part], dtype=torch.long, device=device)
        return zeros.index_copy(0, order, torch.cat(list(values))) if parts else zeros

    def _open(self, group: Group) -> Opening:
        """Read a prompt."""
        states = None if group.states is None else [group.states.prompt]
        body, inputs, _ = self._feed([group.prompt], states)
        answer = body(**inputs, use_cache=True)
        return Opening(answer.past_key_values, answer.last_hidden_state[:, -1])

    def _read(self, group: Group, part: list[int], opening: Opening | None) -> Tensor:
        """Read some completions behind a prompt that was read, or in whole rows; the last token is not fed."""
        rows = [group.completions[i] for i in part]
        fed, states = [row[:-1] for row in rows], group.states
        own = None if states is None else [states.completions[i] for i in part]
        if opening is None:
            whole = own if own is None or states is None else [torch.cat([states.prompt, each]) for each in own]
            body, inputs, mask = self._feed([group.prompt + row for row in fed], whole)
            hidden = body(**inputs, attention_mask=mask, use_cache=False)
            return self._sum(hidden.last_hidden_state[:, len(group.prompt) - 1 :], rows)
        firsts = torch.tensor([row[0] for row in rows], device=opening.hidden.device)
        values = self._compute_logits(opening.hidden).log_softmax(-1)[0, firsts]
        if max(map(len, fed)):
            past = len(group.prompt)
            body, inputs, mask = self._feed(fed, own, past)
            mask = torch.cat([mask.new_ones(len(rows), past), mask], 1)
            cache = repeated(opening.cache, len(rows))
            hidden = body(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
            values = values + self._sum(hidden.last_hidden_state, [row[1:] for row in rows])
        return values

    def _feed(
        self, rows: list[list[int]], states: list[Tensor] | None, past: int = 0
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Choose the body that reads tokens, or the one that reads states; with its inputs and their mask."""
        ids, mask = pad_right(rows, 0, device_of(self.model))
        positions = self._positions(past, ids)
        if states is None:
            return self._body, {"input_ids": ids, **positions}, mask
        return self._upper, {"inputs_embeds": stack_states(states, ids.device), **positions}, mask

    def _sum(self, hidden: Tensor, rows: Sequence[list[int]]) -> Tensor:
        """Sum the log-probabilities of each row's tokens, each predicted by the hidden state in its place."""
        mask = torch.arange(hidden.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        mask = mask.to(hidden.device)
        targets = torch.tensor([token for row in rows for token in row], device=hidden.device)
        logprobs = self._score(hidden[mask], targets)
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs).sum(1)

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probability of each target, without holding all logits."""
        some = max(1, self.cells // int(self._layer.weight.shape[0]))
        if not torch.is_grad_enabled() or (hidden.requires_grad and not self._trains_head):
            # Less than could be held: what stays in the processor's caches is faster.
            few = max(1, some // 8)
            parts = list(zip(torch.split(hidden, few), torch.split(targets, few), strict=True))
            score: Any = FrozenHead.apply
            return score(hidden, parts, self._compute_logits)  # type: ignore[no-any-return]
        parts = list(zip(torch.split(hidden, some), torch.split(targets, some), strict=True))
        if len(parts) > 1:
            return torch.cat([checkpoint(self._score_part, *part, use_reentrant=False) for part in parts])
        return self._score_part(hidden, targets)

    def _score_part(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._compute_logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def _compute_logits(self, hidden: Tensor) -> Tensor:
        # A slice of a longer row is up to 1000 times slower in 16 bits on a CPU.
        logits = self._head.of(self._layer, hidden.contiguous()).float()
        return logits if self.temperature == 1 else logits / self.temperature

    def _positions(self, past: int, ids: Tensor) -> dict[str, Tensor]:
        if "position_ids" not in self._parameters:
            return {}
        return {"position_ids": torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)}

    @cached_property
    def _body(self) -> Any:
        return body_of(self.model)

    @cached_property
    def _upper(self) -> Any:
        return cut_upper_layers(self.model)

    @cached_property
    def _parameters(self) -> set[str]:
        return set(inspect.signature(self._body.forward).parameters)

    @cached_property
    def _head(self) -> Logits:
        return logits_of(self.model, lock_of(self.model))

    @cached_property
    def _layer(self) -> Any:
        return output_layer(self.model)

    @property
    def _trains_head(self) -> bool:
        return any(weight.requires_grad for weight in self._layer.parameters())

    @cached_property
    def _turn(self) -> int | None:
        return rope_turn(self.model)


def split_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Split the numbers of rows into batches of at most `most`, longest first, without rows that are mostly padding.

    Rows without tokens are in none.

    >>> [*split_by_length([3, 9, 8, 0, 2, 7], 2)]
    [[1, 2], [5], [0, 4]]
    """
    batch: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if batch and (len(batch) == most or lengths[i] < LEAST_FULL * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
