"""What is shipped is what is here, and the house style's numbers hold: lengths of files and functions, docstrings."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import calibrated_rewards

PACKAGE = Path(calibrated_rewards.__file__).parent
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]

FILE_LINES, FUNCTION_LINES = 400, 60
# What breaks the limits, and why that is better than a cut. CONTRIBUTING.md lists them too.
LONG_FILES = {
    "training.check_settings.frameworks": "tables: the rules of each framework, one after the other",
    "calibration.sources": "one idea, a few lines over",
    "models.shared_prefix": "one idea, a few lines over",
    "table.storage": "one idea, a few lines over",
    "testing.check_side_effects": "one idea, a few lines over",
}
LONG_FUNCTIONS: dict[str, str] = {}
# A helper lives in the file that uses it; used by two, it is a noun that has no file yet.
NO_NOUNS = {"base", "common", "config", "constants", "errors", "helpers", "misc", "registry", "types", "utils"}

# Not the adapters, which an installed package has in a folder of its own: test_adapter_files.py has them.
HERE = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "adapters")
FILES = {path.relative_to(PACKAGE).with_suffix(""): path for path in HERE}
# By dotted name; a folder's __init__ is called as the folder.
SOURCES = {".".join(name.parts).removesuffix(".__init__"): path.read_text() for name, path in FILES.items()}
TESTS = {path.stem: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}


LEFT_OUT = {"skip", "skipif", "xfail", "importorskip"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines from `def` to the end, less the docstring."""
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_every_folder_is_in_the_packages_list() -> None:
    """A folder that is forgotten in `packages` breaks nothing but the wheel."""
    here = {".".join(("calibrated_rewards", *path.parent.relative_to(PACKAGE).parts)) for path in PACKAGE.rglob("*.py")}

    assert sorted(SETUPTOOLS["packages"]) == sorted(here | set(SETUPTOOLS.get("package-dir", ())))


def test_the_types_are_shipped() -> None:
    """Type checkers of users see ours: py.typed is there, and is package data."""
    assert (PACKAGE / "py.typed").is_file()
    assert SETUPTOOLS["package-data"]["calibrated_rewards"] == ["py.typed"]


def test_files_that_are_no_modules_are_package_data() -> None:
    """A template that is forgotten in `package-data` is missing in the wheel alone."""
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    data = SETUPTOOLS["package-data"].items()
    declared = {PACKAGE.joinpath(*package.split(".")[1:], name) for package, names in data for name in names}

    assert {path for path in files if (PACKAGE / "adapters") not in path.parents} == declared


def test_one_version() -> None:
    """pyproject.toml, the package and the install agree; the changelog starts with that or with what is next."""
    version = PROJECT["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert (calibrated_rewards.__version__, distribution("calibrated-rewards").version) == (version, version)
    assert newest is not None
    assert newest[1] in {"Unreleased", version}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    groups = [PROJECT["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_what_is_required_is_pinned(requirement: Requirement) -> None:
    """constraints.txt has one exact version of each requirement, and it lies in the range that is declared."""
    if requirement.name != "calibrated-rewards":
        assert requirement.specifier.contains(pins()[requirement.name.lower().replace("_", "-")])
    else:
        assert requirement.extras <= PROJECT["project"]["optional-dependencies"].keys()


def roots(source: str) -> set[str]:
    """The top-level names that a source imports from, next to the standard library and this repository."""
    nodes = list(ast.walk(ast.parse(source)))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    ours = {"calibrated_rewards", *(path.stem for path in (ROOT / "tests").rglob("*.py")), "environment"}
    return {name.split(".")[0] for name in named} - sys.stdlib_module_names - ours


def declared(*extras: str) -> set[str]:
    """The top-level names that come with the base install and these extras, and with the extras that those name."""
    groups = [PROJECT["project"]["dependencies"], *(PROJECT["project"]["optional-dependencies"][e] for e in extras)]
    required = [Requirement(line) for group in groups for line in group]
    names = {requirement.name.lower().replace("-", "_") for requirement in required}
    own = {
        extra for requirement in required if requirement.name == "calibrated-rewards" for extra in requirement.extras
    }
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    return {modules.get(name, name) for name in names} | (declared(*own) if own else set())


# Tensors come with torch; distil is for TRL; server serves; plots draw; evaluate reads rollouts.
OUTSIDE = {"torch", "datasets", "trl", "fastapi", "starlette", "matplotlib", "pyarrow"}


def test_what_is_imported_is_required() -> None:
    """The base install is enough outside of the folders, but for what a module is about."""
    scripts = (path for path in (ROOT / "benchmarks").rglob("*.py") if path.parent.name != "frameworks")
    benchmarks = {path.stem: path.read_text() for path in scripts}  # frameworks have environments of their own

    base = {module: source for module, source in SOURCES.items() if "." not in module}

    assert set().union(*map(roots, base.values())) - declared() <= OUTSIDE
    extras = ("all", "vllm", "replicas")
    assert set().union(*map(roots, SOURCES.values())) - declared(*extras) == set()
    proof = {path.stem for path in (ROOT / "benchmarks" / "proof").glob("*.py")}  # on the path of the tests
    assert set().union(*map(roots, TESTS.values())) - declared("test") - proof == set()
    assert set().union(*map(roots, benchmarks.values())) - declared("test", "dev", "vllm") - set(benchmarks) == set()


def test_pins_hold_on_any_machine() -> None:
    """Nothing but `name==version`: no local build, no path, no host."""
    for name, version in pins().items():
        assert re.fullmatch(r"[a-z0-9.-]+", name), name
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)*(\.?(a|b|rc|post)[0-9]+)?", version), (name, version)


@pytest.mark.parametrize("module", SOURCES)
def test_a_file_is_one_idea(module: str) -> None:
    """A module says what it is, has a name that says something, and can be read in one sitting."""
    lines = len(SOURCES[module].splitlines())

    assert module.rsplit(".", maxsplit=1)[-1] not in NO_NOUNS
    assert ast.get_docstring(ast.parse(SOURCES[module]))
    assert (lines > FILE_LINES) == (module in LONG_FILES), f"{module} has {lines} lines"


@pytest.mark.parametrize("module", SOURCES)
def test_functions_are_short(module: str) -> None:
    """No function has more than 60 lines next to its docstring, but for those listed."""
    lengths = {f"{module}.{function.name}": length(function) for function in functions(SOURCES[module])}
    listed = {name for name in LONG_FUNCTIONS if name.startswith(f"{module}.")}

    assert {name for name, lines in lengths.items() if lines > FUNCTION_LINES} == listed, lengths


@pytest.mark.parametrize("module", TESTS)
def test_every_test_says_what_it_holds(module: str) -> None:
    """Each test has its one line, and none is skipped or expected to fail."""
    tests = [function for function in functions(TESTS[module]) if function.name.startswith("test_")]

    assert [test.name for test in tests if not ast.get_docstring(test)] == []
    assert (
        LEFT_OUT
        & {
            node.attr
            for node in ast.walk(ast.parse(TESTS[module]))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("pytest")
        }
        == set()
    )


def test_each_room_has_its_tests() -> None:
    """tests/ has a folder for each room of the package, with tests in it."""
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"adapters"}  # tested by framework

    assert rooms - {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} == set()


def test_contributing_lists_what_breaks_the_style() -> None:
    """What is excepted here is admitted there."""
    admitted = (ROOT / "CONTRIBUTING.md").read_text().split("## Exceptions")[1]

    assert [name for name in (*LONG_FILES, *LONG_FUNCTIONS) if f"`{name}`" not in admitted] == []


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff names the version and the licence of pyproject.toml."""
    cited = dict(re.findall(r"^(\w+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))

    assert (cited["version"], cited["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])


def test_lengths_are_measured() -> None:
    """The measure counts the signature and the body, not the docstring; and it sees methods and inner functions."""
    lines = ["class A:", "    def f(", "        self,", "    ):", "        '''One.", "", "        Two.'''"]
    source = "\n".join([*lines, "        def g(): return 1", "        return g"])
    found: dict[str, Any] = {function.name: length(function) for function in functions(source)}

    assert found == {"f": 5, "g": 1}
