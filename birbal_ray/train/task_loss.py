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

from birbal_ray.ni.prompt import ChatTemplate
from birbal_ray.train.data import encode_rows, pack_in_order, text_columns

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: its task, token ids, and where the answer begins among them."""

    task: str
    input_ids: list[int]
    loss_start: int


def read_samples(file: Path, tokenizer: Any, max_tokens: int, chat: ChatTemplate | None = None) -> list[Sample]:
    """Rows of a mix's split; those over `max_tokens` are left out."""
    table = pq.read_table(file, columns=["task", "source", *text_columns(chat=chat is not None)]).to_pydict()
    tasks = [task or source for task, source in zip(table["task"], table["source"], strict=True)]
    encoded = encode_rows(tokenizer, table, chat) if tasks else ()
    found = (Sample(task, ids, start) for task, (ids, start) in zip(tasks, encoded, strict=True))
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
        lengths = [len(sample.input_ids) for sample in samples]
        order = sorted(range(len(samples)), key=lengths.__getitem__)
        for places in pack_in_order(order, lengths, max(BATCH_TOKENS, *lengths)):
            batch = [samples[place] for place in places]
            # One row of T tokens, as in training: no padding, positions restart with each sample.
            ids = torch.tensor([token for sample in batch for token in sample.input_ids])
            positions = torch.cat([torch.arange(len(sample.input_ids)) for sample in batch])
            logits = model(
                input_ids=ids[None].to(device), position_ids=positions[None].to(device), use_cache=False
            ).logits[0]
            # (T - 1,): losses[t] is of token t + 1
            losses = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:].to(device), reduction="none")
            end = 0
            for sample in batch:
                start, end = end, end + len(sample.input_ids)
                answer = losses[start + max(1, sample.loss_start) - 1 : end - 1]
                sums[sample.task] += float(answer.sum())
                tokens[sample.task] += len(answer)
    model.train(training)
    return {task: sums[task] / tokens[task] for task in sorted(sums) if tokens[task]}


class AtSteps(TrainerCallback):
    """Calls `look(step, model)` after the given optimizer steps, and leaves the last one without a checkpoint.

    Who looks has seen all that it wants: an evaluation, the adapter, the optimizer's state would be written for nobody.
    """

    def __init__(self, steps: Collection[int], look: Callable[[int, Any], None]) -> None:
        self._steps, self._look = set(steps), look

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look, if the time has come."""
        if state.global_step in self._steps:
            self._look(state.global_step, model)
            control.should_evaluate = control.should_save = False
