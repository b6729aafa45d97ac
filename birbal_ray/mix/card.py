"""The dataset card of a mix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from birbal_ray.mix.rows import MIX_ROWS, Reason


def dataset_card(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md: front matter that `datasets.load_dataset` reads, then what the mix is made of.

    Holds nothing that differs between two runs on the same inputs.
    """
    rows, model = manifest["rows"], manifest["scores"]["model"]
    notes = [f"- {task}: {note}" for task, note in manifest["notes"].items()]
    parts = [
        _front_matter(rows["kept"]),
        "# A training mix made by birbal_ray\n",
        f"{rows['kept']:,} instruction rows ({rows['train']:,} train, {rows['eval']:,} eval), chosen from "
        f"{rows['candidates']:,} candidates by policy `{settings['policy']}` with seed {settings['seed']}. "
        f"{f'Scores come from `{model}`.' if model else 'The scores name no model.'}\n",
        "## Composition\n",
        _table(
            ["source", "label", "tasks", "candidates", "kept", "train", "eval", "share"],
            [{**row, "share": f"{row['share']:.1%}"} for row in manifest["composition"]],
        ),
        "## What was left out\n",
        _table(
            ["reason", "rows", "meaning"],
            [
                {"reason": name, "rows": count, "meaning": Reason[name.upper()].text}
                for name, count in rows["dropped"].items()
            ],
        ),
        _shortfalls(manifest["allocation"]),
        "## Tasks below their share\n\n" + "\n".join(notes) + "\n" if notes else "",
        "## Sources and licences\n",
        "Every row carries its own `license`; the strictest one binds the mix as a whole.\n",
        _table(["source", "origin", "revision", "licences"], manifest["licenses"]),
        "## Contamination\n",
        _contamination(manifest["contamination"]),
        "## Files\n",
        FILES,
        "## Settings\n",
        f"```json\n{json.dumps(settings, indent=1, ensure_ascii=False)}\n```\n",
    ]
    return "\n".join(part for part in parts if part)


FILES = f"""- `train.parquet`, `eval.parquet`: {", ".join(f"`{name}`" for name in MIX_ROWS.names)}
- `train.jsonl`, `eval.jsonl`: `question` and `answer`, the training text (loss on the answer only)
- `alpaca/train.json`, `alpaca/eval.json`: `instruction`, `input`, `output`; their trainers' `alpaca` prompts have a
  preamble that the training text lacks. `alpaca/README.md` says which prompt gives the training text in axolotl and
  LLaMA-Factory
- `audit.parquet`: every candidate, kept or dropped, with one reason; `tasks.parquet`: counts per task
- with `validation_rows_per_task`: `validation.*`, rows kept out to judge mixes by
"""


def _front_matter(num_rows: int) -> str:
    size = next(name for limit, name in _SIZES if num_rows < limit)
    return (
        "---\npretty_name: birbal_ray training mix\ntask_categories:\n- text-generation\nlanguage:\n- en\n"
        f"license: other\nsize_categories:\n- {size}\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: train.parquet\n  - split: eval\n    path: eval.parquet\n---\n"
    )


_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (float("inf"), "1M<n<10M"),
)


def _shortfalls(allocation: Mapping[str, Any]) -> str:
    lines = []
    for label, entry in allocation.items():
        if entry["shortfall"]:
            short = entry["short_tasks"]
            some = ", ".join(f"{t['task']} {t['candidates']} of {t['wanted']}" for t in short[:3])
            lines.append(
                f"- {label}: {entry['allocated']:,} of {entry['budget']:,} rows; too few candidates in "
                f"{len(short)} tasks ({some}{', …' if len(short) > 3 else ''})"
            )
    return "## Budgets not met\n\n" + "\n".join(lines) + "\n" if lines else ""


def _contamination(entry: Mapping[str, Any]) -> str:
    if not entry["found"]:
        found = "nothing found"
    else:
        found = ", ".join(f"{kind}: {count:,}" for kind, count in entry["found"].items())
    texts = f"{entry['num_texts']:,} evaluation texts" if entry["num_texts"] else "no evaluation texts given"
    return (
        f"Action: `{entry['action']}`. Overlap of {entry['ngram']} words with {texts}; task families of "
        f"{', '.join(entry['evaluations']) or 'no evaluation'}. Candidates: {found}.\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
