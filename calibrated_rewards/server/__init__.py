"""A calibrated reward over HTTP, in the dialects that the trainers' clients speak.

`serve` runs it until it is told to stop; `create_app` is the ASGI application; `Limits` says what it takes on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calibrated_rewards.server.app import create_app as create_app, serve as serve
from calibrated_rewards.server.limits import Limits as Limits

if TYPE_CHECKING:
    from calibrated_rewards.server.replicas import serve_replicas as serve_replicas

# Loaded when they are asked for: they bring heavy libraries.
LAZY = {"serve_replicas": "replicas"}


def __getattr__(name: str) -> Any:
    """Import a public name of `LAZY` from its module."""
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
