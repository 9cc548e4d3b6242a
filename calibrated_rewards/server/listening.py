"""Listen at an address until stopped: limits on connections without a request, and a shutdown that answers all others.

uvicorn does the work. What is added bounds size, time and number of headers that have not arrived yet.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from calibrated_rewards.server.access import Shutdown
from calibrated_rewards.server.limits import Limits

LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# Files that a process has open besides connections, and the part of the rest that may be newcomers.
OTHER_FILES, SHARE, MOST_FILES = 64, 2, 65536


@dataclass(eq=False)
class Newcomers:
    """Connections without a request yet; when there are too many, the oldest is closed.

    A client sends its headers as soon as it is connected, and is a newcomer for a moment. Whoever opens connections and
    sends nothing pushes out its own; connections with a request stay, and those without the token end with a 401.
    """

    most: int
    waiting: dict[Any, None] = field(default_factory=dict, init=False)
    """Connections by age, the oldest first."""

    def add(self, connection: "Connection") -> None:
        """Add a connection, and close the oldest if there are too many."""
        self.waiting[connection] = None
        if len(self.waiting) > self.most:
            oldest = next(iter(self.waiting))
            self.discard(oldest)
            oldest.transport.abort()

    def discard(self, connection: "Connection") -> None:
        """Remove a connection that has sent its headers, or is gone."""
        self.waiting.pop(connection, None)


class Connection(asyncio.Protocol):
    """uvicorn's connection over h11, with a time limit for headers.

    h11 bounds their size (`h11_max_incomplete_event_size`), those of trailers and chunks too, and reads them in linear
    time. httptools, which uvicorn prefers, has no bound, and takes quadratic time for one large header.
    """

    transport: Any

    def __init__(self, http: H11Protocol, newcomers: Newcomers, seconds: float) -> None:
        self.http, self.newcomers, self.seconds = http, newcomers, seconds
        self.clock: asyncio.TimerHandle | None = None
        self.begun = False

    def connection_made(self, transport: Any) -> None:
        """Count the connection, and start its time limit."""
        # Any: uvloop's is no asyncio.Transport.
        self.transport = transport
        self.http.connection_made(transport)
        self.newcomers.add(self)
        self.start_clock()

    def data_received(self, data: bytes) -> None:
        """Pass on bytes: the first of a request start the clock, the end of its headers stops it."""
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
        """Pass on the end of the stream."""
        self.http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, and remove the connection."""
        self.stop_clock()
        self.newcomers.discard(self)
        self.http.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass on the pause of writing."""
        self.http.pause_writing()

    def resume_writing(self) -> None:
        """Pass on the resumption of writing."""
        self.http.resume_writing()

    def start_clock(self) -> None:
        """Limit the time for headers, from their first byte or from the start of the connection."""
        if self.clock is None:
            self.clock = asyncio.get_running_loop().call_later(self.seconds, self.expire)

    def stop_clock(self) -> None:
        """End the time limit: the headers have arrived."""
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None

    def expire(self) -> None:
        """Close the connection; answer 408 if a part of the headers has arrived."""
        self.clock = None
        if not self.transport.is_closing():
            if self.begun:
                self.transport.write(LATE)
            self.transport.close()


def http_protocol(limits: Limits) -> Callable[..., Connection]:
    """Build the connection factory of one server."""
    newcomers = Newcomers(max(1, min(limits.newcomers, (limit_of_files() - OTHER_FILES) // SHARE)))

    def connection(**arguments: Any) -> Connection:  # what uvicorn gives its own protocols
        return Connection(H11Protocol(**arguments), newcomers, limits.header_seconds)

    return connection


def limit_of_files() -> int:
    """Read how many files this process may have open, each connection among them."""
    if sys.platform == "win32":
        return MOST_FILES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


@contextmanager
def raise_file_limit() -> Iterator[None]:
    """Allow as many open files as the system permits: a shell's usual 256 or 1024 are soon connections."""
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


# Seconds in which one more request on an open connection is answered, and told that it closes.
LINGER = 1.0
# Threads take turns at Python every 5 ms, and a model's thread asks for its turn at every operation.
SWITCH = 0.0005


class GracefulServer(uvicorn.Server):
    """A server that takes no more connections at the first SIGTERM or SIGINT, and ends when the open ones are done."""

    shutdown_state: Shutdown

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown; a second signal is the system's, and ends the process whatever hangs."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        self.shutdown_state.begun = True
        self.loop.call_soon_threadsafe(self.close)

    def close(self) -> None:
        """Refuse new connections, and end soon."""
        for each in self.servers:
            each.close()
        self.loop.call_later(LINGER, self.end)

    def end(self) -> None:
        """Close idle connections, and wait for the others."""
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Keep the loop for the signal handler, and start."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def listen(app: Any, host: str, port: int, limits: Limits) -> None:
    """Serve an application until SIGTERM or SIGINT."""
    if not 0 <= port <= 65535:
        raise ValueError(f"a port is a number from 0 to 65535, got port={port}")
    with switch_threads_often(), raise_file_limit():
        server = build_server(app, host, port, limits)
        with suppress(SystemExit):  # uvicorn's own, for an address that it cannot have
            server.run()
    if not server.started:
        raise OSError(f"nothing can listen on {host}:{port}: the log above tells why")


def build_server(app: Any, host: str, port: int, limits: Limits) -> GracefulServer:
    """Build the server of an application, with limits on its connections; it does not run yet."""
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
    server = GracefulServer(config)
    server.shutdown_state = app.state.shutdown
    return server


@contextmanager
def switch_threads_often() -> Iterator[None]:
    """Let threads take turns at Python more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
