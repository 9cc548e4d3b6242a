"""The folder of a training run: its settings, checkpoints, log and model, and the rules for who may write there.

`settings.json` says which run it is, and another run is refused. Checkpoints are transformers' own. `log.jsonl` has a
row for each step. `model` is the trained model, whole, or absent: it is written beside and renamed.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from calibrated_rewards.calibration.sources import Asked
from calibrated_rewards.files import claim, write_file
from calibrated_rewards.prompts import prompt_key
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import EmpiricalCDF, Uncalibrated
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.differences import differences

# The last file that transformers' Trainer writes of a checkpoint: one without it was cut short.
LAST_WRITTEN = "trainer_state.json"

# What a kill leaves of a file that is written in one step.
CUT_SHORT = re.compile(r"\.(settings\.json|log\.jsonl|reference\.safetensors)\.[0-9a-f]{32}")


@dataclass(frozen=True)
class RunFolder:
    """The files of a training run: settings, checkpoints, log, model."""

    out: Path

    @property
    def model_folder(self) -> Path:
        """The trained model; there when the run is finished."""
        return self.out / "model"

    @property
    def log(self) -> Path:
        """The log, a row for each step."""
        return self.out / "log.jsonl"

    @property
    def settings_file(self) -> Path:
        """The file that says which run this is."""
        return self.out / "settings.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, from the last of which a run goes on."""
        return self.out / "checkpoints"

    @property
    def unfinished_model(self) -> Path:
        """The place where the model is written before it gets its name."""
        return self.out / ".model"

    @contextmanager
    def reserve(self, main: bool = True) -> Iterator[None]:
        """Be the only run in the folder; of several processes of one run, the main one takes the lock."""
        if not main:
            yield
            return
        if (self.out / "config.json").exists():
            raise ValueError(f"{self.out} is a model's folder: a run needs one of its own, in which it makes model/")
        self.out.mkdir(parents=True, exist_ok=True)
        lock = self.out / ".lock"
        lock.touch()
        with claim(lock) as ours:
            if not ours:
                raise ValueError(
                    f"{self.out} is for one run at a time, and another process trains there now: "
                    "wait until it has ended, or choose another folder"
                )
            yield

    def check_free(self, force: bool, policy: str | os.PathLike[str], start: str | None = None) -> None:
        """Raise FileExistsError for a run that may not be removed: any without `force`, and never one that is read."""
        used = next((each for each in (self.log, self.model_folder, self.settings_file) if each.exists()), None)
        if used is None:
            return
        if not force:
            raise FileExistsError(f"{used} is of another run: choose another --out, or --force to remove it")
        for option, path in (("--policy", policy), ("--start", start)):
            if path is not None and Path(path).resolve().is_relative_to(self.model_folder.resolve()):
                text = f"{option} is {self.model_folder}, which --force would remove: choose another --out"
                raise FileExistsError(text)

    def empty(self) -> None:
        """Remove the files of a run: its model first, so that none lies beside the log of another."""
        for each in (self.model_folder, self.unfinished_model, self.checkpoints, self.log, self.settings_file):
            _remove(each)

    def is_finished(self, run: Mapping[str, Any]) -> bool:
        """Return True if this very run has its model, and remove its checkpoints; ValueError if another run is here."""
        if not self.settings_file.exists():
            if self.model_folder.exists() or self.log.exists():
                raise ValueError(f"{self.out} has a run without settings.json: choose another folder")
        else:
            before, now = json.loads(self.settings_file.read_text()), json.loads(json.dumps(run))
            if before.get("reward", {}).get("kind") == "raw":  # 0.1 wrote the beta of the calibrated reward
                before["reward"]["beta"] = now["reward"].get("beta")
            changes = [f"{name} was {there!r:.80}, is {here!r:.80}" for name, there, here in differences(before, now)]
            if changes:
                raise ValueError(
                    f"{self.out} has a run with other settings ({'; '.join(changes)}): choose another folder"
                )
        if self.model_folder.exists():
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return self.model_folder.exists()

    def begin(self, run: Mapping[str, Any]) -> None:
        """Write which run it is; remove files and checkpoints that were cut short, since no run can go on from them."""
        _remove(self.unfinished_model)
        for name in filter(CUT_SHORT.fullmatch, os.listdir(self.out)):
            (self.out / name).unlink()
        for each in self.checkpoints.glob("checkpoint-*"):
            if not _is_whole(each):
                sys.stderr.write(f"{each} was cut short: it is removed, and the run goes on from before it\n")
                shutil.rmtree(each, ignore_errors=True)
        self.write_settings(run)

    def write_settings(self, run: Mapping[str, Any]) -> None:
        """Write which run it is, all that it depends on."""
        write_file(self.settings_file, json.dumps(run, indent=2))

    def find_checkpoint(self) -> str | None:
        """Find the newest checkpoint that is whole; None at the start."""
        whole = [each for each in self.checkpoints.glob("checkpoint-*") if _is_whole(each)]
        return str(max(whole, key=lambda each: int(each.name.rpartition("-")[2]))) if whole else None

    def write_log(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the log by these rows."""
        write_file(self.log, "".join(json.dumps(row) + "\n" for row in rows))

    def add_to_log(self, row: Mapping[str, Any]) -> None:
        """Append a row to the log, at once."""
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the rows of the log, one a step; without a last one that was cut short."""
        lines = self.log.read_text().splitlines()
        if lines and not _is_json(lines[-1]):
            lines.pop()
        return [json.loads(line) for line in lines]

    def publish_model(self) -> None:
        """Give the model that was written its name, and remove the checkpoints."""
        os.replace(self.unfinished_model, self.model_folder)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _is_whole(checkpoint: Path) -> bool:
    """Tell whether the file that is written last is there and can be read to its end."""
    try:
        return isinstance(json.loads((checkpoint / LAST_WRITTEN).read_text()), dict)
    except (OSError, ValueError):
        return False


def _remove(path: Path) -> None:
    """Remove a file or a folder: a folder is renamed first, for one that is half there may be taken for a whole one."""
    doomed = path.with_name(".removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    if path.is_dir() and not path.is_symlink():
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def resolve_policy(policy: str | os.PathLike[str]) -> str:
    """Make a path absolute, because an adapter names its base by it; an id of the Hub stays."""
    return os.path.abspath(policy) if os.path.exists(policy) else os.fspath(policy)


def describe_run(
    name: str, policy: Any, reward: Any, prompts: Sequence[Asked], decoding: Decoding, settings: Any, dtype: str
) -> dict[str, Any]:
    """Describe as JSON all that a run depends on but for the weights."""
    is_path = isinstance(policy, str | os.PathLike)
    keys = b"".join(prompt_key(each.prompt) for each in prompts)
    return {
        "recipe": name,
        "policy": resolve_policy(policy) if is_path else policy.config._name_or_path,
        "dtype": dtype,
        "settings": asdict(settings),
        "decoding": decoding.fingerprint(),
        "prompts": {"number": len(prompts), "digest": _digest(keys)},
        "reward": describe_reward(reward),
    }


def describe_reward(reward: Any) -> dict[str, Any]:
    """Describe a reward by its name and, of a calibrated one, transform and table."""
    if not isinstance(reward, CalibratedReward):
        return {"kind": "function", "name": getattr(reward, "__name__", type(reward).__name__)}
    raw = isinstance(reward.calibration, Uncalibrated)
    settings = {name: repr(getattr(reward, name)) for name in ("transform", "estimator", "scale", "calibration")}
    name = reward.__name__
    if raw:  # as 0.1 described it: the calibrated reward, of another kind
        settings["calibration"], name = repr(EmpiricalCDF()), name.removeprefix("raw_")
    meta = json.dumps(reward.table.meta, sort_keys=True, default=str).encode()
    table = {"prompts": len(reward.table), "digest": _digest(meta)}
    return {"kind": "raw" if raw else "calibrated", "name": name, "beta": reward.beta, **settings, "table": table}


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
