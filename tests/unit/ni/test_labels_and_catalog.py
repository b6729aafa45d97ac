"""Labels by rule and override; which tasks a run takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from birbal_ray.ni import catalog, metrics
from birbal_ray.ni.reader import parse_task
from birbal_ray.ni.schema import TaskError
from tests.conftest import task_values


def task(name="t1", outputs=("yes",), **changes):
    instances = [{"id": str(n), "input": f"in {n}", "output": [text]} for n, text in enumerate(outputs)]
    return parse_task(name, json.dumps(task_values(Instances=instances, **changes)).encode())


LONG = "a reference of six whole words"


@pytest.mark.parametrize(
    ("outputs", "category", "label"),
    [
        (["yes"] * 20, "Question Answering", "exact_match"),
        (["yes"] * 19 + [LONG], "Question Answering", "exact_match"),  # p95 by nearest rank is the 19th of 20
        (["yes"] * 18 + [LONG] * 2, "Question Answering", "generation"),
        (["yes"] * 20, "Title Generation", "generation"),
        (["yes"] * 20, "Question Generation", "generation"),
        (["yes"] * 20, "Wrong Candidate Generation", "generation"),
        ([LONG] * 20, "Program Execution", "exact_match"),
    ],
)
def test_rule(outputs, category, label):
    assert metrics.label_task(task(outputs=outputs, Categories=[category])).value == label


def test_override_wins(tmp_path):
    file = tmp_path / "o.csv"
    file.write_text("name,label,reason\nt1,generation,because\n")
    label = metrics.label_task(task(), metrics.read_overrides(file))
    assert (label.value, label.reason) == ("generation", "override: because")


@pytest.mark.parametrize(
    "text",
    [
        "task,kind\nt1,x\n",
        "name,label\nt1,exact\n",
        "name,label\nt1\n",
        "name,label\nt1,generation\nt1,exact_match\n",
        "name;label\nt1;generation\n",
    ],
)
def test_bad_override_file_is_named(tmp_path, text):
    file = tmp_path / "o.csv"
    file.write_text(text)
    with pytest.raises(TaskError, match=r"o\.csv"):
        metrics.read_overrides(file)
    with pytest.raises(TaskError, match=r"absent\.csv: no such file"):
        metrics.read_overrides(tmp_path / "absent.csv")


def test_462_selected_names():
    names = catalog.selected_names()
    assert len(names) == len(set(names)) == 462
    assert not [name for name in names if "mmlu" in name]


def test_choose_names():
    available = ["task002_quoref_answer_generation", "task900_mine", "task901_other"]
    assert catalog.choose_names(available, "all", Path("x")) == (available, [])
    chosen, absent = catalog.choose_names(available, "selected", Path("x"))
    assert (chosen, len(absent)) == (available[:1], 461)
    assert catalog.choose_names(available, ["task901_other"], Path("x"))[0] == ["task901_other"]
    assert catalog.choose_names(available, "task900_mine", Path("x"))[0] == ["task900_mine"]


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(TaskError, match=r"folder: no task 'task900_min' \(nearest: 'task900_mine'\)"):
        catalog.choose_names(["task002_quoref", "task900_mine"], ["task900_min"], Path("folder"))


def test_exclusion_rules():
    families = catalog.FAMILIES
    assert catalog.excluded_by(task(), families) is None
    assert "MMLU" in catalog.excluded_by(task("task700_mmmlu_answer_generation"), families)
    assert "Translation" in catalog.excluded_by(task(Categories=["Translation"]), families)
    assert "Hindi" in catalog.excluded_by(task(Output_language=["Hindi"]), families)
    assert catalog.excluded_by(task(Output_language=["Hindi", "English"]), families) is None
    assert catalog.excluded_by(task(Categories=["Translation"]), []) is None
