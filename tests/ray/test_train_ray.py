"""`birbal train` through Ray Train, on a model of two layers: killed, stopped, out of time, without a card."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from birbal_ray.training.checkpoints import all_checkpoints
from birbal_ray.training.curve import read_metrics

FLAGS = [
    *("--device", "cpu"),
    *(
        part
        for setting in (
            "batch.sequence_length=128",
            "batch.micro=1",
            "batch.accumulation=2",
            "lora.r=4",
            "lora.alpha=8",
            "optimizer.learning_rate=5e-3",
            "evaluation.every_steps=4",
            "checkpoint.every_steps=3",
            "resources.num_threads=1",
        )
        for part in ("--set", setting)
    ),
]


def start(model, mix, folder, *more):
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    command = [sys.executable, "-m", "birbal_ray", "train", "--model", model, "--mix", mix, "--output", folder]
    return subprocess.Popen(
        [*map(str, command), *FLAGS, *map(str, more)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def wait_for_step(folder, step, process, seconds=150):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if max((done for done, _ in losses(folder)), default=0) >= step:
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached in {seconds} s")


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_mix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(tiny_model, tiny_mix, folder, "--set", "max_steps=200", "--format", "json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    (row,) = json.loads(out)
    assert row["ended by"] == "max_steps"
    assert row["best eval loss"] < row["base eval loss"]
    return folder


def test_adapter_card_and_manifest_agree(undisturbed, tiny_model, tiny_mix):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    manifest = json.loads((undisturbed / "manifest.json").read_text())
    result = manifest["result"]
    assert [step for step, _ in losses(undisturbed)] == list(range(1, 201))
    assert result["train_tokens"] == sum(
        m["tokens"] for m in read_metrics(undisturbed / "metrics.jsonl") if "loss" in m
    )
    card = (undisturbed / "adapter" / "README.md").read_text()
    assert f"eval loss {result['best_eval_loss']:.4f}" in card
    assert "made_up: Apache-2.0" in card
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    PeftModel.from_pretrained(base, undisturbed / "adapter")
    assert (undisturbed / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    process = start(tiny_model, tiny_mix, undisturbed, "--set", "max_steps=200")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "is up to date; nothing to do" in err


@pytest.mark.timeout(600)
def test_killed_worker_is_replaced_and_a_killed_driver_goes_on(undisturbed, tiny_model, tiny_mix, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_model, tiny_mix, folder, "--set", "max_steps=200")
    wait_for_step(folder, 20, process)
    first_worker = json.loads((folder / "worker.json").read_text())["pid"]
    os.kill(first_worker, signal.SIGKILL)
    wait_for_step(folder, 60, process)
    assert json.loads((folder / "worker.json").read_text())["pid"] != first_worker
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = start(tiny_model, tiny_mix, folder, "--set", "max_steps=200")
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err[-3000:]
    assert "continuing from the last checkpoint" in err
    assert losses(folder) == losses(undisturbed)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        undisturbed / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.timeout(600)
def test_sigterm_saves_first_and_the_same_command_goes_on(undisturbed, tiny_model, tiny_mix, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_model, tiny_mix, folder, "--set", "max_steps=200")
    wait_for_step(folder, 10, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "checkpoint saved; the same command continues" in err
    last_step = losses(folder)[-1][0]
    assert last_step < 200
    assert all_checkpoints(folder / "checkpoints")[-1].name == f"step-{last_step:06d}"
    refused = start(tiny_model, tiny_mix, folder, "--set", "max_steps=100")
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 2
    assert "max_steps: 200 → 100" in err
    again = start(tiny_model, tiny_mix, folder, "--set", "max_steps=200")
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err[-3000:]
    assert losses(folder) == losses(undisturbed)


@pytest.mark.timeout(400)
def test_a_budget_of_a_minute_ends_within_a_tenth_of_it(tiny_model, tiny_mix, tmp_path):
    folder = tmp_path / "run"
    process = start(tiny_model, tiny_mix, folder, "--budget", "60s", "--set", "epochs=100000")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert "epochs will fit in the budget; 100000 were asked for" in err
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert result["ended_by"] == "budget"
    assert 54 <= result["elapsed_seconds"] <= 66
    assert [m for m in read_metrics(folder / "metrics.jsonl") if "loss" in m][-1]["learning_rate"] < 0.001 * 5e-3
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_a_card_that_is_not_there_is_named_beside_what_is(tiny_model, tiny_mix, tmp_path):
    process = start(
        tiny_model,
        tiny_mix,
        tmp_path / "run",
        *("--device", "gpu", "--set", "resources.accelerator_type=GeForce-RTX-4090"),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no node has a GeForce-RTX-4090 with 1 free CPUs on its node; the cluster has 1 node(s), 0 GPUs" in err


def test_job_entrypoint_takes_the_same_options():
    done = subprocess.run([sys.executable, "jobs/train.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--budget" in done.stdout
