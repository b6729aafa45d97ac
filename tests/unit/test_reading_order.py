"""docs/reading-order.md names files that exist, each once, and tells the recipe in under 5,000 lines."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY


def test_the_spine_is_there():
    text = (REPOSITORY / "docs" / "reading-order.md").read_text(encoding="utf-8")
    spine = re.findall(r"^\d+\. `([\w/.]+)`: ", text, re.MULTILINE)
    named = re.findall(r"`(birbal_ray/[\w/.]+)`", text)
    assert 25 <= len(spine) <= 30
    assert len(set(named)) == len(named)
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
