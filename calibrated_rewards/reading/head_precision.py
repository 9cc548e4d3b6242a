"""Run heads in float32 where a model's own code allows it; the first real inputs show whether it does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from calibrated_rewards.reading.body import body_of, dtype_of
from calibrated_rewards.reading.own_forward import OwnForward


@dataclass
class HeadPrecision:
    """What the first real inputs showed. Made-up ids would not do: published code refuses inputs without its tokens."""

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
    """A model as a body without heads, for code that does not bear a head in another precision."""

    base_model_prefix = "inner"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the model."""
        return body_of(self.inner).get_input_embeddings()  # type: ignore[no-any-return, operator]

    def forward(self, **inputs: torch.Tensor) -> Any:
        """What the model gives."""
        return self.inner(**inputs)
