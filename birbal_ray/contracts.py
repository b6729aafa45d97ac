"""Column names and types of the tables that steps hand to each other (Parquet)."""

from __future__ import annotations

import pyarrow as pa

# One row per instance of a scored task. A row that failed has `error` and a null score.
SCORE_ROWS = pa.schema(
    [
        pa.field("orig_input", pa.string(), nullable=False),
        pa.field("few_shot_prompt", pa.string(), nullable=False),
        pa.field("answer", pa.list_(pa.string()), nullable=False),  # all references
        pa.field("prediction", pa.string(), nullable=False),  # raw completion, up to the stop string
        pa.field("row_id", pa.string(), nullable=False),  # {task}:{instance_id}, unique in a run
        pa.field("task", pa.string(), nullable=False),
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),  # exact_match | generation
        pa.field("extracted", pa.string(), nullable=False),  # what is compared
        pa.field("score", pa.float64()),  # in [0, 1]; null with an error
        pa.field("metric", pa.string(), nullable=False),  # exact_match | rouge_l
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_cached_tokens", pa.int32()),  # null if unknown
        pa.field("num_completion_tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),  # stop | length
        pa.field("error", pa.string()),
    ]
)

# One row per scored task; the interval is 95 %.
TASK_SCORES = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("num_instances", pa.int64(), nullable=False),
        pa.field("num_scored", pa.int64(), nullable=False),
        pa.field("num_errors", pa.int64(), nullable=False),
        pa.field("task_score", pa.float64()),  # null when no row was scored
        pa.field("task_score_low", pa.float64()),
        pa.field("task_score_high", pa.float64()),
    ]
)

# One row per task of a score run: what later steps need to know of the task file.
TASKS = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("label_reason", pa.string(), nullable=False),
        pa.field("definition", pa.string(), nullable=False),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("sources", pa.list_(pa.string()), nullable=False),
        pa.field("domains", pa.list_(pa.string()), nullable=False),
        pa.field("licenses", pa.list_(pa.string()), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the task file
        pa.field("num_shots", pa.int32(), nullable=False),  # positive examples in the prompt
        pa.field("num_available", pa.int64(), nullable=False),  # instances in the file
        pa.field("num_instances", pa.int64(), nullable=False),  # taken by this run
        pa.field("max_completion_tokens", pa.int32(), nullable=False),
    ]
)

ROWS_FOLDER = "rows"  # SCORE_ROWS, one Parquet file a shard
TASKS_FILE = "tasks.parquet"
TASK_SCORES_FILE = "task_scores.parquet"
QUARANTINE_FILE = "quarantine.jsonl"  # {"file", "reason"} of each task file that was not used
