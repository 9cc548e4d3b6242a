"""Keep secrets out of what httpx and httpcore log: the whole url of each request, the headers of each answer."""

import logging
from dataclasses import dataclass, field
from typing import Any

import httpx

from calibrated_rewards.scorers.remote_address import Address, resolved, shown, split

LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


@dataclass(frozen=True, eq=False)
class Redacting:
    """A filter of loggers: addresses that are asked are shown without their secrets."""

    places: set[Address] = field(default_factory=set)

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record where it has a secret; it is logged in any case."""
        if isinstance(record.args, tuple):
            record.args = tuple(map(self._shown, record.args))
        said = message = record.getMessage()
        for place in tuple(self.places):
            said = place.redacted(said)
        if said != message:
            record.msg, record.args = said, ()
        return True

    def _shown(self, value: Any) -> Any:
        """An url of httpx as errors show it, if its host is one of ours."""
        if not isinstance(value, httpx.URL):
            return value
        ours = any(split(place.url).hostname == value.host for place in tuple(self.places))
        return shown(str(value)) if ours else value


_REDACTING = Redacting()


def hide(place: Address) -> None:
    """Redact from now on what is secret in an address."""
    place = Address(resolved(place.url), place.token)  # a variable of the environment may change
    if place in _REDACTING.places:
        return
    _REDACTING.places.add(place)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_REDACTING)
