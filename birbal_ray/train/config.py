"""Settings of `birbal train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from birbal_ray.score.config import ModelSettings, PromptFormatSettings
from birbal_ray.settings import Duration, Settings


class LoraSettings(Settings):
    """The adapter."""

    r: int = Field(128, ge=1, description="rank; memory and capacity grow with it")
    alpha: int = Field(256, ge=1, description="scale: updates are multiplied by alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="all-linear: q k v o gate up down; or names of modules"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r): larger ranks learn more")
    use_dora: bool = Field(False, description="train the size of each weight column apart from its direction; slower")
    from_adapter: str | None = Field(
        None,
        description="adapter folder to continue from (of the same base model); its modules, alpha, dropout count",
    )


class OptimizerSettings(Settings):
    """Steps."""

    name: Literal["auto", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"] = Field(
        "auto", description="auto: paged_adamw_32bit on a GPU, adamw_torch on a CPU (paged ones need CUDA)"
    )
    learning_rate: float = Field(2e-5, gt=0)
    floor_fraction: float = Field(0.0, ge=0, lt=1, description="the cosine ends at this part of learning_rate")
    warmup_steps: int = Field(100, ge=0, description="at most a tenth of the steps that will fit")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(0.3, gt=0)


class BatchSettings(Settings):
    """What one optimizer step sees: micro x accumulation packed sequences."""

    sequence_length: int = Field(8192, ge=16, description="tokens in a packed sequence")
    long_samples: Literal["drop", "truncate"] = Field(
        "drop", description="samples over sequence_length: drop, or cut the end of the answer (and its EOS) off"
    )
    micro: int = Field(2, ge=1, description="packed sequences that go through the model together")
    accumulation: int = Field(4, ge=1, description="micro batches summed up before a step")


class EvaluationSettings(Settings):
    """Loss on rows that are not trained on; decides which adapter is best."""

    every_steps: int = Field(64, ge=1)
    num_rows: int = Field(2000, ge=1, description="rows of the mix's eval split, the first ones")


class CheckpointSettings(Settings):
    """When the state is saved, so that a preempted run loses little. May change between a run and its continuation."""

    every_steps: int = Field(64, ge=1)
    every_minutes: float = Field(15.0, gt=0)
    keep: int = Field(10, ge=1, description="the latest so many stay")


class TrainModelSettings(ModelSettings):
    """The base model and how it is held."""

    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4 bits a weight, double quantisation")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of computation and of what is not quantised; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = Field(
        "auto",
        description="auto: torch's varlen FlashAttention on a GPU, else sdpa sample by sample; no mask is built",
    )


class TrainResources(Settings):
    """Who computes. May change between a run and its continuation."""

    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="where to train")
    accelerator_type: str | None = Field(None, description="the card to pin to, as Ray calls it: GeForce-RTX-4090")
    num_cpus: float = Field(1.0, gt=0, description="logical CPUs that Ray sets aside for the worker")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; null takes all cores")
    max_failures: int = Field(3, ge=0, description="dead workers replaced before the run fails")
    stop_grace: Duration = Field(300.0, gt=0, description="on SIGTERM or Ctrl-C: time to save a checkpoint")
    wait: Duration = Field(
        600.0, ge=0, description="on a cluster: time to wait for a node that can take the worker, before it starts"
    )
    end_by: float | None = Field(
        None, description="end by this time (seconds since 1970), if before `budget`; `birbal pipeline` sets it"
    )
    simulated_card: bool = Field(False, description="for tests only: Ray's card is made up, torch computes on a CPU")
    memory_gib: float | None = Field(None, gt=0, description="memory to plan for; null asks the device")


class TrainConfig(Settings):
    """All settings of `birbal train`."""

    mix: str | None = Field(None, description="output folder of `birbal mix`")
    output: str | None = Field(None, description="run folder; the same command on it continues a stopped run")
    seed: int = Field(0, ge=0, description="another seed gives other initial adapter weights and another order")
    budget: Duration | None = Field(
        None,
        gt=0,
        description="wall-clock time of the worker, in all sessions: 24h, 90m, or seconds; null trains all epochs",
    )
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(
        None, ge=1, description="end after so many optimizer steps, if epochs don't end before"
    )
    model: TrainModelSettings = TrainModelSettings()
    prompt: PromptFormatSettings = PromptFormatSettings()
    lora: LoraSettings = LoraSettings()
    neftune_alpha: float | None = Field(5.0, ge=0, description="noise on embeddings while training; null or 0: none")
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    gradient_checkpointing: bool = Field(True, description="recompute activations: less memory, about a third slower")
    kernels: Literal["auto", "none"] = Field(
        "auto", description="auto: Liger's fused norms and MLP on a GPU, where installed and found equal; none: plain"
    )
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    trackers: list[Literal["wandb", "mlflow"]] = Field([], description="beside TensorBoard, if installed")
    resources: TrainResources = TrainResources()
