"""Connections of the server over real sockets: headers without an end, or slow ones, and bodies that nobody wants."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from test_server_process import TOKEN, a_reward, served

from calibrated_rewards.server.app import create_app
from calibrated_rewards.server.limits import Limits
from calibrated_rewards.server.listening import Newcomers, build_server, http_protocol

KEY = f"Authorization: Bearer {TOKEN}\r\n".encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n"
# What the kernel may take of a sender whose connection nobody reads: some buffers of both sides.
BUFFERS = 12 * 2**20


@contextmanager
def listening(token: str | None = TOKEN, **limits: Any) -> Iterator[tuple[str, int]]:
    """A server with these limits, in a thread; its address."""
    held = Limits(**limits)
    server = build_server(create_app(a_reward(), token=token, limits=held), "127.0.0.1", 0, held)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def connected(address: tuple[str, int], data: bytes = b"") -> Iterator[socket.socket]:
    """A connection that has sent this."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(data)
        yield connection


@contextmanager
def silent(address: tuple[str, int], count: int) -> Iterator[list[socket.socket]]:
    """Connections that have begun to say something."""
    with ExitStack() as stack:
        yield [stack.enter_context(connected(address, b"GET / HTTP/1.1\r\nX: ")) for _ in range(count)]


def told(connection: socket.socket) -> bytes:
    """All that the server says before it closes."""
    said = b""
    try:
        while part := connection.recv(65536):
            said += part
    except ConnectionResetError:
        pass
    return said


def asked(connection: socket.socket, request: bytes = HEALTH) -> int:
    """The status of an answer, over a connection that stays."""
    connection.sendall(request)
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def is_well(address: tuple[str, int], seconds: float = 2.0) -> None:
    """A good request over a new connection is answered, soon."""
    began = time.monotonic()
    with connected(address) as connection:
        assert asked(connection) == 200
    assert time.monotonic() - began < seconds


def poured(connection: socket.socket, block: bytes, most: int = 8 * BUFFERS) -> int:
    """How many bytes are taken of a client that sends on and on."""
    sent = 0
    try:
        while sent < most:
            sent += connection.send(block)
    except (ConnectionError, TimeoutError):
        pass
    return sent


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Endless: ",
        b"POST /score HTTP/1.1\r\nHost: x\r\n" + KEY + b"Content-Length: ",
        b"POST /score HTTP/1.1\r\nHost: x\r\n" + KEY + b"Transfer-Encoding: chunked\r\n\r\n1;",
        b"POST /score HTTP/1.1\r\nHost: x\r\n" + KEY + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
    ],
    ids=["path", "header", "number", "extension of a chunk", "trailer"],
)
def test_headers_without_an_end(start: bytes) -> None:
    """Whatever has no end is closed when it is larger than the limit, not read; others are answered meanwhile."""
    with listening() as address, connected(address, start) as connection:
        began = time.monotonic()
        assert poured(connection, b"1" * 65536) < BUFFERS
        assert time.monotonic() - began < 5
        is_well(address)


@pytest.mark.parametrize("line", [b"X: y\r\n", b"X-%d: y\r\n"])
def test_more_headers_than_the_limit(line: bytes) -> None:
    """Of one name or of many, with the token or without: 431, and the connection is closed."""
    many = b"".join(line % i if b"%" in line else line for i in range(120))
    with listening() as address:
        for key in (KEY, b""):
            with connected(address, b"GET /health HTTP/1.1\r\nHost: x\r\n" + key + many + b"\r\n") as connection:
                assert told(connection).startswith(b"HTTP/1.1 431 ")
        is_well(address)


def test_large_headers_that_arrive_at_once() -> None:
    """Above the limit but in one piece: refused as well, in a header, a query or a path."""
    large = b"a" * 3000
    requests = [
        b"GET /%b HTTP/1.1\r\n" % large,
        b"GET /?%b HTTP/1.1\r\n" % large,
        b"GET / HTTP/1.1\r\nX: %b\r\n" % large,
    ]
    with listening(header=2000) as address:
        for request in requests:
            with connected(address, request + b"Host: x\r\n" + KEY + b"\r\n") as connection:
                assert told(connection).split(b" ")[1] in (b"431", b"400")
        is_well(address)


def test_slow_headers() -> None:
    """A byte now and then does not keep a connection; nor does silence; the first has an answer."""
    with listening(header_seconds=0.5) as address:
        began = time.monotonic()
        with connected(address, b"GET /health HT") as slow, connected(address) as silent:
            slow.settimeout(0.05)
            said = b""
            for letter in itertools.cycle(b"x"):
                try:
                    slow.sendall(bytes([letter]))
                    said = slow.recv(1000)
                    break
                except TimeoutError:
                    assert time.monotonic() - began < 3
            assert said.startswith(b"HTTP/1.1 408 ")
            assert told(silent) == b""
        assert 0.4 < time.monotonic() - began < 3
        is_well(address)


def test_slow_headers_after_a_good_request() -> None:
    """A connection that was heard has as long for the headers of the next request, and is asked no haste between."""
    with listening(header_seconds=0.5) as address, connected(address) as connection:
        for pause in (0.7, 0.7, 0.0):  # longer than headers may take, shorter than uvicorn keeps connections
            assert asked(connection) == 200
            time.sleep(pause)
        began = time.monotonic()
        connection.sendall(HEALTH[:20])
        assert told(connection).startswith(b"HTTP/1.1 408 ")
        assert 0.4 < time.monotonic() - began < 3


def test_a_request_that_takes_longer_than_headers_may() -> None:
    """The clock is of headers alone: a body may take its own time."""
    body = b'{"prompts": ["2+2="], "completions": ["4"]}'
    head = b"POST /score HTTP/1.1\r\nHost: x\r\n" + KEY + b"Content-Length: %d\r\n\r\n" % len(body)
    with listening(header_seconds=0.2) as address, connected(address, head) as connection:
        time.sleep(0.6)
        assert asked(connection, body) == 200


def test_open_headers_shut_nobody_out() -> None:
    """Of connections that say nothing the oldest make room; those that were heard stay, and new ones are answered."""
    with listening(newcomers=8) as address, connected(address) as known:
        assert asked(known) == 200
        with silent(address, 40) as connections:
            is_well(address)
            assert asked(known) == 200
            assert all(told(connection) == b"" for connection in connections[:32])
            connections[-1].settimeout(0.1)
            with pytest.raises(TimeoutError):
                connections[-1].recv(1)


def test_more_connections_than_files() -> None:
    """A process that may have 256 files open is not shut by 400 connections that say nothing."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from test_server_process import *; serve(a_reward(), port=0, token=TOKEN, verify=False)"
    )
    with served("-c", code) as server:
        host, port = server.url.removeprefix("http://").split(":")
        address = (host, int(port))
        with connected(address) as known:
            assert asked(known) == 200
            with silent(address, 400):
                is_well(address)
                assert asked(known) == 200


@pytest.mark.parametrize("framing", [b"Content-Length: 16000000\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize(
    ("status", "head"),
    [
        (b"401", b"POST /score HTTP/1.1\r\n"),
        (b"401", b"POST /t/nearly-the-token/score HTTP/1.1\r\nConnection: keep-alive\r\n"),
        (b"404", b"POST /nowhere HTTP/1.1\r\n" + KEY),
        (b"405", b"PUT /score HTTP/1.1\r\n" + KEY),
        (b"200", b"GET /health HTTP/1.1\r\n" + KEY),
        (b"415", b"POST /score HTTP/1.1\r\nContent-Encoding: gzip\r\n" + KEY),
        (b"413", b"POST /score HTTP/1.1\r\n" + KEY),
        (b"431", b"POST /score HTTP/1.1\r\n" + b"X: y\r\n" * 120),
    ],
    ids=[
        "no token",
        "a wrong token",
        "no such path",
        "another method",
        "not asked for",
        "gzip",
        "too large",
        "headers",
    ],
)
def test_a_body_that_nobody_wants_is_not_read(status: bytes, head: bytes, framing: bytes) -> None:
    """The answer comes before the body, and the connection ends with it, however much would follow."""
    limits = {"body": 65536} if status == b"413" else {}
    with listening(**limits) as address, connected(address, head + framing + b"Host: x\r\n\r\n") as connection:
        chunk = b"x" * 65536 if framing.startswith(b"Content") else b"10000\r\n" + b"x" * 65536 + b"\r\n"
        if status != b"413":
            assert told(connection).split(b" ")[1] == status
        assert poured(connection, chunk) < BUFFERS
        is_well(address)


def test_a_body_that_was_read_keeps_its_connection() -> None:
    """A request that is refused for what its body says is no reason to connect again."""
    bad = b"POST /score HTTP/1.1\r\nHost: x\r\n" + KEY + b"Content-Length: 1\r\n\r\n{"
    with listening() as address, connected(address) as connection:
        for _ in range(3):
            assert asked(connection, bad) == 400
        assert asked(connection) == 200


@pytest.mark.parametrize("token", [TOKEN, None])
def test_no_answer_repeats_the_host(token: str | None) -> None:
    """Nor leads there: a slash too many is no such path."""
    hosts = b"Host: evil.example\r\nX-Forwarded-Host: evil.example\r\n"
    with listening(token) as address:
        for path in ("/score/", "/health/", "/get_reward/", f"/t/{TOKEN}/health/", "//evil.example/score", "/x"):
            request = f"GET {path} HTTP/1.1\r\nConnection: close\r\n".encode()
            with connected(address, request + hosts + KEY + b"\r\n") as connection:
                said = told(connection)
            assert said.split(b" ")[1] == b"404"
            assert b"evil" not in said
            assert b"location" not in said.lower()


def test_newcomers_are_as_many_as_files_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is left of the files, the limit at most, and one at least."""
    for files, most in ((256, 96), (10**6, 1024), (10, 1)):
        monkeypatch.setattr("calibrated_rewards.server.listening.limit_of_files", lambda files=files: files)
        made = []
        monkeypatch.setattr("calibrated_rewards.server.listening.Newcomers", lambda n, made=made: made.append(n))
        http_protocol(Limits())
        assert made == [most]
    assert Newcomers(3).waiting == {}
