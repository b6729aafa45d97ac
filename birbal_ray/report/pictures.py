"""A figure as SVG or PNG bytes that are the same for the same figure."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#22272e"  # of every text; becomes currentColor on the page
MID = "#8b929a"  # grid and axes: reads on white and on black
# One meaning each, in every figure; told apart with every common colour blindness (after Okabe and Ito).
LABEL_COLOURS = {"exact_match": "#2b83ba", "generation": "#e07b1a"}
BASE_COLOUR, ADAPTER_COLOUR, EVAL_COLOUR = MID, "#1b9e77", "#b5559c"
WIDTH_INCHES = 4.4  # narrow, so that text keeps its size on a phone
_STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MID,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": MID,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
    "text.parse_math": False,  # a task may be called $x$
    "xtick.color": MID,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": MID,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
}
_REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]+)')
_TAG = re.compile(r"<[^>]*>")
_STYLE_ELEMENT = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)


@contextmanager
def style(name: str = "birbal") -> Iterator[None]:
    """The look of every plot, inside the block; `name` keeps the ids of one figure's SVG apart from another's."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height_inches: float) -> Figure:
    """An empty figure; no pyplot, so no global state. Call it under `style()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def svg(figure: Figure, name: str) -> str:
    """SVG 1.1 with texts as text, transparent, without a date."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    text = io.StringIO()
    with style(name):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return text.getvalue()


def png(figure: Figure) -> bytes:
    """PNG on white, 160 dots an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    data = io.BytesIO()
    with style():
        figure.savefig(data, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def standing_alone(drawing: str) -> str:
    """The SVG as a file of its own: ink that reads on a light and on a dark page."""
    return _in_tags(drawing, lambda tag: tag.replace(INK, "#747c85"))


def inline(drawing: str, label: str) -> str:
    """The SVG as part of an HTML page: as wide as its place, ink in the text's colour, no names of XML spaces."""
    body = _STYLE_ELEMENT.sub("", drawing[drawing.index("<svg") :], count=1)
    used = set(_REFERENCE.findall(body))
    body = _in_tags(body, lambda tag: _html_tag(tag, used))
    head = f'<svg role="img" aria-label="{html.escape(label)}" stroke-linejoin="round" '
    return body.replace("<svg ", head, 1)


def _in_tags(drawing: str, change: Callable[[str], str]) -> str:
    # Never in the texts: they come from data, and have < and > escaped.
    return _TAG.sub(lambda match: change(match[0]), drawing)


def _html_tag(tag: str, used: Collection[str]) -> str:
    tag = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", tag).replace("xlink:href=", "href=")
    tag = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", tag)  # the rest repeat
    tag = re.sub(r"font-family: [^;\"]*", "font-family: inherit", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r' (?:width|height)="[^"]*"', "", tag)
    return tag.replace(INK, "currentColor")
