"""A small complete run folder (score, mix, train, evaluate) in the layout that the steps write, in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.config.mix import MixConfig
from birbal_ray.config.score import ScoreConfig
from birbal_ray.config.train import TrainConfig
from birbal_ray.contracts import (
    COMPARISONS,
    COMPARISONS_FILE,
    EVALUATION,
    EVALUATION_FILE,
    ROWS_FOLDER,
    TASK_SCORES,
    TASK_SCORES_FILE,
)
from birbal_ray.mix.synthetic import made_up_rows, write_score_folder
from birbal_ray.ni.metrics import mean_interval
from birbal_ray.run import MANIFEST_FILE, finish_run, read_json, start_run, write_json, write_parquet
from birbal_ray.steps.mix import mix

NASTY = "<script>alert('$x_1$ & \"y\"')</script>"  # a task, a model, a source may be called anything


def make_run(folder: Path, *, num_tasks: int = 8, adapters: tuple[str, ...] = ("adapter",), gain: float = 0.15) -> Path:
    """All four steps in `folder`; one task and the model have NASTY in their names. The same for the same arguments."""
    rows = made_up_rows(num_tasks, 60, seed=1)
    for row in rows:
        if row["task"].startswith("task0003"):
            row["task"] = f"task0003_{NASTY}".replace("/", "|")  # a task's name is a file's name
    make_score(folder / "score", rows)
    notes = folder.parent / "notes.jsonl"
    lines = [{"q": f"What is written on page {n} of the notes?", "a": f"word {n}"} for n in range(30)]
    notes.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = {"name": "notes", "path": str(notes), "columns": {"input": "q", "output": "a"}, "license": NASTY}
    settings = {"exact_match_budget": 90, "generation_budget": 90, "allow_shortfall": True}
    where = {"scores": str(folder / "score"), "output": str(folder / "mix")}
    mix(MixConfig(**where, task_score=settings, eval_fraction=0.1, sources=[{**source, "max_rows": 20}]))
    make_train(folder / "train", read_json(folder / "mix" / MANIFEST_FILE))
    make_evaluation(folder / "evaluate", rows, adapters, gain)
    return folder


def make_score(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A score run with intervals and everything that a real run's manifest says."""
    import pyarrow.dataset as pads

    write_score_folder(folder, rows, model=NASTY)
    written = pads.dataset(folder / ROWS_FOLDER, format="parquet").to_table(columns=["task", "label", "score"])
    values: dict[tuple[str, str], list[float | None]] = {}
    for row in written.to_pylist():
        values.setdefault((row["task"], row["label"]), []).append(row["score"])
    tasks = [_task_score(task, label, scores) for (task, label), scores in sorted(values.items())]
    write_parquet(folder / TASK_SCORES_FILE, pa.Table.from_pylist(tasks, schema=TASK_SCORES))
    scored = sum(task["num_scored"] for task in tasks)
    write_json(
        folder / MANIFEST_FILE,
        {
            **read_json(folder / MANIFEST_FILE),
            "settings": ScoreConfig(output=str(folder)).model_dump(),
            "model": {"name": NASTY, "revision": "0123abc"},
            "rows": {"available": len(rows), "planned": len(rows), "scored": scored, "errors": {}},
            "files": {"quarantined": [], "excluded": []},
            "repairs": {},
            "tokens": {"prompt": 123_456, "cached": 101_234, "completion": 4321, "cached_fraction": 101_234 / 123_456},
            "wall_seconds": 12.345,
            "num_sessions": 1,
            "last_session": {},
        },
    )


def make_train(folder: Path, mix_manifest: dict[str, Any], num_steps: int = 40) -> None:
    """A train run: losses, and a manifest with the keys of `steps.train`."""
    folder.mkdir(parents=True)
    start_run(folder, "train", {"made": "up for training"})
    settings = TrainConfig(mix="mix", output="train", budget=3600, seed=3).model_dump(mode="json")
    rng = random.Random(0)
    lines: list[dict[str, Any]] = []
    evaluations = {step: 1.9 + 1.4 * 0.93**step + max(0, step - 30) * 0.01 for step in range(0, num_steps + 1, 5)}
    for step in range(num_steps + 1):
        seen = {"step": step, "epoch": step / 20}
        if step:
            loss = {"loss": 2 + 1.5 * 0.93**step + rng.uniform(-0.2, 0.2), "grad_norm": 1.0, "step_seconds": 2.0}
            lines.append({**seen, **loss, "learning_rate": 2e-5 * (1 - step / 41), "tokens": 900})
        if step in evaluations:
            lines.append({**seen, "eval_loss": evaluations[step], "eval_seconds": 1.0, "elapsed_seconds": step * 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    best = min((step for step in evaluations if step), key=evaluations.__getitem__)
    packing = {"num_rows": 180, "num_long": 2, "num_samples": 178, "num_tokens": 18_000, "num_loss_tokens": 2_000}
    packing |= {"num_packs": 20, "packing_efficiency_fraction": 18_000 / (20 * 1024)}
    finish_run(
        folder,
        {
            "settings": settings,
            "seed": 3,
            "model": {"name": "smollm2-135m", "revision": None, "path": "models/smollm2-135m"},
            "mix": {"path": "mix", "identity_hash": mix_manifest["identity_hash"]},
            "packing": {"train": packing, "eval": {**packing, "num_samples": 20}},
            "rows": {"train": 180, "kept": 178, "dropped": {"too_long": 2}},
            "result": {
                **{"ended_by": "budget", "num_steps": num_steps, "epochs": num_steps / 20, "peak_memory_bytes": None},
                "train_tokens": 900 * num_steps,
                "base_eval_loss": evaluations[0],
                "best_eval_loss": evaluations[best],
                "best_step": best,
                "elapsed_seconds": 3456.789,
                "setup_seconds": 12.3,
            },
        },
    )


def make_evaluation(folder: Path, rows: list[dict[str, Any]], adapters: tuple[str, ...], gain: float) -> None:
    """Base model and adapters on every task in two prompt formats; the last two tasks are held out."""
    folder.mkdir(parents=True)
    start_run(folder, "evaluate", {"made": "up for evaluation"})
    tasks = sorted({(row["task"], row["label"]) for row in rows})
    found = []
    for prompt_format in ("zero_shot", "few_shot"):
        for number, contender in enumerate(("base", *adapters)):
            for place, (task, label) in enumerate(tasks):
                rng = random.Random(f"{prompt_format} {task} {number}")
                mean = (place + 0.5) / len(tasks) * 0.8 + number * gain + rng.uniform(-0.05, 0.05)
                exact = label == "exact_match"
                draws = [rng.random() for _ in range(23)]
                scores = [float(draw < mean) if exact else min(1, max(0, mean + draw / 2 - 0.25)) for draw in draws]
                found.append(
                    {
                        "contender": contender,
                        "kind": "adapter" if number else "base",
                        "prompt_format": prompt_format,
                        "held_out": "task" if place >= len(tasks) - 2 else "instances",
                        **_task_score(task, label, [*scores, None] if place == 1 else scores),
                    }
                )
    write_parquet(folder / EVALUATION_FILE, pa.Table.from_pylist(found, schema=EVALUATION))
    compared = [
        _comparison(found, contender, prompt_format, scope)
        for contender in adapters
        for prompt_format in ("zero_shot", "few_shot")
        for scope in ("all", "exact_match", "generation", "held-out tasks", "held-out instances")
    ]
    write_parquet(folder / COMPARISONS_FILE, pa.Table.from_pylist(compared, schema=COMPARISONS))
    finish_run(
        folder,
        {
            "settings": {"seed": 7},
            "model": {"name": "smollm2-135m", "revision": None},
            "contenders": [
                {"name": name, "kind": "adapter" if number else "base", "path": name, "fingerprint": "0" * 64}
                for number, name in enumerate(("base", *adapters))
            ],
            "mix": "mix",
            "rows": {"planned": len(found) * 23, "scored": len(found) * 23 - 4, "errors": 4, "left_out": 321},
            "wall_seconds": 45.6,
        },
    )


def _task_score(task: str, label: str, scores: list[float | None]) -> dict[str, Any]:
    known = [score for score in scores if score is not None]
    mean, low, high = mean_interval(label, known) if known else (None, None, None)
    counts = {"num_instances": len(scores), "num_scored": len(known), "num_errors": len(scores) - len(known)}
    return {"task": task, "label": label, **counts, "task_score": mean, "task_score_low": low, "task_score_high": high}


def _comparison(found: list[dict[str, Any]], contender: str, prompt_format: str, scope: str) -> dict[str, Any]:
    def scores(name: str) -> dict[str, float]:
        return {
            row["task"]: row["task_score"]
            for row in found
            if (row["contender"], row["prompt_format"]) == (name, prompt_format)
            and scope in ("all", row["label"], f"held-out {row['held_out']}{'s' if row['held_out'] == 'task' else ''}")
        }

    base, mine = scores("base"), scores(contender)
    gains = [mine[task] - base[task] for task in base]
    mean = sum(gains) / len(gains)
    rng = random.Random(0)
    draws = sorted(sum(rng.choices(gains, k=len(gains))) / len(gains) for _ in range(1000))
    return {
        "contender": contender,
        "prompt_format": prompt_format,
        "scope": scope,
        "num_tasks": len(gains),
        "base_score": sum(base.values()) / len(base),
        "score": sum(mine.values()) / len(mine),
        "difference": mean,
        "difference_low": draws[25],
        "difference_high": draws[974],
        "num_wins": sum(gain > 0 for gain in gains),
        "num_losses": sum(gain < 0 for gain in gains),
        "num_ties": sum(gain == 0 for gain in gains),
    }
