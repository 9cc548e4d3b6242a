"""Names of settings that hold a secret: tokens, keys and passwords, which no file, fingerprint or message shows.

>>> [name for name in ("use_auth_token", "apiKey", "max_tokens", "eos_token", "tokenizer") if is_secret(name)]
['use_auth_token', 'apiKey']
"""

import re
from collections.abc import Mapping
from typing import Any

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
    """Whether a setting of this name holds a secret, in whatever case and style it is written."""
    return _SECRET.fullmatch(_WORD.sub("_", name).lower()) is not None


def without_secrets(value: Any) -> Any:
    """A value without the settings that hold secrets, inside of mappings and lists too.

    >>> without_secrets({"task": "score", "extra": [{"api_key": "k", "n": 1}]})
    {'task': 'score', 'extra': [{'n': 1}]}
    """
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if not (isinstance(name, str) and is_secret(name))}
        return {name: without_secrets(each) for name, each in kept.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value
    return value
