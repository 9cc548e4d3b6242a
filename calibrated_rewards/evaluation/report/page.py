"""Blocks of the report's page, and their HTML by `page.html.j2`, in which every text is escaped.

Prompts, completions and names are anybody's: a `str` is text wherever it comes from, and only `Markup` is HTML.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrated_rewards.evaluation.plots import INK

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape
except ModuleNotFoundError as missing:
    message = "the report needs jinja2: pip install 'calibrated-rewards[plots]'"
    raise ModuleNotFoundError(message, name=missing.name) from missing


@dataclass(frozen=True)
class Heading:
    """A heading of some blocks within a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; fine print if it is a note."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences, each with a bullet."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table that scrolls within its box where it is too wide; the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Quote:
    """A prompt or a completion, letter by letter."""

    text: str


@dataclass(frozen=True)
class Json:
    """An object of a file, indented."""

    content: object

    @property
    def text(self) -> str:
        """The content as indented JSON, which the page shows."""
        return json.dumps(self.content, indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Drawing:
    """A figure as the inside of an svg element, with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side, where there is room."""

    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class Details:
    """A block behind a heading that opens it."""

    summary: str
    content: Table | Json


Block: TypeAlias = Heading | Paragraph | Bullets | Table | Quote | Figures | Details | Json


@dataclass(frozen=True)
class Section:
    """A part of the page, and its sentences for the summary at the top."""

    title: str
    blocks: tuple[Block, ...]
    summary: tuple[str, ...] = ()


def render_page(title: str, sections: Iterable[Section]) -> str:
    """Render the whole file: a summary without repetition, then the sections."""
    sections = [*sections]
    summary = [*dict.fromkeys(text for section in sections for text in section.summary)]
    return f"{_TEMPLATE.render(title=title, summary=summary, sections=sections).lstrip()}\n"


def raise_exponents(text: str) -> Markup:
    """Escape a text, with each ^{...} as an exponent.

    >>> raise_exponents("e^{10u} < 1")
    Markup('e<sup>10u</sup> &lt; 1')
    """
    return Markup(re.sub(r"\^\{([^{}]*)\}", r"<sup>\1</sup>", str(escape(text))))


def draw(ax: Axes, caption: str, name: str) -> Drawing:
    """Draw a figure as SVG, its ink in the colour of the page's text; `name` keeps its ids apart from others'."""
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}), StringIO() as file:
        cast(Figure, ax.get_figure(root=True)).savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        svg = file.getvalue()
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg[svg.index("<svg ") + len("<svg ") :])
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Texts are drawn as paths. Ticks, spines and glyphs are black without an attribute; the page's style colours them.
    return Drawing(Markup(re.sub(rf"{INK}|#000000", "currentColor", svg)), caption)


def _is_number_cell(cell: str) -> bool:
    """Tell whether a cell is a number, which stays on one line with its interval."""
    return len(cell) <= 28 and any(map(str.isdigit, cell))


def _is_of_kind(block: Block, name: str) -> bool:
    return type(block).__name__ == name


def _load_template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["exponents"] = raise_exponents
    environment.tests |= {"number_cell": _is_number_cell, "of_kind": _is_of_kind}
    return environment.get_template("page.html.j2")


_TEMPLATE = _load_template()
