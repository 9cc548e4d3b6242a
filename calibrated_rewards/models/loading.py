"""Load a model and its tokenizer from a checkpoint, complete: no weight left to chance, no id without an embedding."""

import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.models.checkpoints import Checkpoint, find_checkpoint
from calibrated_rewards.models.parts import device_of, dtype_of, multiplies_bfloat16, vocabulary

logger = logging.getLogger(__name__)
# Weights of a model that is slow in no precision.
SMALL = 10_000_000
SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Placement:
    """The device, precision and other options with which a model is loaded."""

    dtype: Any = "auto"
    """A torch dtype or its name; "auto" is the checkpoint's own; bf16, fp16 and fp32 will do."""
    device: Any = None
    """None: the GPU of this process, if there is one."""
    device_map: Any = None
    """Spreads a model over devices, in place of `device`: "auto", or a device for each part."""
    quantization_config: Any = None
    trust_remote_code: bool = False
    model_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Other arguments of `from_pretrained`: attn_implementation, token, ... No repr shows them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _parse_dtype(self.dtype))
        if doubled := {"dtype", "device_map", "trust_remote_code"} & {*self.model_options}:
            raise ValueError(f"model_options is for what has no argument of its own, got {', '.join(sorted(doubled))}")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for `from_pretrained`."""
        quantised = {"quantization_config": self.quantization_config} if self.quantization_config is not None else {}
        devices = self.device_map
        if devices is None:
            devices = {"": torch.device(self.device or default_device())}
        settings = {"dtype": self.dtype, "device_map": devices, "trust_remote_code": self.trust_remote_code}
        return {**settings, **quantised, **self.model_options}


@dataclass(frozen=True)
class Source:
    """A checkpoint and its base: an adapter's base model, or the checkpoint itself."""

    checkpoint: Checkpoint
    base: Checkpoint
    placement: Placement = field(default_factory=Placement)
    reads_with: Checkpoint | None = None
    """The checkpoint with the tokenizer, if it is with neither."""

    def model(self, auto: Any, *, head: bool = True) -> Any:
        """Load the model through one of transformers' Auto classes, with its adapter; not trained here, so frozen."""
        options = self.placement.options()
        stored = self.checkpoint.weights if self.checkpoint.adapter else {}
        if stored and head and auto is AutoModelForSequenceClassification and self.checkpoint.labels is not None:
            options["num_labels"] = self.checkpoint.labels
        if stored:
            with _silence_transformers():
                model = load_complete(auto, self.base, stored, **options)
            model = add_adapter(model, self.checkpoint)
        else:
            model = load_complete(auto, self.base, **options)
        return model.eval().requires_grad_(False)

    def tokenizer(self, model: nn.Module) -> Any:
        """Load the tokenizer that is saved beside the adapter, or else beside the model."""
        beside = (self.checkpoint.folder / "tokenizer_config.json").exists()
        at = self.reads_with or (self.checkpoint if beside else self.base)
        code = self.placement.trust_remote_code
        advice = f"save it beside the model, or say where it is with {setting('tokenizer')}"
        try:
            tokenizer = AutoTokenizer.from_pretrained(at.name, revision=at.revision, trust_remote_code=code)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(": ")
            if "trust_remote_code" in str(error):
                reason, advice = (
                    "it brings its own code",
                    f"read it, then allow it with {setting('trust_remote_code', 'True')}",
                )
            raise ValueError(Message(f"{at.name} has no tokenizer that loads ({reason}); {advice}")) from error
        # BERT's class makes an empty one where there is no file.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError(Message(f"{at.name} has no tokenizer: {advice}"))
        if len(tokenizer) > vocabulary(model):
            raise ValueError(
                f"the tokenizer of {at.name} has {len(tokenizer)} tokens, the model {self.base.name} embeddings for "
                f"{vocabulary(model)}: it is another model's tokenizer, or tokens were added to it alone"
            )
        return tokenizer


def find_source(
    name: str, revision: str | None, base: str | None, placement: Placement, tokenizer: str | None = None
) -> Source:
    """Find the checkpoint of that name; of an adapter or a head, also the base: the one given, or the one it names."""
    checkpoint = find_checkpoint(name, revision)
    words = None if tokenizer is None else find_checkpoint(tokenizer)
    if adapter := checkpoint.adapter:
        under = find_checkpoint(base or adapter["base_model_name_or_path"], None if base else adapter.get("revision"))
        return Source(checkpoint, under, placement, words)
    if (head := checkpoint.preference_head) and not checkpoint.config:
        place = base or head.get("base")
        if not place:
            raise ValueError(Message(f"{name} does not say on which model its head is: say {setting('base')}"))
        return Source(checkpoint, find_checkpoint(place), placement, words)
    if base is not None:
        raise ValueError(f"base= is for adapters, and {name} has no adapter_config.json; got base={base!r}")
    if not checkpoint.config:
        raise FileNotFoundError(f"{name} has neither config.json nor adapter_config.json: it is not a checkpoint")
    return Source(checkpoint, checkpoint, placement, words)


def load_complete(auto: Any, base: Checkpoint, stored: Collection[str] = (), **options: Any) -> Any:
    """Load a model of which every weight comes from the checkpoint, or will come (`stored`) from an adapter's."""
    revision = {} if base.revision is None else {"revision": base.revision}
    if (config := find_body_config(base)) is not None:
        options["config"] = config
    try:
        model, info = auto.from_pretrained(base.name, output_loading_info=True, **revision, **options)
    except Exception as error:
        advice = advise_on_error(auto, base, error)
        if advice is None:
            raise
        raise ValueError(advice) from error
    if config is not None and (
        foreign := sorted({*info["unexpected_keys"]} - {name for names in base.value_heads.values() for name in names})
    ):
        raise ValueError(
            f"{base.name} is of model type {base.config['model_type']!r}, which transformers does not know, and read "
            f"as {config.model_type!r} it has weights of no known use: {', '.join(foreign[:4])}"
        )
    missing = sorted(set(info["missing_keys"]) - set(stored))
    if missing:
        names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(
            f"{base.name} has no weights for {names}: they were initialised at random, and so would be the scores. "
            f"It is no {type(model).__name__}, or its head was not saved"
        )
    warn_of_slow_dtype(model, base.name)
    return model


def warn_of_slow_dtype(model: nn.Module, name: str) -> None:
    """Log it if a model of some size is of 16 bits on a processor that has no instructions for them."""
    dtype, size = dtype_of(model), sum(weight.numel() for weight in model.parameters())
    if dtype in (torch.bfloat16, torch.float16) and size > SMALL and not multiplies_bfloat16(device_of(model)):
        message = "%s is in %s, which this processor computes tens of times slower than float32: load it as float32"
        logger.warning(message, name, str(dtype).removeprefix("torch."))


def find_body_config(base: Checkpoint) -> Any:
    """Find the body's config for a model type that extends one of transformers' (gpt_neox_reward_model), or None."""
    kind = str(base.config.get("model_type", ""))
    if not kind or kind in CONFIG_MAPPING or base.config.get("auto_map"):
        return None
    body = max((name for name in CONFIG_MAPPING if kind.startswith((f"{name}_", f"{name}-"))), key=len, default=None)
    if body is None:
        return None
    return CONFIG_MAPPING[body].from_dict({**base.config, "model_type": body})


def advise_on_error(auto: Any, base: Checkpoint, error: Exception) -> str | None:
    """Advise on an error of transformers, or of a checkpoint's own code, as it loads; None to leave it."""
    what = (base.config.get("architectures") or [base.config.get("model_type")])[0]
    if "Unrecognized configuration class" in str(error):
        return f"{base.name} is a {what}, which {auto.__name__} does not load: choose another kind"
    if "does not recognize this architecture" in str(error):
        return (
            f"{base.name} is a {what} of model type {base.config.get('model_type')!r}, which transformers "
            f"{transformers.__version__} does not know and for which there is no code beside it: install the release "
            "that knows it, or score with a callable of yours"
        )
    if not base.config.get("auto_map") or isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
        return None
    heads = ", ".join(base.value_heads)
    without = f": without its code, the kind value-head reads its head ({heads})" if heads else ""
    return (
        f"the code that {base.name} brings ({what}) does not load with transformers {transformers.__version__}, "
        f"{type(error).__name__}: {error}{without}"
    )


def add_adapter(model: Any, adapter: Checkpoint) -> Any:
    """Put an adapter on a base model."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"{adapter.name} is an adapter, which needs peft: pip install peft") from error
    if adapter.adapter.get("megatron_config"):
        # peft imports the module that megatron_core names; releases before 0.18 take any name.
        raise ValueError(
            f"the adapter {adapter.name} names modules for peft to import (megatron_config): take that out"
        )
    revision: dict[str, Any] = {} if adapter.revision is None else {"revision": adapter.revision}
    with ignore_peft_warning():
        return PeftModel.from_pretrained(model, adapter.name, **revision)


def check_same_tokens(tokenizer: Any, reference: Source, model: nn.Module) -> None:
    """Refuse a reference that reads other tokens: its log-probabilities would be those of another text."""
    if not any((at.folder / "tokenizer_config.json").exists() for at in (reference.checkpoint, reference.base)):
        return
    words, theirs = tokenizer.get_vocab(), reference.tokenizer(model).get_vocab()
    lacking = {token for token in words if token not in theirs}
    other = {token for token, i in words.items() if theirs.get(token, i) != i}
    other |= lacking - {*tokenizer.get_added_vocab()}
    if other:
        raise ValueError(
            f"the reference {reference.checkpoint.name} reads other tokens than the model: {len(other)} of "
            f"{len(words)} are not the same, such as {min(other)!r}. The reference is the model that it was tuned from"
        )
    if lacking:
        names = ", ".join(sorted(lacking)[:4])
        warnings.warn(
            f"the reference {reference.checkpoint.name} does not know tokens that were added to the model's: {names}",
            stacklevel=2,
        )


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Silence transformers' table of missing weights: `load_complete` checks them, and an adapter brings them."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _parse_dtype(dtype: Any) -> Any:
    """Check the name of a dtype, and expand a short one; what is no name is for `from_pretrained`."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    name = SHORT.get(dtype, dtype.removeprefix("torch."))
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"a dtype is auto, float32, bfloat16 or float16, got {dtype!r}")
    return name


def default_device() -> torch.device:
    """Return the GPU that torchrun or accelerate gave to this process, or the first; without any, the CPU.

    >>> default_device().type in ("cuda", "cpu")
    True
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
