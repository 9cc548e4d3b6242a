"""Log-probabilities of a prompt's completions, with gradients: the prompt is read once for all of them.

A group is a prompt and its completions, as tokens. One forward of the prompt leaves keys and values, behind which all
completions are read; gradients flow back through them. The head is applied to completion tokens alone. Of more than
`rows` completions, some are read at a time: their gradients by the prompt's keys and values are added up, and one
backward pass goes through the prompt in the end. Small groups go through the model several at a time. What several
completions of a group begin with is read once, where that is worth it (token_trees.py).

Models whose completions cannot share a prompt (recurrent states, some windows) are found by comparing values and
gradients of a group with rows read alone. They are read in whole rows. Groups that are read together are compared with
the same groups read one after the other, and trees with the same groups without them.

Where the lower layers are frozen, `GroupReader.record` keeps the hidden states that enter the first trained one, and
groups with states are read from there on.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from calibrated_rewards.models.batches import moved_by_rounding
from calibrated_rewards.models.parts import RAISED, body_of, device_of, pad_right, rope_turn
from calibrated_rewards.models.shared_prefix import FARTHER, repeatable
from calibrated_rewards.training.offline.frozen_layers import (
    GroupStates,
    count_frozen,
    cut_upper_layers,
    find_layers,
    record_inputs,
    stack_states,
)
from calibrated_rewards.training.offline.group_batches import Batch, Group, Opening, split_by_length
from calibrated_rewards.training.offline.output_layer import CELLS, OutputLayer
from calibrated_rewards.training.offline.routes import Answer, Route, Size, agree, choose_ends, take_few
from calibrated_rewards.training.offline.token_trees import TreeRows, grow_tree, save_enough

# Groups are read together until they have so many tokens: fewer leave a processor to read weights, more are no faster.
TOKENS = 2048
# Keys and values of so many tokens at most are then held in each layer, those of a prompt once for each completion.
POSITIONS = 2**14
# So many of the first weights that are trained are compared: a gradient that is lost on the way is missing there.
COMPARED_WEIGHTS = 8

ComputeLoss = Callable[[Tensor], Tensor]


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

    def __call__(self, group: Group) -> Float32[Tensor, " K"]:
        """Compute the completions' log-probabilities, without gradients."""
        return next(self.read([group]))

    def read(self, groups: Iterable[Group]) -> Iterator[Float32[Tensor, " K"]]:
        """Compute the log-probabilities of each group's completions, without gradients."""
        for batch in self.batch(groups):
            yield from self._read_batch(batch)

    @torch.no_grad()
    def _read_batch(self, batch: Batch) -> list[Tensor]:
        parts = self._split(batch)
        opening = self._open(batch) if self._shares(batch) else None
        return batch.split(self._join(batch, parts, [self._read(batch, part, opening) for part in parts]))

    def accumulate_gradients(
        self, groups: Sequence[Group], losses: Sequence[ComputeLoss]
    ) -> list[tuple[float, Float32[Tensor, " K"]]]:
        """Add the gradient of each group's loss of its log-probabilities to the weights'.

        Return for each group the loss and the log-probabilities.
        """
        results: list[tuple[float, Tensor]] = []
        for batch in self.batch(groups):
            own = losses[len(results) : len(results) + len(batch.groups)]
            results += self._accumulate(batch, own)
        return results

    def _accumulate(self, batch: Batch, losses: Sequence[ComputeLoss]) -> list[tuple[float, Tensor]]:
        """Add the gradients of groups that are read together."""
        parts = self._split(batch)
        opening = self._open(batch) if self._shares(batch) else None
        if len(batch.groups) > 1 or len(batch.completions) <= self.rows:
            values = batch.split(self._join(batch, parts, [self._read(batch, part, opening) for part in parts]))
            terms = [compute(each) for compute, each in zip(losses, values, strict=True)]
            terms_with_gradient = [each for each in terms if each.requires_grad]  # not if no completion has a token
            if terms_with_gradient:
                torch.autograd.backward(terms_with_gradient)
            return [(float(term.detach()), each.detach()) for term, each in zip(terms, values, strict=True)]
        cut = None if opening is None else opening.detach()
        with torch.no_grad():
            whole = self._join(batch, parts, [self._read(batch, part, cut) for part in parts])
        whole.requires_grad_()
        loss = losses[0](whole)
        (slopes,) = torch.autograd.grad(loss, whole)
        for part in parts:
            own = slopes[part]
            if bool(own.any()):
                torch.autograd.backward(self._read(batch, part, cut), own)
        if opening is not None and cut is not None:
            pairs = [(there, leaf.grad) for there, leaf in zip(opening.tensors, cut.tensors, strict=True)]
            pairs = [(there, gradient) for there, gradient in pairs if gradient is not None]
            torch.autograd.backward([there for there, _ in pairs], [gradient for _, gradient in pairs])
        return [(float(loss.detach()), whole.detach())]

    def record(self, groups: Iterable[Group]) -> Iterator[tuple[Float32[Tensor, " K"], GroupStates]]:
        """Compute the log-probabilities, and keep the states that enter the first layer that is trained."""
        place = find_layers(self.model)
        if place is None:
            raise TypeError(f"{type(self.model).__name__} has no list of layers whose states could be kept")
        _ = self._output.head  # reads a few tokens when it is made
        first = place[2][count_frozen(place[2])]
        for batch in self.batch(groups):
            with record_inputs(first) as inputs:
                values = self._read_batch(batch)
            yield from zip(values, self._arrange_states(batch, inputs), strict=True)

    def _arrange_states(self, batch: Batch, inputs: Sequence[Tensor]) -> list[GroupStates]:
        """Sort the states of a batch by group and completion, without padding."""
        shared, lengths = self._shares(batch), [max(0, len(row) - 1) for row in batch.completions]
        prompts = [inputs[0][i if shared else 0, : len(group.prompt)].clone() for i, group in enumerate(batch.groups)]
        past = 0 if shared else len(batch.groups[0].prompt)
        states = [prompts[0][:0]] * len(lengths)
        # A part of completions of one token is not fed behind a shared prompt.
        parts = [part for part in self._split(batch) if not shared or any(lengths[i] for i in part)]
        for part, own in zip(parts, inputs[1:] if shared else inputs, strict=True):
            for i, row in zip(part, self._trees(batch, part).spread_states(own) if batch.trees else own, strict=True):
                states[i] = row[past : past + lengths[i]].clone()
        own_states = [
            [row for row, at in zip(states, batch.owners, strict=True) if at == i] for i in range(len(prompts))
        ]
        return list(map(GroupStates, prompts, own_states))

    def batch(self, groups: Iterable[Group]) -> Iterator[Batch]:
        """Put groups that follow one another into batches, as far as they are small and the model reads them alike."""
        batch: list[Group] = []
        for group in groups:
            self.check(group)
            if batch and not self._fits([*batch, group]):
                yield self._grow(Batch(batch))
                batch = []
            batch.append(group)
        if batch:
            yield self._grow(Batch(batch))

    def _grow(self, batch: Batch) -> Batch:
        """Choose trees for a batch where that saves tokens, and the model gives with them what it gives without."""
        takes_trees = "position_ids" in self._parameters and self._attention in ("sdpa", "eager")
        if not (self.route.trees and takes_trees and self._shares(batch)):
            return batch
        grown = replace(batch, trees=True)
        parts = [self._trees(grown, part) for part in self._split(grown)]
        return grown if save_enough(parts) and self._check_trees(grown, max(each.width for each in parts)) else batch

    def _fits(self, groups: Sequence[Group]) -> bool:
        """Tell if groups are read together: all are small, and the model gives what it gives for each of them."""
        rows = sum(len(group.completions) for group in groups)
        width = max(len(group.prompt) for group in groups) + max(group.longest - len(group.prompt) for group in groups)
        return (
            self.route.together
            and all(len(group.completions) <= self.rows and self._shares(Batch([group])) for group in groups)
            and len({group.states is None for group in groups}) == 1
            and sum(group.tokens for group in groups) <= TOKENS
            and rows * width <= POSITIONS
            and self._check_together(groups)
        )

    def can_skip(self, group: Group) -> bool:
        """Tell if a group with states has the values and gradients that it has from its tokens."""
        plain = Group(group.prompt, group.completions)
        whole = self._try([Batch([plain])], self.route)
        return self._upper is not None and whole is not None and self._agrees([Batch([group])], whole, self.route)

    def check(self, group: Group) -> None:
        """Find the route that gives what rows alone give, by the first group and by those with far longer prompts."""
        if self.route.longest and len(group.prompt) <= FARTHER * self.route.longest:
            return
        self.route.longest = len(group.prompt)
        batches = [Batch([take_few(group)])]
        if not (self.route.shared or self.route.padded):
            return
        alone = self._try(batches, Route(shared=False, padded=False))
        if alone is None:
            return
        self.route.shared = self.route.shared and self._can_share(batches[0]) and self._agrees(batches, alone, Route())
        if not self.route.shared:
            self.route.padded = self.route.padded and self._agrees(batches, alone, Route(shared=False))

    def _check_together(self, groups: Sequence[Group]) -> bool:
        """Tell if groups give together what each gives alone; compared where prompts are padded more than before."""
        ends = choose_ends(groups)
        padding = len(ends[1].prompt) - len(ends[0].prompt)
        if self.route.padding < 0 or padding > FARTHER * self.route.padding:
            self.route.padding = padding
            some = [take_few(group) for group in ends]
            alone = self._try([Batch([group]) for group in some], self.route)
            # A window would count the padding behind a shorter prompt.
            whole = self._open(Batch(some[:1])).keeps_all
            self.route.together = whole and alone is not None and self._agrees([Batch(some)], alone, self.route)
        return self.route.together

    def _check_trees(self, batch: Batch, width: int) -> bool:
        """Tell if trees give what the same groups give without them; compared where they are larger than before."""
        ends = choose_ends(batch.groups)
        size = Size(len(ends[-1].prompt) + width, len(ends[-1].prompt) - len(ends[0].prompt))
        if not self.route.covers_trees(batch.has_states, size):
            widest = max(batch.groups, key=lambda group: len(grow_tree(group.completions).tokens))
            some = ends if any(group is widest for group in ends) else [*ends, widest]
            if not any(grow_tree(group.completions).branches for group in some):
                return False  # A mask of all that came before would do: others will show more.
            self.route.add_trees(batch.has_states, size)
            rows = self._try([Batch(some)], self.route)
            whole = self._open(Batch(ends[:1])).keeps_all
            self.route.trees = whole and rows is not None and self._agrees([Batch(some, trees=True)], rows, self.route)
        return self.route.trees

    def _agrees(self, batches: Sequence[Batch], alone: Answer, route: Route) -> bool:
        """Tell if a route gives the values and gradients of another one, but for rounding."""
        answer = self._try(batches, route)
        return answer is not None and agree(answer, alone, lambda: self._move(batches, alone.values), self.model)

    def _move(self, batches: Sequence[Batch], alone: Tensor) -> Tensor:
        groups = [Batch([group]) for batch in batches for group in batch.groups]
        with moved_by_rounding(self.model):
            moved = self._try(groups, Route(shared=False, padded=False))
        return alone if moved is None else moved.values

    def _try(self, batches: Sequence[Batch], route: Route) -> Answer | None:
        """Read batches by a route: values, (rows, 1), and gradients of some weights; None where the model fails."""
        reader = GroupReader(self.model, self.temperature, self.rows, self.cells, route)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad][:COMPARED_WEIGHTS]
        total = [torch.zeros_like(weight) for weight in weights]
        joined = []
        try:
            with torch.enable_grad():
                for batch in batches:
                    parts, opening = reader._split(batch), reader._open(batch) if route.shared else None
                    values = []
                    for part in parts:
                        # Whole rows one after the other, or what is compared would need more memory than what is used.
                        own = reader._read(batch, part, opening)
                        values.append(own.detach())
                        last = part is parts[-1]
                        options: Any = {"allow_unused": True, "retain_graph": opening is not None and not last}
                        gradients = torch.autograd.grad(own.sum(), weights, **options) if weights else ()
                        for whole, gradient in zip(total, gradients, strict=True):
                            if gradient is not None:
                                whole.add_(gradient)
                    joined.append(reader._join(batch, parts, values))
        except RAISED:
            return None
        return Answer(torch.cat(joined).cpu()[:, None], total)

    def _can_share(self, batch: Batch) -> bool:
        """Tell if the model takes and returns a cache of keys and values alone."""
        if "past_key_values" not in self._parameters:
            return False
        try:
            with torch.no_grad():
                cache = self._open(batch).cache
        except RAISED:
            return False
        return repeatable(cache) and cache.get_seq_length() == len(batch.groups[0].prompt)

    def _shares(self, batch: Batch) -> bool:
        """Tell if groups are read behind their prompts: LongRoPE has other angles for all of a long input."""
        if len(batch.groups) > 1:
            return True
        (group,) = batch.groups
        turned = self._turn is not None and len(group.prompt) <= self._turn < group.longest
        return self.route.shared and len(group.completions) > 1 and not turned

    def _split(self, batch: Batch) -> list[list[int]]:
        """Split the completions of a batch into parts of nearly one length, of at most `rows` where it is one group."""
        most = len(batch.completions) if len(batch.groups) > 1 else self.rows
        if batch.trees:  # those that begin alike together
            pairs = [*zip(batch.owners, batch.completions, strict=True)]
            order = sorted((i for i, (_, row) in enumerate(pairs) if row), key=pairs.__getitem__)
            return [order[start : start + most] for start in range(0, len(order), most)]
        if not (self.route.padded or self._shares(batch)):
            most = 1
        return list(split_by_length([len(each) for each in batch.completions], most))

    def _join(self, batch: Batch, parts: Sequence[list[int]], values: Sequence[Tensor]) -> Tensor:
        """Put the values of parts in the order of the batch; a completion without tokens has 0."""
        device = device_of(self.model)
        zeros = torch.zeros(len(batch.completions), device=device)
        order = torch.tensor([i for part in parts for i in part], dtype=torch.long, device=device)
        return zeros.index_copy(0, order, torch.cat(list(values))) if parts else zeros

    def _open(self, batch: Batch) -> Opening:
        """Read the prompts of a batch."""
        prompts = [group.prompt for group in batch.groups]
        body, inputs, mask = self._feed(prompts, batch.prompt_states if batch.has_states else None)
        ragged = {} if bool(mask.all()) else {"attention_mask": mask}
        answer = body(**inputs, **ragged, use_cache=True)
        last = mask.sum(1) - 1
        hidden = answer.last_hidden_state[torch.arange(len(last), device=last.device), last]
        return Opening(answer.past_key_values, hidden, mask)

    def _read(self, batch: Batch, part: list[int], opening: Opening | None) -> Tensor:
        """Read some completions behind their prompts, or one group's in whole rows; the last token is not fed."""
        rows = [batch.completions[i] for i in part]
        fed = [row[:-1] for row in rows]
        own = [batch.states[i] for i in part] if batch.has_states else None
        if opening is None:
            prompt = batch.groups[0].prompt
            whole = own if own is None else [torch.cat([batch.prompt_states[0], each]) for each in own]
            body, inputs, mask = self._feed([prompt + row for row in fed], whole)
            hidden = body(**inputs, attention_mask=mask, use_cache=False)
            return self._output.sum(hidden.last_hidden_state[:, len(prompt) - 1 :], rows)
        if batch.trees:
            return self._read_trees(self._trees(batch, part), own, opening)
        device = opening.hidden.device
        owners = torch.tensor([batch.owners[i] for i in part], device=device)
        firsts = torch.tensor([row[0] for row in rows], device=device)
        values = self._output.compute_logits(opening.hidden).log_softmax(-1)[owners, firsts]
        if max(map(len, fed)):
            prompts = opening.mask[owners]
            body, inputs, mask = self._feed(fed, own, prompts.sum(1, keepdim=True))
            mask = torch.cat([prompts, mask], 1)
            cache = opening.select(owners)
            hidden = body(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True)
            values = values + self._output.sum(hidden.last_hidden_state, [row[1:] for row in rows])
        return values

    def _trees(self, batch: Batch, part: list[int]) -> TreeRows:
        rows, owners = [batch.completions[i] for i in part], [batch.owners[i] for i in part]
        return TreeRows(rows, owners, len(batch.groups))

    def _read_trees(self, trees: TreeRows, states: list[Tensor] | None, opening: Opening) -> Tensor:
        """Read completions as trees, each behind its prompt."""
        hidden = opening.hidden
        if trees.width:
            ids, mask, depths = trees.pad(hidden.device)
            positions = opening.mask.sum(1, keepdim=True) + depths
            sees = trees.mask_attention(opening.mask)
            if self._attention == "eager":  # it adds the mask
                sees = torch.zeros_like(sees, dtype=hidden.dtype).masked_fill(~sees, torch.finfo(hidden.dtype).min)
            options = {"position_ids": positions, "attention_mask": sees, "past_key_values": opening.copy_cache()}
            if states is None:
                answer = self._body(input_ids=ids, use_cache=True, **options)
            else:
                stacked = stack_states(trees.gather_states(states), hidden.device)
                answer = self._upper(inputs_embeds=stacked, use_cache=True, **options)
            hidden = torch.cat([hidden, answer.last_hidden_state[mask]])
        steps = torch.tensor(trees.steps[0], device=hidden.device)
        return trees.sum_steps(self._output.score(hidden, steps[:, 0], steps[:, 1]))

    def _feed(
        self, rows: list[list[int]], states: list[Tensor] | None, past: Tensor | int = 0
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        """Choose the body that reads tokens, or the one that reads states; with its inputs and their mask."""
        ids, mask = pad_right(rows, 0, device_of(self.model))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) + past
        inputs = {"position_ids": positions} if "position_ids" in self._parameters else {}
        if states is None:
            return self._body, {"input_ids": ids, **inputs}, mask
        return self._upper, {"inputs_embeds": stack_states(states, ids.device), **inputs}, mask

    @cached_property
    def _body(self) -> Any:
        return body_of(self.model)

    @cached_property
    def _upper(self) -> Any:
        return cut_upper_layers(self.model)

    @cached_property
    def _parameters(self) -> set[str]:
        return set(inspect.signature(self._body.forward).parameters)

    @property
    def _attention(self) -> str | None:
        return getattr(self.model.config.get_text_config(), "_attn_implementation", None)

    @cached_property
    def _output(self) -> OutputLayer:
        return OutputLayer(self.model, self.temperature, self.cells)

    @cached_property
    def _turn(self) -> int | None:
        return rope_turn(self.model)
