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
        pa.field("licenses", pa.list_(pa.string()), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the task file
        pa.field("num_shots", pa.int32(), nullable=False),  # positive examples in the prompt
        pa.field("num_available", pa.int64(), nullable=False),  # instances in the file
        pa.field("num_instances", pa.int64(), nullable=False),  # taken by this run
        pa.field("max_completion_tokens", pa.int32(), nullable=False),
        # Of its usable instances, those on which not even a reference scores 1, and the commonest cause.
        pa.field("unreachable_fraction", pa.float64()),
        pa.field("unreachable_reason", pa.string()),
        pa.field("definition_is_text", pa.bool_()),  # in the task file, where newer ones hold a list
        pa.field("metric_version", pa.int32()),  # of its scores
        pa.field("stop_reason", pa.string()),  # why no further instances were scored
    ]
)

RUN_FILE = "run.json"  # of every run: its step and identity
PROGRESS_FILE = "progress.json"
MANIFEST_FILE = "manifest.json"  # of a finished run: its files, counts and settings
REFERENCE_FILE = "reference.json"  # beside an adapter, or a model it was folded into: what PEFT computes with it
ROWS_FOLDER = "rows"  # SCORE_ROWS, one file {task}/{first}-{last}.parquet a range of the task's hash order
TASKS_FILE = "tasks.parquet"
TASK_SCORES_FILE = "task_scores.parquet"
QUARANTINE_FILE = "quarantine.jsonl"  # {"file", "reason"} of each task file that was not used

NATURAL_INSTRUCTIONS = "natural_instructions"  # `source` of every scored row

# One row of training data.
MIX_ROWS = pa.schema(
    [
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("output", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),  # training text without loss
        pa.field("answer", pa.string(), nullable=False),  # training text with loss
        pa.field("source", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("score", pa.float64()),  # in [0, 1]; null for outside datasets
        pa.field("selected_by", pa.string(), nullable=False),  # {policy or source}:{bucket}
        pa.field("license", pa.string(), nullable=False),
    ]
)

AUDIT_FILE = "audit.parquet"
# One row per candidate, kept or dropped: kept rows in the mix's order, then the dropped ones.
AUDIT = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string()),  # exact_match | generation; null for outside datasets
        pa.field("score", pa.float64()),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("split", pa.string()),  # train | eval; null when dropped
        pa.field("contamination", pa.string()),  # family, ngram, or both; whatever was done about it
        pa.field("duplicate_of", pa.string()),  # row_id of the row that this one repeats
    ]
)

# One row per task or outside source.
MIX_TASKS = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("task_score", pa.float64()),
        pa.field("num_candidates", pa.int64(), nullable=False),
        pa.field("num_usable", pa.int64(), nullable=False),  # what the policy could draw from
        pa.field("num_allocated", pa.int64(), nullable=False),  # what the policy asked for
        pa.field("num_kept", pa.int64(), nullable=False),
        pa.field("note", pa.string()),  # why the policy gave it less than its share, null where it didn't
    ]
)

# An outside dataset after its adapter; kept in a work folder while the mix is made.
OUTSIDE_ROWS = pa.schema(
    [
        *(MIX_ROWS.field(name) for name in ("instruction", "input", "output", "task", "row_id", "license")),
        pa.field("llm_written", pa.bool_(), nullable=False),
    ]
)

# One row per model, prompt format and task of an evaluation. The base model is named "base".
BASE, ADAPTER, MERGED = "base", "adapter", "merged"  # kinds of models in an evaluation; BASE is also that one's name
EVALUATION = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),  # base, or an adapter's or merged model's name
        pa.field("kind", pa.string(), nullable=False),  # base | adapter | merged
        pa.field("prompt_format", pa.string(), nullable=False),  # zero_shot (as trained) | few_shot
        pa.field("task", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("held_out", pa.string(), nullable=False),  # task: none sampled | instances: others were | unknown
        *(field for field in TASK_SCORES if field.name not in ("task", "label")),
    ]
)

# A model against the base model: mean over tasks of the paired differences (birbal_ray.statistics).
COMPARISONS = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_format", pa.string(), nullable=False),
        pa.field("scope", pa.string(), nullable=False),  # all | exact_match | generation | held-out tasks | …instances
        pa.field("is_primary", pa.bool_(), nullable=False),  # the one comparison that was named beforehand
        pa.field("num_tasks", pa.int64(), nullable=False),
        pa.field("base_score", pa.float64(), nullable=False),  # mean of task scores in [0, 1]
        pa.field("score", pa.float64(), nullable=False),
        pa.field("difference", pa.float64(), nullable=False),  # score - base_score
        pa.field("difference_low", pa.float64(), nullable=False),  # 95 %
        pa.field("difference_high", pa.float64(), nullable=False),
        pa.field("p_value", pa.float64(), nullable=False),  # two-sided
        pa.field("p_adjusted", pa.float64(), nullable=False),  # Holm over all rows that are not primary
        pa.field("detectable_difference", pa.float64()),  # 80 % power at this spread; null with one task
        pa.field("num_wins", pa.int64(), nullable=False),  # tasks on which the model is better
        pa.field("num_losses", pa.int64(), nullable=False),
        pa.field("num_ties", pa.int64(), nullable=False),
    ]
)

EVALUATION_FILE = "evaluation.parquet"
COMPARISONS_FILE = "comparisons.parquet"
