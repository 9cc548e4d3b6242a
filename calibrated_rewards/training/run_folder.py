"""The folder of a training run: what it was asked for, a line of log for each step, checkpoints, and at last the model.

settings.json   what the run is; another run does not go on here
log.jsonl       a JSON object for each step
checkpoints/    while it goes on
model/          when it is finished, whole
.lock           held by the process that trains here
"""

import json
import os
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
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.training.policy_model import place_of
from calibrated_rewards.training.raw import RawReward

# The last file that transformers' Trainer writes of a checkpoint: one without it was cut short.
LAST_WRITTEN = "trainer_state.json"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it has."""

    out: Path

    @property
    def model(self) -> Path:
        """The trained model; there when the run is finished."""
        return self.out / "model"

    @property
    def log(self) -> Path:
        """A line for each step."""
        return self.out / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What a run goes on from."""
        return self.out / "checkpoints"

    @property
    def unfinished_model(self) -> Path:
        """Where the model is written, before it gets its name."""
        return self.out / ".model"

    @property
    def used(self) -> Path | None:
        """What a run left here; None if there was none."""
        left = (self.log, self.model, self.out / "settings.json")
        return next((each for each in left if each.exists()), None)

    @contextmanager
    def held(self, first: bool = True) -> Iterator[None]:
        """Be the only run that works here; of several processes of one run, the first one sees to it."""
        if not first:
            yield
            return
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

    def empty(self) -> None:
        """Remove what a run left: its model first, so that none lies beside the log of another."""
        for each in (self.model, self.unfinished_model, self.checkpoints, self.log, self.out / "settings.json"):
            _remove(each)

    def finished(self, about: Mapping[str, Any]) -> bool:
        """Whether this very run has its model; checkpoints that it still has go."""
        self.check(about)
        if self.model.exists():
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return self.model.exists()

    def check(self, about: Mapping[str, Any]) -> None:
        """ValueError if another run, or something else, is here."""
        at = self.out / "settings.json"
        if not at.exists():
            if self.model.exists() or self.log.exists():
                raise ValueError(f"{self.out} has a run without settings.json: choose another folder")
            return
        before = json.loads(at.read_text())
        now = json.loads(json.dumps(about))
        others = [f"{at} was {old!r:.80}, is {new!r:.80}" for at, old, new in differences(before, now)]
        if others:
            raise ValueError(f"{self.out} has a run with other settings ({'; '.join(others)}): choose another folder")

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write down what the run is; what was cut short goes, since no run can go on from it."""
        _remove(self.unfinished_model)
        for each in self.checkpoints.glob("checkpoint-*"):
            if not _whole(each):
                sys.stderr.write(f"{each} was cut short: it is removed, and the run goes on from before it\n")
                shutil.rmtree(each, ignore_errors=True)
        self.describe(about)

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write down what the run is, and no more: for loops that have no checkpoints."""
        write_file(self.out / "settings.json", json.dumps(about, indent=2))

    def last_checkpoint(self) -> str | None:
        """The newest that is whole; None at the start."""
        whole = [at for at in self.checkpoints.glob("checkpoint-*") if _whole(at)]
        return str(max(whole, key=lambda at: int(at.name.rpartition("-")[2]))) if whole else None

    def write_log(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The log of the steps so far, in place of what was there."""
        write_file(self.log, "".join(json.dumps(row) + "\n" for row in rows))

    def add_to_log(self, row: Mapping[str, Any]) -> None:
        """A line more."""
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Give the model that was written its name; checkpoints are of no use any more."""
        os.replace(self.unfinished_model, self.model)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _whole(checkpoint: Path) -> bool:
    """Whether the file that is written last is there and can be read to its end."""
    try:
        return isinstance(json.loads((checkpoint / LAST_WRITTEN).read_text()), dict)
    except (OSError, ValueError):
        return False


def _remove(at: Path) -> None:
    """A file, or a folder: under another name first, for a folder that is half there may be taken for a whole one."""
    doomed = at.with_name(".removed")
    if doomed.exists():
        shutil.rmtree(doomed)
    if at.is_dir() and not at.is_symlink():
        os.replace(at, doomed)
        shutil.rmtree(doomed)
    else:
        at.unlink(missing_ok=True)


def about(
    recipe: str, policy: Any, reward: Any, prompts: Sequence[Asked], decoding: Decoding, settings: Any, dtype: str
) -> dict[str, Any]:
    """All that a run depends on but for the weights, as JSON."""
    named = place_of(policy) if isinstance(policy, str | os.PathLike) else policy.config._name_or_path
    keys = b"".join(prompt_key(each.prompt) for each in prompts)
    return {
        "recipe": recipe,
        "policy": named,
        "dtype": dtype,
        "settings": asdict(settings),
        "decoding": decoding.fingerprint(),
        "prompts": {"number": len(prompts), "digest": _digest(keys)},
        "reward": about_reward(reward),
    }


def about_reward(reward: Any) -> dict[str, Any]:
    """Which reward it is: its name, and of a calibrated one transform and table."""
    if isinstance(reward, RawReward):
        return {**about_reward(reward.reward), "kind": "raw"}
    if not isinstance(reward, CalibratedReward):
        return {"kind": "function", "name": getattr(reward, "__name__", type(reward).__name__)}
    shown = {name: repr(getattr(reward, name)) for name in ("transform", "estimator", "scale", "calibration")}
    meta = json.dumps(reward.table.meta, sort_keys=True, default=str).encode()
    table = {"prompts": len(reward.table), "digest": _digest(meta)}
    return {"kind": "calibrated", "name": reward.__name__, "beta": reward.beta, **shown, "table": table}


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
