"""A command whose stdout or stderr is closed or full: no traceback, and nothing in the wrong stream."""

from __future__ import annotations

import contextlib
import json
import os
import sys

import pytest

from birbal_ray.cli.main import main

COMMANDS = (["tasks", "list", "--format", "json"], ["tasks", "validate"], ["tasks", "show", "sample002_list_operation"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("closed", [("stderr",), ("stdout",), ("stdout", "stderr")])
def test_closed_streams(command, closed, monkeypatch, capsys):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    output, errors = capsys.readouterr()
    if "stdout" in closed:
        assert output == ""
    elif command[-1] == "json":
        assert len(json.loads(output)) == 8, "no note among the results"
    if "stderr" in closed:
        assert errors == ""


def test_a_full_disk_under_stdout_is_one_line(monkeypatch, capsys):
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as ended:
        main(COMMANDS[0])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    with contextlib.suppress(OSError):
        full.close()
