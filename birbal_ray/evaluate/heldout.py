"""Which instances no mix considered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from birbal_ray.evaluate.models import EvaluatedModel
from birbal_ray.manifest import read_manifest
from birbal_ray.mix.inspect import read_audit
from birbal_ray.mix.rows import MIX_ROWS, NATURAL_INSTRUCTIONS
from birbal_ray.mix.scores import read_batches
from birbal_ray.ni.schema import text_key
from birbal_ray.run import RunError
from birbal_ray.settings import ConfigError
from birbal_ray.storage import open_folder


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
    ConfigError where an adapter's own mix is nowhere to be had, RunError where the given one is none.
    """
    found = {read_manifest(given, "mix")["identity_hash"]: given} if given else {}
    for one in models:
        if one.mix is None or one.mix_identity in found:
            continue
        try:
            there = read_manifest(one.mix, "mix")["identity_hash"]
            problem = f"{one.mix} holds another one by now ({there[:12]}…)"
        except RunError as error:
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
