"""Short facts of a section: a name, its text, the exact number behind it."""

from __future__ import annotations

from dataclasses import dataclass

from birbal_ray.progress import duration
from birbal_ray.report.numbers import Evaluated, Mixed, Scored, Trained
from birbal_ray.report.origins import Origin


@dataclass(frozen=True, slots=True)
class Fact:
    """`value` is None where the fact is not a number."""

    name: str
    text: str
    value: float | None = None


def of_scores(scored: Scored) -> list[Fact]:
    """Model, rows, errors, how much of the prompts the prefix cache served."""
    planned = sum(row["num_instances"] for row in scored.tasks)
    errors = sum(row["num_errors"] for row in scored.tasks)
    facts = [
        Fact("model", scored.model or "not named"),
        _count("tasks", len(scored.tasks)),
        _count("instances", planned),
        _count("errors", errors),
    ]
    if scored.num_quarantined:
        facts.append(_count("task files left out as unusable", scored.num_quarantined))
    if scored.tokens.get("prompt"):
        facts.append(_count("prompt tokens", scored.tokens["prompt"]))
    cached = scored.tokens.get("cached_fraction")
    if cached is not None:
        facts.append(Fact("from the prefix cache", _percent(cached), cached))
    return facts


def of_mix(mixed: Mixed) -> list[Fact]:
    """Policy and rows."""
    rows = mixed.rows
    return [
        Fact("policy", mixed.policy),
        _count("candidates", rows["candidates"]),
        _count("kept", rows["kept"]),
        _count("train rows", rows["train"]),
        _count("eval rows", rows["eval"]),
    ]


def of_training(trained: Trained) -> list[Fact]:
    """How long, how far, on what."""
    settings, result, packing = trained.settings, trained.result, trained.packing["train"]
    elapsed, budget = result["elapsed_seconds"], settings["budget"]
    used = f"{duration(elapsed)} of {duration(budget)} ({_percent(elapsed / budget)})" if budget else duration(elapsed)
    batch, lora, optimizer = settings["batch"], settings["lora"], settings["optimizer"]
    full = packing["packing_efficiency_fraction"]
    facts = [
        Fact("base model", trained.model or "not named"),
        Fact("eval loss, base model", f"{result['base_eval_loss']:.3f}", result["base_eval_loss"]),
        Fact("eval loss, best adapter", f"{result['best_eval_loss']:.3f}", result["best_eval_loss"]),
        _count("best step", result["best_step"]),
        Fact("time used" if budget else "time used, no budget set", used, elapsed),
        Fact("of it loading", duration(result["setup_seconds"]), result["setup_seconds"]),
        _count("optimizer steps", result["num_steps"]),
        Fact("epochs", f"{result['epochs']:.2f} of {settings['epochs']:g}", result["epochs"]),
        Fact("ended by", result["ended_by"]),
        _count("tokens trained on", result["train_tokens"]),
        Fact("packed sequences full", _percent(full), full),
        Fact("batch", f"{batch['micro']} \u00d7 {batch['accumulation']} sequences of {batch['sequence_length']:,}"),
        Fact("learning rate, highest", f"{optimizer['learning_rate']:g}", optimizer["learning_rate"]),
        Fact("LoRA", f"r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']:g}"),
        Fact("quantisation", settings["model"]["quantization"]),
    ]
    if result.get("peak_memory_bytes"):
        peak = result["peak_memory_bytes"]
        facts.append(Fact("peak device memory", f"{peak / 2**30:.1f} GiB", peak))
    return facts


def of_evaluation(evaluated: Evaluated) -> list[Fact]:
    """Who was compared on how much."""
    tasks = {row["task"]: row["held_out"] for row in evaluated.tasks}
    facts = [
        Fact("base model", evaluated.model or "not named"),
        Fact(
            "contenders", ", ".join(_contender(name, evaluated.kinds[name]) for name in evaluated.contenders) or "none"
        ),
        _count("tasks", len(tasks)),
        _count("held-out tasks", sum(held_out == "task" for held_out in tasks.values())),
        _count("rows that failed", sum(row["num_errors"] for row in evaluated.tasks)),
    ]
    if evaluated.num_left_out is not None:
        facts.append(_count("instances left out as seen", evaluated.num_left_out))
    return facts


def of_origin(origin: Origin) -> list[Fact]:
    """What a manifest says of its step."""
    commit = origin.commit or "not from a git checkout"
    facts = [
        Fact("manifest", "manifest.json" if origin.name == "." else f"{origin.name}/manifest.json"),
        Fact("identity hash", origin.identity_hash or "none"),
        Fact("git commit", f"{commit}, edited" if origin.edited else commit),
        Fact("seed", "none" if origin.seed is None else str(origin.seed), origin.seed),
    ]
    if origin.wall_seconds is not None:
        facts.append(Fact("wall time", duration(origin.wall_seconds), origin.wall_seconds))
    if origin.model:
        facts.append(Fact("model", origin.model))
    if origin.has_revision:
        facts.append(Fact("model revision", origin.revision or "none, a local model"))
    facts.append(Fact("Python", origin.python or "unknown"))
    facts.append(
        Fact("packages", ", ".join(f"{name} {version}" for name, version in origin.packages.items()) or "none")
    )
    return facts


def _contender(name: str, kind: str) -> str:
    return name if name == kind else f"{name} ({kind})"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _count(name: str, number: int) -> Fact:
    return Fact(name, f"{number:,}", number)
