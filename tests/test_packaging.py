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
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
# Modules without a test file of their own, and the one that tests them: parts that only the whole shows.
TESTED_WITH = {
    "__init__": "api",
    "choice": "optimal",
    "estimates": "evaluation",
    "finite_k_error": "finite_k",
    "fixed_references": "finite_k",
    "table_laws": "table_expectations",
    "score_procedures": "procedures",
    "__main__": "cli",
    "checks": "conformance",
    "checks.characters": "planted_faults",
    "checks.conversations": "planted_faults",
    "checks.odd_inputs": "planted_faults",
    "checks.positions": "planted_faults",
    "checks.process_state": "planted_faults",
    "checks.side_effects": "planted_faults",
    "checks.edge_inputs": "conformance",
    "checks.probes": "conformance",
    "checks.same_score": "conformance",
    "checks.subject": "conformance",
    "checks.whole_input": "conformance",
    "commands": "cli",
    "commands.check_scorer": "cli",
    "commands.reward_model": "cli",
    "reading": "body",
    "reading.completion_tokens": "implicit",
    "reading.fingerprint": "body",
    "reading.first_token": "judge",
    "reading.head_precision": "multi_attribute",
    "reading.messages": "text",
    "reading.next_token": "judge",
    "reading.question": "judge",
    "reading.trial": "architectures",
    "scorers": "protocol",
    "scorers.plain": "pairwise",
    "scorers.remote_address": "remote",
    "scorers.remote_dialects": "remote",
    "scorers.remote_retry": "remote",
    "scorers.remote_text": "remote",
    "scorers.remote_vllm": "remote",
    "table_build": "table",
    "table_mapped": "table_format",
    "table_search": "table",
    "table_summary": "table",
    "table_writer": "table_format",
    "testing": "procedures",
    "amortised.conditional": "amortised",
    "amortised.judgement": "amortised",
    "amortised.features": "amortised",
    "amortised.fit": "amortised",
    "amortised.network": "amortised",
    "amortised.prediction": "amortised",
    "amortised.sample": "amortised",
    "commands.policy": "policy_options",
    "commands.transform": "calibrate_command",
    "health.rollouts": "rollout_health",
    "health.row_statistics": "health",
    "health.sections": "health",
    "rollouts": "shard_files",
    "rollouts.adoption": "calibrate",
    "rollouts.cluster": "calibrate",
    "rollouts.directory": "calibrate",
    "rollouts.planning": "calibrate",
    "rollouts.rows": "sources",
    "rollouts.run": "calibrate",
    "rollouts.shard": "shard_files",
    "rollouts.tabulation": "calibrate",
    "rollouts.work": "calibrate",
    "samplers": "samplers_protocol",
    "samplers.agreement": "hf",
    "samplers.decoding": "samplers_protocol",
    "samplers.logprob": "vllm_sampler",
    "samplers.openai": "openai_sampler",
    "samplers.openai_answer": "openai_sampler",
    "samplers.policy": "hf",
    "samplers.rows": "hf",
    "samplers.vllm": "vllm_sampler",
    "samplers.vllm_engine": "vllm_sampler",
    "samplers.writing": "hf",
    "scorers.remote_crew": "openai_sampler",
    "scorers.remote_post": "openai_sampler",
    "commands.path": "cp",
    "commands.serve": "server",
    "commands.saved_reward": "importing",
    "faithful.areal_settings": "faithful",
    "faithful.check": "faithful",
    "faithful.lightrft_settings": "faithful",
    "faithful.nemo_settings": "faithful",
    "faithful.openrlhf_settings": "faithful",
    "faithful.rewarded": "faithful",
    "faithful.rules": "faithful",
    "faithful.sampled": "faithful",
    "faithful.skyrl_settings": "faithful",
    "faithful.slime_settings": "faithful",
    "faithful.swift_settings": "faithful",
    "faithful.trl_settings": "faithful",
    "faithful.verl_settings": "faithful",
    "recipes.grpo_plain": "recipes",
    "recipes.loop": "recipes",
    "recipes.ppo": "recipes",
    "rewarding": "reward",
    "rewarding.directory": "reward",
    "rewarding.handed_over": "adapters_frameworks",
    "rewarding.locating": "reward",
    "rewarding.lookup": "reward",
    "rewarding.naming": "reward",
    "rewarding.originals": "reward",
    "rewarding.raw_scores": "reward",
    "rewarding.scores": "reward",
    "rewarding.valuing": "reward",
    "serving": "server",
    "serving.desk": "server",
    "serving.dialects": "server",
    "serving.fields": "server",
    "serving.gate": "server",
    "serving.limits": "server",
    "serving.listening": "server",
    "serving.metrics": "server",
    "serving.replicas": "server",
    "serving.schema": "server",
    "checks.adapters": "check_adapter",
    "reading.adapters": "body",
    "faithful.spelled": "faithful",
    "faithful.trl_rules": "faithful",
    "rewarding.checked": "reward",
    "rewarding.strangers": "reward",
    "recipes.command": "recipes",
    "recipes.opening": "recipes",
    "arms": "reweighted",
    "bootstrap": "reweighted",
    "commands.error_text": "error_messages",
    "commands.frontier": "reweighted",
    "commands.numbers": "error_messages",
    "demo.assets": "demo",
    "demo.miniature": "demo",
    "demo.parts": "demo",
    "demo.pipeline": "demo",
    "demo.reward_models": "demo",
    "demo.scale": "demo",
    "demo.show": "demo",
    "outcomes": "evaluate",
    "prospects": "reweighted",
    "recipes.model": "train_rloo",
    "recipes.raw": "train_rloo",
    "recipes.run_folder": "train_rloo",
    "recipes.timing": "train_rloo",
    "recipes.together": "recipes",
    "recipes.train_grpo": "train_rloo",
    "recipes.trl_run": "train_rloo",
    "reporting": "report",
    "reporting.calibrated": "report",
    "reporting.examples": "report",
    "reporting.experiment": "report",
    "reporting.fresh": "report",
    "reporting.made": "report",
    "reporting.markup": "report",
    "reporting.outcome": "report",
    "reporting.page": "report",
    "reporting.promised": "report",
    "reporting.trained": "report",
    "responses": "evaluate",
    "rollouts.judged": "reweighted",
    "weighted_pools": "reweighted",
    "wording": "plots",
    "reporting.expected": "report",
    "reporting.kept": "report_files",
}
# A helper lives in the file that uses it; used by two, it is a noun that has no file yet.
NO_NOUNS = {"base", "common", "config", "constants", "errors", "helpers", "misc", "registry", "types", "utils"}

# Not the adapters, which an installed package has in a folder of its own: test_adapter_files.py has them.
HERE = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "adapters")
FILES = {path.relative_to(PACKAGE).with_suffix(""): path for path in HERE}
# By dotted name; a folder's __init__ is called as the folder.
SOURCES = {".".join(name.parts).removesuffix(".__init__"): path.read_text() for name, path in FILES.items()}
TESTS = {path.stem: path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))}


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
    ours = {"calibrated_rewards", *(path.stem for path in (ROOT / "tests").iterdir()), "environment"}
    return {name.split(".")[0] for name in named} - sys.stdlib_module_names - ours


def declared(*extras: str) -> set[str]:
    """The top-level names that come with the base install and these extras, and with the extras that those name."""
    groups = [PROJECT["project"]["dependencies"], *(PROJECT["project"]["optional-dependencies"][e] for e in extras)]
    required = [Requirement(line) for group in groups for line in group]
    names = {requirement.name.lower().replace("-", "_") for requirement in required}
    own = {
        extra for requirement in required if requirement.name == "calibrated-rewards" for extra in requirement.extras
    }
    return {"PIL" if name == "pillow" else name for name in names} | (declared(*own) if own else set())


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
    assert set().union(*map(roots, TESTS.values())) - declared("test") == set()
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
        LEFT_OUT & {node.attr for node in ast.walk(ast.parse(TESTS[module])) if isinstance(node, ast.Attribute)}
        == set()
    )


def test_each_module_has_its_tests() -> None:
    """tests/ mirrors the package, one file to one module, but for those listed."""
    without = {module for module in SOURCES if f"test_{module.split('.')[-1]}" not in TESTS}

    assert without == TESTED_WITH.keys()
    assert {f"test_{other}" for other in TESTED_WITH.values()} <= TESTS.keys()


def test_contributing_lists_what_breaks_the_style() -> None:
    """What is excepted here is admitted there."""
    admitted = (ROOT / "CONTRIBUTING.md").read_text().split("## Where we break this")[1]

    assert [name for name in (*LONG_FILES, *LONG_FUNCTIONS, *TESTED_WITH) if f"`{name}`" not in admitted] == [
        "__init__"
    ]


def test_lengths_are_measured() -> None:
    """The measure counts the signature and the body, not the docstring; and it sees methods and inner functions."""
    lines = ["class A:", "    def f(", "        self,", "    ):", "        '''One.", "", "        Two.'''"]
    source = "\n".join([*lines, "        def g(): return 1", "        return g"])
    found: dict[str, Any] = {function.name: length(function) for function in functions(source)}

    assert found == {"f": 5, "g": 1}
