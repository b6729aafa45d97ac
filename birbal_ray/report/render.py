"""One HTML page: sections, conclusions and plots go to the template as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from birbal_ray.progress import duration
from birbal_ray.report.conclusions import model_name, signed, words
from birbal_ray.report.load import Row
from birbal_ray.report.plots import Plot, tasks_name

TEMPLATE = "report.html.j2"


def render(plots: Mapping[str, Plot], **values: Any) -> str:
    """The page: no script, nothing from outside, every text from data escaped; the same for the same values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "shown": shown,
        "exact": repr,
        "words": words,
        # A browser may break the line after these; the cell's text stays what it is.
        "breakable": lambda text: Markup("_<wbr>").join(text.split("_")),
        "duration": duration,
        "percent": lambda fraction: f"{100 * fraction:.1f} %",
        "model_name": model_name,
    }
    environment.tests |= {"numeric": lambda value: isinstance(value, (int, float)), "numbers": has_numbers}
    drawings = {name: {"drawing": Markup(plot.inline), "caption": plot.caption} for name, plot in plots.items()}  # noqa: S704 (our own SVG)
    return environment.get_template(TEMPLATE).render(plots=drawings, tasks_name=tasks_name, **values)


def shown(value: Any, with_sign: bool = False) -> str:
    """A cell's text: whole numbers with thousands separators, others with three decimals."""
    if value is None:
        return "\u2013"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return signed(value) if with_sign else f"{value:.3f}".replace("-", "\u2212")
    return str(value)


def has_numbers(rows: Sequence[Row], key: str) -> bool:
    """Whether a column's values are numbers, where there are any."""
    return any(isinstance(row.get(key), (int, float)) for row in rows)
