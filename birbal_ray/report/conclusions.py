"""The main result in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from birbal_ray.progress import counted
from birbal_ray.report.load import Row
from birbal_ray.statistics import BETTER, TOO_FEW, WORSE, outcome


@dataclass(frozen=True, slots=True)
class Conclusion:
    """`kind`: better | worse | open (no difference found) | none (nothing was compared)."""

    kind: str
    title: str
    text: str


def conclude(sections: Mapping[str, Mapping[str, Any]]) -> list[Conclusion]:
    """One for each evaluated model: over all tasks, zero-shot where that was run, else the first prompt format.

    `sections`: step → what load's readers give.
    """
    evaluated = sections.get("evaluate", {"names": []})
    found = []
    for name in evaluated["names"]:
        rows = [row for row in evaluated["comparisons"] if (row["model"], row["scope"]) == (name, "all")]
        if rows:
            order = list(evaluated["formats"])
            found.append(conclusion_of(min(rows, key=lambda row: order.index(row["prompt_format"]))))
    return found or [_nothing_compared(sections)]


def conclusion_of(row: Row) -> Conclusion:
    """Say what a COMPARISONS row shows: what Holm's p and the interval leave open, and too few tasks, included."""
    name, low, high = row["model"], row["difference_low"], row["difference_high"]
    text = (
        f"{words(row['prompt_format']).capitalize()} over {counted(row['num_tasks'], 'task')}, the mean task score is "
        f"{row['score']:.3f}; the base model's is {row['base_score']:.3f}. Difference {signed(row['difference'])}, "
        f"95 % interval {signed(low)} to {signed(high)}. Better on {row['num_wins']}, worse on {row['num_losses']}, "
        f"the same on {row['num_ties']}."
    )
    kind = outcome(low, high, row["num_tasks"], row.get("p_adjusted"))
    if kind == TOO_FEW:
        few = "one task" if row["num_tasks"] == 1 else f"{row['num_tasks']} tasks"
        return Conclusion("open", f"{name}: {few} can't tell whether it is better than the base model", text)
    if kind in (BETTER, WORSE):
        sign = 1 if kind == BETTER else -1
        near, far = sorted((sign * low, sign * high))
        bound = f"{near:.3f}" if near >= 0.0005 else "less than 0.001"  # never 0.000: the interval excludes 0
        amount = f"{sign * row['difference']:.3f} ({bound} to {far:.3f})"
        return Conclusion(kind, f"{name} is {kind} than the base model by {amount}", text)
    alone = outcome(low, high, row["num_tasks"]) in (BETTER, WORSE)
    why = "one of several comparisons, p ≥ 0.05 by Holm" if alone else "the interval contains 0"
    return Conclusion("open", f"{name}: no difference from the base model found; {why}", text)


def words(prompt_format: str) -> str:
    """`zero_shot` as `zero-shot`."""
    return prompt_format.replace("_", "-")


def signed(value: float) -> str:
    """Three decimals with a sign, a real minus; 0 has none."""
    return f"{value:+.3f}".replace("-", "\u2212") if value else "0.000"


def _nothing_compared(sections: Mapping[str, Mapping[str, Any]]) -> Conclusion:
    title = (
        "Nothing to compare: no model but the base model was evaluated"
        if "evaluate" in sections
        else "There is no finished evaluation yet"
    )
    if "train" in sections:
        result = sections["train"]["result"]
        text = (
            "Whether training helped on tasks is not known. The eval loss on held-back rows of the mix went from "
            f"{result['base_eval_loss']:.3f} (base model) to {result['best_eval_loss']:.3f} (best adapter, step "
            f"{result['best_step']})."
        )
    elif "score" in sections and (labels := sections["score"]["labels"]):
        means = ", ".join(
            f"{row['mean_task_score']:.3f} over {counted(row['num_tasks'], 'task')} ({row['label'].replace('_', ' ')})"
            for row in labels
        )
        text = f"Mean task scores of {model_name(sections['score']) or 'the model'}: {means}."
    else:
        text = "The sections below say what there is."
    return Conclusion("none", title, text)


def model_name(manifest: Row) -> str | None:
    """The name of the model that a manifest is about."""
    model = manifest.get("model")
    return model.get("name") if isinstance(model, Mapping) else model
