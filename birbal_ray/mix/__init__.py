"""From scored rows and outside datasets to a training set, each row with its reason."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.mix.config import MixConfig
    from birbal_ray.mix.run import MixResult, mix

__all__ = ["MixConfig", "MixResult", "mix"]
__getattr__ = import_on_use(__name__, {"MixConfig": "config", "MixResult": "run", "mix": "run"})
