"""Outside datasets: those of the 2023 recipe from the Hub at a recorded commit, and any file with a column mapping.

Layouts and revisions were looked up, not tried (see each `layout`). An adapter yields the rows of one
record as dicts with instruction, input, output, and optionally task, license, llm_written, unwanted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from birbal_ray.mix.config import SourceSettings
from birbal_ray.mix.features import hash_all
from birbal_ray.mix.files import BATCH_ROWS, SUFFIXES, read_records, sha256_of_file
from birbal_ray.mix.rows import OUTSIDE_ROWS
from birbal_ray.settings import ConfigError, nearest, one_line
from birbal_ray.storage import absolute

Record = Mapping[str, Any]
Row = dict[str, Any]
PEEK_ROWS = 1000  # columns that none of the first so many records has are missing

SUMMARIZE = "Summarize this news article in a few sentences that state its main points."
CHOOSE_COMPLETION = "Choose the option that completes the sentence or answers the question. Answer with its text."
ANSWER_FROM_TEXT = (
    "Answer the last question of the conversation with words taken from the text. "
    "When the text does not answer it, say that the question cannot be answered."
)
CANNOT_ANSWER = "The question cannot be answered from the text."
QUAC_UNANSWERABLE = "CANNOTANSWER"

# Open-Platypus: `data_source` → licence, from the table on its dataset card (main). The values were counted
# by others who loaded it: MATH/PRM-800K 12298, reclor 4530, airoboros 2605, scienceqa 1317,
# leetcode_ne 1100, guanaco 797, ARB 713, scibench 616, theoremqa 564, tigerbot-kaggle 386.
PLATYPUS_LICENSES = {
    "MATH/PRM-800K": "MIT",
    "ARB": "CC-BY-4.0",
    "scienceqa": "CC-BY-NC-SA-4.0",
    "scibench": "MIT",
    "reclor": "non-commercial",
    "theoremqa": "MIT",
    "leetcode_ne": "unknown",
    "airoboros": "other",
    "tigerbot-kaggle": "Apache-2.0",
    "guanaco": "Apache-2.0",
}
# GPT-4 wrote airoboros and leetcode_ne; the solutions of PRM800K are a model's, people only judged their steps.
PLATYPUS_LLM_WRITTEN = frozenset({"airoboros", "leetcode_ne", "MATH/PRM-800K"})
# The parts of MathInstruct that people wrote, with their licences.
MATH_INSTRUCT_HUMAN = {
    "data/CoT/gsm_train.json": "MIT",
    "data/CoT/aqua_rat.json": "Apache-2.0",
    "data/CoT/MATH_train.json": "MIT",
}
MATH_ANSWER = "The answer is"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A dataset on the Hub. `columns` are those that the adapter needs; more may be there.

    A `revision` that is no commit is a branch, whose commit a run looks up and records.
    """

    repository: str
    revision: str
    data_files: str
    columns: tuple[str, ...]
    license: str
    layout: str
    adapt: Callable[[Record], Iterator[Row]]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a source's rows come from: a Hub repository at a commit, or a file with its SHA-256."""

    name: str
    location: str
    revision: str
    license: str


def origin_of(source: SourceSettings) -> Origin:
    """Resolve where `source` comes from, without reading its rows.

    A branch on the Hub is resolved to its commit. Raises ConfigError when the file isn't there or the
    Hub can't be reached.
    """
    known = HUB_DATASETS.get(source.name)
    license = source.license or (known.license if known else "unknown")
    if source.path is not None:
        if not source.path.endswith(SUFFIXES):
            raise ConfigError(f"source {source.name}: {source.path}: expected {', '.join(SUFFIXES)}")
        place = absolute(source.path)
        return Origin(source.name, place, f"sha256:{sha256_of_file(place, f'source {source.name}')}", license)
    assert known is not None  # by SourceSettings
    revision = _commit_of(source.name, known.repository, source.revision or known.revision)
    return Origin(source.name, known.repository, revision, license)


def source_problem(source: SourceSettings) -> str:
    """Why a source's rows can't be had: no such file, no network, a gated dataset without a token for it. Else "".

    Asks the Hub, and downloads nothing.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        origin = origin_of(source)
        if source.path is None and constants.HF_HUB_OFFLINE:
            _hub_files(source.name, origin)  # from the local cache
        elif source.path is None:
            HfApi().auth_check(origin.location, repo_type="dataset")
    except ConfigError as error:
        return str(error)
    except GatedRepoError:
        known = HUB_DATASETS[source.name].repository
        return (
            f"source {source.name}: {known} is gated: accept its terms at https://huggingface.co/datasets/{known} and "
            "set HF_TOKEN, or leave it out of mix.sources"
        )
    except (OSError, HTTPError) as error:
        return str(_unreachable(source.name, HUB_DATASETS[source.name].repository, error))
    return ""


def read_source(source: SourceSettings, origin: Origin) -> Iterator[pa.Table]:
    """A source's rows as OUTSIDE_ROWS tables of at most BATCH_ROWS rows; memory: one table.

    Row ids are `{source}:{hash of the text}` (`#2`, `#3` on repeats), so they don't depend on the rows'
    order. Raises ConfigError naming source, file and row where one is not in the expected layout.
    """
    seen: dict[int, int] = {}  # text hash → rows with it so far
    rows = _rows(source, origin)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        texts = (f"{row['instruction']}\x1f{row['input']}\x1f{row['output']}" for row in batch)
        digests = hash_all(text.encode("utf-8", "surrogatepass") for text in texts)
        for row, digest in zip(batch, digests.tolist(), strict=True):
            seen[digest] = count = seen.get(digest, 0) + 1
            row["row_id"] = f"{source.name}:{digest:016x}" + (f"#{count}" if count > 1 else "")
        yield pa.Table.from_pylist(batch, schema=OUTSIDE_ROWS)
    if not seen:
        raise ConfigError(
            f"source {source.name}: {origin.location} holds no rows; give another file or drop the source"
        )


def _rows(source: SourceSettings, origin: Origin) -> Iterator[Row]:
    if known := HUB_DATASETS.get(source.name):
        adapt, wanted, expected = known.adapt, known.columns, f"the layout of {known.repository}: {known.layout}"
    else:
        mapping = source.columns.model_dump(exclude_none=True) if source.columns else {}
        wanted, expected = tuple(mapping.values()), "what its `columns` name"

        def adapt(record: Record) -> Iterator[Row]:
            yield {name: record.get(column) for name, column in mapping.items()}

    files = [origin.location] if source.path is not None else _hub_files(source.name, origin)
    for file in files:
        records = read_records(file, f"source {source.name}")
        first = list(itertools.islice(records, PEEK_ROWS))
        found = dict.fromkeys(column for _, record in first if isinstance(record, Mapping) for column in record)
        for column in wanted if found else ():
            if column not in found:
                raise ConfigError(
                    f"source {source.name}: {file}: column {column!r} is missing{nearest(column, found)}; found "
                    f"{', '.join(found)}; expected {expected}"
                )
        for number, record in itertools.chain(first, records):
            where = f"source {source.name}: {file}, row {number}"
            if not isinstance(record, Mapping):
                raise ConfigError(f"{where}: expected an object with columns, found {type(record).__name__}")
            try:
                adapted = list(adapt(record))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ConfigError(
                    f"{where} is not in the expected layout ({type(error).__name__}: {error}); "
                    "its columns hold other types than the adapter knows"
                ) from None
            for row in adapted:
                yield _complete(row, source, origin, where)


def _complete(row: Row, source: SourceSettings, origin: Origin, where: str) -> Row:
    for name in ("instruction", "input", "output", "task", "license"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: {name} is {type(value).__name__}, expected text ({value!r:.60}); quote it")
    for name in ("llm_written", "unwanted"):
        if not isinstance(row.get(name), bool | None):
            raise ConfigError(f"{where}: {name} is {row[name]!r:.60}, expected true, false or null")
    return {
        "instruction": (row.get("instruction") or "") if source.instruction is None else source.instruction,
        "input": row.get("input") or "",
        "output": row.get("output") or "",
        "task": row.get("task") or source.name,
        "license": source.license or row.get("license") or origin.license,
        "llm_written": source.llm_written or bool(row.get("llm_written")),
        "unwanted": bool(row.get("unwanted")),
    }


def _hub_files(name: str, origin: Origin) -> list[str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    pattern = HUB_DATASETS[name].data_files
    try:
        folder = snapshot_download(
            origin.location, repo_type="dataset", revision=origin.revision, allow_patterns=[pattern]
        )
    except (OSError, HTTPError) as error:
        raise _unreachable(name, origin.location, error) from None
    files = sorted(str(file) for file in Path(folder).glob(pattern))
    if not files:
        raise ConfigError(f"source {name}: {origin.location} at {origin.revision} holds no {pattern}; set revision")
    return files


def _commit_of(name: str, repository: str, revision: str) -> str:
    # Asked even for a commit: where the Hub can't be reached this says so at once, while a download
    # retries for half a minute. With HF_HUB_OFFLINE=1 a commit may be in the local cache.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    is_commit = re.fullmatch("[0-9a-f]{40}", revision) is not None
    is_short = not is_commit and re.fullmatch("[0-9a-f]{7,39}", revision) is not None
    try:
        commit = HfApi().dataset_info(repository, revision=None if is_short else revision, timeout=20).sha
        if is_short:  # downloads take full hashes only
            commits = (one.commit_id for one in HfApi().list_repo_commits(repository, repo_type="dataset"))
            commit = next((one for one in commits if one.startswith(revision)), None)
    except OfflineModeIsEnabled as error:
        if not is_commit:
            raise _unreachable(name, repository, error) from None
        commit = revision
    except (OSError, HTTPError) as error:
        raise _unreachable(name, repository, error) from None
    if commit is None:
        raise ConfigError(f"source {name}: the Hub names no commit for {repository} at {revision}; set revision")
    return commit


def _unreachable(name: str, repository: str, error: Exception) -> ConfigError:
    detail = (one_line(error) or type(error).__name__)[:160]
    return ConfigError(
        f"source {name}: {repository} can't be had from the Hub ({detail}); a gated dataset needs HF_TOKEN; without "
        f"a network, download it elsewhere and give the file: sources: [{{name: {name}, path: FILE}}]"
    )


def lima(record: Record) -> Iterator[Row]:
    """The first question and answer of a conversation; longer ones lose their later turns, as published."""
    turns = record["conversations"]
    if len(turns) >= 2:
        yield {"instruction": "", "input": turns[0], "output": turns[1], "task": record["source"]}


def open_platypus(record: Record) -> Iterator[Row]:
    """A row as it is; without an input the instruction becomes the input, so that the short-input filter reads it."""
    source, text = record["data_source"], record["input"] or ""
    yield {
        "instruction": record["instruction"] if text.strip() else "",
        "input": text if text.strip() else record["instruction"],
        "output": record["output"],
        "task": source,
        "license": PLATYPUS_LICENSES.get(source, "unknown"),
        "llm_written": source in PLATYPUS_LLM_WRITTEN,
    }


def math_instruct(record: Record) -> Iterator[Row]:
    """Its three human-made parts are; the rest is marked LLM-written. A `####` marker before the answer goes."""
    source = record["source"]
    # GSM8K's solutions end in "#### 42" before "The answer is: 42"; the published script takes it out too.
    reasoning, phrase, answer = record["output"].partition(MATH_ANSWER)
    if phrase and "####" in reasoning:
        reasoning = reasoning[: reasoning.rindex("####")].rstrip() + "\n"
    yield {
        "instruction": "",
        "input": record["instruction"].strip(),
        "output": (reasoning + phrase + answer).strip(),
        "task": source,
        "license": MATH_INSTRUCT_HUMAN.get(source),
        "llm_written": source not in MATH_INSTRUCT_HUMAN,
    }


def quac(record: Record) -> Iterator[Row]:
    """One row per question of a dialogue: the text, the conversation so far, the original answer."""
    answers = record["orig_answers"]
    if isinstance(answers, Mapping):  # {texts: list[str]}, as `datasets` turns a list of {texts: str} around
        answers = answers["texts"]
    else:
        answers = [one["texts"] if isinstance(one["texts"], str) else one["texts"][0] for one in answers]
    conversation = f"{record['section_title']}\n{record['context'].removesuffix(QUAC_UNANSWERABLE).strip()}\n"
    for question, answer in zip(record["questions"], answers, strict=True):
        answer = CANNOT_ANSWER if answer == QUAC_UNANSWERABLE else answer
        conversation += f"\nQuestion: {question}"
        yield {"instruction": ANSWER_FROM_TEXT, "input": conversation, "output": answer, "task": "quac"}
        conversation += f"\nAnswer: {answer}"


def openbookqa(record: Record) -> Iterator[Row]:
    """The stem with its lettered options; the output is the right option's text."""
    labels, texts = record["choices"]["label"], record["choices"]["text"]
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    yield {
        "instruction": CHOOSE_COMPLETION,
        "input": f"{record['question_stem']}\n{options}",
        "output": texts[labels.index(record["answerKey"])],
        "task": "openbookqa",
    }


def cnn_dailymail(record: Record) -> Iterator[Row]:
    """An article and its highlights."""
    yield {
        "instruction": SUMMARIZE,
        "input": record["article"],
        "output": record["highlights"],
        "task": "cnn_dailymail",
    }


HUB_DATASETS: dict[str, HubDataset] = {
    "lima": HubDataset(
        "GAIR/lima",
        "main",  # gated
        "train.jsonl",
        ("conversations", "source"),
        "CC-BY-NC-SA or stricter",
        "conversations: list[str], question and answer in turn; source: str (cards of copies; lit-gpt's loader)",
        lima,
    ),
    "open_platypus": HubDataset(
        "garage-bAInd/Open-Platypus",
        "37141edbdb7826378cce118c46a109b813e1f038",
        "data/train-*.parquet",
        ("input", "output", "instruction", "data_source"),
        "mixed",
        "input, output, instruction, data_source: str (dataset_info.json of that commit, 24,926 rows)",
        open_platypus,
    ),
    "math_instruct": HubDataset(
        "TIGER-Lab/MathInstruct",
        "69a7014bdacac5907a47ac32ddfa463458277ffb",
        "MathInstruct.json",
        ("source", "output", "instruction"),
        "MIT",
        "source, output, instruction: str (file list of that commit; fields as the 2023 recipe's script reads them)",
        math_instruct,
    ),
    "quac": HubDataset(
        "allenai/quac",
        "f0afadd",
        "plain_text/train-*.parquet",
        ("section_title", "context", "questions", "orig_answers"),
        "MIT",
        "context, section_title: str; questions: list[str]; orig_answers: {texts: list[str], answer_starts: "
        "list[int]}, one a question; context ends in CANNOTANSWER (its dataset card, with an example record)",
        quac,
    ),
    "openbookqa": HubDataset(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        "main/train-*.parquet",
        ("question_stem", "choices", "answerKey"),
        "unknown",
        "question_stem: str; choices: {text: list[str], label: list[str]}; answerKey: str (code that reads it)",
        openbookqa,
    ),
    "cnn_dailymail": HubDataset(
        "abisee/cnn_dailymail",
        "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        "3.0.0/train-*.parquet",
        ("article", "highlights"),
        "Apache-2.0",
        "article, highlights, id: str (dataset_info of its card)",
        cnn_dailymail,
    ),
}
