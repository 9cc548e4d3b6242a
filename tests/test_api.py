"""The public names, pinned: what `import calibrated_rewards as cr` promises."""

import ast
import inspect
import pickle
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import calibrated_rewards as cr

PUBLIC = {
    "BestOf",
    "BestOfUpTo",
    "CalibratedReward",
    "Chain",
    "EmpiricalCDF",
    "Exponential",
    "Identity",
    "Log",
    "ReferenceTable",
    "RewindAndRepeat",
    "SoftBestOf",
    "Standard",
    "Tabulated",
    "UnknownPromptError",
    "WorstOf",
    "evaluation",
    "id_key",
    "optimal_transform",
    "optimum",
    "prompt_key",
    "scaled",
    "theory",
    "tune",
}
DESCRIPTORS = (property, cached_property, classmethod, staticmethod)
PACKAGE = Path(cr.__file__).parent
# Not the adapters, which an installed package has in a folder of its own: test_adapter_files.py has them.
HERE = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "adapters"]
FILES = [path.with_suffix("") for path in HERE if path.stem != "__init__"]
MODULES = sorted(".".join(path.parts) for path in FILES)


def exports() -> list[ast.alias]:
    tree = ast.parse(Path(cr.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    return [alias for node in imports for alias in node.names]


def test_the_public_names() -> None:
    """Taking one away breaks somebody, and adding one is a promise: both start here."""
    assert {alias.name for alias in exports()} == PUBLIC


def test_a_heavy_name_is_imported_when_it_is_asked_for() -> None:
    """`recommend` is public too, and an unknown name is the error that Python has for it."""
    assert cr.recommend is import_module("calibrated_rewards.evaluation.recommend").recommend
    with pytest.raises(AttributeError, match="has no attribute 'recomend'"):
        _ = cr.recomend


def test_names_are_exported_for_type_checkers() -> None:
    """Each is written `x as x`, which type checkers take for public, and is there."""
    assert [alias.name for alias in exports() if alias.asname != alias.name] == []
    assert [name for name in PUBLIC if name not in vars(cr)] == []


def own(module: ModuleType) -> list[tuple[str, object]]:
    """The public functions and classes that a module defines."""
    defined = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    return [(name, value) for name, value in defined if value.__module__ == module.__name__ and name[0] != "_"]


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_documented(module: str) -> None:
    """Every public function, class, method and property says what it is, in its own words."""
    for name, value in own(import_module(f"calibrated_rewards.{module}")):
        assert value.__doc__, name
        assert not value.__doc__.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"
        for method, member in vars(value).items() if inspect.isclass(value) else ():
            if method[0] != "_" and (inspect.isfunction(member) or isinstance(member, DESCRIPTORS)):
                assert member.__doc__, f"{name}.{method}"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_one_home(module: str) -> None:
    """A public name of the package is the very object of the module that defines it."""
    for name, value in own(import_module(f"calibrated_rewards.{module}")):
        if name in PUBLIC:
            assert vars(cr)[name] is value


def test_the_names_that_take_no_arguments_pickle() -> None:
    """Transforms, procedures and calibrations reach a spawned worker by value."""
    for thing in (cr.Identity(), cr.Log(), cr.Standard(), cr.EmpiricalCDF(), cr.Chain(cr.Log(), cr.Exponential(2.0))):
        assert pickle.loads(pickle.dumps(thing)) == thing
