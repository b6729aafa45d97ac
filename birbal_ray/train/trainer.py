"""TRL's SFTTrainer for packs and a deadline: the learning rate follows the clock, checkpoints are complete."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from trl import SFTTrainer

from birbal_ray.adapters import reference_prompts
from birbal_ray.storage import open_folder, write_json
from birbal_ray.train import files
from birbal_ray.train.attention import name_kernel
from birbal_ray.train.budget import WRITE_BYTES_PER_SECOND, Clock, Deadline, budget_by_clock, learning_rate_factor
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import IGNORED, PackedSamples
from birbal_ray.train.files import Remote, finish_checkpoint, remove_old

ENDS = ("epochs", "max_steps", "budget")
REFERENCE_PROMPTS, REFERENCE_TOKENS = 8, 1024


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


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """The configured dtype; `auto` is bfloat16 on a GPU, float32 on a CPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.model.dtype)


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
        budget = budget_by_clock(settings.budget, settings.resources.end_by, clock)
        self.deadline = Deadline(budget, 1, clock)
        self.run_progress = 0.0  # decided once a step: the schedule and the end must agree
        self.ended_by: str | None = None  # as in Outcome; None while the run goes on
        self._progress_step = -1
        self._eval_loss_sum, self._eval_tokens = 0.0, 0
        self._saved_at = time.monotonic()
        given = [(one, one.data) for name, one in options["model"].named_parameters() if "lora_" in name]
        super().__init__(**options)
        # TRL turns the adapter into bfloat16, where a step of 2e-5 on a weight of 0.01 is lost in rounding.
        for parameter, values in given:
            parameter.data = values
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
        checkpoints = self.folder / files.CHECKPOINTS_FOLDER
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.ended_by in ENDS:
            write_json(written / files.OUTCOME_FILE, asdict(self.outcome()))
        saved = finish_checkpoint(written, checkpoints)
        remove_old(checkpoints, self.settings.checkpoint.keep)
        self.remote.add(files.METRICS_FILE, files.CLOCK_FILE, f"{files.CHECKPOINTS_FOLDER}/{saved.name}")
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
