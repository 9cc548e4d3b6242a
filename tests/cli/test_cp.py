"""cp and path find every adapter that is shipped, as files, and write over nothing."""

import ast
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from calibrated_rewards import adapters
from calibrated_rewards.cli.adapters import CP, PATH, find_adapters, list_adapters

SHIPPED = sorted(Path(adapters.__path__[0]).glob("[!_]*.py"))


def asked(command, *words: str) -> Namespace:
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_path_says_where_each_lies(capsys):
    """The absolute path of each, with or without .py; all of them by name where none is asked for."""
    for file in SHIPPED:
        for name in (file.stem, file.name):
            assert PATH.run(asked(PATH, name)) == 0
            assert capsys.readouterr().out == f"{file.absolute()}\n"

    assert PATH.run(asked(PATH)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [file.stem for file in SHIPPED]
    docstrings = [ast.get_docstring(ast.parse(file.read_text())) or "" for file in SHIPPED]
    assert [line.split(maxsplit=1)[1] for line in lines] == [each.splitlines()[0] for each in docstrings]


def test_what_is_no_adapter_is_refused_with_those_there_are():
    """Also the package's own file, and a path."""
    for name in ("trl", "__init__", "../adapters/trl_reward"):
        with pytest.raises(ValueError, match=f"one of .*trl_reward.*got '{name}'"):
            PATH.run(asked(PATH, name))
        with pytest.raises(ValueError, match=r"one of .*trl_reward"):
            CP.run(asked(CP, name))


def test_a_copy_lies_where_one_stands(tmp_path, monkeypatch, capsys):
    """Byte for byte: in the working directory, in another one, under another name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for to, lies in [([], "trl_reward.py"), (["there"], "there/trl_reward.py"), (["mine.py"], "mine.py")]:
        assert CP.run(asked(CP, "trl_reward", *to)) == 0
        assert capsys.readouterr().out == f"{lies}\n"
        assert (tmp_path / lies).read_bytes() == find_adapters()["trl_reward"].read_bytes()


def test_nothing_is_written_over(tmp_path):
    """A file that exists stays as it is; with --force it is the adapter's."""
    there = tmp_path / "trl_reward.py"
    there.write_text("mine")
    with pytest.raises(FileExistsError, match=r"trl_reward.py exists: .*--force"):
        CP.run(asked(CP, "trl_reward", str(tmp_path)))
    assert there.read_text() == "mine"

    assert CP.run(asked(CP, "trl_reward", str(tmp_path), "--force")) == 0
    assert there.read_bytes() == find_adapters()["trl_reward"].read_bytes()

    with pytest.raises(FileNotFoundError, match="is no directory: make it first"):
        CP.run(asked(CP, "trl_reward", str(tmp_path / "nowhere" / "file.py")))


def test_list_needs_no_name_and_all_else_does(capsys):
    """`cp --list` says what `path` says; `cp` alone is told of it."""
    assert CP.run(asked(CP, "--list")) == 0
    assert capsys.readouterr().out == f"{list_adapters()}\n"
    with pytest.raises(ValueError, match="--list says which there are"):
        CP.run(asked(CP))


def test_no_framework_is_imported():
    """Neither to list the adapters nor to find one: their frameworks may not be installed."""
    code = (
        "import sys; from calibrated_rewards.cli.adapters import find_adapter, list_adapters;"
        "list_adapters(); find_adapter('trl_reward');"
        "print([name for name in sys.modules if name.startswith('calibrated_rewards.adapters.') or name == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
