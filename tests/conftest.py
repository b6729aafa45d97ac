"""Fixtures shared by all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real Natural Instructions files; only where a `shared` folder stands beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real Natural Instructions files in {folder}, which this clone does not have")
    return folder


def task_values(num_instances: int = 6, **changes: Any) -> dict[str, Any]:
    """A small valid task file as a dict, with `changes` made to it."""
    values = {
        "Source": ["ours"],
        "Categories": ["Sentiment Analysis"],
        "Definition": ["Say whether the colour is warm."],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Positive Examples": [{"input": "red", "output": "yes"}, {"input": "blue", "output": "no"}],
        "Instances": [
            {"id": f"t-{n}", "input": f"shade number {n}", "output": ["yes" if n % 2 else "no"]}
            for n in range(num_instances)
        ],
    }
    return {**values, **changes}


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """write_task(name, num_instances, **changes) → the folder that holds the task file."""

    def write(name: str, num_instances: int = 6, **changes: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(task_values(num_instances, **changes)), encoding="utf-8")
        return folder

    return write
