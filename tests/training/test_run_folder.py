"""A whole `birbal train` in this process, its worker without Ray: at a path, at a URL, continued on another machine."""

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError, load_config
from birbal_ray.storage import open_folder
from birbal_ray.train import card, launch, sft, worker
from birbal_ray.train import run as step
from birbal_ray.train.budget import Clock, Deadline
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.files import Remote, download_state, working_folder
from tests.fixtures.s3_server import BUCKET
from tests.fixtures.small_training import SMALL_TRAINING

SETTINGS = {
    **SMALL_TRAINING,
    "checkpoint.keep": 2,
    "resources.device": "cpu",
    "max_steps": 8,
    "epochs": 100,
}


@pytest.fixture(autouse=True)
def without_ray(tiny_model, monkeypatch, tmp_path):
    """The worker's session runs in this process; steps after which it stops, as on SIGTERM, go into the list."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    stops = []

    def fit(config, model, folder, done):
        def session(remote):
            if stops and remote.working != folder:
                remote.stop_requested = lambda: True
            return worker.run_session(config, model.fingerprint, remote, "node", 0.0)

        try:
            if folder.is_local:
                done.set_result(session(Remote(folder, folder.local)))
                return
            working = working_folder(folder)
            download_state(folder, working)
            with Remote(folder, working) as remote:
                result = session(remote)
            done.set_result(result)
        except BaseException as error:
            done.set_exception(error)

    def fine_tune_here(config, fingerprint, remote, started):
        outcome = sft.fine_tune(config, tiny_model, remote.working, remote=remote)
        return asdict(outcome) | {"speeds": worker.measured_speeds(remote.working)}

    monkeypatch.setattr(launch, "_fit", fit)
    monkeypatch.setattr(worker, "fine_tune_here", fine_tune_here)
    monkeypatch.setattr(worker, "log_to", lambda file: None)
    monkeypatch.setattr(launch, "ray_session", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(launch, "can_place", lambda *arguments: None)
    monkeypatch.setattr("ray.nodes", lambda: [])
    return stops


def train(mix, model, output, **changes):
    flags = {**SETTINGS, "mix": str(mix), "model.name": str(model), "output": str(output), **changes}
    return step.train(load_config(TrainConfig, flags=flags))


def losses(folder):
    lines = [json.loads(line) for line in folder.read_text("metrics.jsonl").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_finished_run_lists_its_files_and_is_up_to_date(tiny_model, tiny_mix, tmp_path, capsys):
    result = train(tiny_mix, tiny_model, tmp_path / "run = [a]::b")
    folder = result.folder
    adapter = set(folder.files("adapter"))
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md"} <= adapter
    assert result.manifest["files"].keys() == {*adapter, "loss_curve.png", "metrics.jsonl", "best.json"}
    assert folder.read_json("adapter/reference.json")["model_fingerprint"]
    assert folder.read_json("progress.json")["text"]
    assert result.manifest["result"]["attention"].startswith("per-sample sdpa")
    assert result.manifest["summary"].startswith("eval loss ")
    assert train(tiny_mix, tiny_model, folder.place).manifest == result.manifest
    assert "is up to date; nothing to do" in capsys.readouterr().err

    (folder.local / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    again = train(tiny_mix, tiny_model, folder.place)
    assert again.manifest["files"] == result.manifest["files"], "made again from the best adapter"

    # Another split of the same sequences, another kernel or checkpointing mode are the same run.
    same = {"batch.micro": 2, "batch.accumulation": 1, "model.attention": "eager", "gradient_checkpointing": False}
    assert train(tiny_mix, tiny_model, folder.place, **same).manifest == again.manifest
    with pytest.raises(ConfigError, match=r"settings.max_steps: 8 → 9"):
        train(tiny_mix, tiny_model, folder.place, max_steps=9)


def test_an_input_is_never_the_output(tiny_model, tiny_mix, tmp_path):
    mix = tmp_path / "mix"
    shutil.copytree(tiny_mix, mix)
    with pytest.raises(ConfigError, match="is an input"):
        train(mix, tiny_model, mix)
    assert (mix / "train.parquet").exists()


def test_a_run_at_a_url_continues_on_another_machine(
    tiny_model, tiny_mix, tmp_path, s3, monkeypatch, without_ray, capsys
):
    """Stopped after its first step; the other machine has nothing but the URL."""
    url = f"s3://{BUCKET}/runs/train"
    without_ray.append("stop")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_mix, tiny_model, url)
    folder = open_folder(url)
    assert folder.is_file("checkpoints/step-000001/files.json")
    assert not folder.is_file("manifest.json")
    without_ray.clear()
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "another machine"))
    result = train(tiny_mix, tiny_model, url)
    assert "continuing from the last checkpoint" in capsys.readouterr().err
    local = train(tiny_mix, tiny_model, tmp_path / "local")
    assert losses(folder) == losses(local.folder)
    name = "adapter/adapter_model.safetensors"
    assert folder.read_bytes(name) == local.folder.read_bytes(name)
    assert result.manifest["result"]["best_eval_loss"] == local.manifest["result"]["best_eval_loss"]
    kept = {name.split("/")[1] for name in folder.files("checkpoints")}
    assert kept <= {"step-000003", "step-000006", "step-000008"}
    assert "step-000008" in kept


def test_nothing_at_a_url_is_deleted_because_it_is_absent_here(tiny_model, tiny_mix, tmp_path, s3, without_ray):
    url = f"s3://{BUCKET}/runs/kept"
    without_ray.append("stop")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_mix, tiny_model, url)
    folder = open_folder(url)
    before = folder.files()
    shutil.rmtree(working_folder(folder))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_mix, tiny_model, url)
    assert before.keys() - folder.files().keys() <= {"stop"}


def test_continuing_from_an_adapter_starts_where_it_ended(tiny_model, tiny_mix, tmp_path):
    own = {"lora.target_modules": ["q_proj", "v_proj"], "lora.alpha": 6}
    first = train(tiny_mix, tiny_model, tmp_path / "first", **own)
    changes = {"lora.from_adapter": str(tmp_path / "first"), "max_steps": 4}
    second = train(tiny_mix, tiny_model, tmp_path / "second", **changes)
    assert second.manifest["settings"]["lora"] == first.manifest["settings"]["lora"] | {
        "from_adapter": str(tmp_path / "first" / "adapter")
    }, "what the adapter is counts, not what the settings say"
    start, end = second.manifest["result"]["base_eval_loss"], first.manifest["result"]["best_eval_loss"]
    assert start == pytest.approx(end, rel=1e-4)
    with pytest.raises(ConfigError, match=r"its r is 4; pass --set lora.r=4"):
        train(tiny_mix, tiny_model, tmp_path / "third", **changes, **{"lora.r": 8})


def test_rslora_and_dora_train(tiny_model, tiny_mix, tmp_path):
    changes = {"lora.use_rslora": True, "lora.use_dora": True, "max_steps": 4}
    result = train(tiny_mix, tiny_model, tmp_path / "run", **changes)
    assert result.manifest["result"]["best_eval_loss"] < result.manifest["result"]["base_eval_loss"]


def test_an_adapter_is_pushed_with_card_and_manifest(tiny_model, tiny_mix, tmp_path, monkeypatch):
    """huggingface_hub's two calls are recorded by a stand-in; a refusal is one line that keeps the work."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    pushed = {}

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            assert private
            return f"https://hub.test/{repository}"

        def create_commit(self, repository, operations, commit_message):
            pushed.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})

    result = train(tiny_mix, tiny_model, tmp_path / "run", max_steps=4)
    names = [name for name in result.manifest["files"] if name.startswith("adapter/")]
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert card.push_to_hub(result.folder, names, "someone/adapter") == "https://hub.test/someone/adapter"
    assert pushed.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "reference.json"} | {
        "birbal_manifest.json"
    }
    assert pushed.keys() == {*card.ADAPTER_FILES, card.PUSHED_MANIFEST}, "what a dry run lists"
    assert json.loads(pushed["birbal_manifest.json"])["step"] == "train"

    def refuse(self, repository, operations, commit_message):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(Hub, "create_commit", refuse)
    with pytest.raises(RunError, match=r"--push someone/adapter: the Hub did not take it .* are kept in"):
        card.push_to_hub(result.folder, names, "someone/adapter")


def test_the_clock_goes_to_the_url_with_the_status(tmp_path):
    """So that a continuation on another machine, and the pipeline, count what a killed session took."""
    added = []
    deadline = Deadline(100.0, 10, Clock(tmp_path / "clock.json"))
    remote = SimpleNamespace(add=lambda *names: added.extend(names))
    deadline.step_took(1.0)
    deadline.total_steps = 10
    # 2.5 epochs of 32 packs, 8 a step: transformers counts three.
    about = {"settings": TrainConfig(epochs=2.5), "train_dataset": range(32)}
    trainer = SimpleNamespace(folder=tmp_path, remote=remote, deadline=deadline, **about)
    state = SimpleNamespace(global_step=3, max_steps=10, num_train_epochs=3, epoch=0.75)
    sft.SftCallback(trainer, lambda line: None)._write_status(state)
    assert {"status.json", "clock.json"} <= set(added)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["step"], status["forecast"]["epochs"]) == (3, 2.5)


def test_a_best_adapter_that_is_not_whole_does_not_keep_others_from_being_saved(tmp_path):
    """best.json came to this machine without all files of its adapter: nothing would ever be lower than its loss."""
    trainer = SimpleNamespace(folder=tmp_path)
    (tmp_path / "best" / "step-000004").mkdir(parents=True)
    (tmp_path / "best.json").write_text(json.dumps({"step": 4, "eval_loss": 1.5, "folder": "best/step-000004"}))
    assert sft.SftCallback(trainer, lambda line: None)._best == float("inf")
    (tmp_path / "best" / "step-000004" / "reference.json").write_text("{}")
    assert sft.SftCallback(trainer, lambda line: None)._best == 1.5
