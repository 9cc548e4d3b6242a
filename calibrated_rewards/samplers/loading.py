"""Load a policy from a Hugging Face checkpoint into the engine of choice."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import transformers

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.checkpoints import (
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
    """Return a sampler that writes with the very model that a preference head reads, if the policy is that model.

    Then one model is in memory, and the scores come free with the completions, which stay the same. Any other pair of
    sampler and scorer is left as it is: a head with an adapter that the policy does not have, another precision, ...
    """
    inner: Any = scorer.scorer if isinstance(scorer, Loaded) else scorer
    inner = inner.scorer if isinstance(inner, Cost) else inner
    if not isinstance(inner, PreferenceHeadScorer) or not isinstance(scorer, Loaded):
        return sampler
    if not isinstance(sampler, LoadedSampler) or sampler.engine != "hf" or sampler.tokenizer is not None:
        return sampler
    recipe: Any = scorer.recipe
    head = find_source(recipe.name, recipe.revision, recipe.base, recipe.placement, recipe.tokenizer)
    policy = sampler.source
    names = [(each.name, each.revision) for each in (policy.checkpoint, head.checkpoint, head.base)]
    same = names[0] == names[1] or (inner.headed.adapter is None and names[0] == names[2])
    if not same or recipe.placement != sampler.placement or recipe.tokenizer is not None:
        return sampler
    model, tokenizer = inner.model, inner.tokenizer
    logger.info("%s: one model writes and scores", sampler.name)
    return HfSampler(model, tokenizer, sampler.decoding, sampler.text, scorer=inner, **sampler.options)


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
