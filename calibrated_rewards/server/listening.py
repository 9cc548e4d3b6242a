"""Connections whose headers have not arrived: how large these may be, how long they may take, how many may wait.

Listening at an address until told to stop, and then letting nobody go without an answer."""

import asyncio
import ipaddress
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from calibrated_rewards.files import Message, setting
from calibrated_rewards.server.access import Door
from calibrated_rewards.server.limits import Limits

LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# Files that a process has open besides connections, and the part of the rest that may be newcomers.
OTHER_FILES, SHARE, MOST_FILES = 64, 2, 65536


@dataclass(eq=False)
class Newcomers:
    """Connections that have not sent the headers of a request yet; for one too many the oldest is closed.

    A client sends its headers as soon as it is connected, and is a newcomer for a moment. Whoever opens connections and
    sends nothing pushes out its own; clients that were heard stay, and those without the token are closed by its 401.
    """

    most: int
    waiting: dict[Any, None] = field(default_factory=dict, init=False)
    """Connections by age, the oldest first."""

    def add(self, connection: "Connection") -> None:
        """Let one in, and close the oldest if there are too many."""
        self.waiting[connection] = None
        if len(self.waiting) > self.most:
            oldest = next(iter(self.waiting))
            self.discard(oldest)
            oldest.transport.abort()

    def discard(self, connection: "Connection") -> None:
        """One has sent its headers, or is gone."""
        self.waiting.pop(connection, None)


class Connection(asyncio.Protocol):
    """uvicorn's connection over h11, whose headers have to arrive in time.

    h11 bounds their size (`h11_max_incomplete_event_size`), those of trailers and chunks too, and reads them in linear
    time. httptools, which uvicorn prefers, has no bound, and takes quadratic time for one large header.
    """

    transport: Any

    def __init__(self, http: H11Protocol, newcomers: Newcomers, seconds: float) -> None:
        self.http, self.newcomers, self.seconds = http, newcomers, seconds
        self.clock: asyncio.TimerHandle | None = None
        self.begun = False

    def connection_made(self, transport: Any) -> None:
        """Count it, and wait for headers."""
        # Any: uvloop's is no asyncio.Transport.
        self.transport = transport
        self.http.connection_made(transport)
        self.newcomers.add(self)
        self.start_clock()

    def data_received(self, data: bytes) -> None:
        """Hand it on; the first bytes of a request start the clock, the end of its headers stops it."""
        before = self.http.cycle
        outside = before is None or before.response_complete
        self.begun = True
        self.http.data_received(data)
        if self.http.cycle is not before:
            self.stop_clock()
            self.newcomers.discard(self)
        elif outside and not self.transport.is_closing():
            self.start_clock()

    def eof_received(self) -> None:
        """Hand it on."""
        self.http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.stop_clock()
        self.newcomers.discard(self)
        self.http.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hand it on."""
        self.http.pause_writing()

    def resume_writing(self) -> None:
        """Hand it on."""
        self.http.resume_writing()

    def start_clock(self) -> None:
        """The headers have this long, from their first byte or from the connection's first moment."""
        if self.clock is None:
            self.clock = asyncio.get_running_loop().call_later(self.seconds, self.expire)

    def stop_clock(self) -> None:
        """They are here."""
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None

    def expire(self) -> None:
        """They were not: say so if there was a part of them, and close."""
        self.clock = None
        if not self.transport.is_closing():
            if self.begun:
                self.transport.write(LATE)
            self.transport.close()


def http_protocol(limits: Limits) -> Callable[..., Connection]:
    """What makes the connections of one server."""
    newcomers = Newcomers(max(1, min(limits.newcomers, (open_files() - OTHER_FILES) // SHARE)))

    def connection(**given: Any) -> Connection:  # what uvicorn gives its own protocols
        return Connection(H11Protocol(**given), newcomers, limits.header_seconds)

    return connection


def open_files() -> int:
    """How many files this process may have open, each connection among them."""
    if sys.platform == "win32":
        return MOST_FILES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


@contextmanager
def many_files() -> Iterator[None]:
    """As many open files as the system lets this process have: a shell's usual 256 or 1024 are soon connections."""
    if sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Seconds in which those who keep their connection and ask once more are answered, and told that it closes.
LINGER = 1.0
# Threads take turns at Python every 5 ms, and a model's thread asks for its turn at every operation.
SWITCH = 0.0005


class Closing(uvicorn.Server):
    """A server that on the first SIGTERM or SIGINT takes no more connections, and ends when those there are done."""

    door: Door

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal closes the door; a second one is the system's, and ends the process whatever hangs."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        self.door.closing = True
        self.loop.call_soon_threadsafe(self.close)

    def close(self) -> None:
        """Take no more connections, and end soon."""
        for each in self.servers:
            each.close()
        self.loop.call_later(LINGER, self.end)

    def end(self) -> None:
        """Close connections that ask nothing; wait for the others."""
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Keeps the loop, for the signal's handler."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def listen(app: Any, host: str, port: int, limits: Limits) -> None:
    """Serve an application until SIGTERM or SIGINT."""
    if not 0 <= port <= 65535:
        raise ValueError(f"a port is a number from 0 to 65535, got port={port}")
    with switching(), many_files():
        server = server_of(app, host, port, limits)
        with suppress(SystemExit):  # uvicorn's own, for an address that it cannot have
            server.run()
    if not server.started:
        raise OSError(f"nothing can listen on {host}:{port}: the log above tells why")


def server_of(app: Any, host: str, port: int, limits: Limits) -> Closing:
    """The server of an application, which holds connections to their limits; not running yet."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # it would show tokens that stand in the query
        server_header=False,
        http=cast(Any, http_protocol(limits)),
        h11_max_incomplete_event_size=limits.header,
        ws="none",
        backlog=2048,
        timeout_graceful_shutdown=round(limits.answer_seconds + limits.body_seconds) + 1,
    )
    server = Closing(config)
    server.door = app.state.door
    return server


@contextmanager
def switching() -> Iterator[None]:
    """Threads take turns at Python more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def check_address(host: str, token: str | None, insecure: bool) -> None:
    """Refuse an address that others can reach, unless they need a token.

    >>> check_address("0.0.0.0", None, insecure=False)
    Traceback (most recent call last):
    ValueError: others can reach 0.0.0.0: serve needs a token there, got none; to serve all who come, insecure=True
    """
    if token is None and not insecure and not is_loopback(host):
        raise ValueError(
            Message(
                f"others can reach {host}: serve needs a token there, got none; to serve all who come, "
                f"{setting('insecure', 'True')}"
            )
        )


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine only; a name that is not localhost may be anything.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.2", "gpu7", "")]
    [True, True, True, False, False, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
