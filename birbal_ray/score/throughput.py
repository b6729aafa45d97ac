"""Rates of a running score run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from birbal_ray.progress import duration
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.monitor import Snapshot


class Meter:
    """Counts of one session; rates run from the moment the first engine was ready."""

    def __init__(self, rows_before: int, rows_total: int) -> None:
        self._before, self._total = rows_before, rows_total
        self._written = self._errors = 0
        self._begun = time.monotonic()
        self._ready_at: float | None = None
        self._ended = self._begun
        self._last = Snapshot()

    def written(self, rows: int, errors: int) -> None:
        """A shard stands on disk."""
        self._written += rows
        self._errors += errors
        self._ended = time.monotonic()

    def line(self, snapshot: Snapshot) -> str:
        """The progress line."""
        self._last = snapshot
        if snapshot.first_ready_at is not None and self._ready_at is None:
            self._ready_at = time.monotonic() - (time.time() - snapshot.first_ready_at)
        if self._ready_at is None:
            waited = duration(time.monotonic() - self._begun)
            return f"loading the model ({snapshot.num_started} engine(s) started, {waited})"
        seconds = max(1e-9, time.monotonic() - self._ready_at)
        counts = snapshot.counts
        rows = max(self._written, counts["rows"])
        rate = rows / seconds
        left = max(0, self._total - self._before - rows)
        cached = counts["cached_tokens"] / counts["prompt_tokens"] if counts["prompt_tokens"] else 0.0
        parts = [
            f"{min(self._total, self._before + rows)}/{self._total} rows",
            f"{rate:.1f} rows/s",
            f"{counts['prompt_tokens'] / seconds:.0f} prompt tokens/s",
            f"{cached:.0%} from cache",
            f"{max(self._errors, counts['errors'])} errors",
            f"ETA {duration(left / rate)}" if rate else "ETA ?",
        ]
        if snapshot.num_restarts or snapshot.num_moves:
            parts.append(f"{snapshot.num_restarts + snapshot.num_moves} engine restarts")
        return " · ".join(parts)

    def session(self) -> dict[str, Any]:
        """For the manifest: rows, seconds by phase, rates (steady state: from the first engine's being ready
        to the last shard's being on disk)."""
        steady = max(0.0, self._ended - (self._ready_at or self._ended))
        computed = sum(self._last.counts[name] for name in ("prompt_tokens", "completion_tokens"))
        return {
            "rows": self._written,
            "load_seconds": round((self._ready_at or time.monotonic()) - self._begun, 3),
            "steady_seconds": round(steady, 3),
            "rows_per_second": round(self._written / steady, 3) if steady else None,
            "tokens_per_second": round(computed / steady, 1) if steady else None,
            "engine_restarts": self._last.num_restarts + self._last.num_moves,
        }


def rate_key(config: ScoreConfig) -> str:
    """Under which `rates` keeps prompt + completion tokens per second and replica."""
    name = config.model.name
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return f"{name} {config.engine.device} {config.engine.backend}"
