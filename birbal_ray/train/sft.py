"""The fine-tune itself: TRL's SFTTrainer on packed samples, ended by a deadline, resumable."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from transformers.utils.import_utils import is_flash_attn_2_available
from trl import SFTConfig

from birbal_ray.run import read_json
from birbal_ray.train.checkpoints import CHECKPOINTS_FOLDER, WORK_FOLDER, latest_checkpoint
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import PACKED_FOLDER
from birbal_ray.train.deadline import CLOCK_FILE, Clock
from birbal_ray.train.trainer import OUTCOME_FILE, DeadlineTrainer, Outcome
from birbal_ray.train.watch import Watch

TENSORBOARD_FOLDER = "tensorboard"


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
        attn_implementation=attention(config),
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


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The configured dtype; `auto` is bfloat16 on a GPU, float32 on a CPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.model.dtype)


def attention(config: TrainConfig) -> str:
    """The attention implementation in force."""
    if config.model.attention != "auto":
        return config.model.attention
    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def sft_config(config: TrainConfig, folder: Path) -> SFTConfig:
    """Our settings as TRL's. What to save and when to evaluate is decided by our callback."""
    cuda = torch.cuda.is_available()
    optimizer = config.optimizer.name
    if optimizer == "auto":
        optimizer = "paged_adamw_32bit" if cuda else "adamw_torch"
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS_FOLDER / WORK_FOLDER),
        packing=True,
        packing_strategy="bfd",
        max_length=config.batch.sequence_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # `samples.prepare` did
        per_device_train_batch_size=config.batch.micro,
        per_device_eval_batch_size=config.batch.micro,
        gradient_accumulation_steps=config.batch.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        optim=optimizer,
        neftune_noise_alpha=config.neftune_alpha or None,
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


def fine_tune(
    config: TrainConfig,
    model_path: Path,
    folder: Path,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    begun: float | None = None,
) -> Outcome:
    """Train, or go on from the latest checkpoint in `folder`, until the data, the steps or the budget end.

    `folder` holds `packed/` (see `samples.prepare`). Leaves checkpoints/, best/, metrics.jsonl,
    tensorboard/. `report` gets each line of metrics.jsonl; `callbacks` are transformers', asked after
    the run's own. `begun` (time.monotonic) is when the session's part of the budget began; None: now.
    On a CPU, without a budget and with the same number of threads, the losses repeat exactly,
    interrupted or not.

    Where the folder's run has ended already, its outcome is all that happens.
    """
    clock = Clock(folder / CLOCK_FILE, begun=begun)
    clock.beat(force=True)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD_FOLDER)
    shutil.rmtree(folder / CHECKPOINTS_FOLDER / WORK_FOLDER, ignore_errors=True)
    checkpoint = latest_checkpoint(folder / CHECKPOINTS_FOLDER)
    if checkpoint and (checkpoint / OUTCOME_FILE).exists():
        return Outcome(**read_json(checkpoint / OUTCOME_FILE))
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    lora = config.lora
    arguments = sft_config(config, folder)
    arguments.eval_on_start = checkpoint is None
    trainer = DeadlineTrainer(
        config,
        folder,
        clock,
        model=load_base(model_path, config),
        args=arguments,
        train_dataset=load_from_disk(str(folder / PACKED_FOLDER / "train")),
        eval_dataset=load_from_disk(str(folder / PACKED_FOLDER / "eval")),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    watch = Watch(trainer, report)
    for callback in (watch, *callbacks):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    clock.beat(force=True)
    return trainer.outcome()
