"""The main result in words."""

from __future__ import annotations

from dataclasses import dataclass

from birbal_ray.report.numbers import Evaluated, Row, Scored, Trained
from birbal_ray.statistics import MIN_TASKS

FORMAT_WORDS = {"zero_shot": "zero-shot", "few_shot": "few-shot"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind`: better | worse | open (no difference found) | none (nothing was compared)."""

    kind: str
    title: str
    text: str


def verdicts(evaluated: Evaluated | None, trained: Trained | None, scored: Scored | None) -> list[Verdict]:
    """One for each contender: zero-shot over all tasks, or the first prompt format there is."""
    found = [verdict(row) for name in (evaluated.contenders if evaluated else ()) if (row := main_row(evaluated, name))]
    return found or [_nothing_compared(evaluated, trained, scored)]


def main_row(evaluated: Evaluated | None, contender: str) -> Row | None:
    """The COMPARISONS row over all tasks, zero-shot where there is one."""
    rows = [r for r in evaluated.comparisons if (model_of(r), r["scope"]) == (contender, "all")] if evaluated else []
    return min(rows, key=lambda row: (row["prompt_format"] != "zero_shot", row["prompt_format"]), default=None)


def verdict(row: Row) -> Verdict:
    """What a COMPARISONS row says. An interval that touches 0, or that comes from one task, shows no difference."""
    name, low, high = model_of(row), row["difference_low"], row["difference_high"]
    text = (
        f"{words(row['prompt_format']).capitalize()} over {_tasks(row['num_tasks'])}, the mean task score is "
        f"{row['score']:.3f}; the base model's is {row['base_score']:.3f}. Difference {signed(row['difference'])}, "
        f"95 % interval {signed(low)} to {signed(high)}. Better on {row['num_wins']}, worse on {row['num_losses']}, "
        f"the same on {row['num_ties']}."
    )
    if row["num_tasks"] < MIN_TASKS:
        few = "one task" if row["num_tasks"] == 1 else f"{row['num_tasks']} tasks"
        return Verdict("open", f"{name}: {few} can't tell whether it is better than the base model", text)
    if low > 0:
        amount = f"{row['difference']:.3f} ({_bound(low)} to {high:.3f})"
        return Verdict("better", f"{name} is better than the base model by {amount}", text)
    if high < 0:
        amount = f"{-row['difference']:.3f} ({_bound(-high)} to {-low:.3f})"
        return Verdict("worse", f"{name} is worse than the base model by {amount}", text)
    return Verdict("open", f"{name}: no difference from the base model found; the interval contains 0", text)


def model_of(row: Row) -> str:
    """The model that a row of an evaluation is about; earlier versions called the column `contender`."""
    return row["model"] if "model" in row else row["contender"]


def words(prompt_format: str) -> str:
    """`zero_shot` as `zero-shot`."""
    return FORMAT_WORDS.get(prompt_format, prompt_format.replace("_", " "))


def signed(value: float) -> str:
    """Three decimals with a sign, a real minus; 0 has none."""
    return f"{value:+.3f}".replace("-", "\u2212") if value else "0.000"


def _bound(value: float) -> str:
    """The end of an interval that keeps off 0, even where three decimals would not show it."""
    return f"{value:.3f}" if value >= 0.0005 else "less than 0.001"


def _nothing_compared(evaluated: Evaluated | None, trained: Trained | None, scored: Scored | None) -> Verdict:
    title = "Nothing to compare: no contender was evaluated" if evaluated else "There is no finished evaluation yet"
    if trained:
        base, best = trained.result["base_eval_loss"], trained.result["best_eval_loss"]
        text = (
            f"Whether training helped on tasks is not known. The eval loss on held-back rows of the mix went from "
            f"{base:.3f} (base model) to {best:.3f} (best adapter, step {trained.result['best_step']})."
        )
    elif scored and scored.labels:
        means = ", ".join(
            f"{row['mean_task_score']:.3f} over {_tasks(row['num_tasks'])} ({row['label'].replace('_', ' ')})"
            for row in scored.labels
        )
        text = f"Mean task scores of {scored.model or 'the model'}: {means}."
    else:
        text = "The sections below say what there is."
    return Verdict("none", title, text)


def _tasks(number: int) -> str:
    return f"{number} task{'' if number == 1 else 's'}"
