"""Teams read from files: the published table, another table, one model's results."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from birbal_ray.evaluate.leaderboard import METRICS, SCENARIOS
from birbal_ray.settings import ConfigError

Values = dict[str, float | None]

PUBLISHED_FILE = "teams_4090.json"
DERIVED = {"Score_full", "Score_open", "Score_hidden", *(f"{name} Mean Win Rate" for name in SCENARIOS)}


def load_published() -> dict[str, Values]:
    """The eight teams on the final leaderboard of the challenge's RTX 4090 track; the file names its source."""
    return load_teams(Path(str(resources.files("birbal_ray.evaluate") / PUBLISHED_FILE)))


def load_teams(file: Path) -> dict[str, Values]:
    """A table of teams: `{"teams": [{"team": …, "metrics": {…}}, …]}`, or pairs `[[team, {…}], …]`.

    Derived values (win rates, scores) are left out. Raises ConfigError that names file, team and metric.
    """
    content = _read_json(file)
    entries = content.get("teams") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f'{file}: expected {{"teams": [{{"team": …, "metrics": …}}, …]}} or [[team, metrics], …]')
    teams: dict[str, Values] = {}
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, list) and len(entry) == 2:
            entry = {"team": entry[0], "metrics": entry[1]}
        name, values = _team(entry, f"{file}: entry {number}")
        if name in teams:
            raise ConfigError(f"{file}: team {name!r} is there twice")
        teams[name] = values
    return teams


def load_results(file: Path) -> tuple[str, Values]:
    """One model, `{"team": …, "metrics": {…}}` → (name, values). Raises ConfigError like load_teams."""
    return _team(_read_json(file), str(file))


def load_added(files: Iterable[Path], teams: Mapping[str, Any]) -> dict[str, Values]:
    """The models of several results files. Raises ConfigError when a name repeats or is one of `teams`."""
    added: dict[str, Values] = {}
    for file in files:
        name, values = load_results(file)
        if name in teams or name in added:
            raise ConfigError(f"{file}: team {name!r} is in the table already; give the model another name")
        added[name] = values
    return added


def _team(entry: object, where: str) -> tuple[str, Values]:
    if not isinstance(entry, dict) or not {"team", "metrics"} <= entry.keys():
        raise ConfigError(f'{where}: expected {{"team": "my-model", "metrics": {{"MMLU - EM": 0.6, …}}}}')
    name, metrics = entry["team"], entry["metrics"]
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{where}: 'team' is {_shown(name)}, expected a name")
    if not isinstance(metrics, dict):
        raise ConfigError(f"{where}: 'metrics' is {_shown(metrics)}, expected metric names with their values")
    values = {key: _value(value, key, where) for key, value in metrics.items() if key not in DERIVED}
    return name, values


def _value(value: object, metric: str, where: str) -> float | None:
    if metric not in METRICS:
        by_folded = {name.casefold(): name for name in METRICS}
        (nearest,) = difflib.get_close_matches(metric.casefold(), by_folded, n=1, cutoff=0)
        raise ConfigError(f"{where}: unknown metric {metric!r} (nearest: {by_folded[nearest]!r})")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:  # NaN too
        raise ConfigError(f"{where}: {metric!r} is {_shown(value)}, expected a number from 0 to 1, or null")
    return float(value)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: can't be read as JSON ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
