"""QLoRA on a mix within a wall-clock budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birbal_ray.train.config import TrainConfig
    from birbal_ray.train.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: `birbal --help` must not wait for torch."""
    if name in __all__:
        from importlib import import_module

        module = "config" if name == "TrainConfig" else "run"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
