"""Addresses of servers and their tokens, which no file, fingerprint or message shows.

Secret are the token and, of a url, all but scheme, host, port and known words; of settings, those whose names say so
(`is_secret`). `CALIBRATED_REWARDS_TOKEN` is sent to the scheme, host and port of `CALIBRATED_REWARDS_TOKEN_URL` and
nowhere else, whatever url a saved reward names. Several servers that share a token are separated by commas.
"""

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, unquote_plus, urlsplit

from calibrated_rewards.prompts import start_of

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|-")
# "token" alone, or after who gives it or what it is for: eos_token and step_token are words of a text.
_SECRET = re.compile(
    r"""(?x)
    (.*_)?(auth|authorization|proxy_authorization|cookies?|credentials?)
    | .*(password|passwd|passphrase|secret|api_?key|apikey).*
    | (.*_)?(access|private|signing|encryption|account|subscription|hf|openai|auth)_key(_id)?
    | (.*_)?((use_)?auth|access|api|hf|hub|hugging_?face(_hub)?|bearer|refresh|id|session|security|user|write|read
        |github|openai|wandb|server|jwt|rewards|policy)_token
    | token | jwt | bearer
    """
)


def is_secret(name: str) -> bool:
    """Tell if a setting of this name holds a secret, in whatever case and style it is written.

    >>> [name for name in ("use_auth_token", "apiKey", "max_tokens", "eos_token", "tokenizer") if is_secret(name)]
    ['use_auth_token', 'apiKey']
    """
    return _SECRET.fullmatch(_WORD.sub("_", name).lower()) is not None


def without_secrets(value: Any) -> Any:
    """Remove the settings that hold secrets from a value, inside of mappings and lists too.

    >>> without_secrets({"task": "score", "extra": [{"api_key": "k", "n": 1}]})
    {'task': 'score', 'extra': [{'n': 1}]}
    """
    if isinstance(value, Mapping):
        public = {name: each for name, each in value.items() if not (isinstance(name, str) and is_secret(name))}
        return {name: without_secrets(each) for name, each in public.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value
    return value


# Of a query or a path, only longer values are looked for in texts: "1" is in every text.
SECRET = 4
HIDDEN = "[...]"
# The parts of such servers' paths. Any other part may be a token, as in http://host/t/TOKEN/score.
_PATH = (
    "t api openai v1 v2 v3 v4 score scores classify pooling rerank get_reward reward rewards reward_model evaluation "
    "completions chat models model generate predict inference invocations embeddings health deployments endpoints rm "
    "classification"
)
WORDS = {"", *_PATH.split()}
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """An url, with the token that goes to it; its repr has no secrets, and it redacts them in texts."""

    url: str = field(repr=False)
    """The address itself, or $NAME for an environment variable that holds it."""
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = split_url(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Remote needs an url such as http://host:8000, got url={start_of(redact_url(self.url))}")
        token = self.token
        if token is None:
            return
        if not (isinstance(token, str) and token.isascii() and token.isprintable() and token and " " not in token):
            raise ValueError("Remote needs a token of printable ASCII without blanks or line ends, got another or none")
        if parts.username is not None:
            raise ValueError("Remote sends a token or the user of the url, got both: leave one of them out")

    def posted(self, path: str) -> str:
        """Return the url of requests: the url as it stands; of a bare host the path, with the url's query."""
        parts = split_url(self.url)
        return parts._replace(path=path if parts.path in ("", "/") else parts.path, fragment="").geturl()

    def redacted(self, text: str) -> str:
        """Replace the secrets that are sent, which servers may quote, in a text."""
        for secret in sorted({*self._secrets()}, key=len, reverse=True):
            text = text.replace(secret, "[secret]")
        return text

    def _secrets(self) -> Iterator[str]:
        """Yield token, user, password, and the longer parts of query and path, as written and decoded."""
        parts = split_url(self.url)
        user, password = parts.username or "", parts.password or ""
        if parts.username is not None:
            yield b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        yield from filter(None, (self.token, password, unquote(password)))
        settings = [each.partition("=") for each in parts.query.split("&")]
        values = [value if value.strip("=") else name for name, _, value in settings]
        path = [part for part in parts.path.split("/") if part not in WORDS]
        for part in (user, parts.query, *values, *path):
            yield from (form for form in (part, unquote_plus(part), unquote(part)) if len(form) >= SECRET)


def redact_url(url: str) -> str:
    """Write an url for messages: no user, password or query, and of the path only words that are no secrets.

    >>> redact_url("https://me:pass@rm:8000/score?key=1"), redact_url("http://rm:8000/t/0123456789/score")
    ('https://rm:8000/score', 'http://rm:8000/t/[...]/score')
    """
    parts = split_url(url)
    path = "/".join(part if part in WORDS else HIDDEN for part in parts.path.split("/"))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], path=path, query="", fragment="").geturl()


def format_url(url: str) -> str:
    """Write an url for a repr: redacted, or the variable that holds it."""
    return url if is_variable(url) else redact_url(url)


def check_saved(url: str) -> None:
    """Refuse to write an url that may hold a secret; whoever reads the file would have it."""
    if is_variable(url):
        return
    parts = split_url(url)
    if parts.query or parts.fragment or "@" in parts.netloc or HIDDEN in redact_url(url):
        raise ValueError(
            "a url that is saved holds no password and no query, nor parts of a path that may be a token, got "
            f"{redact_url(url)}: put the url into an environment variable and give its name, url='$REWARD_MODEL_URL'; "
            "a token goes into CALIBRATED_REWARDS_TOKEN, and its server into CALIBRATED_REWARDS_TOKEN_URL"
        )


def is_variable(url: str) -> bool:
    """Tell if this names an environment variable that holds the url."""
    return _VARIABLE.fullmatch(url) is not None


def resolve_url(url: str) -> str:
    """Return an url as it stands, or the one in the environment variable that $NAME names."""
    if not is_variable(url):
        return url
    if not os.environ.get(url[1:]):
        raise ValueError(f"Remote needs an url in the environment variable {url[1:]}, which is not set")
    return os.environ[url[1:]]


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Return scheme, host and port of an url, to which a token is bound.

    >>> origin_of("HTTPS://RM.example/score") == origin_of("https://rm.example:443")
    True
    """
    parts = split_url(url)
    return parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme)


def split_url(url: str) -> SplitResult:
    """Split an url into its parts; refuse what cannot be one.

    Characters that libraries read in different ways are refused, or a token could go where nobody looked.
    """
    url = resolve_url(url)
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


TOKEN, POLICY_TOKEN = "CALIBRATED_REWARDS_TOKEN", "CALIBRATED_REWARDS_POLICY_TOKEN"
STATUSES = (401, 403)


def token_for(url: str, variable: str = TOKEN) -> str | None:
    """Return the token of an environment variable, if it is for this server; an url with a user gets none."""
    token = os.environ.get(variable)
    if not token or split_url(url).username is not None:
        return None
    return token if origin_of(url) in map(origin_of, servers_of(variable)) else None


def servers_of(variable: str) -> list[str]:
    """List the servers that the token in a variable is for; ValueError if nothing says which."""
    servers = [each.strip() for each in os.environ.get(f"{variable}_URL", "").split(",")]
    usable = [each for each in servers if each.lower().startswith(("http://", "https://"))]
    if not usable or len(usable) < len(servers):
        # What stands there is not shown: it may be the token, in the wrong variable.
        got = "it does not begin with http:// or https://" if any(servers) else "it is not set"
        raise ValueError(
            f"the token in {variable} is sent to one server only: say which in {variable}_URL, as in "
            f"{variable}_URL=http://rm:8000 (scheme, host and port count); {got}"
        )
    return usable


def explain_token(status: int, url: str, token: str | None) -> str:
    """Explain, after a server has asked for a token, which tokens of the environment were not sent to it."""
    if status not in STATUSES:
        return ""
    others = [name for name in (TOKEN, POLICY_TOKEN) if os.environ.get(name) and token_for(url, name) is None]
    reasons = [f"{name} is for {', '.join(map(redact_url, servers_of(name)))}, and was not sent" for name in others]
    if not reasons and token is None:
        reasons = [
            f"no token was sent: set {TOKEN} ({POLICY_TOKEN} for a policy's server), and the address that it is for in "
            f"{TOKEN}_URL ({POLICY_TOKEN}_URL)"
        ]
    return f"; {'; '.join(reasons or ['a token was sent'])}"
