"""The dataset card of a mix; its text is card.md.j2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from birbal_ray.mix.rows import MIX_ROWS, Reason

# The Hub's names for sizes: rows below the number.
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", float("inf"): "1M<n<10M"}


def dataset_card(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md: front matter that `datasets.load_dataset` reads, then what the mix is made of.

    Holds nothing that differs between two runs on the same inputs.
    """
    environment = jinja2.Environment(  # noqa: S701 (Markdown; `cell` escapes what a table can't hold)
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    rows = manifest["rows"]
    values = {
        **manifest,
        "size": next(name for limit, name in SIZES.items() if rows["kept"] < limit),
        "composition": [{**row, "share": f"{row['share']:.1%}"} for row in manifest["composition"]],
        "left_out": [
            {"reason": name, "rows": count, "meaning": Reason[name.upper()].text}
            for name, count in rows["dropped"].items()
        ],
        "columns": MIX_ROWS.names,
        "settings": settings,
        "settings_json": json.dumps(settings, indent=1, ensure_ascii=False),
    }
    return environment.get_template("card.md.j2").render(values)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
