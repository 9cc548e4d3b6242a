"""Calibrate: K rollouts of the reference policy for each prompt, scored, sorted, and stored as a table.

All is kept in one directory, shard by shard: a run that was killed goes on where it was, processes that are given the
same directory share the work, and what was sampled once is never sampled again.

>>> from calibrated_rewards.testing.suites import NumberSampler, NumberScorer
>>> calibrate(["2+2=", "Hello"], NumberSampler(), NumberScorer(), k=4)
ReferenceTable(2 prompts, 8 references, in memory)
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from heapq import nsmallest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np

from calibrated_rewards.calibration.adaptive import Adaptive
from calibrated_rewards.calibration.importing import add_imported, read_rollouts
from calibrated_rewards.calibration.run import Cluster, Filling, Progress, add_prompts, check_known_prompts, replan
from calibrated_rewards.calibration.run_directory import RESERVED_NAMES, RunDirectory
from calibrated_rewards.calibration.shards import decode_text, encode_text, read_table
from calibrated_rewards.calibration.sources import Asked, prompts_from
from calibrated_rewards.calibration.work import RunIdentity, Work
from calibrated_rewards.files import Message, check_folder_name, setting, write_file
from calibrated_rewards.prompts import as_key
from calibrated_rewards.samplers.protocol import Sampler
from calibrated_rewards.scorers.protocol import Scorer
from calibrated_rewards.table.reference_table import ReferenceTable, Row

logger = logging.getLogger(__name__)

# The column of a reward model without a name.
REWARD = "reward"
PROBED_PROMPTS = 8
ONE_ROLLOUT = (
    "%s: with K=1 rollout a prompt each quantile is 0, 1/2 or 1, which says only whether one reference was better. "
    "Calibrate with more, such as k=32 (on the command line -k 32); a larger K adds what is missing"
)


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
    """Build the table of K scored rollouts for each prompt; of several named reward models, a table for each.

    `prompts` is whatever `prompts_from` reads, and takes its options (`column=`, `id_column=`, `split=`, `limit=`):
    a dataset, a file, a list. Prompts that come twice count once.

    `k` is 100, or as many as the directory has. With `out` all is kept there: the same call goes on where it was
    stopped; a larger `k`, more prompts or another reward model under another name add what is missing; processes that
    make the same call share the work. `prompts=None` are those of the directory, and `sampler=None` scores the
    rollouts that are there. With `adaptive` each prompt has as many rollouts as it needs, not k. With `cluster` the
    work is done elsewhere, and kept here.

    A prompt's rollouts depend on `seed`, its key and the sampler; not on the other prompts, on who draws them or when.
    """
    by_name = _by_name(scorers)
    k = int(k) if isinstance(k, np.integer) else k
    seed = int(seed) if isinstance(seed, np.integer) else seed
    _check(by_name, 1 if k is None else k, prompts_per_shard)
    if k is not None and adaptive is not None:
        raise ValueError(f"with adaptive=, its rounds say how many rollouts there are; got k={k} too")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"calibrate needs a whole seed, got seed={seed!r:.60}")
    if isinstance(sampler, type):
        raise TypeError(f"a sampler is an object, got the class {sampler.__name__}: call it first")
    if not by_name:
        raise ValueError("calibrate needs a reward model, got none")
    if adaptive is not None and len(by_name) != 1:
        raise ValueError(f"adaptive K needs one reward model, whose scores say what is enough, got {[*by_name]}")
    asked = None if prompts is None else prompts_from(prompts, **source)
    work, folders = Work(sampler, by_name, seed), _table_folders(scorers)
    options = (k, prompts_per_shard, adaptive, cluster, show_progress)
    if out == "":
        raise ValueError("a run is kept in a directory, got out=''")
    if out is not None:
        return _tables(_run(RunDirectory(Path(out)), asked, work, folders, *options), folders)
    if asked is None:
        raise ValueError("calibrate needs prompts, or the directory that has them, out=; got neither")
    with TemporaryDirectory() as folder:
        tables = _run(RunDirectory(Path(folder)), asked, work, folders, *options)
        # A merge of one is a copy, in memory.
        return _tables({name: table.merge() for name, table in tables.items()}, folders)


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
    """Build the table of rollouts made elsewhere, with the scores that they have, or scored here, or both.

    `rollouts` is whatever `read_rollouts` reads, and takes its options (`prompt=`, `completions=`, `id_column=`,
    `split=`). `scores` is the column of the scores; of several reward models, a column for each name. Prompts that the
    directory has already are left as they are. `calibrate(..., out)` then adds rollouts, prompts and reward models as
    to any.
    """
    by_name = {} if scorers is None else _by_name(scorers)
    columns = {} if scores is None else _by_name(scores)
    _check(by_name, 1, prompts_per_shard)
    for name in columns:
        check_folder_name(name, "a reward model", RESERVED_NAMES)  # its table may have a folder
    if not by_name and not columns:
        raise ValueError(
            Message(
                f"rollouts need scores: name their column with {setting('scores')}, or a reward model to score them"
            )
        )
    if twice := {*by_name} & {*columns}:
        raise ValueError(f"a reward model gives the scores or a column does, got both for {min(twice)!r}")
    items = read_rollouts(rollouts, scores=columns, **source)
    directory, work = RunDirectory(Path(out)), Work(None, by_name, 0)
    RunIdentity.of(work).check(directory, work)
    with directory.lock():
        imported = {name: {"kind": "imported", "column": column} for name, column in columns.items()}
        settings = directory.merge_settings(0, None, imported)
        add_imported(directory, items, [*columns], prompts_per_shard, settings, show_progress)
        if not directory.names():
            raise ValueError("an import needs at least one prompt with rollouts, got none")
    folders = {**_table_folders(scores or {}), **_table_folders(scorers or {})}
    return _tables(_run(directory, None, work, folders, 1, prompts_per_shard, None, cluster, show_progress), folders)


def _by_name(things: Any) -> dict[str, Any]:
    return dict(things) if isinstance(things, Mapping) else {REWARD: things}


def _table_folders(things: Any) -> dict[str, str | None]:
    """The folder of each table by column; that of the only one is the directory itself."""
    return {name: name for name in things} if isinstance(things, Mapping) else {REWARD: None}


def _tables(tables: dict[str, ReferenceTable], folders: dict[str, str | None]) -> Any:
    return tables[REWARD] if folders == {REWARD: None} else tables


def _check(scorers: Mapping[str, Any], k: Any, per_shard: Any) -> None:
    for what, number in (("k", k), ("prompts_per_shard", per_shard)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"calibrate needs a whole {what} >= 1, got {what}={number!r}")
    for name, scorer in scorers.items():
        check_folder_name(name, "a reward model", RESERVED_NAMES)
        if not callable(scorer) or isinstance(scorer, type):
            raise TypeError(f"a reward model is called with prompts and completions, got {name}={scorer!r:.60}")


def _run(
    directory: RunDirectory,
    asked: Iterable[Asked] | None,
    work: Work,
    folders: Mapping[str, str | None],
    k: int | None,
    per_shard: int,
    adaptive: Adaptive | None,
    cluster: Cluster | None,
    show_progress: bool,
) -> dict[str, ReferenceTable]:
    """Do what is left of a run, together with any other processes at it, and build its tables."""
    identity = RunIdentity.of(work)
    names = _prepare(directory, asked, work, identity, per_shard, show_progress)
    max_drawn = directory.max_drawn()
    k = k or max_drawn or 100
    if adaptive is None:
        _log_work(directory, names, work, k)
        if max(max_drawn, k if work.sampler is not None else 0) == 1:
            logger.warning(ONE_ROLLOUT, directory.path)
    with Progress(sum(map(directory.size, names)), show_progress) as progress:
        filling = Filling(directory, names, work, identity, k, progress, cluster)
        try:
            filling.fill() if adaptive is None else filling.fill_in_rounds(adaptive)
        except BaseException:  # Ctrl-C too: the same objects may go on, with what their calls have changed in them
            with suppress(Exception):
                identity.mark_changing(directory, work)
            raise
    identity.mark_changing(directory, work)
    tables = {
        column: build_table(directory, column, directory.path / (folder or "")) for column, folder in folders.items()
    }
    for column in {*directory.settings()["scorers"]} - {*folders}:
        if any(state.scored.get(column) != state.drawn for name in names if (state := directory.state(name))):
            logger.warning("the table of %r lacks some of these rollouts: run again with that reward model", column)
    return tables


def _prepare(
    directory: RunDirectory,
    asked: Iterable[Asked] | None,
    work: Work,
    identity: RunIdentity,
    per_shard: int,
    show_progress: bool,
) -> list[str]:
    """Add the prompts to the directory, and list its shards; refuse, before sampling, what cannot be done.

    A reward model is not written down yet: what fails before it has given a score leaves the name free.
    """
    if asked is None and not directory.names():
        raise ValueError(Message(f"{directory.path} has no prompts yet: name them with {setting('prompts')}"))
    identity.check(directory, work)
    check_known_prompts(directory, work)
    with directory.lock():
        directory.remove_stale_files()
        before, settings = directory.settings(), identity.settings(directory)
        other = bool(directory.names()) and before.get("sampler") != settings.get("sampler")
        if other and work.sampler is not None and not directory.has_rollouts():
            replan(directory, work.sampler)
        if asked is not None:
            new = add_prompts(directory, asked, work, per_shard, settings, show_progress)
            counts = new.new, new.known, new.repeated
            logger.info("%s: %d new prompts, %d known, %d repeated", directory.path, *counts)
        if not directory.names():
            raise ValueError("calibration needs at least one prompt, got none")
        if directory.settings() != settings:
            directory.write_settings(settings)
        return directory.names()


def _log_work(directory: RunDirectory, names: list[str], work: Work, k: int) -> None:
    """Log how many rollouts and scores are left to make."""
    goal = drawn = scored = 0
    for name in names:
        state, size = directory.state(name), directory.size(name)
        have = [0] * size if state is None else state.drawn
        goal += sum(have if work.sampler is None else (max(k, n) for n in have))
        drawn += sum(have)
        scored += 0 if state is None else sum(sum(state.scored.get(column, [])) for column in work.scorers)
    to_score = goal * len(work.scorers) - scored
    logger.info("%s: %d rollouts to draw, %d scores to give", directory.path, goal - drawn, to_score)


def build_table(directory: RunDirectory, column: str, path: Path) -> ReferenceTable:
    """Build the table of a reward model, anew only where the shards are other than those it was built from.

    Others may be at work on more prompts or rollouts: those that have no score yet wait for the table that they build.
    """
    with directory.lock():
        if (stamp := _stamp(directory, column)) != _read_stamp(path):
            settings = directory.settings()
            meta = {
                "scorer": settings["scorers"][column],
                "sampler": settings.get("sampler"),
                "seed": settings.get("seed"),
                "form": _describe_form(directory),
                "probes": _choose_probes(directory, column),
            }
            ReferenceTable.build(_rows(directory, column), path=path, meta=meta)
            write_file(path / ".made_of", f"{stamp} {_digest(path)}")
    return ReferenceTable.load(path)


def _rows(directory: RunDirectory, column: str) -> Iterator[Row]:
    """Yield a row for each prompt.

    A text that several prompts become for the policy is an alias of the prompt that is this text, or of the first.
    """
    ids: dict[bytes, list[bytes]] = {}
    for alias, key in directory.aliases().items():
        ids.setdefault(key, []).append(alias)
    taken = {*directory.keys()}
    for name in directory.names():
        for planned, scores in zip(directory.prompts(name), directory.scores(name, column), strict=True):
            if not len(scores):
                continue
            aliases: list[Any] = ids.get(planned.key, [])
            if planned.rendered is not None and (text := as_key(planned.rendered)) not in taken:
                taken.add(text)
                aliases = [*aliases, planned.rendered]
            yield Row(planned.prompt, scores, aliases)


def _describe_form(directory: RunDirectory) -> dict[str, str]:
    """Tell whether the prompts and completions that scorers read are texts, messages or both."""
    chats: dict[str, set[bool]] = {"chat": set(), "completion_chat": set()}
    for file in _rollout_files(directory):
        columns = read_table(file, [*chats])
        for name, flags in chats.items():
            flags.update(columns.column(name).unique().to_pylist())
    kinds = {
        name: "both" if len(flags) != 1 else "messages" if True in flags else "text" for name, flags in chats.items()
    }
    return {"prompts": kinds["chat"], "completions": kinds["completion_chat"]}


def _choose_probes(directory: RunDirectory, column: str) -> list[dict[str, Any]]:
    """Choose the rollouts with the lowest and the highest score of some prompts, always the same."""
    chosen = {*nsmallest(PROBED_PROMPTS, directory.keys())}
    probes: dict[bytes, list[dict[str, Any]]] = {}
    for name in directory.names():
        for at, key in enumerate(directory.keys_of(name)):
            if key in chosen:
                shard = directory.load(name)
                prompt, rollouts = decode_text(*encode_text(shard.prompts[at].prompt)), shard.rollouts[at]
                probes[key] = [
                    {
                        "prompt": prompt,
                        "completion": rollouts[i].completion,
                        "score": float(shard.scores[column][at][i]),
                    }
                    for i in shard.find_extremes(at, column)
                ]
    return [probe for key in sorted(probes) for probe in probes[key]]


def _rollout_files(directory: RunDirectory) -> list[Path]:
    return [file for name in directory.names() if (file := directory.rollouts(name)).exists()]


def _stamp(directory: RunDirectory, column: str) -> str:
    """Digest what the table depends on: it changes whenever a shard, an id or a setting does."""
    settings = directory.settings()
    inputs = [column, settings["scorers"][column], settings.get("sampler"), settings.get("seed")]
    digest = blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16)
    for file in [*_rollout_files(directory), *directory.alias_files()]:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    return digest.hexdigest()


def _read_stamp(path: Path) -> str | None:
    """Read the stamp that the table was built with; None if there is none that opens, or another one by now."""
    try:
        ReferenceTable.load(path)
        stamp, _, digest = (path / ".made_of").read_bytes().decode("ascii", "replace").partition(" ")
    except (OSError, ValueError):
        return None
    return stamp if digest == _digest(path) else None


def _digest(path: Path) -> str:
    return str(json.loads((path / "table.json").read_bytes())["header_digest"])
