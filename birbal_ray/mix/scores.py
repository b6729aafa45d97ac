"""A finished score folder, local or at a URL: its tasks, its model, its files, and every doubt about them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from birbal_ray.manifest import read_manifest
from birbal_ray.ni.metrics import EXACT_MATCH, GENERATION, MAX_UNREACHABLE_FRACTION
from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS, TASK_SCORES, TASK_SCORES_FILE, TASKS, TASKS_FILE
from birbal_ray.settings import ConfigError, canonical_hash, one_line, sha256_of
from birbal_ray.storage import Folder, RunError, open_folder

AGAIN = "run `birbal score` again, or copy the folder again"
SCORE_COLUMNS = ("task", "label", "num_instances", "num_scored", "num_errors", "task_score")
TASK_COLUMNS = ("task", "label", "definition", "sources", "licenses")
# Columns of tasks.parquet that runs of earlier versions lack.
LATER_COLUMNS = ("unreachable_fraction", "unreachable_reason", "stop_reason", "definition_is_text")


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
class ScoreFile:
    """One file of SCORE_ROWS; `sha256` None where the run's manifest doesn't list it."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class ScoreFolder:
    """A finished score run. `tasks` by name, `files` by file name."""

    folder: Folder
    model: str | None
    identity_hash: str
    content_hash: str
    tasks: tuple[ScoredTask, ...]
    files: tuple[ScoreFile, ...]

    @property
    def num_rows(self) -> int:
        """Rows the run must hold, by its own task table."""
        return sum(task.num_instances for task in self.tasks)

    @property
    def num_bytes(self) -> int:
        """Size of the files of rows."""
        return sum(file.size for file in self.files)


def open_scores(place: str | os.PathLike[str] | Folder, model: str | None = None) -> ScoreFolder:
    """The finished score run at `place`.

    Raises RunError when it is missing, unfinished, of another step, lacks a table, or holds one that was
    edited or makes no sense; ConfigError when `model` is given and another model made the scores.
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
    # Manifests of earlier versions list few files, or something else under that name.
    records = manifest["files"] if isinstance(manifest.get("files"), Mapping) else {}
    listed = {name: str(one["sha256"]) for name, one in records.items() if isinstance(one, Mapping) and "sha256" in one}
    # A task's name may begin with a dot; what a killed writer left begins with .tmp-.
    files = tuple(
        ScoreFile(name, stat.size, listed.get(name))
        for name, stat in folder.files(ROWS_FOLDER, hidden=True).items()
        if name.endswith(".parquet") and "/.tmp-" not in name
    )
    if not files:
        raise RunError(f"{folder.at(ROWS_FOLDER)}: no Parquet files; the score run's rows are gone, {AGAIN}")
    content = canonical_hash([[file.name, file.sha256 or file.size] for file in files])
    tasks = _tasks(folder, listed)
    return ScoreFolder(folder, made_by, str(manifest.get("identity_hash", "")), content, tasks, files)


def read_table(
    folder: Folder, name: str, schema: pa.Schema, sha256: str | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """The schema's columns, and the `optional` ones that are there; the bytes are checked against `sha256`, if given.

    Raises RunError naming the file and the column, or that the file was edited.
    """
    place = folder.at(name)
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        raise RunError(f"{place}: no such file; the run before is incomplete, run it again") from None
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            check_columns(place, file.schema_arrow, schema)
            columns = [*schema.names, *(name for name in optional if name in file.schema_arrow.names)]
            table = file.read(columns=columns, use_threads=False)  # threads cost a file of a few hundred rows 50 % more
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{place}: not a readable Parquet file ({one_line(error)}); run its step again") from None
    if sha256 is not None and sha256_of(data) != sha256:
        raise RunError(
            f"{place}: edited since its run finished (the manifest has another sha256); restore it or {AGAIN}"
        )
    return table


def check_columns(place: str, found: pa.Schema, wanted: pa.Schema) -> None:
    """Raise RunError when a column of `wanted` is missing or of another type."""
    for field in wanted:
        if field.name not in found.names:
            raise RunError(f"{place}: column {field.name!r} is missing (found {', '.join(found.names)})")
        if found.field(field.name).type != field.type:
            raise RunError(f"{place}: column {field.name!r} is {found.field(field.name).type}, expected {field.type}")


def read_scored(scores: ScoreFolder, file: ScoreFile, columns: Sequence[str]) -> pa.Table:
    """Columns of one file of SCORE_ROWS. Raises RunError when it is damaged or was edited."""
    schema = pa.schema([SCORE_ROWS.field(name) for name in columns])
    return read_table(scores.folder, file.name, schema, file.sha256).combine_chunks()


def check_rows(place: str, rows: pa.Table) -> None:
    """Raise RunError, with file and row (from 1), for the first value that no score run writes."""
    for name in rows.column_names:
        if name not in ("score", "error"):
            _refuse(place, pc.is_null(rows[name]), f"{name} is null")
    references = rows["answer"].combine_chunks()
    if references.flatten().null_count:
        owners = pc.list_parent_indices(references).filter(pc.is_null(references.flatten()))
        raise RunError(f"{place}, row {owners[0].as_py() + 1}: a reference is null; {AGAIN}")
    _refuse(place, pc.invert(pc.is_in(rows["label"], pa.array([EXACT_MATCH, GENERATION]))), "label is unknown")
    score = rows["score"]
    within = pc.and_(pc.greater_equal(score, 0.0), pc.less_equal(score, 1.0))
    _refuse(place, pc.fill_null(pc.invert(within), False), "score is no number from 0 to 1")
    _refuse(place, pc.and_(pc.is_null(score), pc.is_null(rows["error"])), "score is null without an error")


def _refuse(place: str, is_wrong: pa.ChunkedArray, problem: str) -> None:
    if pc.any(is_wrong).as_py():
        raise RunError(f"{place}, row {pc.indices_nonzero(is_wrong)[0].as_py() + 1}: {problem}; {AGAIN}")


def _tasks(folder: Folder, listed: Mapping[str, str]) -> tuple[ScoredTask, ...]:
    place = folder.at(TASK_SCORES_FILE)
    needed = pa.schema([TASK_SCORES.field(name) for name in SCORE_COLUMNS])
    table = read_table(folder, TASK_SCORES_FILE, needed, listed.get(TASK_SCORES_FILE))
    scores = {row["task"]: (number, row) for number, row in enumerate(table.to_pylist(), 1)}
    needed = pa.schema([TASKS.field(name) for name in TASK_COLUMNS])
    tasks = []
    described = read_table(folder, TASKS_FILE, needed, listed.get(TASKS_FILE), LATER_COLUMNS)
    for line, row in enumerate(described.to_pylist(), 1):
        for name in TASK_COLUMNS:
            if row[name] is None:
                raise RunError(f"{folder.at(TASKS_FILE)}, row {line}: {name} is null; {AGAIN}")
        if row["task"] not in scores:
            raise RunError(f"{place}: no row for task {row['task']!r} of {TASKS_FILE}; {AGAIN}")
        number, score = scores[row["task"]]
        value, num_scored = score["task_score"], score["num_scored"]
        if row["label"] not in (EXACT_MATCH, GENERATION) or score["label"] != row["label"]:
            raise RunError(
                f"{place}, row {number}: label {score['label']!r} of task {row['task']!r} is not known; {AGAIN}"
            )
        if (value is None) if num_scored else (value is not None):
            raise RunError(f"{place}, row {number}: task_score is {value} with {num_scored} scored rows; {AGAIN}")
        if value is not None and not 0.0 <= value <= 1.0:
            raise RunError(f"{place}, row {number}: task_score is {value}, expected 0 to 1; {AGAIN}")
        fraction = row.get("unreachable_fraction") or 0.0
        tasks.append(
            ScoredTask(
                row["task"],
                row["label"],
                row["definition"],
                ", ".join(row["licenses"]) or "unknown",
                tuple(row["sources"]),
                score["num_instances"],
                value,
                unreachable=f"{row.get('unreachable_reason')} (in {fraction:.0%} of its instances)"
                if fraction > MAX_UNREACHABLE_FRACTION
                else None,
                stop_reason=row.get("stop_reason"),
                definition_is_text=bool(row.get("definition_is_text")),
            )
        )
    if not tasks:
        raise RunError(f"{folder.at(TASKS_FILE)}: no tasks; {AGAIN}")
    return tuple(sorted(tasks, key=lambda task: task.name))
