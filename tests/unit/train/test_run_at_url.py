"""A training at a URL from the driver's side to the worker's, without Ray and torch: the fine-tune is made up."""

from __future__ import annotations

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest

from birbal_ray.storage import RunError, cache_folder, open_folder
from birbal_ray.train import card, launch, worker
from birbal_ray.train import run as step
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import Packing
from birbal_ray.train.files import BEST_FILE, METRICS_FILE, finish_checkpoint, working_folder
from birbal_ray.train.preflight import Preflight
from tests.fixtures.s3_server import BUCKET

METRICS = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.9, "tokens": 50}, {"step": 2, "eval_loss": 2.5}]


def write_state(folder):
    """What a fine-tune of two steps leaves in its folder."""
    written = folder / "checkpoints" / ".work" / "checkpoint-2"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_text("state")
    finish_checkpoint(written, folder / "checkpoints")
    best = folder / "best" / "step-000002"
    best.mkdir(parents=True)
    (best / "adapter_model.safetensors").write_text("weights")
    for name in ("adapter_config.json", "reference.json"):
        (best / name).write_text("{}")
    (folder / BEST_FILE).write_text(json.dumps({"step": 2, "eval_loss": 2.5, "folder": "best/step-000002"}))
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (folder / "clock.json").write_text(json.dumps({"elapsed_seconds": 9.0, "setup_seconds": 1.0}))


@pytest.fixture
def train(s3, tmp_path, monkeypatch):
    """train(output) with a made-up mix, model and card; `train.worker` is what the worker does in its folder."""
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=list, get_runtime_context=lambda: context))
    model = SimpleNamespace(path=tmp_path / "model", name="proxy", revision=None, fingerprint="f")
    mix = SimpleNamespace(place="s3://mix"), {"files": {"train.parquet": 1, "eval.parquet": 2}, "identity_hash": "m"}
    packing = Packing(4, 0, 4, 100, 50, 1, 1.0)
    found = Preflight(TrainConfig(), [], None, None, 1, {}, None)

    def pack(mix, folder, tokenizer, config, progress):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.arrow").write_text("packs")
        return {"train": packing, "eval": packing}

    def run_ray_train(config, model, folder):
        options = {"config": config.model_dump(mode="json"), "fingerprint": "f", "folder": folder}
        return worker.train_on_worker(options)

    def fine_tune_here(config, fingerprint, remote, started):
        call.worker(remote.working)
        remote.add(*call.uploads)
        return {"ended_by": "max_steps", "num_steps": 2, "epochs": 1.0}

    for place, name, stand_in in (
        (step, "resolve_config", lambda config: (config, model)),
        (step, "read_mix", lambda config: mix),
        (step, "prepare", pack),
        (step, "load_tokenizer", lambda path: None),
        (step, "run_preflight", lambda *arguments: found),
        (step, "describe_preflight", lambda *arguments: []),
        (step, "draw_loss_curve", lambda metrics, best, sink: sink.write(b"PNG")),
        (card, "adapter_card", lambda manifest, mix: "# An adapter\n"),
        (launch, "_run_ray_train", run_ray_train),
        (worker, "fine_tune_here", fine_tune_here),
        (worker, "log_to", lambda file: None),
        (launch, "ray_session", lambda *arguments, **options: contextlib.nullcontext()),
        (launch, "can_place", lambda *arguments: None),
    ):
        monkeypatch.setattr(place, name, stand_in)

    def call(output):
        return step.train(TrainConfig(mix="s3://mix", output=output))

    call.worker, call.uploads = write_state, ("checkpoints/step-000002", "best/step-000002")
    return call


def test_all_of_a_finished_run_is_at_the_url_and_nothing_stays_here(train, capsys):
    url = f"s3://{BUCKET}/runs/finished"
    result = train(url)
    folder = open_folder(url)
    assert set(result.manifest["files"]) == {
        *("adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        *("adapter/reference.json", "best.json", "loss_curve.png", "metrics.jsonl"),
    }
    assert folder.read_bytes("adapter/adapter_model.safetensors") == b"weights"
    found = result.manifest["result"]
    assert (found["best_step"], found["base_eval_loss"], found["elapsed_seconds"]) == (2, 3.0, 9.0)
    assert {"checkpoints/step-000002/files.json", "packed/train.arrow", "session.json"} <= folder.files().keys()
    assert not [file for file in (cache_folder() / "train").rglob("*") if file.is_file()]
    assert train(url).manifest == result.manifest
    assert "is up to date" in capsys.readouterr().err


def test_what_another_session_left_here_goes_up_with_the_next_one(train, monkeypatch):
    """Its uploads failed, at the very end: the same command finishes, and all of it is at the URL."""
    url, folder = f"s3://{BUCKET}/runs/left", open_folder(f"s3://{BUCKET}/runs/left")

    def end(working):
        write_state(working)
        raise ConnectionError("the worker's machine went away")

    train.worker = end
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(worker.Remote, "add", lambda remote, *names: None)
        train(url)
    assert (working_folder(folder) / METRICS_FILE).exists() and not folder.is_file(METRICS_FILE)
    train.worker = lambda working: None  # it finds that its run has ended
    assert train(url).manifest["result"]["best_step"] == 2
    assert folder.is_file("checkpoints/step-000002/files.json")
    assert [json.loads(line) for line in folder.read_text(METRICS_FILE).splitlines()] == METRICS


def test_a_run_whose_best_adapter_is_gone_is_not_finished_without_it(train):
    train.uploads = ("checkpoints/step-000002",)
    with pytest.raises(RunError, match=r"best/step-000002: no adapter_model.safetensors, although .*best.json names"):
        train(f"s3://{BUCKET}/runs/gone")
    assert not open_folder(f"s3://{BUCKET}/runs/gone").is_file("manifest.json")
