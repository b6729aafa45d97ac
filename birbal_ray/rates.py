"""Speeds that this machine reached, kept for the next run's estimate."""

from __future__ import annotations

import contextlib
import json

from birbal_ray.run import write_json
from birbal_ray.storage import cache_folder

RATES_FILE = "throughput.json"


def remember(key: str, tokens_per_second: float) -> None:
    """Keep the latest rate of a key."""
    with contextlib.suppress(OSError):  # an estimate isn't worth a failed run
        write_json(cache_folder() / RATES_FILE, {**_read(), key: tokens_per_second})


def recall(key: str) -> float | None:
    """The latest rate of a key on this machine, or None."""
    return _read().get(key)


def _read() -> dict[str, float]:
    try:
        return json.loads((cache_folder() / RATES_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
