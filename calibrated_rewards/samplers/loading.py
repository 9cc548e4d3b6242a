"""`load_sampler`: a policy saved as a Hugging Face checkpoint, in the engine that is asked for."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import transformers

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.checkpoints import (
    Checkpoint,
    architecture,
    check_writes,
    find_checkpoint,
    is_encoder,
    needs_code,
)
from calibrated_rewards.models.lazy import Lazy, fields_only
from calibrated_rewards.models.loading import Placement, Source, find_source
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.samplers.continuous import ContinuousSampler
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding, Rollout, Sampler, Seeds

logger = logging.getLogger(__name__)

Engine: TypeAlias = Literal["hf", "continuous", "vllm"]
CLASSES: dict[str, Any] = {"hf": HfSampler, "continuous": ContinuousSampler}
# What `load_sampler` gives them.
LOADED = {"model", "tokenizer", "decoding", "text"}


def load_sampler(
    name_or_path: str | os.PathLike[str],
    decoding: Decoding,
    *,
    text: Text | None = None,
    engine: Engine | str = "hf",
    base: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: Any = "auto",
    device: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Sampler:
    """The sampler for a checkpoint: a folder, or a repository of the Hub; of a model, or of a PEFT adapter.

    `engine` is "hf" (HfSampler), "continuous" (ContinuousSampler) or "vllm" (VllmSampler). `text` says how prompts
    become tokens, `base` where an adapter's base model is if it is no longer where the adapter says, and `tokenizer`
    where the tokenizer is if it is not beside the model. `dtype` to `model_options` are as in `from_pretrained`.
    `options` go to the engine's class: `prompts_at_once=`, `batch_tokens=`, ..., or to `vllm.LLM`.

    The weights are read at the first call, in each process anew: what is pickled is how to load them.
    """
    place = os.fspath(name_or_path)
    if engine not in get_args(Engine):
        raise ValueError(f"load_sampler needs engine= one of {', '.join(get_args(Engine))}, got engine={engine!r}")
    lasting = {"base": base, "tokenizer": tokenizer}
    others = {
        what: None if other is None else find_checkpoint(os.fspath(other)).name for what, other in lasting.items()
    }
    placed = {"device": device, "device_map": device_map, "quantization_config": quantization_config}
    if engine == "vllm":
        told = {**placed, "model_options": model_options, "base": base}
        words = {"tokenizer": others["tokenizer"]} if tokenizer is not None else {}
        known = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code, **words}
        return _in_vllm(place, decoding, text, told, {**known, **options})
    _check_options(engine, options)
    found = find_checkpoint(place, revision)
    placement = Placement(
        dtype=dtype, trust_remote_code=trust_remote_code, model_options=dict(model_options or {}), **placed
    )
    recipe = FromCheckpoint(
        found.name, decoding, text or Text(), engine, found.revision, **others, placement=placement, options=options
    )
    check_policy(recipe.source)
    return LoadedSampler(recipe)


@dataclass(frozen=True)
class FromCheckpoint:
    """The recipe of a sampler that comes from a checkpoint: where it is, and what `load_sampler` was told."""

    name: str
    decoding: Decoding
    text: Text = field(default_factory=Text)
    engine: str = "hf"
    revision: str | None = None
    base: str | None = None
    tokenizer: str | None = None
    placement: Placement = field(default_factory=Placement)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The checkpoint, and the base of an adapter's."""
        return find_source(self.name, self.revision, self.base, self.placement, self.tokenizer)

    def load(self) -> Any:
        """The sampler, with its weights in memory."""
        at = self.source
        model = at.model(transformers.AutoModelForCausalLM)
        logger.info("%s: %s", self.name, type(model).__name__)
        sampler = CLASSES[self.engine](model, at.tokenizer(model), self.decoding, self.text, **self.options)
        if isinstance(sampler, HfSampler):
            sampler.try_out()
        return sampler


@dataclass(frozen=True, repr=False)
class LoadedSampler:
    """A sampler and its recipe: it loads when it is first used, and again in another process, after pickling."""

    recipe: FromCheckpoint
    __getstate__ = fields_only

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """For each prompt a rollout for each of its seeds."""
        return self.sampler(prompts, seeds)  # type: ignore[no-any-return]

    @Lazy
    def sampler(self) -> Any:
        """Load the sampler that does the work; the same one from then on."""
        return self.recipe.load()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ValueError for a prompt without tokens, or too long for the model with its completion."""
        self.sampler.check(prompts)

    def rendered(self, prompt: Prompt) -> str:
        """The text that the model reads."""
        return str(self.sampler.rendered(prompt))

    def fingerprint(self) -> dict[str, Any]:
        """What the completions depend on, but for the seeds."""
        return dict(self.sampler.fingerprint())

    def __repr__(self) -> str:
        return f"LoadedSampler({self.recipe.name!r}, {self.recipe.engine!r}, {self.recipe.decoding!r})"

    def __hash__(self) -> int:
        """By name: a recipe may hold options that have no hash."""
        return hash(self.recipe.name)


def check_policy(at: Source) -> None:
    """Refuse what was trained to give scores, or to fill in words: loaded as a policy it would write at random."""
    name, what = at.checkpoint.name, architecture(at.base)
    if at.base.config.get("is_encoder_decoder"):
        raise ValueError(f"a policy is a causal language model, {name} is an encoder-decoder ({what})")
    if needs_code(at.base) and not at.placement.trust_remote_code:
        trust = setting("trust_remote_code", "True")
        raise ValueError(Message(f"{name} is a {what}, which brings its own code: read it, then say {trust}"))
    if not writes(at.checkpoint, at.base):
        raise ValueError(
            f"{name} ({what}) gives scores or fills in words, and would write at random: a policy is the causal "
            "language model that training starts from"
        )


def writes(found: Checkpoint, base: Checkpoint) -> bool:
    """Whether it is a language model that goes on from what it reads."""
    try:
        check_writes(found, base, "policy")
    except ValueError:
        return False
    return needs_code(base) or not is_encoder(base)


def _in_vllm(
    place: str, decoding: Decoding, text: Text | None, told: Mapping[str, Any], options: Mapping[str, Any]
) -> Sampler:
    given = sorted(name for name, value in told.items() if value is not None)
    if given:
        raise TypeError(f"engine='vllm' takes no {given[0]}=: vLLM has options of its own, which are passed on to it")
    from calibrated_rewards.samplers.vllm import VllmSampler

    return VllmSampler.load(place, decoding, text, **options)


def _check_options(engine: str, options: Mapping[str, Any]) -> None:
    known = {each.name for each in fields(CLASSES[engine])} - LOADED
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(
            Message(f"the engine {engine} takes no {setting(unknown[0])}; it takes {', '.join(sorted(known))}")
        )
