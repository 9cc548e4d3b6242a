"""A calibrated reward as a directory: reward.json with its settings, the table, and the prompts as calibrated.

A combined reward is a directory too: reward.json, and each component in `rewards/NAME`. Where a combination is the
scorer of a calibrated reward, it lies in `scorer`.

Settings are JSON: a class of `CLASSES` by its bare name and fields, a function by where it can be imported from.

>>> from calibrated_rewards.theory.transforms import Affine, Chain, Exponential
>>> to_json(Chain(Exponential(5.0), Affine(2.0)))["parts"][0]
{'is': 'Exponential', 't': 5.0}
>>> from_json(to_json(Chain(Exponential(5.0), Affine(2.0))))
Chain(Exponential(t=5.0), Affine(scale=2.0, shift=0.0))

Reading makes nothing but those classes: a file runs no code, and asks no server. A function, a checkpoint that brings
code, options for loading one, and a server need `trust=True`, wherever the file is.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import blake2b
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrated_rewards.files import check_folder_name, import_function, replace_file, write_file
from calibrated_rewards.models.server_address import check_saved, format_url, is_secret, token_for
from calibrated_rewards.reward.find_prompts import Originals, RunPrompts
from calibrated_rewards.table.reference_table import ReferenceTable

if TYPE_CHECKING:
    from calibrated_rewards.reward.combined import Reward

# The classes that a file may name, and their modules. Files of version 0.1 have dotted paths, of which only the last
# part counts: a class may move to another module, but not change its name.
CLASSES = {
    name: f"calibrated_rewards.{module}"
    for module, names in {
        "theory.transforms": "Affine Chain Exponential Identity Log NormalQuantile Power Tabulated",
        "theory.optimum": "Optimal",
        "theory.mixtures": "BestOfUpTo",
        "theory.procedures": "BestOf Calibrated RewindAndRepeat SoftBestOf Standard WorstOf",
        "models.labels": "Difference Expected Label Levels Ordinal Weighted",
        "models.loading": "Placement",
        "models.text": "Question Text",
        "scorers.ensemble": "Cost Ensemble Function LowerBound Mean Min",
        "scorers.graded": "Dimension Graded GradedDimension",
        "scorers.protocol": "Loaded",
        "scorers.loading": "FromCheckpoint",
        "scorers.pair_models": "PairClassifier",
        "scorers.pairwise": "BothOrders MeanWin",
        "scorers.remote": "Native OpenRlhf Remote",
        "scorers.remote_vllm": "Vllm VllmScore",
        "reward.calibrators": "EmpiricalCDF LogSigmoidAtQuantile MedianCentered SmoothedCDF Uncalibrated ZScore",
        "reward.combined": "And Lowest Or WeightedMean",
        "testing.suites": "HashScorer NumberSampler NumberScorer",
    }.items()
    for name in names.split()
}
OURS = "calibrated_rewards."
# Settings that run code that comes with a checkpoint, load kernels, or send prompts elsewhere.
RISKY = ("trust_remote_code", "model_options", "quantization_config", "url")
# A user and a password, in an url that is some setting's value.
_CREDENTIALS = re.compile(r"://[^/?#\s]*@")


class NeedsTrust(ValueError):
    """A file names something that runs code or asks a server, and the caller did not allow it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: read it, then allow it with trust_remote_code=True, or give the scorer, scorer=")
        self.reason = reason


def to_json(setting: Any) -> Any:
    """Convert a setting to JSON; TypeError for one that has no such form."""
    if isinstance(setting, FunctionType):
        if "<" in setting.__qualname__ or setting.__module__ == "__main__":
            raise TypeError(
                f"a function is saved by where it can be imported from, {setting.__module__}.{setting.__qualname__} "
                "cannot: define it in a module"
            )
        return {"function": f"{setting.__module__}:{setting.__qualname__}"}
    name = type(setting).__name__
    if name in CLASSES and type(setting) is _find_class(name):
        return {"is": name, **{field: to_json(value) for field, value in _saved_fields(setting)}}
    if isinstance(setting, Mapping):
        if "is" in setting or "function" in setting or not all(isinstance(key, str) for key in setting):
            raise TypeError(
                f'a mapping that is saved has names other than "is" and "function", got {list(setting)!r:.80}'
            )
        return {key: to_json(value) for key, value in _without_credentials(setting)}
    if isinstance(setting, tuple | list):
        return [to_json(value) for value in setting]
    if type(setting).__module__.partition(".")[0] == "torch" and str(setting).startswith("torch."):
        return str(setting).removeprefix("torch.")  # a dtype or a layout, which transformers takes by name too
    if isinstance(setting, np.ndarray | np.generic):
        return to_json(setting.tolist())
    if setting is None or isinstance(setting, bool | int | str) or (isinstance(setting, float) and isfinite(setting)):
        return setting
    raise TypeError(
        f"a calibrated reward is saved as JSON, which cannot say {setting!r:.80}: use the library's transforms and "
        "load_scorer(name_or_path), or a function of a module; a new class of the library is to be added to CLASSES"
    )


def from_json(value: Any, *, trust: bool = False) -> Any:
    """Make the setting that `to_json` was given; a list comes back as a tuple."""
    if isinstance(value, list):
        return tuple(from_json(each, trust=trust) for each in value)
    if not isinstance(value, dict):
        return value
    if "function" in value and "is" not in value:
        if not trust:
            raise NeedsTrust(f"the function {value['function']!r:.80} would be imported and called")
        return import_function(str(value["function"]))
    settings = {name: from_json(each, trust=trust) for name, each in value.items() if name != "is"}
    risks = [_describe_risk(name, settings[name]) for name in RISKY if settings.get(name)]
    if risks and not trust:
        raise NeedsTrust("; ".join(risks))
    if "is" not in value:
        return settings
    cls = _find_class(str(value["is"]))
    if {"token", "url"} <= {field.name for field in fields(cls)}:
        settings["token"] = token_for(str(settings.get("url")))
    return cls(*settings["parts"]) if cls.__name__ == "Chain" else cls(**settings)


def _find_class(name: str) -> Any:
    """Import a class of `CLASSES` by its name, or by its dotted path in any version of the library."""
    last = name.rpartition(".")[2]
    if last not in CLASSES or not (name == last or name.startswith(OURS)):
        raise ValueError(f"a saved setting is one of the library's dataclasses: this version has no {name!r:.80}")
    return getattr(import_module(CLASSES[last]), last)


def _describe_risk(name: str, value: Any) -> str:
    """Say what a setting would do that needs trust; a url is shown as far as messages may show it."""
    if name != "url":
        return f"{name} may run code that comes with a checkpoint"
    return f"prompts and completions would be sent to the server {format_url(str(value))}"


def _saved_fields(setting: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(setting):
        value = getattr(setting, field.name)
        if field.name == "url":
            check_saved(str(value))
        if (field.init or not field.name.startswith("_")) and not is_secret(field.name):
            yield field.name, value


def _without_credentials(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Leave out settings that hold a secret: whoever reads the file has one of their own."""
    for name, value in settings.items():
        if isinstance(value, str) and _CREDENTIALS.search(value):
            raise ValueError(f"a setting that is saved holds no url with a password, {name} has one: leave it out")
        # The number of a token, which the kind token-logit reads, opens nothing.
        if not is_secret(name) or (name == "token" and isinstance(value, int) and not isinstance(value, bool)):
            yield name, value


FORMAT, COMBINED, VERSION = "calibrated reward", "combined reward", 1
SETTINGS, TABLE, PROMPTS, MEMBERS, SCORER = "reward.json", "table", "prompts.jsonl", "rewards", "scorer"
UNFINISHED = "are not of one save, which was not finished: save it again"
TABLE_HINT = (
    ": it is a table, of which `calibrated-rewards reward {at} --reward-model ... --out reward/` makes a reward"
)
COMBINED_HINT = (
    "{at} is a combined reward, which load_reward and CombinedReward.from_pretrained load; where one transform and one "
    "table are needed, calibrate it: --reward-model {at} --seed 1 of `calibrate`, then of `reward`"
)
# Settings that have a file of their own.
FILES = {"table", "originals"}
Directory = str | os.PathLike[str]


def save(reward: Any, to: Directory) -> None:
    """Write each file in one step, the settings last: they name the table that they belong to."""
    settings = _settings_to_json(reward)
    at = Path(to)
    at.mkdir(parents=True, exist_ok=True)
    reward.table.save(at / TABLE)
    _save_prompts(reward, at / PROMPTS)
    if _is_combined(reward.scorer):
        reward.scorer.save_pretrained(at / SCORER)
        settings["scorer"]["digest"] = _digest(at / SCORER)
    prompts = {"bytes": (at / PROMPTS).stat().st_size} if (at / PROMPTS).exists() else None
    _write_settings(at, FORMAT, {"table": _read_digest(at), "prompts": prompts, **settings})


def save_combined(reward: Any, to: Directory) -> None:
    """Write each component to a folder of its name, then the settings, which name what the components' say."""
    settings = {name: to_json(getattr(reward, name)) for name in ("how", "constraints", "name")}
    for name, each in reward.rewards.items():
        check_folder_name(name, "a component that is saved")
        _settings_to_json(each)  # what cannot be saved is an error before anything is written
    at = Path(to)
    for name, each in reward.rewards.items():
        each.save_pretrained(at / MEMBERS / name)
    _write_settings(
        at, COMBINED, {**settings, MEMBERS: {name: _digest(at / MEMBERS / name) for name in reward.rewards}}
    )


def _settings_to_json(reward: Any) -> dict[str, Any]:
    return {each.name: _setting_to_json(reward, each.name) for each in fields(reward) if each.name not in FILES}


def _setting_to_json(reward: Any, name: str) -> Any:
    value = getattr(reward, name)
    if name == "on_missing" and callable(value):
        raise ValueError("on_missing is a function, which is not saved: save with another, and give it when loading")
    if name == "scorer" and _is_combined(value):
        return {"folder": SCORER}
    return to_json(value)


def _write_settings(at: Path, kind: str, settings: Mapping[str, Any]) -> None:
    write_file(at / SETTINGS, json.dumps({"format": kind, "version": VERSION, **settings}, indent=2) + "\n")


def _is_combined(scorer: Any) -> bool:
    from calibrated_rewards.reward.combined import CombinedReward

    return isinstance(scorer, CombinedReward)


def _digest(at: Path) -> str:
    """Digest the settings of a saved reward, which name its table or its components in turn."""
    return blake2b((at / SETTINGS).read_bytes(), digest_size=16).hexdigest() if (at / SETTINGS).exists() else ""


def _save_prompts(reward: Any, to: Path) -> None:
    if reward.originals is not None:
        # In one step: processes that use this folder have its file mapped, and one that is cut short kills them.
        with open(reward.originals.path, "rb") as source, replace_file(to) as file:
            shutil.copyfileobj(source, file)
        return
    run = RunPrompts.beside(reward.table)
    if run is not None:
        Originals.write(to, reward.table, (prompt for _, prompt in run.items()))
    else:
        to.unlink(missing_ok=True)


def load_reward(
    name: Directory,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> "Reward":
    """Load a saved reward of either kind, a CalibratedReward or a CombinedReward; the arguments are those of theirs."""
    at = find_folder(name, revision, token)
    with _name_file(at):
        kind, _ = _read_settings(at)
    from calibrated_rewards.reward.calibrated_reward import CalibratedReward
    from calibrated_rewards.reward.combined import CombinedReward

    cls: type[Reward] = CombinedReward if kind == COMBINED else CalibratedReward
    return cls.from_pretrained(at, trust_remote_code=trust_remote_code, **changes)


def find_folder(name: Directory, revision: str | None, token: str | bool | None) -> Path:
    """Find the folder of that name; download it from the Hub if there is none."""
    if os.path.isdir(name):
        return Path(name)
    from calibrated_rewards.reward.hub import download

    return Path(download(str(name), revision, token))


@contextmanager
def _name_file(at: Path) -> Iterator[None]:
    """Name the file in whatever its settings raise; once, where a reward contains others."""
    try:
        yield
    except NeedsTrust as error:
        raise error if SETTINGS in error.reason else NeedsTrust(f"{at / SETTINGS}: {error.reason}") from None
    except (TypeError, KeyError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        raise ValueError(f"{at / SETTINGS} cannot be read: {type(error).__name__}: {error}") from error


def load(cls: Any, at: Path, scorer: Any, trust: bool, changes: Mapping[str, Any]) -> Any:
    """Load a calibrated reward, of the class `cls`, from a directory."""
    with _name_file(at):
        kind, saved = _read_settings(at)
        if kind == COMBINED:
            raise ValueError(COMBINED_HINT.format(at=at))
        if saved.pop("table", None) != _read_digest(at) and "table" not in changes:
            raise ValueError(f"{at / SETTINGS} and {at / TABLE} {UNFINISHED}")
        has_prompts = not {"table", "originals"} & {*changes} and check_prompts(at, saved)
        saved.pop("prompts", None)
        if not scorer and isinstance(saved["scorer"], dict) and "folder" in saved["scorer"]:
            scorer = _load_part(at, SCORER, saved["scorer"]["digest"], trust)
        settings = {
            field: from_json(value, trust=trust)
            for field, value in saved.items()
            if field not in changes and (field != "scorer" or not scorer)
        }
        known = {each.name for each in fields(cls)}
        if unknown := {*settings, *changes} - known:
            raise ValueError(f"a calibrated reward has no setting {', '.join(sorted(unknown))}; it has {sorted(known)}")
        prompts = Originals(str(at / PROMPTS)) if has_prompts else None
        table = changes["table"] if "table" in changes else ReferenceTable.load(at / TABLE)
        return cls(**{"scorer": scorer, "table": table, "originals": prompts, **settings, **changes})


def check_prompts(at: Path, saved: Mapping[str, Any]) -> bool:
    """Tell if a calibrated reward was saved with prompts; ValueError if their file is not as long as it was then.

    The settings of earlier versions do not say: any file of prompts that lies there is theirs.
    """
    size = (at / PROMPTS).stat().st_size if (at / PROMPTS).exists() else None
    if "prompts" not in saved:
        return size is not None
    if saved["prompts"] is None:
        return False
    if size != saved["prompts"]["bytes"]:
        length = "no file" if size is None else f"{size} bytes"
        raise ValueError(
            f"{at / PROMPTS} needs the {saved['prompts']['bytes']} bytes with which it was saved, got {length}: "
            "save the reward again"
        )
    return True


def load_combined(cls: Any, at: Path, scorers: Mapping[str, Any], trust: bool, changes: Mapping[str, Any]) -> Any:
    """Load a combined reward, of the class `cls`, from a directory; `scorers` by the name of their component."""
    with _name_file(at):
        kind, saved = _read_settings(at)
        if kind != COMBINED:
            raise ValueError(
                f"{at} is a calibrated reward, which load_reward and CalibratedReward.from_pretrained load"
            )
        digests = saved.pop(MEMBERS)
        for name in digests:
            check_folder_name(name, "a component that is saved")
        if unknown := {*scorers} - {*digests}:
            raise ValueError(f"a scorer is that of one of {sorted(digests)}, got one of {sorted(unknown)}")
        rewards = {
            name: _load_part(at, f"{MEMBERS}/{name}", digest, trust, scorer=scorers.get(name))
            for name, digest in digests.items()
        }
        settings = {name: from_json(value, trust=trust) for name, value in saved.items() if name not in changes}
        return cls(**{"rewards": _share_classifiers(rewards), **settings, **changes})


def _share_classifiers(rewards: Mapping[str, Any]) -> dict[str, Any]:
    """Give components that are dimensions of one classifier the same one: it is loaded, and reads each pair, once."""
    from calibrated_rewards.scorers.graded import GradedDimension

    classifiers: dict[str, Any] = {}
    shared = dict(rewards)
    for name, reward in rewards.items():
        if isinstance(dimension := reward.scorer, GradedDimension):
            own = json.dumps(to_json(dimension.graded), sort_keys=True)
            graded = classifiers.setdefault(own, dimension.graded)
            shared[name] = replace(reward, scorer=replace(dimension, graded=graded))
    return shared


def _load_part(at: Path, folder: str, digest: str, trust: bool, **changes: Any) -> Any:
    """Load a reward that another one contains."""
    if _digest(at / folder) != digest:
        raise ValueError(f"{at / SETTINGS} and {at / folder} {UNFINISHED}")
    return load_reward(at / folder, trust_remote_code=trust, **changes)


def _read_settings(at: Path) -> tuple[str, dict[str, Any]]:
    """Read the settings of a directory, and whether they are of a calibrated or of a combined reward."""
    try:
        settings = json.loads((at / SETTINGS).read_text())
    except FileNotFoundError:
        hint = TABLE_HINT.format(at=at) if (at / "table.json").exists() else ""
        raise FileNotFoundError(f"{at} has no {SETTINGS}, so it is no calibrated reward{hint}") from None
    except ValueError as error:
        raise ValueError(f"{at / SETTINGS} is no JSON: {error}") from None
    kind = settings.pop("format", None) if isinstance(settings, dict) else None
    if kind not in (FORMAT, COMBINED) or settings.pop("version", None) != VERSION:
        raise ValueError(f"{at / SETTINGS} is no calibrated reward of version {VERSION}")
    return kind, settings


def _read_digest(at: Path) -> str | None:
    """Read which table a directory has."""
    summary = at / TABLE / "table.json"
    return str(json.loads(summary.read_bytes())["header_digest"]) if summary.exists() else None
