"""Connections whose headers have not arrived: how large these may be, how long they may take, how many may wait."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from calibrated_rewards.serving.limits import Limits

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
