"""Row schemas of a mix, what is known of a candidate, and the reasons it can have."""

from __future__ import annotations

from enum import IntEnum, IntFlag

import pyarrow as pa

from birbal_ray.mix.allocation import BAND_EDGES, band_name
from birbal_ray.ni.prompt import render_prompt

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


class Reason(IntEnum):
    """Why a candidate is in the mix or not; the first that applies. `text` says it in words."""

    text: str

    def __new__(cls, value: int, text: str) -> Reason:
        reason = int.__new__(cls, value)
        reason._value_, reason.text = value, text
        return reason

    KEPT = 0, "in the mix"
    ERROR = 1, "scoring it failed"
    LLM_WRITTEN = 2, "written by a language model (include_llm_written is false)"
    CONTAMINATED_FAMILY = 3, "its task or source belongs to an evaluation"
    CONTAMINATED_NGRAM = 4, "shares a run of words with an evaluation text"
    ANSWERED_CORRECTLY = 5, "the model answered it correctly"
    ANSWERED_WELL = 6, "the model's answer has ROUGE-L 0.8 or more"
    NOT_DRAWN = 7, "beyond the share drawn from its ROUGE-L band"
    SEVERAL_REFERENCES = 8, "has more than one reference"
    TOO_LONG = 9, "instruction and input have too many words"
    SHORT_INPUT = 10, "the input has too few words"
    EMPTY_OUTPUT = 11, "the output is empty"
    OVER_CAP = 12, "beyond the cap of its task's accuracy decile"
    DUPLICATE = 13, "repeats another row"
    NEAR_DUPLICATE = 14, "nearly repeats another row's input under the same instruction"
    OVER_ALLOCATION = 15, "beyond what its task was allocated"
    OVER_SOURCE_LIMIT = 16, "beyond its source's max_rows"
    VALIDATION = 17, "kept out to judge mixes by (validation_rows_per_task)"

    @property
    def word(self) -> str:
        """As written in files: lower case."""
        return self.name.lower()


class Flags(IntFlag):
    """What is known of a candidate from its text, whatever the policy makes of it (a uint16)."""

    ERROR = 1
    LLM_WRITTEN = 2
    FAMILY = 4
    NGRAM = 8
    TOO_LONG = 16
    SHORT_INPUT = 32
    EMPTY_OUTPUT = 64
    SEVERAL_REFERENCES = 128
    PUBLISHED_TOO_LONG = 256  # birbal_2023: ≥ 800 words together
    PUBLISHED_LONG_INPUT = 512  # birbal_2023, generation: > 1,100 words of input


# Name of the part of a task or source a candidate was looked for in; the index is what arrays hold.
BUCKETS = (
    "none",
    "all",
    "failed",
    "rest",
    *(f"accuracy_{decile}" for decile in range(10)),
    *(band_name(number) for number in range(len(BAND_EDGES) + 1)),
)
BUCKET_OF = {name: number for number, name in enumerate(BUCKETS)}


def question_of(instruction: str, text: str) -> str:
    """Training text without loss; the instruction part is left out when it is blank."""
    return render_prompt(instruction, (), text, preamble=False)
