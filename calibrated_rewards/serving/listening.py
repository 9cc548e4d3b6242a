"""Listening at an address until told to stop, and then letting nobody go without an answer."""

import asyncio
import ipaddress
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, cast

import uvicorn

from calibrated_rewards.files import Message, setting
from calibrated_rewards.serving.connections import http_protocol, many_files
from calibrated_rewards.serving.gate import Door
from calibrated_rewards.serving.limits import Limits

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
