"""What the documents show is run, and what they point to is there."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import calibrated_rewards

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# `print(x)  # 0.25` promises a line of output.
PROMISE = re.compile(r"^\s*print\(.*\)\s+# (.+)$", re.MULTILINE)
SUFFIXES = r"\.(py|md|toml|txt|json|safetensors|svg|png|yaml|yml)"
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text) if language in languages]


def run(script: str, name: str) -> list[str]:
    """The lines that a script prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, name, "exec"), {"__name__": "__main__"})
    return printed.getvalue().splitlines()


def missing_in_order(promised: list[str], printed: list[str]) -> list[str]:
    """The promised lines that are not printed, or not in that order."""
    rest = iter(printed)
    return [line for line in promised if line not in rest]


@each_document
def test_examples_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The python blocks of a document are one script, and print what the comments beside their prints say."""
    script = "\n".join(blocks(document.read_text(), "python", "py"))
    monkeypatch.chdir(tmp_path)

    assert missing_in_order(PROMISE.findall(script), run(script, str(document))) == []


def test_a_wrong_example_would_be_noticed() -> None:
    """The check above can fail: on another number, and on the right numbers in another order."""
    script = "print(1 + 1)  # 2\nfor x in 'ab':\n    print(x)  # b\nprint(3)  # 3"

    assert PROMISE.findall(script) == ["2", "b", "3"]
    assert missing_in_order(["2", "b", "3"], run(script, "right")) == []
    assert missing_in_order(["2", "4"], run(script, "wrong")) == ["4"]
    assert missing_in_order(["3", "2"], run(script, "disordered")) == ["2"]


def test_the_readme_has_an_example() -> None:
    """There is something to run, it prints something, and it uses the package."""
    script = "\n".join(blocks((ROOT / "README.md").read_text(), "python"))

    assert "calibrated_rewards" in script
    assert PROMISE.search(script)


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link names a file, and its anchor a heading of that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def headings(document: Path) -> set[str]:
    """The anchors that a document's headings get: lower case, hyphens for spaces, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_commands_exist(document: Path) -> None:
    """Every `make` target that a document names is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(
        re.findall(r"`([^`\n]+)`", document.read_text())
        + blocks(document.read_text(), "", "sh", "bash", "text", "console")
    )

    assert set(re.findall(r"\bmake ([a-z]+)", code)) <= targets


def test_the_readme_names_the_test_command() -> None:
    """It is the one that continuous integration runs first."""
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"for target in test check wheel", (ROOT / ".ci" / "run").read_text())


@each_document
def test_paths_exist(document: Path) -> None:
    """Every path in backticks with a folder of the repository in front is there."""
    folders = "calibrated_rewards|tests|benchmarks|docs|adapters"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", document.read_text()):
        assert located(path).exists(), path


def located(path: str) -> Path:
    """Where a path of the repository is; the package may be installed elsewhere."""
    head, _, rest = path.partition("/")
    return Path(calibrated_rewards.__file__).parent / rest if head == "calibrated_rewards" else ROOT / path


def tree(text: str) -> Iterator[str]:
    """The paths of an indented file tree: a name that ends with a slash holds the deeper lines below it."""
    folders: list[tuple[int, str]] = []
    for line in text.splitlines():
        name, depth = line.split(maxsplit=1)[0] if line.strip() else "", len(line) - len(line.lstrip())
        while folders and depth <= folders[-1][0]:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        if name.endswith("/"):
            folders.append((depth, path))
        if name.endswith("/") or re.search(SUFFIXES + "$", name):
            yield path


def test_the_file_tree_is_the_tree() -> None:
    """What README's file tree names is there, and no module of the package is left out of it."""
    shown = {
        path for block in blocks((ROOT / "README.md").read_text(), "", "text") if "/" in block for path in tree(block)
    }
    modules = {f"calibrated_rewards/{path.name}" for path in Path(calibrated_rewards.__file__).parent.glob("*.py")}

    assert sorted(path for path in shown if not located(path).exists()) == []
    assert sorted(modules - shown) == []


def test_the_reader_of_trees_reads_them() -> None:
    """Folders nest by indentation, and captions are left alone."""
    text = "README.md   see docs/x.md\na/          the a\n  b.py      uses c.py\n  d/\n    e.json\nf.toml\n"

    assert list(tree(text)) == ["README.md", "a/", "a/b.py", "a/d/", "a/d/e.json", "f.toml"]
