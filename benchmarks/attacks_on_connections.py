"""What can be done to the reward server before it knows who asks; each attack is bounded in count, bytes and time.

Of each: what it sent, how the server ended it, the longest that a good request over a new connection took meanwhile,
and whether a client that was connected before is still answered. `server_attack.py` runs them; all on 127.0.0.1.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))

HOST = "127.0.0.1"
SECONDS, MEBIBYTE = 10.0, 2**20
TOKEN = "a-token-of-the-attack"
GOOD = b'{"prompts": ["2+2="], "completions": ["4"]}'


def guarded(port: int, hangs: bool, files: int) -> None:
    """A server that asks for a token; its reward model may hang, and it may have few files open."""
    import resource

    from test_server_attack import an_app

    from calibrated_rewards.server import Limits, create_app
    from calibrated_rewards.server.listening import listen

    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    app = create_app(Hanging(), token=TOKEN, verify=False) if hangs else an_app(TOKEN)
    listen(app, HOST, port, Limits(header_seconds=2.0))


class Hanging:
    """A reward that never answers."""

    __name__ = "hanging"
    id_column = transform = scale = None

    @property
    def table(self) -> Any:
        """One prompt."""
        from calibrated_rewards.table.reference_table import ReferenceTable

        return ReferenceTable.build([("2+2=", [-1.0, 0.0, 1.0])])

    def score(self, *_: Any) -> Any:
        """For an hour."""
        time.sleep(3600)


@contextmanager
def started(hangs: bool = False, files: int = 1024) -> Any:
    """Its process and its port; it is answered before this returns."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=guarded, args=(port, hangs, files))
    process.start()
    try:
        until = time.time() + 60
        while time.time() < until:
            try:
                httpx.get(f"http://{HOST}:{port}/health")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.join(20)


class Watch:
    """Asks good requests all the time, over new connections and over one that stays."""

    def __init__(self, port: int) -> None:
        self.port, self.longest, self.lost, self.good = port, 0.0, 0, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Watch:
        self.kept = HTTPConnection(HOST, self.port, timeout=SECONDS)
        self.ask(self.kept)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(self.kept)
        self.stop.set()
        self.thread.join()
        self.kept.close()

    def run(self) -> None:
        """Ask over a new connection each time, until told to stop."""
        while not self.stop.wait(0.02):
            one = HTTPConnection(HOST, self.port, timeout=SECONDS)
            self.ask(one)
            one.close()

    def ask(self, connection: HTTPConnection) -> None:
        """One good request."""
        began = time.monotonic()
        try:
            connection.request("POST", "/score", GOOD, {"Authorization": f"Bearer {TOKEN}"})
            self.lost += connection.getresponse().read()[:10] != b'{"reward":'
        except OSError:
            self.lost += 1
        self.longest = max(self.longest, time.monotonic() - began)
        self.good += 1

    def said(self) -> dict[str, Any]:
        """What was found."""
        return {"good_requests": self.good, "lost": self.lost, "longest_s": round(self.longest, 3)}


def poured(port: int, head: bytes, block: bytes, most: int) -> tuple[int, str]:
    """How many bytes a connection takes of what has no end, and its answer."""
    sent = 0
    with socket.create_connection((HOST, port), timeout=SECONDS) as connection:
        try:
            connection.sendall(head)
            while sent < most:
                sent += connection.send(block)
        except OSError:
            pass
        try:
            return sent, connection.recv(12)[9:12].decode("latin-1") or "closed"
        except OSError:
            return sent, "closed"


def endless(port: int, head: bytes, block: bytes, times: int = 5, most: int = 81 * MEBIBYTE) -> dict[str, Any]:
    """The same over several connections: the most that one of them took, and how they ended."""
    with Watch(port) as watch:
        began = time.monotonic()
        ends = [poured(port, head, block, most) for _ in range(times)]
        seconds = time.monotonic() - began
    taken = max(sent for sent, _ in ends) / MEBIBYTE
    answers = dict(Counter(end for _, end in ends))
    return {"most_taken_mib": round(taken, 1), "seconds": round(seconds, 2), "answers": answers, **watch.said()}


def silent(port: int, count: int, data: bytes) -> dict[str, Any]:
    """Connections that begin to say something and then do not go on."""
    with Watch(port) as watch, ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((HOST, port), timeout=SECONDS))
            connection.sendall(data)
        time.sleep(0.5)
    return {"connections": count, **watch.said()}


def dripping(port: int, count: int, seconds: float) -> dict[str, Any]:
    """Headers of a byte at a time, from many connections at once: how long the oldest of them lives."""
    with Watch(port) as watch, ExitStack() as stack:
        open_ = [stack.enter_context(socket.create_connection((HOST, port), timeout=SECONDS)) for _ in range(count)]
        began, ended = time.monotonic(), []
        for connection in open_:
            connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        while open_ and time.monotonic() < began + seconds:
            for connection in list(open_):
                try:
                    connection.sendall(b"a")
                except OSError:
                    open_.remove(connection)
                    ended.append(time.monotonic() - began)
            time.sleep(0.1)
    ends = {"still_open": len(open_), "longest_lived_s": round(max(ended, default=seconds), 1)}
    return {"connections": count, **ends, **watch.said()}


def wrong_tokens(port: int, count: int) -> dict[str, Any]:
    """Tokens that are nearly right, in each of the three places; none may be let in, no answer may repeat the Host."""
    answers: Counter[str] = Counter()
    echoes = 0
    wrong = ["", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f"{TOKEN}%20", "%00" + TOKEN, "a" * 60000, f"{TOKEN},{TOKEN}x"]
    with Watch(port) as watch:
        for at in range(count):
            token = wrong[at % len(wrong)]
            path, headers = {
                0: ("/health/", {"Authorization": f"Bearer {token}x"}),
                1: (f"/health?token={token}x", {}),
                2: (f"/t/{token}x/health/", {}),
            }[at % 3]
            connection = HTTPConnection(HOST, port, timeout=SECONDS)
            try:
                connection.request("GET", path, headers={**headers, "Host": "evil.example"})
                answer = connection.getresponse()
                echoes += b"evil.example" in answer.read() + str(answer.headers).encode()
                answers[str(answer.status)] += 1
            except OSError:
                answers["closed"] += 1
            connection.close()
    return {"requests": count, "answers": dict(answers), "answers_with_the_host": echoes, **watch.said()}


def on_connections() -> dict[str, Any]:
    """All of them, at a server that asks for a token and may have 1024 files open; and what its memory grew by."""
    key = f"Authorization: Bearer {TOKEN}\r\n".encode()
    block = b"a" * 65536
    with started() as (process, port):
        before = resident(process.pid)
        found = {
            "header_without_end_81_mib": endless(port, b"GET / HTTP/1.1\r\nX: ", block),
            "path_without_end": endless(port, b"GET /", block),
            "many_headers": endless(port, b"GET / HTTP/1.1\r\n", b"X-a: b\r\n" * 8192),
            "trailers_without_end": endless(
                port,
                b"POST /score HTTP/1.1\r\nHost: x\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ",
                block,
            ),
            "body_without_a_token": endless(
                port, b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n", block
            ),
            "body_for_no_such_path": endless(
                port, b"POST /none HTTP/1.1\r\nHost: x\r\n" + key + b"Content-Length: 999999999\r\n\r\n", block
            ),
            "open_headers": silent(port, 256, b"GET / HTTP/1.1\r\nX: "),
            "open_large_headers": silent(port, 256, b"GET / HTTP/1.1\r\nX: " + b"a" * 60000),
            "more_connections_than_files": silent(port, 1500, b"G"),
            "slow_headers": dripping(port, 200, 8.0),
            "wrong_tokens": wrong_tokens(port, 600),
        }
        return {**found, "memory_grew_mib": round(resident(process.pid) - before, 1), "alive": process.is_alive()}


def on_shutdown() -> dict[str, Any]:
    """Seconds until a server is gone after a second SIGTERM, while a request waits for a reward model that hangs."""
    with started(hangs=True) as (process, port):
        request = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
        with socket.create_connection((HOST, port), timeout=SECONDS) as connection:
            connection.sendall(request % (TOKEN.encode(), len(GOOD), GOOD))
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGTERM)
            process.join(2.0)
            waits = process.is_alive()
            os.kill(process.pid, signal.SIGTERM)
            began = time.monotonic()
            process.join(SECONDS)
            return {"waits_after_the_first": waits, "seconds_after_the_second": round(time.monotonic() - began, 2)}


def resident(pid: int | None) -> float:
    """MiB of a process."""
    line = next(each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in each)
    return int(line.split()[1]) / 1024
