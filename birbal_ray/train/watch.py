"""What happens at every step: evaluate, save, stop, write it down."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from birbal_ray.run import write_atomic, write_json
from birbal_ray.train.files import BEST_FILE, METRICS_FILE, STATUS_FILE
from birbal_ray.train.trainer import ENDS, DeadlineTrainer

BEST_FOLDER = "best"
TELL_SECONDS = 1.0  # between two writes of status.json


class Watch(TrainerCallback):
    """Decides when to evaluate, save and stop; writes down what happens."""

    def __init__(self, trainer: DeadlineTrainer, report: Callable[[dict[str, Any]], None]) -> None:
        self._trainer, self._report = trainer, report
        self._folder = trainer.folder
        self._step_begun: float | None = None
        self._step_seconds = 0.0
        self._tokens_before = 0
        self._told = -math.inf
        best = self._folder / BEST_FILE
        self._best = json.loads(best.read_text())["eval_loss"] if best.exists() else math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what a killed session measured after its last checkpoint; go no further where no step fits."""
        file = self._folder / METRICS_FILE
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        if state.global_step == 0:
            lines = []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
        write_atomic(file, "".join(kept).encode())
        if state.global_step == 0:
            return
        trainer = self._trainer
        trainer.end_after(state.global_step, resumed=True)
        control.should_training_stop = trainer.ended_by is not None
        if trainer.ended_by in ENDS:
            measured = any("eval_loss" in line and line["step"] == state.global_step for line in map(json.loads, kept))
            wanted = self._best == math.inf or trainer.deadline.evaluation_fits()
            args.eval_on_start = not measured and wanted

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step's clock."""
        if self._step_begun is None:
            self._trainer.deadline.clock.start_stepping()
        self._step_begun = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro batch is done."""
        self._trainer.deadline.clock.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Whether to evaluate, to save, to stop."""
        trainer, step = self._trainer, state.global_step
        self._step_seconds = time.monotonic() - (self._step_begun or time.monotonic())
        trainer.deadline.step_took(self._step_seconds)
        trainer.deadline.clock.beat()
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
        with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._trainer.ended_by or "eval_loss" in line or time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self._tell(state)
        self._report(line)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Keep the adapter if it is the best so far. Step 0 is the base model and does not count."""
        self._trainer.deadline.clock.eval_seconds = metrics["eval_runtime"]
        if state.global_step > 0 and metrics["eval_loss"] < self._best:
            self._best = metrics["eval_loss"]
            save_best(self._trainer.model, self._folder, state.global_step, self._best)

    def _tell(self, state: Any) -> None:
        deadline = self._trainer.deadline
        steps_per_epoch = state.max_steps / state.num_train_epochs if state.num_train_epochs else state.max_steps
        every = self._trainer.settings.evaluation.every_steps
        forecast = deadline.forecast(state.global_step, steps_per_epoch, every)
        status = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0}
        clock = deadline.clock
        status |= {"elapsed_seconds": clock.elapsed_seconds, "step_seconds": clock.step_seconds}
        status |= {"eval_seconds": clock.eval_seconds, "save_seconds": clock.save_seconds}
        status["forecast"] = asdict(forecast) if forecast else None
        write_json(self._folder / STATUS_FILE, status)


def save_best(model: Any, folder: Path, step: int, eval_loss: float) -> None:
    """Write the adapter beside the earlier best, point to it, then remove the earlier one."""
    best = folder / BEST_FOLDER
    target, temporary = best / f"step-{step:06d}", best / f".tmp-{os.getpid()}-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    write_json(folder / BEST_FILE, {"step": step, "eval_loss": eval_loss, "folder": f"{BEST_FOLDER}/{target.name}"})
    for other in best.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
