"""The progress line of a training run, from the files that its worker writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from birbal_ray.progress import ProgressLine, duration
from birbal_ray.run import read_json
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.curve import read_metrics
from birbal_ray.train.files import METRICS_FILE, STATUS_FILE


class TrainLine:
    """What `birbal train` shows while its worker, maybe on another machine, is at it."""

    def __init__(self, folder: Path, config: TrainConfig, steps_per_epoch: float) -> None:
        self._folder, self._config, self._steps_per_epoch = folder, config, steps_per_epoch
        self._begun = time.monotonic()
        self._warned = False

    def show(self, progress: ProgressLine) -> None:
        """Show the latest state."""
        status_file = self._folder / STATUS_FILE
        if not status_file.exists() or status_file.stat().st_mtime < time.time() - (time.monotonic() - self._begun):
            progress.update(f"loading the model ({duration(time.monotonic() - self._begun)})")
            return
        status = read_json(status_file)
        forecast = status["forecast"]
        wanted = self._config.epochs
        if forecast and forecast["by_budget"] and status["step"] >= 3 and not self._warned:
            self._warned = True
            progress.message(f"{forecast['epochs']:.2g} epochs will fit in the budget; {wanted:g} were asked for")
        progress.update(self._text(status))

    def _text(self, status: dict[str, Any]) -> str:
        metrics = read_metrics(self._folder / METRICS_FILE)
        train = next((line for line in reversed(metrics) if "loss" in line), None)
        evaluation = next((line for line in reversed(metrics) if "eval_loss" in line), None)
        parts = [f"step {status['step']}/{status['max_steps']}", f"epoch {status['epoch']:.2f}"]
        if train:
            parts += [f"loss {train['loss']:.4f}", f"lr {train['learning_rate']:.2e}"]
            if train.get("step_seconds"):
                parts.append(f"{train['tokens'] / train['step_seconds']:.0f} tokens/s")
        if evaluation:
            parts.append(f"eval loss {evaluation['eval_loss']:.4f}")
        forecast = status["forecast"]
        if forecast:
            left = (forecast["num_steps"] - status["step"]) * status["step_seconds"]
            parts.append(f"ends in {duration(left)}{' (budget)' if forecast['by_budget'] else ''}")
        return " · ".join(parts)
