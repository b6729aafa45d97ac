"""The training worker, run and watched from the driver."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from birbal_ray.cluster import MIN_LOGICAL_CPUS, ray_session, told
from birbal_ray.models import Model
from birbal_ray.progress import ProgressLine, duration
from birbal_ray.rates import remember
from birbal_ray.run import LOG_FOLDER, RunError
from birbal_ray.storage import absolute, is_url, refresh
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.curve import read_metrics
from birbal_ray.train.files import METRICS_FILE, STOP_FILE
from birbal_ray.train.line import TrainLine
from birbal_ray.train.look import rate_key
from birbal_ray.train.worker import missing_resources, run_worker

STEP = "train"
POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0  # between two looks at the cluster's nodes


def logical_cpus(config: TrainConfig) -> float:
    """Logical CPUs that a run needs at once."""
    return max(MIN_LOGICAL_CPUS, config.resources.num_cpus + 2)


def run_and_watch(
    config: TrainConfig, model: Model, folder: Path, progress: ProgressLine, steps_per_epoch: float
) -> dict[str, Any]:
    """Run the worker and show its progress; its outcome. SIGTERM and Ctrl-C let it save first."""
    with ray_session(logical_cpus(config), folder / LOG_FOLDER / "ray.log", about=told(STEP, config.output)):
        _wait_for_node(config, progress)
        progress.update(f"starting the worker; logs in {folder / LOG_FOLDER}")
        refresh(folder)  # a worker on another node begins with what is at the run's URL
        result: dict[str, Any] = {}
        ended = threading.Event()  # not Thread.join: interrupted, it takes a living thread for a dead one (gh-90882)
        threading.Thread(
            target=_collect, args=(result, ended, config, model, folder), name="train", daemon=True
        ).start()
        line = TrainLine(folder, config, steps_per_epoch)
        looked = time.monotonic()
        missing = None
        try:
            while not ended.wait(POLL_SECONDS):
                if time.monotonic() - looked > LOOK_SECONDS:
                    looked, missing = time.monotonic(), _missing(config)
                if missing:  # its node was taken away; Ray places the worker as soon as another one joins
                    progress.update(f"waiting: {missing}")
                else:
                    line.show(progress)
        except KeyboardInterrupt:
            (folder / STOP_FILE).touch()
            progress.message(
                f"stopping: the worker saves a checkpoint first (at most {config.resources.stop_grace:.0f} s)"
            )
            if not ended.wait(config.resources.stop_grace) or "outcome" not in result:
                raise
        finally:
            progress.close()
    if "error" in result:
        raise result["error"]
    _remember_rate(config, folder)
    return result["outcome"]


def _missing(config: TrainConfig) -> str | None:
    import ray

    return missing_resources(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def _wait_for_node(config: TrainConfig, progress: ProgressLine) -> None:
    """Until a node can take the worker; at once an error where none can join (a cluster of our own)."""
    end = time.monotonic() + (config.resources.wait if os.environ.get("RAY_ADDRESS") else 0.0)
    while missing := _missing(config):
        left = end - time.monotonic()
        if left <= 0:
            raise RunError(missing)
        progress.update(f"waiting (at most {duration(left)} more, resources.wait): {missing}")
        time.sleep(min(POLL_SECONDS, left))


def _collect(result: dict[str, Any], ended: threading.Event, config: TrainConfig, model: Model, folder: Path) -> None:
    try:
        url = absolute(config.output) if config.output and is_url(config.output) else None
        result["outcome"] = run_worker(config, model.fingerprint, folder, url)
    except BaseException as error:  # raised in the main thread
        result["error"] = error
    finally:
        ended.set()


def _remember_rate(config: TrainConfig, folder: Path) -> None:
    """Tokens per second of training time, evaluations and checkpoints included."""
    steps = [line for line in read_metrics(folder / METRICS_FILE) if "loss" in line and line.get("step_seconds")]
    seconds = sum(line["step_seconds"] for line in steps[1:])  # the first step warms up
    if seconds:
        remember(rate_key(config), sum(line["tokens"] for line in steps[1:]) / seconds)
