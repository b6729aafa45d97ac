"""The stages a shard passes through, each a Ray Data map over rows of one shard each.

prepare (read, build prompts, count tokens) → generate (engine) → write (score, one Parquet file).
A Ray Data row is a whole shard, so a block can never split one. A stage that is retried makes the
same rows again, and the last one writes by rename: exactly once by construction.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray import models
from birbal_ray.cluster import log_to
from birbal_ray.ni import prompt, reader
from birbal_ray.ni.metrics import METRIC_OF_LABEL, score_answer
from birbal_ray.ni.schema import Instance, Task, TaskError, take_first
from birbal_ray.run import write_parquet
from birbal_ray.schemas import SCORE_ROWS
from birbal_ray.score import plan
from birbal_ray.score.config import ResourceSettings, ScoreConfig
from birbal_ray.score.engine import Adapter, Completion, Request, load_engine
from birbal_ray.score.engine_loop import EngineDeadError, EngineLoop
from birbal_ray.score.monitor import EngineMonitor
from birbal_ray.score.plan import ZERO_SHOT, Shard
from birbal_ray.score.simulated import SimulatedTokenizer
from birbal_ray.score.tokens import Tokenizer, prompt_token_ids
from birbal_ray.storage import local_copy

# What prepare hands to generate: the rows so far, with the prompts' token ids.
PREPARED_ROWS = pa.schema(
    [
        *(
            SCORE_ROWS.field(name)
            for name in ("orig_input", "few_shot_prompt", "answer", "row_id", "instance_id", "error")
        ),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),  # empty with an error
        pa.field("num_prompt_tokens", pa.int32()),
    ]
)
COMPLETED_ROWS = pa.schema(
    [field for field in PREPARED_ROWS if field.name != "token_ids"]
    + [SCORE_ROWS.field(name) for name in ("prediction", "num_cached_tokens", "num_completion_tokens", "finish_reason")]
)
REPORT_INTERVAL_SECONDS = 1.0
COUNTED = ("rows", "errors", "prompt_tokens", "cached_tokens", "completion_tokens")


class BuildPrompts:
    """Reads a shard's instances, builds their prompts, counts tokens on the CPU.

    Instances that can't be scored and prompts that don't fit get their `error` here, so that they
    never reach the engine.
    """

    def __init__(self, config: ScoreConfig, excluded: Collection[str] = frozenset()) -> None:
        self._config, self._excluded = config, excluded
        self._tokenizer = load_tokenizer(config)
        # A task's shards are adjacent: without this each would parse its file again.
        self._ordered_instances = functools.lru_cache(maxsize=4)(self._read)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Shard.from_dict(row)
        config = self._config
        task, ordered = self._ordered_instances(shard.path, shard.sha256)
        first = shard.chunk * config.shard_rows
        instances = ordered[first : first + config.shard_rows]
        trained = shard.variant.prompt_format == ZERO_SHOT
        prefix = (
            prompt.training_prefix(task.definition) if trained else prompt.shared_prefix(task, config.prompt.num_shots)
        )
        tokens_of = functools.partial(prompt_token_ids, self._tokenizer, as_trained=trained)
        prompts = [prefix + prompt.own_part(instance.input) for instance in instances]
        usable = [text for text, instance in zip(prompts, instances, strict=True) if instance.error is None]
        token_ids = iter(tokens_of(usable))
        rows = []
        for instance, text in zip(instances, prompts, strict=True):
            ids = next(token_ids) if instance.error is None else []
            error = instance.error or plan.too_long_reason(
                len(ids), shard.max_completion_tokens, config.engine.max_model_len
            )
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
        (shared,) = tokens_of([prefix + plan.INPUT_HEAD])
        table = pa.Table.from_pylist(rows, schema=PREPARED_ROWS)
        return {"shard": asdict(shard), "prefix_token_ids": shared, "prepared": _to_bytes(table)}

    def _read(self, path: str, sha256: str) -> tuple[Task, list[Instance]]:
        task = reader.read_task(Path(path))
        if task.sha256 != sha256:
            raise TaskError(f"{path}: the file changed while the run was going on; start anew with --overwrite")
        return task, take_first(task, self._config.tasks.instances_per_task, self._config.seed, self._excluded)


class Generate:
    """One engine; gets the completions of the shards given to it by several threads at once."""

    def __init__(
        self,
        config: ScoreConfig,
        model_fingerprint: str,
        adapters: Sequence[Adapter],
        board: EngineMonitor,
        log_folder: str,
        replicas_per_node: int,
    ) -> None:
        import ray

        context = ray.get_runtime_context()
        self._board, self._replica = board, context.get_actor_id() or "driver"
        log_to(Path(log_folder) / f"replica-{self._replica[:12]}.log")
        # Straight to the file: Ray's own stdout object keeps what is printed for a while.
        os.write(1, f"replica {self._replica} pid {os.getpid()} node {context.get_node_id()}\n".encode())
        ray.get(board.started.remote(self._replica, context.get_node_id()))  # type: ignore[attr-defined]
        model, own, found = find_model(config)
        if found != model_fingerprint:
            raise models.ModelError(f"{model.path}: not the model that the run was started with, on this node")
        self._adapter = own.name if own else ""  # of shards whose variant names none
        resources = _with_threads(config.resources, replicas_per_node)
        self._meters = _meters(self._replica)
        self._at: set[str] = set()  # shards in flight
        here = [replace(one, path=str(local_copy(one.path))) for one in adapters]
        here += [Adapter(own.name, str(own.path), own.rank)] if own else []
        self._loop = EngineLoop(lambda: load_engine(model.path, config.engine, resources, here))
        board.ready.remote(self._replica)  # type: ignore[attr-defined]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        table = _from_bytes(row["prepared"])
        os.write(1, f"begins {Shard.from_dict(row['shard']).file_name}\n".encode())
        name = f"{row['shard']['task']} chunk {row['shard']['chunk']}"
        self._at.add(name)
        token_ids, prompts = table["token_ids"].to_pylist(), table["few_shot_prompt"].to_pylist()
        wanted = [index for index, error in enumerate(table["error"].to_pylist()) if error is None]
        max_tokens, adapter = row["shard"]["max_completion_tokens"], row["shard"]["variant"]["adapter"] or self._adapter
        requests = [Request(prompts[index], token_ids[index], max_tokens, adapter) for index in wanted]
        try:
            futures = self._loop.submit(requests, row["prefix_token_ids"])
            completions = dict(zip(wanted, self._collect(futures, token_ids, wanted), strict=True))
        except EngineDeadError as error:
            # It can't tell which request was too much for it; every shard it was at is a suspect.
            self._give_up(f"{', '.join(sorted(self._at))}: {error}")
            raise
        self._at.discard(name)
        return {"shard": row["shard"], "completed": _to_bytes(_with_completions(table, completions))}

    def _collect(self, futures: Sequence[Any], token_ids: list[list[int]], wanted: list[int]) -> list[Completion]:
        completions: list[Completion] = []
        counts = dict.fromkeys(COUNTED, 0)
        reported = time.monotonic()
        for index, future in zip(wanted, futures, strict=True):
            done = future.result()
            completions.append(done)
            counts["rows"] += 1
            counts["errors"] += done.error is not None
            counts["prompt_tokens"] += len(token_ids[index])
            counts["cached_tokens"] += done.num_cached_tokens or 0
            counts["completion_tokens"] += done.num_completion_tokens
            if time.monotonic() - reported > REPORT_INTERVAL_SECONDS or len(completions) == len(futures):
                self._board.add.remote(self._replica, dict(counts))  # type: ignore[attr-defined]
                for name, count in counts.items():
                    if count:  # a Counter refuses 0
                        self._meters[name].inc(count)
                counts, reported = dict.fromkeys(counts, 0), time.monotonic()
        return completions

    def _give_up(self, reason: str) -> None:
        """End this process: an engine that failed may hold a poisoned device. Ray starts a new one."""
        import ray

        ray.get(self._board.died.remote(self._replica, reason))  # type: ignore[attr-defined]
        os._exit(1)


def _meters(replica: str) -> dict[str, Any]:
    """Counters for Ray's metrics (Prometheus); a rate of them is rows/s, tokens/s, and so on."""
    from ray.util.metrics import Counter

    meters = {}
    for name in COUNTED:
        meters[name] = Counter(f"birbal_{name}", f"{name.replace('_', ' ')} of a scoring replica", ("replica",))
        meters[name].set_default_tags({"replica": replica[:12]})
    return meters


class ScoreAndWrite:
    """Scores a shard's completions and writes its Parquet file under its final name."""

    def __init__(self, rows_folder: str) -> None:
        self._folder = Path(rows_folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Shard.from_dict(row["shard"])
        table = scored_table(shard.task, shard.label, _from_bytes(row["completed"]).to_pylist())
        if table.num_rows != shard.num_rows:
            raise RuntimeError(f"{shard.file_name}: {table.num_rows} rows, the plan says {shard.num_rows}")
        write_parquet(self._folder / shard.file_name, table)
        return {"file": shard.file_name, "rows": table.num_rows, "errors": table.num_rows - table["error"].null_count}


def scored_table(task: str, label: str, completed: list[dict[str, Any]]) -> pa.Table:
    """SCORE_ROWS of one task from COMPLETED_ROWS; a row with an error has no score."""
    rows = []
    for row in completed:
        extracted = prompt.extract_answer(row["prediction"])
        score = score_answer(label, extracted, row["answer"]) if row["error"] is None else None
        rows.append(
            {
                **row,
                "task": task,
                "label": label,
                "metric": METRIC_OF_LABEL[label],
                "extracted": extracted,
                "score": score,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCORE_ROWS)


def load_tokenizer(config: ScoreConfig) -> Tokenizer:
    """The model's tokenizer. The simulated backend splits at white space."""
    if config.engine.backend == "simulated":
        return SimulatedTokenizer()
    return models.load_tokenizer(models.resolve_model(config.model.name, config.model.revision, weights=False).path)


def find_model(config: ScoreConfig) -> tuple[models.Model, models.AdapterFolder | None, str]:
    """(model, its adapter if the settings name one, fingerprint of both); ConfigError for another model's adapter."""
    if config.engine.backend == "simulated":
        model = models.Model("simulated", Path("simulated"), None, "simulated")
    else:
        model = models.resolve_model(config.model.name, config.model.revision)
    if not config.model.adapter:
        return model, None, model.fingerprint
    adapter = models.find_adapter(config.model.adapter, model)
    return model, adapter, f"{model.fingerprint}+{adapter.fingerprint}"


def _with_threads(resources: ResourceSettings, replicas_per_node: int) -> ResourceSettings:
    """The settings with this process's share of the node's cores, told to OpenMP before torch is loaded.

    Ray derives OMP_NUM_THREADS from num_cpus: one logical CPU would mean one core (2.5, not 4.7 requests/s).
    """
    threads = resources.threads_per_replica or max(1, len(os.sched_getaffinity(0)) // replicas_per_node)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return resources.model_copy(update={"threads_per_replica": threads})


def _with_completions(table: pa.Table, completions: dict[int, Completion]) -> pa.Table:
    rows = table.drop_columns(["token_ids"]).to_pylist()
    for index, row in enumerate(rows):
        done = completions.get(index)
        row["prediction"] = done.text if done else ""
        row["error"] = done.error if done else row["error"]
        ran = done is not None and done.error is None
        row["num_cached_tokens"] = done.num_cached_tokens if done and ran else None
        row["num_completion_tokens"] = done.num_completion_tokens if done and ran else None
        row["finish_reason"] = done.finish_reason if done and ran else None
    return pa.Table.from_pylist(rows, schema=COMPLETED_ROWS)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
