"""Export the rollouts of a calibration as a dataset for other trainers: a file and its card.

```
train.parquet        the rows; or train.jsonl; or train/, which datasets.load_from_disk reads
README.md            the card: how to load it, what it was made with, what was left out and why
export.json          the same for programs, written last
dataset_info.json    LLaMA-Factory's description, in its layout
.parts/              while it is being made: the rows of each shard of the run
```
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from calibrated_rewards.calibration.run import show_bar
from calibrated_rewards.calibration.run_directory import RunDirectory
from calibrated_rewards.evaluation.references import match_scorer
from calibrated_rewards.files import Message, claim, setting, write_file
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.scorers.differences import differences
from calibrated_rewards.table.card import HUB_NAME, README, Card, write_card
from calibrated_rewards.training.offline.dataset_files import FILES, Format, join_parts, read_counts, write_part
from calibrated_rewards.training.offline.datasets import CUT, Kind, Row, Selection
from calibrated_rewards.training.offline.layouts import LAYOUTS, describe_for_llama_factory
from calibrated_rewards.training.offline.rollouts import check_source, choose_beta, read_rollouts
from calibrated_rewards.training.run_folder import describe_reward

READS_WEIGHTS = ("ms-swift", "trl")
NO_WEIGHTS = (
    "The framework reads no weights: it would learn from all rollouts alike, which is the reference policy. "
    "`export --as sft --draws N` says the same by repetition."
)
PARTS, RESULT, INFO = ".parts", "export.json", "dataset_info.json"
WRITTEN = (*FILES.values(), RESULT, INFO, README)
# Counted beside the reasons of `datasets`.
NO_ROLLOUTS = "prompts without rollouts"
UNKNOWN = "prompts without references in the reward's table"
SKIPPED = "rows that the framework would skip"
ROWS, PROMPTS, ROLLOUTS = "rows", "prompts", "rollouts"
VALUED, KL, ESS = "valued", "kl", "ess"
NUMBERS = (ROWS, PROMPTS, ROLLOUTS, VALUED, KL, ESS)
SUMMARY = {
    "sft": "Completions of a reference policy to learn from: the best of each prompt's rollouts by a reward model.",
    "drawn": "Completions of a reference policy to learn from, drawn by the weights that the optimum gives them.",
    "pairs": "Pairs of a reference policy's completions: the best and the worst of several by a reward model.",
    "scored": "Rollouts of a reference policy, each with its reward, weight and log-ratio under the optimum.",
    "weighted": "Rollouts of a reference policy with their weights under the optimum, which add up to 1 for a prompt.",
}


@dataclass(frozen=True)
class Export:
    """A dataset that was written: where, how many rows of how many prompts, and what is in none."""

    path: Path
    rows: int
    prompts: int
    left_out: Mapping[str, int]
    rollouts: int
    """Rollouts that were read."""
    cut: int
    """Those of them that the token limit cut."""
    kl: float | None = None
    """KL of the weights from equal ones, in nats, on average over prompts; None where nothing is weighted."""
    ess: float | None = None
    """Effective sample size of the weights, on average over prompts."""
    scorer: str = "reward"
    """The reward model whose scores count."""

    def lines(self) -> Iterator[str]:
        """Write the numbers in sentences."""
        source = f"{self.rollouts:,} rollouts with the scores of {self.scorer!r}"
        yield f"{self.path}: {self.rows:,} rows of {self.prompts:,} prompts, from {source}"
        yield from (f"left out: {count:,} {reason}" for reason, count in self.left_out.items())
        if self.kl is not None:
            yield f"weights: KL {self.kl:.3g} nats from equal ones, effective sample size {self.ess:.3g}, on average"
        if self.cut and CUT not in self.left_out:
            rest = "a trainer may end them with an end token all the same; --finished-only leaves them out"
            yield f"the token limit cut {self.cut:,} of the rollouts: {rest}"


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    selection: Selection | Kind,
    reward: CalibratedReward,
    *,
    beta: float | None = None,
    select: str | None = None,
    file_format: Format = "parquet",
    layout: str = "trl",
    force: bool = False,
    show_progress: bool = True,
) -> Export:
    """Write a dataset of a run's rollouts, valued by a reward whose table knows their prompts.

    An export that was killed goes on where it stopped, and writes the same bytes. `select` names the scorer, by
    default the one whose scores the reward's table holds; `beta` is the reward's unless given, and is not needed for
    the best of each prompt and for pairs. `force` writes over an export with other settings.
    """
    selection = selection if isinstance(selection, Selection) else Selection(selection)
    check_form(selection, file_format, layout)
    run, out = Path(run), Path(out)
    select, directory = match_scorer(run, reward.table, select), RunDirectory(run)
    check_source(run, reward)
    beta = choose_beta(reward, beta) if selection.needs_beta else None
    digest, chat = examine_run(directory, select)
    settings = {
        "selection": asdict(selection),
        "beta": beta,
        "format": file_format,
        "layout": layout,
        "reward": {**describe_reward(reward), "beta": None, "scores": digest_scores(reward)},
        "rollouts": {"scorer": select, "digest": digest},
    }
    if (done := find_export(out, settings, force)) is not None:
        return done
    parts = out / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    (parts / ".lock").touch()
    with claim(parts / ".lock") as ours:
        if not ours:
            raise ValueError(f"another process writes {out} now: wait until it has ended, or choose another directory")
        begin(parts, settings)
        work = Work(
            directory, reward, selection, select, beta or 1.0, layout, file_format
        )  # no row has a weight without it
        counts, names = dict[str, Any](), directory.names()
        for name in show_bar(names, "exporting", " shards", show_progress):
            for reason, count in work.make_part(parts / name, name).items():
                counts[reason] = counts.get(reason, 0) + count
        rows, prompts, rollouts, valued, kl, ess = (counts.pop(name, 0) for name in NUMBERS)
        cut = counts.get(CUT, 0) if selection.finished_only else counts.pop(CUT, 0)
        left_out = dict(sorted(counts.items()))
        result = Export(out / FILES[file_format], rows, prompts, left_out, rollouts, cut, scorer=select)
        if selection.needs_beta and valued:
            result = replace(result, kl=kl / valued, ess=ess / valued)
        if not rows:
            raise ValueError(f"an export needs a row, got none. {'. '.join([*result.lines()][1:])}")
        join_parts([parts / name for name in names], result.path, file_format)
        if layout == "llama-factory":
            write_file(out / INFO, describe_for_llama_factory(FILES[file_format], selection.kind, chat))
        write_readme(result, selection, layout, chat, reward, beta)
        content = {"settings": settings, "result": {**asdict(result), "path": None}}
        write_file(out / RESULT, json.dumps(content, indent=2) + "\n")
    shutil.rmtree(parts)
    return result


@dataclass(frozen=True)
class Work:
    """Makes the part of each shard."""

    directory: RunDirectory
    reward: CalibratedReward
    selection: Selection
    select: str
    beta: float
    layout: str
    file_format: Format

    def make_part(self, path: Path, name: str) -> dict[str, float]:
        """Write the part of a shard, unless it is there, and return its counts."""
        if (there := read_counts(path, self.file_format)) is not None:
            return there
        state = self.directory.state(name)
        drawn = sum(count > 0 for count in state.drawn) if state else 0
        counts = Counter({NO_ROLLOUTS: self.directory.size(name) - drawn, UNKNOWN: drawn})
        arrange, rows, kl, ess = LAYOUTS[self.layout].arrange, list[Row](), 0.0, 0.0
        for prompt in read_rollouts(self.directory, name, self.reward, self.select, self.beta):
            made = self.selection.rows(prompt, counts)
            arranged = [row for each in made if (row := arrange(each)) is not None]
            rows += arranged
            counts[UNKNOWN] -= 1
            counts[SKIPPED] += len(made) - len(arranged)
            counts[PROMPTS] += bool(arranged)
            counts[ROLLOUTS] += len(prompt.rollouts)
            if self.selection.needs_beta:
                counts[VALUED] += 1
                kl, ess = kl + float(prompt.weights @ prompt.log_ratios), ess + prompt.ess
            if not self.selection.finished_only:  # which counts them itself
                counts[CUT] += sum(each.finish == "length" for each in prompt.rollouts)
        counts[ROWS] = len(rows)
        numbers = {**+counts, **({KL: kl, ESS: ess} if counts[VALUED] else {})}
        write_part(path, rows, numbers, self.file_format)
        return numbers


def check_form(selection: Selection, file_format: str, layout: str) -> None:
    """Refuse formats and layouts that are not known, or not together."""
    if file_format not in FILES:
        value = setting("file_format", file_format, option=f"--format {file_format}")
        raise ValueError(Message(f"a dataset is written as {', '.join(FILES)}, got {value}"))
    if layout not in LAYOUTS:
        raise ValueError(Message(f"a layout is one of {', '.join(LAYOUTS)}, got {setting('layout', layout)}"))
    if layout != "trl" and selection.kind == "scored":
        raise ValueError(Message(f"scored rollouts have one layout, trl, got {setting('layout', layout)}"))
    if layout != "trl" and file_format == "datasets":
        value = setting("file_format", "jsonl", option="--format jsonl")
        raise ValueError(Message(f"{layout} reads a file, not a folder that datasets saved: choose {value}"))


def examine_run(directory: RunDirectory, select: str) -> tuple[str, bool]:
    """Digest what the rollouts of a run depend on, and tell if its prompts are chats.

    ValueError if some are chats and some are not, since the columns of a dataset have one type.
    """
    digest, forms = blake2b(json.dumps(directory.settings(), sort_keys=True).encode(), digest_size=8), set[bool]()
    for name in directory.names():
        prompts, state = directory.prompts(name), directory.state(name)
        counts = [state.drawn, state.scored.get(select)] if state else None
        digest.update(json.dumps([name, counts]).encode() + b"".join(each.key for each in prompts))
        forms |= {not isinstance(each.prompt, str) for each in prompts}
    if len(forms) != 1:
        some = "both" if forms else "none"
        raise ValueError(f"an export needs prompts that are all texts or all chats, got {some} in {directory.path}")
    return digest.hexdigest(), forms.pop()


def digest_scores(reward: CalibratedReward) -> str:
    """Digest the references of a reward's table."""
    digest = blake2b(digest_size=8)
    for _, scores in reward.table.blocks(np.arange(len(reward.table))):
        digest.update(scores.tobytes())
    return digest.hexdigest()


def find_export(out: Path, settings: Mapping[str, Any], force: bool) -> Export | None:
    """Return the export that is there already; refuse a directory with anything else, or remove another export."""
    if not out.exists() or ((out / PARTS).exists() and not (out / RESULT).exists()):
        return None
    if not (out / RESULT).exists():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise FileExistsError(f"{out} is there and is no export: choose another directory")
    there = read_result(out / RESULT)
    changes = [
        f"{place} was {old!r:.60}, is {new!r:.60}"
        for place, old, new in differences(there["settings"], json.loads(json.dumps(settings)))
    ]
    if not changes and not (out / FILES[settings["format"]]).exists():
        changes = [f"{FILES[settings['format']]} is missing"]
    if not changes:
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return Export(**{**there["result"], "path": out / FILES[settings["format"]]})
    if not force:
        rest = f"choose another directory, or {setting('force', 'True', option='--force')} to write over it"
        raise FileExistsError(Message(f"{out} is an export with other settings ({'; '.join(changes[:3])}): {rest}"))
    (out / PARTS).mkdir(exist_ok=True)  # from now on it is one that is not done
    for name in (RESULT, INFO, *FILES.values()):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    return None


def read_result(path: Path) -> dict[str, Any]:
    """Read export.json; of one that cannot be read, settings that are no export's."""
    try:
        there = json.loads(path.read_text())
        return {"settings": dict(there["settings"]), "result": dict(there["result"])}
    except (ValueError, KeyError, TypeError):
        return {"settings": {"file": "cannot be read"}, "result": {}}


def begin(parts: Path, settings: Mapping[str, Any]) -> None:
    """Write which export the parts are of; remove those of another one and files that were cut short."""
    file, text = parts / "settings.json", json.dumps(settings, indent=2)
    stale = not file.exists() or file.read_text() != text
    cut_short = [*parts.glob(".[!l]*"), *(each for name in WRITTEN for each in parts.parent.glob(f".{name}.*"))]
    for each in {*cut_short, *(parts.glob("[!.]*") if stale else ())}:
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    write_file(file, text)


def write_readme(
    result: Export, selection: Selection, layout: str, chat: bool, reward: CalibratedReward, beta: float | None
) -> None:
    """Write the card, with the code that loads the rows, the settings and the counts."""
    folder, file = result.path.parent, result.path.name
    kind = "drawn" if selection.kind == "sft" and selection.draws else selection.kind
    facts = {
        "rows": f"{result.rows:,} of {result.prompts:,} prompts",
        **({"beta": f"{beta:.6g}"} if beta is not None else {}),
        **(
            {"KL of the weights": f"{result.kl:.4g}", "effective sample size": f"{result.ess:.4g}"} if result.kl else {}
        ),
        **{name: str(getattr(reward, name)) for name in ("transform", "estimator", "scale", "calibration")},
        **{
            name: str(value)
            for name, value in asdict(selection).items()
            if value not in (None, False) and (name != "floor" or kind == "weighted")
        },
        **{f"left out: {reason}": f"{count:,}" for reason, count in result.left_out.items()},
        "rollouts read": f"{result.rollouts:,}",
        **({CUT: f"{result.cut:,}"} if result.cut and CUT not in result.left_out else {}),
    }
    place = f"{folder.name}/{file}"
    section = f"## In a framework\n\n{LAYOUTS[layout].usage(place, selection.kind, chat)}"
    if kind == "weighted" and layout not in READS_WEIGHTS:
        section += f"\n\n{NO_WEIGHTS}"
    data = file if "." in file else f"{file}/*.arrow"
    metadata = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": data}]}]}
    title = folder.name if HUB_NAME.fullmatch(f"x/{folder.name}") else "rollouts"
    code = LAYOUTS["trl"].usage(place, "scored", chat).split("\n", 1)[1].rpartition("\n")[0].partition("  # ")[0]
    write_card(
        folder,
        Card(title, "rollouts", SUMMARY[kind], code, facts, metadata=metadata, sections=[section]),
        {"": reward.table},
    )
