"""Scoring with `model.adapter`: its answers, not the base model's; another adapter is another run."""

from __future__ import annotations

import json

from tests.fixtures.tensors import write_tensors
from tests.ray.conftest import scored_rows


def test_an_adapter_answers_in_place_of_its_base(here, write_task, tmp_path):
    adapter = tmp_path / "trained" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    write_tensors(adapter / "adapter_model.safetensors", {"base_model.model.q_proj.lora_A.weight": [4, 6]})
    tasks = write_task("task_a", 30)

    def score(output, *more):
        settings = ["--set", "engine.backend=simulated", "--device", "cpu", *more]
        code, _, errors = here("score", "--tasks", tasks, "--output", tmp_path / output, *settings)
        return code, errors

    with_adapter = ("--set", f"model.adapter={tmp_path / 'trained'}")
    for output, more in (("base", ()), ("adapted", with_adapter)):
        code, errors = score(output, *more)
        assert code == 0, errors
    base, adapted = (
        {row["row_id"]: row["prediction"] for row in scored_rows(tmp_path / output)} for output in ("base", "adapted")
    )
    assert base.keys() == adapted.keys() and len(base) == 30
    assert sum(base[key] != adapted[key] for key in base) > 10
    code, errors = score("adapted")
    assert code == 2 and "model_fingerprint" in errors
