"""The fine-tune on a model of two layers, in this process or one that gets killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from birbal_ray.run import RunError
from birbal_ray.settings import load_config
from birbal_ray.storage import open_folder
from birbal_ray.train.card import draw_loss_curve
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import load_packs, prepare
from birbal_ray.train.files import Remote, all_checkpoints, read_metrics
from tests.fixtures.s3_server import BUCKET
from tests.fixtures.small_training import SMALL_TRAINING

SMALL = {
    **SMALL_TRAINING,
    "checkpoint.keep": 2,
    "resources.device": "cpu",
    "resources.num_threads": 1,
}
STILL = {"lora.dropout": 0.0, "neftune_alpha": 0}


def settings(**changes):
    return load_config(TrainConfig, flags={**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}})


@pytest.fixture(scope="module")
def packed(tiny_model, tiny_mix, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("packed")
    config = settings(epochs=1, evaluation__num_rows=8)
    prepare(tiny_mix, folder / "packed", AutoTokenizer.from_pretrained(tiny_model), config)
    return folder / "packed"


@pytest.fixture
def run_folder(packed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "packed").symlink_to(packed)
    return tmp_path / "run"


def remote(folder):
    """A run folder that the worker works in directly."""
    return Remote(open_folder(folder), folder)


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def make_trainer(config, model, folder, train, evaluation):
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from birbal_ray.train.budget import Clock
    from birbal_ray.train.sft import load_base, sft_config
    from birbal_ray.train.trainer import BudgetTrainer

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return BudgetTrainer(
        config,
        folder,
        Clock(folder / "clock.json"),
        model=load_base(model, config),
        args=sft_config(config, folder),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_packed_samples_do_not_see_each_other(tiny_model, packed, tmp_path, attention, quantization):
    """Training and eval loss of packs equal those of their samples alone, weighted by tokens."""
    import torch
    from datasets import Dataset

    from birbal_ray.train.attention import choose_attention

    packs = Dataset.from_list(list(load_packs(packed, "train"))[:3])
    assert any(len(pack["seq_lengths"]) > 1 for pack in packs)
    alone = []
    for pack in packs:
        start = 0
        for length in pack["seq_lengths"]:
            part = slice(start, start + length)
            alone.append(
                {"input_ids": pack["input_ids"][part], "labels": pack["labels"][part], "seq_lengths": [length]}
            )
            start += length
    config = settings(model__attention=attention, model__quantization=quantization, **STILL)
    trainer = make_trainer(config, tiny_model, tmp_path, packs, packs)
    assert trainer.model.config._attn_implementation == choose_attention(attention)

    together = trainer.evaluate()["eval_loss"]
    apart = trainer.evaluate(Dataset.from_list(alone))["eval_loss"]
    assert together == pytest.approx(apart, rel=1e-5)

    trainer.model.train()
    results = []
    for rows in ([list(packs)], [[row] for row in alone]):
        trainer.model.zero_grad()
        total = torch.tensor(sum(label != -100 for one in rows for row in one for label in row["labels"]))
        summed = 0.0
        for one in rows:
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(one), num_items_in_batch=total)
            loss.backward()
            summed += float(loss.detach())
        gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        results.append((summed, gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][0] == pytest.approx(together, rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)


def test_an_evaluation_leaves_the_gradients_of_a_quantised_model_alone(tiny_model, packed, tmp_path):
    """bitsandbytes has a CPU kernel without a backward pass that an evaluation would switch to."""
    import bitsandbytes
    import torch
    from datasets import Dataset

    packs = Dataset.from_list(list(load_packs(packed, "train"))[:2])
    trainer = make_trainer(settings(**STILL), tiny_model, tmp_path, packs, packs)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what flows into A
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))

    def gradients():
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, trainer.data_collator(list(packs))).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    before = gradients()
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    trainer.evaluate()
    torch.testing.assert_close(gradients(), before)

    # And they are those of the same weights, dequantised.
    for module in list(trainer.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bitsandbytes.nn.Linear4bit):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                weight = bitsandbytes.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                setattr(module, name, plain)
    torch.testing.assert_close(gradients(), before, rtol=1e-3, atol=1e-6)


def test_the_packing_check_would_see_a_leak(tiny_model, packed, tmp_path):
    """Positions that don't restart let samples see each other; then the losses differ."""
    from datasets import Dataset

    packs = Dataset.from_list(list(load_packs(packed, "train"))[:3])
    leaking = [{**pack, "seq_lengths": [sum(pack["seq_lengths"])]} for pack in packs]
    trainer = make_trainer(settings(**STILL), tiny_model, tmp_path, packs, packs)
    whole, joined = trainer.evaluate()["eval_loss"], trainer.evaluate(Dataset.from_list(leaking))["eval_loss"]
    assert abs(whole - joined) > 1e-4


def test_accumulation_is_one_big_batch(tiny_model, run_folder, tmp_path):
    from safetensors.torch import load_file

    from birbal_ray.train.sft import fine_tune

    adapters, curves = [], []
    for name, micro, accumulation in (("micro", 1, 4), ("big", 4, 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "packed").symlink_to(run_folder / "packed")
        config = settings(batch__micro=micro, batch__accumulation=accumulation, max_steps=3, **STILL)
        assert fine_tune(config, tiny_model, folder).ended_by == "max_steps"
        adapters.append(load_file(next((folder / "best").glob("step-*")) / "adapter_model.safetensors"))
        curves.append([loss for _, loss in losses(folder)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert adapters[0].keys() == adapters[1].keys()
    for name, weight in adapters[0].items():
        assert weight.dtype.is_floating_point and weight.element_size() == 4
        assert (weight - adapters[1][name]).abs().max() < 1e-3 * max(1e-2, weight.abs().max())


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.sft import fine_tune

def report(line):
    if line["step"] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

fine_tune(TrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), report)
"""


@pytest.fixture
def one_thread():
    """As a process of its own has: another number of threads may give other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(600)
def test_killed_at_random_steps_and_resumed_repeats_every_loss(one_thread, tiny_model, packed, tmp_path):
    """With dropout, NEFTune and NF4 on; the kills fall between checkpoints."""
    from birbal_ray.train.sft import fine_tune

    config = settings(max_steps=24)
    folders = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "packed").symlink_to(packed)
    fine_tune(config, tiny_model, folders["undisturbed"])
    seed = random.randrange(1 << 30)
    print(f"kill points drawn with seed {seed}")
    rng = random.Random(seed)
    killed = folders["killed"]
    kills = 0
    for point in (rng.randrange(4, 11), rng.randrange(13, 21)):
        program = [sys.executable, "-c", KILLED, config.model_dump_json(), tiny_model, killed, point]
        kills += subprocess.run(list(map(str, program)), capture_output=True).returncode == -signal.SIGKILL
        assert all_checkpoints(killed / "checkpoints"), "a checkpoint every third step"
    fine_tune(config, tiny_model, killed)
    assert kills == 2
    expected = losses(folders["undisturbed"])
    assert [step for step, _ in expected] == list(range(1, 25))
    assert losses(killed) == expected

    def evaluations(folder):
        return [(m["step"], m["eval_loss"]) for m in read_metrics(folder / "metrics.jsonl") if "eval_loss" in m]

    assert evaluations(killed) == evaluations(folders["undisturbed"])
    assert json.loads((killed / "best.json").read_text()) == json.loads(
        (folders["undisturbed"] / "best.json").read_text()
    )
    assert len(all_checkpoints(killed / "checkpoints")) == 2


def test_loss_falls_and_the_best_adapter_is_the_lowest_eval(tiny_model, run_folder):
    from birbal_ray.train.sft import fine_tune

    outcome = fine_tune(settings(epochs=6), tiny_model, run_folder)
    assert outcome.ended_by == "epochs"
    assert outcome.epochs == pytest.approx(6)
    metrics = read_metrics(run_folder / "metrics.jsonl")
    evaluations = {m["step"]: m["eval_loss"] for m in metrics if "eval_loss" in m}
    best = json.loads((run_folder / "best.json").read_text())
    assert best["eval_loss"] == min(loss for step, loss in evaluations.items() if step > 0)
    assert best["eval_loss"] == evaluations[best["step"]] < evaluations[0]
    assert [line for line in metrics if "loss" in line][-1]["learning_rate"] < 0.001 * 5e-3
    assert list((run_folder / "tensorboard").rglob("events.out.tfevents.*"))
    with (run_folder / "loss_curve.png").open("wb") as file:
        draw_loss_curve(metrics, (best["step"], best["eval_loss"]), file)
    assert (run_folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_ends_within_a_tenth_of_it(tiny_model, run_folder, monkeypatch):
    """By a clock on which a step takes 1 s, an evaluation 2 s and a checkpoint half a second."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, TrainerCallback

    from birbal_ray.train import sft, trainer
    from birbal_ray.train.budget import Clock

    now, clocks = [1000.0], []

    def make_clock(file, started):
        clocks.append(Clock(file, lambda: now[0], started))
        return clocks[0]

    class Passes(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now[0] += 1.0

        def on_evaluate(self, *_, **__):
            now[0] += 2.0
            clocks[0].eval_seconds = 2.0

        def on_save(self, *_, **__):
            now[0] += 0.5
            clocks[0].save_seconds = 0.5

    monkeypatch.setattr(sft, "Clock", make_clock)
    for module in (sft, trainer):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    outcome = sft.fine_tune(settings(budget="30s", epochs=100_000), tiny_model, run_folder, callbacks=[Passes()])
    assert outcome.ended_by == "budget"
    assert 27 <= json.loads((run_folder / "clock.json").read_text())["elapsed_seconds"] <= 33
    last = [line for line in read_metrics(run_folder / "metrics.jsonl") if "loss" in line][-1]
    # The last step begins before the deadline: where one takes 1 of 30 s, the cosine is at 0.003 by then.
    assert last["learning_rate"] < 0.01 * 5e-3
    best = json.loads((run_folder / "best.json").read_text())
    assert best["step"] > 0
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run_folder / best["folder"])
    status = json.loads((run_folder / "status.json").read_text())
    assert status["forecast"]["by_budget"]
    assert status["forecast"]["epochs"] < 100_000


def test_resumed_near_its_deadline_a_run_takes_no_further_step(tiny_model, run_folder):
    from birbal_ray.train.sft import fine_tune

    config = settings(budget="1000s", epochs=100_000)
    (run_folder / "stop").touch()
    began = time.monotonic()
    assert fine_tune(config, tiny_model, run_folder).ended_by == "stop"
    took = time.monotonic() - began
    (run_folder / "stop").unlink()
    clock = json.loads((run_folder / "clock.json").read_text())
    parts = [clock[name] for name in ("setup_seconds", "eval_seconds", "save_seconds", "step_seconds")]
    assert min(parts) > 0 and max(parts) < clock["elapsed_seconds"] <= took, "real seconds"
    assert not (run_folder / "best.json").exists()

    # Less is left than an evaluation and a checkpoint take, as the session before had measured them.
    (run_folder / "clock.json").write_text(json.dumps(clock | {"elapsed_seconds": 900.0, "eval_seconds": 95.0}))
    for evaluations in (2, 2):  # the base model's and the last one, which a further restart doesn't repeat
        outcome = fine_tune(config, tiny_model, run_folder)
        assert (outcome.ended_by, outcome.num_steps) == ("budget", 1)
        metrics = read_metrics(run_folder / "metrics.jsonl")
        assert [line["step"] for line in metrics if "loss" in line] == [1]
        assert sum("eval_loss" in line for line in metrics) == evaluations
        assert json.loads((run_folder / "best.json").read_text())["step"] == 1
        (run_folder / "clock.json").write_text(json.dumps(clock | {"elapsed_seconds": 1500.0}))


def test_killed_after_its_last_checkpoint_a_run_has_ended(tiny_model, run_folder):
    """Ended inside an epoch, where transformers would begin another step."""
    from birbal_ray.train.sft import fine_tune

    config = settings(max_steps=5, epochs=100)
    first = fine_tune(config, tiny_model, run_folder)
    assert (first.ended_by, first.num_steps) == ("max_steps", 5)
    assert first.epochs % 1 > 0
    files = {name: (run_folder / name).read_bytes() for name in ("metrics.jsonl", "best.json")}
    assert fine_tune(config, tiny_model, run_folder) == first
    assert {name: (run_folder / name).read_bytes() for name in files} == files


def test_a_run_that_diverges_ends_at_once(tiny_model, run_folder):
    from birbal_ray.train.sft import fine_tune
    from birbal_ray.train.worker import why_diverged

    def report(line):
        if reason := why_diverged(line):
            raise RunError(reason)

    config = settings(optimizer__learning_rate=1e30, optimizer__warmup_steps=0, max_steps=50)
    with pytest.raises(RunError, match=r"not a number since step (\d): the adapter diverged; lower optimizer.learning"):
        fine_tune(config, tiny_model, run_folder, report)
    assert why_diverged({"step": 0, "eval_loss": float("nan")}).startswith("the base model's eval loss is not a number")
    assert why_diverged({"step": 1, "loss": 2.5, "grad_norm": 0.1, "tokens": 9}) is None


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (@@, @@))
"""


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny_model, run_folder):
    """A limit on file sizes stands for the full disk: both make a write fail half-way."""
    from birbal_ray.train.sft import fine_tune

    config = settings(max_steps=6)
    (run_folder / "stop").touch()
    assert fine_tune(config, tiny_model, run_folder).ended_by == "stop"
    (run_folder / "stop").unlink()
    whole = [p.name for p in all_checkpoints(run_folder / "checkpoints")]
    assert whole == ["step-000001"]
    state = {f.name: f.read_bytes() for f in (run_folder / "checkpoints" / whole[-1]).iterdir()}
    script = FULL_DISK.replace("@@", "20000") + KILLED
    never = "-1"  # a step that it does not reach
    process = subprocess.run(
        [sys.executable, "-c", script, config.model_dump_json(), str(tiny_model), str(run_folder), never],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode != 0
    assert re.search(r"File too large|No space", process.stderr)
    assert [p.name for p in all_checkpoints(run_folder / "checkpoints")] == whole
    assert {f.name: f.read_bytes() for f in (run_folder / "checkpoints" / whole[-1]).iterdir()} == state


def test_a_full_disk_is_said_once_whatever_stays_full(tmp_path, monkeypatch):
    """The half checkpoint goes first, so that there is room for the reason; where there is none, the driver gets it."""
    import errno

    from birbal_ray.train import worker

    half = tmp_path / "checkpoints" / ".work"

    def fill(config, fingerprint, remote, started):
        (half / "checkpoint-3").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path, value):
        if half.exists() or full:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(json.dumps(value))

    monkeypatch.setattr(worker, "fine_tune_here", fill)
    monkeypatch.setattr(worker, "log_to", lambda file: None)
    monkeypatch.setattr(worker, "write_json", write)
    full = []
    for _ in range(2):
        assert "no space left on the disk" in worker.run_session(settings(), "", remote(tmp_path), "node", 0.0)["error"]
        assert not half.exists()
        full.append("by others too")
    assert "no space left on the disk" in json.loads((tmp_path / "session.json").read_text())["error"]


def test_errors_that_would_come_again_are_told_from_those_a_restart_mends(tmp_path, monkeypatch):
    import errno

    from birbal_ray.train.worker import lasting_reason

    config = settings(batch__micro=1)
    full = lasting_reason(OSError(errno.ENOSPC, "No space left on device"), tmp_path, config)
    assert "no space left on the disk; the last checkpoint is complete" in full
    assert "no space left" in lasting_reason(
        RuntimeError("SafetensorError: No space left on device (os error 28)"), tmp_path, config
    )

    stopped = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # of torch.save
    assert lasting_reason(stopped, tmp_path, config) is None
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
        assert "no space left" in lasting_reason(stopped, tmp_path, config)

    class OutOfMemoryError(RuntimeError):
        pass

    plain = config.replace({"gradient_checkpointing": False})
    reason = lasting_reason(OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), tmp_path, plain)
    assert "the last checkpoint is kept. The run continues with gradient_checkpointing=true" in reason
    assert "overwrite" not in full + reason, "no advice destroys work"
    assert lasting_reason(RuntimeError("NCCL went away"), tmp_path, config) is None


def test_out_of_memory_continues_with_half_the_micro_batch_and_trains_the_same_tokens(
    tiny_model, packed, tmp_path, monkeypatch
):
    from birbal_ray.train import launch, sft, worker

    class OutOfMemoryError(RuntimeError):
        pass

    def too_large_for(limit):
        real = sft.BudgetTrainer.compute_loss

        def compute_loss(self, model, inputs, *arguments, **options):
            if model.training and self.state.global_step >= 4 and self.args.per_device_train_batch_size > limit:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, model, inputs, *arguments, **options)

        return compute_loss

    config = settings(batch__micro=4, batch__accumulation=1, max_steps=8, checkpoint__every_steps=3, **STILL)
    folders = {name: tmp_path / name for name in ("undisturbed", "eased")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "packed").symlink_to(packed)
    undisturbed, folder = folders.values()
    sft.fine_tune(config, tiny_model, undisturbed)

    monkeypatch.setattr(worker, "log_to", lambda file: None)
    monkeypatch.setattr(
        worker,
        "fine_tune_here",
        lambda config, fingerprint, remote, started: asdict(sft.fine_tune(config, tiny_model, remote.working)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(sft.BudgetTrainer, "compute_loss", too_large_for(1))
        micros = []
        while "eased" in (result := worker.run_session(config, "", remote(folder), "node", 0.0)):
            assert result["eased"] == f"the card ran out of memory at batch.micro={config.batch.micro}"
            config = launch.ease(config, open_folder(folder))
            micros.append((config.batch.micro, config.batch.accumulation))
    assert micros == [(2, 2), (1, 4)]
    assert (result["ended_by"], result["num_steps"]) == ("max_steps", 8)

    def tokens(folder):
        return [(m["step"], m["tokens"]) for m in read_metrics(folder / "metrics.jsonl") if "loss" in m]

    assert tokens(folder) == tokens(undisturbed)
    assert [loss for _, loss in losses(folder)] == pytest.approx([loss for _, loss in losses(undisturbed)], rel=1e-3)

    with monkeypatch.context() as patch:
        patch.setattr(sft.BudgetTrainer, "compute_loss", too_large_for(0))
        (folder / "packed").rename(tmp_path / "packs")
        other = tmp_path / "one"
        other.mkdir()
        (tmp_path / "packs").rename(other / "packed")
        assert (
            "ran out of memory at batch.micro=1" in worker.run_session(config, "", remote(other), "node", 0.0)["error"]
        )


class PagedOptimizer:
    """Stands for bitsandbytes' paged AdamW: the same load_state_dict, buffers that know that they are paged."""

    non_castable_tensor_keys = ("state1", "state2")

    def __init__(self, parameters):
        import torch

        self.parameters = parameters
        self.state = {p: {"step": 3, "state1": torch.ones_like(p), "state2": torch.ones(4)} for p in parameters}

    def get_state_buffer(self, parameter, dtype):
        import torch

        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True
        return buffer

    def load_state_dict(self, state_dict, move_to_device=True):
        self.moved = move_to_device
        self.state = {p: dict(state_dict[n]) for n, p in enumerate(self.parameters)}


def test_paged_optimizer_state_stays_paged_after_a_resume():
    import torch

    from birbal_ray.train.trainer import load_paged_state

    optimizer = PagedOptimizer([torch.zeros(3, 5), torch.zeros(2)])
    saved = {0: {"step": 7, "state1": torch.rand(3, 5), "state2": torch.rand(3, 5), "qmap1": torch.rand(4)}, 1: {}}
    load_paged_state(optimizer, optimizer.load_state_dict, saved)
    assert optimizer.moved is False
    found = optimizer.state[optimizer.parameters[0]]
    assert found["step"] == 7
    for name in ("state1", "state2"):
        assert found[name].is_paged
        assert torch.equal(found[name], saved[0][name])


def test_a_budget_that_ends_before_the_first_step_is_refused_with_the_least_that_works(tiny_model, run_folder):
    from birbal_ray.train.sft import fine_tune

    with pytest.raises(RunError, match=r"budget=1 s ends before the first step: .*set --budget to \d+[sm] or more"):
        fine_tune(settings(budget="1s"), tiny_model, run_folder)


def test_the_reference_beside_an_adapter_is_what_peft_computes(tiny_model, run_folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from birbal_ray.train.sft import fine_tune

    fine_tune(settings(max_steps=4, model__quantization="none"), tiny_model, run_folder)
    best = run_folder / json.loads((run_folder / "best.json").read_text())["folder"]
    reference = json.loads((best / "reference.json").read_text())
    assert (reference["format"], reference["quantization"], len(reference["prompts"])) == (1, "none", 8)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), best).eval()
    changed = 0.0
    for prompt in reference["prompts"]:
        ids = torch.tensor([prompt["token_ids"]])
        with torch.no_grad():
            adapter = model(ids).logits[0, -1].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, -1].log_softmax(-1)
        chosen = prompt["next_token_ids"]
        assert len(chosen) == 20
        assert prompt["adapter_log_probs"] == pytest.approx(adapter[chosen].tolist(), abs=1e-4)
        assert prompt["base_log_probs"] == pytest.approx(base[chosen].tolist(), abs=1e-4)
        changed = max(changed, float((adapter - base).abs().max()))
    assert changed > 1e-3
    checked = json.loads((run_folder / "self_check.json").read_text())
    assert checked["kernel"].startswith("per-sample sdpa")
    assert checked["packed_difference"] < 1e-3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_that_goes_on_is_not_rounded_first(tiny_model, run_folder, tmp_path, s3, quantization):
    """TRL turns trainable weights of a 4-bit model into bfloat16. The adapter is at a URL, as another run left it."""
    import torch
    from safetensors.torch import load_file

    from birbal_ray.train.budget import Clock
    from birbal_ray.train.sft import make_trainer

    changes = {"model__quantization": quantization, "max_steps": 1}
    new = make_trainer(settings(**changes), tiny_model, run_folder, Clock(tmp_path / "clock.json"))
    with torch.no_grad():
        for name, values in new.model.named_parameters():
            if "lora_" in name:
                values.uniform_(-0.1, 0.1)
    new.model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    url = open_folder(f"s3://{BUCKET}/{tmp_path.name}")
    for file in (tmp_path / "adapter").iterdir():
        url.write_bytes(file.name, file.read_bytes())
    config = settings(**changes, lora__from_adapter=url.place)
    trainer = make_trainer(config, tiny_model, run_folder, Clock(tmp_path / "clock.json"))
    found = {n.replace(".default", ""): v for n, v in trainer.model.named_parameters() if v.requires_grad}
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("micro", [1, 4])
def test_noise_on_embeddings_is_that_of_one_sequence(micro, tmp_path):
    from birbal_ray.train.sft import sft_config

    alpha = sft_config(settings(batch__micro=micro, neftune_alpha=5.0), tmp_path).neftune_noise_alpha
    assert alpha / (micro * 128) ** 0.5 == pytest.approx(5.0 / 128**0.5)
    assert sft_config(settings(neftune_alpha=0.0), tmp_path).neftune_noise_alpha is None
