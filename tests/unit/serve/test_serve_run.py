"""What `birbal serve` loads, whom it lets in, and how it becomes vLLM's own server."""

from __future__ import annotations

import itertools
import json
import socket

import pytest
from click.testing import CliRunner

from birbal_ray.cli.main import main
from birbal_ray.manifest import FORMAT
from birbal_ray.score.config import ServeConfig
from birbal_ray.serve import run as step
from birbal_ray.settings import ConfigError, load_config
from tests.fixtures.tensors import write_tensors


def config(**values):
    return load_config(ServeConfig, None, [], {"engine.device": "cpu", **values})


def run(*arguments):
    return CliRunner().invoke(main, ["serve", *map(str, arguments)])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "birbal.example"])
def test_an_address_that_others_reach_needs_a_token_or_a_word(host):
    with pytest.raises(ConfigError, match=f"--host {host}: .*--token TOKEN, or --allow-anyone"):
        step.check_access(config(host=host))
    step.check_access(config(host=host, token="t"))
    step.check_access(config(host=host, allow_anyone=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_this_machines_own_addresses_need_none(host):
    step.check_access(config(host=host))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "error: --host 0.0.0.0: other machines reach it"),
        ([], "error: give what to serve: --run runs/train, --model NAME, or --merged DIR"),
        (["--merged", "m", "--model", "x"], "error: --merged is a model of its own"),
        (["--model", "nowhere"], "error: model 'nowhere': no such folder"),
        (["--set", "engine.arguments.seed=1", "--model", "x"], "'seed' can't be set here"),
        (["--openai", "--set", "engine.backend=simulated"], "error: --openai starts vLLM's own server"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_one_line(arguments, message):
    result = run(*arguments, "--port", "0", "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") <= 1


def test_a_run_that_is_not_there_is_wrong_usage():
    result = run("--run", "nowhere", "--port", "0", "--device", "cpu")
    assert result.exit_code == 2
    assert "nowhere: no such folder; expected the output of `birbal train`" in result.stderr


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("--model", "x", "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "in use" in result.stderr


@pytest.fixture
def trained(tmp_path):
    """A model folder, and the output of a training run on it, as far as a server looks at them."""
    model, adapter = tmp_path / "model", tmp_path / "run" / "adapter"
    model.mkdir()
    adapter.mkdir(parents=True)
    shape = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 1024}
    (model / "config.json").write_text(json.dumps(shape))
    write_tensors(model / "model.safetensors", {"model.q_proj.weight": [4, 6]})
    (model / "tokenizer.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 12}))
    write_tensors(adapter / "adapter_model.safetensors", {"base_model.model.model.q_proj.lora_A.weight": [12, 6]})
    return model, tmp_path / "run"


def test_vllms_own_server_gets_model_adapter_and_address(trained):
    model, output = trained
    command = step.openai_command(config(**{"model.name": str(model), "model.adapter": str(output), "token": "secret"}))
    assert command[1:5] == ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]
    options = dict(itertools.pairwise(command))
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8080")
    assert options["--lora-modules"] == f"run={output / 'adapter'}"
    assert (options["--max-model-len"], options["--max-lora-rank"], options["--dtype"]) == ("1024", "16", "float32")
    assert {"--enable-lora", "--enforce-eager", "--no-trust-remote-code"} <= set(command)
    assert "secret" not in " ".join(command)


def test_an_adapter_trained_by_the_chat_template_is_asked_by_it(trained):
    model, output = trained
    prompt = {"format": "chat", "chat_template_arguments": {"enable_thinking": False}}
    manifest = {"format": FORMAT, "step": "train", "identity": {}, "identity_hash": "", "files": {}}
    manifest |= {"model": {"name": str(model), "revision": None}, "settings": {"prompt": prompt}}
    (output / "manifest.json").write_text(json.dumps(manifest))
    assert step.load_served(config(run=str(output))).chat == {"enable_thinking": False}
    options = dict(itertools.pairwise(step.openai_command(config(run=str(output)))))
    assert json.loads(options["--default-chat-template-kwargs"]) == {"enable_thinking": False}
    (output / "manifest.json").write_text(json.dumps(manifest | {"settings": {}}))
    assert step.load_served(config(run=str(output))).chat is None


def test_the_models_own_length_limits_the_servers(trained):
    model, _ = trained
    assert step.load_served(config(**{"model.name": str(model)})).engine.max_model_len == 1024
    assert step.load_served(config(**{"model.name": str(model), "engine.max_model_len": 64})).engine.max_model_len == 64


def test_a_merged_model_is_served_alone(trained):
    model, _ = trained
    served = step.load_served(config(merged=str(model)))
    assert (served.path, served.adapters, served.num_embeddings) == (model, (), 300)
