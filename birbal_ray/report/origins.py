"""How each step's numbers came about, as its manifest tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from birbal_ray.report.load import RunFolder, StepFolder
from birbal_ray.report.numbers import model_name


@dataclass(frozen=True, slots=True)
class Origin:
    """What a manifest says about how its step came about."""

    step: str
    name: str  # the step's folder below the run folder
    identity_hash: str | None
    commit: str | None
    edited: bool | None
    python: str | None
    packages: Mapping[str, str]
    seed: int | None
    wall_seconds: float | None
    model: str | None
    revision: str | None
    has_revision: bool  # whether the manifest speaks of one


def origins_of(run: RunFolder) -> tuple[Origin, ...]:
    """One for each finished step."""
    return tuple(_origin(step) for step in (*run.finished.values(), *run.others))


def _origin(step: StepFolder) -> Origin:
    manifest = step.manifest
    code, settings, result = (manifest.get(key) or {} for key in ("code", "settings", "result"))
    model = manifest.get("model") or {}
    return Origin(
        step=step.step,
        name=step.name,
        identity_hash=manifest.get("identity_hash"),
        commit=code.get("commit"),
        edited=code.get("edited"),
        python=manifest.get("python"),
        packages=dict(sorted((manifest.get("packages") or {}).items())),
        seed=manifest.get("seed", settings.get("seed")),
        wall_seconds=manifest.get("wall_seconds", result.get("elapsed_seconds")),
        model=model_name(manifest) or (manifest.get("scores") or {}).get("model"),
        revision=model.get("revision") if isinstance(model, Mapping) else None,
        has_revision=isinstance(model, Mapping) and "revision" in model,
    )
