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
        # What stands there is not shown: it may be the token, in the wrong variable.
        got = "it does not begin with http:// or https://" if any(servers) else "it is not set"
        raise ValueError(
            f"the token in {variable} is sent to one server only: say which in {variable}_URL, as in "
            f"{variable}_URL=http://rm:8000 (scheme, host and port count); {got}"
        )
    return usable


def unsent(status: int, url: str, token: str | None) -> str:
    """Tell, after a server has asked for a token, whether one was sent, and which ones of the environment were not."""
    if status not in STATUSES:
        return ""
    others = [name for name in (TOKEN, POLICY_TOKEN) if os.environ.get(name) and token_for(url, name) is None]
    told = [f"{name} is for {', '.join(map(shown, servers_of(name)))}, and was not sent" for name in others]
    if not told and token is None:
        told = [
            f"no token was sent: set {TOKEN} ({POLICY_TOKEN} for a policy's server), and the address that it is for in "
            f"{TOKEN}_URL ({POLICY_TOKEN}_URL)"
        ]
    return f"; {'; '.join(told or ['a token was sent'])}"
