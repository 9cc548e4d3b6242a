"""What `load_scorer` is told about a kind of reward model, checked before any weight is loaded."""

import operator
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast, get_args

import numpy as np

from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.checkpoints import Kind
from calibrated_rewards.models.labels import Label, Labels
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.cross_encoder import CrossEncoder
from calibrated_rewards.scorers.implicit import ImplicitReward
from calibrated_rewards.scorers.judge import ExpectedRating, Judge
from calibrated_rewards.scorers.multi_attribute import MultiAttribute
from calibrated_rewards.scorers.process import ProcessReward
from calibrated_rewards.scorers.rated_judge import RatedJudge
from calibrated_rewards.scorers.sequence_classifier import SequenceClassifier
from calibrated_rewards.scorers.token_logit import TokenLogit
from calibrated_rewards.scorers.value_head import ValueHead

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
}
# What `load_scorer` finds for itself.
LOADED = {"model", "tokenizer", "reference"}
TEXT = {each.name for each in fields(Text)}


def named(kind: str | None) -> Kind | None:
    """A kind by its name, with hyphens or underscores.

    >>> named("expected_rating")
    'expected-rating'
    """
    if kind is None:
        return None
    name = kind.replace("_", "-")
    if name not in CLASSES:
        kinds = ", ".join(get_args(Kind))
        raise ValueError(Message(f"a reward model's kind is one of {kinds}, got {setting('kind', repr(kind))}"))
    return name


def path(given: Any, what: str) -> str:
    """Where something is, as text; what is in memory already is for the classes."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(
            f"load_scorer needs {what} to be a folder or a repository's name, got {type(given).__name__}: models and "
            "tokenizers in memory go to a class, SequenceClassifier(model, tokenizer), or, for a reference, "
            "calibrated_rewards.scorers.implicit.ImplicitReward(model, tokenizer, reference)"
        )
    return os.fspath(given)


def text_of(text: Any, options: Mapping[str, Any]) -> Text | None:
    """The `Text` that is given, or that its settings among the options make."""
    settings = {name: value for name, value in options.items() if name in TEXT}
    if text is not None and settings:
        raise TypeError(f"load_scorer takes text= or {', '.join(settings)}, got both: put them into Text(...)")
    if text is not None and not isinstance(text, Text):
        raise TypeError(f"load_scorer needs text= Text(...) of calibrated_rewards.models.text, got text={text!r}")
    return Text(**settings) if settings else text


def labels_from(given: Any) -> Labels | None:
    """The labels; a number is that label's logit.

    >>> labels_from(2)
    Label(index=2)
    """
    if given is None or callable(given):
        return cast(Labels | None, given)
    try:
        return Label(operator.index(given))
    except TypeError:
        wanted = "Label(i), Difference(good, bad), Expected(values), Ordinal() or Weighted(weights)"
        raise TypeError(
            f"load_scorer needs labels= {wanted} of calibrated_rewards.models.labels, got labels={given!r}"
        ) from None


def check_labels(labels: Labels, outputs: int) -> None:
    """Ask the labels for a score of zeros: they fail now if they do not fit the model."""
    found = np.shape(labels(np.zeros((1, outputs), np.float32)))
    if found != (1,):
        raise ValueError(f"labels give one score for each input, {labels} gave shape {found} for 1 input")


def check_score_type(config: Mapping[str, Any], cost: bool | None) -> None:
    """Ask about a model whose config says that it gives costs (Beaver's score_type) while nobody has."""
    if config.get("score_type") == "cost" and cost is None:
        raise ValueError(
            Message(
                "the model's config has the score_type 'cost', of which more is worse: say "
                f"{setting('cost', 'True', option='--cost')}, which makes the score minus that, or "
                f"{setting('cost', 'False', option='--no-cost')} if it is meant so"
            )
        )


def check_options(kind: Kind, options: Mapping[str, Any], reference: bool, adapter: bool) -> None:
    """Refuse what the kind's class does not take, and an implicit reward without what it is relative to."""
    known = {each.name for each in fields(CLASSES[kind])} - LOADED
    # `share_prefixes=False` holds for kinds that never share.
    unknown = sorted(set(options) - known - {"share_prefixes"})
    if unknown:
        raise TypeError(Message(f"a {kind} model takes no {setting(unknown[0])}; it takes {', '.join(sorted(known))}"))
    if kind != "implicit" and reference:
        raise TypeError(Message(f"{setting('reference')} is for implicit rewards, this is a {kind} model"))
    if kind == "implicit" and not (reference or adapter or options.get("reference_free")):
        raise ValueError(
            Message(
                f"an implicit reward needs {setting('reference')}, the model that this one was tuned from, or "
                f"{setting('reference_free', 'True')}"
            )
        )


def taken(kind: Kind, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, without sharing where the kind never shares."""
    shares = "share_prefixes" in {each.name for each in fields(CLASSES[kind])}
    return {name: value for name, value in options.items() if shares or name != "share_prefixes"}
