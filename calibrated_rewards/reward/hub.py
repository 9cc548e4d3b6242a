"""A saved reward as a repository of the Hub: its files and a card, and the files that are downloaded of it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrated_rewards.files import check_folder_name
from calibrated_rewards.reward.saving import COMBINED, MEMBERS, PROMPTS, SCORER, SETTINGS, TABLE, check_prompts
from calibrated_rewards.table.card import HUB_NAME, Card, check_secrets, find_hub_names, write_card
from calibrated_rewards.table.hub import upload
from calibrated_rewards.table.reference_table import ReferenceTable
from calibrated_rewards.table.storage import DATA_FILE, SUMMARY_FILE

# The files of a saved reward, and of each reward in it.
FILES = (SETTINGS, PROMPTS, f"{TABLE}/{SUMMARY_FILE}", f"{TABLE}/{DATA_FILE}")
SUMMARY = (
    "A reward for RLHF: the score of a reward model becomes its quantile among the scores of the reference policy's\n"
    "completions of the same prompt, and is then transformed for the way in which the policy will be served."
)
SUMMARY_COMBINED = (
    "A reward for RLHF that combines several: the score of each reward model becomes its quantile among the scores of\n"
    "the reference policy's completions of the same prompt, and the quantiles are combined."
)
CODE = """from calibrated_rewards.reward import load_reward

reward = load_reward("{name}"{scorer})
rewards = reward(prompts, completions)"""
# Settings of a reward that its card shows.
SHOWN = ("transform", "beta", "estimator", "scale", "calibration", "on_missing", "id_column", "how", "constraints")


def push(reward: Any, repo_id: str, **settings: Any) -> str:
    """Upload what `save_pretrained` of a reward writes, as `push_folder` does."""
    with tempfile.TemporaryDirectory() as directory:
        reward.save_pretrained(directory)
        return push_folder(directory, repo_id, **settings)


def push_folder(
    saved: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **card: Any,
) -> str:
    """Upload the directory of a saved reward with its card; to a new repository if there is none.

    The card takes the place of README.md: `licence=` and `base_model=` are for it, `card=False` is none.
    What looks like a secret in the metadata is refused, but with `force=True`.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_repository(Path(saved), Path(directory), repo_id, **card)
        return upload(directory, repo_id, "model", "Upload calibrated reward", private=private, token=token)


def write_repository(
    saved: Path,
    folder: Path,
    name: str,
    *,
    licence: str | None = None,
    base_model: Sequence[str] = (),
    card: bool = True,
    force: bool = False,
) -> None:
    """Write what `push_folder` uploads; ValueError if a reward model is a folder, which nobody else has."""
    settings = dict(read_parts(saved))
    checkpoints = [place for each in settings.values() for place in find_checkpoints(each)]
    for place in checkpoints:
        if os.path.isabs(place):
            raise ValueError(
                f"the reward model is a folder of this machine, {place}: push it, and make the reward with its "
                "repository's name, --reward-model NAME or load_scorer(NAME); or with scorer=None, for "
                "from_pretrained(..., scorer=)"
            )
    # By the name of the component; that of a calibrated combination, which stands above them, has none.
    tables = {
        at.name if at != saved else "": ReferenceTable.load(at / TABLE)
        for at, each in settings.items()
        if each["format"] != COMBINED
    }
    if not force:
        for part, table in tables.items():
            check_secrets(table.meta, f"the table of {part}" if part else "the reward's table")
        for each in settings.values():
            check_secrets(each, f"the reward ({SETTINGS})")
    for source in (at / file for at, each in settings.items() for file in list_files(at, each)):
        target = folder / source.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    if not card:
        return
    own = settings[saved]
    code = CODE.format(name=name, scorer="" if own.get("scorer", ...) else ", scorer=my_reward_model")
    facts = {label: write_setting(own[label]) for label in SHOWN if own.get(label) not in (None, {})}
    summary = SUMMARY_COMBINED if len(settings) > 1 else SUMMARY
    policies = [each for table in tables.values() for each in find_hub_names(table.meta)]
    named = base_model or [*policies, *(place for place in checkpoints if HUB_NAME.fullmatch(place))]
    text = Card(name, "reward-model", summary, code, facts, licence, named, {"library_name": "calibrated-rewards"})
    write_card(folder, text, tables)


def read_parts(saved: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read the settings of a saved reward, and of the rewards that it is made of, by their folders."""
    settings = json.loads((saved / SETTINGS).read_text())
    yield saved, settings
    for name in settings[MEMBERS] if settings["format"] == COMBINED else ():
        check_folder_name(name, "a component that is saved")
        yield from read_parts(saved / MEMBERS / name)
    if isinstance(settings.get("scorer"), dict) and "folder" in settings["scorer"]:
        yield from read_parts(saved / SCORER)


def list_files(at: Path, settings: Mapping[str, Any]) -> list[str]:
    """List the files of a saved reward; others of `FILES` in its folder are those of a reward saved there earlier."""
    if settings["format"] == COMBINED:
        return [SETTINGS]
    return [file for file in FILES if file != PROMPTS or check_prompts(at, settings)]


def write_setting(value: Any) -> str:
    """Write the JSON of a setting as the call that makes it.

    >>> write_setting({"is": "Chain", "parts": [{"is": "Exponential", "t": 5.0}, {"is": "Affine", "scale": 2.0}]})
    'Chain(parts=[Exponential(t=5.0), Affine(scale=2.0)])'
    """
    if isinstance(value, list):
        return f"[{', '.join(map(write_setting, value))}]"
    if not isinstance(value, dict):
        return str(value)
    parts = ", ".join(f"{name}={write_setting(each)}" for name, each in value.items() if name != "is")
    return f"{str(value['is']).rpartition('.')[2]}({parts})" if "is" in value else parts


def find_checkpoints(value: Any) -> list[str]:
    """Find the names of all checkpoints in the JSON of a scorer.

    >>> find_checkpoints([{"is": "Loaded", "recipe": {"is": "FromCheckpoint", "name": "/a/model"}}])
    ['/a/model']
    """
    if isinstance(value, list):
        return [place for each in value for place in find_checkpoints(each)]
    if not isinstance(value, dict):
        return []
    own = [str(value["name"])] if str(value.get("is", "")).rpartition(".")[2] == "FromCheckpoint" else []
    return own + [place for each in value.values() for place in find_checkpoints(each)]


def download(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    """Download the files of a saved reward, and no others of its repository; return the folder that they are in."""
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")) or repo_id.endswith("/"):
        raise FileNotFoundError(f"no directory {repo_id!r} here; a name on the Hub is like my-name/my-reward")
    wanted = [pattern for file in FILES for pattern in (file, f"*/{file}")]
    try:
        return snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no directory {repo_id!r} here, and it does not come from the Hub either: {error}"
        ) from error
