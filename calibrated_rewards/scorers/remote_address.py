"""Where a server is, and what is secret in that: the token, a password or a query of the url."""

from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from calibrated_rewards.prompts import start_of

# Of a query, only longer values may be secrets: "1" is in every text.
SECRET = 4


@dataclass(frozen=True)
class Address:
    """An url, with the token that goes to it; its repr, and what it redacts, have no secrets."""

    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = split(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Remote needs an url such as http://host:8000, got url={start_of(shown(self.url))}")
        token = self.token
        if token is None:
            return
        if not (isinstance(token, str) and token.isascii() and token.isprintable() and token and " " not in token):
            raise ValueError("Remote needs a token of printable ASCII without blanks or line ends, got another or none")
        if parts.username is not None:
            raise ValueError("Remote sends a token or the user of the url, got both: leave one of them out")

    def posted(self, path: str) -> str:
        """Where requests go: the url as it stands; of a bare host the path, with the url's query."""
        parts = split(self.url)
        return parts._replace(path=path if parts.path in ("", "/") else parts.path, fragment="").geturl()

    def redacted(self, said: str) -> str:
        """A text less the secrets that are sent, which servers may quote."""
        parts = split(self.url)
        secrets = [value for _, value in parse_qsl(parts.query) if len(value) >= SECRET]
        secrets += [self.token or "", parts.password or ""]
        if parts.username is not None:
            password = unquote(parts.password or "")
            secrets += [password, b64encode(f"{unquote(parts.username)}:{password}".encode()).decode()]
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            said = said.replace(secret, "[secret]")
        return said


def shown(url: str) -> str:
    """An url less what may be secret in it: user, password, query.

    >>> shown("https://me:pass@rm:8000/score?key=1")
    'https://rm:8000/score'
    """
    parts = split(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def split(url: str) -> SplitResult:
    """The parts of an url; of what cannot be one, an error."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"Remote needs an url such as http://host:8000, got one that is none: {error}") from None
    return parts
