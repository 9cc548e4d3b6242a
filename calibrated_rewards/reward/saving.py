"""Settings as JSON, and back: the library's frozen dataclasses by name and fields, functions by where they are.

>>> from calibrated_rewards.theory.transforms import Affine, Chain, Exponential
>>> spelled(Chain(Exponential(5.0), Affine(2.0)))["parts"][0]
{'is': 'calibrated_rewards.theory.transforms.Exponential', 't': 5.0}
>>> read(spelled(Chain(Exponential(5.0), Affine(2.0))))
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))

What is read makes nothing but the library's own dataclasses: a file runs no code, and asks no server. A function, a
checkpoint that brings code, options for loading one, and a server need `trust=True`, wherever the file is.

A calibrated reward as a directory: reward.json with the settings, the table, the prompts as they were calibrated."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from calibrated_rewards.files import import_function, write_file
from calibrated_rewards.models.server_address import check_saved, is_secret, named, token_for
from calibrated_rewards.reward.originals import Originals, of_run
from calibrated_rewards.table.reference_table import ReferenceTable
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


FORMAT, VERSION = "calibrated reward", 1
SETTINGS, TABLE, PROMPTS = "reward.json", "table", "prompts.jsonl"
TABLE_HINT = (
    ": it is a table, of which `calibrated-rewards reward {at} --reward-model ... --out reward/` makes a reward"
)
# What has a file of its own.
FILES = {"table", "originals"}


def write(reward: Any, to: str | os.PathLike[str]) -> None:
    """Each file in one step, the settings last: they say which table they belong to."""
    settings = {each.name: _setting(reward, each.name) for each in fields(reward) if each.name not in FILES}
    at = Path(to)
    at.mkdir(parents=True, exist_ok=True)
    reward.table.save(at / TABLE)
    _write_prompts(reward, at / PROMPTS)
    text = json.dumps({"format": FORMAT, "version": VERSION, "table": _digest(at), **settings}, indent=2)
    write_file(at / SETTINGS, text + "\n")


def read_of_directory(
    cls: Any,
    name: str | os.PathLike[str],
    scorer: Any,
    revision: str | None,
    token: str | bool | None,
    trust: bool,
    changes: Mapping[str, Any],
) -> Any:
    """A reward, `cls`, of what was written; from the Hub, if `name` is no directory."""
    at = Path(name) if os.path.isdir(name) else Path(_download(str(name), revision, token))
    try:
        return _read(cls, at, scorer, trust, changes)
    except NeedsTrust as error:
        raise NeedsTrust(f"{at / SETTINGS}: {error.what}") from None
    except (TypeError, KeyError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        raise ValueError(f"{at / SETTINGS} cannot be read: {type(error).__name__}: {error}") from error


def _read(cls: Any, at: Path, scorer: Any, trust: bool, changes: Mapping[str, Any]) -> Any:
    said = _settings(at)
    if said.pop("table", None) != _digest(at) and "table" not in changes:
        raise ValueError(f"{at / SETTINGS} and {at / TABLE} are not of one save, which was not finished: save it again")
    stored = {
        field: value for field, value in said.items() if field not in changes and (field != "scorer" or not scorer)
    }
    settings = {field: read(value, trust=trust) for field, value in stored.items()}
    known = {each.name for each in fields(cls)}
    if unknown := {*settings, *changes} - known:
        raise ValueError(f"a calibrated reward has no setting {', '.join(sorted(unknown))}; it has {sorted(known)}")
    own_prompts = (at / PROMPTS).exists() and "table" not in changes
    prompts = Originals(str(at / PROMPTS)) if own_prompts else None
    table = changes["table"] if "table" in changes else ReferenceTable.load(at / TABLE)
    return cls(**{"scorer": scorer, "table": table, "originals": prompts, **settings, **changes})


def push(reward: Any, repo_id: str, private: bool | None, token: str | bool | None) -> str:
    """Upload what `write` writes, to a new repository if there is none."""
    from huggingface_hub import HfApi

    setting = _setting(reward, "scorer")
    for place in _places(setting):
        if os.path.isabs(place):
            raise ValueError(
                f"the reward model is a folder of this machine, {place}: push it, and give the reward "
                "load_scorer(its repository); or scorer=None, for from_pretrained(..., scorer=)"
            )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        write(reward, directory)
        repo = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, repo_type="model", folder_path=directory, commit_message="Upload calibrated reward"
        )
    return str(commit.commit_url)


def _digest(at: Path) -> str | None:
    """Which table it is."""
    summary = at / TABLE / "table.json"
    return str(json.loads(summary.read_bytes())["header_digest"]) if summary.exists() else None


def _setting(reward: Any, name: str) -> Any:
    value = getattr(reward, name)
    if name == "on_missing" and callable(value):
        raise ValueError("on_missing is a function, which is not saved: save with another, and give it when loading")
    return spelled(value)


def _settings(at: Path) -> dict[str, Any]:
    try:
        said = json.loads((at / SETTINGS).read_text())
    except FileNotFoundError:
        is_table = (at / "table.json").exists()
        hint = TABLE_HINT.format(at=at) if is_table else ""
        raise FileNotFoundError(f"{at} has no {SETTINGS}, so it is no calibrated reward{hint}") from None
    except ValueError as error:
        raise ValueError(f"{at / SETTINGS} is no JSON: {error}") from None
    if not isinstance(said, dict) or said.pop("format", None) != FORMAT or said.pop("version", None) != VERSION:
        raise ValueError(f"{at / SETTINGS} is no calibrated reward of version {VERSION}")
    return said


def _write_prompts(reward: Any, to: Path) -> None:
    if reward.originals is not None:
        if not (to.exists() and os.path.samefile(reward.originals.path, to)):
            shutil.copyfile(reward.originals.path, to)
        return
    run = of_run(reward.table)
    if run is not None:
        Originals.write(to, reward.table, (prompt for _, prompt in run.prompts()))
    else:
        to.unlink(missing_ok=True)


def _places(said: Any) -> list[str]:
    """Where checkpoints are, in a spelled scorer."""
    if isinstance(said, list):
        return [place for each in said for place in _places(each)]
    if not isinstance(said, dict):
        return []
    own = [str(said["name"])] if str(said.get("is", "")).endswith(".FromCheckpoint") else []
    return own + [place for each in said.values() for place in _places(each)]


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")) or repo_id.endswith("/"):
        raise FileNotFoundError(f"no directory {repo_id!r} here; a name on the Hub is like my-name/my-reward")
    wanted = [SETTINGS, PROMPTS, f"{TABLE}/*"]
    try:
        return snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no directory {repo_id!r} here, and it does not come from the Hub either: {error}"
        ) from error
