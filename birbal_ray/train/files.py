"""Names in a training run's folder, for its worker and for all who look at it (no torch here)."""

from __future__ import annotations

METRICS_FILE = "metrics.jsonl"  # one line a step or an evaluation
STATUS_FILE = "status.json"  # how far the worker is, written over
BEST_FILE = "best.json"  # which evaluation was the best, and where its adapter lies
STOP_FILE = "stop"  # asks the worker to save and end
NOT_NEEDED = ("checkpoints", "best", "packed", "tensorboard")  # of a training run, to use its adapter
