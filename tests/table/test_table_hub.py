"""Tables on the Hub: the real huggingface_hub against a server of forty lines, and plain directories."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hub import COMMIT, serving

from calibrated_rewards.table.reference_table import ReferenceTable

REPO = "someone/references"


@pytest.fixture
def hub(tmp_path):
    """A hub with one dataset."""
    with serving(REPO, "/datasets", tmp_path / "home") as found:
        yield found


def test_push_and_pull_through_the_real_client(hub, tmp_path):
    """What was pushed comes back, checked; nothing else of the repository is downloaded."""
    handler, environment = hub
    code = f"""
        from calibrated_rewards.table.reference_table import ReferenceTable
        table = ReferenceTable.build([(str(i), [i, 2.0]) for i in range(100)], meta={{"scorer": "x"}})
        print(table.push_to_hub({REPO!r}, private=True, token="secret"))
        again = ReferenceTable.from_pretrained({REPO!r}, revision="main", verify=True, token="secret")
        again.save({str(tmp_path / "pulled")!r})
        table.save({str(tmp_path / "pushed")!r})
        print(again.path)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    url, snapshot = done.stdout.split()

    assert url.endswith(f"/datasets/{REPO}/commit/{COMMIT}")
    created, *_ = handler.requests
    assert json.loads(created[2])["type"] == "dataset"
    assert "private" in created[2].decode()
    assert {authorization for _, authorization, _ in handler.requests} == {"Bearer secret"}
    assert sorted(os.listdir(snapshot)) == ["table.json", "table.safetensors"]
    for name in os.listdir(snapshot):
        contents = {(tmp_path / way / name).read_bytes() for way in ("pulled", "pushed")} | {handler.stored[name]}
        assert len(contents) == 1


def test_from_pretrained_takes_a_directory(tmp_path):
    """Without a word to any server."""
    table = ReferenceTable.build([("a", [1.0, 2.0])])
    table.save_pretrained(tmp_path / "table")
    again = ReferenceTable.from_pretrained(tmp_path / "table", verify=True)
    assert again.path == str(tmp_path / "table")
    assert np.array_equal(again.scores(0), table.scores(0))
