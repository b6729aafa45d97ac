"""From scored rows and outside datasets to a training set, each row with its reason."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birbal_ray.mix.config import MixConfig
    from birbal_ray.mix.run import MixResult, mix

__all__ = ["MixConfig", "MixResult", "mix"]


def __getattr__(name: str) -> Any:
    """Import on first use: `birbal --help` must not wait for torch."""
    if name in __all__:
        from importlib import import_module

        module = "config" if name == "MixConfig" else "run"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
