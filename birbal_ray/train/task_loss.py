"""Held-out loss of a model, task by task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import TrainerCallback

from birbal_ray.train.data import IGNORED, encode

BATCH_TOKENS = 2048  # padding included


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: token ids, labels (IGNORED but on the answer), its task."""

    task: str
    input_ids: list[int]
    labels: list[int]


def read_samples(file: Path, tokenizer: Any, max_tokens: int) -> list[Sample]:
    """Rows of a mix's split; those over `max_tokens` are left out."""
    table = pq.read_table(file, columns=["task", "source", "question", "answer"]).to_pydict()
    tasks = [task or source for task, source in zip(table["task"], table["source"], strict=True)]
    encoded = encode(tokenizer, table["question"], table["answer"]) if tasks else ()
    found = (Sample(task, ids, labels) for task, (ids, labels) in zip(tasks, encoded, strict=True))
    return [sample for sample in found if len(sample.input_ids) <= max_tokens]


def task_losses(model: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """Mean cross-entropy in nats per answer token, EOS included, of each task's samples.

    The model is left in the mode, training or not, that it came in.
    """
    sums: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in _batches(samples):
            width = max(len(sample.input_ids) for sample in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full((len(batch), width), IGNORED)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, sample in enumerate(batch):
                length = len(sample.input_ids)
                ids[row, :length] = torch.tensor(sample.input_ids)
                labels[row, :length] = torch.tensor(sample.labels)
                mask[row, :length] = 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].to(device).flatten(),
                ignore_index=IGNORED,
                reduction="none",
            ).view(len(batch), width - 1)
            for sample, loss in zip(batch, losses.sum(dim=1).tolist(), strict=True):
                sums[sample.task] += loss
                tokens[sample.task] += sum(label != IGNORED for label in sample.labels[1:])
    model.train(training)
    return {task: sums[task] / tokens[task] for task in sorted(sums) if tokens[task]}


def mean_over_tasks(losses: dict[str, float]) -> float:
    """Every task counts the same, whatever its answers' lengths."""
    return sum(losses.values()) / len(losses)


class AtSteps(TrainerCallback):
    """Calls `look(step, model)` after the given optimizer steps."""

    def __init__(self, steps: Collection[int], look: Callable[[int, Any], None]) -> None:
        self._steps, self._look = set(steps), look

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look, if the time has come."""
        if state.global_step in self._steps:
            self._look(state.global_step, model)


def _batches(samples: Sequence[Sample]) -> list[list[Sample]]:
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: (len(sample.input_ids), sample.task)):
        if batches and (len(batches[-1]) + 1) * len(sample.input_ids) <= BATCH_TOKENS:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches
