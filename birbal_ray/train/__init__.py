"""QLoRA on a mix within a wall-clock budget."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.train.config import TrainConfig
    from birbal_ray.train.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
__getattr__ = import_on_use(__name__, {"TrainConfig": "config", "TrainResult": "run", "train": "run"})
