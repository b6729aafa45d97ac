"""Settings of `birbal serve`."""

from __future__ import annotations

from pydantic import Field

from birbal_ray.score.config import EngineSettings, ResourceSettings
from birbal_ray.settings import Settings


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
