"""Scorers that pickle as how they are loaded; a recipe here is a small one that counts how often it is used."""

import pickle
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
from torch import nn

from calibrated_rewards.scorers.classifiers import CrossEncoder, MultiAttribute, SequenceClassifier
from calibrated_rewards.scorers.protocol import Loaded, fingerprint
from calibrated_rewards.scorers.value_head import ValueHead

LOADED: list[str] = []


@dataclass(frozen=True)
class Tiny:
    """How to make a classifier from a seed."""

    name: str
    seed: int = 0

    def load(self) -> Any:
        """The classifier, slowly enough for a second thread to come too soon."""
        LOADED.append(self.name)
        time.sleep(0.05)
        return SequenceClassifier(tiny.classifier(self.seed), tiny.tokenizer())


@pytest.fixture(autouse=True)
def fresh() -> None:
    LOADED.clear()


def test_delegates() -> None:
    """The scores and the fingerprint are those of the scorer that the recipe makes, which is made once."""
    loaded, plain = Loaded(Tiny("a")), SequenceClassifier(tiny.classifier(), tiny.tokenizer())
    np.testing.assert_array_equal(loaded(["a", "b"], ["c", "d"]), plain(["a", "b"], ["c", "d"]))
    assert fingerprint(loaded) == fingerprint(plain)
    assert loaded.scorer is loaded.scorer
    assert LOADED == ["a"]


def test_pickles_as_recipe() -> None:
    """A pickle is small, loads when it is first called, and gives the same scores and fingerprint."""
    loaded = Loaded(Tiny("a"))
    scores = loaded(["a"], ["b"])
    data = pickle.dumps(loaded)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert LOADED == ["a"]
    np.testing.assert_array_equal(again([], []), np.empty(0, np.float32))
    np.testing.assert_array_equal(again(["a"], ["b"]), scores)
    assert again.fingerprint() == loaded.fingerprint()
    assert LOADED == ["a", "a"]
    assert again == loaded


def lengths(_: list[str], completions: list[str]) -> Any:
    """A scorer that checks nothing, and has no number for an empty completion."""
    return np.array([len(completion) or np.nan for completion in completions], np.float32)


@dataclass(frozen=True)
class Careless:
    """A recipe for it."""

    name: str = "careless"

    def load(self) -> Any:
        """The function."""
        return lengths


def test_refuses_what_are_no_pairs() -> None:
    """A text in the place of a list, lists of two lengths, and scores that are nan are errors; names are free."""
    loaded = Loaded(Careless())
    with pytest.raises(TypeError, match="prompts are a list"):
        loaded("ab", ["c", "d"])
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        loaded(["a", "b"], ["c"])
    with pytest.raises(ValueError, match=r"lengths gave nan for completion '' of prompt 'b'"):
        loaded(["a", "b"], ["c", ""])
    np.testing.assert_array_equal(loaded(prompts=["a"], completions=["bc"]), [2])


@dataclass(frozen=True)
class WithOptions:
    """A recipe with options, as those of checkpoints have."""

    name: str
    options: dict[str, Any]

    def load(self) -> Any:
        """Never called here."""


def test_hashes() -> None:
    """A scorer is a key, though its recipe holds a dict; pickled, it is the same key."""
    loaded = Loaded(WithOptions("a", {"beta": 1}))
    assert {loaded: 1}[pickle.loads(pickle.dumps(loaded))] == 1
    assert loaded != Loaded(WithOptions("a", {"beta": 2}))


def test_two_threads_load_once() -> None:
    """Whoever asks first loads, the other waits."""
    loaded = Loaded(Tiny("a"))
    threads = [threading.Thread(target=loaded, args=(["a"], ["b"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert LOADED == ["a"]


def test_repr_says_what_was_chosen() -> None:
    """Before loading the name alone, and then the kind, the labels and the limit."""
    loaded = Loaded(Tiny("a"))
    assert repr(loaded) == "Loaded('a')"
    loaded(["a"], ["b"])
    assert repr(loaded) == "Loaded('a', SequenceClassifier, Label(index=0), max_length=512)"


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", [CrossEncoder, MultiAttribute, ValueHead])
def test_models_in_memory_do_not_pickle(kind: Any, used: bool) -> None:
    """A scorer around a model object says what to do instead, before and after it is used."""
    rest = {ValueHead: (nn.Linear(32, 1),), MultiAttribute: ("logits",)}.get(kind, ())
    scorer = kind(tiny.classifier(), tiny.tokenizer(), *rest)
    if used:
        scorer(["a"], ["b"])
    with pytest.raises(TypeError, match=rf"{kind.__name__} holds a model in memory.*load_scorer"):
        pickle.dumps(scorer)
