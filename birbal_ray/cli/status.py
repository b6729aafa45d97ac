"""`birbal status`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from birbal_ray.cli.options import format_option, print_table

if TYPE_CHECKING:
    from birbal_ray.status import Row


WATCH_SECONDS, IDLE_LOOKS = 5.0, 4  # a pipeline pauses between two steps


@click.command()
@click.argument("run")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until nothing runs. Ctrl-C ends it.")
@format_option
def status(run: str, watch: bool, output_format: str) -> None:
    """Say what the steps in RUN have done, which of them is at work, and how to go on.

    RUN is a folder that holds the steps' output folders, or one of these. It is only read: a run that
    works there is not disturbed. Whether one on another machine still lives is judged by its files.

    \b
    Examples:
      birbal status runs
      birbal status s3://bucket/runs
      birbal status runs/demo --watch
      birbal status runs/score --format json
    """
    from birbal_ray.status import RUNNING, read_budget, read_status

    rows = read_status(run)
    if output_format != "text":
        print_table([_record(row) for row in rows], output_format)
        return
    idle = 0
    while True:
        if watch:
            click.clear()
        print_table([_cells(row, time.time()) for row in rows], output_format)
        if budget := read_budget(run):
            click.echo(budget)
        todo = [row for row in rows if row.next]
        for row in todo:
            click.echo(f"next: {row.next}" if len(todo) == 1 else f"next ({row.place.rpartition('/')[2]}): {row.next}")
        idle = 0 if any(row.state == RUNNING for row in rows) else idle + 1
        if not watch or idle == IDLE_LOOKS:
            return
        time.sleep(WATCH_SECONDS)
        rows = read_status(run)


def _record(row: Row) -> dict[str, Any]:
    """For other programs: figures apart, the time as ISO 8601."""
    return {
        "step": row.step,
        "folder": row.place,
        "state": row.state,
        "detail": row.detail,
        "done": row.done,
        "planned": row.planned,
        "progress": row.progress,
        "touched": datetime.fromtimestamp(row.touched, UTC).isoformat(timespec="seconds") if row.touched else None,
        "wall_seconds": row.wall_seconds,
        "next": row.next,
    }


def _cells(row: Row, now: float) -> dict[str, Any]:
    from birbal_ray.progress import duration

    return {
        "step": row.step,
        "folder": row.place,
        "state": row.detail or row.state,
        "progress": row.progress or "-",
        "last touched": f"{duration(max(0.0, now - row.touched))} ago" if row.touched else "-",
        "wall time": duration(row.wall_seconds) if row.wall_seconds else "-",
    }
