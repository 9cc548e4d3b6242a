"""A server of forty lines that is as much of the Hub as huggingface_hub needs for a table or a reward."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as it takes to create a repository, commit to it and download it."""

    repo: str
    kind: str
    stored: dict[str, bytes]
    requests: list[tuple[str, str, bytes]]

    def do_POST(self):
        """Create, ask how to upload, commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"], body))
        url = f"http://127.0.0.1:{self.server.server_port}{self.kind}/{self.repo}"
        if self.path.endswith("/create"):
            self._answer({"url": url})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
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
            data = self.stored[self.path.partition("/resolve/")[2].partition("/")[2]]
            self._answer(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in self.path:
            self._answer([{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.stored.items()])
        else:
            self._answer({"id": self.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.stored]})

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


@contextmanager
def serving(repo: str, kind: str, home: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A hub of its own, and the environment in which huggingface_hub talks to it and to nothing else."""
    own = {"repo": repo, "kind": kind, "stored": {"README.md": b"# not ours"}, "requests": []}
    handler = type("ThisHub", (Hub,), own)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        yield handler, {**os.environ, **quiet, "HF_ENDPOINT": address, "HF_HOME": str(home)}
        server.shutdown()
