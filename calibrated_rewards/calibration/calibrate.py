"""Calibration: K rollouts of the reference policy for each prompt, scored, sorted, and stored as a table.

Everything is kept in one directory, shard by shard: a run that was killed goes on where it was, processes that are
given the same directory share the work, and what was sampled once is never sampled again.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> calibrate(["2+2=", "Hello"], NumberSampler(), NumberScorer(), k=4)
ReferenceTable(2 prompts, 8 references, in memory)
"""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np

from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.calibration.importing import adopt, imported
from calibrated_rewards.calibration.run import Cluster, Settings, run
from calibrated_rewards.calibration.run_directory import RESERVED_NAMES, RunDirectory
from calibrated_rewards.calibration.run_identity import RunIdentity
from calibrated_rewards.calibration.sources import prompts_from
from calibrated_rewards.calibration.work import Work
from calibrated_rewards.files import Message, check_folder_name, setting
from calibrated_rewards.samplers.protocol import Sampler
from calibrated_rewards.scorers.protocol import Scorer
from calibrated_rewards.table.reference_table import ReferenceTable

# The column of a reward model without a name.
REWARD = "reward"


@overload
def calibrate(
    prompts: Any, sampler: Sampler | None, scorers: Scorer, out: str | os.PathLike[str] | None = None, **options: Any
) -> ReferenceTable: ...
@overload
def calibrate(
    prompts: Any,
    sampler: Sampler | None,
    scorers: Mapping[str, Scorer],
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, ReferenceTable]: ...
def calibrate(
    prompts: Any,
    sampler: Sampler | None,
    scorers: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    k: int | None = None,
    seed: int = 0,
    prompts_per_shard: int = 32,
    adaptive: Adaptive | None = None,
    cluster: Cluster | None = None,
    show_progress: bool = True,
    **source: Any,
) -> Any:
    """The table of K scored rollouts for each prompt; of several named reward models, a table for each.

    `prompts` is whatever `prompts_from` reads, and takes its options (`column=`, `id_column=`, `split=`, `limit=`):
    a dataset, a file, a list. Prompts that come twice count once.

    `k` is 100, or what the directory has. With `out` all is kept there: the same call goes on where it was stopped; a
    larger `k`, more prompts or another
    reward model under another name add what is missing; processes that make the same call share the work.
    `prompts=None` are those of the directory, and `sampler=None` scores the rollouts that are there. With `adaptive`
    each prompt has as many rollouts as it needs, not k. With `cluster` the work is done elsewhere, and kept here.

    A prompt's rollouts depend on `seed`, its key and the sampler; not on the other prompts, on who draws them or when.
    """
    named = _named(scorers)
    k, seed = _whole(k), _whole(seed)
    _check(named, 1 if k is None else k, prompts_per_shard)
    if k is not None and adaptive is not None:
        raise ValueError(f"with adaptive=, its rounds say how many rollouts there are; got k={k} too")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"calibrate needs a whole seed, got seed={seed!r:.60}")
    if isinstance(sampler, type):
        raise TypeError(f"a sampler is an object, got the class {sampler.__name__}: call it first")
    if not named:
        raise ValueError("calibrate needs a reward model, got none")
    if adaptive is not None and len(named) != 1:
        raise ValueError(f"adaptive K needs one reward model, whose scores say what is enough, got {[*named]}")
    asked = None if prompts is None else prompts_from(prompts, **source)
    work, columns = Work(sampler, named, seed), _tables(scorers)
    settings = Settings(k, prompts_per_shard, adaptive, cluster, show_progress)
    if out == "":
        raise ValueError("a run is kept in a directory, got out=''")
    if out is not None:
        return _answered(run(Path(out), asked, work, columns, settings), columns)
    if asked is None:
        raise ValueError("calibrate needs prompts, or the directory that has them, out=; got neither")
    with TemporaryDirectory() as folder:
        # A merge of one is a copy, in memory.
        found = {name: table.merge() for name, table in run(Path(folder), asked, work, columns, settings).items()}
    return _answered(found, columns)


def import_rollouts(
    rollouts: Any,
    out: str | os.PathLike[str],
    scorers: Any = None,
    *,
    scores: str | Mapping[str, str] | None = None,
    prompts_per_shard: int = 32,
    cluster: Cluster | None = None,
    show_progress: bool = True,
    **source: Any,
) -> Any:
    """The table of rollouts made elsewhere, with the scores that they have, or scored here, or both.

    `rollouts` is whatever `imported` reads, and takes its options (`prompt=`, `completions=`, `id_column=`, `split=`).
    `scores` is the column of the scores; of several reward models, a column for each name. Prompts that the directory
    has already are left as they are. `calibrate(..., out)` then adds rollouts, prompts and reward models as to any.
    """
    named = {} if scorers is None else _named(scorers)
    given = {} if scores is None else _named(scores)
    _check(named, 1, prompts_per_shard)
    for name in given:
        check_folder_name(
            name, "a reward model", RESERVED_NAMES
        )  # a folder of the run is named so, as for a reward model
    if not named and not given:
        raise ValueError(
            Message(
                f"rollouts need scores: name their column with {setting('scores')}, or a reward model to score them"
            )
        )
    if twice := {*named} & {*given}:
        raise ValueError(f"a reward model gives the scores or a column does, got both for {min(twice)!r}")
    found = imported(rollouts, scores=given, **source)
    directory, work = RunDirectory(Path(out)), Work(None, named, 0)
    known = {name: {"kind": "imported", "column": column} for name, column in given.items()}
    RunIdentity.of(work).check(directory, work)
    with directory.locked():
        adopt(directory, found, [*given], prompts_per_shard, directory.agreed(0, None, known), show_progress)
        if not directory.names():
            raise ValueError("an import needs at least one prompt with rollouts, got none")
    columns = {**_tables(scores or {}), **_tables(scorers or {})}
    settings = Settings(1, prompts_per_shard, None, cluster, show_progress)
    return _answered(run(Path(out), None, work, columns, settings), columns)


def _whole(number: Any) -> Any:
    """numpy's integers as Python's."""
    return int(number) if isinstance(number, np.integer) else number


def _named(things: Any) -> dict[str, Any]:
    return dict(things) if isinstance(things, Mapping) else {REWARD: things}


def _tables(things: Any) -> dict[str, str | None]:
    """The folder of each table by column; that of the only one is the directory itself."""
    return {name: name for name in things} if isinstance(things, Mapping) else {REWARD: None}


def _answered(found: dict[str, ReferenceTable], columns: dict[str, str | None]) -> Any:
    return found[REWARD] if columns == {REWARD: None} else found


def _check(scorers: Mapping[str, Any], k: int, per_shard: int) -> None:
    for what, number in (("k", k), ("prompts_per_shard", per_shard)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"calibrate needs a whole {what} >= 1, got {what}={number!r}")
    for name, scorer in scorers.items():
        check_folder_name(name, "a reward model", RESERVED_NAMES)
        if not callable(scorer) or isinstance(scorer, type):
            raise TypeError(f"a reward model is called with prompts and completions, got {name}={scorer!r:.60}")
