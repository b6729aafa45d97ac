"""What a finished run says of itself, for the steps that read it: its manifest, and whether its files are the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from birbal_ray.schemas import MANIFEST_FILE, RUN_FILE
from birbal_ray.storage import FileStat, Folder, RunError, open_folder

FORMAT = 2  # of run.json and manifest.json; those of version 0.1 have none


def read_manifest(place: str | os.PathLike[str] | Folder, step: str, *, oldest: int = 1) -> dict[str, Any]:
    """The manifest of a finished run of `step`, whose listed files are there with their sizes.

    `oldest`: the oldest format of run folders that the caller reads; 1 was version 0.1's, whose manifests list few
    files or none. Raises RunError when there is no such run, it is unfinished, or files are missing or have changed.
    """
    folder = open_folder(place)
    files = folder.files(hidden=True)  # a task's name may begin with a dot
    if MANIFEST_FILE not in files:
        if RUN_FILE in files:
            started = folder.read_json(RUN_FILE)
            raise RunError(
                f"{folder}: an unfinished `birbal {started.get('step')}` run (no {MANIFEST_FILE}); "
                "rerun its command to finish it"
            )
        is_there = files or (folder.is_local and folder.local.is_dir())
        found = f"no {MANIFEST_FILE} here" if is_there else "no such folder"
        raise RunError(f"{folder}: {found}; expected the output of `birbal {step}`")
    manifest = folder.read_json(MANIFEST_FILE)
    if not isinstance(manifest, dict):
        raise RunError(f"{folder.at(MANIFEST_FILE)}: expected a JSON object, found {type(manifest).__name__}")
    if manifest.get("step") != step:
        raise RunError(f"{folder}: the output of `birbal {manifest.get('step')}`, expected that of `birbal {step}`")
    if manifest.get("format", 1) > FORMAT:
        raise RunError(
            f"{folder}: a later version of birbal_ray made this run, and this one can't read it; install that version"
        )
    if manifest.get("format", 1) < oldest:
        raise RunError(
            f"{folder}: an earlier version of birbal_ray made this run, and this one can't read it; "
            f"run `birbal {step}` again with another --output"
        )
    if manifest.get("format") == FORMAT and (wrong := wrong_files(manifest, files)):
        raise RunError(
            f"{folder}: {len(wrong)} file(s) of this finished run are missing or have changed (first: {wrong[0]}); "
            f"run its `birbal {step}` command again, which makes them again"
        )
    return manifest


def check_input(folder: Folder, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Check files of a finished run against its manifest's sha256. Raises RunError when one was edited since."""
    remake = f"put the original back, or run `birbal {manifest.get('step')}` again with another --output"
    for name in names:
        try:
            found = folder.record_of(name).sha256
        except FileNotFoundError:
            raise RunError(f"{folder.at(name)}: missing; {remake}") from None
        if listed_sha256(manifest, name) not in (None, found):
            raise RunError(f"{folder.at(name)}: edited since its run finished (its sha256 is another); {remake}")


def listed_sha256(manifest: Mapping[str, Any], name: str) -> str | None:
    """The sha256 that a manifest gives for a file; None where it gives none, as version 0.1's often did."""
    files = manifest.get("files")
    record = files.get(name) if isinstance(files, Mapping) else None
    found = record.get("sha256") if isinstance(record, Mapping) else record  # version 0.1's mix: the hash alone
    return found if isinstance(found, str) else None


def wrong_files(manifest: Mapping[str, Any], files: Mapping[str, FileStat]) -> list[str]:
    """Of the files that a manifest lists, those that are missing or have another size, and how."""
    wrong = []
    for name, record in manifest["files"].items():
        if name not in files:
            wrong.append(f"{name} is missing")
        elif isinstance(record, Mapping) and files[name].size != record["size"]:
            wrong.append(f"{name} has {files[name].size:,} bytes, not {record['size']:,}")
    return wrong
