"""Names: every transform can be saved and read back from its repr, and names of the command line go there and back."""

import argparse
import json
from dataclasses import is_dataclass

import pytest
from hypothesis import given
from strategies import calibrated_procedures, transforms

from calibrated_rewards import theory
from calibrated_rewards.reward import saving
from calibrated_rewards.theory import mixtures, named, procedures
from calibrated_rewards.theory.named import NAMED, format_name, parse_procedure, parse_repr, parse_transform

TRANSFORMS = {
    name: cls
    for name, cls in vars(theory).items()
    if isinstance(cls, type) and is_dataclass(cls) and issubclass(cls, theory.Transform)
}


def test_every_transform_can_be_saved_and_read_from_its_repr():
    """A class that is in no list would fail at the end of a run, when the reward is saved."""
    assert {"Identity", "Chain", "Optimal"} <= set(TRANSFORMS)
    for name, cls in TRANSFORMS.items():
        assert named.WITH_REPR.get(name) is cls, f"{name} is not in theory.named.WITH_REPR"
        assert name in saving.CLASSES, f"{name} is not in reward.saving.CLASSES"
        assert saving._find_class(name) is cls
    assert set(named.NAMED.values()) <= set(TRANSFORMS.values())


def test_every_procedure_can_be_saved():
    """And is read from its repr, but for Calibrated, whose function no repr holds."""
    classes = {
        name
        for module in (procedures, mixtures)
        for name, cls in vars(module).items()
        if is_dataclass(cls) and cls.__module__ == module.__name__
    }
    assert classes <= set(saving.CLASSES)
    assert classes - {"Calibrated"} == {name for name, cls in named.WITH_REPR.items() if cls not in TRANSFORMS.values()}


@given(transforms)
def test_transforms_come_back_from_their_json_and_their_repr(transform):
    """Equal, whatever the class."""
    assert saving.from_json(saving.to_json(transform)) == transform
    assert parse_repr(repr(transform)) == transform


@pytest.mark.parametrize("name", ["identity", "log", "exp:10", "exp:-0.5", "exp:10.1234567"])
def test_a_name_comes_back_from_its_transform(name):
    """`format_name` writes what `parse_transform` reads."""
    assert format_name(parse_transform(name).transform) == name


def test_help_names_every_transform_of_the_command_line():
    """A row of NAMED that the help lacks would be found by nobody."""
    assert [word.partition(":")[0] for word in named.TRANSFORM_NAMES.replace(" or", ",").split(", ")] == list(NAMED)
    assert named.TRANSFORM_HELP.startswith(named.TRANSFORM_NAMES)


@given(calibrated_procedures)
def test_a_procedure_comes_back_from_its_name(procedure):
    """And from its JSON; and that name is no transform's: it has no KL."""
    name = format_name(procedure)
    assert parse_procedure(name) == procedure
    assert saving.from_json(json.loads(json.dumps(saving.to_json(procedure)))) == procedure
    with pytest.raises(argparse.ArgumentTypeError, match="best-of:N:KL"):
        parse_transform(name)


def test_large_counts_are_written_in_full():
    """1e+06 would not be read back."""
    assert format_name(theory.BestOf(1_000_000)) == "best-of:1000000"


@pytest.mark.parametrize("end", ["", ":0.5"])
def test_a_parameter_that_its_class_refuses_is_named(end):
    """Not the list of names: exp:0 is one, and what it lacks is another number."""
    with pytest.raises(argparse.ArgumentTypeError, match=r"exp:0.*: Exponential needs 1e-9 <= \|t\| <= 700, got t=0.0"):
        parse_transform(f"exp:0{end}")
    with pytest.raises(argparse.ArgumentTypeError, match="best-of:0:1: BestOf needs"):
        parse_transform("best-of:0:1")


def test_an_n_that_is_not_known_has_a_name():
    """best-of:1-N is a procedure, and with a KL the exact optimum; of weights a name says nothing."""
    named = parse_transform("best-of:1-16:1.0")

    assert (named.procedure, named.kl) == (theory.BestOfUpTo(16), 1.0)
    assert named.transform == theory.optimum(theory.BestOfUpTo(16), kl=1.0).transform
    assert format_name(theory.BestOfUpTo(2, (1, 3))) == "BestOfUpTo(n=2, weights=(1.0, 3.0))"


@pytest.mark.parametrize("name", ["best-of:2-16", "best-of:1-", "best-of:1-0", "best-of:-4", "worst-of:1-4"])
def test_no_other_range_is_a_procedure(name):
    """Only 1-N is, and only of the best."""
    with pytest.raises(ValueError, match=f"best-of:1-N .*, got '{name}'"):
        parse_procedure(name)
    with pytest.raises(argparse.ArgumentTypeError, match=r"best-of:1-N:KL .*, with numbers|needs a whole n >= 1"):
        parse_transform(f"{name}:1")


@pytest.mark.parametrize("name", ["power:2", "exp", "exp:x", "identity:1:2", "best-of:4", "best-of:x:1", "log:", ""])
def test_what_is_no_name_is_refused_with_the_names(name):
    """The message lists what there is, and what was given."""
    with pytest.raises(argparse.ArgumentTypeError, match=f"a transform is identity, log or exp:T.*got {name!r}"):
        parse_transform(name)
