"""Base model against adapters on what was never sampled; benchmarks and leaderboard."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.evaluate.config import EvaluateConfig
    from birbal_ray.evaluate.run import EvaluateResult, evaluate

__all__ = ["EvaluateConfig", "EvaluateResult", "evaluate"]
__getattr__ = import_on_use(__name__, {"EvaluateConfig": "config", "EvaluateResult": "run", "evaluate": "run"})
