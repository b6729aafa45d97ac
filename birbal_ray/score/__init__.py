"""Few-shot inference over task files, scored: what does a model get wrong?"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birbal_ray.score.config import ScoreConfig
    from birbal_ray.score.run import ScoreResult, score

__all__ = ["ScoreConfig", "ScoreResult", "score"]


def __getattr__(name: str) -> Any:
    """Import on first use: `birbal --help` must not wait for torch."""
    if name in __all__:
        from importlib import import_module

        module = "config" if name == "ScoreConfig" else "run"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
