"""A language model with a value head: TRL's `v_head`, OpenRLHF's `score` or `value_head`, and others of that shape."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32
from torch import nn

from calibrated_rewards.models.checkpoints import Checkpoint
from calibrated_rewards.models.fingerprint import model_fingerprint, weights_digest
from calibrated_rewards.models.parts import body_of
from calibrated_rewards.models.shared_prefix import ModelReader, ModuleHead, Row, group_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Completion, Prompt
from calibrated_rewards.scorers.lazy import in_memory
from calibrated_rewards.scorers.protocol import finite, name_of, paired

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What Safe-RLHF adds to the standard deviation that it divides by.
BEAVER_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class ValueHead:
    """Scores with a head, `head(hidden)`, at the last token of the input, in float32.

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

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"ValueHead needs std > 0, got std={self.std}")
        no_learned_prompt(self.model)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Float32[np.ndarray, " n"]:
        """The score of each pair."""
        prompts, completions = paired(prompts, completions)
        if not prompts:
            return np.empty(0, np.float32)
        ids = self._access.encode(prompts, completions)
        rows = [Row(row, [len(row) - 1]) for row in ids]
        decoder = self._access.decoder(ModuleHead(beside(body_of(self.model), self.head)))
        values = torch.cat(decoder(rows, [group_of(prompt) for prompt in prompts]))
        scores = ((only(values) - self.mean) / self.std).numpy()
        return finite(scores, prompts, completions, name_of(self))

    def fingerprint(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "kind": "value head",
            **model_fingerprint(self.model, self.tokenizer),
            "head": {"weights": weights_digest(self.head.state_dict()), "layers": repr(self.head)},
            "normalisation": [self.mean, self.std],
            "text": self._access.text_fingerprint(),
        }

    def __reduce__(self) -> NoReturn:
        in_memory(self)

    @cached_property
    def _access(self) -> ModelReader:
        return ModelReader(
            self.model, self.tokenizer, self.text, self.batch_tokens, self.share_prefixes, self.show_progress
        )


def only(values: torch.Tensor) -> torch.Tensor:
    """The one number that a head gives for each input."""
    if values.ndim != 2 or values.shape[1] != 1:
        raise ValueError(f"a value head gives one number for each input, got shape {tuple(values.shape)}")
    return values[:, 0]


def beside(body: nn.Module, head: nn.Module) -> nn.Module:
    """The head, or a copy of it, on the device of the body's last layer, whose states it reads."""
    last = [p.device for p in body.parameters() if p.device.type != "meta"][-1]
    return head if next(head.parameters()).device == last else copy.deepcopy(head).to(last)


def no_learned_prompt(model: Any) -> None:
    """Refuse a PEFT model whose active adapter is a learned prompt, which stands before the body, not in it."""
    for name in model.active_adapters if hasattr(model, "get_base_model") else ():
        if model.peft_config[name].is_prompt_learning:
            raise ValueError(f"ValueHead needs an adapter in the layers (LoRA, ...), {name!r} is a learned prompt")


def head_from(checkpoint: Checkpoint, name: str | None = None) -> nn.Module:
    """The value head of that name in a checkpoint, or its only one. Between two linear layers there is a ReLU."""
    heads = checkpoint.value_heads
    if name is None and len(heads) == 1:
        name = next(iter(heads))
    if name not in heads:
        raise ValueError(f"{checkpoint.name} needs head= one of its value heads {sorted(heads)}, got {name!r}")
    weights = {key: checkpoint.tensor(key) for key in heads[name]}
    layers = [_linear(weights, key) for key in weights if weights[key].ndim == 2]
    if len(layers) > 1:
        logger.info("%s: the layers of %s are taken to have a ReLU between them", checkpoint.name, name)
    between = [module for layer in layers for module in (layer, nn.ReLU())][:-1]
    return nn.Sequential(*between).requires_grad_(False).eval()


def auto_class(config: Mapping[str, Any], adapted: bool) -> Any:
    """What loads the body: AutoModel, or the whole language model where AutoModel is another model, or none.

    Of BERT's and BART's decoders AutoModel is the encoder with its pooler, or encoder and decoder; of TrOCR's nothing.
    A type that transformers does not know at all is somebody's extension of one that it does, and is loaded as that.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kind = config.get("model_type")
    unlike = config.get("is_decoder") or (kind in transformers.CONFIG_MAPPING and kind not in MODEL_MAPPING_NAMES)
    own_code = bool(config.get("auto_map"))
    return transformers.AutoModelForCausalLM if adapted or (unlike and not own_code) else transformers.AutoModel


def normalisation(checkpoint: Checkpoint, *, beaver: bool = True) -> dict[str, float]:
    """The mean and the standard deviation by which a checkpoint says that its head's values are to be normalised.

    OpenRLHF writes them into config.json. Safe-RLHF (Beaver) keeps a normaliser beside its head, or mean and variance
    in config.json: both are used for rewards, the standard deviation alone for costs, neither for critics.
    """
    config = checkpoint.config
    if config.get("normalize_reward") and "mean" in config:
        return {"mean": float(config["mean"]), "std": float(config["std"])}
    if not config.get("do_normalize") or not beaver:
        return {}
    score_type = config.get("score_type", "reward")
    mean, var = (_statistic(checkpoint, name, usual) for name, usual in (("mean", 0.0), ("var", 1.0)))
    return {
        "reward": {"mean": mean, "std": var**0.5 + BEAVER_EPSILON},
        "cost": {"std": var**0.5 + BEAVER_EPSILON},
    }.get(score_type, {})


def _statistic(checkpoint: Checkpoint, name: str, usual: float) -> float:
    """One number of Safe-RLHF's normaliser: what is stored with the weights counts before what the config says."""
    stored = f"normalizer.{name}"
    found = checkpoint.tensor(stored) if stored in checkpoint.weights else checkpoint.config.get(name)
    numbers = torch.as_tensor(usual if found is None else found, dtype=torch.float64).flatten()
    if len(numbers) != 1:
        raise ValueError(f"{checkpoint.name} has a normaliser of {len(numbers)} numbers, a value head gives one")
    return float(numbers[0])


def _linear(weights: dict[str, torch.Tensor], key: str) -> nn.Linear:
    weight, bias = weights[key], weights.get(key.removesuffix("weight") + "bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, **({"bias": bias} if bias is not None else {})})
    return layer
