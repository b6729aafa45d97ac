"""Which tasks a run takes: named sets, exclusion rules, names checked against what is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from rapidfuzz import process as fuzzy

from birbal_ray.ni.schema import Task, TaskError, read_text

MMLU, TRANSLATION = "mmlu", "translation"
FAMILIES = (MMLU, TRANSLATION)


def selected_names() -> tuple[str, ...]:
    """The 462 task names that Birbal scored for the NeurIPS 2023 LLM Efficiency Challenge."""
    text = (resources.files("birbal_ray.ni") / "data" / "selected_tasks.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def sample_tasks_folder() -> Path:
    """The folder of the project's own sample tasks."""
    return Path(str(resources.files("birbal_ray") / "sample_tasks"))


def choose_names(available: Sequence[str], select: str | Sequence[str], path: Path) -> tuple[list[str], list[str]]:
    """(chosen, absent): the names to take, in `available`'s order, and the asked-for ones not there.

    `select` is "all", "selected" (the 462; some may be absent), a file of names, or a list of names;
    a name given by hand that isn't there raises TaskError with the nearest one.
    """
    if select == "all":
        return list(available), []
    if select == "selected":
        wanted: Iterable[str] = selected_names()
    elif isinstance(select, str):
        wanted = _names_in(Path(select))
    else:
        wanted = select
    present = set(available)
    absent = [name for name in wanted if name not in present]
    if absent and select != "selected":
        raise TaskError("; ".join(unknown_task(name, available, path) for name in absent[:5]))
    chosen = set(wanted)
    return [name for name in available if name in chosen], absent


def unknown_task(name: str, available: Sequence[str], path: Path) -> str:
    """One line that says the task isn't there, with the nearest name that is."""
    match = fuzzy.extractOne(name, available)
    return f"{path}: no task {name!r}" + (f" (nearest: {match[0]!r})" if match else "")


def excluded_by(task: Task, families: Sequence[str]) -> str | None:
    """Why the rules leave a task out, or None.

    mmlu: its name or a source says MMLU (it is an evaluation of the challenge). translation: its
    category is Translation, or it answers in a language that its inputs are not in.
    """
    if MMLU in families and any("mmlu" in text.lower() for text in (task.name, *task.sources)):
        return "MMLU is one of the evaluations"
    if TRANSLATION in families:
        if "Translation" in task.categories:
            return "category Translation"
        inputs, outputs = set(task.input_languages), set(task.output_languages)
        if inputs and outputs and not inputs & outputs:
            return f"translates ({', '.join(sorted(inputs))} to {', '.join(sorted(outputs))})"
    return None


def _names_in(file: Path) -> list[str]:
    if not file.is_file():
        raise TaskError(f"{file}: no such file of task names (or use 'all' or 'selected')")
    lines = read_text(file).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
