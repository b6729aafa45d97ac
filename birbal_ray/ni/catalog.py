"""Which tasks there are, what each is like, which of them a run takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rapidfuzz import process as fuzzy

from birbal_ray.ni import metrics, prompt, reader
from birbal_ray.ni.schema import Task, TaskError, sample_tasks_folder

MMLU, TRANSLATION = "mmlu", "translation"
FAMILIES = (MMLU, TRANSLATION)


def selected_names() -> tuple[str, ...]:
    """The 462 task names that Birbal scored for the NeurIPS 2023 LLM Efficiency Challenge."""
    text = (resources.files("birbal_ray.ni") / "data" / "selected_tasks.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def choose_names(available: Sequence[str], select: str | Sequence[str], path: Path) -> tuple[list[str], list[str]]:
    """(chosen, absent): the names to take, in `available`'s order, and the asked-for ones not there.

    `select` is "all", "selected" (the 462; some may be absent), a name, or a list of names; a name given by hand that
    isn't there raises TaskError with the nearest one.
    """
    if select == "all":
        return list(available), []
    by_hand = [select] if isinstance(select, str) else select
    wanted = selected_names() if select == "selected" else by_hand
    present = set(available)
    absent = [name for name in wanted if name not in present]
    if absent and select != "selected":
        raise TaskError("; ".join(unknown_task(name, available, path) for name in absent[:5]))
    chosen = set(wanted)
    return [name for name in available if name in chosen], absent


def unknown_task(name: str, available: Sequence[str], path: Path) -> str:
    """One line that says the task isn't there, with the nearest name that is."""
    return f"{path}: no task {name!r}{nearest(name, available)}"


def nearest(name: str, names: Sequence[str]) -> str:
    """The nearest of the names in brackets, for a message; empty without any."""
    match = fuzzy.extractOne(name, names)
    return f" (nearest: {match[0]!r})" if match else ""


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


def summarise_tasks(path: Path | None) -> list[dict[str, Any]]:
    """One record per task file, by name; a file that can't be used has null fields and its reason.

    `path` None is the sample tasks; the same holds below.
    """
    overrides, selected = metrics.default_overrides(), set(selected_names())
    rows = []
    for file, task in _tasks(path):
        name = reader.printable(file.name)
        if isinstance(task, TaskError):
            rows.append(dict.fromkeys(_SUMMARY_KEYS) | {"task": name, "label reason": str(task)})
            continue
        label = metrics.label_task(task, overrides)
        about = label.value, label.reason, len(task.instances), len(task.positive_examples), ", ".join(task.categories)
        values = (name, *about, name in selected, excluded_by(task, FAMILIES))
        rows.append(dict(zip(_SUMMARY_KEYS, values, strict=True)))
    return sorted(rows, key=lambda row: str(row["task"]))


def describe_task(path: Path | None, name: str, num_shots: int) -> str:
    """A page about one task. Raises TaskError with the nearest name when it isn't there."""
    root = path or sample_tasks_folder()
    files = {file.name: file for file in reader.find_task_files(root)}
    if name not in files:
        raise TaskError(
            unknown_task(name, list(files), root) + ("" if path else "; --tasks FOLDER looks in another one")
        )
    _, task = next(reader.read_tasks([files[name]]))
    if isinstance(task, TaskError):
        raise task
    label = metrics.label_task(task, metrics.default_overrides())
    instance = next((instance for instance in task.instances if instance.error is None), task.instances[0])
    examples = prompt.examples_of(task, num_shots)
    return "\n".join(
        [
            f"{task.name}",
            f"label       {label.value} ({label.reason})",
            f"categories  {', '.join(task.categories) or '-'}",
            f"sources     {', '.join(task.sources) or '-'}",
            f"instances   {len(task.instances)}, positive examples {len(task.positive_examples)}",
            f"repaired    {'; '.join(f'{count} × {kind}' for kind, count in task.repairs.items()) or 'nothing'}",
            f"unreachable {_unreachable_finding(task, label.value)[1]}",
            "",
            f"--- few-shot prompt of {instance.row_id}, {len(examples)} shots ---",
            prompt.render_prompt(task.definition, examples, instance.input),
            "--- references ---",
            *instance.references,
        ]
    )


def find_faults(path: Path | None) -> tuple[list[dict[str, Any]], int, int]:
    """(rows of file, kind, count, finding; files read; files that can't be used).

    Kinds: unusable file, repaired, unusable instance, and unreachable (no answer can score 1 there).
    """
    rows: list[dict[str, Any]] = []
    num_files = num_bad = 0
    overrides = metrics.default_overrides()
    for file, task in _tasks(path):
        num_files += 1
        if isinstance(task, TaskError):
            num_bad += 1
            found = [("unusable file", 1, str(task))]
        else:
            found = [("repaired", count, kind) for kind, count in task.repairs.items()]
            found += [("unusable instance", 1, f"{one.row_id}: {one.error}") for one in task.instances if one.error]
            count, finding = _unreachable_finding(task, metrics.label_task(task, overrides).value)
            found += [("unreachable", count, finding)] if count else []
        name = f"{reader.printable(file.name)}.json"
        rows += [{"file": name, "kind": kind, "count": count, "finding": finding} for kind, count, finding in found]
    return rows, num_files, num_bad


_SUMMARY_KEYS = ("task", "label", "label reason", "instances", "shots", "category", "selected", "excluded")


def _tasks(path: Path | None) -> Iterator[tuple[reader.TaskFile, Task | TaskError]]:
    return reader.read_tasks(reader.find_task_files(path or sample_tasks_folder()))


def _unreachable_finding(task: Task, label: str) -> tuple[int, str]:
    """On how many instances no answer can score 1, and what to say of it."""
    found = metrics.find_unreachable(task, label, prompt.extract_answer)
    if not found.num_instances:
        return 0, "nothing"
    share = "; the task gets no share by its errors" * (found.fraction > metrics.MAX_UNREACHABLE_FRACTION)
    finding = f"{found.num_instances} of its instances, on which no answer can score 1: {found.reason}{share}"
    return found.num_instances, finding
