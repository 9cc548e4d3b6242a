"""Heads over the vocabulary, in float32: the next token's logits, and the log-probability of the token that follows.

`logits_of` makes the head of a decoder; `read_first_token` reads the first token that an encoder-decoder writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from calibrated_rewards.models.batches import Budget
from calibrated_rewards.models.own_forward import precise
from calibrated_rewards.models.parts import body_of, device_of, dtype_of, for_scoring, in_float32, unwrap, vocabulary
from calibrated_rewards.models.shared_prefix import Decoder, Head, ModelReader, Row, Sharing
from calibrated_rewards.models.unchanged import StateKeeper

# Logits that LogProbability holds at a time: 256 MB.
CELLS = 2**26
# How near a head has to come to the model's own forward, of its largest logit. 16 bits round each logit.
NEAR = {torch.float32: 1e-4}
NEAR_16_BIT = 0.05


@dataclass(frozen=True, eq=False)
class Logits:
    """A head: the logits of the next token as the model's own forward makes them, of all tokens or of some."""

    model: Any
    """The causal LM; its output layer is looked up and read anew at each call, for it may be in training."""
    tokens: tuple[int, ...] | None = None
    """Outputs of the layer to give; None: all."""
    scale: float = 1.0
    """Factor that the model has for its logits (Cohere, Granite)."""
    cap: float | None = None
    """Bound that the model has for its logits (Gemma)."""

    def __call__(self, hidden: Tensor, following: Tensor, /) -> Tensor:
        """Compute the logits, whatever follows."""
        return self.of(self.layer, hidden)

    @property
    def layer(self) -> nn.Module:
        """The output layer as it is now, in float32; of a plain one, these tokens' rows alone are copied."""
        layer = output_layer(self.model)
        if self.tokens is None:
            return in_float32(layer)
        at = list(self.tokens)
        if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
            return nn.Sequential(in_float32(layer), Columns(at))
        few = nn.Linear(layer.in_features, len(at), layer.bias is not None, device="meta")
        few.weight = nn.Parameter(layer.weight.detach()[at].float(), requires_grad=False)
        if layer.bias is not None:
            few.bias = nn.Parameter(layer.bias.detach()[at].float(), requires_grad=False)
        return few

    def of(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Compute the logits by this layer."""
        logits = layer(hidden.to(next(layer.parameters()).device))
        if self.scale != 1:  # a product with 1 would be one more tensor of the size of all logits
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True, eq=False)
class LogProbability:
    """A head: the log-probability of the token that follows; some positions at a time, for vocabularies are large."""

    logits: Logits
    size: int
    """Tokens of the vocabulary."""
    cells: int = CELLS

    def __call__(self, hidden: Tensor, following: Tensor, /) -> Tensor:
        """Compute log_softmax(logits)[following], (n, 1)."""
        some = max(1, self.cells // self.size)
        starts = range(0, len(hidden), some)
        layer = self.logits.layer
        return torch.cat([self._part(layer, hidden[i : i + some], following[i : i + some]) for i in starts])

    def _part(self, layer: nn.Module, hidden: Tensor, following: Tensor) -> Tensor:
        logits = self.logits.of(layer, hidden)
        chosen = logits.gather(1, following.to(logits.device)[:, None])
        return chosen - logits.logsumexp(1, keepdim=True)


def logits_of(model: Any, lock: Any, tokens: Sequence[int] | None = None) -> Logits:
    """Make the head that a language model ends in; its scale is measured, for models name it in many ways."""
    chosen = None if tokens is None else tuple(tokens)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    read, expected = _read_both(model, Logits(model, chosen), lock, tokens)
    # Behind a learned prompt the model's own forward gives more, which check_head refuses.
    head = Logits(model, chosen, _scale(read, expected, cap) if read.shape == expected.shape else 1.0, cap)
    check_head(model, head, lock, tokens)
    return head


def output_layer(model: Any) -> nn.Module:
    """Return the layer from hidden states to the vocabulary."""
    layer = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
    if layer is None or body_of(model) is model:
        raise TypeError(
            f"a language model has a body and an output layer, {type(model).__name__} lacks one: got no causal LM"
        )
    return layer  # type: ignore[no-any-return]


def check_head(model: Any, head: Head, lock: Any, columns: Sequence[int] | None = None) -> None:
    """Refuse a head that, behind the model's body, does not give what the model's own forward gives first."""
    read, expected = _read_both(model, head, lock, columns)
    largest = float(expected.abs().max())
    near = NEAR.get(dtype_of(model), NEAR_16_BIT) * largest
    apart = float((read - expected).abs().max()) if read.shape == expected.shape else float("inf")
    if not apart <= near:
        raise ValueError(
            f"body and head of {type(model).__name__} have to give what its own forward gives, got logits {apart:.1e} "
            f"apart (the largest is {largest:.1e}): score with a callable of yours that runs its forward"
        )


def _read_both(model: Any, head: Head, lock: Any, columns: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Read a few tokens by body and head, and by the model's own forward."""
    few = min(32, vocabulary(model))
    ids = [i % few for i in range(3, 12)]
    decoder = Decoder(model, body_of(model), head, Budget(64), Sharing(False), show_progress=False, lock=lock)
    read = decoder([Row(ids, list(range(len(ids))))], [0])[0]
    with for_scoring(model, lock):
        row = torch.tensor([ids], device=device_of(model))
        expected = StateKeeper().run(model, lambda: model(input_ids=row))[0][0].float().cpu()
    if expected.isnan().any():
        raise ValueError(f"{type(model).__name__} gives nan for a few tokens: look for nan among its weights")
    return read, expected if columns is None else expected[:, list(columns)]


class Columns(nn.Module):
    """A layer that picks some columns of its input."""

    def __init__(self, at: list[int]) -> None:
        super().__init__()
        self.at = at

    def forward(self, logits: Tensor) -> Tensor:
        """Pick the columns."""
        return logits[:, self.at]


def _scale(read: Tensor, expected: Tensor, cap: float | None) -> float:
    """Measure the factor between the layer's outputs and the model's logits, before it bounds them."""
    if cap is not None:
        inside = expected.abs() < 0.5 * cap
        read, expected = read[inside], cap * torch.atanh(expected[inside] / cap)
    read, expected = read.double().flatten(), expected.double().flatten()
    scale = float(read @ expected) / max(float(read @ read), 1e-30)
    # 16 bits leave this much doubt, and no model scales by so little.
    return 1.0 if abs(scale - 1) < 0.01 else scale


class FirstToken(nn.Module):
    """An encoder-decoder as a model that gives the logits of some tokens at the start of its answer, in float32."""

    base_model_prefix = "inner"

    def __init__(self, inner: Any, tokens: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.config, self.tokens = inner, inner.config, list(tokens)
        if self.config.decoder_start_token_id is None:
            raise ValueError(
                f"{type(inner).__name__} needs a decoder_start_token_id in its config, with which its answers begin"
            )

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's embeddings, which tell the size of its vocabulary."""
        return self.inner.get_input_embeddings()  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the logits, (inputs, tokens)."""
        start = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
        head = self.inner.get_output_embeddings()
        with precise(head, in_float32(head)):
            outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start)
        return outputs.logits[:, 0, self.tokens]  # type: ignore[no-any-return]


def is_encoder_decoder(model: Any) -> bool:
    """Return whether an encoder reads the input and a decoder writes the answer: T5, BART."""
    return bool(unwrap(model).config.is_encoder_decoder)


def read_first_token(access: ModelReader, rows: Sequence[list[int]], tokens: Sequence[int]) -> Tensor:
    """Read the logits of these tokens at the first place of the answer to each row, `(n, tokens)`."""
    reader = access.own_forward(access.pad, output=None)
    return replace(reader, model=FirstToken(unwrap(access.model), tokens))(rows)
