"""The search for sampling ratios."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.tune.config import TuneConfig
    from birbal_ray.tune.run import TuneResult, tune

__all__ = ["TuneConfig", "TuneResult", "tune"]
__getattr__ = import_on_use(__name__, {"TuneConfig": "config", "TuneResult": "run", "tune": "run"})
