"""The card of a table or reward on the Hub: a README.md from `card.template`, and a figure of the reference scores.

>>> find_hub_names({"sampler": {"kind": "openai", "model": "org/policy", "weights": "0f3a"}})
['org/policy']
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrated_rewards.files import Message, setting, write_file

if TYPE_CHECKING:
    from calibrated_rewards.table.reference_table import ReferenceTable

README, FIGURE = "README.md", "scores.png"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Settings of a fingerprint whose values may name a checkpoint.
NAMING = {"base", "checkpoint", "model", "name", "policy", "reference"}
# Names of settings that may hold a secret, and values with a path of this machine in them or a password in an url.
SECRET = re.compile(
    r"key|token(?!iz)|secret|passw|passphrase|auth(?!ors?(?![a-z]))|credential|cookie|bearer|jwt", re.IGNORECASE
)
PRIVATE = re.compile(r"""(^|[\s"'=,;:(\[])(/[\w.]|~[\w/]|\.[.\w]*[/\\]|[A-Za-z]:[/\\]|\\\\\w|file:)|://[^/\s]*@""")
# An url with a password, and how keys of well-known services begin.
CREDENTIAL = re.compile(r"://[^/\s]*@|\b(hf_|sk-|gh[pousr]_|github_pat_|Bearer )[\w-]{16,}")
# Shown of a fingerprint: texts up to this length, and so many settings.
LONGEST, MOST = 64, 16
# Prompts in the figure, and what is under it.
DRAWN = 400
CAPTION = (
    "Each prompt's references, prompts from the lowest median to the highest: the line is the median, the bands hold\n"
    "50 % and 90 % of them."
)


@dataclass(frozen=True)
class Card:
    """What a card says beside what the tables know."""

    title: str
    """The name of the repository."""
    tag: str
    """"reference-table" or "reward-model"."""
    summary: str
    code: str
    facts: Mapping[str, str]
    licence: str | None = None
    base_model: Sequence[str] = ()
    """Names of models on the Hub; empty for those that the tables' metadata name."""
    metadata: Mapping[str, Any] | None = None
    """More of the front matter."""
    sections: Sequence[str] = ()


def write_card(folder: Path, card: Card, tables: Mapping[str, "ReferenceTable"]) -> None:
    """Write README.md, and the figure if matplotlib is there; the tables are by the name of their reward model."""
    from huggingface_hub import DatasetCardData
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    from calibrated_rewards import __version__

    validate_repo_id(card.title)  # it stands in code that people run
    sections = [*card.sections]
    if find_spec("matplotlib"):
        draw_scores(tables, folder / FIGURE)
        sections.insert(0, f"## Reference scores\n\n![Reference scores]({FIGURE})\n\n{CAPTION}")
    named = [name for table in tables.values() for name in find_hub_names(table.meta)]
    front = DatasetCardData(
        license=card.licence,
        tags=["calibrated-rewards", card.tag],
        base_model=[*dict.fromkeys(card.base_model or named)] or None,
        **(card.metadata or {}),
    )
    facts = dict(card.facts)
    for name, table in tables.items():
        facts |= {f"{label}, {name}" if name else label: text for label, text in describe_table(table)}
    text = Template(Path(__file__).with_name("card.template").read_text()).substitute(
        metadata=front.to_yaml(),
        title=card.title,
        summary=card.summary,
        facts="\n".join(f"| {escape(label)} | {escape(text)} |" for label, text in facts.items()),
        code=card.code,
        sections="\n\n".join(sections),
        version=__version__,
    )
    write_file(folder / README, text)


def describe_table(table: "ReferenceTable") -> Iterator[tuple[str, str]]:
    """Yield lines of a card: prompts, K, decoding, seed, and the fingerprints of policy and reward model."""
    counts, meta = table.counts(np.arange(len(table))), table.meta
    fewest, most = int(counts.min()), int(counts.max())
    yield "prompts", f"{len(table):,}"
    yield "references a prompt, K", f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    policy, decoding = meta.get("sampler"), None
    if isinstance(policy, Mapping):
        policy = dict(policy)
        decoding = policy.pop("decoding", None)
    for label, settings in (
        ("decoding", decoding),
        ("reference policy", policy),
        ("reward model", meta.get("scorer")),
    ):
        # A text or a list, which has no names, is written as it is.
        parts = [f"{name}={value}" if name else value for name, value in list_settings(settings)]
        if parts:
            yield label, ", ".join(parts[:MOST])
    if meta.get("seed") is not None:
        yield "seed", str(meta["seed"])


def list_settings(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """List the settings of a fingerprint that are short, by their own names; secrets and local paths are left out.

    >>> dict(list_settings({"dtype": "float32", "text": {"max_length": 512, "template": "x" * 99}, "top_k": None}))
    {'dtype': 'float32', 'max_length': '512'}
    >>> dict(list_settings({"max_tokens": 64, "token": "hf_x", "model": "/home/me/sft"}))
    {'max_tokens': '64'}
    """
    if SECRET.search(name) and not _is_number(settings, name):
        return
    if isinstance(settings, Mapping):
        for own, value in settings.items():
            yield from list_settings(value, str(own))
    elif settings not in (None, "", []):
        text = settings if isinstance(settings, str) else json.dumps(settings)
        if len(text) <= LONGEST and not _is_private(settings):
            yield name, text


def check_secrets(settings: Any, whose: str) -> None:
    """Raise ValueError if metadata, which is uploaded whole, has settings that look like secrets; name them.

    >>> check_secrets({"scorer": {"url": "https://rm", "api_key": "k", "max_tokens": 64}}, "the table")
    Traceback (most recent call last):
        ...
    ValueError: the table is uploaded with all of its metadata, and what looks like a secret in it: scorer.api_key. ...
    """
    places = [*dict.fromkeys(find_secrets(settings))]
    if places:
        raise ValueError(
            Message(
                f"{whose} is uploaded with all of its metadata, and what looks like a secret in it: "
                f"{', '.join(places)}. Write it without, ReferenceTable.load(FOLDER).merge(path=..., meta=...), or, "
                "where it is no secret, say "
                f"{setting('force', 'True', option='--force')}"
            )
        )


def find_secrets(settings: Any, place: str = "") -> Iterator[str]:
    """Find the settings that look like secrets, by their name or by their value; yield where they are.

    >>> [*find_secrets({"url": "http://me:pw@rm", "auth": True, "of": [{"password": 1}]})]
    ['url', 'of.0.password']
    """
    if isinstance(settings, str) and CREDENTIAL.search(settings):
        yield place
    pairs = (
        enumerate(settings) if isinstance(settings, list) else settings.items() if isinstance(settings, Mapping) else ()
    )
    for own, value in pairs:
        at = f"{place}.{own}" if place else str(own)
        is_off = value in (None, "", [], {}) or isinstance(value, bool)
        if isinstance(own, str) and SECRET.search(own) and not is_off and not _is_number(value, own):
            yield at
        elif at != "probes":  # prompts and completions, which are anybody's words
            yield from find_secrets(value, at)


def _is_number(value: Any, name: str) -> bool:
    """Tell if a setting is the number of tokens, or of a token in a vocabulary, which opens nothing."""
    numbers = value if isinstance(value, list) else [value]
    return "token" in name.lower() and all(isinstance(each, bool | int | float) for each in numbers)


def _is_private(value: Any) -> bool:
    """Tell if a value has a secret in it, a path of this machine, or an url with a password."""
    if isinstance(value, Mapping):
        return any(SECRET.search(str(name)) or _is_private(each) for name, each in value.items())
    if isinstance(value, list):
        return any(map(_is_private, value))
    return isinstance(value, str) and (PRIVATE.search(value) is not None or ("/" in value and Path(value).exists()))


def find_hub_names(meta: Any) -> list[str]:
    """Find the models in a table's metadata whose names look like those of repositories on the Hub."""
    if not isinstance(meta, Mapping):
        return []
    named = [
        value
        for name, value in meta.items()
        if name in NAMING and isinstance(value, str) and HUB_NAME.fullmatch(value) and not Path(value).exists()
    ]
    # Probes hold prompts and completions, which are anybody's words.
    return named + [each for name, value in meta.items() if name != "probes" for each in find_hub_names(value)]


def escape(text: str) -> str:
    """Escape a text for one cell of a Markdown table.

    >>> escape("<|end|>")
    '&#60;&#124;end&#124;&#62;'
    """
    return re.sub(r"[^\w\s.,:=/()+%-]", lambda mark: f"&#{ord(mark[0])};", " ".join(text.split()))


def draw_scores(tables: Mapping[str, "ReferenceTable"], path: Path) -> None:
    """Draw each prompt's reference scores by quantiles, prompts by their medians; a panel for each reward model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(tables), 3.6), layout="constrained")
    for ax, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        rows = np.unique(np.linspace(0, len(table) - 1, DRAWN).astype(np.int64))
        levels = np.array([np.quantile(table.scores(row), [0.05, 0.25, 0.5, 0.75, 0.95]) for row in rows.tolist()])
        low, lower, median, upper, high = levels[np.argsort(levels[:, 2])].T
        x = (np.arange(len(rows)) + 0.5) / len(rows)
        ax.fill_between(x, low, high, color="#0072B2", alpha=0.2, lw=0)
        ax.fill_between(x, lower, upper, color="#0072B2", alpha=0.4, lw=0)
        ax.plot(x, median, color="#0072B2", marker="o" * (len(rows) < 3))
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xlabel="share of prompts", ylabel="raw score of the references", title=name.replace("$", r"\$"))
    figure.savefig(path, dpi=120)
