"""A calibrated reward as a directory: reward.json with the settings, the table, the prompts as they were calibrated."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from calibrated_rewards.rewarding.originals import Originals, of_run
from calibrated_rewards.rewarding.spelling import NeedsTrust, read as read_setting, spelled
from calibrated_rewards.table.reference_table import ReferenceTable

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
    new = at / f".{SETTINGS}.{os.getpid()}"
    new.write_text(text + "\n")
    new.replace(at / SETTINGS)


def read(
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
    settings = {field: read_setting(value, trust=trust) for field, value in stored.items()}
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
