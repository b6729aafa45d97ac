"""The fine-tune itself: TRL's SFTTrainer on packed samples, ended by a deadline, resumable.

`fine_tune` makes the trainer and runs it. `BudgetTrainer` is TRL's trainer whose learning rate follows the clock;
`SftCallback` decides after each step whether to evaluate, save or stop, and writes down what happened.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from birbal_ray.models import REFERENCE_FILE, load_tokenizer
from birbal_ray.score.reference import reference_prompts
from birbal_ray.storage import RunError, open_folder, read_json, write_atomic, write_json
from birbal_ray.train.attention import choose_attention, name_kernel
from birbal_ray.train.checkpoints import (
    BEST_FILE,
    BEST_FOLDER,
    CHECKPOINTS_FOLDER,
    METRICS_FILE,
    OUTCOME_FILE,
    PACKED_FOLDER,
    SELF_CHECK_FILE,
    STATUS_FILE,
    TENSORBOARD_FOLDER,
    WORK_FOLDER,
    Remote,
    finish_checkpoint,
    latest_checkpoint,
    read_metrics,
    remove_old,
)
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import IGNORED, PackedSamples, load_packs
from birbal_ray.train.deadline import CLOCK_FILE, Clock, Deadline, learning_rate_factor
from birbal_ray.train.preflight import WRITE_BYTES_PER_SECOND
from birbal_ray.train.self_check import apply_kernels, check_model

ENDS = ("epochs", "max_steps", "budget")
REFERENCE_PROMPTS, REFERENCE_TOKENS = 4, 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a session ended."""

    ended_by: str  # one of ENDS, or stop (asked to; to be continued)
    num_steps: int
    epochs: float
    peak_memory_bytes: int | None  # of torch's allocator; None on a CPU
    peak_device_bytes: int | None = None  # used on the card after a step at most, paged optimizer state included
    attention: str = ""  # the kernel in force
    fused_kernels: str = ""


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
    clock = Clock(folder / CLOCK_FILE, started=started)
    with clock.running():
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD_FOLDER)
        shutil.rmtree(folder / CHECKPOINTS_FOLDER / WORK_FOLDER, ignore_errors=True)
        checkpoint = latest_checkpoint(folder / CHECKPOINTS_FOLDER)
        if checkpoint and (checkpoint / OUTCOME_FILE).exists():
            return Outcome(**read_json(checkpoint / OUTCOME_FILE))
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
    model = load_base(model_path, config)
    peft_config = None
    if lora.from_adapter:
        model = PeftModel.from_pretrained(model, lora.from_adapter, is_trainable=True)
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
        train_dataset=PackDataset(load_packs(folder / PACKED_FOLDER, "train")),
        eval_dataset=PackDataset(load_packs(folder / PACKED_FOLDER, "eval")),
        processing_class=load_tokenizer(model_path),
        peft_config=peft_config,
    )


def record_self_check(trainer: BudgetTrainer) -> None:
    """Check the model (see `self_check`) unless an earlier session did, on the same kernel; leaves self_check.json."""
    file = trainer.folder / SELF_CHECK_FILE
    kernel = f"{trainer.kernel}; fused kernels: {trainer.fused_kernels}"
    if file.exists() and read_json(file)["kernel"] == kernel:
        return
    settings = trainer.settings.model
    found = check_model(trainer.model, compute_dtype(trainer.settings), settings.quantization)
    write_json(file, {"kernel": kernel, **asdict(found)})
    trainer.remote.add(SELF_CHECK_FILE)


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


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The configured dtype; `auto` is bfloat16 on a GPU, float32 on a CPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.model.dtype)


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


class PackDataset(Dataset):
    """Packs of `data.PackedSamples` as the `datasets.Dataset` that TRL asks for."""

    def __init__(self, packs: PackedSamples) -> None:
        super().__init__(pa.table({"pack": range(len(packs))}))
        self.packs = packs

    def __getitem__(self, key: int) -> Any:
        return self.packs[key]

    def __getitems__(self, keys: list[int]) -> list[Any]:
        return [self.packs[key] for key in keys]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.packs)


class BudgetTrainer(SFTTrainer):
    """TRL's trainer: the learning rate follows the clock, the eval loss is per token, checkpoints are complete."""

    def __init__(self, settings: TrainConfig, folder: Path, clock: Clock, **options: Any) -> None:
        self.settings, self.folder = settings, folder
        self.remote = Remote(open_folder(folder), folder)
        budgets = [one for one in (settings.budget, settings.resources.shorter_budget) if one is not None]
        self.deadline = Deadline(min(budgets, default=None), 1, clock)
        self.run_progress = 0.0  # decided once a step: the schedule and the end must agree
        self.ended_by: str | None = None  # as in Outcome; None while the run goes on
        self._progress_step = -1
        self._eval_loss_sum, self._eval_tokens = 0.0, 0
        self._saved_at = time.monotonic()
        super().__init__(**options)
        # TRL turns the adapter into bfloat16, where a step of 2e-5 on a weight of 0.01 is lost in rounding.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        base = self.model.get_base_model()
        text = base.config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        device = next(self.model.parameters()).device
        self.kernel = name_kernel(base.config._attn_implementation, device, compute_dtype(settings), head_size)
        self.fused_kernels = "none"
        self.peak_device_bytes: int | None = None
        self._base_logits: torch.Tensor | None = None
        adapter_bytes = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        clock.best_seconds = clock.best_seconds or adapter_bytes / WRITE_BYTES_PER_SECOND
        clock.save_seconds = clock.save_seconds or 3 * adapter_bytes / WRITE_BYTES_PER_SECOND  # and two Adam states

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's; paged state stays paged when a checkpoint is loaded."""
        optimizer = super().create_optimizer(*arguments, **options)
        if getattr(optimizer, "is_paged", False):
            optimizer.load_state_dict = functools.partial(load_paged_state, optimizer, optimizer.load_state_dict)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Cosine to the deadline, or to the last step where that comes first."""
        self.deadline.total_steps = num_training_steps
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, steps_done: int) -> float:
        if steps_done != self._progress_step:  # asked once for each parameter group
            self._progress_step = steps_done
            clock = self.deadline.clock
            due = clock.eval_seconds * self.eval_due(steps_done) + clock.save_seconds * self.save_due(steps_done)
            self.run_progress = self.deadline.progress(steps_done, due)
        settings = self.settings.optimizer
        return learning_rate_factor(steps_done, self.run_progress, settings.warmup_steps, settings.floor_fraction)

    def end_after(self, step: int, *, resumed: bool = False) -> None:
        """Set `ended_by` when no step may follow this one. `resumed`: its checkpoint was just loaded."""
        if resumed:
            self.run_progress = self.deadline.progress(step)
        if step >= self.state.max_steps:
            self.ended_by = "max_steps" if step == self.settings.max_steps else "epochs"
        elif self.run_progress >= 1.0:
            self.ended_by = "budget"
        elif self.remote.stop_requested():
            self.ended_by = "stop"

    def outcome(self) -> Outcome:
        """How the session ended."""
        return Outcome(
            ended_by=self.ended_by or "epochs",
            num_steps=self.state.global_step,
            epochs=self.state.epoch or 0.0,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            peak_device_bytes=self.peak_device_bytes,
            attention=self.kernel,
            fused_kernels=self.fused_kernels,
        )

    def eval_due(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        return step > 0 and step % self.settings.evaluation.every_steps == 0

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint follows this step."""
        checkpoint = self.settings.checkpoint
        late = time.monotonic() - self._saved_at >= checkpoint.every_minutes * 60
        return step > 0 and (step % checkpoint.every_steps == 0 or late)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Also add the batch's loss up, token by token: Trainer's mean is one of batches."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        num_tokens = int((inputs["labels"] != IGNORED).sum())
        self._eval_loss_sum += float(loss) * num_tokens
        self._eval_tokens += num_tokens
        return loss, logits, labels

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's, with the mean over tokens as the loss."""
        self._eval_loss_sum, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*arguments, **options)
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = self._eval_loss_sum / max(1, self._eval_tokens)
        return output

    def _run_epoch(self, **options: Any) -> None:
        if isinstance(self.train_dataset, PackDataset):
            self.train_dataset.packs.set_epoch(options["epoch"])
        if not self.control.should_training_stop:  # said when training began: nothing is left to do
            super()._run_epoch(**options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        started = time.monotonic()
        super()._save_checkpoint(model, trial)
        checkpoints = self.folder / CHECKPOINTS_FOLDER
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.ended_by in ENDS:
            write_json(written / OUTCOME_FILE, asdict(self.outcome()))
        saved = finish_checkpoint(written, checkpoints)
        remove_old(checkpoints, self.settings.checkpoint.keep)
        self.remote.add(METRICS_FILE, CLOCK_FILE, f"{CHECKPOINTS_FOLDER}/{saved.name}")
        self.remote.prune(self.settings.checkpoint.keep)
        self._saved_at = time.monotonic()
        self.deadline.clock.save_seconds = self._saved_at - started

    def reference(self) -> dict[str, Any]:
        """What the adapter does to a few prompts of the eval split, as PEFT computes it; see docs/fidelity.md.

        `prompts`: of each, `token_ids`, the adapter's 20 likeliest `next_token_ids`, and the log probabilities (nats)
        that the adapter and the base model give to these. `evaluate` compares vLLM's answers with it.
        """
        prompts = self.eval_dataset.packs.prompts(REFERENCE_PROMPTS, REFERENCE_TOKENS)
        lengths = [len(prompt) for prompt in prompts]
        ids = [token for prompt in prompts for token in prompt]
        batch = self.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
        batch.pop("labels")
        inputs = self._prepare_inputs(dict(batch))
        last = torch.tensor(lengths).cumsum(0) - 1  # positions of the prompts' last tokens in the pack

        def logits() -> torch.Tensor:  # (prompts, vocabulary)
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.model(**inputs, use_cache=False).logits[0, last].float().cpu()

        training = self.model.training
        self.model.eval()
        try:
            adapter = logits()
            if self._base_logits is None:
                with self.model.disable_adapter():
                    self._base_logits = logits()
        finally:
            self.model.train(training)
        return {
            "format": 1,
            "quantization": self.settings.model.quantization,
            "dtype": str(compute_dtype(self.settings)).removeprefix("torch."),
            "prompts": reference_prompts(prompts, adapter, self._base_logits),
        }


def load_paged_state(optimizer: Any, load: Callable[..., None], state_dict: dict[str, Any]) -> None:
    """bitsandbytes' `load_state_dict`, but large state goes into paged buffers instead of onto the card.

    bitsandbytes moves it there, where 2.5 GiB of the full recipe would stay resident after a resume.
    """
    load(state_dict, move_to_device=False)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or name not in optimizer.non_castable_tensor_keys:
                continue
            if value.shape == parameter.shape:
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                buffer.copy_(value)
                state[name] = buffer
            else:
                state[name] = value.to(parameter.device)


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
        best = self._folder / BEST_FILE
        self._best = read_json(best)["eval_loss"] if best.exists() else math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what a killed session measured after its last checkpoint; go no further where no step fits."""
        file = self._folder / METRICS_FILE
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
                    f"{deadline.reserve_seconds:.0f} s; set --budget to {math.ceil(deadline.least_budget_seconds())}s "
                    "or more, with another --output"
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
        with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
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
        steps_per_epoch = state.max_steps / state.num_train_epochs if state.num_train_epochs else state.max_steps
        settings = self._trainer.settings
        every = settings.evaluation.every_steps, settings.checkpoint.every_steps
        forecast = deadline.forecast(state.global_step, steps_per_epoch, *every)
        status = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0}
        status |= {"step_seconds": deadline.clock.step_seconds, "forecast": forecast}
        write_json(self._folder / STATUS_FILE, status | self._latest)
        self._trainer.remote.add(STATUS_FILE, CLOCK_FILE)  # the time of a killed session counts elsewhere, too


def save_best(trainer: BudgetTrainer, step: int, eval_loss: float) -> None:
    """Write the adapter and its reference beside the earlier best, point to it, then remove the earlier one."""
    folder = trainer.folder
    best = folder / BEST_FOLDER
    target, temporary = best / f"step-{step:06d}", best / f".tmp-{os.getpid()}-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.model.save_pretrained(temporary, safe_serialization=True)
    write_json(temporary / REFERENCE_FILE, trainer.reference())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    write_json(folder / BEST_FILE, {"step": step, "eval_loss": eval_loss, "folder": f"{BEST_FOLDER}/{target.name}"})
    for other in best.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    trainer.remote.add(f"{BEST_FOLDER}/{target.name}", BEST_FILE, METRICS_FILE)
