"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from birbal_ray.run import write_atomic


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a half-written last line is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def smoothed(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, correction, result = 0.0, 0.0, []
    for value in values:
        average, correction = weight * average + (1 - weight) * value, weight * correction + (1 - weight)
        result.append(average / correction)
    return result


def draw_loss_curve(metrics: list[dict[str, Any]], best_step: int | None, file: Path) -> None:
    """PNG of train and eval loss over steps, the best adapter's evaluation marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    evaluations = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = [step for step, _ in train], [loss for _, loss in train]
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="train loss, each step")
        axes.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=1.8, label="train loss, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#d0661b", marker="o", markersize=4, label="eval loss")
    for step, loss in evaluations:
        if step == best_step:
            axes.plot(step, loss, marker="*", markersize=15, color="#2e8b3d", linestyle="none", label="best adapter")
            axes.annotate(f"{loss:.4f}", (step, loss), textcoords="offset points", xytext=(0, 10), ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_atomic(file, picture.getvalue())
