"""Load a policy from a Hugging Face checkpoint into the engine of choice."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import transformers

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.headed_model import HeadedModel
from calibrated_rewards.models.checkpoints import (
    Checkpoint,
    architecture,
    check_writes,
    find_checkpoint,
    is_encoder,
    needs_code,
)
from calibrated_rewards.models.lazy import Lazy, fields_only
from calibrated_rewards.models.loading import Placement, Source, add_adapter, find_source
from calibrated_rewards.models.parts import without_peft
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import Prompt
from calibrated_rewards.samplers.continuous import ContinuousSampler
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.protocol import Decoding, Rollout, Sampler, Seeds
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.preference_head import PreferenceHeadScorer
from calibrated_rewards.scorers.protocol import Loaded, Scorer

logger = logging.getLogger(__name__)

Engine: TypeAlias = Literal["hf", "continuous", "vllm"]
CLASSES: dict[str, Any] = {"hf": HfSampler, "continuous": ContinuousSampler}


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
    """Return the sampler for a checkpoint: a folder, or a repository of the Hub; of a model, or of a PEFT adapter.

    `engine` is "hf" (HfSampler), "continuous" (ContinuousSampler) or "vllm" (VllmSampler). `text` tells how prompts
    become tokens, `base` where an adapter's base model is if it is no longer where the adapter says, and `tokenizer`
    where the tokenizer is if it is not beside the model. `dtype` to `model_options` are as in `from_pretrained`.
    `options` go to the engine's class: `prompts_at_once=`, `batch_tokens=`, ..., or to `vllm.LLM`.

    The weights are read at the first call, in each process anew: a sampler pickles as how to load it.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"load_sampler needs engine= one of {', '.join(get_args(Engine))}, got engine={engine!r}")
    words, at = (None if each is None else find_checkpoint(os.fspath(each)).name for each in (tokenizer, base))
    devices = {"device": device, "device_map": device_map, "quantization_config": quantization_config}
    if engine == "vllm":
        from calibrated_rewards.samplers.vllm import VllmSampler

        foreign = {**devices, "model_options": model_options, "base": base}
        if given := sorted(name for name, value in foreign.items() if value is not None):
            raise TypeError(
                f"engine='vllm' takes no {given[0]}=: vLLM has options of its own, which are passed on to it"
            )
        options = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code} | (
            {"tokenizer": words, **options} if tokenizer is not None else options
        )
        return VllmSampler.load(name_or_path, decoding, text, **options)
    known = {each.name for each in fields(CLASSES[engine])} - {"model", "tokenizer", "decoding", "text", "scorer"}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            Message(f"the engine {engine} takes no {setting(unknown[0])}; it takes {', '.join(sorted(known))}")
        )
    found = find_checkpoint(os.fspath(name_or_path), revision)
    placement = Placement(
        dtype=dtype, trust_remote_code=trust_remote_code, model_options=dict(model_options or {}), **devices
    )
    sampler = LoadedSampler(found.name, decoding, text or Text(), engine, found.revision, at, words, placement, options)
    check_policy(sampler.source)
    return sampler


@dataclass(frozen=True, repr=False)
class LoadedSampler:
    """A sampler of a checkpoint. It loads when it is first used, and again in another process, after pickling."""

    name: str
    decoding: Decoding
    text: Text = field(default_factory=Text)
    engine: str = "hf"
    revision: str | None = None
    base: str | None = None
    tokenizer: str | None = None
    placement: Placement = field(default_factory=Placement)
    options: Mapping[str, Any] = field(default_factory=dict)
    __getstate__ = fields_only

    @property
    def source(self) -> Source:
        """The checkpoint, and the base of an adapter's."""
        return find_source(self.name, self.revision, self.base, self.placement, self.tokenizer)

    @Lazy
    def sampler(self) -> Any:
        """Load the sampler that does the work; the same one from then on."""
        source = self.source
        model = source.model(transformers.AutoModelForCausalLM)
        logger.info("%s: %s", self.name, type(model).__name__)
        sampler = CLASSES[self.engine](model, source.tokenizer(model), self.decoding, self.text, **self.options)
        if isinstance(sampler, HfSampler):
            sampler.try_out()
        return sampler

    def __call__(self, prompts: Sequence[Prompt], seeds: Seeds) -> list[list[Rollout]]:
        """Draw for each prompt a rollout for each of its seeds."""
        return self.sampler(prompts, seeds)  # type: ignore[no-any-return]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a prompt without tokens, or too long for the model with its completion: ValueError."""
        self.sampler.check(prompts)

    def rendered(self, prompt: Prompt) -> str:
        """Return the text that the model reads."""
        return str(self.sampler.rendered(prompt))

    def fingerprint(self) -> dict[str, Any]:
        """Describe all that the completions depend on, but for the seeds."""
        return dict(self.sampler.fingerprint())

    def __repr__(self) -> str:
        return f"LoadedSampler({self.name!r}, {self.engine!r}, {self.decoding!r})"

    def __hash__(self) -> int:
        return hash(self.name)  # options may have no hash


def share_model(sampler: Sampler, scorer: Scorer) -> Sampler:
    """Return a sampler that writes with the very model that a preference head reads, so that one is in memory.

    If the policy is that model, its completions are scored by the pass that writes them; the adapter of a head that has
    one is off while the policy writes, and the head reads afterwards. If it is a PEFT adapter on the model of a head
    with a frozen backbone, the adapter is put on the scorer's model, and is off while the head reads. Any other pair is
    left as it is: two adapters, another precision, another engine.
    """
    inner: Any = scorer.scorer if isinstance(scorer, Loaded) else scorer
    is_cost = isinstance(inner, Cost)
    inner = inner.scorer if is_cost else inner
    if not isinstance(inner, PreferenceHeadScorer) or not isinstance(scorer, Loaded):
        return sampler
    if not isinstance(sampler, LoadedSampler) or sampler.engine != "hf" or sampler.tokenizer is not None:
        return sampler
    recipe: Any = scorer.recipe
    head = find_source(recipe.name, recipe.revision, recipe.base, recipe.placement, recipe.tokenizer)
    policy, frozen = sampler.source, inner.headed.adapter is None
    if recipe.placement != sampler.placement or recipe.tokenizer is not None:
        return sampler
    settings = (sampler.decoding, sampler.text)
    if is_same(policy.checkpoint, head.checkpoint) or (frozen and is_same(policy.checkpoint, head.base)):
        logger.info("%s: one model writes and scores", sampler.name)
        return HfSampler(inner.model, inner.tokenizer, *settings, scorer=inner, **sampler.options)
    if is_same(policy.checkpoint, head.base):
        logger.info("%s: one model writes, and the head reads it with its adapter", sampler.name)
        inner.model.base_model.disable_adapter_layers()
        return HfSampler(without_peft(inner.model), inner.tokenizer, *settings, **sampler.options)
    if not (frozen and policy.checkpoint.adapter and is_same(policy.base, head.base)):
        return sampler
    logger.info("%s: the adapter is put on the model that the head reads", sampler.name)
    model = add_adapter(inner.model, policy.checkpoint).eval().requires_grad_(False)
    # The model of before has the adapter in its layers now: whoever holds the scorer has to read without it.
    inner = replace(inner, headed=HeadedModel(model, inner.tokenizer, inner.headed.head))
    vars(scorer)["scorer"] = Cost(inner) if is_cost else inner
    return HfSampler(model, policy.tokenizer(model), *settings, **sampler.options)


def is_same(one: Checkpoint, other: Checkpoint) -> bool:
    """Tell if two checkpoints are one: the folder, or the repository at a commit."""
    return (one.name, one.revision) == (other.name, other.revision)


def check_policy(source: Source) -> None:
    """Refuse a model that was trained to give scores, or to fill in words: as a policy it would write at random."""
    name, what, base = source.checkpoint.name, architecture(source.base), source.base
    if base.config.get("is_encoder_decoder"):
        raise ValueError(f"a policy is a causal language model, {name} is an encoder-decoder ({what})")
    if needs_code(base) and not source.placement.trust_remote_code:
        trust = setting("trust_remote_code", "True")
        raise ValueError(Message(f"{name} is a {what}, which brings its own code: read it, then say {trust}"))
    writes = needs_code(base) or not is_encoder(base)
    try:
        check_writes(source.checkpoint, base, "policy")
    except ValueError:
        writes = False
    if not writes:
        raise ValueError(
            f"{name} ({what}) gives scores or fills in words, and would write at random: a policy is the causal "
            "language model that training starts from"
        )
