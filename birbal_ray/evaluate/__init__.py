"""Base model against adapters on what was never sampled; benchmarks and leaderboard."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birbal_ray.evaluate.config import EvaluateConfig
    from birbal_ray.evaluate.run import EvaluateResult, evaluate

__all__ = ["EvaluateConfig", "EvaluateResult", "evaluate"]


def __getattr__(name: str) -> Any:
    """Import on first use: `birbal --help` must not wait for torch."""
    if name in __all__:
        from importlib import import_module

        module = "config" if name == "EvaluateConfig" else "run"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
