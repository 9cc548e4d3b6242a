"""How long a request that failed waits before it is tried again."""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

# Nobody waits longer than this many seconds between two tries, whatever a server asks for.
LONGEST_WAIT = 60.0


def pause(backoff: float, tried: int) -> float:
    """Twice as long each time, and shaken, so that many clients do not come back together."""
    return min(LONGEST_WAIT, backoff * 2.0 ** min(tried, 60)) * random.uniform(0.5, 1.0)


def asked_wait(said: str) -> float:
    """How many seconds a server asks to wait by a Retry-After, a number or a date; 0 if it does not ask.

    >>> asked_wait("7"), asked_wait("Wed, 21 Oct 2015 07:28:00 GMT"), asked_wait("")
    (7.0, 0.0, 0.0)
    """
    try:
        seconds = float(said) if said.isdigit() else (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
    return min(LONGEST_WAIT, max(0.0, seconds))
