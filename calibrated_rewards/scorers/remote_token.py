"""The environment's token, bound to the server that it is for.

`CALIBRATED_REWARDS_TOKEN` is sent to the scheme, host and port of `CALIBRATED_REWARDS_TOKEN_URL` and nowhere else,
whatever url a saved reward names. Several servers that share a token are separated by commas.
"""

import os

from calibrated_rewards.scorers.remote_address import origin, shown, split

TOKEN, POLICY_TOKEN = "CALIBRATED_REWARDS_TOKEN", "CALIBRATED_REWARDS_POLICY_TOKEN"
STATUSES = (401, 403)


def token_for(url: str, variable: str = TOKEN) -> str | None:
    """The token of an environment variable, if it is for this server; an url with a user gets none."""
    token = os.environ.get(variable)
    if not token or split(url).username is not None:
        return None
    return token if origin(url) in map(origin, servers_of(variable)) else None


def servers_of(variable: str) -> list[str]:
    """The servers that the token in a variable is for; ValueError if nothing says which."""
    servers = [each.strip() for each in os.environ.get(f"{variable}_URL", "").split(",")]
    usable = [each for each in servers if each.lower().startswith(("http://", "https://"))]
    if not usable or len(usable) < len(servers):
        raise ValueError(
            f"the token in {variable} is sent to one server only: say which in {variable}_URL, as in "
            f"{variable}_URL=http://rm:8000 (scheme, host and port count)"
        )
    return usable


def unsent(status: int, url: str) -> str:
    """Tell of a token that was not sent, after a server has asked for one; nothing if there is none."""
    if status not in STATUSES:
        return ""
    others = [name for name in (TOKEN, POLICY_TOKEN) if os.environ.get(name) and token_for(url, name) is None]
    told = [f"{name} is for {', '.join(map(shown, servers_of(name)))}, and was not sent" for name in others]
    return f"; {'; '.join(told)}" if told else ""
