"""`birbal leaderboard`: a model's place among the teams of the LLM Efficiency Challenge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.common import format_option, note, print_table

if TYPE_CHECKING:
    from birbal_ray.evaluate.leaderboard import Sensitivity, Standing


@click.command(short_help="Place a model among the challenge's teams.")
@click.option(
    "--raw",
    "raw_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another table of teams; default: the eight published ones.",
)
@click.option(
    "--add",
    "added_files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A model's results, placed among the teams. Repeatable: all compete with all.",
)
@click.option(
    "--leave-one-out", "sensitivity", is_flag=True, help="Show how ranks and scores change when one team is left out."
)
@format_option
def leaderboard(raw_file: Path | None, added_files: tuple[Path, ...], sensitivity: bool, output_format: str) -> None:
    """Rank teams by win rates over nine scenarios: open and hidden score, and the full score of both.

    Without options: the final leaderboard of the NeurIPS 2023 LLM Efficiency Challenge, RTX 4090
    track, computed anew from the teams' raw metrics. A metric that a model lacks counts as worst.

    \b
    Example:
      birbal leaderboard --add results.json
    where results.json holds raw metrics from 0 to 1:
      {"team": "my-model", "metrics": {"MMLU - EM": 0.6, "GSM8K - EM": 0.41}}
    """
    from birbal_ray.evaluate import teams as files
    from birbal_ray.evaluate.leaderboard import METRICS, leave_one_out, missing_metrics, placed, zeroed_scores
    from birbal_ray.settings import ConfigError

    teams = files.load_published() if raw_file is None else files.load_teams(raw_file)
    added = files.load_added(added_files, teams)
    everybody = {**teams, **added}
    if sensitivity and len(everybody) < 2:
        raise ConfigError("--leave-one-out needs at least 2 teams, found 1")
    for name, values in (added if raw_file is None else everybody).items():
        if missing := missing_metrics(values):
            note(f"{name}: {len(missing)} of {len(METRICS)} metrics missing, counted as worst: {', '.join(missing)}")
    places = placed(teams, added)
    for zeroed in zeroed_scores(places):
        scenarios = " and ".join(zeroed.scenarios)
        note(
            f"warning: {zeroed.team}: win rate 0 on {scenarios}, so {zeroed.score} is next to 0 whatever the others are"
        )
    if sensitivity:
        _print_sensitivities(leave_one_out(everybody), output_format)
    else:
        _print_places(places, output_format, with_added=bool(added))


def _print_places(places: list[Standing], output_format: str, with_added: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "rank": place.rank,
            "team": place.team,
            "added": place.added,
            **place.win_rates,
            "Score_open": place.score_open,
            "Score_hidden": place.score_hidden,
            "Score_full": place.score_full,
        }
        for place in places
    ]
    # On a screen, a column of "no" is noise; for programs the columns stay the same.
    columns = [name for name in rows[0] if name != "added" or with_added or output_format != "text"]
    print_table(rows, output_format, columns)


def _print_sensitivities(found: list[Sensitivity], output_format: str) -> None:
    rows: list[dict[str, Any]] = []
    for entry in found:
        row = {
            "rank": entry.rank,
            "team": entry.team,
            "best rank": entry.ranks[0],
            "worst rank": entry.ranks[1],
            "Score_full": entry.score_full,
            "lowest": entry.scores[0],
            "highest": entry.scores[1],
        }
        for other in found:
            rank, score = entry.without.get(other.team, (None, None))
            if output_format == "text":  # narrow: a heading of two lines, ranks alone
                row[f"rank without\n{other.team}"] = rank
            else:
                row |= {f"rank without {other.team}": rank, f"Score_full without {other.team}": score}
        rows.append(row)
    print_table(rows, output_format)
