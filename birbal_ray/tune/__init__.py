"""The search for sampling ratios."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birbal_ray.tune.config import TuneConfig
    from birbal_ray.tune.run import TuneResult, tune

__all__ = ["TuneConfig", "TuneResult", "tune"]


def __getattr__(name: str) -> Any:
    """Import on first use: `birbal --help` must not wait for torch."""
    if name in __all__:
        from importlib import import_module

        module = "config" if name == "TuneConfig" else "run"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
