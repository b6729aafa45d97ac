"""A model's own chat template, all the way through `birbal score` and vLLM, against transformers."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from birbal_ray.models import resolve_model
from tests.e2e.processes import birbal, finish, rows_of

pytestmark = pytest.mark.vllm


def test_turns_go_through_vllm_and_answers_end_with_their_turn(write_task, tmp_path):
    """SmolLM2-135M-Instruct's template: a system turn, `<|im_end|>` as the end of a turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    command = ["score", "--tasks", write_task("task_colours"), "--output", run, "--device", "cpu"]
    finish(birbal(*command, "--set", "prompt.format=chat"))
    rows = rows_of(run)
    assert len(rows) == 6 and not any(row["error"] for row in rows)
    path = resolve_model("smollm2-135m").path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (limit,) = pq.read_table(run / "tasks.parquet")["max_completion_tokens"].to_pylist()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [
        {"role": "system", "content": "Say whether the colour is warm."},
        *({"role": role, "content": text} for role, text in (("user", "red"), ("assistant", "yes"))),
        *({"role": role, "content": text} for role, text in (("user", "blue"), ("assistant", "no"))),
    ]
    for row in rows:
        messages = [*turns, {"role": "user", "content": row["orig_input"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert row["few_shot_prompt"] == text
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        assert row["num_prompt_tokens"] == ids.shape[1]
        made = model.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=end)[0, ids.shape[1] :].tolist()
        assert row["finish_reason"] == ("stop" if end in made else "length")
        assert row["prediction"] == tokenizer.decode(made, skip_special_tokens=True)
    assert "stop" in {row["finish_reason"] for row in rows}, "a turn that the model ended"
