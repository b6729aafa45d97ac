"""A finished score folder, local or at a URL: its tasks, its model, its files, and every doubt about them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from birbal_ray.manifest import read_manifest
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION, MAX_UNREACHABLE_FRACTION
from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS, TASK_SCORES, TASK_SCORES_FILE, TASKS, TASKS_FILE
from birbal_ray.settings import ConfigError, canonical_hash, one_line, sha256_of
from birbal_ray.storage import FileRecord, Folder, RunError, open_folder

AGAIN = "run `birbal score` again, or copy the folder again"
NEEDED_COLUMNS = ("task", "label", "definition", "sources", "licenses")  # of tasks.parquet; never null


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """One task of a score run; `task_score` in [0, 1], None when no row was scored.

    `unreachable`: why the metric can't give a right answer 1. `stop_reason`: why scoring ended before the task's
    instances did. Either is None where it doesn't apply. `definition_is_text`: its file holds no list there.
    """

    name: str
    label: str
    definition: str
    license: str
    sources: tuple[str, ...]
    num_instances: int
    task_score: float | None
    unreachable: str | None = None
    stop_reason: str | None = None
    definition_is_text: bool = False


@dataclass(frozen=True, slots=True)
class ScoreFolder:
    """A finished score run. `tasks` by name; `files`: of SCORE_ROWS, by name, with what the run's manifest says."""

    folder: Folder
    model: str | None
    identity_hash: str
    content_hash: str
    tasks: tuple[ScoredTask, ...]
    files: dict[str, FileRecord]

    @property
    def num_rows(self) -> int:
        """Rows the run must hold, by its own task table."""
        return sum(task.num_instances for task in self.tasks)

    @property
    def num_bytes(self) -> int:
        """Size of the files of rows."""
        return sum(record.size for record in self.files.values())


def open_scores(place: str | os.PathLike[str] | Folder, model: str | None = None) -> ScoreFolder:
    """The finished score run at `place`.

    Raises RunError when it is unfinished, lacks a table, or holds one that was edited or makes no sense;
    ConfigError when it is missing or of another step, or when `model` is given and another model made the scores.
    """
    folder = open_folder(place)
    manifest = read_manifest(folder, "score")
    named = manifest.get("model")
    made_by = named.get("name") if isinstance(named, Mapping) else None
    if model is not None and made_by != model:
        raise ConfigError(
            f"{folder}: scored by {made_by or 'an unnamed model'}, the configuration says model = {model!r}; "
            "point --scores at that model's run, or correct model (null takes any)"
        )
    files = {
        name: FileRecord(record["sha256"], record["size"])
        for name, record in sorted(manifest["files"].items())
        if name.startswith(f"{ROWS_FOLDER}/")
    }
    if not files:
        raise RunError(f"{folder.at(ROWS_FOLDER)}: no rows; the score run ended before its first, run it again")
    content = canonical_hash([[name, record.sha256] for name, record in files.items()])
    tasks = _read_tasks(folder, manifest)
    return ScoreFolder(folder, made_by, str(manifest.get("identity_hash", "")), content, tasks, files)


def read_batches(
    folder: Folder, name: str, schema: pa.Schema, columns: Sequence[str], sha256: str
) -> Iterator[pa.Table]:
    """Columns of one file of a finished run, some thousand rows at a time.

    Raises RunError naming the file and the column, or that the file was edited: it has another sha256.
    """
    place = folder.at(name)
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        raise RunError(f"{place}: no such file; the run before is incomplete, run it again") from None
    if sha256_of(data) != sha256:
        raise RunError(
            f"{place}: edited since its run finished (the manifest has another sha256); put the original back, "
            "or run its step again"
        )
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            found = file.schema_arrow
            for field in map(schema.field, columns):
                if field.name not in found.names:
                    raise RunError(f"{place}: column {field.name!r} is missing (found {', '.join(found.names)})")
                if (kind := found.field(field.name).type) != field.type:
                    raise RunError(f"{place}: column {field.name!r} is {kind}, expected {field.type}")
            yield found.empty_table().select(columns)  # of a file without rows, too, there is a table
            # Threads cost a file of a few hundred rows 50 % more.
            for batch in file.iter_batches(columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{place}: not a readable Parquet file ({one_line(error)}); run its step again") from None


def read_scored(scores: ScoreFolder, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of one file of SCORE_ROWS. Raises RunError when it is damaged or was edited."""
    tables = read_batches(scores.folder, name, SCORE_ROWS, columns, scores.files[name].sha256)
    return pa.concat_tables(tables).combine_chunks()


def read_small(folder: Folder, manifest: Mapping[str, Any], name: str, schema: pa.Schema) -> pa.Table:
    """A small table of a finished run, as `read_batches` reads it."""
    return pa.concat_tables(read_batches(folder, name, schema, schema.names, manifest["files"][name]["sha256"]))


def check_rows(place: str, rows: pa.Table) -> None:
    """Raise RunError, with file and row (from 1), for the first value that no score run writes."""
    for name in rows.column_names:
        if name not in ("score", "error"):
            _refuse(place, pc.is_null(rows[name]), f"{name} is null")
    references = rows["answer"].combine_chunks()
    if references.flatten().null_count:
        owners = pc.list_parent_indices(references).filter(pc.is_null(references.flatten()))
        raise RunError(f"{place}, row {owners[0].as_py() + 1}: a reference is null; {AGAIN}")
    _check_scores(place, rows, "score")
    _refuse(place, pc.and_(pc.is_null(rows["score"]), pc.is_null(rows["error"])), "score is null without an error")


def _check_scores(place: str, rows: pa.Table, name: str) -> None:
    _refuse(place, pc.invert(pc.is_in(rows["label"], pa.array([EXACT_MATCH, GENERATION]))), "label is unknown")
    within = pc.and_(pc.greater_equal(rows[name], 0.0), pc.less_equal(rows[name], 1.0))
    _refuse(place, pc.fill_null(pc.invert(within), False), f"{name} is no number from 0 to 1")


def _refuse(place: str, is_wrong: pa.ChunkedArray, problem: str) -> None:
    if pc.any(is_wrong).as_py():
        raise RunError(f"{place}, row {pc.indices_nonzero(is_wrong)[0].as_py() + 1}: {problem}; {AGAIN}")


def _read_tasks(folder: Folder, manifest: Mapping[str, Any]) -> tuple[ScoredTask, ...]:
    place, scores = folder.at(TASK_SCORES_FILE), read_small(folder, manifest, TASK_SCORES_FILE, TASK_SCORES)
    _check_scores(place, scores, "task_score")
    has_score, was_scored = pc.is_valid(scores["task_score"]), pc.greater(scores["num_scored"], 0)
    _refuse(place, pc.xor(has_score, was_scored), "task_score does not fit num_scored")
    table = read_small(folder, manifest, TASKS_FILE, TASKS)
    for name in NEEDED_COLUMNS:
        _refuse(folder.at(TASKS_FILE), pc.is_null(table[name]), f"{name} is null")
    score_of = {row["task"]: row for row in scores.to_pylist()}
    tasks = []
    for row in table.to_pylist():
        score = score_of.get(row["task"])
        if score is None or score["label"] != row["label"]:
            raise RunError(f"{place}: no row for task {row['task']!r} with its label of {TASKS_FILE}; {AGAIN}")
        fraction = row["unreachable_fraction"] or 0.0
        why = f"{row['unreachable_reason']} (in {fraction:.0%} of its instances)"
        tasks.append(
            ScoredTask(
                row["task"],
                row["label"],
                row["definition"],
                ", ".join(row["licenses"]) or "unknown",
                tuple(row["sources"]),
                score["num_instances"],
                score["task_score"],
                unreachable=why if fraction > MAX_UNREACHABLE_FRACTION else None,
                stop_reason=row["stop_reason"],
                definition_is_text=bool(row["definition_is_text"]),
            )
        )
    if not tasks:
        raise RunError(f"{folder.at(TASKS_FILE)}: no tasks; {AGAIN}")
    return tuple(sorted(tasks, key=lambda task: task.name))
