"""Every real task file at hand: read, labelled, prompted, scored."""

from __future__ import annotations

import csv
import gc
import json
import tarfile
from collections import Counter

import pytest

from birbal_ray.ni import catalog, metrics, prompt, reader
from birbal_ray.ni.schema import Example, hash_order
from tests.conftest import SLOW

NUM_PAIRS = 20_000 if SLOW else 5_000


@pytest.fixture(scope="module")
def tasks(shared_data):
    """Two million objects, none in a cycle, which the garbage collector would go through again and again."""
    files = reader.find_task_files(shared_data / "natural-instructions-subset.tar.gz")
    gc.disable()
    try:
        parsed = [reader.parse_task(file.name, data) for file, data in reader.read_files(files)]
    finally:
        gc.enable()
    gc.freeze()
    return parsed


def test_all_179_files_are_read_and_no_instance_is_lost(shared_data, tasks):
    assert len(tasks) == 179
    counts = {}
    with tarfile.open(shared_data / "natural-instructions-subset.tar.gz") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                values = json.loads(tar.extractfile(member).read())
                counts[member.name.rsplit("/", 1)[1][:-5]] = len(values["Instances"])
    assert {task.name: len(task.instances) for task in tasks} == counts  # none of them repeats an input
    ids = [instance.row_id for task in tasks for instance in task.instances]
    assert len(ids) == len(set(ids)) == 507_773
    errors = Counter(instance.error for task in tasks for instance in task.instances if instance.error)
    assert errors == {"no reference: every 'output' is empty": 2}


def test_labels_agree_with_the_hand_checked_list(shared_data, tasks):
    with (shared_data / "task_labels.csv").open(newline="") as handle:
        checked = {row["name"]: row["label"] for row in csv.DictReader(handle)}
    overrides = metrics.default_overrides()
    compared = [task for task in tasks if task.name in checked]
    by_rule = [task.name for task in compared if metrics.label_task(task).value != checked[task.name]]
    final = [task.name for task in compared if metrics.label_task(task, overrides).value != checked[task.name]]
    assert len(compared) == 179
    assert len(by_rule) <= 0.05 * len(compared), by_rule
    assert set(by_rule) <= set(overrides)
    assert final == []


def test_references_score_1_against_themselves(tasks):
    overrides = metrics.default_overrides()
    found = {}
    for task in tasks:
        label = metrics.label_task(task, overrides).value
        instances = [instance for instance in task.instances if instance.error is None]
        unreachable = metrics.find_unreachable(task, label, prompt.extract_answer)
        found[task.name] = unreachable.fraction
        for instance in instances[:100]:
            scores = [
                metrics.score_answer(label, prompt.extract_answer(reference), instance.references)
                for reference in instance.references
            ]
            assert max(scores) == 1.0 or unreachable.fraction > 0, instance.row_id
    assert sum(fraction > 0 for fraction in found.values()) == 5
    assert max(found.values()) < 0.02 < metrics.MAX_UNREACHABLE_FRACTION


def test_rules_leave_out_no_selected_task(tasks):
    selected = set(catalog.selected_names())
    left_out = {task.name: reason for task in tasks if (reason := catalog.excluded_by(task, catalog.FAMILIES))}
    assert not selected.intersection(left_out)


def test_prompts_share_their_prefix_and_hold_no_unpaired_surrogate(tasks):
    for task in tasks:
        prefix = prompt.render_prefix(task.definition, prompt.examples_of(task))
        for instance in task.instances[:50]:
            text = prompt.render_prompt(task.definition, prompt.examples_of(task), instance.input)
            assert text.startswith(prefix)
            assert text.endswith(f"{instance.input}\n\n### Response:\n")
            text.encode()


def test_published_example_to_the_byte(shared_data):
    record = json.loads((shared_data / "example_record.json").read_text(encoding="utf-8"))
    body = record["few_shot_prompt"].split("### Instruction:\n", 1)[1]
    definition, *shots = body.split("\n\n### Input:\n")
    examples = []
    for shot in shots[:-1]:
        text, output = shot.split("\n\n### Response:\n")
        examples.append(Example(text, output))
    assert len(examples) == 4
    assert prompt.render_prompt(definition, examples, record["orig_input"]) == record["few_shot_prompt"]
    assert prompt.extract_answer(record["prediction"]) == "yes"
    assert metrics.exact_match(prompt.extract_answer(record["prediction"]), record["answer"]) == 1.0


def test_rouge_l_is_rouge_scores_on_real_ascii_pairs(tasks):
    pairs = []
    overrides = metrics.default_overrides()
    for task in tasks:
        if metrics.label_task(task, overrides).value == metrics.GENERATION:
            texts = [i.references[0] for i in task.instances if i.references and i.references[0].isascii()][:300]
            pairs += zip(texts, texts[1:] + texts[:1], strict=True)
    pairs = sorted(pairs, key=lambda pair: hash_order(pair[0], 0))  # some of every task
    from rouge_score import rouge_scorer

    oracle = rouge_scorer.RougeScorer(["rougeL"])
    assert len(pairs) >= NUM_PAIRS
    for answer, reference in pairs[:NUM_PAIRS]:
        assert metrics.rouge_l(answer, [reference]) == oracle.score(reference, answer)["rougeL"].fmeasure
