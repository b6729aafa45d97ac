"""Rows per second and peak memory of reading, labelling and prompting real task files; ROUGE-L pairs per second.

    python benchmarks/reading.py --tasks natural-instructions-subset.tar.gz

One core, no Ray. ROUGE-L: ours (rapidfuzz's LCS) and rouge-score over the same ASCII pairs; the largest difference.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from rouge_score import rouge_scorer

from birbal_ray.ni import metrics, prompt, reader

DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "natural-instructions-subset.tar.gz"
NUM_PAIRS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, default=DEFAULT)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    overrides = metrics.default_overrides()
    num_rows = num_bytes = num_characters = 0
    pairs: list[tuple[str, str]] = []
    started = time.monotonic()
    files = reader.find_task_files(arguments.tasks)
    for file, data in reader.read_files(files):
        task = reader.parse_task(file.name, data)
        label = metrics.label_task(task, overrides)
        num_bytes += len(data) if isinstance(data, bytes) else 0
        num_rows += len(task.instances)
        for instance in task.instances:
            num_characters += len(prompt.render_prompt(task.definition, prompt.examples_of(task), instance.input))
        if label.value == metrics.GENERATION and len(pairs) < NUM_PAIRS:
            usable = [i.references[0] for i in task.instances if i.references and i.references[0].isascii()][:400]
            pairs += list(zip(usable, usable[1:] + usable[:1], strict=True))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pairs = pairs[:NUM_PAIRS]

    started = time.monotonic()
    ours = [metrics.rouge_l(answer, [reference]) for answer, reference in pairs]
    ours_rate = len(pairs) / (time.monotonic() - started)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    started = time.monotonic()
    theirs = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    theirs_rate = len(pairs) / (time.monotonic() - started)
    difference = max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)

    figures = {
        "files": len(files),
        "rows": num_rows,
        "megabytes": num_bytes / 1e6,
        "prompt_megacharacters": num_characters / 1e6,
        "seconds": seconds,
        "rows_per_second": num_rows / seconds,
        "peak_memory_mib": peak,
        "rouge_l_pairs": len(pairs),
        "rouge_l_pairs_per_second": ours_rate,
        "rouge_score_pairs_per_second": theirs_rate,
        "rouge_l_ratio": ours_rate / theirs_rate,
        "rouge_l_max_difference": difference,
    }
    for name, value in figures.items():
        print(f"{name:32} {value:,.1f}" if isinstance(value, float) else f"{name:32} {value:,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
