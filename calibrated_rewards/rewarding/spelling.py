"""Settings as JSON, and back: the library's frozen dataclasses by name and fields, functions by where they are.

>>> from calibrated_rewards.theory.transforms import Affine, Chain, Exponential
>>> spelled(Chain(Exponential(5.0), Affine(2.0)))["parts"][0]
{'is': 'calibrated_rewards.theory.transforms.Exponential', 't': 5.0}
>>> read(spelled(Chain(Exponential(5.0), Affine(2.0))))
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))

What is read makes nothing but the library's own dataclasses: a file runs no code, and asks no server. A function, a
checkpoint that brings code, options for loading one, and a server need `trust=True`, wherever the file is.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from math import isfinite
from types import FunctionType
from typing import Any

import numpy as np

from calibrated_rewards.files import import_function
from calibrated_rewards.models.server_address import check_saved, is_secret, named, token_for
from calibrated_rewards.theory.transforms import Chain

OURS = "calibrated_rewards."
# Settings that run code that comes with a checkpoint, load kernels, or send prompts elsewhere.
RISKY = ("trust_remote_code", "model_options", "quantization_config", "url")
# Where the dataclasses are that a reward is made of.
OF_REWARDS = re.compile(
    r"calibrated_rewards\.(transforms|optimal|procedures|score_procedures|calibrations|combined|testing"
    r"|scorers\.\w+|reading\.\w+)"
)
# A user and a password, in an url that is some setting's value.
_CREDENTIALS = re.compile(r"://[^/?#\s]*@")


class NeedsTrust(ValueError):
    """A file names something that runs code or asks a server, and the caller did not say that it may."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: read it, then allow it with trust_remote_code=True, or give the scorer, scorer=")
        self.what = what


def spelled(thing: Any) -> Any:
    """JSON for a setting; TypeError for one that has none."""
    if isinstance(thing, FunctionType):
        return {"function": f"{thing.__module__}:{_importable(thing)}"}
    if is_dataclass(thing) and not isinstance(thing, type) and type(thing).__module__.startswith(OURS):
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        return {"is": name, **{field: spelled(value) for field, value in _fields(thing)}}
    if isinstance(thing, Mapping):
        if "is" in thing or "function" in thing or not all(isinstance(name, str) for name in thing):
            raise TypeError(
                f'a mapping that is saved has names other than "is" and "function", got {list(thing)!r:.80}'
            )
        return {name: spelled(value) for name, value in _without_credentials(thing)}
    if isinstance(thing, tuple | list):
        return [spelled(value) for value in thing]
    if type(thing).__module__.partition(".")[0] == "torch" and str(thing).startswith("torch."):
        return str(thing).removeprefix("torch.")  # a dtype or a layout, which transformers takes by name too
    return _plain(thing)


def read(said: Any, *, trust: bool = False) -> Any:
    """What `spelled` was given; what was a list comes back as a tuple."""
    if isinstance(said, list):
        return tuple(read(value, trust=trust) for value in said)
    if not isinstance(said, dict):
        return said
    if "function" in said and "is" not in said:
        if not trust:
            raise NeedsTrust(f"the function {said['function']!r:.80} would be imported and called")
        return import_function(str(said["function"]))
    values = {name: read(value, trust=trust) for name, value in said.items() if name != "is"}
    risky = [name for name in RISKY if values.get(name)]
    if risky and not trust:
        raise NeedsTrust("; ".join(_risk(name, values[name]) for name in risky))
    if "is" not in said:
        return values
    made = _class(str(said["is"]))
    if {"token", "url"} <= {field.name for field in fields(made)}:
        values["token"] = token_for(str(values.get("url")))
    return Chain(*values["parts"]) if made is Chain else made(**values)


def _risk(name: str, value: Any) -> str:
    """What a setting would do that needs trust; of a url as much as messages show."""
    if name != "url":
        return f"{name} may run code that comes with a checkpoint"
    return f"prompts and completions would be sent to the server {named(str(value))}"


def _fields(thing: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(thing):
        value = getattr(thing, field.name)
        if field.name == "url":
            check_saved(str(value))
        if (field.init or not field.name.startswith("_")) and not is_secret(field.name):
            yield field.name, value


def _without_credentials(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by name: those that hold a secret are left out, whoever reads the file has one of their own."""
    for name, value in settings.items():
        if isinstance(value, str) and _CREDENTIALS.search(value):
            raise ValueError(f"a setting that is saved holds no url with a password, {name} has one: leave it out")
        if not is_secret(name):
            yield name, value


def _plain(thing: Any) -> Any:
    if isinstance(thing, np.ndarray | np.generic):
        return _plain(thing.tolist())
    if thing is None or isinstance(thing, bool | int | str) or (isinstance(thing, float) and isfinite(thing)):
        return thing
    raise TypeError(
        f"a calibrated reward is saved as JSON, which cannot say {thing!r:.80}: use the library's transforms and "
        "load_scorer(name_or_path), or a function of a module"
    )


def _importable(function: FunctionType) -> str:
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise TypeError(
            f"a function is saved by where it can be imported from, {function.__module__}.{function.__qualname__} "
            "cannot: define it in a module"
        )
    return function.__qualname__


def _class(name: str) -> Any:
    """A dataclass of ours, and nothing else that a name may lead to."""
    module, _, path = name.rpartition(".")
    if not OF_REWARDS.fullmatch(module) or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"a saved setting is one of the library's dataclasses, got {name!r:.80}")
    try:
        found = getattr(import_module(module), path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"this version of the library has no {name}") from error
    if not (isinstance(found, type) and is_dataclass(found) and found.__module__ == module):
        raise ValueError(f"a saved setting is one of the library's dataclasses, got {name!r:.80}")
    return found
