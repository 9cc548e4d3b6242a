"""Where a server is, and what is secret in that: the token, and of the url all but scheme, host, port, known words."""

import os
import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, unquote_plus, urlsplit

from calibrated_rewards.prompts import start_of

# Of a query or a path, only longer values are looked for in texts: "1" is in every text.
SECRET = 4
HIDDEN = "[...]"
# What paths of such servers consist of. Any other part may be a token, as in http://host/t/TOKEN/score.
WORDS = {
    *(
        "",
        "t",
        "api",
        "openai",
        "v1",
        "v2",
        "v3",
        "v4",
        "score",
        "scores",
        "classify",
        "pooling",
        "rerank",
        "get_reward",
    ),
    *(
        "reward",
        "rewards",
        "reward_model",
        "evaluation",
        "completions",
        "chat",
        "models",
        "model",
        "generate",
        "predict",
    ),
    *("inference", "invocations", "embeddings", "health", "deployments", "endpoints", "rm", "classification"),
}
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """An url, with the token that goes to it; its repr, and what it redacts, have no secrets."""

    url: str = field(repr=False)
    """The url, or $NAME for an environment variable that holds it."""
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
        for secret in sorted({*self._secrets()}, key=len, reverse=True):
            said = said.replace(secret, "[secret]")
        return said

    def _secrets(self) -> Iterator[str]:
        """The token, user and password, and what is long enough of query and path, as written and as meant."""
        parts = split(self.url)
        user, password = parts.username or "", parts.password or ""
        if parts.username is not None:
            yield b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        yield from filter(None, (self.token, password, unquote(password)))
        settings = [each.partition("=") for each in parts.query.split("&")]
        values = [value if value.strip("=") else name for name, _, value in settings]
        path = [part for part in parts.path.split("/") if part not in WORDS]
        for part in (user, parts.query, *values, *path):
            yield from (form for form in (part, unquote_plus(part), unquote(part)) if len(form) >= SECRET)


def shown(url: str) -> str:
    """An url as messages show it: no user, password or query, and of the path only words that are no secrets.

    >>> shown("https://me:pass@rm:8000/score?key=1"), shown("http://rm:8000/t/0123456789/score")
    ('https://rm:8000/score', 'http://rm:8000/t/[...]/score')
    """
    parts = split(url)
    path = "/".join(part if part in WORDS else HIDDEN for part in parts.path.split("/"))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], path=path, query="", fragment="").geturl()


def named(url: str) -> str:
    """An url in a repr: `shown`, or the variable that holds it."""
    return url if is_variable(url) else shown(url)


def check_saved(url: str) -> None:
    """Refuse to write an url that may hold a secret; whoever reads the file would have it."""
    if is_variable(url):
        return
    parts = split(url)
    if parts.query or parts.fragment or "@" in parts.netloc or HIDDEN in shown(url):
        raise ValueError(
            "a url that is saved holds no password and no query, nor parts of a path that may be a token, got "
            f"{shown(url)}: put the url into an environment variable and give its name, url='$REWARD_MODEL_URL'; "
            "a token goes into CALIBRATED_REWARDS_TOKEN, and its server into CALIBRATED_REWARDS_TOKEN_URL"
        )


def is_variable(url: str) -> bool:
    """Whether this names an environment variable that holds the url."""
    return _VARIABLE.fullmatch(url) is not None


def resolved(url: str) -> str:
    """An url as it stands, or the one in the environment variable that $NAME names."""
    if not is_variable(url):
        return url
    if not os.environ.get(url[1:]):
        raise ValueError(f"Remote needs an url in the environment variable {url[1:]}, which is not set")
    return os.environ[url[1:]]


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an url: what a token is bound to.

    >>> origin("HTTPS://RM.example/score") == origin("https://rm.example:443")
    True
    """
    parts = split(url)
    return parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme)


def split(url: str) -> SplitResult:
    """The parts of an url; of what cannot be one, an error.

    Characters that libraries read in different ways are refused, or a token could go where nobody looked.
    """
    url = resolved(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("Remote needs an url such as http://host:8000, got one that is none") from None
    netloc = parts.netloc
    odd = not netloc.isascii() or not netloc.isprintable() or netloc.count("@") > 1 or set(netloc) & set(' \\"<>^`{|}')
    if odd or re.search(r"[\x00-\x20\x7f\\]", url):
        raise ValueError(
            "Remote needs an url such as http://host:8000, got one with blanks, control characters, a backslash, two @ "
            "or letters beyond ASCII in its host (which has a form in ASCII, xn--...)"
        )
    return parts
