"""What a reward server takes on, and the refusal of what is more."""

from dataclasses import dataclass, fields

MEBIBYTE = 2**20


class Refused(Exception):
    """A request that is answered with an error: its status, and what to say."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """What a server takes on at most; what is more is refused at once, and costs no memory.

    >>> Limits(pairs=0)
    Traceback (most recent call last):
    ValueError: Limits needs pairs > 0, got pairs=0
    """

    header: int = 65_536
    """Bytes of a request's first line and headers: 431, or 400 before they have all arrived."""
    headers: int = 100
    """Headers of a request: 431."""
    header_seconds: float = 10.0
    """Seconds for the headers to arrive: 408."""
    newcomers: int = 1024
    """Connections that have sent no request yet: the oldest is closed; fewer where few files may be open."""
    body: int = 16 * MEBIBYTE
    """Bytes of a request's body: 413."""
    held: int = 256 * MEBIBYTE
    """Bytes of all bodies that are being read or answered: 503."""
    pairs: int = 1024
    """Completions in a request: 413."""
    text: int = 262_144
    """Characters of a prompt, and of a completion: 413."""
    depth: int = 32
    """Lists and objects inside of each other: 422."""
    queue: int = 8192
    """Completions that wait for the reward model: 503."""
    batch: int = 64
    """Completions of several requests that the reward model is given at once."""
    wait: float = 0.01
    """Seconds that one completion waits for others to share a batch with."""
    body_seconds: float = 30.0
    """Seconds for a body to arrive: 408."""
    answer_seconds: float = 110.0
    """Seconds for the reward model to answer: 504. Clients give up after 120 (slime) or 180 (OpenRLHF)."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits needs {name} > 0, got {name}={getattr(self, name)!r}")
