"""What `load_scorer` is told, refused before any weight is there to load."""

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny

from calibrated_rewards import scorers
from calibrated_rewards.models.checkpoints import Kind
from calibrated_rewards.models.labels import Expected, Label
from calibrated_rewards.models.text import Text
from calibrated_rewards.scorers.loading import (
    CLASSES,
    check_labels,
    check_options,
    parse_kind,
    parse_labels,
    parse_path,
    parse_text,
)


def test_every_kind_has_a_class() -> None:
    """The names and the classes are the same list; underscores will do."""
    assert tuple(CLASSES) == get_args(Kind)
    for kind in CLASSES:
        assert parse_kind(kind.replace("-", "_")) == parse_kind(kind) == kind
    assert parse_kind(None) is None
    with pytest.raises(ValueError, match=r"kind is one of .*rated-judge.*got kind='rater'"):
        parse_kind("rater")


def test_paths() -> None:
    """Text and paths name a checkpoint; what is in memory is for the classes."""
    assert parse_path(Path("a", "b"), "base") == parse_path("a/b", "base") == "a/b"
    with pytest.raises(TypeError, match=r"needs reference to be a folder.*LlamaForCausalLM.*ImplicitReward\("):
        parse_path(tiny.causal(), "reference")
    with pytest.raises(TypeError, match=r"needs tokenizer to be a folder.*SequenceClassifier\(model, tokenizer\)"):
        parse_path(tiny.tokenizer(), "tokenizer")


def test_text() -> None:
    """A Text, or its settings, but not both, and nothing else."""
    assert parse_text(None, {"mark": "x"}) is None
    assert parse_text(Text(chat=True), {"mark": "x"}) == Text(chat=True)
    assert parse_text(None, {"max_length": 7, "mark": "x", "append_eos": True}) == Text(max_length=7, append_eos=True)
    with pytest.raises(TypeError, match=r"text= or max_length, got both"):
        parse_text(Text(chat=True), {"max_length": 7})
    with pytest.raises(TypeError, match=r"text= Text\(...\).*got text=512"):
        parse_text(512, {})


@pytest.mark.parametrize("index", [2, np.int64(2)])
def test_labels(index: Any) -> None:
    """A number is that label's logit; what is no number and cannot be called is refused, with what there is."""
    assert parse_labels(index) == Label(2)
    assert parse_labels(Expected((1, 2))) == Expected((1, 2))
    assert parse_labels(None) is None
    for wrong in ("2", [1, 2], 1.0):
        with pytest.raises(TypeError, match=r"labels= Label\(i\), .*got labels="):
            parse_labels(wrong)


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


def test_references() -> None:
    """An implicit reward needs one, an adapter to switch off, or to be told that there is none; other kinds do not."""
    for reference, adapter, options in [(True, False, {}), (False, True, {}), (False, False, {"reference_free": True})]:
        check_options("implicit", options, reference, adapter)
    with pytest.raises(ValueError, match=r"needs reference=.* or reference_free=True"):
        check_options("implicit", {"beta": 0.1}, False, False)
    with pytest.raises(TypeError, match="reference= is for implicit rewards, this is a judge model"):
        check_options("judge", {}, True, False)


def test_classes_of_the_guide_are_in_the_room() -> None:
    """The classes that docs/guides/reward_models.md says are in `scorers` can be imported from there."""
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "reward_models.md").read_text()
    table = guide.partition("| class in `scorers` |")[2].partition("\n\n")[0]
    names = {name for row in table.splitlines() for name in re.findall(r"`([A-Z][A-Za-z]+)", row.rpartition(" | ")[2])}
    assert {"SequenceClassifier", "MultiAttribute", "ImplicitReward", "Graded"} <= names
    missing = [name for name in sorted(names - {"PairRM"}) if not hasattr(scorers, name)]
    assert not missing
