"""Settings of the demo: the recipe on the sample tasks, minutes on two CPU cores."""

from __future__ import annotations

from typing import Any

SCORE_SETTINGS: dict[str, Any] = {
    "tasks.instances_per_task": 24,
    "completion.max_completion_tokens": 48,
    "engine.max_model_len": 1024,
    "shard_rows": 12,
}
