"""`birbal train` refuses a device or a budget that is too small for what is left. The mix and the model are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.run import RunFailedError, open_run
from birbal_ray.settings import load_config
from birbal_ray.train import run as step
from birbal_ray.train.budget import MEASURED, Forecast
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.files import METRICS_FILE
from birbal_ray.train.preflight import Part, Preflight

MIX = {"files": {"train.parquet": 1, "eval.parquet": 2}, "identity_hash": "m"}
TRAINS = 1  # exit code of a training that was not refused: `train_on_cluster` is a stand-in that fails


@pytest.fixture
def birbal(tmp_path, monkeypatch):
    """birbal(*arguments) → click's result of a training into tmp_path/run in a budget of 60 s; 90 s were measured here.

    `birbal.ran(finished)` leaves an earlier run of the same settings there. `birbal.has_bytes` is the memory of the
    device, of which one byte is needed.
    """
    output, given = tmp_path / "run", {"budget": "60s", "mix": "/mix", "resources.device": "cpu"}
    took = Forecast(100.0, 0.1, MEASURED, start_seconds=50.0, once_seconds=80.0, step_seconds=10.2)
    model = SimpleNamespace(path=tmp_path / "model", name="proxy", revision=None, fingerprint="f")
    model.path.mkdir()

    def look(config, *others):
        return Preflight(config, [Part("all", 1, "")], call.has_bytes, None, 1, {}, took)

    def fail(*arguments):
        raise RunFailedError("no cluster here")

    for name, stand_in in (
        ("resolve_config", lambda config: (config, model)),
        ("read_mix", lambda config: (SimpleNamespace(place="/mix"), MIX)),
        ("prepare", lambda *arguments: {}),
        ("load_tokenizer", lambda path: None),
        ("find_adapter", lambda place, model: SimpleNamespace(fingerprint="a")),
        ("run_preflight", look),
        ("describe_preflight", lambda found: []),
        ("train_on_cluster", fail),
    ):
        monkeypatch.setattr(step, name, stand_in)

    def call(*arguments):
        settings = ["--mix", "/mix", "--budget", "60s", "--device", "cpu", "--output", output]
        return CliRunner().invoke(main, list(map(str, ["train", *settings, *arguments])))

    def ran(finished, name=METRICS_FILE):
        identity = step._identity(load_config(TrainConfig, flags=given), model, MIX)
        with open_run(output, step.STEP, identity) as run:
            files = {name: run.folder.write_bytes(name, b"")}
            if finished:
                run.finish({}, files, summary="")

    call.ran, call.has_bytes = ran, 1
    return call


@pytest.mark.parametrize(
    ("earlier", "arguments", "code"),
    [
        (None, [], 2),
        ("under way", [], TRAINS),
        ("under way", ["--overwrite"], TRAINS),  # it continues, too
        ("finished", ["--overwrite"], 2),
        ("before its first step", [], 2),
    ],
)
def test_a_budget_is_too_short_for_a_new_run_alone(birbal, earlier, arguments, code):
    if earlier:
        birbal.ran(earlier == "finished", "session.json" if earlier == "before its first step" else METRICS_FILE)
    result = birbal(*arguments)
    assert result.exit_code == code, result.output
    assert ("budget=60 s is too short" in result.stderr) == (code == 2)
    assert ("no cluster here" in result.stderr) == (code == TRAINS)


def test_a_device_is_too_small_for_what_is_not_finished(birbal):
    birbal.has_bytes = 0
    birbal.ran(finished=False)
    result = birbal()
    assert result.exit_code == 2, result.output
    assert "GiB are needed" in result.stderr


def test_an_output_that_holds_the_adapter_to_go_on_from_is_refused(birbal, tmp_path):
    (tmp_path / "run/adapter").mkdir(parents=True)
    result = birbal("--from-adapter", tmp_path / "run/adapter")
    assert result.exit_code == 2, result.output
    assert "this folder holds an input" in result.stderr
