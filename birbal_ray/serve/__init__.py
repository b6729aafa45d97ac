"""A trained model behind HTTP, as the LLM Efficiency Challenge asked its entrants to serve it."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.serve.config import ServeConfig
    from birbal_ray.serve.run import serve

__all__ = ["ServeConfig", "serve"]
__getattr__ = import_on_use(__name__, {"ServeConfig": "config", "serve": "run"})
