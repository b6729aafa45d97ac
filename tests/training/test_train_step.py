"""`birbal train` up to where Ray would start: which mixes it refuses, what a dry run says."""

import json
import shutil
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.progress import ProgressLine, save_figures
from birbal_ray.run import RunError, RunFailedError, Step, open_run
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.storage import open_folder
from birbal_ray.train import run as step
from birbal_ray.train.budget import rate_key
from birbal_ray.train.config import TrainConfig

SMALL = {"batch.sequence_length": 128, "batch.micro": 2, "batch.accumulation": 2, "lora.r": 8, "lora.alpha": 16}

CHANGED = "1 file(s) of this finished run are missing or have changed (first"
RESULT = ("num_steps", "epochs", "ended_by", "base_eval_loss", "best_eval_loss", "best_step", "elapsed_seconds")


@pytest.fixture(autouse=True)
def this_machine(monkeypatch, tmp_path):
    """No cluster, and no speed seen before."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def birbal_train(tiny_model):
    """birbal_train(mix, *arguments) → click's result."""

    def run(mix, *arguments):
        settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
        command = ["train", "--mix", mix, "--model", tiny_model, "--device", "cpu", *settings, *arguments]
        return CliRunner().invoke(main, [str(argument) for argument in command])

    return run


def missing(folder, tiny_mix):
    return 2, f"{folder}: no such folder; expected the output of `birbal mix`"


def empty(folder, tiny_mix):
    folder.mkdir()
    return 2, f"{folder}: no manifest.json here; expected the output of `birbal mix`"


def unfinished(folder, tiny_mix):
    with open_run(folder, Step("mix"), {}):
        pass
    return 1, f"{folder}: an unfinished `birbal mix` run (no manifest.json); rerun its command to finish it"


def of_another_step(folder, tiny_mix):
    with open_run(folder, Step("score"), {}) as run:
        run.finish({}, [], summary="")
    return 2, f"{folder}: the output of `birbal score`, expected that of `birbal mix`"


def without_a_split(folder, tiny_mix):
    shutil.copytree(tiny_mix, folder)
    (folder / "eval.parquet").unlink()
    return 1, f"{folder}: {CHANGED}: eval.parquet is missing); run its `birbal mix` command again"


def emptied(folder, tiny_mix):
    shutil.copytree(tiny_mix, folder)
    (folder / "train.parquet").write_bytes(b"")
    return 1, f"{folder}: {CHANGED}: train.parquet has 0 bytes, not"


def edited(folder, tiny_mix):
    shutil.copytree(tiny_mix, folder)
    content = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(content[:-1] + b"x")
    return 1, f"{folder}/train.parquet: edited since its run finished (its sha256 is another); put the original back"


def sign(folder):
    """Write the files' hashes into the mix's manifest again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: open_folder(folder).record_of(name)._asdict() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))


def without_answers(folder, tiny_mix):
    shutil.copytree(tiny_mix, folder)
    pq.write_table(pa.table({"question": ["a"]}), folder / "train.parquet")
    sign(folder)
    return 2, f"{folder}/train.parquet: no column answer; expected the output of `birbal mix`"


def without_rows(folder, tiny_mix):
    shutil.copytree(tiny_mix, folder)
    pq.write_table(pq.read_table(folder / "eval.parquet").slice(0, 0), folder / "eval.parquet")
    sign(folder)
    return 2, f"{folder}/eval.parquet: no rows; make the mix with eval_fraction above 0"


@pytest.mark.parametrize(
    "make",
    [missing, empty, unfinished, of_another_step, without_a_split, emptied, edited, without_answers, without_rows],
)
def test_a_mix_that_cannot_be_trained_on_is_said_in_one_line(birbal_train, tiny_mix, tmp_path, make):
    code, message = make(tmp_path / "mix", tiny_mix)
    result = birbal_train(tmp_path / "mix", "--output", tmp_path / "run")
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert sum("error" in line for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_dry_run_tells_memory_on_stdout_and_the_forecast_on_stderr(birbal_train, tiny_mix, tiny_model, tmp_path):
    result = birbal_train(tiny_mix, "--dry-run", "--format", "json", "--push", "someone/adapter")
    assert result.exit_code == 0, result.output
    files = "README.md, adapter_config.json, adapter_model.safetensors, reference.json, birbal_manifest.json"
    assert f"would upload to someone/adapter: {files}" in result.stderr
    rows = {row["part"]: row for row in json.loads(result.stdout)}
    assert rows["total"]["GiB"] == pytest.approx(
        sum(row["GiB"] for part, row in rows.items() if part not in ("total", "the device has"))
    )
    assert rows["the device has"]["how"] == "fits"
    for line in ("train: 60 samples", "eval: 8 samples", "trainable parameters", "optimizer steps an epoch"):
        assert line in result.stderr
    assert "speed unknown on this device: add --calibrate, or train once" in result.stderr

    config = load_config(TrainConfig, flags={**SMALL, "model.name": str(tiny_model), "resources.device": "cpu"})
    save_figures(rate_key(config), tokens_per_second=1000.0)
    result = birbal_train(tiny_mix, "--dry-run", "--budget", "10s")
    assert result.exit_code == 2 and "budget=10 s is too short: loading" in result.stderr, "as the run refuses it"
    result = birbal_train(tiny_mix, "--dry-run", "--budget", "43s")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["part", "GiB", "how"]
    assert "at the 1,000 tokens/s last seen here that takes" in result.stderr
    assert "will fit in the budget; 3 were asked for" in result.stderr
    assert not list(tmp_path.glob("*/packed"))


def test_what_does_not_fit_is_refused_with_the_change_that_does(birbal_train, tiny_mix, tmp_path):
    def total(*arguments):
        result = birbal_train(tiny_mix, "--dry-run", "--format", "json", *arguments)
        return result, {row["part"]: row["GiB"] for row in json.loads(result.stdout)}["total"]

    large, small = total()[1], total("--set", "batch.micro=1", "--set", "batch.accumulation=4")[1]
    assert large > small
    limit = ("--set", f"resources.memory_gib={(large + small) / 2}")
    result, _ = total(*limit)
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "GiB are needed, the device has" in error
    assert "it would fit with --set batch.micro=1 --set batch.accumulation=4" in error
    advice = error.partition("fit with ")[2].partition(";")[0].split()
    assert total(*limit, *advice)[0].exit_code == 0

    result = birbal_train(tiny_mix, "--output", tmp_path / "run", "--set", "resources.memory_gib=1e-6")
    assert result.exit_code == 2
    assert "no smaller setting fits" in result.stderr.splitlines()[-1]


def test_a_run_is_continued_with_its_own_settings_alone(birbal_train, tiny_mix, monkeypatch, tmp_path):
    def broken(*arguments):
        raise RunFailedError("the training worker failed 4 times")

    monkeypatch.setattr(step, "train_on_cluster", broken)
    run = tmp_path / "run"
    result = birbal_train(tiny_mix, "--output", run, "--set", "max_steps=60")
    assert result.exit_code == 1
    assert result.stderr.endswith("worker failed 4 times\nwhat is finished is kept; the same command continues\n")
    result = birbal_train(tiny_mix, "--output", run, "--set", "max_steps=50")
    assert result.exit_code == 2
    assert "max_steps: 60 → 50" in result.stderr
    manifest = {"result": dict.fromkeys(RESULT, 0.0), "files": {}, "wall_seconds": 1.0}
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = birbal_train(tiny_mix, "--output", run, "--set", "max_steps=60")
    assert result.exit_code == 0, result.output
    assert "is up to date; nothing to do" in result.stderr


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_said_before_anything_starts(birbal_train, tiny_mix, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)  # as if it were not
    result = birbal_train(tiny_mix, "--dry-run", "--set", f"trackers=[{tracker}]")
    assert result.exit_code == 2
    assert result.stderr == f"error: trackers: {tracker} is not installed; run: pip install {tracker}\n"


def test_calibrating_on_a_cluster_is_refused(birbal_train, tiny_mix, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    result = birbal_train(tiny_mix, "--dry-run", "--calibrate")
    assert result.exit_code == 2
    assert "--calibrate: its packs lie on this machine; unset RAY_ADDRESS" in result.stderr


def test_a_run_without_an_adapter_says_why(tmp_path):
    lines = [{"step": 0, "eval_loss": 5.0}, {"step": 4, "eval_loss": float("nan")}]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    with (
        pytest.raises(RunError, match="the eval loss is not a number since step 4: the adapter diverged"),
        open_run(tmp_path / "run", Step("train"), {}) as run,
    ):
        run.folder.write_bytes("metrics.jsonl", metrics.encode())
        step._finish(TrainConfig(), None, run, {}, {}, {}, ProgressLine())


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="--mix is required"):
        step.resolve_config(TrainConfig())


def test_an_adapter_to_go_on_from_that_is_not_there_is_named_by_its_option(birbal_train, tiny_mix, tmp_path):
    result = birbal_train(tiny_mix, "--dry-run", "--from-adapter", tmp_path / "absent")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"error: --from-adapter {tmp_path / 'absent'}: no such folder"
