"""Load any reward model that is saved as a Hugging Face checkpoint, by looking at what the checkpoint holds.

`load_scorer` checks its arguments before any weight is loaded, and keeps them as a recipe, `FromCheckpoint`.
"""

import logging
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast, get_args

import numpy as np
import transformers

from calibrated_rewards.files import Message, setting
from calibrated_rewards.heads.headed_model import HeadedModel
from calibrated_rewards.models.checkpoints import (
    Kind,
    architecture,
    check_writes,
    classifies,
    detect_kind,
    find_checkpoint,
    is_encoder_decoder,
    needs_code,
    parse_config,
)
from calibrated_rewards.models.labels import FIRST_RULES, RULES, Label, Labels, apply_first_rules, resolve_labels
from calibrated_rewards.models.loading import Placement, Source, check_same_tokens, find_source
from calibrated_rewards.models.server_address import redact_url
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.classifiers import CrossEncoder, MultiAttribute, SequenceClassifier
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.implicit import ImplicitReward
from calibrated_rewards.scorers.judge import ExpectedRating, Judge, RatedJudge, TokenLogit
from calibrated_rewards.scorers.preference_head import PreferenceHeadScorer
from calibrated_rewards.scorers.process import ProcessReward
from calibrated_rewards.scorers.protocol import Loaded
from calibrated_rewards.scorers.value_head import ValueHead, choose_auto_class, load_head, read_normalisation

logger = logging.getLogger(__name__)

CLASSES: dict[Kind, Any] = {
    "sequence-classifier": SequenceClassifier,
    "cross-encoder": CrossEncoder,
    "multi-attribute": MultiAttribute,
    "value-head": ValueHead,
    "process": ProcessReward,
    "judge": Judge,
    "expected-rating": ExpectedRating,
    "rated-judge": RatedJudge,
    "token-logit": TokenLogit,
    "implicit": ImplicitReward,
    "preference-head": PreferenceHeadScorer,
}
# Fields of the classes that are no options: `load_scorer` loads them itself.
LOADED = {"model", "tokenizer", "reference", "headed"}
TEXT = {each.name for each in fields(Text)}


def load_scorer(
    name_or_path: str | os.PathLike[str],
    *,
    kind: Kind | str | None = None,
    labels: Labels | int | None = None,
    cost: bool | None = None,
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
    """Load the scorer of a checkpoint: a folder, or a repository of the Hub. Its repr says what was chosen.

    `kind` overrides what the checkpoint looks like. `base` is an adapter's base model where it is no longer where the
    adapter says, and `tokenizer` a folder or repository where the tokenizer is not beside the model. `dtype` to
    `model_options` are as in `from_pretrained`. `options` are settings of `Text` in place of `text` (`max_length=`,
    `template=`, `append_eos=`, ...) or go to the kind's class: `pool=`, `mark=`, `question=`, `head=`, ... With
    DeepSpeed ZeRO-3, call it before the trainer's arguments are made.

    An encoder with one label reads prompt and response as a pair (CrossEncoder); with several, and any decoder, one
    text. Labels: one is its logit, two are log-odds of the better one, as their names say (of LABEL_0 and LABEL_1 the
    second's), "1 star" to "5 stars" are their expected value; a number is that label's logit. Other names are asked
    about. `cost=True` is for a model whose higher score is worse: its scores are turned round.
    """
    where = parse_path(name_or_path, "name_or_path")
    if where.lower().startswith(("http:", "https:")):
        raise ValueError(
            f"a server is no checkpoint, got {redact_url(where)!r}: calibrated_rewards.scorers.remote.Remote asks it, "
            "in the dialect that it speaks"
        )
    placement = Placement(dtype, device, device_map, quantization_config, trust_remote_code, dict(model_options or {}))
    settings = {
        "labels": parse_labels(labels),
        "text": parse_text(text, options),
        "batch_tokens": batch_tokens,
        "output": output,
        "share_prefixes": None if share_prefixes else False,
    }
    recipe_options = {name: value for name, value in settings.items() if value is not None}
    recipe_options |= {name: value for name, value in options.items() if name not in TEXT}
    # Another process, which may stand in another directory, gets the same folder or the same commit.
    others = {"base": base, "reference": reference, "tokenizer": tokenizer}
    names = {
        name: None if other is None else find_checkpoint(parse_path(other, name)).name for name, other in others.items()
    }
    at = find_checkpoint(where, revision)
    recipe = FromCheckpoint(
        at.name,
        at.revision,
        parse_kind(kind),
        **names,
        placement=placement,
        options=recipe_options,
        cost=cost,
        rules=RULES,
    )
    scorer = Loaded(recipe)
    logger.info("%s: %s", where, type(scorer.scorer).__name__)
    return scorer


def parse_kind(kind: str | None) -> Kind | None:
    """Return a kind by its name, with hyphens or underscores.

    >>> parse_kind("expected_rating")
    'expected-rating'
    """
    if kind is None:
        return None
    name = kind.replace("_", "-")
    if name not in CLASSES:
        kinds = ", ".join(get_args(Kind))
        raise ValueError(Message(f"a reward model's kind is one of {kinds}, got {setting('kind', repr(kind))}"))
    return name


def parse_path(path: Any, argument: str) -> str:
    """Return the path or name in an argument as text; refuse what is in memory already, which is for the classes."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"load_scorer needs {argument} to be a folder or a repository's name, got {type(path).__name__}: models "
            "and tokenizers in memory go to a class, SequenceClassifier(model, tokenizer), or, for a reference, "
            "calibrated_rewards.scorers.implicit.ImplicitReward(model, tokenizer, reference)"
        )
    return os.fspath(path)


def parse_text(text: Any, options: Mapping[str, Any]) -> Text | None:
    """Return the `Text` that is given, or build it of its settings among the options."""
    settings = {name: value for name, value in options.items() if name in TEXT}
    if text is not None and settings:
        raise TypeError(f"load_scorer takes text= or {', '.join(settings)}, got both: put them into Text(...)")
    if text is not None and not isinstance(text, Text):
        raise TypeError(f"load_scorer needs text= Text(...) of calibrated_rewards.models.text, got text={text!r}")
    return Text(**settings) if settings else text


def parse_labels(labels: Any) -> Labels | None:
    """Return the labels; a number is that label's logit.

    >>> parse_labels(2)
    Label(index=2)
    """
    if labels is None or callable(labels):
        return cast(Labels | None, labels)
    try:
        return Label(operator.index(labels))
    except TypeError:
        raise TypeError(
            "load_scorer needs labels= Label(i), Difference(good, bad), Expected(values), Ordinal() or "
            f"Weighted(weights) of calibrated_rewards.models.labels, got labels={labels!r}"
        ) from None


def check_labels(labels: Labels, outputs: int) -> None:
    """Refuse labels that do not fit the model's outputs: they are tried on zeros."""
    shape = np.shape(labels(np.zeros((1, outputs), np.float32)))
    if shape != (1,):
        raise ValueError(f"labels give one score for each input, {labels} gave shape {shape} for 1 input")


def check_options(kind: Kind, options: Mapping[str, Any], reference: bool, adapter: bool) -> None:
    """Refuse options that the kind's class does not take, and an implicit reward without a reference."""
    taken = {each.name for each in fields(CLASSES[kind])} - LOADED
    taken |= {"any_base"} if kind == "preference-head" else set()
    # `share_prefixes=False` holds for kinds that never share.
    unknown = sorted(set(options) - taken - {"share_prefixes"})
    if unknown:
        raise TypeError(Message(f"a {kind} model takes no {setting(unknown[0])}; it takes {', '.join(sorted(taken))}"))
    if kind != "implicit" and reference:
        raise TypeError(Message(f"{setting('reference')} is for implicit rewards, this is a {kind} model"))
    if kind == "implicit" and not (reference or adapter or options.get("reference_free")):
        raise ValueError(
            Message(
                f"an implicit reward needs {setting('reference')}, the model that this one was tuned from, or "
                f"{setting('reference_free', 'True')}"
            )
        )


@dataclass(frozen=True)
class FromCheckpoint:
    """The recipe of a scorer that comes from a checkpoint: where it is, and the arguments of `load_scorer`."""

    name: str
    revision: str | None = None
    kind: Kind | None = None
    base: str | None = None
    reference: str | None = None
    tokenizer: str | None = None
    placement: Placement = field(default_factory=Placement)
    options: Mapping[str, Any] = field(default_factory=dict)
    cost: bool | None = None
    """True if higher is worse; None: nobody has said so, and labels whose names say it are refused."""
    rules: int = FIRST_RULES
    """The version of the rules by which a checkpoint is read, its names of labels and Beaver's normaliser: what was
    saved before there were two has the first."""

    def load(self) -> Any:
        """Load the scorer, with its weights in memory; of a cost model, minus that."""
        at = find_source(self.name, self.revision, self.base, self.placement, self.tokenizer)
        kind = self.kind or detect_kind(at.checkpoint, at.base, self.placement.trust_remote_code)
        if kind == "sequence-classifier" and "output" in self.options:
            kind = "multi-attribute"
        if self.rules >= RULES and at.base.config.get("score_type") == "cost" and self.cost is None:  # Beaver's
            raise ValueError(
                Message(
                    "the model's config has the score_type 'cost', of which more is worse: say "
                    f"{setting('cost', 'True', option='--cost')}, which makes the score minus that, or "
                    f"{setting('cost', 'False', option='--no-cost')} if it is meant so"
                )
            )
        check_options(kind, self.options, self.reference is not None, bool(at.checkpoint.adapter))
        shares = "share_prefixes" in {each.name for each in fields(CLASSES[kind])}
        options = {name: value for name, value in self.options.items() if shares or name != "share_prefixes"}
        match kind:
            case "sequence-classifier" | "cross-encoder":
                scorer = self._load_classifier(at, CLASSES[kind], options)
            case "multi-attribute":
                scorer = _load_multi_attribute(at, options, self.kind is None)
            case "value-head":
                scorer = _load_value_head(at, options, self.rules)
            case "process":
                # The first rules read no names: the good label was the second.
                scorer = _load_process(at, options if self.rules >= RULES else {"label": 1, **options})
            case "judge" | "expected-rating" | "rated-judge" | "token-logit":
                scorer = CLASSES[kind](*_load_writer(at, kind), **options)
            case "implicit":
                scorer = self._load_implicit(at, options)
            case "preference-head":
                scorer = _load_preference_head(at, options)
        return Cost(scorer) if self.cost else scorer

    def _load_classifier(self, at: Source, kind: Any, options: Mapping[str, Any]) -> Any:
        has_config = at.base.config.get("model_type") in transformers.CONFIG_MAPPING
        if has_config and not at.checkpoint.adapter and self.rules >= RULES:
            # What names do not say is asked about before any weight is loaded; an adapter's head has no names.
            resolve_labels(options.get("labels"), parse_config(at.base), self.cost)
        model, tokenizer = _load_both(at, transformers.AutoModelForSequenceClassification)
        labels = self._resolve_labels(model.config, options.get("labels"))
        # Of custom code nobody knows that its head has as many outputs as its config says.
        if not needs_code(at.base):
            check_labels(labels, model.config.num_labels)
        scorer = kind(model, tokenizer, **{**options, "labels": labels})
        # Custom code may look for tokens that made-up inputs lack.
        if not needs_code(at.base):
            scorer.try_out()
        return scorer

    def _resolve_labels(self, config: Any, chosen: Labels | None) -> Labels:
        """Return the labels that make one score; a reward that was saved under the first rules keeps those."""
        if self.rules >= RULES:
            return resolve_labels(chosen, config, self.cost)
        labels = apply_first_rules(config.id2label) if chosen is None else chosen
        try:
            today = resolve_labels(chosen, config, self.cost)
        except ValueError as error:
            logger.warning("%s goes on as it was saved, with %s, but %s", self.name, labels, error)
            return labels
        if today != labels:
            message = "%s goes on as it was saved, with %s, but by their names its labels are %s: calibrate again"
            logger.warning(message, self.name, labels, today)
        return labels

    def _load_implicit(self, at: Source, options: Mapping[str, Any]) -> ImplicitReward:
        model, tokenizer = _load_writer(at, "implicit")
        reference = None
        if self.reference is not None:
            tuned_from = find_source(self.reference, None, None, self.placement)
            reference = tuned_from.model(transformers.AutoModelForCausalLM)
            check_same_tokens(tokenizer, tuned_from, reference)
        return ImplicitReward(model, tokenizer, reference, **options)


def _load_multi_attribute(at: Source, options: Mapping[str, Any], detected: bool) -> MultiAttribute:
    if "output" not in options and detected:
        raise ValueError(
            Message(
                f"{at.checkpoint.name} is {architecture(at.base)}: say which output of its forward is the score, "
                f"{setting('output', 'score')}, or {setting('output', '0')} for the first; "
                f"{setting('kind', 'multi-attribute')} if it returns the scores themselves"
            )
        )
    auto = transformers.AutoModelForSequenceClassification if classifies(at.base) else transformers.AutoModel
    return MultiAttribute(*_load_both(at, auto), **{"output": None, **options})


def _load_value_head(at: Source, options: Mapping[str, Any], rules: int) -> ValueHead:
    if not at.checkpoint.value_heads:
        raise ValueError(
            f"{at.checkpoint.name} has no value head: no linear layers beside its body that end in one output"
        )
    if at.base.config.get("pooling") == "mean":
        raise ValueError(
            f"{at.base.name} says pooling='mean', and kind value-head reads the last token: score with a callable of "
            "yours that averages its head over all tokens"
        )
    head = load_head(at.checkpoint, options.get("head"))
    auto = choose_auto_class(at.base.config, bool(at.checkpoint.adapter))
    settings = {**read_normalisation(at.base, beaver=rules >= RULES), **options, "head": head}
    return ValueHead(*_load_both(at, auto), **settings)


def _load_preference_head(at: Source, options: Mapping[str, Any]) -> PreferenceHeadScorer:
    """Load a preference head with its model: the one beside it, or the one that it was trained on."""
    base, head = replace(at, checkpoint=at.base), at.checkpoint
    model = base.model(transformers.AutoModelForCausalLM)
    settings = {name: value for name, value in options.items() if name != "any_base"}
    tokenizer, any_base = base.tokenizer(model), bool(options.get("any_base"))
    headed = HeadedModel.attach(head.name, model, tokenizer, revision=head.revision, any_base=any_base)
    return PreferenceHeadScorer(headed, **settings)


def _load_process(at: Source, options: Mapping[str, Any]) -> ProcessReward:
    """Load a process reward model, which writes its verdict as one of two answers, or classifies tokens."""
    if options.get("answers") is not None:
        return ProcessReward(*_load_writer(at, "process"), **options)
    classes = at.base.config.get("auto_map", {}) if needs_code(at.base) else {"AutoModelForTokenClassification": ""}
    classifies_tokens = "AutoModelForTokenClassification" in classes
    auto = transformers.AutoModelForTokenClassification if classifies_tokens else transformers.AutoModel
    return ProcessReward(*_load_both(at, auto), **options)


def _load_writer(at: Source, kind: str) -> tuple[Any, Any]:
    check_writes(at.checkpoint, at.base, kind)
    if not is_encoder_decoder(at.base):
        return _load_both(at, transformers.AutoModelForCausalLM)
    if kind not in ("judge", "expected-rating"):
        raise ValueError(
            f"{at.base.name} is a {architecture(at.base)}, an encoder-decoder, whose words the kinds judge and "
            f"expected-rating read; kind {kind!r} reads those of a causal language model"
        )
    return _load_both(at, transformers.AutoModelForSeq2SeqLM)


def _load_both(at: Source, auto: Any) -> tuple[Any, Any]:
    model = at.model(auto)
    return model, at.tokenizer(model)
