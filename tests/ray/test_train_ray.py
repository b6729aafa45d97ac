"""`birbal train` through Ray Train, on a model of two layers: killed, stopped, refused, without a card."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.settings import load_config
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import prepare
from birbal_ray.train.files import all_checkpoints, read_metrics
from tests.conftest import slow
from tests.fixtures.small_training import SMALL_TRAINING

CARD = "GeForce-RTX-4090"
NUM_STEPS = 100  # some seconds after the last signal, on a fast machine too
SETTINGS = {
    **SMALL_TRAINING,
    "resources.num_threads": 1,
    "max_steps": NUM_STEPS,
    "epochs": 100,
}


def arguments(model, mix, folder, device, **changes):
    flags = [part for name, value in {**SETTINGS, **changes}.items() for part in ("--set", f"{name}={value}")]
    places = ["--model", model, "--mix", mix, "--output", folder]
    return ["train", *map(str, places), "--device", device, *flags]


def start(model, mix, folder, *more, device="cpu", address, **changes):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    return subprocess.Popen(
        [sys.executable, "-m", "birbal_ray", *arguments(model, mix, folder, device, **changes), *more],
        env=environment | {"RAY_ADDRESS": address},
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
def alone(tiny_model):
    """alone(folder): what `birbal train` does in the folder, without Ray, in this process."""
    import torch

    from birbal_ray.train.sft import fine_tune

    config = load_config(TrainConfig, flags={**SETTINGS, "resources.device": "cpu"})
    before = torch.get_num_threads()
    torch.set_num_threads(SETTINGS["resources.num_threads"])
    yield lambda folder: fine_tune(config, tiny_model, folder)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(alone, tiny_model, tiny_mix, tmp_path_factory):
    """A run that nothing happened to."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(
        tiny_mix, folder / "packed", AutoTokenizer.from_pretrained(tiny_model), load_config(TrainConfig, flags=SETTINGS)
    )
    alone(folder)
    return folder


def best_adapter(folder):
    best = json.loads((folder / "best.json").read_text())
    return (folder / best["folder"] / "adapter_model.safetensors").read_bytes()


def worker_of(folder):
    return json.loads((folder / "worker.json").read_text())["pid"]


def kill_worker(folder):
    pid = worker_of(folder)
    with contextlib.suppress(ProcessLookupError):  # Ray was quicker, where the driver is dead
        os.kill(pid, signal.SIGKILL)
    return pid


def stop(process, folder):
    """SIGTERM to the driver: the worker saves what was done."""
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "checkpoint saved; the same command continues" in err
    last_step = losses(folder)[-1][0]
    assert last_step < NUM_STEPS
    assert all_checkpoints(folder / "checkpoints")[-1].name == f"step-{last_step:06d}"


@pytest.mark.timeout(600)
def test_killed_and_stopped_it_goes_on_and_repeats_every_loss(
    undisturbed, alone, cluster_address, tiny_model, tiny_mix, tmp_path
):
    """A killed worker is replaced, a killed driver costs nothing either, and SIGTERM saves what was done."""
    folder = tmp_path / "run"
    process = start(tiny_model, tiny_mix, folder, address=cluster_address)
    wait_for_step(folder, 5, process)
    started_with = psutil.Process(worker_of(folder)).environ()
    assert started_with["PYTORCH_ALLOC_CONF"] == "expandable_segments:True", "later is too late"
    first_worker = kill_worker(folder)
    wait_for_step(folder, 13, process)
    assert worker_of(folder) != first_worker

    process.kill()
    kill_worker(folder)  # which Ray does, too
    process.communicate()
    done = losses(folder)[-1][0]
    assert done < NUM_STEPS

    process = start(tiny_model, tiny_mix, folder, address=cluster_address)
    wait_for_step(folder, done + 3, process)
    stop(process, folder)
    (folder / "stop").unlink()  # the same command does that, then this:
    assert alone(folder).num_steps == NUM_STEPS
    assert losses(folder) == losses(undisturbed)
    assert best_adapter(folder) == best_adapter(undisturbed)


@pytest.mark.timeout(900)
@slow
def test_the_same_command_goes_on_whatever_ended_it(undisturbed, cluster_address, tiny_model, tiny_mix, tmp_path):
    """SIGKILL to worker, driver and Ray Train's controller; SIGTERM; then to the end, equal to the last bit."""
    folder = tmp_path / "run"
    process = start(tiny_model, tiny_mix, folder, address=cluster_address)
    wait_for_step(folder, 5, process)
    kill_worker(folder)
    wait_for_step(folder, 13, process)
    process.kill()
    kill_worker(folder)
    process.communicate()

    process = start(tiny_model, tiny_mix, folder, address=cluster_address)
    wait_for_step(folder, losses(folder)[-1][0] + 5, process)
    beside = psutil.Process(worker_of(folder)).parent().children()
    (controller,) = [one for one in beside if "TrainController" in " ".join(one.cmdline())]
    controller.kill()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in err
    assert "Ray Train's controller of the worker died" in err and "the same command continues" in err

    process = start(tiny_model, tiny_mix, folder, address=cluster_address)
    wait_for_step(folder, losses(folder)[-1][0] + 5, process)
    stop(process, folder)

    again = start(tiny_model, tiny_mix, folder, "--format", "json", address=cluster_address)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err[-3000:]
    assert "continuing from the last checkpoint" in err
    assert losses(folder) == losses(undisturbed)
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == best_adapter(undisturbed)
    (row,) = json.loads(out)
    assert row["ended by"] == "max_steps"
    assert row["best eval loss"] < row["base eval loss"]
    check_outputs(folder, tiny_model)


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


def test_a_card_that_is_not_there_is_named_beside_what_is(tiny_model, tiny_mix, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):  # a Ray of its own, which nothing can join
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(
        main, arguments(tiny_model, tiny_mix, tmp_path / "run", "gpu", **{"resources.accelerator_type": CARD})
    )
    assert done.exit_code == 1
    assert (
        "no node has a GeForce-RTX-4090 with 1 free CPUs on its node; the cluster has 1 node(s), 0 GPUs" in done.stderr
    )


def test_job_entrypoint_takes_the_same_options():
    done = subprocess.run([sys.executable, "jobs/train.py", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--budget" in done.stdout
