"""Settings of `birbal score`, and of `birbal serve`, which starts the same engine."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from birbal_ray.ni.schema import sample_tasks_folder
from birbal_ray.settings import Duration, Settings, nearest

# vLLM's arguments that other settings decide, or that are not to be changed.
OWNED_ARGUMENTS = {
    "model": "model.name",
    "revision": "model.revision",
    "tokenizer": "model.name",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "resources.max_num_seqs",
    "gpu_memory_utilization": "resources.gpu_memory_utilization",
    "tensor_parallel_size": "resources.gpus_per_replica",
    "enable_lora": "model.adapter",
    "max_loras": "model.adapter",
    "max_lora_rank": "model.adapter",
    "enable_prefix_caching": "it is always on",
    "trust_remote_code": "code from model repositories is never run",
    "load_format": "weights are read from safetensors only",
    "generation_config": "sampling is birbal_ray's own",
    "logprobs_mode": "log probabilities are those before sampling",
    "seed": "every request has its own",
}


GPU_SHARD_ROWS, CPU_SHARD_ROWS = 512, 64  # a driver pays 16 ms a shard; a CPU engine does 64 rows in 15 s


class TaskSettings(Settings):
    """Which task files, and what is taken of them."""

    path: str | None = Field(
        None, description="folder of task files, one .json file, a .tar.gz archive, a URL of one, or sample-tasks"
    )
    select: str | list[str] = Field(
        "all", description="which tasks: all, selected (the 462 that Birbal scored), a name, or a list of names"
    )
    exclude: list[str] = Field([], description="names left out by hand")
    exclude_families: list[Literal["mmlu", "translation"]] = Field(
        ["mmlu", "translation"], description="kinds of tasks left out"
    )
    label_overrides: str | None = Field(None, description="CSV name,label,reason; wins over the package's")
    instances_per_task: int | None = Field(
        None, ge=1, description="take the first N of each task, in hash order; null takes all"
    )
    held_out_fraction: float = Field(
        0.0, ge=0, lt=1, description="part of each task, the last in hash order, that scoring leaves to an evaluation"
    )
    strict: bool = Field(False, description="stop at the first task file that can't be used")

    @field_validator("path")
    @classmethod
    def _sample_tasks(cls, path: str | None) -> str | None:
        return str(sample_tasks_folder()) if path == "sample-tasks" else path

    def num_taken(self, available: int) -> int:
        """How many of a task's `available` instances, the first in hash order, are taken."""
        held_out = min(math.ceil(available * self.held_out_fraction), max(0, available - 1))
        return min(self.instances_per_task or available, available - held_out)


class ModelSettings(Settings):
    """The base model."""

    name: str = Field("smollm2-135m", description="the base model: smollm2-135m, a local folder, or a Hub id")
    revision: str | None = Field(None, description="Hub revision; null takes main and records its commit")


class PromptFormatSettings(Settings):
    """How an instruction and an input become a prompt."""

    format: Literal["birbal", "chat"] = Field(
        "birbal", description="birbal: the published text; chat: the model's own chat template, for instruct models"
    )
    chat_template_arguments: dict[str, bool | int | float | str] = Field(
        {}, description="given to the chat template, e.g. {enable_thinking: false}"
    )


class ScoredModelSettings(ModelSettings):
    """The model that answers."""

    adapter: str | None = Field(
        None, description="LoRA adapter to score with: a PEFT folder, or the output of birbal train"
    )


class PromptSettings(PromptFormatSettings):
    """The few-shot prompt."""

    num_shots: int = Field(4, ge=0, le=64, description="positive examples in the prompt, at most")


class CompletionSettings(Settings):
    """How long a completion may get: room for the task's own references, up to a cap."""

    max_completion_tokens: int = Field(256, ge=1, description="cap for every task")
    headroom_fraction: float = Field(0.5, ge=0, description="extra beyond the task's long (p99) references, generation")
    headroom_tokens: int = Field(8, ge=0, description="extra tokens on top, both labels")


class EngineSettings(Settings):
    """What decides a completion's text, beside the model."""

    backend: Literal["vllm", "simulated"] = Field("vllm", description="simulated makes answers up; for tests only")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="where the engines run")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPU")
    max_model_len: int = Field(2048, ge=16, description="prompt + completion tokens; longer prompts become error rows")
    arguments: dict[str, Any] = Field({}, description="further vLLM engine arguments, e.g. {quantization: fp8}")

    @field_validator("arguments")
    @classmethod
    def _known_to_vllm(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Refuse names that vLLM doesn't have, where it is installed, and those that are not the user's to set."""
        for name in given:
            if name in OWNED_ARGUMENTS:
                raise ValueError(f"{name!r} can't be set here: {OWNED_ARGUMENTS[name]}")
            if (known := vllm_argument_names()) and name not in known:
                raise ValueError(f"vLLM has no engine argument {name!r}{nearest(name, known)}")
        return given


class ResourceSettings(Settings):
    """Who computes. May change between a run and its continuation."""

    num_replicas: int = Field(1, ge=1, description="engine copies, one GPU each by default")
    gpus_per_replica: float = Field(
        1.0, gt=0, description="2: one engine over two cards (tensor parallel); 0.5: two engines share a card"
    )
    cpus_per_replica: float = Field(1.0, gt=0, description="logical CPUs that Ray sets aside for a replica")
    threads_per_replica: int | None = Field(None, ge=1, description="CPU engine threads; null shares the cores out")
    accelerator_type: str | None = Field(None, description="Ray's name of the card, e.g. GeForce-RTX-4090")
    avoid_accelerator_types: list[str] = Field(
        [], description="cards that replicas keep off, e.g. the one that trains: [GeForce-RTX-4090]"
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_gib: float = Field(2.0, gt=0, description="CPU engine: memory for the KV cache")
    max_num_seqs: int | None = Field(
        None, ge=1, description="sequences decoded together; null: 32 on CPU, vLLM's own on GPU"
    )
    shards_in_flight: int = Field(3, ge=1, le=64, description="shards given to one engine at a time")
    num_prepare_workers: int = Field(1, ge=1, description="processes that read, build prompts and count tokens")
    max_start_retries: int = Field(2, ge=0, description="further tries of a replica that fails to start")
    max_engine_restarts: int = Field(2, ge=0, description="restarts of one replica before the run fails")
    simulated_row_seconds: float = Field(0.0, ge=0, description="simulated backend only")
    no_progress_minutes: float = Field(20.0, gt=0, description="the run fails after so long without a finished row")

    @field_validator("gpus_per_replica")
    @classmethod
    def _whole_cards(cls, given: float) -> float:
        if given > 1 and given != int(given):
            raise ValueError("above 1 it must be a whole number: Ray shares out cards, not pieces of several")
        return given


@functools.cache
def vllm_argument_names() -> frozenset[str]:
    """The fields of vLLM's EngineArgs, read from its source: importing vLLM takes ten seconds. Empty without vLLM."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    file = Path(found.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    classes = (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    body = (one for node in classes if node.name == "EngineArgs" for one in node.body)
    fields = (one.target for one in body if isinstance(one, ast.AnnAssign))
    return frozenset(field.id for field in fields if isinstance(field, ast.Name))


class AdaptiveSettings(Settings):
    """When a task has been scored enough (see `score.adaptive`). A pipeline takes the last five from its mix."""

    enabled: bool = Field(False, description="stop each task when its score is known and its share is filled")
    score_margin: float = Field(0.05, gt=0, lt=1, description="half-width of the 95 % interval of a task's score")
    first_instances: int = Field(100, ge=2, description="rows of a task before the first look; then twice as many")
    failed_rows_factor: float = Field(1.0, ge=0, description="failed rows wanted, in shares of the mix")
    exact_match_budget: int = Field(50_000, ge=0, description="the mix's budget, exact-match tasks")
    generation_budget: int = Field(50_000, ge=0, description="the mix's budget, generation tasks")
    gamma: float = Field(1.0, ge=0, le=16, description="the mix's task_score.gamma")
    even_fraction: float = Field(0.0, ge=0, le=1, description="the mix's task_score.even_fraction")
    failed_below: float = Field(0.2, ge=0, le=1, description="generation rows under this ROUGE-L count as failed")


class ScoreConfig(Settings):
    """All settings of `birbal score`."""

    tasks: TaskSettings = TaskSettings()
    model: ScoredModelSettings = ScoredModelSettings()
    prompt: PromptSettings = PromptSettings()
    completion: CompletionSettings = CompletionSettings()
    engine: EngineSettings = EngineSettings()
    resources: ResourceSettings = ResourceSettings()
    adaptive: AdaptiveSettings = AdaptiveSettings()
    output: str | None = Field(None, description="run folder; the same command on it continues where it stopped")
    seed: int = Field(0, ge=0, description="another seed takes other instances of each task")
    budget: Duration | None = Field(
        None,
        gt=0,
        description="time of all sessions, e.g. 2h, or seconds: tasks stop where they are; needs adaptive.enabled",
    )
    shard_rows: int | None = Field(
        None, ge=1, le=65_536, description="instances of one task per output file; null: 512 on GPU, 64 on CPU"
    )

    @model_validator(mode="after")
    def _stops_where_it_may(self) -> ScoreConfig:
        if self.budget is not None and not self.adaptive.enabled:
            raise ValueError("budget needs adaptive.enabled=true: only an adaptive run may leave instances out")
        return self


class ServedModel(Settings):
    """What answers."""

    name: str | None = Field(None, description="base model: smollm2-135m, a local folder, or a Hub id")
    revision: str | None = Field(None, description="Hub revision; null takes main")
    adapter: str | None = Field(None, description="LoRA adapter on it: a PEFT folder, or the output of birbal train")


class ServedEngine(EngineSettings):
    """The engine; a server takes longer prompts than a score run."""

    max_model_len: int = Field(
        8192, ge=16, description="prompt + completion tokens; the model's own length where that is shorter"
    )


class ServeConfig(Settings):
    """All settings of `birbal serve`."""

    run: str | None = Field(None, description="output of birbal train: its base model with its adapter")
    model: ServedModel = ServedModel()
    merged: str | None = Field(None, description="merged model's folder, instead of a model and an adapter")
    host: str = Field("127.0.0.1", description="address; any but this machine's own needs a token or --allow-anyone")
    port: int = Field(8080, ge=0, le=65535, description="port; 0 takes a free one and prints it")
    token: str | None = Field(None, min_length=1, description="clients must send it: Authorization: Bearer TOKEN")
    allow_anyone: bool = Field(False, description="answer strangers who reach the address")
    compat: bool = Field(False, description="the published server's answer rule, with its defect")
    engine: ServedEngine = ServedEngine()
    resources: ResourceSettings = ResourceSettings()
