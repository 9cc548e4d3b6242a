"""What the documents show is run, and what they point to is there."""

import contextlib
import io
import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import calibrated_rewards

ROOT = Path(__file__).parents[1]
PACKAGE = Path(calibrated_rewards.__file__).parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")])
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *PAGES]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Comments on lines of their own, right below a print, are what it prints.
PROMISE = re.compile(r"^ *print\(.*\n((?:# .+\n)+)", re.MULTILINE)
FILE_ENDINGS = {".py", ".md", ".toml", ".txt", ".json", ".safetensors", ".png"}
ROOM = re.compile(r"^\| `([\w.]+)/?` \| (.+) \|$", re.MULTILINE)
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def read(document: Path) -> str:
    """A document's text; of a notebook, its Markdown: test_notebooks.py runs its code."""
    if document.suffix != ".ipynb":
        return document.read_text()
    cells = json.loads(document.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text) if language in languages]


def run(script: str, name: str) -> list[str]:
    """The lines that a script prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, name, "exec"), {"__name__": "__main__"})
    return printed.getvalue().splitlines()


def promised(script: str) -> list[str]:
    """The lines that a script says it prints."""
    return [line.removeprefix("# ") for comment in PROMISE.findall(script + "\n") for line in comment.splitlines()]


def missing_in_order(promises: list[str], printed: list[str]) -> list[str]:
    """The promised lines that are not printed, or not in that order."""
    rest = iter(printed)
    return [line for line in promises if line not in rest]


@each_document
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The python blocks of a document are one script, and print what the comments below their prints say."""
    script = "\n".join(blocks(read(document), "python", "py"))
    monkeypatch.chdir(tmp_path)

    assert missing_in_order(promised(script), run(script, str(document))) == []


def test_a_wrong_example_would_be_noticed() -> None:
    """The check above can fail: on another number, and on the right numbers in another order."""
    script = "# a comment\nfor x in 'ab':\n    print(x)  # each\n# a\n# b\n\n# another\nprint(3)\n# 3"

    assert promised(script) == ["a", "b", "3"]
    assert missing_in_order(["a", "b", "3"], run(script, "right")) == []
    assert missing_in_order(["a", "4"], run(script, "wrong")) == ["4"]
    assert missing_in_order(["3", "a"], run(script, "disordered")) == ["a"]


def test_the_readme_has_an_example() -> None:
    """There is something to run, it says what it prints, and it uses the package."""
    script = "\n".join(blocks((ROOT / "README.md").read_text(), "python"))

    assert "calibrated_rewards" in script
    assert promised(script)


@each_document
def test_named_tests_exist(document: Path) -> None:
    """Every `test_file.py::test_name` is a test; `::test_name` alone is one of the file named before it."""
    file = ""
    for named, test in re.findall(r"`(?:tests/(?:\w+/)?)?(test_\w+\.py)?(?:::(test_\w+))?`", read(document)):
        file = named or file
        sources = [path.read_text() for path in (ROOT / "tests").rglob(file)] if file else []
        assert not file or any(f"def {test}" in source for source in sources), f"{file}::{test}"


@each_document
def test_named_functions_exist(document: Path) -> None:
    """Every `room.name` of a room of the package is in it, or is a file of it."""
    # `reward` is an object of every document, and a setting of verl's.
    names = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"reward"}
    for room, name in re.findall(r"`(\w+)\.([A-Za-z]\w*)", read(document)):
        if room in names and f".{name}" not in FILE_ENDINGS:
            module = f"calibrated_rewards.{room}"
            assert hasattr(import_module(module), name) or find_spec(f"{module}.{name}"), f"{room}.{name}"


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link names a file, and its anchor a heading of that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(document))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def headings(document: Path) -> set[str]:
    """The anchors that a document's headings get: lower case, hyphens for spaces, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_commands_exist(document: Path) -> None:
    """Every `make` target that a document names is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(
        re.findall(r"`([^`\n]+)`", read(document)) + blocks(read(document), "", "sh", "bash", "text", "console")
    )

    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", code)) <= targets


def test_the_readme_names_the_test_command() -> None:
    """It is the one that continuous integration runs first."""
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"for target in test check docs wheel", (ROOT / ".ci" / "run").read_text())


@each_document
def test_paths_exist(document: Path) -> None:
    """Every path in backticks with a folder of the repository in front is there."""
    folders = "calibrated_rewards|tests|benchmarks|docs|adapters"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", read(document)):
        assert located(path).exists(), path


def located(path: str) -> Path:
    """Where a path of the repository is; the package may be installed elsewhere."""
    head, _, rest = path.partition("/")
    return PACKAGE / rest if head == "calibrated_rewards" else ROOT / path


def rooms_of(readme: str) -> dict[str, str]:
    """The captions of the rooms that a README lists, by name."""
    return dict(ROOM.findall(readme.partition("\n## The rooms\n")[2].partition("\n## ")[0]))


def test_the_readme_lists_the_rooms() -> None:
    """A line a room: each folder of the package, its files beside them, and the adapters, which lie at the top."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"adapters"}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}

    assert sorted(rooms_of((ROOT / "README.md").read_text())) == sorted(folders | files)


def test_a_room_needs_a_caption() -> None:
    """A line without one, and a table of another section, list no room."""
    table = "| room | what |\n|---|---|\n| `a/` | the a |\n| `b.py` | the b |\n| `c/` |  |\n"

    assert rooms_of(f"# It\n\n## The rooms\n\n{table}\n## More\n\n| `d/` | no room |\n") == {
        "a": "the a",
        "b.py": "the b",
    }
    assert rooms_of(f"# It\n\n{table}") == {}


def test_every_page_is_in_the_index() -> None:
    """The README links to each page of docs/, so that none is lost."""
    linked = set(re.findall(r"\]\((docs/[\w/.-]+\.(?:md|ipynb))\b", (ROOT / "README.md").read_text()))

    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_limits_are_said_once(page: Path) -> None:
    """Each page has one section of that name, and it is the last."""
    sections = re.findall(r"^## (.+)$", FENCE.sub("", read(page)), re.MULTILINE)

    assert [section for section in sections if section == "Limits"] == sections[-1:]


def find_hidden_names(room: Path) -> set[str]:
    """Public names of a room that its page of the API misses: those that are also files, which the page has to name."""
    lines = (ROOT / "website" / "api" / f"{room.name}.md").read_text().splitlines()
    names = re.findall(r"\w+ as (\w+)", (room / "__init__.py").read_text())
    assert lines[0] == f"::: calibrated_rewards.{room.name}"
    return {name for name in names if (room / f"{name}.py").exists()} - {
        line.rpartition(".")[2] for line in lines[1:] if line.startswith(f"::: calibrated_rewards.{room.name}.")
    }


def test_each_room_has_a_page_of_the_api() -> None:
    """Next to the commands and the adapters, which the pages describe; `make docs` fails on a page without its room."""
    rooms = {path.parent for path in PACKAGE.glob("*/__init__.py")} - {PACKAGE / "cli", PACKAGE / "adapters"}

    assert {path.stem for path in (ROOT / "website" / "api").glob("*.md")} == {room.name for room in rooms}
    assert {room.name: find_hidden_names(room) for room in rooms if find_hidden_names(room)} == {}


def test_a_hidden_name_would_be_noticed(tmp_path: Path) -> None:
    """The check above can fail: a function that has the name of its file, and is not on the room's page."""
    room = tmp_path / "table"
    room.mkdir()
    (room / "__init__.py").write_text("from calibrated_rewards.table.search import search as search, find as find\n")
    (room / "search.py").touch()

    assert find_hidden_names(room) == {"search"}
