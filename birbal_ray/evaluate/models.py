"""Who is compared: the base model, its adapters, merged models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.adapters import find_adapter
from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.models import Model, resolve_model
from birbal_ray.settings import ConfigError, require
from birbal_ray.storage import absolute, is_url

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model to evaluate. `path`: the adapter's or model's folder; `fingerprint`: what its weights are.

    `origin`: what names it on any node: its URL, where it has one, else `path`.
    """

    name: str
    kind: str
    path: str
    fingerprint: str
    rank: int | None = None  # of an adapter
    mix: str | None = None  # that an adapter was trained on, where its run says so
    origin: str = ""
    mix_identity: str | None = None  # identity hash of that mix


def resolve_models(model: Model, adapters: Sequence[str], merged: Sequence[str]) -> list[EvaluatedModel]:
    """The base model first, then adapters, then merged models; each name once.

    An adapter is a PEFT folder or an output folder of `birbal train`; `NAME=DIR` names it, else its
    folder does. Raises ConfigError for a folder that holds no LoRA adapter, one trained on another
    base model, or a name given twice; ModelError for a merged model that can't be had.
    """
    found = [EvaluatedModel(BASE, BASE, str(model.path), model.fingerprint, origin=str(model.path))]
    for given in adapters:
        name, path = _named(given)
        one = find_adapter(path, model)
        mix, origin = one.run.get("mix", {}), one.place
        own = name or one.name, ADAPTER, str(one.path), one.fingerprint, one.rank
        found.append(EvaluatedModel(*own, mix.get("path"), origin, mix.get("identity_hash")))
    for given in merged:
        name, path = _named(given)
        other = resolve_model(path)
        origin = absolute(path) if is_url(path) else str(other.path)
        found.append(EvaluatedModel(name or Path(path).name, MERGED, str(other.path), other.fingerprint, origin=origin))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are named {name!r}; name them: --adapter NAME=DIR, --merged NAME=DIR")
        if not _NAME.match(name):
            raise ConfigError(f"model {name!r}: a name takes letters, digits, '.', '_' and '-'; give NAME=DIR")
    return found


def resolve_measured(
    config: HarnessConfig, *, weights: bool = True
) -> tuple[Model, EvaluatedModel | None, dict[str, Any], str]:
    """What `birbal harness` measures: the model, its adapter if it has one, what decides its figures, and its name.

    Without `weights`, nothing is downloaded that the figures' identity doesn't need. Raises ConfigError, ModelError.
    """
    require(config.output, "--output")
    model = resolve_model(require(config.model, "--model"), weights=weights)
    adapter = resolve_models(model, [config.adapter], [])[1] if config.adapter else None
    fingerprints = {"model": model.fingerprint, "adapter": adapter.fingerprint if adapter else None}
    both = [Path(model.name).name, *([adapter.name] if adapter else [])]
    return model, adapter, fingerprints | {"limit": config.limit}, config.team or " + ".join(both)


def _named(given: str) -> tuple[str | None, str]:
    name, equals, path = given.partition("=")
    return (name, path) if equals and "/" not in name else (None, given)
