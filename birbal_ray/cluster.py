"""Ray for one command: the cluster that RAY_ADDRESS names, else a quiet local one; its nodes, and what fits on them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from birbal_ray.run import LOG_FOLDER
from birbal_ray.settings import ConfigError
from birbal_ray.storage import Folder, RunError, make_cache_folder

FOLDER_PREFIX = "birbal-ray-"
FOLDER_LOCK = ".driver.lock"  # held as long as the folder's driver lives
# A socket's path has at most 107 characters; Ray's longest below its folder is
# /session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store.
MAX_FOLDER_LENGTH = 107 - 65
HEAD = "node:__internal_head__"
CARD = "accelerator_type:"
NODE_ID_LABEL = "ray.io/node-id"  # in every node's labels, and its name already
MIN_LOGICAL_CPUS = 4  # on 2, a reader, an engine and a writer wait for each other for ever
OBJECT_STORE_BYTES = 1 << 30
START_ATTEMPTS = 3
AUTH_MODE = "RAY_AUTH_MODE"  # a local ray.init sets it to token, for this process and its children, for good

# Set before Ray starts, so that its processes inherit them.
QUIET_ENVIRONMENT = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # 32 actors by default
    "RAY_worker_niceness": "0",  # workers run at nice 15 by default
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # what is given no card sees none
    "RAY_prestart_worker_first_driver": "0",  # one process per logical CPU, most of them never used
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread of a run that has ended would start Ray again
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a cluster. Totals, not what is free; `cards` as Ray calls them."""

    name: str  # its id's first eight digits
    ip: str
    alive: bool
    head: bool
    num_cpus: float
    num_gpus: float
    cards: tuple[str, ...]
    memory_bytes: float
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """Workers that a step places; each must fit on one node, as CPUs and GPUs of different nodes don't add up.

    `name` is "replica" (of an engine) or "worker" (the only one). `total_cpus`: logical CPUs that the step needs on
    all nodes together, its helpers' included.
    """

    name: str
    count: int
    num_cpus: float
    num_gpus: float = 0.0  # below 1: several workers share a card
    accelerator_type: str | None = None
    avoid_accelerator_types: tuple[str, ...] = ()
    total_cpus: float = 0.0

    def places_on(self, node: Mapping[str, float]) -> int:
        """How many of these workers a node with these total resources can take."""
        places = _floor(node.get("CPU", 0.0) / self.num_cpus)
        if not self.num_gpus:
            return places
        cards = {key.removeprefix(CARD) for key in node if key.startswith(CARD)}
        if cards.intersection(self.avoid_accelerator_types) or (
            self.accelerator_type and self.accelerator_type not in cards
        ):
            return 0
        gpus = node.get("GPU", 0.0)
        if self.num_gpus >= 1:
            return min(places, _floor(gpus / self.num_gpus))
        # A share lies on one card; a node may offer a part of a card as its last.
        return min(places, _floor(gpus) * _floor(1 / self.num_gpus) + _floor(gpus % 1 / self.num_gpus))

    def __str__(self) -> str:
        wanted = f"{self.num_cpus:g} CPUs"
        if self.num_gpus:
            wanted += f" and {self.num_gpus:g} GPUs on {self.accelerator_type or 'any card'}"
            wanted += f" but {', '.join(self.avoid_accelerator_types)}" if self.avoid_accelerator_types else ""
        return f"{'a worker' if self.name == 'worker' else f'{self.count} {self.name}(s)'} of {wanted}"


def can_place(request: WorkerRequest, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What a cluster lacks to place all workers of a request, or None. `nodes`: each living node's total resources.

    Ray would wait for it without a word. What else runs there is not looked at.
    """
    places = sum(request.places_on(node) for node in nodes)
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    if places >= request.count and cpus >= request.total_cpus:
        return None
    cards = sorted({key.removeprefix(CARD) for node in nodes for key in node if key.startswith(CARD)})
    has = f"{gpus:g} GPUs, cards: {', '.join(cards) or 'none'}"
    if request.name == "worker":
        card = f"a {request.accelerator_type or 'GPU'} with " if request.num_gpus else ""
        return (
            f"no node has {card}{request.num_cpus:g} free CPUs on its node; the cluster has {len(nodes)} node(s), "
            f"{has} (resources.accelerator_type takes one of these names)"
        )
    return (
        f"the cluster can place {min(places, request.count)} of {request.count} {request.name}s (it has {len(nodes)} "
        f"nodes, {cpus:g} CPUs of {request.total_cpus:g} needed, {has})"
    )


def nodes_of(listing: Sequence[Mapping[str, Any]]) -> list[Node]:
    """What `ray.nodes()` gave: living ones first, the head before the others, then by address."""
    nodes = []
    for entry in listing:
        resources = entry["Resources"]
        node = Node(
            name=entry["NodeID"][:8],
            ip=entry["NodeManagerAddress"],
            alive=bool(entry["Alive"]),
            head=HEAD in resources,
            num_cpus=resources.get("CPU", 0.0),
            num_gpus=resources.get("GPU", 0.0),
            cards=tuple(sorted(name.removeprefix(CARD) for name in resources if name.startswith(CARD))),
            memory_bytes=resources.get("memory", 0.0),
            labels={name: value for name, value in sorted(entry.get("Labels", {}).items()) if name != NODE_ID_LABEL},
        )
        nodes.append(node)
    return sorted(nodes, key=lambda node: (not node.alive, not node.head, node.ip, node.name))


@contextlib.contextmanager
def ray_session(
    logical_cpus: float,
    log_file: Path | None = None,
    *,
    dashboard: bool = False,
    address: str | None = None,
    about: Mapping[str, str] | None = None,
) -> Iterator[str | None]:
    """Ray for the block: one that is already initialised, else that at `address` or RAY_ADDRESS, else a local one.

    `about` becomes the metadata of the Ray job (dashboard, `ray list jobs`): which step, which output.

    Gives the dashboard's host:port where there is one; a local cluster has it, on 127.0.0.1, if asked for.

    A local cluster gets `logical_cpus`, never fewer than 4 (logical CPUs may exceed real ones: they
    are tickets, not cores), keeps its files in a short folder under the temporary directory and
    removes it at the end. With a `log_file`, what Ray says in this process goes there.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield None
        return
    with _quiet(log_file), contextlib.ExitStack() as stack:
        address = address or os.environ.get("RAY_ADDRESS")
        if address:
            _check_answers(address)
            options = {
                "address": address,
                "job_config": importlib.import_module("ray.job_config").JobConfig(metadata=dict(about or {})),
            }
        else:
            remove_stale_folders()
            options = {
                "address": "local",
                "num_cpus": max(MIN_LOGICAL_CPUS, math.ceil(logical_cpus)),
                "include_dashboard": dashboard,
                "dashboard_host": "127.0.0.1",
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": str(stack.enter_context(_session_folder())),
            }
        url = _init(log_to_driver=False, logging_level=logging.ERROR, **options)
        try:
            yield url if address or dashboard else None
        finally:
            # After Ctrl-C Ray Data's thread still runs. If it calls Ray after the shutdown, Ray exits this process at
            # once, with code 1 and no message.
            for thread in threading.enumerate():
                if type(thread).__name__ == "StreamingExecutor":
                    with contextlib.suppress(Exception):
                        thread.shutdown(force=False)  # type: ignore[attr-defined]
            with contextlib.suppress(OSError):  # a broken pipe here would hide how the block ended
                ray.shutdown()


def ray_log_file(folder: Folder) -> Path:
    """Where to keep what Ray says in a driver's process: the run folder's logs/ray.log; for a URL, in the cache."""
    return (folder.local if folder.is_local else make_cache_folder(f"ray/{os.getpid()}")) / LOG_FOLDER / "ray.log"


def job_metadata(step: str, output: object) -> dict[str, str]:
    """Metadata of a step's Ray job."""
    return {"birbal_step": step, "birbal_output": str(output or "")}


def _session_folder() -> contextlib.AbstractContextManager[Path]:
    """A `locked_folder` for a local cluster's files, short enough for Ray's sockets."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent / f"{FOLDER_PREFIX}1234567-12345678")) > MAX_FOLDER_LENGTH:
        print(f"TMPDIR {parent} is too long for the paths of Ray's sockets: Ray's files go to /tmp", file=sys.stderr)
        parent = Path("/tmp")  # noqa: S108
    return locked_folder(parent)


@contextlib.contextmanager
def locked_folder(parent: Path) -> Iterator[Path]:
    """A new folder, locked until it is removed; that of a killed process goes by `remove_stale_folders`."""
    # Locked before it has the name by which another driver could take it for a dead one's.
    hidden = Path(tempfile.mkdtemp(prefix=f".{FOLDER_PREFIX}{os.getpid()}-", dir=parent))
    lock = filelock.FileLock(hidden / FOLDER_LOCK)
    lock.acquire()
    folder = hidden.rename(hidden.with_name(hidden.name[1:]))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _init(**options: Any) -> str | None:
    """ray.init, which replaces the SIGTERM handler by one that exits with 15: put the caller's back.

    Gives the dashboard's host:port.
    """
    import ray

    previous = signal.getsignal(signal.SIGTERM)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            context = ray.init(**options)
            break
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise RunError(
                    f"Ray did not start within its 30 s, {START_ATTEMPTS} times: the machine is very busy; "
                    "run the command again"
                ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous)
    return context.dashboard_url or None


def decide_device(asked: str, setting: str = "") -> str:
    """cpu or gpu; `auto` is what this machine has.

    Raises ConfigError, which names the `setting`, where a step would run on the cluster that RAY_ADDRESS names.
    """
    if asked != "auto":
        return asked
    if setting and os.environ.get("RAY_ADDRESS"):
        raise ConfigError(f"{setting} is auto, but RAY_ADDRESS names a cluster of other machines; give --device")
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def local_cards() -> tuple[int, str | None]:
    """(how many GPUs this machine has, what Ray calls them; None where it has no name for them)."""
    import torch
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia

    if not torch.cuda.is_available():
        return 0, None
    return torch.cuda.device_count(), Nvidia.get_current_node_accelerator_type()


def missing_cards(wanted: Mapping[str, str | None]) -> str:
    """Which steps this machine has no card for, in words; empty where it has all, or where a cluster runs them.

    `wanted`: step → a card as Ray calls it, or None for any.
    """
    ray = sys.modules.get("ray")
    if not wanted or os.environ.get("RAY_ADDRESS") or (ray and ray.is_initialized()):
        return ""
    count, card = local_cards()
    lacking = {step: one for step, one in wanted.items() if not count or (card and one and one != card)}
    if not lacking:
        return ""
    steps, cards = (", ".join(dict.fromkeys(one or "a GPU" for one in names)) for names in (lacking, lacking.values()))
    has = f"{count} × {card}" if count else "no GPU"
    hint = "" if count else "; if it has one, its driver must be 580 or later, and torch not the CPU build"
    return f"this machine has {has}; wanted: {cards} for {steps} (their device and resources.accelerator_type){hint}"


def _check_answers(address: str) -> None:
    """Raise RunError when nothing listens at [ray://]host:port; ray.init would try for over a minute, then abort."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit() or "://" in host:
        return  # auto, local, a service's address: Ray's to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise RunError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); unset it to use this machine"
        ) from None


def remove_stale_folders() -> None:
    """Remove folders of local clusters, trials and engines whose process is gone (it was killed and could not).

    The kernel says so by the folder's lock, also of drivers in other pid namespaces (containers that share /tmp).
    """
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:  # noqa: S108
        for lock_file in parent.glob(f"{FOLDER_PREFIX}*/{FOLDER_LOCK}"):
            with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(lock_file, blocking=False):
                shutil.rmtree(lock_file.parent, ignore_errors=True)


def _floor(value: float) -> int:
    return math.floor(value + 1e-9)  # five shares of 0.2 are a card


def log_to(file: Path) -> None:
    """Send this process's stdout and stderr, libraries' included, to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


@contextlib.contextmanager
def _quiet(log_file: Path | None) -> Iterator[None]:
    """Ray's Python loggers and its native code (which writes to descriptor 2) go to the file."""
    if log_file is None:
        yield
        return
    importlib.import_module("ray.data")  # sets its own log handlers up when imported; ours come after

    log_file.parent.mkdir(parents=True, exist_ok=True)
    stream = log_file.open("a", encoding="utf-8", buffering=1)
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("ray", "ray.data"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    # For good: these threads end a moment after Ray does.
    if getattr(threading.excepthook, "func", None) is not _log_ray_threads:
        threading.excepthook = functools.partial(_log_ray_threads, threading.excepthook)
    terminal, python_stderr = os.dup(2), sys.stderr
    try:
        sys.stderr.flush()
        os.dup2(stream.fileno(), 2)
        sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        handler.close()
        sys.stderr = python_stderr


def _log_ray_threads(others: Callable[[threading.ExceptHookArgs], Any], error: threading.ExceptHookArgs) -> None:
    """What ended a thread: one of Ray's (most find that Ray is being shut down), to its log; else to `others`."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.exc_traceback)]
    runs = next((name for name in modules if name != "threading"), "")
    if error.exc_value is None or not runs.startswith("ray."):
        others(error)
        return
    about = error.exc_type, error.exc_value, error.exc_traceback
    logging.getLogger("ray").error("a thread ended", exc_info=about)
