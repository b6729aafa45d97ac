"""Few-shot inference over task files, scored: what does a model get wrong?"""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.score.config import ScoreConfig
    from birbal_ray.score.run import ScoreResult, score

__all__ = ["ScoreConfig", "ScoreResult", "score"]
__getattr__ = import_on_use(__name__, {"ScoreConfig": "config", "ScoreResult": "run", "score": "run"})
