"""A reward model that is one adapter more on the policy's own base model: no second copy of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from calibrated_rewards.models.fingerprint import (
    adapter_layers,
    config_digest,
    settings_digest,
    tokenizer_digest,
    weights_digest,
    weights_with,
)
from calibrated_rewards.models.labels import Difference, Label, Labels
from calibrated_rewards.models.parts import body_of, dtype_of
from calibrated_rewards.models.shared_prefix import ModelReader, ModuleHead, Row, group_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired
from calibrated_rewards.scorers.value_head import beside

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class SharedBase:
    """Scores with the policy's base, the reward's adapter and its head, read at the last token.

        policy.load_adapter("my-reward-adapter", "reward")
        reward = SharedBase(policy, tokenizer, head_from(checkpoint("my-reward-adapter"), "score"))

    While it scores, the reward's adapter is the active one. Afterwards, also after an error, the active adapters, the
    parameters that are trained and the training mode are what they were. Nothing else may use the model meanwhile.
    """

    policy: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    head: nn.Module
    """From the hidden state at the last token to one number for each label."""
    adapter: str = "reward"
    labels: Labels | None = None
    """How several labels make one score; None: the only label, or of two the second's log-odds."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock

    def __post_init__(self) -> None:
        known = sorted(self.policy.peft_config)
        if self.adapter not in known:
            raise ValueError(
                f"SharedBase needs an adapter that the policy has, {known}, got adapter={self.adapter!r}; "
                "policy.load_adapter(folder, name) adds one"
            )
        if self.policy.peft_config[self.adapter].is_prompt_learning:
            raise ValueError(
                f"SharedBase needs an adapter in the layers (LoRA, ...), {self.adapter!r} is a learned prompt"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        prompts, completions = paired(prompts, completions)
        if not prompts:
            return np.empty(0, np.float32)
        numbers = self.logits(prompts, completions)
        if self.labels is None and numbers.shape[1] > 2:
            raise ValueError(f"the head has {numbers.shape[1]} labels: say how they make one score, with labels=")
        default = Label(0) if numbers.shape[1] == 1 else Difference(good=1, bad=0)
        return finite((self.labels or default)(numbers), prompts, completions, name_of(self))

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """The numbers of all labels."""
        prompts, completions = paired(prompts, completions)
        with self._access.lock:
            ids = self.text.encode(self.tokenizer, prompts, completions, self._access.limit)
            rows = [Row(row, [len(row) - 1]) for row in ids]
            with active(self.policy, self.adapter):
                decoder = self._access.decoder(ModuleHead(beside(body_of(self.policy), self.head)))
                return torch.cat(decoder(rows, [group_of(prompt) for prompt in prompts])).numpy()

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on; not what the policy's other adapters learn."""
        return {
            "kind": "shared base",
            "model": type(self.policy.get_base_model()).__name__,
            "weights": weights_digest(weights_with(self.policy, {self.adapter})),
            "adapter": settings_digest(self.policy.peft_config[self.adapter].to_dict()),
            "config": config_digest(self.policy.config),
            "head": {"weights": weights_digest(self.head.state_dict()), "layers": repr(self.head)},
            "dtype": str(dtype_of(self.policy)).removeprefix("torch."),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "labels": repr(self.labels),
            "text": {**self.text.fingerprint(self.tokenizer), "max_length": self._access.limit},
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @cached_property
    def _access(self) -> ModelReader:
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        return ModelReader(self.policy, self.tokenizer, self.text, *options)


@contextmanager
def active(model: nn.Module, adapter: str) -> Iterator[None]:
    """One adapter alone is active while it runs, and enabled even within `disable_adapter()`; then all is as before."""
    layers = list(adapter_layers(model).values())
    merged = sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(
            f"adapter {adapter!r} needs the base as it was, {merged} is merged into it: unmerge_adapter() first"
        )
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            # Not through set_adapter(): that also decides which parameters are trained, behind the optimiser's back.
            layer._active_adapter = [adapter] if adapter in layer._get_available_adapters() else []
            layer._disable_adapters = False
        yield
    finally:
        for layer, names, disabled in before:
            layer._active_adapter, layer._disable_adapters = names, disabled
