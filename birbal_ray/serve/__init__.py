"""The challenge's submission API over a model: what HELM and the organisers' scripts call."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.score.config import ServeConfig
    from birbal_ray.serve.run import serve

__all__ = ["ServeConfig", "serve"]
__getattr__ = import_on_use(__name__, {"ServeConfig": ".score.config", "serve": "run"})
