"""Score by a preference head on a language model: the policy itself, a frozen copy of it, or one loaded for scoring.

    headed = HeadedModel.from_pretrained("head/")
    scorer = PreferenceHeadScorer(headed)
    sampler = HfSampler(headed.model, headed.tokenizer, decoding, scorer=scorer)   # its completions are scored for free
    frozen = scorer.snapshot()                                                     # before the policy is trained

A policy with a head writes and scores with one model in memory. Where the sampler is given the scorer, the pass that
writes a completion also reads the head, and the scorer keeps that score: asked for it, it runs no second forward.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.headed_model import ADAPTER, HeadedModel, SelectedLayers, name_adapter
from calibrated_rewards.heads.turn_end import TurnEnd, encode_turns
from calibrated_rewards.models.adapters import active_adapters, adapter_layers, ignore_peft_warning
from calibrated_rewards.models.fingerprint import (
    config_digest,
    settings_digest,
    tokenizer_digest,
    weights_digest,
    weights_with,
)
from calibrated_rewards.models.parts import body_of, dtype_of, for_scoring, lock_of, without_peft
from calibrated_rewards.models.shared_prefix import Decoder, ModelReader, ModuleHead, Row, group_of
from calibrated_rewards.models.text import NO_LIMIT
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import refuse_pickle, score_with

# Rows that are read again to check the scores of the pass that wrote them, and how far apart the two may be, for a
# score of size 1: 16 bits round by the shape of a batch.
CHECKED_ROWS = 4
AGREEMENT, AGREEMENT_16_BIT = 1e-3, 0.2


@dataclass
class Memory:
    """Scores of inputs that were read as they were written, the latest ones, by a digest of their tokens."""

    most: int
    version: Any = None
    """Of the weights that gave them: other weights give other scores."""
    scores: "OrderedDict[bytes, np.ndarray]" = field(default_factory=OrderedDict)
    used: int = 0
    """How many scores were asked for and found here."""

    def add(self, rows: Sequence[list[int]], scores: Float32[np.ndarray, "n names"], version: Any) -> None:
        """Keep the scores of some inputs; drop those of other weights, and the oldest beyond `most`."""
        self.check(version)
        for row, own in zip(rows, scores, strict=True):
            self.scores[digest(row)] = own
        while len(self.scores) > self.most:
            self.scores.popitem(last=False)

    def find(self, rows: Sequence[list[int]], version: Any) -> "list[np.ndarray | None]":
        """Find the scores of inputs; None for an input that is not here."""
        self.check(version)
        answer = [self.scores.get(digest(row)) if self.scores else None for row in rows]
        self.used += sum(each is not None for each in answer)
        return answer

    def check(self, version: Any) -> None:
        """Forget all if the weights are others."""
        if version != self.version:
            self.scores.clear()
            self.version = version


def digest(row: Sequence[int]) -> bytes:
    """Digest the tokens of an input.

    >>> digest([1, 2, 3]) == digest((1, 2, 3)) != digest([1, 2])
    True
    """
    return blake2b(np.asarray(row, np.int64).tobytes(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class PreferenceHeadScorer:
    """A scorer that reads a preference head at the end of the assistant's turn, in float32.

    While it reads, the head's own adapter is the only active one, or none for a head on a frozen backbone: of a policy
    that is trained by LoRA, the scores stay as they are. Of a policy all of whose weights are trained they drift with
    it, and so do those of its own adapter if that is what is trained: take a `snapshot` first.
    """

    headed: HeadedModel
    """The language model, with its head."""
    name: str | None = None
    """One of the head's names; None: its only one."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    share_prefixes: bool = True
    show_progress: bool = True
    most_kept: int = 65_536
    """Scores that are kept of the completions which a sampler with this scorer wrote in its last call."""

    thread_safe = True  # each call takes the model's lock
    reads_messages = True
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        names = self.headed.head.names
        if self.name is None and len(names) > 1:
            raise ValueError(Message(f"the head has the names {', '.join(names)}: say which, {setting('name')}"))
        if self.name is not None and self.name not in names:
            got = setting("name", repr(self.name), option=f"--option name={self.name}")
            raise ValueError(Message(f"the head has the names {', '.join(names)}, got {got}"))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(self._scores, self, prompts, completions)

    def _scores(self, prompts: list[Prompt], completions: list[Completion]) -> Float32[np.ndarray, " n"]:
        return self.logits(prompts, completions)[:, self._column]

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n names"]:
        """Return the scores under all names of the head."""
        with lock_of(self.model):
            rows = self.encode(prompts, completions)
            kept = self.memory.find(rows, self._version)
            missing = [i for i, own in enumerate(kept) if own is None]
            if missing:
                groups = [group_of(prompts[i]) for i in missing]
                fresh = self._read([rows[i] for i in missing], groups)
                for i, own in zip(missing, fresh, strict=True):
                    kept[i] = own
        return np.stack(kept).astype(np.float32)  # type: ignore[arg-type]

    def encode(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Encode pairs as rows that end in the end-of-turn token, at which the head reads."""
        return self._encode(prompts, completions, self._access.limit)

    def _encode(self, prompts: Sequence[Prompt], completions: Sequence[Completion], limit: int) -> list[list[int]]:
        text = self.headed.settings.text
        with lock_of(self.model):  # fast tokenizers do not bear two threads
            return encode_turns(self.tokenizer, text, self.turn_end, prompts, completions, limit)

    def _read(self, rows: list[list[int]], groups: Sequence[Any]) -> Float32[np.ndarray, "n names"]:
        """Read rows at their last token, by a forward of their own."""
        with self.headed.activate():
            numbers = self._decoder([Row(row, [len(row) - 1]) for row in rows], groups)
        return torch.cat(numbers).numpy()

    @property
    def _decoder(self) -> Decoder:
        decoder = self._access.decoder(ModuleHead(self.headed.head))
        if self.headed.settings.layers == (-1,):
            return decoder
        return replace(decoder, body=SelectedLayers(decoder.body, self.headed.head))

    # Of use to the sampler that writes with the same model.

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states the head reads, as indices into `hidden_states`."""
        return self.headed.settings.layers

    def reads(self, model: Any) -> bool:
        """Tell if what a model writes with, its active adapters included, is what the head reads."""
        if body_of(model) is not body_of(self.model):
            return False
        own = without_peft(model)
        carrier = self.model if hasattr(self.model, "peft_config") else own
        if not hasattr(carrier, "peft_config"):
            return True
        merged = any(getattr(layer, "merged_adapters", ()) for layer in adapter_layers(carrier).values())
        return not merged and {*active_adapters(carrier)} == {*self._adapters}

    def encode_whole(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Encode pairs as `encode` does, however long they are."""
        return self._encode(prompts, completions, NO_LIMIT)

    def forget(self) -> None:
        """Drop the scores that were kept."""
        with lock_of(self.model):
            self.memory.scores.clear()

    def keep(self, rows: Sequence[list[int]], states: Float[Tensor, "n features"]) -> None:
        """Keep the scores of inputs that end in the end-of-turn token, of the states that were read there."""
        with for_scoring(self.model, lock_of(self.model)):
            scores = ModuleHead(self.headed.head)(states.float(), torch.full((len(rows),), -1)).float().cpu().numpy()
            self.memory.add(rows, scores, self._version)

    def measure_gap(self, rows: Sequence[list[int]], states: Float[Tensor, "n features"]) -> float:
        """Measure how far scores of some states are from those of a separate forward, for scores of size 1."""
        # From all over the batch: prompts are of several lengths, and the longest, which come first, are not padded.
        at = np.unique(np.linspace(0, len(rows) - 1, CHECKED_ROWS).astype(int)).tolist()
        rows, states = [rows[i] for i in at], states[at]
        with for_scoring(self.model, lock_of(self.model)):
            scores = ModuleHead(self.headed.head)(states.float(), torch.full((len(rows),), -1)).float().cpu()
            again = np.concatenate([self._read([row], [i]) for i, row in enumerate(rows)])
        gap: float = np.abs(scores.numpy() - again).max() / max(1.0, float(np.abs(again).max()))
        return float(gap)

    @property
    def largest_gap(self) -> float:
        """The gap up to which both ways agree, for the precision of the model."""
        exact = torch.get_float32_matmul_precision() == "highest" and dtype_of(self.model) in (
            torch.float32,
            torch.float64,
        )
        return AGREEMENT if exact else AGREEMENT_16_BIT

    def snapshot(self) -> "PreferenceHeadScorer":
        """Return a scorer whose scores stay as they are now while the policy is trained.

        A policy with PEFT adapters is not copied: a frozen backbone is read without them, and of the head's own adapter
        there is a copy, which is never trained. Any other model is copied whole.
        """
        model, head = self.model, copy.deepcopy(self.headed.head).requires_grad_(False).eval()
        if not hasattr(model, "peft_config"):
            model = copy.deepcopy(model).requires_grad_(False).eval()
            return replace(self, headed=HeadedModel(model, self.tokenizer, head))
        trained = [n for n, p in model.named_parameters() if p.requires_grad and not _is_of_adapter(n, model)]
        if trained:
            raise ValueError(
                f"a snapshot of a policy with adapters needs a base that is not trained, got {trained[0]} and "
                f"{len(trained) - 1} other weights that are: take the snapshot of the model without adapters"
            )
        adapter = self.headed.adapter
        if adapter is None:
            return replace(self, headed=HeadedModel(model, self.tokenizer, head))
        return replace(self, headed=HeadedModel(model, self.tokenizer, head, copy_adapter(model, adapter)))

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on; not what the policy's other adapters learn."""
        model, adapters = self.model, {*self._adapters}
        weights = weights_with(model, adapters) if hasattr(model, "peft_config") else model.state_dict()
        plain = {_plain_name(name, adapters): weight for name, weight in weights.items()}
        settings = self.headed.settings
        head = {name: getattr(settings, name) for name in ("pooler", "layers", "names", "pooler_size")}
        return {
            "kind": "preference head",
            "model": type(without_peft(model)).__name__,
            "weights": weights_digest(plain),
            "adapters": [settings_digest(model.peft_config[name].to_dict()) for name in sorted(adapters)],
            "config": config_digest(model.config),
            "head": {"weights": weights_digest(self.headed.head.state_dict()), **head, "layers": list(settings.layers)},
            "name": self.headed.head.names[self._column],
            "end_token": self.turn_end.token,
            "dtype": str(dtype_of(model)).removeprefix("torch."),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "text": {**settings.text.fingerprint(self.tokenizer), "max_length": self._access.limit},
        }

    @property
    def model(self) -> Any:
        """The language model, with the adapters that it carries."""
        return self.headed.model

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self.headed.tokenizer

    @cached_property
    def turn_end(self) -> TurnEnd:
        """The token at which the head reads."""
        return self.headed.turn_end

    @cached_property
    def memory(self) -> Memory:
        """The scores that a sampler's own passes have given."""
        return Memory(self.most_kept)

    @property
    def _adapters(self) -> list[str]:
        """The adapters that are active while the head reads."""
        return [] if self.headed.adapter is None else [self.headed.adapter]

    @property
    def _column(self) -> int:
        return 0 if self.name is None else self.headed.head.names.index(self.name)

    @property
    def _version(self) -> tuple[int, ...]:
        """A number for each state of the weights: in-place changes count up, others move the memory."""
        parts = [*self.model.parameters(), *self.headed.head.parameters()]
        return (len(parts), sum(_count_changes(part) for part in parts), sum(part.data_ptr() for part in parts))

    @cached_property
    def _access(self) -> ModelReader:
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        return ModelReader(self.model, self.tokenizer, self.headed.settings.text, *options)


def copy_adapter(model: Any, adapter: str) -> str:
    """Copy an adapter of a PEFT model under a new name, not to be trained; all else about the model stays."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = name_adapter(model)
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = [part for part in model.modules() if part.training]
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in adapter_layers(model).values()]
    weights = {
        key: each.detach().clone() for key, each in get_peft_model_state_dict(model, adapter_name=adapter).items()
    }
    with ignore_peft_warning():
        model.add_adapter(name, copy.deepcopy(model.peft_config[adapter]))
        set_peft_model_state_dict(model, weights, adapter_name=name)
    for parameter in model.parameters():
        parameter.requires_grad_(trained.get(parameter, False))
    for layer, active, disabled in before:
        layer._active_adapter, layer._disable_adapters = active, disabled
    for part in training:
        part.training = True
    return name


def _is_of_adapter(name: str, model: Any) -> bool:
    return any(f".{adapter}." in name or name.endswith(f".{adapter}") for adapter in model.peft_config)


def _plain_name(name: str, adapters: set[str]) -> str:
    """Name a weight as without PEFT's wrapper, and an adapter's whatever the adapter is called."""
    for adapter in adapters:
        name = name.replace(f".{adapter}.", f".{ADAPTER}.")
    return name.removeprefix("base_model.model.")


def _count_changes(part: Tensor) -> int:
    return 0 if part.is_inference() else part._version
