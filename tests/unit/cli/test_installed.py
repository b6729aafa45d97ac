"""What an installation without a clone has: the wheel's files, settings by name, sample tasks by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile

import pytest
from click.testing import CliRunner

from birbal_ray import __version__
from birbal_ray.cli.main import main
from birbal_ray.cli.options import find_config, shipped_configs
from birbal_ray.settings import ConfigError
from tests.conftest import REPOSITORY

STEPS = ("score", "mix", "tune", "train", "evaluate")
SHOW = """
import json, birbal_ray
from birbal_ray.cli.options import find_config, shipped_configs
from birbal_ray.score.config import ScoreConfig
from birbal_ray.settings import load_config
print(json.dumps({
    "package": birbal_ray.__file__,
    "config": str(find_config("train", "mistral-7b-qlora")),
    "names": {step: list(shipped_configs(step)) for step in %r},
    "tasks": load_config(ScoreConfig, find_config("score", "tiny")).tasks.path,
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content, unpacked as an installation has it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_type_checkers_read_the_wheels_types(installed):
    assert (installed / "birbal_ray" / "py.typed").is_file()


def test_the_wheel_finds_its_settings_and_tasks_from_anywhere(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHOW % (STEPS,)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["package"].startswith(str(installed))
    assert found["config"] == str(installed / "birbal_ray" / "configs" / "train" / "mistral-7b-qlora.yaml")
    assert found["names"] == {
        step: sorted(f.stem for f in (REPOSITORY / "configs" / step).glob("*.yaml")) for step in STEPS
    }
    assert found["tasks"] == str(installed / "birbal_ray" / "sample_tasks")
    templates = ("report/report.html.j2", "report/report.css", "mix/card.md.j2", "mix/alpaca.md", "train/card.md.j2")
    for name in (*templates, "ni/data/selected_tasks.txt"):
        assert (installed / "birbal_ray" / name).is_file()
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"Version: {__version__}\n" in metadata.read_text(encoding="utf-8")


def test_a_name_a_path_and_a_wrong_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("train", "tiny") == REPOSITORY / "configs" / "train" / "tiny.yaml"
    (tmp_path / "tiny").write_text("seed: 1\n")
    assert str(find_config("train", "tiny")) == "tiny", "a file of that name goes first"
    assert str(find_config("train", "my/own.yaml")) == "my/own.yaml"
    with pytest.raises(ConfigError, match=r"--config mistral-7b: .* for train \(did you mean 'mistral-7b-qlora'\?\)"):
        find_config("train", "mistral-7b")


@pytest.mark.parametrize("step", STEPS)
def test_every_step_takes_its_shipped_settings_by_name(step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped_configs(step):
        result = CliRunner().invoke(main, [step, "--config", name, "--set", "no.such=1"])
        assert result.exit_code == 2
        assert "unknown key 'no'" in result.stderr, "everything else in the file is known"
        assert len(result.stderr.strip().splitlines()) == 1


def test_the_makefile_and_the_metadata_name_the_same_pythons():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    named = [name.rpartition(" ")[2] for name in project["classifiers"] if " :: 3." in name]
    assert named == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == ">=3.11,<3.14"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "python3.11 python3.12 python3.13 python3;" in makefile
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in makefile
