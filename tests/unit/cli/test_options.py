"""Options made from schemas: types, ranges, defaults, and who wins over whom."""

from __future__ import annotations

import json
from typing import Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from birbal_ray.cli.main import main
from birbal_ray.cli.options import settings_of, settings_options
from birbal_ray.evaluate.config import EvaluateConfig
from birbal_ray.mix.config import MixConfig
from birbal_ray.score.config import ScoreConfig, ServeConfig
from birbal_ray.settings import Duration, Settings
from birbal_ray.train.config import TrainConfig
from birbal_ray.tune.config import TuneConfig

SCHEMAS = {
    **{"score": ScoreConfig, "mix": MixConfig, "tune": TuneConfig, "train": TrainConfig},
    **{"evaluate": EvaluateConfig, "serve": ServeConfig},
}


class Inner(Settings):
    rate: float = Field(0.5, gt=0, lt=1, description="how fast")
    keep: bool = Field(True, description="keep it")


class Everything(Settings):
    inner: Inner = Inner()
    names: list[str] = Field([], description="who")
    kinds: list[Literal["a", "b"]] = Field(["a"], description="which")
    choice: Literal["x", "y"] = "x"
    count: int = Field(4, ge=1, le=9, description="how many")
    limit: int | None = Field(None, ge=2, description="at most")
    budget: Duration | None = Field(None, gt=0, description="time")
    strict: bool = Field(False, description="stop")


FLAGS = (
    *("--rate", "--keep", "--name WHO = names", "--kind = kinds", "--choice"),
    *("--count = count: another help", "--limit N", "--budget TIME", "--strict"),
)


@click.command()
@settings_options(Everything, FLAGS, step="score")
def everything(config):
    """Print what arrives."""
    click.echo(config.model_dump_json())


def run(*arguments):
    return CliRunner().invoke(everything, [str(argument) for argument in arguments])


def test_what_is_not_given_is_the_schema_s_default():
    assert json.loads(run().stdout) == json.loads(Everything().model_dump_json())


def test_every_kind_of_setting_has_a_flag():
    words = (
        "--rate 0.25 --no-keep --name ann --name bob --kind b --choice y --count 9 --limit 2 --budget 1h30m --strict"
    )
    config = Everything(**json.loads(run(*words.split()).stdout))
    assert (config.inner.rate, config.inner.keep, config.names, config.kinds) == (0.25, False, ["ann", "bob"], ["b"])
    assert (config.choice, config.count, config.limit, config.budget, config.strict) == ("y", 9, 2, 5400.0, True)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--count 10", "Invalid value for '--count': 10 is not in the range 1<=x<=9."),
        ("--rate 1", "1.0 is not in the range 0<x<1"),
        ("--limit 1", "1 is not in the range x>=2"),
        ("--choice z", "'z' is not one of 'x', 'y'"),
        ("--kind c", "'c' is not one of 'a', 'b'"),
        ("--count many", "'many' is not a valid integer range"),
        ("--counts 3", "No such option"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(words, reason):
    result = run(*words.split())
    assert result.exit_code == 2
    assert reason in result.stderr


@pytest.mark.parametrize("flags", ["--policy birbal", "--set policy=birbal"])
def test_a_misspelt_choice_gets_the_nearest_one(flags):
    result = CliRunner().invoke(main, ["mix", *flags.split()])
    assert result.exit_code == 2 and "(did you mean 'birbal_2023'?)" in result.stderr


def test_a_flag_wins_over_set_which_wins_over_the_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("count: 2\ninner: {rate: 0.75}\nnames: [file]\n")
    assert json.loads(run("--config", file).stdout)["count"] == 2, "a default is no flag"
    assert json.loads(run("--config", file, "--set", "count=3").stdout)["count"] == 3
    found = json.loads(run("--config", file, "--set", "count=3", "--count", 4, "--name", "flag").stdout)
    assert (found["count"], found["inner"]["rate"], found["names"]) == (4, 0.75, ["flag"])


def test_help_shows_ranges_defaults_and_choices():
    wide = {"terminal_width": 400, "max_content_width": 400, "show_default": True}
    text = " ".join(CliRunner().invoke(everything, ["--help"], **wide).stdout.split())
    for shown in (
        "--rate FLOAT RANGE How fast. [default: 0.5; 0<x<1]",
        "--keep / --no-keep Keep it.",
        "--name WHO Who. Repeatable.",
        "--choice [x|y]",
        "--count INTEGER RANGE Another help. [default: 4; 1<=x<=9]",
        "--limit N At most. [x>=2]",
        "--set KEY=VALUE Set one key, e.g.",
    ):
        assert shown in text, shown


@pytest.mark.parametrize("step", SCHEMAS)
def test_settings_lists_every_key(step):
    result = CliRunner().invoke(main, [step, "--settings"])
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.stdout.splitlines()[2:]]
    assert listed == [key for key, _ in settings_of(SCHEMAS[step])]
    assert len(listed) > 10


def test_a_type_that_no_flag_can_give_is_a_bug_that_shows_at_once():
    class Odd(Settings):
        table: dict[str, int] = Field({}, description="x")
        many: int = 5

    with pytest.raises(TypeError, match="--table: no option for a setting of type"):
        settings_options(Odd, ["--table"], step="score")


@click.command()
@settings_options(Everything, ["--rate"], step="score", sections=("inner",))
def with_a_file_of_its_own(config):
    """Print what arrives."""
    click.echo(config.model_dump_json())


def test_a_sections_own_file_replaces_the_section_and_set_and_flags_win_over_both(tmp_path):
    (tmp_path / "all.yaml").write_text("count: 2\ninner: {rate: 0.75, keep: false}\n")
    (tmp_path / "inner.yaml").write_text("rate: 0.25\n")
    (tmp_path / "wrong.yaml").write_text("rates: 0.25\n")

    def inner(*words):
        result = CliRunner().invoke(with_a_file_of_its_own, [*words, "--config", str(tmp_path / "all.yaml")])
        return json.loads(result.stdout) if result.exit_code == 0 else str(result.exception)

    own = ("--inner-config", str(tmp_path / "inner.yaml"))
    assert inner()["inner"] == {"rate": 0.75, "keep": False}
    assert inner(*own)["inner"] == {"rate": 0.25, "keep": True}
    assert inner(*own)["count"] == 2
    assert inner(*own, "--set", "inner.keep=false")["inner"] == {"rate": 0.25, "keep": False}
    assert inner(*own, "--set", "inner.rate=0.5", "--rate", "0.125")["inner"]["rate"] == 0.125
    message = f"{tmp_path / 'wrong.yaml'}: unknown key 'inner.rates' (did you mean 'rate'?)"
    assert message in inner("--inner-config", str(tmp_path / "wrong.yaml"))
