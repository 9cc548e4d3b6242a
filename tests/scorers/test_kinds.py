"""What `load_scorer` is told, refused before any weight is there to load."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny

from calibrated_rewards.models.checkpoints import Kind
from calibrated_rewards.models.labels import Expected, Label
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.loading import (
    CLASSES,
    check_labels,
    check_options,
    labels_from,
    named,
    path,
    taken,
    text_of,
)


def test_every_kind_has_a_class() -> None:
    """The names and the classes are the same list; underscores will do."""
    assert tuple(CLASSES) == get_args(Kind)
    for kind in CLASSES:
        assert named(kind.replace("-", "_")) == named(kind) == kind
    assert named(None) is None
    with pytest.raises(ValueError, match=r"kind is one of .*rated-judge.*got kind='rater'"):
        named("rater")


def test_paths() -> None:
    """Text and paths name a checkpoint; what is in memory is for the classes."""
    assert path(Path("a", "b"), "base") == path("a/b", "base") == "a/b"
    with pytest.raises(TypeError, match=r"needs reference to be a folder.*LlamaForCausalLM.*ImplicitReward\("):
        path(tiny.causal(), "reference")
    with pytest.raises(TypeError, match=r"needs tokenizer to be a folder.*SequenceClassifier\(model, tokenizer\)"):
        path(tiny.tokenizer(), "tokenizer")


def test_text() -> None:
    """A Text, or its settings, but not both, and nothing else."""
    assert text_of(None, {"mark": "x"}) is None
    assert text_of(Text(chat=True), {"mark": "x"}) == Text(chat=True)
    assert text_of(None, {"max_length": 7, "mark": "x", "append_eos": True}) == Text(max_length=7, append_eos=True)
    with pytest.raises(TypeError, match=r"text= or max_length, got both"):
        text_of(Text(chat=True), {"max_length": 7})
    with pytest.raises(TypeError, match=r"text= Text\(...\).*got text=512"):
        text_of(512, {})


@pytest.mark.parametrize("index", [2, np.int64(2)])
def test_labels(index: Any) -> None:
    """A number is that label's logit; what is no number and cannot be called is refused, with what there is."""
    assert labels_from(index) == Label(2)
    assert labels_from(Expected((1, 2))) == Expected((1, 2))
    assert labels_from(None) is None
    for wrong in ("2", [1, 2], 1.0):
        with pytest.raises(TypeError, match=r"labels= Label\(i\), .*got labels="):
            labels_from(wrong)


def test_labels_that_do_not_fit() -> None:
    """Labels meet the number of outputs at once, not at the first score."""
    check_labels(Label(2), 3)
    with pytest.raises(IndexError, match="it has 3"):
        check_labels(Label(7), 3)
    with pytest.raises(ValueError, match=r"one score for each input, .*shape \(1, 3\)"):
        check_labels(np.exp, 3)


def test_options() -> None:
    """An option that the kind's class does not have is named, with those that it has."""
    check_options("process", {"mark": "+", "text": Text(), "share_prefixes": False}, False, False)
    with pytest.raises(TypeError, match=r"a process model takes no marks=; it takes .* mark, "):
        check_options("process", {"marks": "+"}, False, False)
    with pytest.raises(TypeError, match=r"takes no model="):
        check_options("judge", {"model": 1}, False, False)
    check_options("cross-encoder", {"share_prefixes": False}, False, False)
    assert taken("cross-encoder", {"share_prefixes": False, "batch_tokens": 1}) == {"batch_tokens": 1}
    assert taken("judge", {"share_prefixes": False}) == {"share_prefixes": False}


def test_references() -> None:
    """An implicit reward needs one, an adapter to switch off, or to be told that there is none; other kinds do not."""
    for reference, adapter, options in [(True, False, {}), (False, True, {}), (False, False, {"reference_free": True})]:
        check_options("implicit", options, reference, adapter)
    with pytest.raises(ValueError, match=r"needs reference=.* or reference_free=True"):
        check_options("implicit", {"beta": 0.1}, False, False)
    with pytest.raises(TypeError, match="reference= is for implicit rewards, this is a judge model"):
        check_options("judge", {}, True, False)
