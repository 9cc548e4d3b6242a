"""HTML in which every text is escaped: prompts and completions are anybody's.

>>> print(element("p", "1 < 2 & ", element("b", "<script>"), title='"').text)
<p title="&quot;">1 &lt; 2 &amp; <b>&lt;script&gt;</b></p>

The page around the sections: one file with its style, no script, light or dark as the reader's machine is."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TypeAlias, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calibrated_rewards.evaluation.plots import INK


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


STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --link: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9ea7b3; --paper: #0d1117; --card: #161b22;
  --line: #30363d; --link: #6cb6ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem }
p, ul { max-width: 46rem }
ul { padding-left: 1.2rem }
.summary { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .4rem 1.1rem }
.wide { overflow-x: auto; max-width: 100%; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line) }
td { min-width: 6.5rem }
.number { white-space: nowrap; min-width: 4rem }
thead th { color: var(--soft); font-weight: 600 }
tbody th { font-weight: 600; min-width: 7rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem }
figure { margin: .8rem 0; max-width: 36rem; min-width: 0 }
figure svg { width: 100%; height: auto; display: block; fill: currentColor }
figcaption, .note { color: var(--soft); font-size: .88rem }
details { margin: .8rem 0 }
summary { cursor: pointer; color: var(--link) }
.said { white-space: pre-wrap; background: var(--card); border-left: 3px solid var(--line); padding: .5rem .8rem;
  margin: .3rem 0 .8rem; overflow-wrap: anywhere }
pre { overflow-x: auto; background: var(--card); padding: .8rem; font-size: .8rem; border-radius: 6px }
code { font-size: .9em; overflow-wrap: anywhere }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --card: #fff; --line: #bbb }
  body { max-width: none; font-size: 10.5pt; padding: 0 } h2, h3 { break-after: avoid }
  figure, tr, .said { break-inside: avoid } .wide { overflow: visible } table { font-size: 8.5pt } }
"""


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file: what the sections tell in a few sentences, then each of them."""
    told = [*dict.fromkeys(sentence for section in sections for sentence in section.told)]
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        Markup(f"<style>{STYLE}</style>"),
    ]
    body = [
        element("h1", title),
        element("div", bullets(told), class_="summary") if told else Markup(""),
        *(joined([element("h2", section.title), *section.blocks]) for section in sections),
    ]
    whole = element("html", element("head", *head), element("body", element("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{whole.text}\n"
