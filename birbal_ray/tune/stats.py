"""Is the mix that was found better than the hand-made ones? Over fresh seeds, never from one trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from birbal_ray.tune.scheduler import FINISHED, REPEAT, Record

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Verdict:
    """One mix against one baseline. Differences are baseline's loss − mix's: above 0 the mix is better."""

    name: str
    baseline: str
    num_seeds: int
    difference: float  # mean over seeds
    margin: float  # half the width of the 95 % interval; infinite with one seed

    @property
    def outcome(self) -> str:
        """better | worse | no difference."""
        if self.difference > self.margin:
            return "better"
        return "worse" if self.difference < -self.margin else "no difference"

    def sentence(self) -> str:
        """What may be said."""
        figures = f"{abs(self.difference):.4f} ± {self.margin:.4f} ({self.num_seeds} seeds)"
        if self.outcome == "no difference":
            return (
                f"no difference found between {self.name} and the baseline {self.baseline}: "
                f"{self.difference:+.4f} ± {self.margin:.4f} ({self.num_seeds} seeds)"
            )
        return f"{self.name} is {self.outcome} than the baseline {self.baseline} by {figures}"


def by_name(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Name → seed → objective of the repeats, which the choice of the finalists has not seen."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record.job.kind == REPEAT and record.status == FINISHED and record.objective is not None:
            found.setdefault(record.job.name, {})[record.job.seed] = record.objective
    return found


def verdict(name: str, baseline: str, objectives: dict[str, dict[int, float]]) -> Verdict | None:
    """Paired by seed: Student's t interval of the mean difference. None without a seed that both have.

    A seed decides the draw of the rows, their order, the adapter's start and the dropout; a pair has
    all of it in common but the mix.
    """
    from scipy.stats import t

    mine, other = objectives.get(name, {}), objectives.get(baseline, {})
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        return None
    differences = np.array([other[seed] - mine[seed] for seed in seeds])
    margin = float("inf")
    if len(seeds) > 1:
        error = float(differences.std(ddof=1)) / len(seeds) ** 0.5
        margin = float(t.ppf(0.5 + CONFIDENCE / 2, len(seeds) - 1)) * error
    return Verdict(name, baseline, len(seeds), float(differences.mean()), margin)


def winner(finalists: Sequence[str], baselines: Sequence[str], objectives: dict[str, dict[int, float]]) -> str | None:
    """The name with the lowest mean over fresh seeds; only those that finished all seeds are asked."""
    names = [name for name in [*finalists, *baselines] if name in objectives]
    most = max((len(objectives[name]) for name in names), default=0)
    complete = [name for name in names if len(objectives[name]) == most]
    return min(complete, key=lambda name: (float(np.mean(list(objectives[name].values()))), name), default=None)
