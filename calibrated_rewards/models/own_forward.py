"""Read rows of tokens through a model's own forward: encoders, encoder-decoders, all that is no plain decoder.

Heads run in float32 where the model's own code allows it, which the first real inputs show (`fit_precision`). Made-up
tokens are read first, so that a model that cannot be used is refused before its first text (`check_reads`).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.batches import Budget, Padding, progress_bar, read_in_batches
from calibrated_rewards.models.parts import (
    UnreadError,
    body_of,
    check_vocabulary,
    device_of,
    dtype_of,
    for_scoring,
    full_attention_up_to,
    heads_of,
    in_float32,
    pad_right,
    reading_errors,
    rope_turn,
    vocabulary,
)
from calibrated_rewards.models.unchanged import StateKeeper, steady_draws

logger = logging.getLogger(__name__)

# Canine and Funnel read 4 tokens or more. A model that fails at so many fails for another reason.
FEWEST = 16
# Made-up inputs: more tokens than any model needs as a fewest; some fail at lengths that their settings do not divide.
MADE_UP_TOKENS = 17
# Made-up tokens from all over the vocabulary: its first ones are often such as no text has.
STEP = 97
# Numbers as near as this, as a part of the largest, are the same but for rounding. Fresh weights are this insensitive:
# with BERT's, scores of the two inputs are a few millionths apart.
SAME = 1e-7


@dataclass
class Fewest:
    """Fewest tokens of an input that a model reads, as far as inputs have shown it."""

    tokens: int = 1


@dataclass(frozen=True, eq=False)
class OwnForward:
    """A reader of rows of tokens through `model(...)`, which takes one of its outputs."""

    model: nn.Module
    pad_id: int
    budget: Budget
    output: str | int | None = "logits"
    """The model's output: a key, an index, or None for a model that returns the scores themselves."""
    separate: int | None = None
    """A token that rows of one batch must hold equally often: encoder-decoders count EOS tokens."""
    one_by_one: bool = False
    """For a model that finds the end of a row by a padding id, and has none."""
    padding: Padding = field(default_factory=Padding)
    fewest: Fewest = field(default_factory=Fewest)
    state: StateKeeper = field(default_factory=StateKeeper)
    show_progress: bool = True
    lock: Any = field(default_factory=threading.RLock)

    def __call__(self, rows: Sequence[list[int]], types: Sequence[list[int]] | None = None) -> Tensor:
        """Read rows: (n, numbers) in float32 on the CPU. `types` are token types, for pairs."""
        check_vocabulary(list(rows), self.model)
        if self.separate is not None and any(self.separate not in row for row in rows):
            raise ValueError(
                f"an encoder-decoder is read at its EOS token, got an input without id {self.separate}; "
                "Text(append_eos=True) puts it at the end"
            )
        budget = Budget(1) if self.one_by_one else self.budget
        with for_scoring(self.model, self.lock), self._heads(), progress_bar(len(rows), self.show_progress) as bar:
            costs, kinds = list(map(len, rows)), self._kinds(rows)
            forward = partial(self._forward, rows=rows, types=types)
            return torch.stack(read_in_batches(self.model, forward, costs, kinds, budget, self.padding, bar))

    def _kinds(self, rows: Sequence[list[int]]) -> list[int]:
        """Number rows so that those of one batch have as many ends, and lie on one side of each `rope_turn`."""
        turns = [turn for turn in (rope_turn(self.model), full_attention_up_to(self.model)) if turn is not None]
        ends = [0 if self.separate is None else row.count(self.separate) for row in rows]
        return [
            n * (len(turns) + 1) + sum(len(row) > turn for turn in turns) for n, row in zip(ends, rows, strict=True)
        ]

    def _forward(self, at: list[int], rows: Sequence[list[int]], types: Sequence[list[int]] | None) -> list[Tensor]:
        """Read a batch; one that is too short for the model is padded to the fewest tokens that it reads."""
        fewest = max(self.fewest.tokens, *(len(rows[i]) for i in at))
        try:
            return self._numbers(at, rows, types, fewest)
        except UnreadError:
            for tokens in range(fewest + 1, FEWEST + 1):
                with suppress(UnreadError):
                    numbers = self._numbers(at, rows, types, tokens)
                    name = type(self.model).__name__
                    logger.warning("%s does not read %d tokens: inputs are padded to %d", name, fewest, tokens)
                    self.fewest.tokens = tokens
                    return numbers
            raise

    def _numbers(
        self, at: list[int], rows: Sequence[list[int]], types: Sequence[list[int]] | None, fewest: int
    ) -> list[Tensor]:
        device = device_of(self.model)
        ids, mask = pad_right([rows[i] for i in at], self.pad_id, device, fewest)
        extra = {}
        if types is not None:
            extra["token_type_ids"] = pad_right([types[i] for i in at], 0, device, fewest)[0]
        with reading_errors(self.model, ids.shape[1]), steady_draws(device):
            answer = self.state.run(self.model, lambda: self.model(input_ids=ids, attention_mask=mask, **extra))
        return list(pick_output(answer, self.output).float().cpu().reshape(len(at), -1))

    @contextmanager
    def _heads(self) -> Iterator[None]:
        """Replace the heads' forwards by those of their float32 copies, and put them back afterwards."""
        if all(p.dtype == torch.float32 for p in self.model.parameters()):
            yield  # they have float32 input as it is
            return
        with ExitStack() as after:
            for head in heads_of(self.model).values():
                copy = in_float32(head)
                if any(p.dtype == torch.float32 for p in copy.parameters()):
                    after.enter_context(precise(head, copy))
            yield


@contextmanager
def precise(head: nn.Module, copy: nn.Module) -> Iterator[None]:
    """Replace a head's forward by its float32 copy's; a hook would come after its own, which refuses float32 input.

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
    """A forward in float32, whose input is widened first."""

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Widen the input and run the forward."""
        return self.forward(*map(_widened, args), **{name: _widened(value) for name, value in options.items()})


def pick_output(outputs: Any, output: str | int | None) -> Tensor:
    """Pick one of a model's outputs, by key or index; None: they are the scores themselves."""
    if output is None:
        return outputs  # type: ignore[no-any-return]
    if isinstance(outputs, Tensor):
        raise ValueError(
            Message(
                f"the model returns the scores themselves, a tensor, and no output {output!r}: load it with "
                f"{setting('kind', 'multi-attribute')}, without naming an output"
            )
        )
    if isinstance(output, str) and not (isinstance(outputs, Mapping) and output in outputs):
        names = ", ".join(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise ValueError(
            Message(
                f"the model's outputs have no {output!r}, they are: {names}; say "
                f"{setting('output', '...')} which is the score"
            )
        )
    picked = outputs[output]
    if isinstance(picked, list | tuple):  # a tensor for each dimension, side by side
        return torch.cat([each.flatten(1) for each in picked], 1)
    return picked  # type: ignore[no-any-return]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass
class HeadPrecision:
    """The precision that a model's heads bear, by its first real inputs: published code refuses made-up ones."""

    known: bool = False
    float32: bool = True


def fit_precision(reader: OwnForward, rows: Sequence[list[int]], precision: HeadPrecision) -> OwnForward:
    """Return the reader with float32 heads, or, if the model's code fails with them, in the model's own precision."""
    if not precision.known and dtype_of(reader.model) != torch.float32:
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            reader([min(rows, key=len)])
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise
            # Its code goes on to compute with 16 bits.
            replace(reader, model=Whole(reader.model))([min(rows, key=len)])
            precision.float32 = False
    precision.known = True
    return reader if precision.float32 else replace(reader, model=Whole(reader.model))


class Whole(nn.Module):
    """A model disguised as a body without heads, for code that does not bear a head in another precision."""

    base_model_prefix = "inner"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's embeddings, which tell the size of its vocabulary."""
        return body_of(self.inner).get_input_embeddings()  # type: ignore[no-any-return, operator]

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Run the model itself."""
        return self.inner(**inputs)


def check_reads(reader: OwnForward, limit: int) -> None:
    """Refuse a model that does not read token ids alone, or gives the same numbers whatever they are."""
    size = min(vocabulary(reader.model), 2**14)
    end = [] if reader.separate is None else [reader.separate]
    middle = range(1, min(MADE_UP_TOKENS, limit) - 1 - len(end))
    # Their first and last tokens, where heads read, are the same: what is between has to be read from there.
    made_up = [[3 % size, *((first + STEP * i) % size for i in middle), 5 % size] for first in (3, 11)]
    rows = [[(token + 1) % size if token in end else token for token in row] + end for row in made_up]
    # One by one: rows of a batch may be rounded differently, which would pass for having read them.
    one, other = (reader([row]) for row in rows)
    if float((one - other).abs().max()) <= SAME * float(torch.maximum(one.abs(), other.abs()).max()):
        name = type(reader.model).__name__
        raise ValueError(
            f"a reward model gives different inputs different numbers, {name} gives {one[0].tolist()} to two: its "
            "head is empty, or it lacks a kernel without which it reads nothing (MRA outside CUDA)"
        )
