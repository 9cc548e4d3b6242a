"""HTML in which every text is escaped: prompts and completions are anybody's.

>>> print(element("p", "1 < 2 & ", element("b", "<script>"), title='"').text)
<p title="&quot;">1 &lt; 2 &amp; <b>&lt;script&gt;</b></p>
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TypeAlias, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrated_rewards.plots import INK


@dataclass(frozen=True)
class Markup:
    """HTML as it is; any other text is escaped when it becomes part of some."""

    text: str


Piece: TypeAlias = str | Markup


@dataclass(frozen=True)
class Section:
    """A part of the page, and what the summary at its top says of it."""

    title: str
    blocks: tuple[Markup, ...]
    told: tuple[str, ...] = ()


def element(tag: str, *inside: Piece, **attributes: str) -> Markup:
    """One element around pieces, texts escaped."""
    said = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{said}>{joined(inside).text}</{tag}>")


def joined(pieces: Iterable[Piece]) -> Markup:
    """Pieces one after the other."""
    return Markup("".join(piece.text if isinstance(piece, Markup) else escape(piece) for piece in pieces))


def raised(text: str) -> Markup:
    """A text in which ^{...} is an exponent.

    >>> raised("e^{10u} < 1").text
    'e<sup>10u</sup> &lt; 1'
    """
    return Markup(re.sub(r"\^\{([^{}]*)\}", r"<sup>\1</sup>", escape(text)))


def table(head: Sequence[Piece], rows: Iterable[Sequence[Piece]]) -> Markup:
    """A table that scrolls within its box where it is too wide; the first cell of a row names it."""
    top = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [element("tr", element("th", first, scope="row"), *map(_cell, others)) for first, *others in rows]
    whole = element("table", *([element("thead", top)] if any(head) else []), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex="0", role="group")


def _cell(inside: Piece) -> Markup:
    """A number stays on one line with its interval."""
    short = isinstance(inside, str) and len(inside) <= 28 and any(map(str.isdigit, inside))
    return element("td", inside, **({"class_": "number"} if short else {}))


def bullets(texts: Sequence[Piece]) -> Markup:
    """A list."""
    return element("ul", *(element("li", raised(text) if isinstance(text, str) else text) for text in texts))


def folded(heading: str, *blocks: Markup) -> Markup:
    """Blocks behind a heading that opens them."""
    return element("details", element("summary", heading), *blocks)


def figure(ax: Axes, caption: Piece, name: str) -> Markup:
    """A figure as SVG within the page, its ink in the colour of the page's text; `name` is its own on the page."""
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}), StringIO() as file:
        cast(Figure, ax.get_figure(root=True)).savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
        svg = file.getvalue()
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Ticks and spines are black, and so are glyphs, without saying it: the page's style gives those its colour.
    svg = re.sub(rf"{INK}|#000000", "currentColor", svg)
    said = caption if isinstance(caption, str) else re.sub(r"<[^>]*>", "", caption.text)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(said)}" ', 1)
    return element("figure", Markup(svg), element("figcaption", caption))


def figures(*each: Markup) -> Markup:
    """Figures side by side, where there is room."""
    return element("div", *each, class_="figures")
