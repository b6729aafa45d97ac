"""What only a card can show: kernels, memory, speed and recovery of the full recipe on a model of Mistral-7B's shape.

Needs an NVIDIA GPU of 24 GB or more, 16 GB of main memory, 35 GB of disk for a while; no network, no weights; about 20
minutes by arithmetic:

    make setup && .venv/bin/python -m pytest -s tests/gpu

A larger card is capped to what an RTX 4090 reports. The figures go to gpu-results.json and are printed as a table;
docs/decisions/0023 has room for them. Nobody has run this yet: no card was at hand when it was written. What needs no
card of it runs in tests/training/test_gpu_suite.py.
"""

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from birbal_ray.settings import load_config
from birbal_ray.storage import open_folder
from birbal_ray.train import preflight
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import prepare
from birbal_ray.train.files import Remote, read_metrics
from tests.conftest import REPOSITORY, make_mix
from tests.fixtures.random_model import write_random_model

pytestmark = pytest.mark.gpu
CARD_BYTES = int(23.6 * preflight.GIB)
RESULTS_FILE = Path("gpu-results.json")
KERNEL = "varlen FlashAttention of torch"
MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def results():
    """Figures by name; written and printed when the last test has ended."""
    found: dict[str, Any] = {}
    yield found
    if found:
        write_results(found)


def write_results(found):
    RESULTS_FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{'figure':52} value")
    for name, value in found.items():
        print(f"{name:52} {value}")
    print(f"written to {RESULTS_FILE.resolve()}")


def free_card():
    """Collect trainers, which refer to what refers to them, so that the next test has the card's memory."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def card(results):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the worker has it
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # as Ray gives it one card
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch sees none here")
    total = torch.cuda.get_device_properties(0).total_memory
    if total < 0.97 * CARD_BYTES:
        pytest.skip(f"needs a card of 24 GB, this one has {total / preflight.GIB:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total))
    results["card"] = torch.cuda.get_device_name(0)
    results["card reports, GiB"] = round(total / preflight.GIB, 2)
    return results["card"]


@pytest.fixture(scope="module")
def mistral(card, tiny_model, tmp_path_factory):
    from transformers import MistralConfig

    folder = tmp_path_factory.mktemp("mistral")
    write_random_model(folder, MistralConfig(**MISTRAL_7B))
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def packed(card, tiny_model, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("packs")
    (folder / "mix").mkdir()
    make_mix(folder / "mix", 12_000, 400)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    packing = prepare(folder / "mix", folder / "packed", tokenizer, recipe(tiny_model, epochs=1))
    assert packing["train"].num_packs >= 24  # 3 steps of 2 x 4
    return folder / "packed"


def recipe(model, **changes):
    flags = {"model.name": str(model), "max_steps": 3, "evaluation.num_rows": 40, **changes}
    config = load_config(TrainConfig, REPOSITORY / "configs" / "train" / "mistral-7b-qlora.yaml", flags=flags)
    return config.model_copy(update={"budget": None})


@pytest.fixture
def folder(packed, tmp_path):
    """A run folder with the packs; removed afterwards: a checkpoint of the full recipe takes 4 GB."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "packed").symlink_to(packed)
    yield run
    shutil.rmtree(run)
    free_card()


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_varlen_kernel_equals_attention_sample_by_sample(card, results, window, kv_heads):
    """Outputs and gradients in bfloat16, against the same inputs in float32 through the fallback."""
    import torch

    from birbal_ray.train.attention import packed_attention, per_sample_attention, why_not_varlen

    device = torch.device("cuda", 0)
    assert why_not_varlen(device, torch.bfloat16, 128) is None
    lengths = [2048, 1, 777, 4096, 1270]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    torch.manual_seed(0)
    shapes = ((8, 128), (kv_heads, 128), (kv_heads, 128))
    exact = [torch.randn(sum(lengths), *shape, device=device) for shape in shapes]
    found = [x.to(torch.bfloat16).transpose(0, 1)[None].requires_grad_() for x in exact]
    wanted = [x.requires_grad_() for x in exact]
    query, key, value = found
    output, _ = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        sliding_window=window,
        is_causal=True,
        cu_seq_lens_q=borders,
        max_length_q=max(lengths),
    )
    expected = per_sample_attention(wanted[0], wanted[1], wanted[2], borders.tolist(), None, window)
    output.float().square().sum().backward()
    expected.square().sum().backward()
    worst = float((output[0].float() - expected).abs().max())
    slopes = max(
        float((a.grad[0].transpose(0, 1).float() - b.grad).norm() / b.grad.norm())
        for a, b in zip(found, wanted, strict=True)
    )
    results[f"kernel: window {window}, {kv_heads} kv heads: output, gradient"] = [round(worst, 4), round(slopes, 4)]
    assert worst < 0.05
    assert slopes < 0.03


def test_the_self_check_passes_on_the_card(card, results, mistral, folder):
    from birbal_ray.train.budget import Clock
    from birbal_ray.train.sft import make_trainer, record_self_check

    trainer = make_trainer(recipe(mistral), mistral, folder, Clock(folder / "clock.json"))
    record_self_check(trainer)
    checked = json.loads((folder / "self_check.json").read_text())
    assert checked["kernel"].startswith(KERNEL)
    results["self-check"] = {name: round(x, 5) if isinstance(x, float) else x for name, x in checked.items()}


def test_peak_memory_is_what_the_preflight_says_and_a_resume_stays_paged(card, results, mistral, folder):
    """Before other trainings: bitsandbytes frees no paged optimizer state while its process lives."""
    import torch

    from birbal_ray.train.sft import fine_tune

    config = recipe(mistral, **{"checkpoint.every_steps": 1, "checkpoint.keep": 2})
    shapes = preflight.shapes_of(mistral, config.lora.target_modules)
    parts = preflight.estimate(shapes, config)
    estimate = preflight.total_bytes(parts)
    torch.cuda.reset_peak_memory_stats()
    outcome = fine_tune(config, mistral, folder)
    assert outcome.peak_memory_bytes and outcome.peak_device_bytes, "measured on a card"
    last = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line][-1]
    results |= {
        "memory by part, GiB": {part.part: round(part.num_bytes / preflight.GIB, 2) for part in parts},
        "memory estimated, GiB": round(estimate / preflight.GIB, 2),
        "memory at its peak by torch, GiB": round(outcome.peak_memory_bytes / preflight.GIB, 2),
        "memory at its peak by the card, GiB": round(outcome.peak_device_bytes / preflight.GIB, 2),
        "tokens/s, attention=auto, micro 2": round(last["tokens"] / last["step_seconds"]),
        "checkpoint, seconds": json.loads((folder / "clock.json").read_text())["save_seconds"],
    }
    assert outcome.attention == KERNEL
    assert outcome.peak_device_bytes <= 1.05 * estimate, "the preflight promises too much"
    assert outcome.peak_device_bytes >= 0.6 * estimate, "the preflight refuses what would fit"

    # The checkpoint of step 2, continued to step 4.
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    free_card()
    torch.cuda.reset_peak_memory_stats()
    resumed = fine_tune(config.model_copy(update={"max_steps": 4}), mistral, folder)
    assert resumed.peak_memory_bytes
    results["memory after a resume by torch, GiB"] = round(resumed.peak_memory_bytes / preflight.GIB, 2)
    assert resumed.num_steps == 4
    # torch counts state that was loaded into ordinary memory, and none that is paged.
    assert resumed.peak_memory_bytes <= outcome.peak_memory_bytes + preflight.GIB // 2, "the optimizer is not paged"


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_tokens_a_second_of_each_kernel(card, results, mistral, folder, attention):
    from birbal_ray.train.sft import fine_tune

    # A dense mask over two packs of 8,192 does not fit: one pack at a time for both.
    config = recipe(mistral, **{"model.attention": attention, "batch.micro": 1, "batch.accumulation": 8})
    fine_tune(config, mistral, folder)
    last = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line][-1]
    results[f"tokens/s, attention={attention}, micro 1"] = round(last["tokens"] / last["step_seconds"])


def test_out_of_memory_eases_to_half_the_micro_batch(card, results, mistral, folder, monkeypatch):
    """On a card capped between what micro 1 and micro 2 need, a run at micro 2 trains the same number of tokens."""
    from dataclasses import asdict

    import torch

    from birbal_ray.train import launch, sft, worker

    config = recipe(mistral)
    small = recipe(mistral, **{"batch.micro": 1, "batch.accumulation": 8})
    shapes = preflight.shapes_of(mistral, config.lora.target_modules)
    # What torch's allocator holds: paged optimizer state and the context lie outside.
    outside = ("optimizer", "CUDA context")
    needs = [
        sum(part.num_bytes for part in parts if part.part not in outside)
        for parts in (preflight.estimate(shapes, one) for one in (small, config))
    ]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, sum(needs) / 2 / total))
    monkeypatch.setattr(worker, "log_to", lambda file: None)
    monkeypatch.setattr(
        worker,
        "fine_tune_here",
        lambda config, fingerprint, remote, started: asdict(sft.fine_tune(config, mistral, remote.working)),
    )
    first = worker.run_session(config, "", Remote(open_folder(folder), folder), "node", 0.0)
    assert first["eased"].startswith("the card ran out of memory at batch.micro=2")
    free_card()
    eased = launch.ease(config, open_folder(folder))
    assert (eased.batch.micro, eased.batch.accumulation) == (1, 8)
    done = worker.run_session(eased, "", Remote(open_folder(folder), folder), "node", 0.0)
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total))
    assert done["num_steps"] == 3
    results["out of memory"] = first["eased"]
