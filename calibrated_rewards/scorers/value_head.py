"""Reward heads beside a language model: in a checkpoint of their own (`ValueHead`), or on the policy (`SharedBase`).

The heads are those of TRL (`v_head`), OpenRLHF (`score`, `value_head`) and others of that shape. `SharedBase` reads a
reward that is one adapter more on the policy's base model: no second copy of the weights.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from calibrated_rewards.models.adapters import activate
from calibrated_rewards.models.checkpoints import Checkpoint
from calibrated_rewards.models.fingerprint import (
    config_digest,
    model_fingerprint,
    settings_digest,
    tokenizer_digest,
    weights_digest,
    weights_with,
)
from calibrated_rewards.models.labels import Difference, Label, Labels
from calibrated_rewards.models.parts import body_of, dtype_of
from calibrated_rewards.models.shared_prefix import ModelReader, ModuleHead, group_of, reader_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.protocol import check_pairs, refuse_pickle, score_with

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What Safe-RLHF adds to the standard deviation that it divides by.
BEAVER_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class ValueHead:
    """A scorer that reads a head, `head(hidden)`, at the last token of the input, in float32.

    Trainers with such heads read them at an EOS token (OpenRLHF writes one after each text, TRL's PPO at the end of
    each response): where texts do not end in one already, `Text(append_eos=True)` says what the head was trained on.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    head: nn.Module
    """From hidden states to one number: a linear layer, or several."""
    text: Text = field(default_factory=Text)
    mean: float = 0.0
    """Taken off the head's value, before it is divided by `std`: OpenRLHF's normalised rewards."""
    std: float = 1.0
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle
    _access = cached_property(reader_of)

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"ValueHead needs std > 0, got std={self.std}")
        model: Any = self.model
        for name in model.active_adapters if hasattr(model, "get_base_model") else ():
            if model.peft_config[name].is_prompt_learning:  # it stands before the body, not in it
                raise ValueError(f"ValueHead needs an adapter in the layers (LoRA, ...), {name!r} is a learned prompt")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(self._scores, self, prompts, completions)

    def _scores(self, prompts: list[Prompt], completions: list[Completion]) -> Float32[np.ndarray, " n"]:
        values = read_head(self._access, self.head, self._access.encode(prompts, completions), prompts)
        if values.ndim != 2 or values.shape[1] != 1:
            raise ValueError(f"a value head gives one number for each input, got shape {tuple(values.shape)}")
        scores: Float32[np.ndarray, " n"] = ((values[:, 0] - self.mean) / self.std).numpy()
        return scores

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on."""
        return {
            "kind": "value head",
            **model_fingerprint(self.model, self.tokenizer),
            "head": {"weights": weights_digest(self.head.state_dict()), "layers": repr(self.head)},
            "normalisation": [self.mean, self.std],
            "text": self._access.text_fingerprint(),
        }


@dataclass(frozen=True, eq=False)
class SharedBase:
    """A scorer made of the policy's base, the reward's adapter and its head, read at the last token.

        policy.load_adapter("my-reward-adapter", "reward")
        reward = SharedBase(policy, tokenizer, load_head(find_checkpoint("my-reward-adapter"), "score"))

    While it scores, the reward's adapter is the active one. Afterwards, also after an error, the active adapters, the
    parameters that are trained and the training mode are what they were. Nothing else may use the model meanwhile.
    """

    policy: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    head: nn.Module
    """From the hidden state at the last token to one number for each label."""
    adapter: str = "reward"
    labels: Labels | None = None
    """The rule that makes one score of several labels; None: the only label, or of two the second's log-odds."""
    text: Text = field(default_factory=Text)
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; halved by itself where memory does not suffice."""
    share_prefixes: bool = True
    show_progress: bool = True

    thread_safe = True  # each call takes the model's lock
    __reduce__ = refuse_pickle

    def __post_init__(self) -> None:
        adapters = sorted(self.policy.peft_config)
        if self.adapter not in adapters:
            raise ValueError(
                f"SharedBase needs an adapter that the policy has, {adapters}, got adapter={self.adapter!r}; "
                "policy.load_adapter(folder, name) adds one"
            )
        if self.policy.peft_config[self.adapter].is_prompt_learning:
            raise ValueError(
                f"SharedBase needs an adapter in the layers (LoRA, ...), {self.adapter!r} is a learned prompt"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """Score each completion of its prompt."""
        return score_with(self._scores, self, prompts, completions)

    def _scores(self, prompts: list[Prompt], completions: list[Completion]) -> Float32[np.ndarray, " n"]:
        numbers = self.logits(prompts, completions)
        if self.labels is None and numbers.shape[1] > 2:
            raise ValueError(f"the head has {numbers.shape[1]} labels: say how they make one score, with labels=")
        default = Label(0) if numbers.shape[1] == 1 else Difference(good=1, bad=0)
        return (self.labels or default)(numbers)

    def logits(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, "n L"]:
        """Return the numbers of all labels."""
        prompts, completions = check_pairs(prompts, completions)
        with self._access.lock:
            ids = self.text.encode(self.tokenizer, prompts, completions, self._access.limit)
            with activate(self.policy, self.adapter):
                return read_head(self._access, self.head, ids, prompts).numpy()

    def fingerprint(self) -> dict[str, Any]:
        """Name all that the scores depend on; not what the policy's other adapters learn."""
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

    @cached_property
    def _access(self) -> ModelReader:
        options = (self.batch_tokens, self.share_prefixes, self.show_progress)
        return ModelReader(self.policy, self.tokenizer, self.text, *options)


def read_head(access: ModelReader, head: nn.Module, ids: list[list[int]], prompts: Sequence[Prompt]) -> torch.Tensor:
    """Read a head behind the body of a model at the last token of each input, `(inputs, numbers)`."""
    # On the device of the body's last layer, whose states it reads.
    last = [p.device for p in body_of(access.model).parameters() if p.device.type != "meta"][-1]
    beside = head if next(head.parameters()).device == last else copy.deepcopy(head).to(last)
    return access.read_last(ModuleHead(beside), ids, [group_of(prompt) for prompt in prompts])


def load_head(checkpoint: Checkpoint, name: str | None = None) -> nn.Module:
    """Load the value head of that name in a checkpoint, or its only one. Between two linear layers there is a ReLU."""
    heads = checkpoint.value_heads
    if name is None and len(heads) == 1:
        name = next(iter(heads))
    if name not in heads:
        raise ValueError(f"{checkpoint.name} needs head= one of its value heads {sorted(heads)}, got {name!r}")
    weights = {key: checkpoint.tensor(key) for key in heads[name]}
    layers = []
    for key in [key for key in weights if weights[key].ndim == 2]:
        weight, bias = weights[key], weights.get(key.removesuffix("weight") + "bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        layer.load_state_dict({"weight": weight, **({"bias": bias} if bias is not None else {})})
        layers.append(layer)
    if len(layers) > 1:
        logger.info("%s: the layers of %s are taken to have a ReLU between them", checkpoint.name, name)
    between = [module for layer in layers for module in (layer, nn.ReLU())][:-1]
    return nn.Sequential(*between).requires_grad_(False).eval()


def choose_auto_class(config: Mapping[str, Any], adapted: bool) -> Any:
    """Choose the class that loads the body: AutoModel, or the language model where AutoModel is another, or none.

    Of BERT's and BART's decoders AutoModel is the encoder with its pooler, or encoder and decoder; of TrOCR's nothing.
    A type that transformers does not know at all is somebody's extension of one that it does, and is loaded as that.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = config.get("model_type")
    unlike = config.get("is_decoder") or (kind in transformers.CONFIG_MAPPING and kind not in MODEL_MAPPING_NAMES)
    own_code = bool(config.get("auto_map"))
    return transformers.AutoModelForCausalLM if adapted or (unlike and not own_code) else transformers.AutoModel


def read_normalisation(checkpoint: Checkpoint, *, beaver: bool = True) -> dict[str, float]:
    """Read the mean and the standard deviation by which a checkpoint says that its head's values are normalised.

    OpenRLHF writes them into config.json. Safe-RLHF (Beaver) keeps a normaliser beside its head, or mean and variance
    in config.json: both are used for rewards, the standard deviation alone for costs, neither for critics.
    """
    config = checkpoint.config
    if config.get("normalize_reward") and "mean" in config:
        return {"mean": float(config["mean"]), "std": float(config["std"])}
    if not config.get("do_normalize") or not beaver:
        return {}
    score_type = config.get("score_type", "reward")
    mean, var = (_read_statistic(checkpoint, name, usual) for name, usual in (("mean", 0.0), ("var", 1.0)))
    return {
        "reward": {"mean": mean, "std": var**0.5 + BEAVER_EPSILON},
        "cost": {"std": var**0.5 + BEAVER_EPSILON},
    }.get(score_type, {})


def _read_statistic(checkpoint: Checkpoint, name: str, usual: float) -> float:
    """Read a number of Safe-RLHF's normaliser: what is stored with the weights counts before what the config says."""
    stored = f"normalizer.{name}"
    value = checkpoint.tensor(stored) if stored in checkpoint.weights else checkpoint.config.get(name)
    numbers = torch.as_tensor(usual if value is None else value, dtype=torch.float64).flatten()
    if len(numbers) != 1:
        raise ValueError(f"{checkpoint.name} has a normaliser of {len(numbers)} numbers, a value head gives one")
    return float(numbers[0])
