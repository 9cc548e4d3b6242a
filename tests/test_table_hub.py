"""Tables on the Hub: the real huggingface_hub against a server of forty lines, and plain directories."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from calibrated_rewards.table import ReferenceTable

REPO, COMMIT = "someone/references", "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as it takes to create a dataset, commit to it and download it."""

    stored: dict[str, bytes]
    requests: list[tuple[str, str, bytes]]

    def do_POST(self):
        """Create, ask how to upload, commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"], body))
        url = f"http://127.0.0.1:{self.server.server_port}/datasets/{REPO}"
        if self.path.endswith("/create"):
            self._answer({"url": url})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})

    def do_GET(self):
        """List, describe, download."""
        if "/resolve/" in self.path:
            data = self.stored[self.path.rsplit("/", 1)[1]]
            self._answer(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in self.path:
            self._answer([{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.stored.items()])
        else:
            self._answer({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.stored]})

    do_HEAD = do_GET

    def log_message(self, *args):
        """Say nothing."""

    def _answer(self, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path):
    """A hub of its own, and the environment in which huggingface_hub talks to it and to nothing else."""
    handler = type("ThisHub", (Hub,), {"stored": {"README.md": b"# not ours"}, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        yield handler, {**os.environ, **quiet, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        server.shutdown()


def test_push_and_pull_through_the_real_client(hub, tmp_path):
    """What was pushed comes back, checked; nothing else of the repository is downloaded."""
    handler, environment = hub
    code = f"""
        from calibrated_rewards.table import ReferenceTable
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
