"""The steps that a run folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.evaluate.models import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    adapter_fingerprint,
)
from birbal_ray.run import MANIFEST_FILE, RUN_FILE, RunError, read_json
from birbal_ray.settings import ConfigError

STEPS = ("score", "mix", "train", "evaluate")  # those with a section of their own, in the order they run
NOT_RUN, UNFINISHED = "not run", "not finished"


@dataclass(frozen=True, slots=True)
class StepFolder:
    """A finished step. `name` is its path below the run folder, `.` when it is the run folder itself."""

    step: str
    path: Path
    name: str
    manifest: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`finished`: those of STEPS, in that order; `missing`: step → NOT_RUN or UNFINISHED.

    `others`: finished runs of other steps, by folder name; there may be several of a step.
    """

    name: str
    finished: Mapping[str, StepFolder]
    others: tuple[StepFolder, ...]
    missing: Mapping[str, str]


def find_steps(run: Path) -> RunFolder:
    """The steps in the folders of `run`, told by their manifests; or `run` itself, when it is a step's folder.

    Where several folders hold the same one of STEPS, the one that bears its name counts. Raises
    RunError (no finished step, a damaged manifest), ConfigError (several, none of that name).
    """
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; expected one that holds the outputs of birbal's steps")
    is_step = any((run / name).exists() for name in (RUN_FILE, MANIFEST_FILE))
    folders = [run] if is_step else sorted(path for path in run.iterdir() if _may_be_step(path))
    found: dict[str, list[StepFolder]] = {}
    unfinished = set()
    for folder in folders:
        name = folder.relative_to(run).as_posix()
        if (manifest := _record(folder / MANIFEST_FILE)) is not None:
            found.setdefault(manifest["step"], []).append(StepFolder(manifest["step"], folder, name, manifest))
        elif (record := _record(folder / RUN_FILE)) is not None:
            unfinished.add(record["step"])
    if not found:
        begun = f" (begun, not finished: {', '.join(sorted(unfinished))})" if unfinished else ""
        raise RunError(
            f"{run}: no finished step in it{begun}; expected folders like {', '.join(STEPS)}, each with a "
            f"{MANIFEST_FILE}, as `birbal demo --output {run}` makes them"
        )
    return RunFolder(
        name=run.resolve().name or "run",
        finished={step: _chosen(run, step, found[step]) for step in STEPS if step in found},
        others=tuple(folder for step in sorted(found.keys() - set(STEPS)) for folder in found[step]),
        missing={step: UNFINISHED if step in unfinished else NOT_RUN for step in STEPS if step not in found},
    )


def mismatches(run: RunFolder) -> list[str]:
    """What says that two steps here were not made from one another, so that their numbers don't belong together."""
    lines = []
    for step, before, hash_before in (
        ("mix", "score", _dig(run, "mix", "identity", "scores", "run")),
        ("train", "mix", _dig(run, "train", "mix", "identity_hash")),
    ):
        if hash_before and before in run.finished and run.finished[before].manifest.get("identity_hash") != hash_before:
            lines.append(
                f"{step} was made from another {before} run than the one in this folder (identity hash "
                f"{str(hash_before)[:12]}…): their numbers don't belong together"
            )
    return lines + _stale_evaluation(run)


def _stale_evaluation(run: RunFolder) -> list[str]:
    """Adapters were evaluated, and the one that train holds now is not among them."""
    asked = {one["name"]: one["fingerprint"] for one in _dig(run, "evaluate", "models") or [] if one["kind"] == ADAPTER}
    folder = run.finished["train"].path / ADAPTER_FOLDER if "train" in run.finished else None
    if not asked or folder is None or not all((folder / name).exists() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)):
        return []
    now = adapter_fingerprint(folder)
    if now in asked.values():
        return []
    names = " and ".join(f"{name} ({fingerprint[:12]}…)" for name, fingerprint in asked.items())
    return [
        f"evaluate asked {names}, not the adapter that train holds now (fingerprint {now[:12]}…): their numbers "
        "don't belong together"
    ]


def _chosen(run: Path, step: str, folders: list[StepFolder]) -> StepFolder:
    named = [folder for folder in folders if folder.name in (step, ".")]
    if len(folders) == 1 or named:
        return (named or folders)[0]
    names = ", ".join(folder.name for folder in folders)
    raise ConfigError(f"{run}: {len(folders)} finished {step} runs ({names}); call the one to report on {run / step}")


def _may_be_step(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _record(file: Path) -> dict[str, Any] | None:
    # Other tools call files manifest.json, too: without a step it is not one of ours.
    if not file.is_file():
        return None
    content = read_json(file)
    return content if isinstance(content, dict) and isinstance(content.get("step"), str) else None


def _dig(run: RunFolder, step: str, *keys: str) -> Any:
    value: Any = run.finished[step].manifest if step in run.finished else None
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
