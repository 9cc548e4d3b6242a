"""A model read through its own forward, head in float32: encoders, encoder-decoders, all that is built otherwise."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibrated_rewards.reading.batches import Budget, progress
from calibrated_rewards.reading.body import (
    check_vocabulary,
    device_of,
    dtype_of,
    for_scoring,
    heads_of,
    in_float32,
    right_padded,
    rope_turn,
)

logger = logging.getLogger(__name__)

# How far a row's numbers may be from those it has alone, when it is padded: parts of the largest number.
AGREEMENT = {torch.float32: 1e-4}
AGREEMENT_16_BIT = 0.1
# Models that pool by fours are disturbed at three lengths of four: rows of several lengths are looked at.
CHECKED_ROWS = 8


@dataclass
class Padding:
    """Whether rows are padded: decided on the first rows that would be, by comparison with the same rows alone."""

    allowed: bool = True
    checked: int = 0
    """How many rows were compared."""


@dataclass(frozen=True, eq=False)
class OwnForward:
    """Reads rows of tokens through `model(...)`, and takes one of its outputs."""

    model: nn.Module
    pad_id: int
    budget: Budget
    output: str | int | None = "logits"
    """Which of the model's outputs: a key, an index, or None for a model that returns the scores themselves."""
    separate: int | None = None
    """A token that rows of one batch must hold equally often: encoder-decoders count EOS tokens."""
    one_by_one: bool = False
    """For a model that finds the end of a row by a padding id, and has none."""
    padding: Padding = field(default_factory=Padding)
    show_progress: bool = True
    lock: Any = field(default_factory=threading.RLock)

    def __call__(self, rows: Sequence[list[int]], types: Sequence[list[int]] | None = None) -> Tensor:
        """(n, numbers) in float32 on the CPU; `types` are token types, for pairs."""
        check_vocabulary(list(rows), self.model)
        self._check_ends(rows)
        found: list[Tensor | None] = [None] * len(rows)
        kinds = list(map(self._kind, rows))
        budget = Budget(1) if self.one_by_one else self.budget
        with for_scoring(self.model, self.lock), self._heads(), progress(len(rows), self.show_progress) as bar:
            costs = list(map(len, rows))
            for batch in budget.batches(costs, kinds):
                for piece in self._pieces(batch, rows, types):
                    answer = budget.run(lambda at: self._forward(at, rows, types), piece, costs)
                    for i, numbers in zip(piece, answer, strict=True):
                        found[i] = numbers
                bar.update(len(batch))
        return torch.stack([numbers for numbers in found if numbers is not None])

    def _kind(self, row: list[int]) -> int:
        """Rows of one batch are of one kind: as many ends, and on one side of where rotary angles change."""
        turn, ends = rope_turn(self.model), 0 if self.separate is None else row.count(self.separate)
        return 2 * ends + (turn is not None and len(row) > turn)

    def _pieces(
        self, batch: list[int], rows: Sequence[list[int]], types: Sequence[list[int]] | None
    ) -> Iterator[list[int]]:
        """The batch as it is; for a model that padding disturbs, its rows by length, which are not padded."""
        lengths = [len(rows[i]) for i in batch]
        if min(lengths) < max(lengths) and self.padding.allowed and self.padding.checked < CHECKED_ROWS:
            # One row of each of several lengths, the longest among them.
            chosen = list({len(rows[i]): i for i in batch}.values())[:CHECKED_ROWS]
            self.padding.allowed = self._bears_padding(chosen, rows, types)
            self.padding.checked += len(chosen)
        if self.padding.allowed:
            return iter([batch])
        return ([i for i in batch if len(rows[i]) == n] for n in sorted(set(lengths)))

    def _bears_padding(self, chosen: list[int], rows: Sequence[list[int]], types: Sequence[list[int]] | None) -> bool:
        costs = list(map(len, rows))
        together = torch.stack(self.budget.run(lambda at: self._forward(at, rows, types), chosen, costs))
        alone = torch.cat([torch.stack(self._forward([i], rows, types)) for i in chosen])
        apart = float((together - alone).abs().max() / alone.abs().max().clamp(min=1e-30))
        if not apart <= AGREEMENT.get(dtype_of(self.model), AGREEMENT_16_BIT):  # nan agrees with nothing
            name = type(self.model).__name__
            logger.warning("%s gives numbers %.1e apart in a padded batch: not padding", name, apart)
            return False
        return True

    def _check_ends(self, rows: Sequence[list[int]]) -> None:
        if self.separate is not None and any(self.separate not in row for row in rows):
            raise ValueError(
                f"an encoder-decoder is read at its EOS token, got an input without id {self.separate}; "
                "Text(append_eos=True) puts it at the end"
            )

    def _forward(self, at: list[int], rows: Sequence[list[int]], types: Sequence[list[int]] | None) -> list[Tensor]:
        device = device_of(self.model)
        ids, mask = right_padded([rows[i] for i in at], self.pad_id, device)
        extra = {"token_type_ids": right_padded([types[i] for i in at], 0, device)[0]} if types is not None else {}
        numbers = taken(run_forward(self.model, input_ids=ids, attention_mask=mask, **extra), self.output).float().cpu()
        return list(numbers.reshape(len(at), -1))

    @contextmanager
    def _heads(self) -> Iterator[None]:
        """While it runs, the heads' answers are those of their float32 copies; then they are the model's own again."""
        with ExitStack() as after:
            for head in heads_of(self.model).values():
                copy = in_float32(head)
                if any(p.dtype == torch.float32 for p in copy.parameters()):
                    after.enter_context(precise(head, copy))
            yield


@contextmanager
def precise(head: nn.Module, copy: nn.Module) -> Iterator[None]:
    """A head whose forward is its float32 copy's: a hook would come after its own, which refuses float32 input.

    A copy that is the head itself, in float32 behind a body of 16 bits, has its input widened.
    """
    before = vars(head).get("forward")
    vars(head)["forward"] = Precise(head.forward if copy is head else copy)
    try:
        yield
    finally:
        del vars(head)["forward"]
        if before is not None:
            vars(head)["forward"] = before


@dataclass(frozen=True)
class Precise:
    """A forward in float32: its input is widened first."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The answer to the same input."""
        return self.forward(*map(_widened, args), **{name: _widened(value) for name, value in options.items()})


def run_forward(model: nn.Module, **inputs: Tensor) -> Any:
    """Run the model; an input that its own code refuses is a ValueError with the model's name, and says what to do."""
    try:
        return model(**inputs)
    except (ValueError, AssertionError, LookupError, TypeError, AttributeError) as error:
        name = type(getattr(model, "inner", model)).__name__
        raise ValueError(
            f"{name} does not read an input of {inputs['input_ids'].shape[1]} tokens: {type(error).__name__}: {error}. "
            "A model that looks for the tokens of its chat template needs prompts that are lists of messages, or "
            "chat=True for prompts that are text (--option chat=true), and a max_length that leaves these tokens in"
        ) from error


def taken(outputs: Any, output: str | int | None) -> Tensor:
    """One of a model's outputs, by key, index, or as it is."""
    if output is None:
        return outputs  # type: ignore[no-any-return]
    if isinstance(outputs, Tensor):
        raise ValueError(
            f"the model returns the scores themselves, a tensor, and no output {output!r}: load it as the kind "
            "multi-attribute (--kind multi-attribute) without naming an output; MultiAttribute(..., output=None)"
        )
    if isinstance(output, str) and not (isinstance(outputs, Mapping) and output in outputs):
        known = ", ".join(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"the model's outputs have no {output!r}, they are: {known}; say output=... which is the score"
        )
    return outputs[output]  # type: ignore[no-any-return]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
