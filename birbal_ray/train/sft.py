"""The fine-tune itself: TRL's SFTTrainer on packed samples, ended by a deadline, resumable.

`fine_tune` makes the trainer and runs it (`trainer.py` beside it: a learning rate that follows the clock, complete
checkpoints). `SftCallback` decides after each step whether to evaluate, save or stop, and writes down what happened.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig

from birbal_ray.models import load_tokenizer
from birbal_ray.schemas import REFERENCE_FILE
from birbal_ray.settings import write_duration
from birbal_ray.storage import RunError, input_folder, read_json, write_atomic, write_json
from birbal_ray.train import files
from birbal_ray.train.attention import choose_attention
from birbal_ray.train.budget import Clock
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import count_steps, load_packs
from birbal_ray.train.files import Remote, latest_checkpoint, read_metrics
from birbal_ray.train.self_check import apply_kernels, check_model
from birbal_ray.train.trainer import ENDS, BudgetTrainer, Outcome, PackDataset, compute_dtype


def fine_tune(
    config: TrainConfig,
    model_path: Path,
    folder: Path,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    started: float | None = None,
    remote: Remote | None = None,
) -> Outcome:
    """Train, or go on from the latest checkpoint in `folder`, until the data, the steps or the budget end.

    `folder` holds `packed/` (see `data.prepare`). Leaves checkpoints/, best/, metrics.jsonl,
    tensorboard/. `report` gets each line of metrics.jsonl; `callbacks` are transformers', asked after
    the run's own. `started` (time.monotonic) is when the session's part of the budget began; None: now.
    On a CPU, without a budget and with the same number of threads, the losses repeat exactly,
    interrupted or not.

    Where the folder's run has ended already, its outcome is all that happens.
    """
    clock = Clock(folder / files.CLOCK_FILE, started=started)
    with clock.running():
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / files.TENSORBOARD_FOLDER)
        shutil.rmtree(folder / files.CHECKPOINTS_FOLDER / files.WORK_FOLDER, ignore_errors=True)
        checkpoint = latest_checkpoint(folder / files.CHECKPOINTS_FOLDER)
        if checkpoint and (checkpoint / files.OUTCOME_FILE).exists():
            return Outcome(**read_json(checkpoint / files.OUTCOME_FILE))
        trainer = make_trainer(config, model_path, folder, clock)
        trainer.remote = remote or trainer.remote
        trainer.fused_kernels = apply_kernels(trainer.model, compute_dtype(config), config.kernels)
        record_self_check(trainer)
        trainer.args.eval_on_start = checkpoint is None
        for callback in (SftCallback(trainer, report), *callbacks):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.outcome()


def make_trainer(config: TrainConfig, model_path: Path, folder: Path, clock: Clock) -> BudgetTrainer:
    """The trainer on the packs in `folder`, its model loaded, with a new adapter or the one of `lora.from_adapter`."""
    lora = config.lora
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every training to its makers otherwise
    model = load_base(model_path, config)
    peft_config = None
    if lora.from_adapter:
        model = PeftModel.from_pretrained(model, input_folder(lora.from_adapter), is_trainable=True)
    else:
        peft_config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            task_type="CAUSAL_LM",
        )
    return BudgetTrainer(
        config,
        folder,
        clock,
        model=model,
        args=sft_config(config, folder),
        train_dataset=PackDataset(load_packs(folder / files.PACKED_FOLDER, "train")),
        eval_dataset=PackDataset(load_packs(folder / files.PACKED_FOLDER, "eval")),
        processing_class=load_tokenizer(model_path),
        peft_config=peft_config,
    )


def record_self_check(trainer: BudgetTrainer) -> None:
    """Check the model (see `self_check`) unless an earlier session did, on the same kernel; leaves self_check.json."""
    file = trainer.folder / files.SELF_CHECK_FILE
    kernel = f"{trainer.kernel}; fused kernels: {trainer.fused_kernels}"
    if file.exists() and read_json(file)["kernel"] == kernel:
        return
    settings = trainer.settings.model
    found = check_model(trainer.model, compute_dtype(trainer.settings), settings.quantization)
    write_json(file, {"kernel": kernel, **asdict(found)})
    trainer.remote.add(files.SELF_CHECK_FILE)


def load_base(path: Path, config: TrainConfig) -> Any:
    """The base model on this process's device, quantised as configured."""
    cuda = torch.cuda.is_available()
    dtype = compute_dtype(config)
    quantization = None
    if config.model.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=choose_attention(config.model.attention),
        device_map={"": 0 if cuda else "cpu"},
        trust_remote_code=False,
        use_safetensors=True,
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weights in the first evaluation for a kernel
        # without a backward pass; training after it would silently lose the gradients of all layers below.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def sft_config(config: TrainConfig, folder: Path) -> SFTConfig:
    """Our settings as TRL's. What to save and when to evaluate is decided by our callback."""
    cuda = torch.cuda.is_available()
    optimizer = config.optimizer.name
    if optimizer == "auto":
        optimizer = "paged_adamw_32bit" if cuda else "adamw_torch"
    return SFTConfig(
        output_dir=str(folder / files.CHECKPOINTS_FOLDER / files.WORK_FOLDER),
        packing=True,
        packing_strategy="bfd",
        max_length=config.batch.sequence_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # `data.prepare` did
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # every epoch's packs are laid out in their order
        per_device_train_batch_size=config.batch.micro,
        per_device_eval_batch_size=config.batch.micro,
        gradient_accumulation_steps=config.batch.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        optim=optimizer,
        # transformers divides by the root of the micro batch's tokens, which TRL lays out as one row: per pack, then.
        neftune_noise_alpha=(config.neftune_alpha or 0.0) * math.sqrt(config.batch.micro) or None,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=cuda and compute_dtype(config) == torch.bfloat16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=["tensorboard", *config.trackers],
        disable_tqdm=True,
        seed=config.seed,
    )


class SftCallback(TrainerCallback):
    """Decides when to evaluate, save and stop; writes down what happens."""

    def __init__(self, trainer: BudgetTrainer, report: Callable[[dict[str, Any]], None]) -> None:
        self._trainer, self._report = trainer, report
        self._folder = trainer.folder
        self._step_started: float | None = None
        self._step_seconds = 0.0
        self._tokens_before = 0
        self._status_written = -math.inf
        self._latest: dict[str, Any] = {"train": None, "evaluation": None}  # lines of metrics.jsonl
        self._best = math.inf
        if (self._folder / files.BEST_FILE).exists():
            best = read_json(self._folder / files.BEST_FILE)
            if (self._folder / best["folder"] / REFERENCE_FILE).exists():  # the last file of a complete one
                self._best = best["eval_loss"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what a killed session measured after its last checkpoint; go no further where no step fits."""
        file = self._folder / files.METRICS_FILE
        lines = read_metrics(file) if state.global_step > 0 else []
        kept = [line for line in lines if line["step"] <= state.global_step]
        write_atomic(file, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        if state.global_step == 0:
            return
        trainer = self._trainer
        trainer.end_after(state.global_step, resumed=True)
        control.should_training_stop = trainer.ended_by is not None
        if trainer.ended_by in ENDS:
            measured = any("eval_loss" in line and line["step"] == state.global_step for line in kept)
            wanted = self._best == math.inf or trainer.deadline.evaluation_fits()
            args.eval_on_start = not measured and wanted

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock. Raises RunError where the budget ends before the first step of the run."""
        deadline = self._trainer.deadline
        if self._step_started is None:
            deadline.clock.start_stepping()
            if state.global_step == 0 and deadline.remaining_seconds() <= 0:
                raise RunError(
                    f"budget={deadline.budget_seconds:.0f} s ends before the first step: loading and the first "
                    f"evaluation took {deadline.clock.setup_seconds:.0f} s, the last evaluation and checkpoint need "
                    f"{deadline.reserve_seconds:.0f} s; set --budget to "
                    f"{write_duration(deadline.least_budget_seconds())} or more, with another --output"
                )
        self._step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Whether to evaluate, to save, to stop."""
        trainer, step = self._trainer, state.global_step
        self._step_seconds = time.monotonic() - (self._step_started or time.monotonic())
        trainer.deadline.step_took(self._step_seconds)
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            trainer.peak_device_bytes = max(trainer.peak_device_bytes or 0, total - free)
        trainer.end_after(step)
        control.should_log = True
        control.should_evaluate = trainer.eval_due(step) or trainer.ended_by in ENDS
        control.should_save = trainer.save_due(step) or trainer.ended_by is not None
        control.should_training_stop = trainer.ended_by is not None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line in metrics.jsonl for each step or evaluation."""
        logs = dict(logs or {})
        clock = self._trainer.deadline.clock
        line: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch or 0.0}
        if "eval_loss" in logs:
            line |= {"eval_loss": logs["eval_loss"], "eval_seconds": logs.get("eval_runtime")}
        elif "loss" in logs:
            seen = int(logs.get("num_tokens", 0))  # since the session began
            tokens, self._tokens_before = seen - self._tokens_before, seen
            line |= {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            line |= {"step_seconds": self._step_seconds, "tokens": tokens}
        else:
            return  # the summary at the end
        line["elapsed_seconds"] = clock.elapsed_seconds
        self._latest["evaluation" if "eval_loss" in line else "train"] = line
        with (self._folder / files.METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        due = time.monotonic() - self._status_written > self._trainer.remote.status_seconds
        if self._trainer.ended_by or "eval_loss" in line or due:
            self._status_written = time.monotonic()
            self._write_status(state)
        self._report(line)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Keep the adapter if it is the best so far. Step 0 is the base model and does not count."""
        self._trainer.deadline.clock.eval_seconds = metrics["eval_runtime"]
        if state.global_step > 0 and metrics["eval_loss"] < self._best:
            self._best = metrics["eval_loss"]
            started = time.monotonic()
            save_best(self._trainer, state.global_step, self._best)
            self._trainer.deadline.clock.best_seconds = time.monotonic() - started

    def _write_status(self, state: Any) -> None:
        deadline = self._trainer.deadline
        settings = self._trainer.settings
        steps_per_epoch = count_steps(len(self._trainer.train_dataset), settings.batch)
        every = settings.evaluation.every_steps, settings.checkpoint.every_steps
        forecast = deadline.forecast(state.global_step, steps_per_epoch, *every)
        status = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0}
        status |= {"step_seconds": deadline.clock.step_seconds, "forecast": forecast}
        write_json(self._folder / files.STATUS_FILE, status | self._latest)
        # The time of a killed session counts elsewhere, too.
        self._trainer.remote.add(files.STATUS_FILE, files.CLOCK_FILE)


def save_best(trainer: BudgetTrainer, step: int, eval_loss: float) -> None:
    """Write the adapter and its reference beside the earlier best, point to it, then remove the earlier one."""
    folder = trainer.folder
    best = folder / files.BEST_FOLDER
    target, temporary = best / f"step-{step:06d}", best / f".tmp-{os.getpid()}-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.model.save_pretrained(temporary, safe_serialization=True)
    write_json(temporary / REFERENCE_FILE, trainer.reference())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    name = f"{files.BEST_FOLDER}/{target.name}"
    write_json(folder / files.BEST_FILE, {"step": step, "eval_loss": eval_loss, "folder": name})
    for other in best.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    trainer.remote.add(name, files.BEST_FILE, files.METRICS_FILE)
