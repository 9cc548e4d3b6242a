"""Encoder-decoders as judges: the logits of the first token that the decoder writes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from calibrated_rewards.models.own_forward import precise
from calibrated_rewards.models.parts import in_float32, unwrapped
from calibrated_rewards.models.reader import Access


class FirstToken(nn.Module):
    """A model as one that gives the logits of some tokens in the first place of its answer, head in float32."""

    base_model_prefix = "inner"

    def __init__(self, inner: Any, tokens: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.config, self.tokens = inner, inner.config, list(tokens)
        if self.config.decoder_start_token_id is None:
            raise ValueError(
                f"{type(inner).__name__} needs a decoder_start_token_id in its config, with which its answers begin"
            )

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the model."""
        return self.inner.get_input_embeddings()  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(inputs, tokens)."""
        start = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
        head = self.inner.get_output_embeddings()
        with precise(head, in_float32(head)):
            outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start)
        return outputs.logits[:, 0, self.tokens]  # type: ignore[no-any-return]


def is_encoder_decoder(model: Any) -> bool:
    """Return whether an encoder reads the input and a decoder writes the answer: T5, BART."""
    return bool(unwrapped(model).config.is_encoder_decoder)


def read_first_token(access: Access, rows: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
    """Read the logits of these tokens at the first place of the answer to each row, `(n, tokens)`."""
    reader = access.own_forward(access.pad, output=None)
    return replace(reader, model=FirstToken(unwrapped(access.model), tokens))(rows)
