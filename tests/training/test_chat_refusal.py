"""A model without a chat template is refused in one line by every step that would ask by it."""

from __future__ import annotations

import json

import pytest

from tests.conftest import task_values
from tests.unit.cli.test_cli import run


@pytest.mark.parametrize(
    "command",
    [
        ["score", "--tasks", "{tasks}", "--model", "{model}", "--output", "{out}", "--dry-run"],
        ["train", "--mix", "{mix}", "--model", "{model}", "--output", "{out}", "--dry-run"],
        ["evaluate", "--tasks", "{tasks}", "--model", "{model}", "--output", "{out}", "--dry-run"],
    ],
)
def test_a_model_without_a_chat_template(tiny_model, tiny_mix, tmp_path, command):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.json").write_text(json.dumps(task_values()))
    places = {"tasks": tmp_path / "tasks", "mix": tiny_mix, "model": tiny_model, "out": tmp_path / "out"}
    result = run(*(word.format(**places) for word in command), "--set", "prompt.format=chat")
    assert result.exit_code == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "its tokenizer has no chat template; set prompt.format to birbal" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
