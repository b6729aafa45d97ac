"""The stages a shard passes through, each a Ray Data map over rows of one shard each.

build prompts (read, count tokens) → score prompts (engine, metric, one Parquet file). A Ray Data row is a complete
shard, so a block can never split one. Each stage runs on whatever node has room, reads and writes the run folder
itself, and makes the same rows when it is retried; the second one publishes complete files: exactly once.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa

from birbal_ray import models
from birbal_ray.adapters import AdapterFolder, find_adapter
from birbal_ray.cluster import locked_folder, log_to, remove_stale_folders
from birbal_ray.ni import prompt, reader
from birbal_ray.ni.metrics import METRIC_OF_LABEL, score_answer
from birbal_ray.ni.schema import Instance, Task, TaskError, order_instances
from birbal_ray.run import LOG_FOLDER
from birbal_ray.schemas import ROWS_FOLDER, SCORE_ROWS
from birbal_ray.score import plan
from birbal_ray.score.config import EngineSettings, ResourceSettings, ScoreConfig
from birbal_ray.score.engine import Adapter, Completion, Engine, Request, Sampling, VllmEngine, check_engine
from birbal_ray.score.loop import EngineDeadError, EngineLoop, Turns
from birbal_ray.score.shards import METADATA_KEY, ZERO_SHOT, Shard, Tally, WrittenFile, row_work
from birbal_ray.score.simulated import START_FAILURE, SimulatedEngine
from birbal_ray.score.tokens import load_tokenizer, prompt_token_ids, stops
from birbal_ray.settings import one_line
from birbal_ray.storage import Folder, input_folder

REPORT_SECONDS = 1.0  # between a replica's reports
LOG_UPLOAD_SECONDS = 10.0
GATHER_SECONDS = 0.1  # the first shards reach an engine together, in any order

Row = dict[str, Any]  # columns of SCORE_ROWS, and until it is scored also token_ids, empty with an error


@dataclass(frozen=True, slots=True)
class ShardRows:
    """What the first stage hands to the second, pickled: a shard's rows, and what all of its prompts have in common."""

    shard: Shard
    rows: list[Row]
    prefix_token_ids: list[int]  # what the prompts begin with
    sampling: Sampling

    def requests(self, first: int, last: int, adapter: str = "") -> dict[int, Request]:
        """The engine's requests for the rows [first, last) that have no error yet, by the row's index.

        `adapter`: of shards whose variant names none.
        """
        about = self.shard.max_completion_tokens, self.shard.variant.adapter or adapter, self.sampling
        rows = ((index, self.rows[index]) for index in range(first, last))
        return {
            index: Request(row["few_shot_prompt"], row["token_ids"], *about)
            for index, row in rows
            if row["error"] is None
        }


class BuildPrompts:
    """Reads a shard's instances, builds their prompts, counts tokens on the CPU.

    Instances that can't be scored and prompts that don't fit get their `error` here, so that they never reach the
    engine.
    """

    def __init__(self, config: ScoreConfig, folder: Folder, excluded: Collection[str] = frozenset()) -> None:
        self._config, self._folder, self._excluded = config, folder, excluded
        self._tokenizer = load_tokenizer(config)
        self._chat = models.read_template(self._tokenizer, config.prompt.format, config.prompt.chat_template_arguments)
        strings, ids = stops(self._tokenizer, self._chat)
        self._sampling = Sampling(stop=strings, stop_token_ids=ids)
        # A task's shards are adjacent: without this each would parse its file again.
        self._ordered_instances = functools.lru_cache(maxsize=4)(self._read)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`{"shard"}` → `{"rows": ShardRows}` with prompts."""
        shard: Shard = pickle.loads(row["shard"])  # noqa: S301 (our own source's)
        task, ordered = self._ordered_instances(shard.path, shard.task, shard.sha256)
        instances = ordered[shard.first : shard.last]
        if shard.retry is not None:
            instances = [instances[position] for position in shard.retry]
        trained = shard.variant.prompt_format == ZERO_SHOT
        examples = () if trained else prompt.examples_of(task, self._config.prompt.num_shots)
        about: dict[str, Any] = {"chat": self._chat, "preamble": not trained}
        tokens_of = functools.partial(prompt_token_ids, self._tokenizer, as_trained=trained, chat=self._chat)
        prompts = [prompt.render_prompt(task.definition, examples, one.input, **about) for one in instances]
        limits = shard.max_completion_tokens, self._config.engine.max_model_len
        rows: list[Row] = []
        for instance, text, ids in zip(instances, prompts, tokens_of(prompts), strict=True):
            error = instance.error or plan.too_long_reason(len(ids), *limits)
            rows.append(
                {
                    "orig_input": instance.input,
                    "few_shot_prompt": text,
                    "answer": list(instance.references),
                    "row_id": instance.row_id,
                    "instance_id": instance.instance_id,
                    "error": error,
                    "token_ids": [] if error else ids,
                    "num_prompt_tokens": None if instance.error else len(ids),
                }
            )
        (shared,) = tokens_of([prompt.render_prefix(task.definition, examples, **about)])
        return {"rows": pickle.dumps(ShardRows(shard, rows, shared, self._sampling))}

    def _read(self, path: str, name: str, sha256: str) -> tuple[Task, list[Instance]]:
        published = path.startswith(f"{plan.INPUTS_FOLDER}/")
        task = reader.parse_task(name, self._folder.read_bytes(path) if published else Path(path).read_bytes())
        if task.sha256 != sha256:
            raise TaskError(f"{path}: the file changed while the run was going on; run the same command again")
        return task, order_instances(task, self._config.seed, self._excluded)


class ScorePrompts:
    """One engine. Completes the prompts of the shards given to it by several threads at once, scores and writes them.

    A process whose engine fails ends itself (the device may be poisoned), and Ray starts it again under the same
    actor id; what was in flight is tried again. The monitor knows which shards these were.
    """

    def __init__(
        self,
        config: ScoreConfig,
        model_fingerprint: str,
        adapters: Sequence[Adapter],
        monitor: Any,
        folder: Folder,
        replicas_per_node: int,
    ) -> None:
        import ray

        context = ray.get_runtime_context()
        self._config, self._folder, self._monitor = config, folder, monitor
        self._replica = context.get_actor_id() or "driver"
        self._upload_log = _log_into(folder, f"{LOG_FOLDER}/replica-{self._replica[:12]}.log")
        # Straight to the file: Ray's own stdout object keeps what is printed for a while.
        os.write(1, f"replica {self._replica} pid {os.getpid()} node {context.get_node_id()}\n".encode())
        self._turns = Turns(config.resources.shards_in_flight)
        self._writes = Turns(config.resources.shards_in_flight + 1)  # threads that this process has
        if not ray.get(monitor.started.remote(self._replica, context.get_node_id())):
            threading.Event().wait()  # tried too often; a constructor that waits gets no work and holds nobody up
        try:
            model, own, found = find_model(config)
            if found != model_fingerprint:
                raise models.ModelError(f"{model.path}: not the model that the run was started with, on this node")
            self._adapter = own.name if own else ""  # of shards whose variant names none
            # Ray derives OMP_NUM_THREADS from num_cpus: one logical CPU would mean one core (2.5, not 4.7 requests/s).
            share = max(1, len(os.sched_getaffinity(0)) // replicas_per_node)
            resources = config.resources.replace({"threads_per_replica": config.resources.threads_per_replica or share})
            if config.engine.device == "cpu":
                os.environ["OMP_NUM_THREADS"] = str(resources.threads_per_replica)  # before torch is loaded
            else:
                os.environ.pop("OMP_NUM_THREADS", None)  # Ray's; without one vLLM serves with one thread, none spins
            here = [replace(one, path=str(input_folder(one.path))) for one in adapters]
            here += [Adapter(own.name, str(own.path), own.rank, own.modules)] if own else []
            with _turn_on_card(resources.gpus_per_replica):
                self._loop = EngineLoop(lambda: load_engine(model.path, config.engine, resources, here), GATHER_SECONDS)
        except Exception as error:  # whatever it is: another try, in a new process, may go well
            self._end(monitor.start_failed, f"{type(error).__name__}: {one_line(error)}")
        ray.get(monitor.ready.remote(self._replica))

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """BuildPrompts' row → the name of the shard's file, which is written."""
        import ray

        built: ShardRows = pickle.loads(row["rows"])  # noqa: S301
        name = built.shard.name
        completions: dict[int, Completion] = {}
        with contextlib.ExitStack() as turn:
            turn.enter_context(self._turns.take(alone=False))
            os.write(1, f"begins {name}\n".encode())
            alone, parts, fatal = ray.get(self._monitor.begin.remote(self._replica, name, len(built.rows)))
            if alone:
                turn.close()
                turn.enter_context(self._turns.take(alone=True))
            for first, last in parts:
                if alone:
                    ray.get(self._monitor.trying.remote(self._replica, name, (first, last)))
                try:
                    completions |= self._complete(built.requests(first, last, self._adapter), built.prefix_token_ids)
                except EngineDeadError as error:
                    self._end(self._monitor.died, str(error))
            self._monitor.completed.remote(self._replica, name)
        for index, reason in fatal.items():
            completions[index] = Completion("", None, 0, None, f"the engine died of it: {reason}")
        # Here and not in a stage of its own: Ray's driver pays for each stage that a shard passes.
        with self._writes.take(alone=False):
            ray.get(self._monitor.written.remote(write_shard(built, completions, self._folder, self._config)))
        return {"file": name}

    def _complete(self, requests: Mapping[int, Request], prefix: Sequence[int]) -> dict[int, Completion]:
        """The requests' completions; the monitor hears of them as they come."""
        completions: dict[int, Completion] = {}
        counts, reported = Counter[str](), time.monotonic()
        futures = self._loop.submit(list(requests.values()), prefix)
        for (index, request), future in zip(requests.items(), futures, strict=True):
            completions[index] = done = future.result()
            counts.update(
                rows=1,
                errors=int(done.error is not None),
                prompt_tokens=len(request.token_ids),
                cached_tokens=done.num_cached_tokens or 0,
                completion_tokens=done.num_completion_tokens,
                work=row_work(request.max_tokens),
            )
            if time.monotonic() - reported > REPORT_SECONDS or len(completions) == len(requests):
                self._monitor.add.remote(self._replica, counts)
                counts, reported = Counter(), time.monotonic()
        return completions

    def _end(self, report: Any, reason: str) -> None:
        import ray

        print(f"this process ends: {reason}", flush=True)
        ray.get(report.remote(self._replica, reason))
        self._upload_log()
        with self._writes.take(alone=True):  # what is completed is written first
            os._exit(1)


def _turn_on_card(gpus_per_replica: float) -> contextlib.AbstractContextManager[object]:
    """Engines that share a card start one after the other: each takes what the others load meanwhile for its own."""
    if gpus_per_replica >= 1:
        return contextlib.nullcontext()
    card = f"birbal-card-{os.getuid()}-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}.lock"
    return filelock.FileLock(Path(tempfile.gettempdir(), card))


def write_shard(
    built: ShardRows, completions: Mapping[int, Completion], folder: Folder, config: ScoreConfig
) -> WrittenFile:
    """Score what an engine made of a shard's prompts and publish its file in the run folder.

    `completions`: by the row's index; a row without one has its error.
    """
    shard, rows = built.shard, folder.subfolder(ROWS_FOLDER)
    completed: list[Row] = []
    for index, row in enumerate(built.rows):
        done = completions.get(index) or Completion("", None, 0, None, row["error"])
        ran = ("num_cached_tokens", "num_completion_tokens", "finish_reason") if done.error is None else ()
        about = {name: getattr(done, name) for name in ran}
        completed.append({**row, **about, "prediction": done.text, "error": done.error})
    table = score_table(shard.task, shard.label, completed, config.prompt.format)
    if shard.retry is not None:
        table = replace_rows(rows.read_table(shard.name), shard.retry, table)
    return write_rows(rows, table, shard, config.adaptive.failed_below)


def write_rows(folder: Folder, table: pa.Table, shard: Shard, failed_below: float) -> WrittenFile:
    """Publish a shard's SCORE_ROWS below the rows folder, with what they were made from in the file's metadata."""
    name = shard.name
    if table.num_rows != shard.num_rows:
        raise RuntimeError(f"{name}: {table.num_rows} rows, the plan says {shard.num_rows}")
    made_from = {key: getattr(shard, key) for key in ("task", "first", "last", "sha256", "max_completion_tokens")}
    record = folder.write_parquet(name, table.replace_schema_metadata({METADATA_KEY: json.dumps(made_from).encode()}))
    num_errors, scores = table.num_rows - table["error"].null_count, table["score"].drop_null().to_pylist()
    return WrittenFile(
        name, shard.task, table.num_rows, num_errors, record, Tally.of(scores, shard.label, failed_below)
    )


def replace_rows(old: pa.Table, positions: Sequence[int], new: pa.Table) -> pa.Table:
    """`old` with the rows at `positions` exchanged for `new`'s, all others value for value."""
    both = pa.concat_tables([old.cast(new.schema), new])
    order = list(range(old.num_rows))
    for place, position in enumerate(positions):
        order[position] = old.num_rows + place
    return both.take(order)


def score_table(task: str, label: str, completed: list[Row], prompt_format: str = prompt.BIRBAL) -> pa.Table:
    """SCORE_ROWS of one task from completed rows (or from SCORE_ROWS, scored again); an error row has no score."""
    about = {"task": task, "label": label, "metric": METRIC_OF_LABEL[label]}
    rows = []
    for row in completed:
        extracted = prompt.extract_answer(row["prediction"], chat=prompt_format == prompt.CHAT)
        score = score_answer(label, extracted, row["answer"]) if row["error"] is None else None
        rows.append({**row, **about, "extracted": extracted, "score": score})
    return pa.Table.from_pylist(rows, schema=SCORE_ROWS)


def _log_into(folder: Folder, name: str) -> Callable[[], None]:
    """Send this process's output to a file of the run folder; call the result to publish what is there (at a URL)."""
    if folder.is_local:
        log_to(folder.local / name)
        return lambda: None
    remove_stale_folders()  # of engines that were killed here
    lasting = contextlib.ExitStack()
    atexit.register(lasting.close)
    file = lasting.enter_context(locked_folder(Path(tempfile.gettempdir()))) / Path(name).name
    log_to(file)

    def upload() -> None:
        with contextlib.suppress(Exception):  # a log isn't worth a failed replica
            folder.upload(file, name)

    def keep_uploading() -> None:
        size = -1
        while True:
            time.sleep(LOG_UPLOAD_SECONDS)
            if file.stat().st_size != size:
                size = file.stat().st_size
                upload()

    threading.Thread(target=keep_uploading, name="log", daemon=True).start()
    return upload


def find_model(config: ScoreConfig) -> tuple[models.Model, AdapterFolder | None, str]:
    """(model, its adapter if the settings name one, fingerprint of both); ConfigError for another model's adapter."""
    if config.engine.backend == "simulated":
        model = models.Model("simulated", Path("simulated"), None, "simulated")
    else:
        model = models.resolve_model(config.model.name, config.model.revision)
    if not config.model.adapter:
        return model, None, model.fingerprint
    adapter = find_adapter(config.model.adapter, model)
    return model, adapter, f"{model.fingerprint}+{adapter.fingerprint}"


def load_engine(
    model: Path, engine: EngineSettings, resources: ResourceSettings, adapters: Sequence[Adapter] = ()
) -> Engine:
    """The engine that the settings name; `engine.device` must be resolved (cpu or gpu).

    Raises ModelError where vLLM does not apply an adapter.
    """
    if engine.backend == "simulated":
        if os.environ.get(START_FAILURE):
            raise RuntimeError("simulated start failure")
        return SimulatedEngine(resources.simulated_row_seconds, engine.max_model_len, [one.name for one in adapters])
    loaded = VllmEngine(model, engine, resources, adapters)
    check_engine(loaded, model, adapters)
    return loaded
