"""Strict settings: file, --set, flags; errors that name the key and where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.config import MixConfig
from birbal_ray.score.config import ScoreConfig
from birbal_ray.serve.config import ServeConfig
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.train.config import TrainConfig
from birbal_ray.tune.config import TuneConfig
from tests.conftest import REPOSITORY

SCHEMAS = {"score": ScoreConfig, "mix": MixConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "tune": TuneConfig}
SCHEMAS |= {"serve": ServeConfig}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text("engine: {max_model_len: 512, dtype: float16}\nseed: 3\n")
    return path


def test_flags_win_over_set_which_wins_over_the_file(file):
    config = load_config(ScoreConfig, file, ["engine.max_model_len=1024", "seed=4"], {"seed": 5, "output": None})
    assert (config.engine.max_model_len, config.engine.dtype, config.seed) == (1024, "float16", 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {max_model_length: 5}", r"my.yaml: unknown key 'engine.max_model_length' \(did you mean"),
        ("sede: 5", r"my.yaml: unknown key 'sede' \(did you mean 'seed'"),
        ("engine: {max_model_len: many}", "my.yaml: engine.max_model_len = 'many': input should be a valid integer"),
        ("engine: {max_model_len: 2}", "my.yaml: engine.max_model_len = 2: input should be greater than"),
        ("engine: [", "my.yaml: not valid YAML"),
        ("- 1", "my.yaml: expected a mapping at the top, found list"),
        ("seed: !!python/object/apply:os.getcwd []", "my.yaml: not valid YAML"),
    ],
)
def test_bad_file_is_named_with_the_key(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(ScoreConfig, tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("engine.max_len=5", "--set engine.max_len=5: unknown key 'engine.max_len'"),
        ("seed", "--set seed: expected key.path=value"),
        ("seed.deep=1", "unknown key|should be a valid integer"),
        ("engine.backend=real", "--set engine.backend=real: engine.backend = 'real'"),
    ],
)
def test_bad_assignment(assignment, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ScoreConfig, None, [assignment])


def test_absent_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(ScoreConfig, "nowhere.yaml")


FILES = sorted((REPOSITORY / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_is_valid_and_shows_how_to_run_it(path):
    load_config(SCHEMAS[path.parent.name], path)
    head = path.read_text(encoding="utf-8").splitlines()[:4]
    assert any(f"birbal {path.parent.name} --config configs/{path.parent.name}/{path.name}" in line for line in head)


def test_both_sizes_are_there_for_every_step():
    for step in SCHEMAS:
        names = {path.name for path in FILES if path.parent.name == step}
        assert "tiny.yaml" in names
        assert len(names) >= 2
