"""Strict settings: file, --set, flags; errors that name the key and where it came from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ConfigDict

from birbal_ray.cli.options import find_config
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.config import MixConfig
from birbal_ray.recipe import PipelineConfig
from birbal_ray.score.config import ScoreConfig, ServeConfig
from birbal_ray.settings import ConfigError, Duration, Settings, load_config, seconds_of, write_duration
from birbal_ray.train.config import TrainConfig
from birbal_ray.tune.config import TuneConfig
from tests.conftest import REPOSITORY

SCHEMAS = {"score": ScoreConfig, "mix": MixConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "tune": TuneConfig}
SCHEMAS |= {"serve": ServeConfig, "pipeline": PipelineConfig}


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


def test_a_value_is_set_in_one_place_where_sections_share_an_anchor():
    changes = ["score.prompt.num_shots=2", "score.prompt.chat_template_arguments.enable_thinking=true"]
    recipe = load_config(PipelineConfig, find_config("pipeline", "one-day-qwen3-8b"), changes)
    assert recipe.score.prompt.num_shots == 2
    assert recipe.score.prompt.chat_template_arguments == {"enable_thinking": True}
    assert recipe.train.prompt.chat_template_arguments == {"enable_thinking": False}
    assert recipe.evaluate.prompt.num_shots == 4


def test_a_bad_value_is_blamed_on_what_gave_it(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("tasks: {path: x}\ncompletion: {max_completion_tokens: 5}\n")
    with pytest.raises(ConfigError, match=r"--set completion=7"):
        load_config(ScoreConfig, file, ["completion=7"])


TWISTED = [
    ("budget: 12:00", "budget = '12:00': a duration like 24h, 90m, 1h30m or 45s is wanted"),
    ("budget: 1:30", "budget = '1:30': a duration"),
    ("budget: 1:30:00.5", "budget = '1:30:00.5': a duration"),
    ("seed: 1\nlora: {r: 0010}", "lora.r = '0010': input should be a number, without quotes or leading zeros"),
    ("seed: 12:00", "seed = '12:00': input should be a number"),
    ("optimizer: {learning_rate: 00.1}", "optimizer.learning_rate = '00.1': input should be a number"),
    ("optimizer: {learning_rate: -07}", "optimizer.learning_rate = '-07': input should be a number"),
    ("seed: true", "seed = True: input should be a number"),
    ("seed: on", "seed = True: input should be a number"),
    ("batch: {micro: no}", "batch.micro = False: input should be a number"),
    ("model: {name: yes}", "model.name = True: input should be a valid string"),
    ("seed: 1\nlora: {r: 8}\nseed: 2", "'seed' stands twice, in lines 1 and 3"),
    ("lora:\n  r: 8\n  alpha: 1\n  r: 16", "'r' stands twice, in lines 2 and 4"),
    ("seed: !!int ''", "not valid YAML"),
    ("seed: !!int many", "not valid YAML .*many"),
    ("seed: !!timestamp 2024-99-01", "not valid YAML"),
    ("lora: &a\n  r: *a", "line 1: found unconstructable recursive node"),
    ("lora: &a [1, *a]", "line 1: found unconstructable recursive node"),
    ("seed: !!timestamp now", "not valid YAML"),
    ("seed: 1\nlora: !!omap [r: 8]", "line 2: could not determine a constructor for the tag .*omap"),
    ("seed: 1\nlora: !!pairs [r: 8]", "line 2: could not determine a constructor for the tag .*pairs"),
    ("seed: 1\ntrackers: !!set {wandb}", "line 2: could not determine a constructor for the tag .*set"),
    ("seed: 1\ntrackers: !!set [wandb]", "line 2: could not determine a constructor for the tag .*set"),
    ("seed: 1\nmix: !!binary aGVsbG8=", "line 2: could not determine a constructor for the tag .*binary"),
    ("seed: 1\nmix: !!timestamp 2024-01-05", "line 2: could not determine a constructor for the tag .*timestamp"),
    ("seed: 1\nlora: !!map [1]", "line 2: expected a mapping node, but found sequence"),
    ("seed: 1\nlora:\n  <<: 5", "line 3: << merges sections"),
    ("seed: 1\nlora: {r: *b}", "line 2: found undefined alias 'b'"),
    ("seed: 1\nlora:\n  ? [r]\n  : 8", "line 3: a list or a section can't be a key"),
    ("seed: 1\nlora: [", "line 2: while parsing a flow node"),
    ("seed: 1\nlora:\n  r: &a [*a]", "line 3: found unconstructable recursive node"),
    ("true: 1", "unknown key 'true'"),
    ("2024-01-05: 1", "unknown key '2024-01-05'"),
]


@pytest.mark.parametrize(("text", "message"), TWISTED)
def test_what_yaml_twists_is_refused_with_what_was_read(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"my\.yaml: .*{message}") as caught:
        load_config(TrainConfig, tmp_path / "my.yaml")
    assert "\n" not in str(caught.value)


def test_what_yaml_twists_is_refused_on_the_command_line_too():
    no_tag = "could not determine a constructor for the tag .*set"
    for text, message in (("!!set [a]", no_tag), ("{r: 1, r: 2}", "'r' stands twice")):
        with pytest.raises(
            ConfigError, match=rf"--set lora={re.escape(text)}: the value is not YAML \(line 1: {message}"
        ):
            load_config(TrainConfig, None, [f"lora={text}"])
    with pytest.raises(ConfigError, match="--set budget=12:00: budget = '12:00': a duration like 24h"):
        load_config(TrainConfig, None, ["budget=12:00"])


def test_the_shared_cases_are_refused(shared_data):
    holds_itself = r"\(line \d+: found unconstructable recursive node"
    for name, message in (("twice", "'task_score' stands twice, in lines 1 and 5"), ("self", holds_itself)):
        with pytest.raises(ConfigError, match=message):
            load_config(MixConfig, shared_data / "cases" / "yaml" / f"{name}.yaml")


def test_text_numbers_and_merged_sections_that_yaml_leaves_alone_are_taken(tmp_path):
    class Taken(Settings):
        model_config = ConfigDict(allow_inf_nan=True)  # only to see what YAML gives
        text: str
        when: str
        at: str
        bare: str
        commit: str
        number: float
        large: float
        steps: int
        budget: Duration
        numbers: list[float]
        small: int
        section: dict[str, int]
        other: dict[str, int]

    (tmp_path / "my.yaml").write_text(
        "text: '0010'\nwhen: 2024-01-05\nat: 12:00\nbare: 0010\ncommit: 12e4567\nnumber: 1e-5\nlarge: 1e5\n"
        "steps: 1e3\nbudget: 1e4\nsmall: 1_000\nnumbers: [0, -1, +2, 3., .5, -0.25, 1.5E+3, .inf, -.inf]\n"
        "section: &x {a: 1}\nother: {<<: *x, b: -20}\n"
    )
    numbers = [0.0, -1.0, 2.0, 3.0, 0.5, -0.25, 1500.0, math.inf, -math.inf]
    text = {"text": "0010", "when": "2024-01-05", "at": "12:00", "bare": "0010", "commit": "12e4567"}
    sections = {"section": {"a": 1}, "other": {"a": 1, "b": -20}}
    taken = load_config(Taken, tmp_path / "my.yaml")
    assert taken == Taken(
        **text, number=1e-5, large=100_000.0, steps=1000, budget=10_000.0, numbers=numbers, small=1000, **sections
    )


@pytest.mark.parametrize(
    ("schema", "assignment"),
    [
        (PipelineConfig, "budget=.inf"),
        (PipelineConfig, "budget=1e999"),
        (PipelineConfig, "shares.score=.nan"),
        (ScoreConfig, "adaptive.score_margin=.inf"),
        (TrainConfig, "optimizer.learning_rate=.inf"),
        (TuneConfig, "validation.weights={exact_match: .inf}"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(schema, assignment):
    with pytest.raises(ConfigError, match=r"= (inf|nan): input should be"):
        load_config(schema, None, [assignment])


def test_a_section_is_merged_before_the_one_that_it_is_a_part_of(tmp_path):
    class Outer(Settings):
        sections: dict[str, Any]

    (tmp_path / "my.yaml").write_text(
        "sections:\n  base: &base {r: 1, s: 1}\n  deep: {er: &er {<<: *base, r: 2}}\n  top: {<<: *er}\n  1: {no: yes}\n"
        "  both: {<<: [{dropout: 1}, {dropout: 2, alpha: 3}], alpha: 4}"
    )
    assert load_config(Outer, tmp_path / "my.yaml").sections == {
        "base": {"r": 1, "s": 1},
        "deep": {"er": {"r": 2, "s": 1}},
        "top": {"r": 2, "s": 1},
        "1": {"no": True},
        "both": {"dropout": 1, "alpha": 4},
    }


class Renamed(Settings):
    class Inner(Settings):
        RENAMED: ClassVar = {"looks": "num_rungs"}
        num_rungs: int = 1

    RENAMED: ClassVar = {"y": "x"}
    inner: Inner = Inner()
    x: int = 0


def test_old_keys_are_taken_with_a_warning(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("inner: {looks: 3}\ny: 4\n")
    config = load_config(Renamed, tmp_path / "my.yaml")
    assert (config.inner.num_rungs, config.x) == (3, 4)
    said = capsys.readouterr().err.splitlines()
    until = "the old name is accepted until the next release"
    assert said == [
        f"{tmp_path / 'my.yaml'}: 'y' is now 'x'; {until}",
        f"{tmp_path / 'my.yaml'}: inner: 'looks' is now 'num_rungs'; {until}",
    ]
    assert load_config(Renamed, None, ["inner={looks: 5}"]).inner.num_rungs == 5
    assert "--set inner={looks: 5}: inner: 'looks' is now 'num_rungs'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"--set inner\.looks=many: inner\.num_rungs = 'many'"):
        load_config(Renamed, None, ["inner.looks=many"])
    with pytest.raises(
        ConfigError, match=r"--set inner.looks=5: inner: 'looks' is the old name of 'num_rungs', and both"
    ):
        load_config(Renamed, None, ["inner.looks=5", "inner.num_rungs=5"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("num_random=3", "num_initial=3"),
        ("surrogate=false", "predicted=false"),
        ("validation.looks=3", "validation.num_rungs=3"),
        ("stopping.grace_looks=3", "stopping.grace_rungs=3"),
    ],
)
def test_a_searchs_old_keys_are_taken(old, new):
    assert load_config(TuneConfig, None, [old]) == load_config(TuneConfig, None, [new]) != TuneConfig()


def test_absent_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(ScoreConfig, "nowhere.yaml")


FILES = sorted((REPOSITORY / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_is_valid_and_shows_how_to_run_it(path):
    load_config(SCHEMAS[path.parent.name], path)
    head = path.read_text(encoding="utf-8").splitlines()[:4]
    step, names = path.parent.name, (path.stem, f"configs/{path.parent.name}/{path.name}")
    commands = [f"birbal {step} --config {name} " for name in names]
    assert any(command in f"{line} " for line in head for command in commands)


def test_both_sizes_are_there_for_every_step():
    for step in SCHEMAS:
        names = {path.name for path in FILES if path.parent.name == step}
        assert "tiny.yaml" in names
        assert len(names) >= 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(90.2, "91s"), (120, "120s"), (121, "3m"), (3600, "1h00m"), (23_968, "6h40m")]
)
def test_a_duration_is_written_as_a_setting_takes_it(seconds, text):
    assert write_duration(seconds) == text
    assert 0 <= seconds_of(text) - seconds < 60
