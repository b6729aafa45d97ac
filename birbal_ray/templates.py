"""Pages and cards from the Jinja templates that lie beside the code that fills them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def render(file: Path, values: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """The text of a template; the same for the same values. It may include files of its folder.

    In a .html.j2, every value is escaped; in a .md.j2, none. Raises jinja2.UndefinedError for a name without a value.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(file.name).render(values)
