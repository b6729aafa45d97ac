"""`birbal train` through Ray Train, on a model of two layers: killed, stopped, refused, without a card."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from birbal_ray.config import load_config
from birbal_ray.config.train import TrainConfig
from birbal_ray.training.checkpoints import all_checkpoints
from birbal_ray.training.curve import read_metrics
from tests.conftest import slow

NUM_STEPS = 120
SETTINGS = {
    "batch.sequence_length": 128,
    "batch.micro": 1,
    "batch.accumulation": 2,
    "lora.r": 4,
    "lora.alpha": 8,
    "optimizer.learning_rate": 5e-3,
    "evaluation.every_steps": 4,
    "checkpoint.every_steps": 3,
    "resources.num_threads": 1,
    "max_steps": NUM_STEPS,
    "epochs": 100,
}


def start(model, mix, folder, *more, device="cpu", **changes):
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    command = [sys.executable, "-m", "birbal_ray", "train", "--model", model, "--mix", mix, "--output", folder]
    flags = [part for name, value in {**SETTINGS, **changes}.items() for part in ("--set", f"{name}={value}")]
    return subprocess.Popen(
        [*map(str, command), "--device", device, *flags, *map(str, more)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def wait_for_step(folder, step, process, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if max((done for done, _ in losses(folder)), default=0) >= step:
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached in {seconds} s")


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_mix, tmp_path_factory):
    """The same fine-tune without Ray, in a process of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = load_config(TrainConfig, flags={**SETTINGS, "resources.device": "cpu"})
    code = """
import sys
from pathlib import Path
from birbal_ray.config.train import TrainConfig
from birbal_ray.training.finetune import fine_tune
from birbal_ray.training.samples import prepare
from transformers import AutoTokenizer
import torch

torch.set_num_threads(1)
model, mix, folder = map(Path, sys.argv[2:])
config = TrainConfig.model_validate_json(sys.argv[1])
prepare(mix, folder / "packed", AutoTokenizer.from_pretrained(model), 128, "drop", config.evaluation.num_rows)
fine_tune(config, model, folder)
"""
    arguments = [config.model_dump_json(), str(tiny_model), str(tiny_mix), str(folder)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.timeout(900)
@slow
def test_killed_worker_is_replaced_sigterm_saves_and_the_same_command_goes_on(
    undisturbed, tiny_model, tiny_mix, tmp_path
):
    folder = tmp_path / "run"
    process = start(tiny_model, tiny_mix, folder)
    wait_for_step(folder, 20, process)
    first_worker = json.loads((folder / "worker.json").read_text())["pid"]
    os.kill(first_worker, signal.SIGKILL)
    wait_for_step(folder, 50, process)
    assert json.loads((folder / "worker.json").read_text())["pid"] != first_worker

    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "checkpoint saved; the same command continues" in err
    last_step = losses(folder)[-1][0]
    assert last_step < NUM_STEPS
    assert all_checkpoints(folder / "checkpoints")[-1].name == f"step-{last_step:06d}"

    _, err = (refused := start(tiny_model, tiny_mix, folder, max_steps=100)).communicate(timeout=100)
    assert refused.returncode == 2
    assert f"max_steps: {NUM_STEPS} → 100" in err

    again = start(tiny_model, tiny_mix, folder, "--format", "json")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err[-3000:]
    assert "continuing from the last checkpoint" in err
    assert losses(folder) == losses(undisturbed)
    best = json.loads((undisturbed / "best.json").read_text())
    expected = (undisturbed / best["folder"] / "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    (row,) = json.loads(out)
    assert row["ended by"] == "max_steps"
    assert row["best eval loss"] < row["base eval loss"]
    check_outputs(folder, tiny_model)

    process = start(tiny_model, tiny_mix, folder)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "is up to date; nothing to do" in err


def check_outputs(folder, model):
    """Adapter, card, curve and manifest of a finished run agree."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = json.loads((folder / "manifest.json").read_text())["result"]
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert result["train_tokens"] == sum(line["tokens"] for line in lines)
    card = (folder / "adapter" / "README.md").read_text()
    assert f"eval loss {result['best_eval_loss']:.4f}" in card
    assert "made_up: Apache-2.0" in card
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "adapter")
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_that_is_not_there_is_named_beside_what_is(tiny_model, tiny_mix, tmp_path):
    card = {"resources.accelerator_type": "GeForce-RTX-4090"}
    process = start(tiny_model, tiny_mix, tmp_path / "run", device="gpu", **card)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no node has a GeForce-RTX-4090 with 1 free CPUs on its node; the cluster has 1 node(s), 0 GPUs" in err


def test_job_entrypoint_takes_the_same_options():
    done = subprocess.run([sys.executable, "jobs/train.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--budget" in done.stdout
