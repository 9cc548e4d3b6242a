"""Write what makes a recommended reward: a command, or for a scorer that no command can name, lines of Python.

>>> scorer = RecordedScorer.of({"scorer": {"kind": "imported", "column": "score"}, "probes": [{}]})
>>> scorer.write_command("table/", "best-of:4:0.5", 0.26, "empirical")
'calibrated-rewards reward table/ --reward-model PATH --transform best-of:4:0.5 --out reward/'
>>> scorer.note
'PATH: the reward model that gave the scores of the column score, which were imported; for a function, in Python: ...'
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Any

from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.theory.finite_k import Estimator

# The name of the only reward model of a run.
REWARD = "reward"
# Scorers of one's own code: no option of the command line names them.
IN_PYTHON = ("callable", "function", "ensemble", "mean win")
# The options that ask for each API of a server, by the dialect's name in a fingerprint.
SERVERS = {"native": "native", "vllm": "vllm", "vllm score": "vllm-score", "openrlhf": "openrlhf"}


@dataclass(frozen=True)
class RecordedScorer:
    """What a table and its run say of the reward model that gave its scores."""

    kind: str = ""
    """That of its fingerprint: "callable", "imported", "remote", ...; empty where the table says nothing."""
    name: str = ""
    """Of a function with its module, of scores that were imported the column, of a served model its name."""
    server: str = ""
    """The API of its server, as --server has it."""
    cost: bool = False
    """True if the scores are the reward model's times -1."""
    probes: bool = False
    """True if the table has probes, which a reward is verified by."""
    place: str = ""
    """The folder or repository that `calibrate` loaded it from; empty where the run does not say."""
    head: str = ""
    """The name of its score, of a preference head that has several."""

    @classmethod
    def of(cls, meta: Mapping[str, Any], table: str | None = None) -> "RecordedScorer":
        """Read it from a table's metadata, and its place from the run that the table lies in."""
        scorer = meta.get("scorer") or {}
        cost = scorer.get("kind") == "cost"
        scorer = scorer.get("of") or {} if cost else scorer
        kind = str(scorer.get("kind", ""))
        name = {"callable": "name", "function": "name", "imported": "column", "remote": "model"}.get(kind, "")
        server = SERVERS.get(str(scorer.get("dialect")), "") if kind == "remote" else ""
        several = kind == "preference head" and len(scorer.get("head", {}).get("names", ())) > 1
        head = str(scorer.get("name", "")) if several else ""
        place = "" if table is None else find_reward_model(table)
        return cls(kind, str(scorer.get(name) or ""), server, cost, bool(meta.get("probes")), place, head)

    @property
    def note(self) -> str:
        """Say what to fill in; empty where nothing is to be."""
        if self.kind in IN_PYTHON or self.server:
            return ""
        if self.kind not in ("", "imported"):
            place = self.place or self._placeholder
            what = "preference head" if self.kind == "preference head" else "reward model"
            return f"{place}: the {what} that the table was made with; add the options that it was loaded with, if any."
        where = f"the scores of the column {self.name}, which were imported" if self.name else "the table's scores"
        return (
            f"PATH: the reward model that gave {where}; for a function, in Python: "
            "CalibratedReward(function, table, ...)."
        )

    def write_command(self, table: str, transform: str, beta: float, estimator: Estimator) -> str:
        """Write the command that makes the reward, or the lines of Python."""
        if self.kind in IN_PYTHON:
            return self._write_python(table, transform, beta, estimator)
        model = "URL" if self.server else "PATH"
        if not self.server and self.kind not in ("", "imported"):
            model = self.place or self._placeholder
        words = ["calibrated-rewards", "reward", table, "--reward-model", model]
        words += ["--server", self.server] * bool(self.server)
        words += ["--served-model", self.name] * bool(self.server and self.name)
        words += ["--option", f"name={self.head}"] * bool(self.head)
        words += ["--cost"] * self.cost + ["--transform", transform]
        words += ["--estimator", estimator] * (estimator != "empirical")
        return shlex.join([*words, *["--no-verify"] * (not self.probes), "--out", "reward/"])

    @property
    def _placeholder(self) -> str:
        return "./head" if self.kind == "preference head" else "./rm"

    def _write_python(self, table: str, transform: str, beta: float, estimator: Estimator) -> str:
        module, _, function = self.name.rpartition(".")
        importable = module != "__main__" and all(
            part.isidentifier() and not iskeyword(part) for part in self.name.split(".")
        )
        scorer = function if importable else "scorer"
        imports = [f"from {module} import {function}"] if importable else []
        wrappers = ["Function"] * (self.kind == "function") + ["Cost"] * self.cost
        imports += [f"from calibrated_rewards.scorers import {', '.join(sorted(wrappers))}"] if wrappers else []
        for wrapper in wrappers:
            scorer = f"{wrapper}({scorer})"
        how = "" if estimator == "empirical" else f", estimator={estimator!r}"
        lines = [
            "from calibrated_rewards import CalibratedReward, ReferenceTable",
            "from calibrated_rewards.theory import parse_transform",
            *imports,
            f"table, transform = ReferenceTable.load({table!r}), parse_transform({transform!r}).transform",
            f"reward = CalibratedReward({scorer}, table, transform, beta={beta!r}{how})",
            *["reward.verify()"] * self.probes,
            'reward.save_pretrained("reward/")',
        ]
        if not importable:
            lines.insert(2, "scorer = ...  # the function that `calibrate` was called with")
        return "\n".join(lines)


def find_reward_model(table: str) -> str:
    """Find where a table's reward model was loaded from: a path, from here if it lies below, or an id; "" if unknown.

    A run with one reward model has its table in its own folder, one with several a folder for each by its name.
    """
    for run, name in ((Path(table), REWARD), (Path(table).parent, Path(table).name)):
        place = RunDirectory(run).reward_models().get(name, "")
        if place and not (os.path.isabs(place) and not os.path.exists(place)):
            below = os.path.relpath(place) if os.path.isabs(place) else place
            return place if below.startswith("..") else below
    return ""
