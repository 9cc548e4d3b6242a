"""`load_scorer`: any reward model saved as a Hugging Face checkpoint, by looking at what the checkpoint holds."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from calibrated_rewards.error_messages import Message, setting
from calibrated_rewards.reading.labels import Labels
from calibrated_rewards.reading.labels_of import labels_of
from calibrated_rewards.reading.text import Text
from calibrated_rewards.scorers.checkpoint import checkpoint
from calibrated_rewards.scorers.inspection import Kind, architecture, check_writes, classifies, kind_of, needs_code
from calibrated_rewards.scorers.kinds import (
    CLASSES,
    TEXT,
    check_labels,
    check_options,
    labels_from,
    named,
    path,
    taken,
    text_of,
)
from calibrated_rewards.scorers.pretrained import Placement, Source, check_same_tokens, source
from calibrated_rewards.scorers.recipe import Loaded

logger = logging.getLogger(__name__)


def load_scorer(
    name_or_path: str | os.PathLike[str],
    *,
    kind: Kind | str | None = None,
    labels: Labels | int | None = None,
    text: Text | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    output: str | int | None = None,
    reference: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
    dtype: Any = "auto",
    device: Any = None,
    device_map: Any = None,
    quantization_config: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Loaded:
    """The scorer for a checkpoint: a folder, or a repository of the Hub. Its repr says what was chosen.

    `kind` overrides what the checkpoint looks like. `base` is an adapter's base model where it is no longer where the
    adapter says, and `tokenizer` a folder or repository where the tokenizer is not beside the model. `dtype` to
    `model_options` are as in `from_pretrained`. `options` are settings of `Text` in place of `text` (`max_length=`,
    `template=`, `append_eos=`, ...) or go to the kind's class: `pool=`, `mark=`, `question=`, `head=`, ... With
    DeepSpeed ZeRO-3, call it before the trainer's arguments are made.

    An encoder with one label reads prompt and response as a pair (CrossEncoder); with several, and any decoder, one
    text. Labels: one is its logit, two are the second's log-odds (or the good one's, where their names say which that
    is), "1 star" to "5 stars" are their expected value; a number is that label's logit.
    """
    place = path(name_or_path, "name_or_path")
    _refuse_server(place)
    placement = Placement(dtype, device, device_map, quantization_config, trust_remote_code, dict(model_options or {}))
    settings = {"labels": labels_from(labels), "text": text_of(text, options), "batch_tokens": batch_tokens}
    given = {name: value for name, value in {**settings, "output": output}.items() if value is not None}
    sharing = {} if share_prefixes else {"share_prefixes": False}
    own = {name: value for name, value in options.items() if name not in TEXT}
    # Another process, which may stand in another directory, gets the same folder or the same commit.
    others = {"base": base, "reference": reference, "tokenizer": tokenizer}
    lasting = {what: None if other is None else checkpoint(path(other, what)).name for what, other in others.items()}
    found, chosen = checkpoint(place, revision), {**given, **sharing, **own}
    recipe = FromCheckpoint(found.name, found.revision, named(kind), **lasting, placement=placement, options=chosen)
    loaded = Loaded(recipe)
    logger.info("%s: %s", place, type(loaded.scorer).__name__)
    return loaded


@dataclass(frozen=True)
class FromCheckpoint:
    """The recipe of a scorer that comes from a checkpoint: where it is, and what `load_scorer` was told."""

    name: str
    revision: str | None = None
    kind: Kind | None = None
    base: str | None = None
    reference: str | None = None
    tokenizer: str | None = None
    placement: Placement = field(default_factory=Placement)
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The scorer, with its weights in memory."""
        at = source(self.name, self.revision, self.base, self.placement, self.tokenizer)
        kind = self.kind or kind_of(at.checkpoint, at.base, self.placement.trust_remote_code)
        if kind == "sequence-classifier" and "output" in self.options:
            kind = "multi-attribute"
        check_options(kind, self.options, self.reference is not None, bool(at.checkpoint.adapter))
        options = taken(kind, self.options)
        match kind:
            case "sequence-classifier" | "cross-encoder":
                return _classifier(at, CLASSES[kind], options)
            case "multi-attribute":
                return _multi_attribute(at, options, self.kind is None)
            case "value-head":
                return _value_head(at, options)
            case "process":
                return _process(at, options)
            case "judge" | "expected-rating" | "rated-judge":
                return CLASSES[kind](*_writer(at, kind), **options)
            case "implicit":
                return self._implicit(at, options)

    def _implicit(self, at: Source, options: Mapping[str, Any]) -> Any:
        model, tokenizer = _writer(at, "implicit")
        given = {}
        if self.reference is not None:
            tuned_from = source(self.reference, None, None, self.placement)
            given["reference"] = tuned_from.model(transformers.AutoModelForCausalLM)
            check_same_tokens(tokenizer, tuned_from, given["reference"])
        return CLASSES["implicit"](model, tokenizer, **given, **options)


def _refuse_server(place: str) -> None:
    if place.startswith(("http://", "https://")):
        raise ValueError(
            f"a server is no checkpoint, got {place!r}: calibrated_rewards.scorers.remote.Remote asks it, in the "
            "dialect that it speaks"
        )


def _classifier(at: Source, wrap: Any, options: Mapping[str, Any]) -> Any:
    model, tokenizer = _both(at, transformers.AutoModelForSequenceClassification)
    given = options if "labels" in options else {"labels": labels_of(model.config.id2label), **options}
    # Of custom code nobody knows that its head has as many outputs as its config says.
    if not needs_code(at.base):
        check_labels(given["labels"], model.config.num_labels)
    return wrap(model, tokenizer, **given)


def _multi_attribute(at: Source, options: Mapping[str, Any], unasked: bool) -> Any:
    if "output" not in options and unasked:
        raise ValueError(
            Message(
                f"{at.checkpoint.name} is {architecture(at.base)}: say which output of its forward is the score, "
                f"{setting('output', 'score')}, or {setting('output', '0')} for the first; "
                f"{setting('kind', 'multi-attribute')} if it returns the scores themselves"
            )
        )
    auto = transformers.AutoModelForSequenceClassification if classifies(at.base) else transformers.AutoModel
    return CLASSES["multi-attribute"](*_both(at, auto), **{"output": None, **options})


def _value_head(at: Source, options: Mapping[str, Any]) -> Any:
    from calibrated_rewards.scorers.value_head import head_from, normalisation

    if not at.checkpoint.value_heads:
        raise ValueError(
            f"{at.checkpoint.name} has no value head: no linear layers beside its body that end in one output"
        )
    head = head_from(at.checkpoint, options.get("head"))
    auto = transformers.AutoModelForCausalLM if at.checkpoint.adapter else transformers.AutoModel
    given = {**normalisation(at.base.config), **options, "head": head}
    return CLASSES["value-head"](*_both(at, auto), **given)


def _process(at: Source, options: Mapping[str, Any]) -> Any:
    """A process reward model writes its verdict as one of two answers, or classifies tokens."""
    if options.get("answers") is not None:
        return CLASSES["process"](*_writer(at, "process"), **options)
    promised = at.base.config.get("auto_map", {}) if needs_code(at.base) else {"AutoModelForTokenClassification": ""}
    classifies_tokens = "AutoModelForTokenClassification" in promised
    auto = transformers.AutoModelForTokenClassification if classifies_tokens else transformers.AutoModel
    return CLASSES["process"](*_both(at, auto), **options)


def _writer(at: Source, kind: str) -> tuple[Any, Any]:
    check_writes(at.checkpoint, at.base, kind)
    return _both(at, transformers.AutoModelForCausalLM)


def _both(at: Source, auto: Any) -> tuple[Any, Any]:
    model = at.model(auto)
    return model, at.tokenizer(model)
