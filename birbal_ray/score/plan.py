"""A run planned from its task files before anything heavy starts: which tasks, how long their completions may get."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from birbal_ray import models
from birbal_ray.ni import catalog, metrics, prompt, reader
from birbal_ray.ni.metrics import EXACT_MATCH, METRIC_VERSION, find_unreachable
from birbal_ray.ni.prompt import ChatTemplate
from birbal_ray.ni.schema import Instance, Task, TaskError, order_instances
from birbal_ray.progress import ProgressLine, counted
from birbal_ray.score.config import CompletionSettings, ScoreConfig
from birbal_ray.score.shards import PlannedTask, ScorePlan
from birbal_ray.score.tokens import Tokenizer, encode, load_tokenizer, prompt_token_ids
from birbal_ray.settings import canonical_hash
from birbal_ray.storage import Folder, cache_folder, input_folder, write_atomic

INPUTS_FOLDER = "inputs"  # task files that workers read from the run folder
PLAN_FORMAT = 3  # of the cached plans
KEPT_OF_A_TASK = (
    *("name", "sha256", "repairs", "definition", "definition_is_text"),
    *("categories", "sources", "licenses"),
)


def plan_run(
    config: ScoreConfig,
    progress: ProgressLine | None = None,
    *,
    excluded: Collection[str] = frozenset(),
    count_tokens: bool = False,
) -> ScorePlan:
    """Read every chosen task file once and decide what the run does with it; writes nothing to the run folder.

    `excluded`: row ids and text keys (ni.schema) of instances that the run may not take. What was found in a
    file is kept in the cache by its size, time and the settings that matter (workers check its sha256 when they
    read it). Files that can't be used are quarantined, or raise TaskError when `config.tasks.strict`.
    """
    root = Path(config.tasks.path or "")
    files = reader.find_task_files(root)
    duplicates = {file.name for file, following in itertools.pairwise(files) if file.name == following.name}
    if duplicates:
        raise TaskError(f"{root}: two files named {sorted(duplicates)[0]}.json")
    available = [file.name for file in files]
    names, absent = catalog.choose_names(available, config.tasks.select, root)
    unwanted, _ = catalog.choose_names(available, config.tasks.exclude, root)
    chosen = set(names).difference(unwanted)
    if not chosen:
        raise TaskError(
            f"{root}: none of its {len(files)} tasks is chosen (tasks.select = {config.tasks.select!r}; all takes "
            "every task but those of tasks.exclude)"
        )
    overrides = metrics.default_overrides()
    unknown: tuple[str, ...] = ()
    if config.tasks.label_overrides:
        own_labels = metrics.read_overrides(input_folder(config.tasks.label_overrides))
        unknown = tuple(sorted(own_labels.keys() - set(available)))
        overrides |= own_labels

    tokenizer = load_tokenizer(config)
    chat = models.read_template(tokenizer, config.prompt.format, config.prompt.chat_template_arguments)
    planner = _TaskPlanner(config, tokenizer, chat, overrides, excluded, count_tokens)
    tasks, quarantined, left_out = [], [], []
    files = [file for file in files if file.name in chosen]
    for done, (file, outcome) in enumerate(_outcomes(files, planner), 1):
        if progress:
            progress.update(f"reading tasks {done}/{len(files)}: {file.name}")
        if isinstance(outcome, PlannedTask):
            taken = config.tasks.num_taken(outcome.num_available)
            num_instances = min(taken, outcome.num_available - outcome.num_excluded)
            path = str(file.path.resolve())
            tasks.append(replace(outcome, num_instances=num_instances, path=path, member=file.member))
        elif outcome[0] == "quarantined":
            quarantined.append((file.label, outcome[1]))
        else:
            left_out.append((file.name, outcome[1]))
    if not tasks:
        reasons = "; ".join(reason for _, reason in (quarantined + left_out)[:3])
        raise TaskError(f"{root}: no usable task ({reasons})")
    tasks.sort(key=lambda task: task.name)
    return ScorePlan(tuple(tasks), tuple(quarantined), tuple(left_out), tuple(absent), unknown)


def describe_plan(plan: ScorePlan, config: ScoreConfig, progress: ProgressLine) -> None:
    """Say on stderr what the plan takes and what it leaves out, and why."""
    at_most = "at most " if config.adaptive.enabled else ""
    progress.message(
        f"{counted(len(plan.tasks), 'task')}, {at_most}{counted(plan.num_rows, 'row')}, "
        f"model {config.model.name} on {config.engine.device}"
    )
    for file, reason in plan.quarantined:
        progress.message(f"quarantined {file}: {reason}")
    for name, reason in plan.excluded:
        progress.message(f"left out {name}: {reason}")
    shots, path = config.prompt.num_shots, config.tasks.path
    fewer = [f"{task.name}, {task.num_shots}" for task in plan.tasks if task.num_shots < shots]
    for names, what in (
        (plan.unknown_overrides, f"tasks of {config.tasks.label_overrides} are not in {path}"),
        (plan.absent, f"of the selected tasks are not in {path}"),
        (fewer, f"tasks have fewer than {shots} positive examples and use what they have"),
    ):
        if names:
            progress.message(f"{len(names)} {what} (first: {names[0]})")


def publish_inputs(plan: ScorePlan, folder: Folder, *, everything: bool) -> ScorePlan:
    """The plan with task files that workers can't reach as files of the run folder, named by content.

    Members of an archive (a tar has no index), or `everything`: this machine's disk is not the other nodes'.
    """
    moved = {
        task.name: f"{INPUTS_FOLDER}/{task.name}.{task.sha256[:16]}.json"
        for task in plan.tasks
        if task.member or everything
    }
    there = folder.files(INPUTS_FOLDER)
    missing = [
        reader.TaskFile(task.name, Path(task.path), task.member)
        for task in plan.tasks
        if task.name in moved and moved[task.name] not in there
    ]
    for file, data in reader.read_files(missing):
        if isinstance(data, OSError):
            raise TaskError(f"{file.label}: can't be read ({data.strerror})")
        folder.write_bytes(moved[file.name], data)
    tasks = (replace(task, path=moved.get(task.name, task.path)) for task in plan.tasks)
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


def too_long_reason(num_prompt_tokens: int, max_completion_tokens: int, max_model_len: int) -> str | None:
    """Why a prompt doesn't fit, or None."""
    room = max_model_len - max_completion_tokens
    if num_prompt_tokens <= room:
        return None
    return (
        f"prompt too long: {num_prompt_tokens} tokens, engine.max_model_len {max_model_len} leaves {room} "
        f"beside {max_completion_tokens} for the completion"
    )


_Outcome = PlannedTask | tuple[str, str]  # ("quarantined" or "left out", reason)


@dataclass(frozen=True)
class _TaskPlanner:
    """What becomes of one task file."""

    config: ScoreConfig
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    overrides: dict[str, metrics.Label]
    excluded: Collection[str]
    count_tokens: bool

    def __call__(self, file: reader.TaskFile, task: Task | TaskError) -> _Outcome:
        config = self.config
        if isinstance(task, TaskError):
            if config.tasks.strict:
                raise task
            return "quarantined", str(task)
        if reason := catalog.excluded_by(task, config.tasks.exclude_families):
            return "left out", reason
        if config.tasks.strict:
            prompt.examples_of(task, config.prompt.num_shots, strict=True)
        allowed: Sequence[Instance] = task.instances
        if self.excluded or self.count_tokens:
            allowed = order_instances(task, config.seed, self.excluded)
        if task.instances and not allowed:
            return "left out", f"none of its {len(task.instances):,} instances is held out"
        # All references, not those of the instances taken: more instances must not change the rows that exist.
        references = sorted({reference for instance in task.instances for reference in instance.references})
        lengths = list(map(len, encode(self.tokenizer, references)))
        label = metrics.label_task(task, self.overrides)
        max_tokens = completion_tokens(label.value, lengths, config.completion)
        too_long = {text for text, length in zip(references, lengths, strict=True) if length > max_tokens}
        extract = functools.partial(prompt.extract_answer, chat=self.chat is not None)
        unreachable = find_unreachable(task, label.value, extract, lambda text: text not in too_long)
        of_the_file = {name: getattr(task, name) for name in KEPT_OF_A_TASK}
        planned = PlannedTask(
            **of_the_file,
            path=str(file.path),
            member=file.member,
            label=label,
            num_available=len(task.instances),
            num_instances=0,
            num_shots=min(config.prompt.num_shots, len(task.positive_examples)),
            max_completion_tokens=max_tokens,
            num_excluded=len(task.instances) - len(allowed),
            unreachable_fraction=unreachable.fraction,
            unreachable_reason=unreachable.reason,
        )
        taken = allowed[: config.tasks.num_taken(len(task.instances))]
        return self._counted(planned, task, taken) if self.count_tokens else planned

    def _counted(self, planned: PlannedTask, task: Task, taken: Sequence[Instance]) -> PlannedTask:
        config = self.config
        about = task.definition, prompt.examples_of(task, config.prompt.num_shots)
        prefix = prompt.render_prefix(*about, self.chat)
        (shared,) = prompt_token_ids(self.tokenizer, [prefix], chat=self.chat)
        usable = (one.input for one in taken if one.error is None)
        own = [prompt.render_prompt(*about, text, self.chat)[len(prefix) :] for text in usable]
        lengths = list(map(len, encode(self.tokenizer, own)))
        limit, room = planned.max_completion_tokens, config.engine.max_model_len
        too_long = [length for length in lengths if too_long_reason(len(shared) + length, limit, room)]
        return replace(
            planned,
            num_shared_tokens=len(shared),
            num_own_tokens=sum(lengths) - sum(too_long),
            num_too_long=len(too_long),
            num_prompts=len(lengths) - len(too_long),
        )


_CACHED = TypeAdapter(dict[str, _Outcome])  # by the file's path, member, size and time


def _outcomes(files: Sequence[reader.TaskFile], planner: _TaskPlanner) -> Iterator[tuple[reader.TaskFile, _Outcome]]:
    """What becomes of each file: from the cache, where an earlier plan with the same settings found it out.

    The cache folder holds one JSON for each choice of settings that matter, none of a run that may not take some
    instances: each mix gives other ones. A cache that can't be read or written costs time, not the run.
    """
    config = planner.config
    folder = Path(getattr(planner.tokenizer, "name_or_path", config.engine.backend))
    tokenizer = [folder / name for name in models.TOKENIZER_FILES if (folder / name).is_file()]
    key = {
        "format": [PLAN_FORMAT, METRIC_VERSION],
        "families": config.tasks.exclude_families,
        "tokenizer": [str(folder.resolve()), *(_size_and_time(file) for file in tokenizer)],
        "prompt": config.prompt.model_dump(),
        "completion": config.completion.model_dump(),
        "overrides": {name: asdict(label) for name, label in planner.overrides.items()},
    }
    cache = cache_folder() / "plans" / f"{canonical_hash(key)[:32]}.json"
    use_cache = not (planner.count_tokens or config.tasks.strict or planner.excluded)
    known: dict[str, _Outcome] = {}
    if use_cache:
        with contextlib.suppress(OSError, ValueError):
            known = _CACHED.validate_json(cache.read_bytes())
    names = {
        file: f"{file.path.resolve()}:{file.member}:{file.path.exists() and _size_and_time(file.path)}"
        for file in files
    }
    yield from ((file, known[name]) for file, name in names.items() if name in known)
    found = {}
    # The search for cycles would go through all that a large file became, over and over: a third of the time.
    gc.disable()
    try:
        for file, task in reader.read_tasks([file for file, name in names.items() if name not in known]):
            found[names[file]] = outcome = planner(file, task)
            yield file, outcome
    finally:
        gc.enable()
    if use_cache and found:
        with contextlib.suppress(OSError, ValueError):
            write_atomic(cache, _CACHED.dump_json(known | found))


def _size_and_time(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns  # copying and unpacking may set the first time, never both
