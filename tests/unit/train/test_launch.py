"""What the driver of a training does when something breaks off, without Ray and torch."""

from __future__ import annotations

import concurrent.futures
import sys
import time
from types import SimpleNamespace

import pytest

from birbal_ray.progress import MEASURED, ProgressLine
from birbal_ray.run import RunFailedError
from birbal_ray.storage import RunError, open_folder
from birbal_ray.train import launch, worker
from birbal_ray.train import run as step
from birbal_ray.train.budget import Forecast
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.preflight import Preflight


def test_whatever_the_training_thread_raises_reaches_the_driver(monkeypatch):
    """Also before Ray Train begins: a run that has lost its lock, an import that fails."""

    def lost(*arguments):
        raise RunError("another run took this folder over")

    monkeypatch.setattr(launch, "_run_ray_train", lost)
    done = concurrent.futures.Future()
    launch._fit(TrainConfig(), None, None, done)
    with pytest.raises(RunError, match="took this folder over"):
        done.result(timeout=0)


@pytest.mark.parametrize("name", ["ActorDiedError", "OutOfMemoryError"])
def test_the_death_of_rays_controller_is_one_line_and_the_same_command_continues(tmp_path, monkeypatch, name):
    import ray.exceptions

    error = getattr(ray.exceptions, name)(*(["the node's memory\nwas full"] if name == "OutOfMemoryError" else []))

    class Trainer(dict):
        def fit(self):
            raise error

    names = {
        "ray.train": {"FailureConfig": dict, "RunConfig": dict, "ScalingConfig": dict},
        "ray.train.torch": {"TorchConfig": dict, "TorchTrainer": lambda worker, **options: Trainer(options)},
        "ray.train.v2.api.exceptions": {"TrainingFailedError": ZeroDivisionError},
    }
    for module, content in names.items():  # the real ones take seconds to load
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**content))
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    with pytest.raises(RunFailedError, match=r"Ray Train's controller of the worker died: [^\n]+$") as caught:
        launch._run_ray_train(TrainConfig(), SimpleNamespace(fingerprint="f"), open_folder(tmp_path))
    assert "card" not in str(caught.value)


def test_an_outage_while_the_driver_looks_at_the_worker_ends_nothing(monkeypatch):
    folder = SimpleNamespace(is_local=False, stat=lambda name: SimpleNamespace(modified=2e10))
    status = {"step": 3, "max_steps": 10, "epoch": 0.1, "forecast": None, "train": None, "evaluation": None}
    folder.read_json = lambda name: status
    shown = launch._Status(folder, TrainConfig(), None)
    assert shown.text(ProgressLine()) == "step 3/10 · epoch 0.10"

    def unreachable(name):
        raise RunError("s3://bucket/run: can't be reached")

    monkeypatch.setattr(launch, "NODES_SECONDS", 0.0)
    folder.stat = unreachable
    assert shown.text(ProgressLine()) == "step 3/10 · epoch 0.10"
    folder.stat, status["step"] = lambda name: SimpleNamespace(modified=2e10), 4
    assert shown.text(ProgressLine()) == "step 4/10 · epoch 0.10"


def test_the_line_of_a_run_says_its_losses_its_speed_and_its_end():
    status = {"step": 3, "max_steps": 10, "epoch": 0.1, "step_seconds": 3.0}
    status["train"] = {"loss": 1.5, "learning_rate": 1e-4, "tokens": 200, "step_seconds": 2.0}
    status["evaluation"] = {"eval_loss": 1.25}
    status["forecast"] = {"num_steps": 8, "by_budget": True, "epochs": 0.8}
    assert launch._describe_status(status) == {
        "done": 3,
        "total": 8,
        "rate_per_second": 100.0,
        "eta_seconds": 15.0,
        "text": "step 3/10 · epoch 0.10 · loss 1.5000 · lr 1.00e-04 · 100 tokens/s · eval loss 1.2500 · "
        "ends in 15 s (budget)",
    }


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("Memory on the node was 30 GB / 31 GB (0.96), which exceeds the memory usage threshold of 0.95."),
    ],
)
def test_a_machine_out_of_memory_gets_advice_that_keeps_the_work(tmp_path, error):
    reason = worker.lasting_reason(error, tmp_path, TrainConfig())
    assert "ran out of memory" in reason and "the last checkpoint is kept" in reason
    assert "half the batch.micro and twice the batch.accumulation" in reason
    assert not worker.out_of_memory(error), "a smaller micro batch on the card is no answer"
    one = TrainConfig(batch={"micro": 1, "accumulation": 8})
    reason = worker.lasting_reason(error, tmp_path, one)
    assert reason.endswith("The run continues on a machine with more memory"), "there is no half of one"
    reason = worker.lasting_reason(error, tmp_path, one.replace({"gradient_checkpointing": False}))
    assert reason.endswith("continues with gradient_checkpointing=true, or on a machine with more memory")


def test_a_card_that_is_full_says_so_in_several_ways(tmp_path):
    for text in (
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
    ):
        assert worker.out_of_memory(RuntimeError(text))
        assert "the card ran out of memory" in worker.lasting_reason(RuntimeError(text), tmp_path, TrainConfig())


@pytest.fixture
def start_training(tmp_path, monkeypatch):
    """start_training(**changes) calls `train` up to where Ray would start; the machine was slow lately."""
    packing = SimpleNamespace(num_tokens=100, num_samples=10)
    took = Forecast(100.0, 0.1, MEASURED, start_seconds=0.0, once_seconds=80.0, step_seconds=10.0)
    model = SimpleNamespace(path=tmp_path / "model", fingerprint="f")
    mix = SimpleNamespace(place=str(tmp_path / "mix")), {"files": {"train.parquet": "a", "eval.parquet": "b"}}
    monkeypatch.setattr(step, "resolve_config", lambda config: (config, model))
    monkeypatch.setattr(step, "read_mix", lambda config: mix)
    monkeypatch.setattr(step, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(step, "prepare", lambda *arguments: {"train": packing})
    found = {"parts": [], "memory_bytes": None, "change": None, "num_trainable": 1, "packing": {}, "forecast": took}
    monkeypatch.setattr(step, "run_preflight", lambda config, *arguments: Preflight(config, **found))
    monkeypatch.setattr(step, "describe_preflight", lambda *arguments: [])

    def train_on_cluster(config, model, folder, progress, run):
        raise RunError("this is where Ray starts")

    monkeypatch.setattr(step, "train_on_cluster", train_on_cluster)

    def call(**changes):
        config = TrainConfig(mix=str(tmp_path / "mix"), output=str(tmp_path / "run"), **changes)
        step.train(config)

    return call


def test_a_run_that_is_under_way_is_not_refused_for_a_machine_that_became_slower(start_training, tmp_path, capsys):
    with pytest.raises(Exception, match="budget=60 s is too short"):
        start_training(budget="60s")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="this is where Ray starts"):
        start_training(budget="60s")
    assert "continuing from the last checkpoint" in capsys.readouterr().err


def test_how_often_checkpoints_are_saved_may_change(start_training):
    with pytest.raises(RunError, match="this is where Ray starts"):
        start_training()
    with pytest.raises(RunError, match="this is where Ray starts"):
        start_training(checkpoint={"every_minutes": 2, "every_steps": 8, "keep": 1})
    with pytest.raises(Exception, match=r"settings.evaluation.every_steps: 64 → 8"):
        start_training(evaluation={"every_steps": 8})


def test_an_adapter_goes_from_the_best_folder_to_the_adapter_folder(folder, monkeypatch):
    from birbal_ray.train import card

    files = {"adapter_model.safetensors": b"weights", "README.md": b"of PEFT"}
    for name, content in files.items():
        folder.write_bytes(f"best/step-000004/{name}", content)
    folder.write_json("best/step-000004/adapter_config.json", {"base_model_name_or_path": "/here", "r": 4})
    folder.write_json("best/step-000004/reference.json", {"format": 1})
    model = SimpleNamespace(name="owner/base", revision="abc", fingerprint="f")
    monkeypatch.setattr(card, "adapter_card", lambda manifest, mix: "# Ours\n")
    names = card.publish_adapter(folder, folder.subfolder("best/step-000004"), {}, {}, model)
    assert names == sorted(folder.files("adapter"))
    assert folder.read_bytes("adapter/adapter_model.safetensors") == b"weights"
    assert folder.read_json("adapter/adapter_config.json") == {
        "base_model_name_or_path": "owner/base", "r": 4, "revision": "abc"
    }  # fmt: skip
    assert folder.read_json("adapter/reference.json") == {"format": 1, "model": "owner/base", "model_fingerprint": "f"}
    assert folder.read_text("adapter/README.md") == "# Ours\n"


def test_ctrl_c_waits_for_no_worker_that_is_not_there(folder, monkeypatch):
    """Its node was taken away, and none has joined: nobody would save a checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, folder, ["no node has a GPU", KeyboardInterrupt(), "no node has a GPU"])
    assert not folder.is_file("stop")


def test_ctrl_c_lets_a_worker_save_whose_node_has_just_come_back(folder, monkeypatch):
    """Also where the driver has not yet looked at the nodes again."""
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, folder, ["no node has a GPU", KeyboardInterrupt(), None])
    assert folder.is_file("stop")


def test_ctrl_c_while_the_worker_makes_way_for_an_easier_one_starts_no_other(folder, monkeypatch):
    def fit(config, model, folder, done):
        while not folder.is_file("stop"):
            time.sleep(0.001)
        done.set_result({"eased": "the card ran out of memory at batch.micro=2"})

    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, folder, [KeyboardInterrupt(), None], fit, grace=30)


def interrupt(monkeypatch, folder, answers, fit=lambda *arguments: None, grace=0.01):
    """Run a worker that never ends, or `fit`; `answers`: what the driver finds at each look at the cluster."""
    answers = iter(answers)

    def missing():
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(launch, "_fit", fit)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(launch, "NODES_SECONDS", -1.0)
    config = TrainConfig(resources={"stop_grace": grace})
    launch._run_worker(config, None, folder, ProgressLine(), None, missing)
