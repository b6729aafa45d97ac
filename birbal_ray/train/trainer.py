"""TRL's trainer under a deadline, with an eval loss per token and checkpoints that are whole."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from trl import SFTTrainer

from birbal_ray.run import write_json
from birbal_ray.train.checkpoints import CHECKPOINTS_FOLDER, finish_checkpoint, remove_old
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.data import IGNORED
from birbal_ray.train.deadline import Clock, Deadline, learning_rate_factor
from birbal_ray.train.files import STOP_FILE

OUTCOME_FILE = "outcome.json"  # in the checkpoint that a run ended with
ENDS = ("epochs", "max_steps", "budget")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a session ended."""

    ended_by: str  # one of ENDS, or stop (asked to; to be continued)
    num_steps: int
    epochs: float
    peak_memory_bytes: int | None  # of the device; None on a CPU


class DeadlineTrainer(SFTTrainer):
    """SFTTrainer whose learning rate follows the clock, whose eval loss is per token, whose checkpoints are whole."""

    def __init__(self, settings: TrainConfig, folder: Path, clock: Clock, **options: Any) -> None:
        self.settings, self.folder = settings, folder
        self.deadline = Deadline(settings.budget, 1, clock)
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Cosine to the deadline, or to the last step where that comes first."""
        self.deadline.total_steps = num_training_steps
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, steps_done: int) -> float:
        if steps_done != self._progress_step:  # asked once for each parameter group
            self._progress_step = steps_done
            self.run_progress = self.deadline.progress(steps_done, self._due_seconds(steps_done))
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
        elif (self.folder / STOP_FILE).exists():
            self.ended_by = "stop"

    def outcome(self) -> Outcome:
        """How the session ended."""
        return Outcome(
            ended_by=self.ended_by or "epochs",
            num_steps=self.state.global_step,
            epochs=self.state.epoch or 0.0,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        )

    def _due_seconds(self, step: int) -> float:
        clock = self.deadline.clock
        return clock.eval_seconds * self.eval_due(step) + clock.save_seconds * self.save_due(step)

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
        self.deadline.clock.beat()
        return loss, logits, labels

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Trainer's, with the mean over tokens as the loss."""
        self._eval_loss_sum, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*arguments, **options)
        prefix = options.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = self._eval_loss_sum / max(1, self._eval_tokens)
        return output

    def _run_epoch(self, **options: Any) -> None:
        if not self.control.should_training_stop:  # said when training began: nothing is left to do
            super()._run_epoch(**options)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        begun = time.monotonic()
        super()._save_checkpoint(model, trial)
        checkpoints = self.folder / CHECKPOINTS_FOLDER
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.ended_by in ENDS:
            write_json(written / OUTCOME_FILE, asdict(self.outcome()))
        finish_checkpoint(written, checkpoints)
        remove_old(checkpoints, self.settings.checkpoint.keep)
        self._saved_at = time.monotonic()
        self.deadline.clock.save_seconds = self._saved_at - begun
