"""The notebooks of docs/ run, and show what is committed in them."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs").rglob("*.ipynb"))


def read_outputs(notebook: NotebookNode) -> Iterator[tuple[str, object]]:
    """What the code cells show: printed text, in one piece for each cell, and other results, of figures the kind."""
    for cell in notebook.cells:
        streams = groupby(cell.get("outputs", ()), key=lambda output: output.get("name"))
        for name, outputs in streams:
            if name:
                yield name, "".join(output.text for output in outputs)
                continue
            for output in outputs:
                shown = {kind: "" if kind.startswith("image/") else value for kind, value in output.data.items()}
                yield output.output_type, shown


def run_notebook(notebook: NotebookNode, folder: Path) -> list[tuple[str, object]]:
    """The outputs of a new kernel that stands in a folder of its own."""
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    return list(read_outputs(client.execute()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_is_committed(path: Path, tmp_path: Path) -> None:
    """A new kernel prints the committed text and draws as many figures; nothing is written to stderr."""
    notebook = nbformat.read(path, as_version=4)
    committed = list(read_outputs(notebook))

    assert committed
    assert "stderr" not in dict(committed)
    assert run_notebook(notebook, tmp_path) == committed


def test_a_wrong_notebook_would_be_noticed(tmp_path: Path) -> None:
    """The check above can fail: another number, a missing figure and an error each differ from what is committed."""
    v4 = nbformat.v4
    printed = v4.new_code_cell("print(2)", outputs=[v4.new_output("stream", name="stdout", text="1\n")])
    figure = v4.new_code_cell("0;", outputs=[v4.new_output("display_data", data={"image/png": ""})])
    wrong = v4.new_notebook(cells=[printed, figure])
    committed = list(read_outputs(wrong))

    assert committed == [("stdout", "1\n"), ("display_data", {"image/png": ""})]
    assert run_notebook(wrong, tmp_path) == [("stdout", "2\n")]
    with pytest.raises(CellExecutionError, match="an error"):
        run_notebook(v4.new_notebook(cells=[v4.new_code_cell("raise ValueError('an error')")]), tmp_path)
