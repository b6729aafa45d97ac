"""Who is compared: the base model, adapters, merged models; and on which instances: those that no mix considered."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from birbal_ray.adapters import find_adapter
from birbal_ray.manifest import read_manifest
from birbal_ray.mix.files import read_audit
from birbal_ray.mix.scores import read_batches
from birbal_ray.models import Model, resolve_model
from birbal_ray.ni.schema import text_key
from birbal_ray.run import RunError
from birbal_ray.schemas import ADAPTER, BASE, MERGED, MIX_ROWS, NATURAL_INSTRUCTIONS
from birbal_ray.settings import ConfigError
from birbal_ray.storage import absolute, base_name, is_url, open_folder

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
    modules: tuple[str, ...] = ()  # that an adapter changes in a layer


def resolve_models(model: Model, adapters: Sequence[str], merged: Sequence[str]) -> list[EvaluatedModel]:
    """The base model first, then adapters, then merged models.

    An adapter is a PEFT folder or an output folder of `birbal train`; `NAME=DIR` names it, else its
    folder does. Raises ConfigError for a folder that holds no LoRA adapter or one trained on another
    base model; ModelError for a merged model that can't be had.
    """
    found = [EvaluatedModel(BASE, BASE, str(model.path), model.fingerprint, origin=str(model.path))]
    for given in adapters:
        name, path = _named(given)
        one = find_adapter(path, model)
        mix, origin = one.run.get("mix", {}), one.place
        own = name or one.name, ADAPTER, str(one.path), one.fingerprint, one.rank
        found.append(EvaluatedModel(*own, mix.get("path"), origin, mix.get("identity_hash"), one.modules))
    for given in merged:
        name, path = _named(given)
        other = resolve_model(path)
        origin = absolute(path) if is_url(path) else str(other.path)
        found.append(EvaluatedModel(name or base_name(path), MERGED, str(other.path), other.fingerprint, origin=origin))
    return found


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a model's name that no folder of rows can have, or that two models have."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are named {name!r}; name them: --adapter NAME=DIR, --merged NAME=DIR")
        if not _NAME.match(name):
            raise ConfigError(f"model {name!r}: a name takes letters, digits, '.', '_' and '-'; give NAME=DIR")


def _named(given: str) -> tuple[str | None, str]:
    name, equals, path = given.partition("=")
    return (name, path) if equals and "/" not in name else (None, given)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`keys`: row ids and text keys to leave out. `sampled`: tasks of which a mix holds rows; None: no mix is known."""

    keys: frozenset[str]
    sampled: frozenset[str] | None

    def kind(self, task: str) -> str:
        """`instances` where other rows of the task were trained on, else `task`; `unknown` without a mix."""
        return "unknown" if self.sampled is None else "instances" if task in self.sampled else "task"


def find_mixes(models: Sequence[EvaluatedModel], given: str | None) -> list[str]:
    """Folders of all mixes to leave out: the given one, then every adapter's own; the same mix once.

    A mix is known by its identity hash, so `given` may be where an adapter's mix has been moved to. Raises
    ConfigError where an adapter's own mix is nowhere to be had, or the given one is none.
    """
    found = {read_manifest(given, "mix")["identity_hash"]: given} if given else {}
    for one in models:
        if one.mix is None or one.mix_identity in found:
            continue
        try:
            there = read_manifest(one.mix, "mix")["identity_hash"]
            problem = f"{one.mix} holds another one by now ({there[:12]}…)"
        except (ConfigError, RunError) as error:
            there, problem = None, str(error)
        if there is None or there != one.mix_identity:
            other = f"; nor is it --mix {given}" if given else ""
            raise ConfigError(
                f"adapter {one.name}: what it was trained on can't be left out: the mix with the identity hash "
                f"{(one.mix_identity or 'unknown')[:12]}… is missing: {problem}{other}. Give the folder where that "
                "mix is now (--mix DIR), make that mix again with its settings, or train the adapter on what is there"
            )
        found[there] = one.mix
    return list(found.values())


def held_out(*places: str | os.PathLike[str]) -> HeldOut:
    """What the finished mixes at paths or URLs leave for an honest test. Raises RunError for another or an edited one.

    Of a task that was sampled, every candidate is left out, not only the chosen rows: what was not
    chosen is what the base model got right, which would favour it (docs/decisions/0032). Rows of any
    task whose text was trained on under another id are left out too.
    """
    keys: set[str] = set()
    all_sampled: set[str] = set()
    for mix in map(open_folder, places):
        manifest = read_manifest(mix, "mix")
        batches = read_audit(mix, manifest, ["row_id", "source", "task", "kept"])
        ours = pa.concat_tables(batch.filter(pc.equal(batch["source"], NATURAL_INSTRUCTIONS)) for batch in batches)
        sampled = pc.unique(ours["task"].filter(ours["kept"]))
        keys.update(ours["row_id"].filter(pc.is_in(ours["task"], sampled)).to_pylist())
        all_sampled.update(sampled.to_pylist())
        for name in ("train.parquet", "eval.parquet"):
            sha256 = manifest["files"][name]["sha256"]
            for batch in read_batches(mix, name, MIX_ROWS, ["instruction", "input"], sha256):
                keys.update(map(text_key, batch["instruction"].to_pylist(), batch["input"].to_pylist()))
    return HeldOut(frozenset(keys), frozenset(all_sampled) if places else None)
