"""What a search may say, in words and pictures: does its mix beat hand-made ones? Over fresh seeds, never one trial."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from birbal_ray.statistics import NO_DIFFERENCE, Difference, holm, outcome, paired_difference, pairs_needed
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.scheduler import (
    BASE,
    BASELINE,
    FAILED,
    FINISHED,
    PREDICTED,
    REPEAT,
    SEARCH,
    STOPPED,
    TRANSFER,
    TrialResult,
    best_so_far,
)

Objectives = Mapping[str, Mapping[int, float]]  # mix → seed → objective


@dataclass(frozen=True, slots=True)
class SeedComparison:
    """One mix against one baseline. Differences are baseline's loss − mix's: above 0 the mix is better."""

    name: str
    baseline: str
    over_seeds: Difference
    seeds_needed: int | None  # to show this difference with 80 % power, at the spread seen; None: unknown

    @property
    def margin(self) -> float:
        """The farther end's distance from the mean; infinite with one seed."""
        return max(self.over_seeds.high - self.over_seeds.mean, self.over_seeds.mean - self.over_seeds.low)

    def outcome(self, p_adjusted: float | None = None) -> str:
        """better | worse | no difference; `p_adjusted` where it is one comparison among several."""
        found = self.over_seeds  # of one seed without ends, so no verdict
        return outcome(found.low, found.high, found.num_pairs, p_adjusted, min_pairs=1)

    def sentence(self, p_adjusted: float | None = None) -> str:
        """What may be said."""
        mean, figures = self.over_seeds.mean, f"± {self.margin:.4f} ({self.over_seeds.num_pairs} seeds)"
        if (verdict := self.outcome(p_adjusted)) != NO_DIFFERENCE:
            return f"{self.name} is {verdict} than the baseline {self.baseline} by {abs(mean):.4f} {figures}"
        needed = f"; showing it would take about {self.seeds_needed} seeds" if self.seeds_needed else ""
        return (
            f"no difference found between {self.name} and the baseline {self.baseline}: {mean:+.4f} {figures}{needed}"
        )


def by_name(results: Sequence[TrialResult], kind: str = REPEAT) -> dict[str, dict[int, float]]:
    """Name → seed → objective of the repeats, which the choice of the finalists has not seen."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if result.spec.kind == kind and result.status == FINISHED and result.objective is not None:
            found.setdefault(result.spec.name, {})[result.spec.seed] = result.objective
    return found


def compare_seeds(name: str, baseline: str, objectives: Objectives) -> SeedComparison | None:
    """Paired by seed: the t interval of the mean difference. None without a seed that both have.

    A seed decides the draw of the rows, their order, the adapter's start and the dropout; a pair has
    all of it in common but the mix.
    """
    mine, other = objectives.get(name, {}), objectives.get(baseline, {})
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        return None
    differences = np.array([other[seed] - mine[seed] for seed in seeds])
    found = paired_difference(differences)
    spread = float(differences.std(ddof=1)) if len(seeds) > 1 else math.inf
    needed = pairs_needed(found.mean, spread) if math.isfinite(spread) and found.mean else None
    return SeedComparison(name, baseline, found, needed)


def describe_comparisons(found: Sequence[SeedComparison], primary: tuple[str, str]) -> list[dict[str, Any]]:
    """For the manifest. `primary`, a mix and a baseline, was named beforehand; the others' p-values are Holm's."""
    others = iter(holm([one.over_seeds.p_value for one in found if (one.name, one.baseline) != primary]))
    adjusted = [one.over_seeds.p_value if (one.name, one.baseline) == primary else next(others) for one in found]
    return [
        {
            "mix": one.name,
            "baseline": one.baseline,
            "is_primary": (one.name, one.baseline) == primary,
            "outcome": one.outcome(p_adjusted),
            "difference": one.over_seeds.mean,
            "margin": one.margin if math.isfinite(one.margin) else None,
            "p_value": one.over_seeds.p_value,
            "p_adjusted": p_adjusted,
            "num_seeds": one.over_seeds.num_pairs,
            "seeds_needed": one.seeds_needed,
            "sentence": one.sentence(p_adjusted),
        }
        for one, p_adjusted in zip(found, adjusted, strict=True)
    ]


def winner(finalists: Sequence[str], baselines: Sequence[str], objectives: Objectives) -> str | None:
    """The name with the lowest mean over fresh seeds, among those that finished all seeds."""
    names = [name for name in [*finalists, *baselines] if name in objectives]
    most = max((len(objectives[name]) for name in names), default=0)
    complete = [name for name in names if len(objectives[name]) == most]
    return min(complete, key=lambda name: (fmean(objectives[name].values()), name), default=None)


def rank_agreement(short: Objectives, long: Objectives) -> dict[str, Any] | None:
    """How far the order of the mixes by mean loss agrees; None with fewer than two mixes in both.

    `agreement`: share of the pairs of mixes that stand in the same order in both, in [0, 1].
    """
    names = sorted(short.keys() & long.keys())
    pairs = [(one, two) for place, one in enumerate(names) for two in names[place + 1 :]]
    if not pairs:
        return None
    means = [{name: fmean(losses[name].values()) for name in names} for losses in (short, long)]
    same = sum((means[0][one] < means[0][two]) == (means[1][one] < means[1][two]) for one, two in pairs)
    orders = [sorted(names, key=mean.__getitem__) for mean in means]
    return {"agreement": same / len(pairs), "num_pairs": len(pairs), "order": orders[0], "order_longer": orders[1]}


def describe_result(manifest: dict[str, Any]) -> list[str]:
    """What a finished search may say, one line each."""
    lines = []
    if manifest["base_objective"] is not None:
        lines.append(f"held-out loss before any training: {manifest['base_objective']:.4f}")
    weights = ", ".join(f"{group} × {weight:g}" for group, weight in manifest["weights"].items())
    lines += [f"loss: mean over the groups {weights}"] if weights else []
    lines += [manifest[key] for key in ("left_out", "cut_short") if manifest[key]]
    if failed := manifest.get("failed"):
        lines.append(f"failed: {', '.join(failed)}")
    if manifest["unfilled"]["trials"]:
        lines.append(
            f"{manifest['unfilled']['trials']} trials could not fill their shares (up to "
            f"{manifest['unfilled']['most_rows']:,} rows short): their ratios are not what was asked; score more rows"
        )
    for one in manifest["comparisons"]:
        adjusted = "named beforehand" if one["is_primary"] else f"p {one['p_adjusted']:.3f} among the others"
        lines.append(f"{one['sentence']} ({adjusted})")
    if transfer := manifest["transfer"]:
        lines.append(
            f"at {transfer['factor']} × the tokens, {transfer['agreement']:.0%} of {transfer['num_pairs']} pairs of "
            f"mixes keep their order: {', '.join(transfer['order_longer'])}"
        )
    best = manifest["best"]
    if best["is_baseline"]:
        lines.append(f"lowest mean loss: the baseline {best['mix']}; the search found nothing better")
    elif not manifest["comparisons"]:
        lines.append(f"lowest loss: {best['mix']}, of one trial: no verdict against the baselines")
    return lines


def summarise(results: Sequence[TrialResult], config: TuneConfig) -> list[dict[str, Any]]:
    """One row per mix at the search's seed, baselines first, then by objective, failed last; fresh seeds beside.

    Without a search no trial has that seed: a mix has a row without `loss`, the best mean first.
    """
    again = by_name(results)
    if not config.num_trials:
        means = {name: fmean(seeds.values()) for name, seeds in again.items()}
        return [
            {"mix": name, "fresh seeds": len(again[name]), "mean loss": means[name]}
            for name in sorted(means, key=lambda name: (means[name], name))
        ]
    rows = []
    for result in results:
        if result.spec.kind not in (BASE, REPEAT, TRANSFER):
            fresh = list(again.get(result.spec.name, {}).values())
            ratios = {name: result.spec.values.get(name) for name in ("gamma", "exact_match_fraction", "failed_first")}
            rows.append(
                {
                    "mix": result.spec.name,
                    "kind": result.spec.kind,
                    "status": result.status,
                    "loss": result.objective,
                    "fresh seeds": len(fresh) or None,
                    "mean loss": fmean(fresh) if fresh else None,
                    **ratios,
                    "unfilled": result.num_unfilled or None,
                }
            )
    order = {name: place for place, name in enumerate(config.baselines)}
    statuses = [FINISHED, STOPPED, FAILED]
    return sorted(
        rows, key=lambda row: (order.get(row["mix"], len(order)), statuses.index(row["status"]), row["loss"] or 0.0)
    )


SEARCHED, STOPPED_COLOUR, BEST = "#1f5fa8", "#b8c4d0", "#2e8b3d"
LINES = ("#d0661b", "#8a5fa8", "#a83232", "#7a6a1b")  # of the baselines, in their order


def draw_search(results: Sequence[TrialResult], baselines: Sequence[str]) -> bytes:
    """PNG: objective against each ratio, then the best so far over trials; baselines as dashed lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = [r for r in results if r.spec.kind in (SEARCH, PREDICTED) and r.objective is not None]
    names = sorted({name for result in found for name in result.spec.values})
    names = [name for name in names if len({result.spec.values[name] for result in found}) > 1]
    lines = {r.spec.name: r.loss for r in results if r.spec.kind == BASELINE and r.status == FINISHED}
    columns = min(3, len(names) + 1)
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=120, layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, columns, place)
        for status, colour, label in ((FINISHED, SEARCHED, "to its end"), (STOPPED, STOPPED_COLOUR, "stopped early")):
            mine = [r for r in found if r.status == status and r.spec.kind == SEARCH]
            if mine:
                axes.scatter([r.spec.values[name] for r in mine], [r.loss for r in mine], color=colour, label=label)
        for result in found:
            if result.spec.kind == PREDICTED:
                axes.scatter(result.spec.values[name], result.loss, marker="*", s=140, color=BEST, label="predicted")
        if name == "failed_first":
            axes.set_xticks([0, 1], ["off", "on"])
            axes.set_xlim(-0.5, 1.5)
        _baselines(axes, lines, baselines)
        axes.set_xlabel(name)
        axes.set_ylabel("held-out loss")
        if place == 1:
            axes.legend(handles=list(axes.collections), fontsize=7)
    axes = figure.add_subplot(rows, columns, len(names) + 1)
    searched = [r for r in found if r.spec.kind == SEARCH]
    axes.step(range(1, len(searched) + 1), best_so_far(searched), where="post", color=SEARCHED, marker="o")
    _baselines(axes, lines, baselines)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials of the search")
    axes.set_ylabel("best held-out loss so far")
    axes.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _baselines(axes: object, lines: Mapping[str, float], baselines: Sequence[str]) -> None:
    for colour, name in zip(LINES, baselines, strict=False):
        if name in lines:
            axes.axhline(lines[name], color=colour, linewidth=1.2, linestyle="--", label=name)  # type: ignore[attr-defined]
