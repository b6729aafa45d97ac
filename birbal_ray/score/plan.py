"""A run planned from its task files before anything heavy starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.ni import catalog, labels, prompt, reader
from birbal_ray.ni.metrics import EXACT_MATCH, find_unreachable
from birbal_ray.ni.schema import Instance, Task, TaskError, take_first
from birbal_ray.run import write_atomic
from birbal_ray.schemas import TASKS
from birbal_ray.score.config import CompletionSettings, ScoreConfig
from birbal_ray.score.tokens import Tokenizer, prompt_token_ids

INPUT_HEAD = "### Input:\n"
FEW_SHOT, ZERO_SHOT = "few_shot", "zero_shot"


@dataclass(frozen=True, slots=True)
class PromptVariant:
    """One way to ask a task's instances. `model` is empty in a score run; `adapter`: of the engine, or none."""

    model: str = ""
    prompt_format: str = FEW_SHOT  # zero_shot: the training text
    adapter: str = ""

    @property
    def folder(self) -> str:
        """Where its shards go, below the rows folder."""
        return f"{self.model}/{self.prompt_format}/" if self.model else ""


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One task of the run. Token counts are None unless the plan was asked to count."""

    name: str
    path: str
    member: str | None  # of the archive at `path`
    sha256: str
    label: labels.Label
    num_available: int
    num_instances: int
    num_shots: int
    max_completion_tokens: int
    repairs: dict[str, int]
    definition: str
    categories: tuple[str, ...]
    sources: tuple[str, ...]
    domains: tuple[str, ...]
    licenses: tuple[str, ...]
    num_excluded: int = 0  # instances that the run may not take
    unreachable_fraction: float = 0.0  # of usable instances: not even a reference scores 1 there
    unreachable_reason: str | None = None
    definition_is_text: bool = False
    num_shared_tokens: int | None = None  # the prefix, once
    num_own_tokens: int | None = None  # what follows it, over all instances
    num_too_long: int | None = None
    num_prompts: int | None = None  # for the engine: neither too long nor without a reference


@dataclass(frozen=True, slots=True)
class Shard:
    """A chunk of one task's instances: the unit of work, of output and of resumption."""

    task: str
    path: str
    sha256: str
    label: str
    chunk: int
    num_chunks: int
    num_rows: int
    max_completion_tokens: int
    variant: PromptVariant = PromptVariant()

    @property
    def file_name(self) -> str:
        """The shard's Parquet file, below the rows folder."""
        return f"{self.variant.folder}{self.task}-{self.chunk:05d}-of-{self.num_chunks:05d}.parquet"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shard:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "variant": PromptVariant(**values["variant"])})


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """The tasks of a run by name, and the files that were left out: (file, reason)."""

    tasks: tuple[PlannedTask, ...]
    quarantined: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str], ...]
    absent: tuple[str, ...]
    unknown_overrides: tuple[str, ...] = ()  # tasks of tasks.label_overrides that have no file

    @property
    def num_rows(self) -> int:
        """Rows that the run will hold."""
        return sum(task.num_instances for task in self.tasks)

    def shards(self, shard_rows: int, variants: Sequence[PromptVariant] = (PromptVariant(),)) -> list[Shard]:
        """All shards, those of one task and variant adjacent, long completions first.

        A task of long completions that comes last leaves the engines a handful of sequences to the end
        (docs/decisions/0002): started first, the short ones fill the batch beside it.
        """
        result = []
        longest_first = sorted(self.tasks, key=lambda task: (-task.max_completion_tokens, task.name))
        for variant, task in itertools.product(variants, longest_first):
            count = math.ceil(task.num_instances / shard_rows)
            for chunk in range(count):
                rows = min(shard_rows, task.num_instances - chunk * shard_rows)
                result.append(
                    Shard(
                        task.name,
                        task.path,
                        task.sha256,
                        task.label.value,
                        chunk,
                        count,
                        rows,
                        task.max_completion_tokens,
                        variant,
                    )
                )
        return result

    def table(self) -> pa.Table:
        """The tasks as TASKS rows."""
        return pa.Table.from_pylist(
            [
                {
                    "task": task.name,
                    "label": task.label.value,
                    "label_reason": task.label.reason,
                    "definition": task.definition,
                    "categories": list(task.categories),
                    "sources": list(task.sources),
                    "domains": list(task.domains),
                    "licenses": list(task.licenses),
                    "sha256": task.sha256,
                    "num_shots": task.num_shots,
                    "num_available": task.num_available,
                    "num_instances": task.num_instances,
                    "max_completion_tokens": task.max_completion_tokens,
                    "unreachable_fraction": task.unreachable_fraction,
                    "unreachable_reason": task.unreachable_reason,
                    "definition_is_text": task.definition_is_text,
                }
                for task in self.tasks
            ],
            schema=TASKS,
        )


def make_plan(
    config: ScoreConfig,
    load_tokenizer: Callable[[], Tokenizer],
    *,
    excluded: Collection[str] = frozenset(),
    count_tokens: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> ScorePlan:
    """Read every chosen task file once and decide what the run does with it; writes nothing.

    The tokenizer is loaded when the choice of tasks is known to be right: that may take a download.
    `excluded`: row ids and text keys (ni.schema) of instances that the run may not take.

    Files that can't be used are quarantined, or raise TaskError when `config.tasks.strict`.
    """
    root = Path(config.tasks.path or "")
    files = reader.find_task_files(root)
    duplicates = {file.name for file, following in itertools.pairwise(files) if file.name == following.name}
    if duplicates:
        raise TaskError(f"{root}: two files named {sorted(duplicates)[0]}.json")
    names, absent = catalog.choose_names([file.name for file in files], config.tasks.select, root)
    chosen = set(names) - set(_known(config.tasks.exclude, [file.name for file in files], root))
    if not chosen:
        raise TaskError(f"{root}: none of its {len(files)} tasks is chosen (tasks.select = {config.tasks.select!r})")
    overrides = labels.default_overrides()
    unknown: tuple[str, ...] = ()
    if config.tasks.label_overrides:
        own_labels = labels.read_overrides(Path(config.tasks.label_overrides))
        unknown = tuple(sorted(own_labels.keys() - {file.name for file in files}))
        overrides |= own_labels

    tokenizer = load_tokenizer()
    planned, quarantined, left_out = [], [], []
    files = [file for file in files if file.name in chosen]
    for done, (file, task) in enumerate(reader.read_tasks(files), 1):
        progress(f"reading tasks {done}/{len(files)}: {file.name}")
        if isinstance(task, TaskError):
            if config.tasks.strict:
                raise task
            quarantined.append((file.label, str(task)))
            continue
        if config.tasks.strict:
            prompt.shared_prefix(task, config.prompt.num_shots, strict=True)
        reason = catalog.excluded_by(task, config.tasks.exclude_families)
        if reason:
            left_out.append((task.name, reason))
            continue
        allowed = take_first(task, None, config.seed, excluded)
        if task.instances and not allowed:
            left_out.append((task.name, f"none of its {len(task.instances):,} instances is held out"))
            continue
        label = labels.label_task(task, overrides)
        planned.append(_plan_task(task, allowed, file, label, config, tokenizer, count_tokens))
    if not planned:
        reasons = "; ".join(reason for _, reason in (quarantined + left_out)[:3])
        raise TaskError(f"{root}: no usable task ({reasons})")
    planned.sort(key=lambda task: task.name)
    return ScorePlan(tuple(planned), tuple(quarantined), tuple(left_out), tuple(absent), unknown)


def unpack_archives(plan: ScorePlan, folder: Path) -> ScorePlan:
    """The plan with its archived tasks as files of `folder`: workers read tasks one by one, a tar has no index."""
    archived = [reader.TaskFile(task.name, Path(task.path), task.member) for task in plan.tasks if task.member]
    paths = {}
    for file, data in reader.read_files(archived):
        assert isinstance(data, bytes)  # archives raise as a whole
        paths[file.name] = folder / f"{file.name}.json"
        if not paths[file.name].exists() or paths[file.name].read_bytes() != data:
            write_atomic(paths[file.name], data)
    tasks = (replace(task, path=str(paths[task.name]), member=None) if task.member else task for task in plan.tasks)
    return replace(plan, tasks=tuple(tasks))


def completion_tokens(label: str, lengths: Sequence[int], settings: CompletionSettings) -> int:
    """Tokens a completion may take, from the token lengths of a task's references.

    Exact match: the longest reference plus headroom (anything longer is wrong anyway). Generation:
    the 99th percentile with a share on top. At most `settings.max_completion_tokens`.
    """
    ordered = sorted(lengths) or [0]
    if label == EXACT_MATCH:
        wanted = ordered[-1]
    else:
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
        wanted = math.ceil(p99 * (1 + settings.headroom_fraction))
    return min(settings.max_completion_tokens, wanted + settings.headroom_tokens)


def prefix_token_ids(task: Task, num_shots: int, tokenizer: Tokenizer) -> list[int]:
    """Token ids of what all few-shot prompts of a task begin with."""
    return prompt_token_ids(tokenizer, [prompt.shared_prefix(task, num_shots) + INPUT_HEAD])[0]


def too_long_reason(num_prompt_tokens: int, max_completion_tokens: int, max_model_len: int) -> str | None:
    """Why a prompt doesn't fit, or None."""
    room = max_model_len - max_completion_tokens
    if num_prompt_tokens <= room:
        return None
    return (
        f"prompt too long: {num_prompt_tokens} tokens, engine.max_model_len {max_model_len} leaves {room} "
        f"beside {max_completion_tokens} for the completion"
    )


def _plan_task(
    task: Task,
    allowed: Sequence[Instance],
    file: reader.TaskFile,
    label: labels.Label,
    config: ScoreConfig,
    tokenizer: Tokenizer,
    count_tokens: bool,
) -> PlannedTask:
    taken = allowed[: config.tasks.instances_per_task]
    references = sorted({reference for instance in taken for reference in instance.references})
    lengths = [len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"]] if references else []
    max_tokens = completion_tokens(label.value, lengths, config.completion)
    too_long_texts = {text for text, length in zip(references, lengths, strict=True) if length > max_tokens}
    unreachable = find_unreachable(task, label.value, prompt.extract_answer, lambda text: text not in too_long_texts)
    shared = own = too_long = usable = None
    if count_tokens:
        shared, own, too_long, usable = _count_tokens(task, taken, max_tokens, config, tokenizer)
    return PlannedTask(
        name=task.name,
        path=str(file.path.resolve()),
        member=file.member,
        sha256=task.sha256,
        label=label,
        num_available=len(task.instances),
        num_instances=len(taken),
        num_shots=min(config.prompt.num_shots, len(task.positive_examples)),
        max_completion_tokens=max_tokens,
        repairs=task.repairs,
        definition=task.definition,
        categories=task.categories,
        sources=task.sources,
        domains=task.domains,
        licenses=task.licenses,
        num_excluded=len(task.instances) - len(allowed),
        unreachable_fraction=unreachable.fraction,
        unreachable_reason=unreachable.reason,
        definition_is_text=task.definition_is_text,
        num_shared_tokens=shared,
        num_own_tokens=own,
        num_too_long=too_long,
        num_prompts=usable,
    )


def _count_tokens(
    task: Task, taken: Sequence[Instance], max_tokens: int, config: ScoreConfig, tokenizer: Tokenizer
) -> tuple[int, int, int, int]:
    shared = len(prefix_token_ids(task, config.prompt.num_shots, tokenizer))
    usable = [prompt.own_part(instance.input).removeprefix(INPUT_HEAD) for instance in taken if instance.error is None]
    lengths = [len(ids) for ids in tokenizer(usable, add_special_tokens=False)["input_ids"]] if usable else []
    too_long = [n for n in lengths if too_long_reason(shared + n, max_tokens, config.engine.max_model_len)]
    return shared, sum(lengths) - sum(too_long), len(too_long), len(lengths) - len(too_long)


def _known(names: Sequence[str], available: Sequence[str], path: Path) -> Sequence[str]:
    for name in names:
        if name not in set(available):
            raise TaskError(catalog.unknown_task(name, available, path))
    return names
