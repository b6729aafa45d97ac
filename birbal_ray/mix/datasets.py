"""The outside datasets of the 2023 recipe: where each one is on the Hub, and how its records become rows.

Layouts and revisions were looked up, not tried (HUB_DATASETS says where). An adapter yields the rows of one record
as dicts with input and output, and optionally instruction, task (else the dataset's name), license, llm_written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Row = dict[str, Any]

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
    """A dataset on the Hub. A `revision` that is no commit is a branch, whose commit a run looks up and records."""

    repository: str
    revision: str
    data_files: str
    license: str
    adapt: Callable[[Record], Iterator[Row]]


def lima(record: Record) -> Iterator[Row]:
    """The first question and answer of a conversation; longer ones lose their later turns, as published."""
    turns = record["conversations"]
    if len(turns) >= 2:
        yield {"input": turns[0], "output": turns[1], "task": record["source"]}


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
        yield {"instruction": ANSWER_FROM_TEXT, "input": conversation, "output": answer}
        conversation += f"\nAnswer: {answer}"


def openbookqa(record: Record) -> Iterator[Row]:
    """The stem with its lettered options; the output is the right option's text."""
    labels, texts = record["choices"]["label"], record["choices"]["text"]
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    yield {
        "instruction": CHOOSE_COMPLETION,
        "input": f"{record['question_stem']}\n{options}",
        "output": texts[labels.index(record["answerKey"])],
    }


def cnn_dailymail(record: Record) -> Iterator[Row]:
    """An article and its highlights."""
    yield {
        "instruction": SUMMARIZE,
        "input": record["article"],
        "output": record["highlights"],
    }


HUB_DATASETS: dict[str, HubDataset] = {
    "lima": HubDataset(
        "GAIR/lima",
        "main",  # gated
        "train.jsonl",
        "CC-BY-NC-SA or stricter",
        # conversations: list[str], question and answer in turn; source: str (cards of copies; lit-gpt's loader)
        lima,
    ),
    "open_platypus": HubDataset(
        "garage-bAInd/Open-Platypus",
        "37141edbdb7826378cce118c46a109b813e1f038",
        "data/train-*.parquet",
        "mixed",
        # input, output, instruction, data_source: str (dataset_info.json of that commit, 24,926 rows)
        open_platypus,
    ),
    "math_instruct": HubDataset(
        "TIGER-Lab/MathInstruct",
        "69a7014bdacac5907a47ac32ddfa463458277ffb",
        "MathInstruct.json",
        "MIT",
        # source, output, instruction: str (file list of that commit; fields as the 2023 recipe's script reads them)
        math_instruct,
    ),
    "quac": HubDataset(
        "allenai/quac",
        "f0afadd97c1b0234ed5dc589b2259b9c2efa1743",  # a pull request's; main has a loading script only
        "plain_text/train-*.parquet",
        "MIT",
        # context, section_title: str; questions: list[str]; orig_answers: {texts: list[str], answer_starts: list[int]},
        # one a question; context ends in CANNOTANSWER (its dataset card, with an example record)
        quac,
    ),
    "openbookqa": HubDataset(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        "main/train-*.parquet",
        "unknown",
        # question_stem: str; choices: {text: list[str], label: list[str]}; answerKey: str (code that reads it)
        openbookqa,
    ),
    "cnn_dailymail": HubDataset(
        "abisee/cnn_dailymail",
        "96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
        "3.0.0/train-*.parquet",
        "Apache-2.0",
        # article, highlights, id: str (dataset_info of its card)
        cnn_dailymail,
    ),
}
