"""The house: which way imports run between rooms, no circle among files, and imports that stay light."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import calibrated_rewards

PACKAGE = Path(calibrated_rewards.__file__).parent
ROOT = Path(__file__).parents[1]

# What each room may import; CONTRIBUTING.md shows the same lines.
ARROWS = """
prompts, files, theory ->
table        -> prompts, files
models       -> prompts, files
heads        -> prompts, files, models
scorers      -> prompts, files, models, heads
samplers     -> prompts, files, models, heads, scorers
reward       -> prompts, files, theory, table, models, scorers
calibration  -> prompts, files, theory, table, models, samplers, scorers
testing      -> prompts, theory, samplers, scorers
server       -> prompts, files, reward
evaluation   -> prompts, files, theory, table, models, samplers, scorers, reward, calibration
training     -> prompts, files, theory, table, models, heads, samplers, scorers, reward, calibration, evaluation
cli          -> everything
"""
# Libraries that a file loads when it is imported only if it is about them, or lies in a room that runs models.
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "matplotlib",
    "pyarrow",
    "ray",
    "vllm",
    "httpx",
}
RUN_MODELS = {"models", "heads", "samplers", "scorers", "training"}
ABOUT_THEM = {
    "table.torch_search": {"torch"},
    "calibration.cluster": {"ray"},
    "calibration.prediction.prompt_features": {"torch"},
    "evaluation.kl": {"torch"},
    "evaluation.policies": {"pyarrow"},
    "evaluation.plots": {"matplotlib"},
    "evaluation.report.page": {"matplotlib"},
    "cli.demo.assets": {"torch", "transformers"},
    "cli.demo.reward_models": {"torch", "transformers"},
}
# scipy.special costs half of the import's time; scipy.optimize would add a third.
NEVER_LOADED = HEAVY | {"huggingface_hub", "tqdm", "fastapi", "scipy.optimize", "scipy.stats"}


def parse_arrows(lines: str = ARROWS) -> dict[str, set[str]]:
    """Read the rooms that each room may import; a room may only name rooms further up."""
    above: dict[str, set[str]] = {}
    for line in lines.strip().splitlines():
        rooms, targets = ([name.strip() for name in side.split(",") if name.strip()] for side in line.split("->"))
        allowed = {*above} if targets == ["everything"] else {*targets}
        assert allowed <= {*above}, f"{line!r} names a room that does not stand further up"
        above |= dict.fromkeys(rooms, allowed)
    return above


def find_imports(tree: ast.AST, *, within_functions: bool = True) -> Iterator[str]:
    """Name every module that code imports; on request only what is loaded when the file is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if within_functions or not (isinstance(node, ast.FunctionDef) or typing_only):
            yield from find_imports(node, within_functions=within_functions)


def read_modules() -> dict[str, str]:
    """Each file of the package by its dotted name. The adapters are drop-ins: test_adapter_files.py has them."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "adapters"]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__") for path in paths]
    return {name.rstrip("."): path.read_text() for name, path in zip(names, paths, strict=True)}


MODULES = read_modules()


def find_siblings(source: str, **options: bool) -> set[str]:
    """The modules of the package that a source imports, each by the longest name that is a module."""
    names = [name.partition("calibrated_rewards.") for name in find_imports(ast.parse(source), **options)]
    inside = [rest for before, dot, rest in names if dot and not before]
    modules = [[module for module in MODULES if module and f"{name}.".startswith(f"{module}.")] for name in inside]
    return {max(found, key=len) for found in modules if found}


def find_forbidden(module: str, source: str, arrows: Mapping[str, set[str]]) -> set[str]:
    """Imports of a module that go to a room which its own room may not import."""
    room = module.split(".", maxsplit=1)[0]
    return {other for other in find_siblings(source) if other.split(".")[0] not in {room, *arrows[room]}}


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle among files, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        return list(circle.args[1])
    return []


ROOMS = sorted({module.split(".")[0] for module in MODULES} - {"", "__main__"})


def test_every_room_has_its_arrows() -> None:
    """The arrows and the folder name the same rooms."""
    assert sorted(parse_arrows()) == ROOMS


def test_contributing_shows_the_same_arrows() -> None:
    """The lines that people read are those that are tested."""
    assert ARROWS.strip() in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("module", sorted({*MODULES} - {"", "__main__"}))
def test_imports_run_one_way(module: str) -> None:
    """A file imports from its own room and from the rooms that its arrow names, inside functions too."""
    assert find_forbidden(module, MODULES[module], parse_arrows()) == set()


def test_no_circle_among_files() -> None:
    """No file is needed by a file that it needs, when both are imported."""
    assert (
        find_circle({name: find_siblings(text, within_functions=False) - {name} for name, text in MODULES.items()})
        == []
    )


def test_these_checks_can_fail() -> None:
    """An arrow back up, a forbidden import inside a function, and a circle are each found."""
    with pytest.raises(AssertionError, match="further up"):
        parse_arrows("table -> reward\nreward ->")
    upward = "def f():\n    from calibrated_rewards.reward import lookup\n"
    assert find_forbidden("table.search", upward, parse_arrows()) == {"reward.lookup"}
    assert find_forbidden("server.app", upward, parse_arrows()) == set()
    assert len(find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == 4


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_imports_wait(module: str) -> None:
    """Outside the rooms that run models, heavy libraries are loaded by functions, or by a file that is about them."""
    if module.split(".", maxsplit=1)[0] in RUN_MODELS and "." in module:
        return
    loaded = {name.split(".")[0] for name in find_imports(ast.parse(MODULES[module]), within_functions=False)}

    assert loaded & HEAVY == ABOUT_THEM.get(module, set())


def run_python(code: str, folder: Path, **environment: str) -> str:
    """The output of a new interpreter that stands outside of the repository."""
    command, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True, text=True).stdout


LOADED = f"import sys; print(*sorted({NEVER_LOADED!r} & set(sys.modules)))"


def test_the_import_is_light(tmp_path: Path) -> None:
    """Importing the package loads no torch, no matplotlib, no network library and no solver."""
    assert run_python(f"import calibrated_rewards; {LOADED}", tmp_path).split() == []


def test_rooms_are_light(tmp_path: Path) -> None:
    """A room's own `__init__` loads neither torch nor transformers: public names that need them wait."""
    rooms = ", ".join(f"calibrated_rewards.{room}" for room in ROOMS)
    loaded = run_python(f"import {rooms}, sys; print(*{{'torch', 'transformers', 'trl'}} & set(sys.modules))", tmp_path)
    assert loaded.split() == []


# In rooms that run models, what needs none: plain functions, servers, names, text and labels.
WITHOUT_MODELS = """
models.text models.labels models.label_names models.lazy models.callable_fingerprint models.server_address
models.http_client scorers.protocol scorers.differences scorers.ensemble scorers.pairwise scorers.remote
scorers.remote_vllm samplers.protocol samplers.openai samplers.vllm_engine training.check_settings.check
"""


def test_servers_and_functions_need_no_torch(tmp_path: Path) -> None:
    """Scoring by a server or a plain function, and reading settings, loads neither torch nor transformers."""
    modules = ", ".join(f"calibrated_rewards.{module}" for module in WITHOUT_MODELS.split())
    loaded = run_python(
        f"import {modules}, sys; print(*{{'torch', 'transformers', 'trl'}} & set(sys.modules))", tmp_path
    )
    assert loaded.split() == []


@pytest.mark.parametrize("heavy", ["torch", "scipy.optimize"])
def test_a_heavy_import_would_be_noticed(heavy: str, tmp_path: Path) -> None:
    """The check above can fail: what is imported first is found."""
    assert heavy in run_python(f"import {heavy}, calibrated_rewards; {LOADED}", tmp_path).split()


def test_the_import_reads_few_files(tmp_path: Path) -> None:
    """Importing the package reads the rooms that a reward needs, not the house: at most 45 of its files."""
    code = "import sys, calibrated_rewards; print(sum(name.startswith('calibrated_rewards') for name in sys.modules))"
    assert 10 < int(run_python(code, tmp_path)) <= 45
