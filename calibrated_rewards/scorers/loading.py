"""`load_scorer`: any reward model saved as a Hugging Face checkpoint, by looking at what the checkpoint holds."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import transformers

from calibrated_rewards.reading.labels import Labels
from calibrated_rewards.reading.labels_of import labels_of
from calibrated_rewards.reading.text import Text
from calibrated_rewards.scorers.checkpoint import checkpoint
from calibrated_rewards.scorers.inspection import Kind, architecture, classifies, kind_of, needs_code
from calibrated_rewards.scorers.pretrained import Placement, Source, source
from calibrated_rewards.scorers.recipe import Loaded

logger = logging.getLogger(__name__)


def load_scorer(
    name_or_path: str,
    *,
    kind: Kind | str | None = None,
    labels: Labels | None = None,
    text: Text | None = None,
    output: str | int | None = None,
    reference: str | None = None,
    base: str | None = None,
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
    adapter says. `dtype` to `model_options` are as in `from_pretrained`; `options` go to the kind's class: `pool=`,
    `mark=`, `question=`, `head=`, ... With DeepSpeed ZeRO-3, call it before the trainer's arguments are made.

    An encoder with one label reads prompt and response as a pair (CrossEncoder); with several, and any decoder, one
    text. Labels: one is its logit, two are the second's log-odds, "1 star" to "5 stars" are their expected value.
    """
    if name_or_path.startswith(("http://", "https://")):
        raise ValueError(
            f"a server is no checkpoint, got {name_or_path!r}: calibrated_rewards.scorers.remote.Remote(url, ...) "
            "asks it, in the dialect that it speaks"
        )
    placement = Placement(dtype, device, device_map, quantization_config, trust_remote_code, dict(model_options or {}))
    settings = {"labels": labels, "text": text, "output": output, "batch_tokens": batch_tokens}
    given = {name: value for name, value in settings.items() if value is not None}
    sharing = {} if share_prefixes else {"share_prefixes": False}
    # Another process, which may stand in another directory, gets the same folder or the same commit.
    found = checkpoint(name_or_path, revision)
    others = {"base": _lasting(base), "reference": _lasting(reference)}
    recipe = FromCheckpoint(
        found.name, found.revision, kind, **others, placement=placement, options={**given, **sharing, **options}
    )
    loaded = Loaded(recipe)
    logger.info("%s: %s", name_or_path, type(loaded.scorer).__name__)
    return loaded


@dataclass(frozen=True)
class FromCheckpoint:
    """The recipe of a scorer that comes from a checkpoint: where it is, and what `load_scorer` was told."""

    name: str
    revision: str | None = None
    kind: Kind | str | None = None
    base: str | None = None
    reference: str | None = None
    placement: Placement = field(default_factory=Placement)
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The scorer, with its weights in memory."""
        at = source(self.name, self.revision, self.base, self.placement)
        kind = self.kind or kind_of(at.checkpoint, at.base, self.placement.trust_remote_code)
        if kind == "sequence-classifier" and "output" in self.options:
            kind = "multi-attribute"
        match kind:
            case "sequence-classifier":
                return self._sequence_classifier(at)
            case "cross-encoder":
                return self._cross_encoder(at)
            case "multi-attribute":
                return self._multi_attribute(at)
            case "value-head":
                return self._value_head(at)
            case "process":
                return self._process(at)
            case "judge":
                return self._judge(at)
            case "implicit":
                return self._implicit(at)
        raise ValueError(f"load_scorer needs kind= one of {', '.join(get_args(Kind))}, got kind={kind!r}")

    def _sequence_classifier(self, at: Source) -> Any:
        from calibrated_rewards.scorers.sequence_classifier import SequenceClassifier

        model, tokenizer = _both(at, transformers.AutoModelForSequenceClassification)
        return SequenceClassifier(model, tokenizer, **self._with_labels(model))

    def _cross_encoder(self, at: Source) -> Any:
        from calibrated_rewards.scorers.cross_encoder import CrossEncoder

        model, tokenizer = _both(at, transformers.AutoModelForSequenceClassification)
        return CrossEncoder(model, tokenizer, **_without_sharing(self._with_labels(model)))

    def _multi_attribute(self, at: Source) -> Any:
        from calibrated_rewards.scorers.multi_attribute import MultiAttribute

        if "output" not in self.options and self.kind is None:
            raise ValueError(
                f"{self.name} is {architecture(at.base)}: say which output of its forward is the score, "
                'output="score", or output=0 for the first; kind="multi-attribute" if it returns the scores themselves'
            )
        auto = transformers.AutoModelForSequenceClassification if classifies(at.base) else transformers.AutoModel
        return MultiAttribute(*_both(at, auto), **_without_sharing({"output": None, **self.options}))

    def _value_head(self, at: Source) -> Any:
        from calibrated_rewards.scorers.value_head import ValueHead, head_from, normalisation

        options = dict(self.options)
        head = head_from(at.checkpoint, options.pop("head", None))
        auto = transformers.AutoModelForCausalLM if at.checkpoint.adapter else transformers.AutoModel
        return ValueHead(*_both(at, auto), head, **{**normalisation(at.base.config), **options})

    def _process(self, at: Source) -> Any:
        from calibrated_rewards.scorers.process import ProcessReward

        return ProcessReward(*_both(at, _class_of_steps(at, self.options.get("answers"))), **self.options)

    def _judge(self, at: Source) -> Any:
        from calibrated_rewards.scorers.judge import Judge

        return Judge(*_both(at, transformers.AutoModelForCausalLM), **self.options)

    def _implicit(self, at: Source) -> Any:
        from calibrated_rewards.scorers.implicit import ImplicitReward

        model, tokenizer = _both(at, transformers.AutoModelForCausalLM)
        given = {}
        if self.reference is not None:
            policy = source(self.reference, None, None, self.placement)
            given["reference"] = policy.model(transformers.AutoModelForCausalLM)
        return ImplicitReward(model, tokenizer, **given, **self.options)

    def _with_labels(self, model: Any) -> dict[str, Any]:
        return (
            {"labels": labels_of(model.config.id2label), **self.options}
            if "labels" not in self.options
            else {**self.options}
        )


def _lasting(name: str | None) -> str | None:
    return None if name is None else checkpoint(name).name


def _both(at: Source, auto: Any) -> tuple[Any, Any]:
    model = at.model(auto)
    return model, at.tokenizer(model)


def _without_sharing(options: Mapping[str, Any]) -> dict[str, Any]:
    """For kinds that never share prefixes, which `share_prefixes=False` asks for anyway."""
    return {name: value for name, value in options.items() if name != "share_prefixes"}


def _class_of_steps(at: Source, answers: object) -> Any:
    """A process reward model writes its verdict as one of two answers, or classifies tokens."""
    if answers is not None:
        return transformers.AutoModelForCausalLM
    promised = at.base.config.get("auto_map", {}) if needs_code(at.base) else {"AutoModelForTokenClassification": ""}
    classifies_tokens = "AutoModelForTokenClassification" in promised
    return transformers.AutoModelForTokenClassification if classifies_tokens else transformers.AutoModel
